"""Train the shipped LVLM from a seed: ``python -m lvlm_fastxai.tiny.train``.

Two stages (`lvlm_fastxai.tiny.stages`). First the vision tower alone learns to say, for every patch, what lies under
it; these read-outs are thrown away afterwards. Then the whole model learns to answer, and half-way up the decoder to
say what each noun phrase of a question speaks of (`lvlm_fastxai.tiny.phrases`). Many questions about one picture share
a sequence: each block of question and answer sees the picture's tokens and itself, at the positions it would have
alone, so the numbers are those of one question at a time while the picture is paid once (`lvlm_fastxai.tiny.packing`).

The folder of ``--work`` holds the rendered scenes, the state to ``--resume`` from and the log of validations. SIGTERM
saves the state and the model and ends the run; a number in the files ``vision_steps`` and ``steps`` of that folder
moves the end of a stage while it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

# Spinning OpenMP threads slow each other down where cores are shared; torch reads this when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from ..files import write_whole, writing_folder
from ..training.stopping import Stop
from . import WEIGHTS, load_tiny_lvlm, scenes
from .accuracy import evaluate, held_out_pool, packed_accuracy, prior, show
from .data import SCENES_PER_SEED, Pool, add_questions, easy_vqa, easy_vqa_pool, load_pool, render_pool
from .model import build_model, save_checkpoint
from .optimizers import Workers
from .packing import TokenizedQuestions, tokenize
from .patches import PatchHeads
from .phrases import PhraseHeads
from .settings import Settings
from .stages import AnswerStage, Networks, Run, TrainingData, VisionStage

SUBSET = 200
"""Held-out questions of the small evaluation that ``training.json`` records beside the large one."""

_EASY_VQA_VALIDATION = 200


def _validation_pools(
    work: Path, num_scenes: int, easy: Pool | None, threads: int
) -> list[tuple[Pool, TokenizedQuestions]]:
    folder, seed = work / "validation", scenes.VALIDATION_SEEDS.start // SCENES_PER_SEED
    render_pool(folder, num_scenes=num_scenes, seed=seed, workers=threads, shard_size=num_scenes)
    pools = [load_pool(folder)] + ([easy] if easy else [])
    return [(pool, tokenize(pool)) for pool in pools]


def _part(pool: Pool, rows: slice) -> Pool:
    return Pool(pool.images[rows], pool.labels[rows], pool.offsets[rows], pool.centers[rows], pool.questions[rows])


def train(settings: Settings, work: Path, output: Path, *, threads: int, resume: bool, use_easy_vqa: bool) -> bool:
    """Follow the whole recipe, and write the checkpoint and ``training.json`` to ``output``.

    Args:
        settings: of the run.
        work: folder of the rendered scenes and of the state.
        output: folder of the checkpoint.
        threads: threads of the steps, and processes that render.
        resume: go on from the state in ``work``.
        use_easy_vqa: train and validate on easy-VQA too.

    Returns:
        False, and nothing is written to ``output``, where SIGTERM came before the second stage.
    """
    work.mkdir(parents=True, exist_ok=True)
    data = _training_data(settings, work, threads, use_easy_vqa)
    model = build_model(settings.seed)
    networks = Networks(
        model,
        PatchHeads(model.model.vision_tower.config.hidden_size),
        PhraseHeads(model.config.get_text_config().hidden_size),
    )
    run = Run(settings, work, Workers(threads), resume)
    with Stop() as stop:
        VisionStage(networks, data, run).run(stop)
        if stop.asked:
            return False
        answers = AnswerStage(networks, data, run)
        answers.run(stop)
    record = {
        "settings": asdict(settings),
        "parameters": sum(p.numel() for p in model.parameters()),
        "scenes": len(data.pool),
        "scene_questions": sum(map(len, data.pool.questions)),
        "easy_vqa_images": len(data.easy) if data.easy else 0,
        "easy_vqa_questions": sum(map(len, data.easy.questions)) if data.easy else 0,
        "steps": answers.step,
        "processor_seconds": round(answers.seconds),
        "validation": answers.history,
    }
    with writing_folder(output, argument="--output") as scratch:
        save_checkpoint(model, scratch)
        _write_record(scratch, record)
    return True


def _training_data(settings: Settings, work: Path, threads: int, use_easy_vqa: bool) -> TrainingData:
    render_pool(work / "pool", num_scenes=settings.scenes, seed=settings.seed, workers=threads)
    pool = load_pool(work / "pool")
    more = work / f"comparisons-{settings.comparisons}.json"
    add_questions(pool, "comparison", settings.comparisons, seed=settings.seed, workers=threads, cache=more)
    easy = easy_vqa_pool("train") if use_easy_vqa else None
    held_easy = _part(easy, slice(-_EASY_VQA_VALIDATION, None)) if easy else None
    easy = _part(easy, slice(0, -_EASY_VQA_VALIDATION)) if easy else None
    return TrainingData(pool, easy, _validation_pools(work, settings.validation_scenes, held_easy, threads))


def _write_record(output: Path, record: dict[str, Any]) -> None:
    write_whole(output / "training.json", (json.dumps(record, indent=1) + "\n").encode())


def record_accuracy(work: Path, output: Path, *, num_held_out: int, use_easy_vqa: bool) -> dict[str, Any]:
    """Measure the checkpoint in ``output`` on held-out questions, and add what was found to its ``training.json``.

    Beside the model stand guesses that were learnt from the training questions in ``work``.

    Returns:
        Right answers and questions per kind, by data set.
    """
    asked = [question for rows in load_pool(work / "pool").questions for question in rows]
    if use_easy_vqa:
        asked += [question for _, rows in easy_vqa("train") for question in rows]
    model, _ = load_tiny_lvlm(output)
    results = evaluate(model, num_held_out=num_held_out, use_easy_vqa=use_easy_vqa, guesses=prior(asked))
    subset = held_out_pool(SUBSET)
    right, _ = np.sum(list(packed_accuracy(model, subset, tokenize(subset)).values()), axis=0)
    record = json.loads((output / "training.json").read_text())
    record["accuracy"] = results
    # So that a test can repeat a piece of the evaluation in seconds.
    record["held_out_subset"] = {"questions": SUBSET, "right": int(right)}
    _write_record(output, record)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and evaluate as the command line asks; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lvlm_fastxai.tiny.train",
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for option in fields(Settings):
        flag, meaning = f"--{option.name.replace('_', '-')}", option.metadata["help"]
        parser.add_argument(flag, type=type(option.default), default=option.default, metavar="N", help=meaning)
    parser.add_argument("--work", type=Path, default=Path(".cache/tiny"), help="scenes, state and log of the run")
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="where the checkpoint goes")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch, and processes that render")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --work")
    parser.add_argument("--no-easy-vqa", action="store_true", help="train and evaluate without the package easy-vqa")
    parser.add_argument("--held-out", type=int, default=3000, metavar="N", help="held-out questions of the evaluation")
    parser.add_argument("--evaluate", action="store_true", help="evaluate the checkpoint in --output; train nothing")
    parsed = vars(parser.parse_args(arguments))
    work, output, threads, num_held_out, only_evaluate, resume = (
        parsed.pop(name) for name in ("work", "output", "threads", "held_out", "evaluate", "resume")
    )
    use_easy_vqa = not parsed.pop("no_easy_vqa")
    torch.set_num_threads(threads)
    settings = Settings(**parsed)
    if not only_evaluate and not train(
        settings, work, output, threads=threads, resume=resume, use_easy_vqa=use_easy_vqa
    ):
        print(f"stopped before the model could answer; --resume goes on from {work}")
        return 1
    results = record_accuracy(work, output, num_held_out=num_held_out, use_easy_vqa=use_easy_vqa)
    for name, accuracy in results.items():
        print(f"{name}: {show(accuracy)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
