"""One fp32 forward of a case, and its targets' rows at any tolerance, compared with the exact ones.

The error of a row is its relative L1 error with the self entry taken out; dense bf16 is the exact sweep of the model
cast to bf16.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from ...common.results import Point
from .cases import Case

Progress = Callable[[int], object]


class Descents:
    """One fp32 forward of a case; its targets' rows one by one, at any tolerance, keys and values kept between them."""

    def __init__(self, sweep: Any, method: Any) -> None:
        self._sweep, self._method = sweep, method
        self._scalars = method.targets.scalars(sweep.logits)

    def row(self, number: int, tolerance: float) -> Tensor:
        """Compute (S,) relevancy of target ``number``."""
        targets = self._method.targets
        self._sweep.tolerances = (tolerance,)
        part = slice(number, number + 1)
        return self._method.swept(self._sweep, self._scalars[part], targets.slots[part], keep=True)[0, 0]

    def certificate(self, number: int) -> Point:
        """Say what the last row of target ``number`` was made of: rows kept, and the error estimate's two parts."""
        found, seen = self._method.certificate, self._method.targets.query_rows[number] + 1
        kept = found.rows_kept[number].clamp(max=seen).double().mean().item()
        dropped, estimate = found.dropped[number].mean().item(), found.error[number].item()
        missing_factor, dropped_factor = self._method.traits.error_factors
        missing = max(0.0, (estimate - dropped_factor * dropped) / missing_factor)
        return {"kept": kept / seen, "rows": kept, "missing": missing, "dropped": dropped}


@contextlib.contextmanager
def opened(model: Any, case: Case, method_name: str = "chefer") -> Iterator[Descents]:
    """Run the case's forward, for any number of descents."""
    from lvlm_fastxai import methods
    from lvlm_fastxai.sweep.forward import Sweep
    from lvlm_fastxai.sweep.targets import check_targets

    method = methods.find(method_name)(check_targets(case.targets, dict(case.inputs), None), case.inputs)
    # Any tolerance but 0: the layers' graphs are then not kept, which is how a pruned sweep runs.
    with Sweep(model, case.inputs, method.explained.row_table(), "fast", 0.1) as sweep:
        yield Descents(sweep, method)


def compare(row: Tensor, exact: Tensor, query_row: int) -> Point:
    """Compare a row with the exact one, both without their self entry and up to the row that was asked."""
    found, truth = (each[: query_row + 1].double().numpy().copy() for each in (row, exact))
    found[query_row] = truth[query_row] = 0
    best, wanted = (set(numpy.argsort(-each, kind="stable")[:10].tolist()) for each in (found, truth))
    return {
        "error": float(numpy.abs(found - truth).sum() / truth.sum()),
        "rank_correlation": float(numpy.corrcoef(ranks(found[:-1]), ranks(truth[:-1]))[0, 1]),
        "top_10": len(best & wanted) / len(wanted),
    }


def ranks(values: numpy.ndarray) -> numpy.ndarray:
    """Rank values; equal ones share the mean of their ranks."""
    _, place, count = numpy.unique(values, return_inverse=True, return_counts=True)
    return (count.cumsum() - (count - 1) / 2)[place]


def exact_rows(model: Any, case: Case, method: str = "chefer") -> Tensor:
    """Compute (N, S) rows of the dense sweep in the model's own dtype."""
    import lvlm_fastxai as fx

    inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in case.inputs.items()}
    return fx.relevancy_rows(model, inputs, case.targets, method=method)


def points_of(
    descents: Descents, case: Case, exact: Tensor, tolerances: Sequence[float], done: Progress = lambda number: None
) -> list[Point]:
    """Measure one point per target and tolerance."""
    points = []
    for number, (_, query_row, _) in enumerate(case.targets):
        for tolerance in tolerances:
            row = descents.row(number, tolerance)
            points.append(
                {
                    **described(case, number),
                    "tolerance": tolerance,
                    **descents.certificate(number),
                    **compare(row, exact[number], query_row),
                }
            )
        done(1)
    return points


def described(case: Case, number: int) -> Point:
    """Name a target in a point."""
    return {"case": case.name, "kind": case.kind, "columns": case.columns, "row": case.targets[number][1]}


def half_points(half: Any, case: Case, exact: Tensor, method: str = "chefer") -> list[Point]:
    """Measure what dense bf16 loses, one point per target. ``half`` is the model in bf16."""
    return [
        {**described(case, number), **compare(row, exact[number], case.targets[number][1])}
        for number, row in enumerate(exact_rows(half, case, method))
    ]


def load_smollm2() -> tuple[Any, Any]:
    """Load SmolLM2 in fp32, parameters frozen, and its tokenizer."""
    from ...models.smollm2 import load_smollm2

    model, tokenizer = load_smollm2()
    return model.requires_grad_(False), tokenizer


def half_copy(model: Any) -> Any:
    """Copy a model in bf16, parameters frozen."""
    return copy.deepcopy(model).to(torch.bfloat16).requires_grad_(False)


def bar(total: int, title: str, unit: str = "target") -> Any:
    """Make a progress bar."""
    from tqdm import tqdm

    return tqdm(total=total, desc=title, unit=unit, file=sys.stderr)
