"""Accuracy of the shipped LVLM on pictures it has not seen, and of guessing from the question alone.

``python -m lvlm_fastxai.tiny.accuracy`` measures the shipped weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from . import WEIGHTS, load_tiny_lvlm, scenes
from .data import GRID, KINDS, LABEL_NAMES, Asked, Pool, easy_vqa, resize
from .packing import TokenizedQuestions, answer_logits, normalize, pack, tokenize


@torch.inference_mode()
def packed_accuracy(
    model: LlavaForConditionalGeneration, pool: Pool, table: TokenizedQuestions, *, batch: int = 16
) -> dict[str, tuple[int, int]]:
    """Right answers and questions per kind.

    An answer is right where every token, ``<eos>`` included, is the most likely one after the right tokens before it:
    the very condition under which greedy generation gives the answer word for word.
    """
    right, asked = np.zeros(len(KINDS), dtype=np.int64), np.zeros(len(KINDS), dtype=np.int64)
    for start in range(0, len(pool), batch):
        rows = np.arange(start, min(start + batch, len(pool)))
        packed = pack([(table, np.arange(table.first[row], table.first[row + 1])) for row in rows])
        logits, _, _ = answer_logits(model, normalize(pool.images[rows]), packed)
        wrong = (logits.argmax(-1) != packed.targets).long()
        errors = torch.zeros(len(packed.kinds), dtype=torch.long).index_add_(0, packed.owner, wrong)
        np.add.at(asked, packed.kinds.numpy(), 1)
        np.add.at(right, packed.kinds.numpy(), (errors == 0).numpy().astype(np.int64))
    return {kind: (int(r), int(a)) for kind, r, a in zip(KINDS, right, asked, strict=True) if a}


def show(accuracy: dict[str, tuple[int, int]]) -> str:
    """ "color 97.1 % · shape ..." """
    return " · ".join(f"{kind} {100 * right / asked:.1f}" for kind, (right, asked) in accuracy.items())


def _pool(pictures: Iterable[tuple[Image.Image, list[Asked]]], total: int, title: str) -> Pool:
    """A pool for evaluation: pictures and questions, no patch labels."""
    images, questions = [], []
    for image, asked in tqdm(pictures, total=total, desc=title):
        images.append(resize(image))
        questions.append(asked)
    labels = np.zeros((0, GRID, GRID, len(LABEL_NAMES)), dtype=np.uint8)
    return Pool(np.stack(images), labels, labels[..., :2], labels[..., 0], questions)


def held_out_pool(n: int, seed: int = 0) -> Pool:
    """The pictures and questions of :func:`lvlm_fastxai.tiny.scenes.held_out`."""
    stream = ((image, [Asked(q.text, q.answer, q.kind)]) for image, q in scenes.held_out(n, seed))
    return _pool(stream, n, "held-out scenes")


def easy_vqa_test_pool() -> Pool:
    """The official test split of easy-VQA.

    Raises:
        ImportError: if easy-vqa is not installed.
    """
    pictures = list(easy_vqa("test"))
    return _pool(((Image.open(path), asked) for path, asked in pictures), len(pictures), "easy-VQA test")


def prior(questions: Iterable[Asked]) -> dict[str, dict[str, str]]:
    """Per kind, the most frequent answer to each question text; under "" that to all questions of the kind."""
    counts: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for question in questions:
        counts[question.kind][question.text][question.answer] += 1
        counts[question.kind][""][question.answer] += 1
    return {
        kind: {text: answers.most_common(1)[0][0] for text, answers in texts.items()} for kind, texts in counts.items()
    }


def prior_accuracy(table: Mapping[str, Mapping[str, str]], pool: Pool) -> dict[str, tuple[int, int]]:
    """Right answers and questions per kind for one who never looks at the picture; ``table`` is from :func:`prior`."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for question in chain.from_iterable(pool.questions):
        guesses = table[question.kind]
        asked[question.kind] += 1
        right[question.kind] += guesses.get(question.text, guesses[""]) == question.answer
    return {kind: (right[kind], asked[kind]) for kind in KINDS if asked[kind]}


def evaluate(
    model: LlavaForConditionalGeneration,
    *,
    num_held_out: int,
    seed: int = 0,
    use_easy_vqa: bool = True,
    guesses: Mapping[str, Mapping[str, str]] | None = None,
) -> dict[str, dict[str, tuple[int, int]]]:
    """Right answers and questions per kind: "held_out", "easy_vqa_test", and the guesses' under "..._prior"."""
    pools = {"held_out": held_out_pool(num_held_out, seed)}
    if use_easy_vqa:
        pools["easy_vqa_test"] = easy_vqa_test_pool()
    results = {}
    for name, pool in pools.items():
        results[name] = packed_accuracy(model, pool, tokenize(pool))
        if guesses is not None:
            results[f"{name}_prior"] = prior_accuracy(guesses, pool)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lvlm_fastxai.tiny.accuracy",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="checkpoint folder")
    parser.add_argument("--held-out", type=int, default=2000, metavar="N", help="questions about generated scenes")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which run of held-out scenes")
    parser.add_argument("--no-easy-vqa", action="store_true", help="leave easy-VQA's test split out")
    parser.add_argument("--json", action="store_true", help="print right answers and questions as JSON")
    parsed = parser.parse_args(arguments)
    model, _ = load_tiny_lvlm(parsed.weights)
    results = evaluate(model, num_held_out=parsed.held_out, seed=parsed.seed, use_easy_vqa=not parsed.no_easy_vqa)
    if parsed.json:
        print(json.dumps(results))
        return 0
    for name, accuracy in results.items():
        right, asked = np.sum(list(accuracy.values()), axis=0)
        print(f"{name}: {right} of {asked}, {100 * right / asked:.2f} %")
        for kind, (kind_right, kind_asked) in accuracy.items():
            print(f"  {kind:<18} {kind_right:>5} of {kind_asked:<5} {100 * kind_right / kind_asked:6.2f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
