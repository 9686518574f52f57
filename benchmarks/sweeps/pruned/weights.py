"""How many rows it takes to err as much as bf16 does, over what a row's part in the map counts."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy
from torch import Tensor

from ...common.results import Point, as_table
from . import cases
from .descents import (
    Descents,
    bar,
    compare,
    described,
    exact_rows,
    half_copy,
    half_points,
    load_smollm2,
    opened,
)
from .texts import QUESTIONS, TWO_TEXTS, Reader

WEIGHTS = (0.0, 1.0, 5.0, 15.0)
# What the rows needed for a given error are interpolated between, largest first.
TOLERANCES = (0.8, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.035, 0.025, 0.017, 0.012, 0.008, 0.005, 0.003)


def weights(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure the share of the rows that every weight of the selection's second term keeps."""
    model, tokenizer = load_smollm2()
    half, reader = half_copy(model), Reader(tokenizer, args.texts)
    points: list[Point] = []
    with bar(len(args.lengths) * (len(TWO_TEXTS) * args.targets + len(QUESTIONS)), "weights") as progress:
        for columns in args.lengths:
            chosen = cases.answers(model, reader, QUESTIONS, columns)
            chosen += cases.ordinary(reader, TWO_TEXTS, columns, args.targets)
            for case in chosen:
                exact = exact_rows(model, case)
                dense = half_points(half, case, exact)
                with opened(model, case) as descents:
                    for number, lost in enumerate(dense):
                        for weight in WEIGHTS:
                            kept = rows_for_error(descents, number, exact[number], lost, weight)
                            points.append({**described(case, number), "weight": weight, "kept": kept})
                        progress.update(1)
                yield {"points": as_table(points)}


def rows_for_error(descents: Descents, number: int, exact: Tensor, lost: Point, weight: float) -> float:
    """Find the share of the rows at which the pruned row errs as ``lost`` does, between the tolerances around it."""
    from lvlm_fastxai.sweep import pruning

    before = pruning.RELEVANCY_WEIGHT
    pruning.RELEVANCY_WEIGHT = weight
    found: list[tuple[float, float]] = []
    try:
        for tolerance in TOLERANCES:
            error = compare(descents.row(number, tolerance), exact, lost["row"])["error"]
            found.append((error, descents.certificate(number)["kept"]))
            if error <= lost["error"]:
                break
    finally:
        pruning.RELEVANCY_WEIGHT = before
    (low, more), (high, fewer) = found[-1], found[max(0, len(found) - 2)]
    share = numpy.interp(numpy.log(lost["error"]), numpy.log([low, high]), numpy.log([more, fewer]))
    return float(numpy.exp(share))
