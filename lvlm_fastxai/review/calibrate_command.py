"""``lvlm-fastxai calibrate``: options, and what it does and prints. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import say
from ..errors import ArgumentError, printable
from .features import FEATURES, parse_features
from .live import Live, add_live_arguments

if TYPE_CHECKING:
    from .calibration import Calibration
    from .records import Labelled

__all__ = ["add_calibrate_arguments", "run_calibrate"]


def add_calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``lvlm-fastxai calibrate``."""
    add = parser.add_argument
    add(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="labelled answers: JSONL of `review run --records` or `review export`; or a source with reference "
        "answers, which is answered now: JSONL, a folder of `datasets`, or scenes:SPLIT?count=N",
    )
    add("--target", type=float, default=0.95, metavar="P", help="share of accepted answers to be right (default: 0.95)")
    delta_help = "chance that the chosen threshold misses the target (default: %(default)s)"
    add("--delta", type=float, default=0.05, metavar="D", help=delta_help)
    features_help = f"what the policy decides by: some of {', '.join(FEATURES)}, joined by commas; 'both' is the first "
    features_help += "two (default: all that the inputs have)"
    add("--features", type=_features, metavar="NAMES", help=features_help)
    held_help = "further inputs, of other pictures, that the finished policy is checked on; may be repeated"
    add("--held-out", action="append", default=[], metavar="INPUT", help=held_help)
    add("--out", type=Path, default=Path("policy.json"), metavar="FILE", help="policy to write (default: %(default)s)")
    plot_help = "risk–coverage plot to write (default: risk-coverage.png beside the policy, with matplotlib)"
    add("--plot", type=Path, metavar="FILE", help=plot_help)
    add("--seed", type=int, default=0, metavar="N", help="of the split into two parts (default: %(default)s)")
    add("--json", action="store_true", help="print the figures as JSON")
    add_live_arguments(parser)


def run_calibrate(args: argparse.Namespace) -> int:
    """Fit a policy, check it, write it and its plot, and print its figures.

    Returns:
        0.

    Raises:
        FastXAIError: with what to do.
    """
    from .calibration import calibrate

    for name in ("out", "plot"):
        path = getattr(args, name)
        if path is not None and not path.parent.is_dir():
            raise ArgumentError(f"--{name}: there is no folder '{path.parent}'")
    labelled, held = _read(args)
    answers = labelled.answers()
    calibration = calibrate(
        answers,
        target=args.target,
        delta=args.delta,
        features=args.features,
        held_out=None if held is None else held.answers(),
        seed=args.seed,
        identity=labelled.identity,
        source=", ".join(labelled.sources),
    )
    calibration.policy.save(args.out)
    written = _draw(args, calibration)
    notes = [*calibration.notes, *labelled.notes, *(() if held is None else held.notes)]
    if args.json:
        print(json.dumps({**calibration.report, "policy": asdict(calibration.policy), "notes": notes}))
    else:
        print(_report(calibration))
    for note in notes:
        say(f"note: {note}")
    say(f"written: {written}")
    return 0


def _features(text: str) -> tuple[str, ...]:
    try:
        return parse_features(text)
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("features: ")) from None


def _read(args: argparse.Namespace) -> tuple[Labelled, Labelled | None]:
    """Read the inputs and the held-out ones."""
    from .records import read_labelled

    live = Live(args)
    labelled = read_labelled(args.inputs, live, args.features)
    if not args.held_out:
        return labelled, None
    held = read_labelled(args.held_out, live, labelled.features)
    if held.identity != labelled.identity:
        raise ArgumentError("--held-out: its answers are of another model or map head than the inputs'")
    shared = len({row[2] for row in labelled.rows} & {row[2] for row in held.rows})
    if shared:
        raise ArgumentError(f"--held-out: {shared} of its pictures are among the inputs'; a check needs others")
    return labelled, held


def _draw(args: argparse.Namespace, calibration: Calibration) -> str:
    """Draw the plot, and say what has been written; without matplotlib only a plot that was asked for is an error."""
    from .plot import draw

    plot = args.plot or args.out.with_name("risk-coverage.png")
    try:
        draw(calibration, plot)
    except ArgumentError as error:
        if args.plot is not None:
            raise
        return f"{printable(args.out)} ({error})"
    return f"{printable(args.out)}, {printable(plot)}"


def _report(calibration: Calibration) -> str:
    """Return the figures as a table in plain text."""
    report = calibration.report
    parts = {"threshold part": report["threshold_part"]}
    if "held_out" in report:
        parts["held out"] = report["held_out"]
    lines = [
        f"{report['answers']} answers about {report['groups']} pictures: {report['fit']['answers']} to fit the model, "
        f"{report['threshold_part']['answers']} to choose the threshold"
    ]
    for name, part in parts.items():
        lines += ["", f"{name}: {part['answers']} answers about {part['groups']} pictures, {part['right']:.1%} right"]
        lines.append("  finds wrong answers   AUROC  95 % interval    AURC")
        for features, figures in part["figures"].items():
            lines.append(f"  {features:<20}{_figures(figures)}")
        lines.append("  " + _accepted(part))
        if name == "held out" and part["precision"] is not None:
            interval = f"{part['precision_low']:.1%} … {part['precision_high']:.1%}"
            verdict = "reaches" if part["kept"] else "stays below"
            lines.append(f"  its 95 % interval {interval} {verdict} the target {report['target']:.1%}")
    return "\n".join(lines)


def _figures(figures: Mapping[str, Any]) -> str:
    if figures["auroc"] is None:
        return f"      –                   {figures['aurc']:.4f}"
    low, high = figures["auroc_low"], figures["auroc_high"]
    interval = "" if low is None else f"{low:.3f} … {high:.3f}"
    return f"  {figures['auroc']:.3f}  {interval:<15}  {figures['aurc']:.4f}"


def _accepted(part: Mapping[str, Any]) -> str:
    if part["precision"] is None:
        return f"the policy accepts none of {part['answers']}"
    return (
        f"the policy accepts {part['accepted']} ({part['coverage']:.1%}), {part['precision']:.1%} of them right "
        f"(bound {part['precision_bound']:.1%})"
    )
