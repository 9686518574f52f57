"""The time of a further target against S: dense, pruned, and of the latter the key/value part."""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ...common import timing
from ...common.results import Point, as_table
from . import cases
from .cases import Case
from .descents import bar, described, load_smollm2, opened
from .texts import TWO_TEXTS, Reader
from .times import Dense


@contextlib.contextmanager
def key_value_clock() -> Iterator[list[float]]:
    """Time every backward through a layer's key and value projections: the sweep's only one of a pair."""
    original, spent = torch.autograd.grad, []

    def timed(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        if type(outputs) is not tuple:  # an edge of the graph is a tuple too, but of a class of its own
            return original(outputs, *args, **kwargs)
        start = time.perf_counter()
        try:
            return original(outputs, *args, **kwargs)
        finally:
            spent.append(time.perf_counter() - start)

    torch.autograd.grad = timed
    try:
        yield spent
    finally:
        torch.autograd.grad = original


def growth(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure the seconds per further target for every S."""
    model, tokenizer = load_smollm2()
    reader = Reader(tokenizer, args.texts)
    points: list[Point] = []
    with bar(len(args.lengths) * len(TWO_TEXTS) * args.targets, "growth") as progress:
        for columns in args.lengths:
            for case in cases.ordinary(reader, TWO_TEXTS, columns, args.targets):
                points += growth_points(model, case, args)
                progress.update(args.targets)
            yield as_table(points)


def growth_points(model: Any, case: Case, args: argparse.Namespace) -> list[Point]:
    """Measure one point per target; its ratio is to the dense backward of the same round."""
    numbers = range(len(case.targets))
    dense = Dense(model, case)
    parts: dict[int, list[float]] = {number: [] for number in numbers}
    made = []
    with opened(model, case) as descents:
        dense.backward(0)
        for number in numbers:  # warms up
            descents.row(number, args.tolerance)
            made.append(descents.certificate(number))
        calls: dict[Any, Callable[[], object]] = {"dense": partial(dense.backward, 0)}
        calls |= {number: partial(descents.row, number, args.tolerance) for number in numbers}
        taken = timing.in_turns(calls, args.rounds, warm_up=False)
        for number in numbers:
            for _ in range(args.rounds):
                with key_value_clock() as spent:
                    descents.row(number, args.tolerance)
                parts[number].append(sum(spent))
            # Layers swept whole have no key/value part of their own.
            made[number]["parts"] = len(spent)
    return [
        {
            **described(case, number),
            **{key: made[number][key] for key in ("kept", "rows", "parts")},
            "dense_seconds": statistics.median(taken["dense"]),
            "seconds": statistics.median(taken[number]),
            "key_value_seconds": statistics.median(parts[number]),
            "ratio": timing.median_ratio(taken[number], taken["dense"]),
        }
        for number in numbers
    ]
