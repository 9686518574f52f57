"""Chefer, Gur and Wolf, "Generic Attention-model Explainability" (ICCV 2021), self-attention rule, decoder-only.

Ā_l = mean_h max(0, dP_l[h] ∘ P_l[h])        row ← e_{q*};   for l = L … 1:  row ← row + row @ Ā_l
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from .. import ops
from ..sweep.descent import Descent, Walk
from ..sweep.forward import Sweep
from ..sweep.pruning import Ledger
from ..sweep.rows import LayerStep
from ..sweep.sharding import Ranks
from ._base import SweptMethod, row_dtype
from .registry import MethodName


def row_times_relevancy(row: Tensor, step: LayerStep) -> Tensor:
    """Return row @ mean_h max(0, dP_h ∘ P_h) of one layer, (B, N, S) as the rows are."""
    if step.product is not None:  # the backward gave it along the way
        return step.product.view_as(row)
    return ops.relevancy_product(
        *(step.query, step.key, step.value, step.grad_output, step.logsumexp, step.at_rows(row)),
        scale=step.scale,
        key_ranges=step.key_ranges,
    ).view_as(row)


class CheferWalk(Walk):
    """The running rows (B, N, S) of N slots on their way down.

    Args:
        start: e_{q*} of each target.
        ledger: is told what every layer kept and added.
        ranks: over which the model's heads are split.
    """

    def __init__(self, start: Tensor, ledger: Ledger, ranks: Ranks) -> None:
        self.row = start
        self.ledger = ledger
        self._ranks = ranks

    def down(self, step: LayerStep, slots: slice) -> None:
        """row ← row + row @ mean_h max(0, dP_h ∘ P_h)."""
        row = self.row.to(step.query.device)
        added = self._ranks.mean(row_times_relevancy(row, step))
        self.row = row + added
        self.ledger.enter(step.selection, row, added)

    def running(self) -> Tensor:
        """Return the rows: what a layer adds to the map depends on them."""
        return self.row

    def weights(self) -> Tensor | None:
        """Return the rows: they are known before the layer's backward."""
        return self.row


class Chefer(SweptMethod):
    """The rule on a teacher-forced pass over prompt and answer; every row uses the target's own gradient."""

    name: ClassVar[MethodName] = "chefer"

    def walk(self, start: Tensor, sweep: Sweep) -> CheferWalk:
        """Return the running rows at the top of the model."""
        return CheferWalk(start, Ledger(self.traits.error_factors), sweep.ranks)

    def descend(
        self, sweep: Sweep, scalars: Sequence[Tensor], slots: Sequence[Sequence[int]], tolerance: float, *, keep: bool
    ) -> tuple[Tensor, Ledger]:
        walk = self.walk(self.targets.start_rows(slots, sweep.logits.device, row_dtype(sweep)), sweep)
        for _ in Descent(sweep, scalars, walk, row_tolerance=tolerance, keep=keep):
            self.advanced(len(scalars), len(sweep))
        return walk.row, walk.ledger
