"""The error estimate's two constants: fitted to calibration cases, judged by held-out ones."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from ...common.results import Point, as_points, as_table, load_parts
from ...models.smollm2 import load_smollm2
from . import cases, texts
from .descents import bar, exact_rows, opened, points_of
from .texts import Question, Reader, Text

CALIBRATION_TOLERANCES = (0.01, 0.02, 0.05, 0.1, 0.2)
HELD_OUT_TOLERANCES = (0.015, 0.03, 0.07, 0.15, 0.3)


def calibrate(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Fit the estimate's constants to calibration cases and judge them by held-out ones."""
    results: dict[str, Any] = {}
    for results in [load_parts(args.out)["calibrate"]["results"]] if args.refit else measure_estimates(args):
        yield results
    calibration, held_out = as_points(results["calibration"]), as_points(results["held_out"])
    fitted = fit_estimate(calibration, args.coverage)
    transfer = fit_estimate([point for point in calibration if point["kind"] != "picture"], args.coverage)
    names = ("MISSING_FACTOR", "DROPPED_FACTOR")
    yield {
        "calibration": results["calibration"],
        "held_out": results["held_out"],
        "fitted": dict(zip(names, fitted, strict=True)),
        "coverage": {"calibration": coverage(calibration, *fitted), "held out": coverage(held_out, *fitted)},
        "fitted without pictures": dict(zip(names, transfer, strict=True)),
        "coverage without pictures": {"held out": coverage(held_out, *transfer)},
    }


def check_calibration(args: argparse.Namespace) -> None:
    """Refuse to judge the estimate by what it was fitted to, or to fit it to nothing."""
    if args.refit and "calibrate" not in load_parts(args.out):
        raise SystemExit(f"calibrate --refit: {args.out} holds no calibration points; run it without --refit first")
    both = set(args.lengths) & set(args.held_out_lengths)
    if both:
        raise SystemExit(f"calibrate: lengths {sorted(both)} are among both the calibration's and the held-out ones")


@dataclass(frozen=True)
class Side:
    """The cases of one side; no file, length, ε or picture is on both."""

    texts: Mapping[str, Text]
    questions: Mapping[str, Question]
    lengths: Sequence[int]
    tolerances: Sequence[float]
    pictures: Iterator[tuple[Any, Any]]


def measure_estimates(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure points of calibration and held-out cases, growing."""
    import lvlm_fastxai as fx
    from lvlm_fastxai.tiny import scenes

    sides = {
        "calibration": Side(
            texts.CALIBRATION_TEXTS,
            texts.CALIBRATION_QUESTIONS,
            args.lengths,
            CALIBRATION_TOLERANCES,
            scenes.validation(args.pictures),
        ),
        "held_out": Side(
            texts.TEXTS,
            texts.QUESTIONS,
            args.held_out_lengths,
            HELD_OUT_TOLERANCES,
            scenes.held_out(args.pictures, seed=1),
        ),
    }
    model, tokenizer = load_smollm2()
    reader, tiny = Reader(tokenizer, args.texts), fx.load_tiny_lvlm()
    results: dict[str, list[Point]] = {name: [] for name in sides}
    for name, side in sides.items():
        for points in measure_texts(name, side, model, reader, args):
            results[name] += points
            yield {key: as_table(found) for key, found in results.items()}
        results[name] += measure_pictures(name, side, *tiny, args)
        yield {key: as_table(found) for key, found in results.items()}


def measure_texts(name: str, side: Side, model: Any, reader: Reader, args: argparse.Namespace) -> Iterator[list[Point]]:
    """Measure the points of one side's texts and questions, length by length."""
    total = len(side.lengths) * (len(side.texts) + len(side.questions)) * args.targets
    with bar(total, f"{name}: texts") as progress:
        for columns in side.lengths:
            points = []
            chosen = cases.ordinary(reader, side.texts, columns, args.targets)
            for case in chosen + cases.answers(model, reader, side.questions, columns, args.targets):
                exact = exact_rows(model, case, args.method)
                with opened(model, case, args.method) as descents:
                    points += points_of(descents, case, exact, side.tolerances, progress.update)
            yield points


def measure_pictures(name: str, side: Side, model: Any, processor: Any, args: argparse.Namespace) -> list[Point]:
    """Measure the points of one side's pictures, with the shipped LVLM."""
    points = []
    with bar(args.pictures, f"{name}: pictures", "picture") as progress:
        for picture in cases.pictures(model, processor, side.pictures):
            exact = exact_rows(model, picture.case, args.method)
            with opened(model, picture.case, args.method) as descents:
                points += points_of(descents, picture.case, exact, side.tolerances)
            progress.update(1)
    return points


def fit_estimate(points: Sequence[Point], wanted: float) -> tuple[float, float]:
    """Find (a, b) of error ≤ a · missing + b · dropped in a share ``wanted`` of each kind, with the least slack.

    For a given b / a the smallest a is a quantile of the ratios, so only b / a is searched. The kind that needs most
    sets the scale: a large group must not hide a small one. The slack is the median of log(estimate / error), its mean
    over the kinds.
    """
    kept = [point for point in points if point["dropped"] > 0 and point["error"] > 0]
    error, missing, dropped = (numpy.array([p[name] for p in kept]) for name in ("error", "missing", "dropped"))
    kinds = numpy.array([point["kind"] for point in kept])
    best: tuple[float, float, float] | None = None
    for weight in (0.0, *numpy.logspace(-5, 1, 241), numpy.inf):
        a, b = (0.0, 1.0) if weight == numpy.inf else (1.0, float(weight))
        shape = a * missing + b * dropped
        if not (shape > 0).all():
            continue
        ratio = error / shape
        groups = [ratio[kinds == kind] for kind in sorted(set(kinds))]
        scale = max(float(numpy.quantile(group, wanted, method="higher")) for group in groups)
        slack = statistics.fmean(float(numpy.median(numpy.log(scale / group))) for group in groups)
        if best is None or slack < best[0]:
            best = slack, scale * a, scale * b
    if best is None:
        raise SystemExit("calibrate: no case left anything out; nothing to fit")
    return round_up(best[1]), round_up(best[2])


def round_up(value: float) -> float:
    """Round up to two significant digits.

    >>> round_up(0.0121), round_up(3.0)
    (0.013, 3.0)
    """
    if value == 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.2g}")


def coverage(points: Sequence[Point], missing_factor: float, dropped_factor: float) -> dict[str, Any]:
    """Count how often the estimate covers the true error, and by how much it is above, for each group of points."""
    kept = [point for point in points if point["dropped"] > 0]

    def group(chosen: Sequence[Point]) -> Point:
        error = numpy.array([p["error"] for p in chosen])
        estimate = numpy.array([missing_factor * p["missing"] + dropped_factor * p["dropped"] for p in chosen])
        over = estimate / numpy.maximum(error, 1e-12)
        return {
            "points": len(chosen),
            "covered": float((error <= estimate).mean()),
            "over": [float(f"{q:.3g}") for q in numpy.quantile(over, (0.05, 0.5, 0.95))],
        }

    groups = {"all": kept, "texts": [point for point in kept if point["kind"] != "picture"]}
    picture_lengths = {point["columns"] for point in kept if point["kind"] == "picture"}
    for name in ("kind", "columns", "tolerance"):
        for value in sorted({point[name] for point in kept}):
            if name != "columns" or value not in picture_lengths:
                groups[f"{name} {value}"] = [point for point in kept if point[name] == value]
    return {name: group(chosen) for name, chosen in groups.items() if chosen}
