"""What the methods share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import ops
from ..errors import ArgumentError
from ..pruning import Certificate, Ledger
from ..sharding import Ranks
from ..sweep import Collect, LayerStep, Sweep
from ..targets import Targets

# Gradients of further targets that are held at once, one (B, S, D) tensor each; more targets go in several descents.
GRADIENT_BUDGET_BYTES = 512 * 2**20


class Method(ABC):
    """One call's worth of a relevancy method.

    Args:
        targets: what is explained.
        inputs: keyword arguments of ``model.forward``.
        prompt_length: column at which the answer starts, one for all samples or one each; where a method needs it.
        options: of ``options_type``; None for the method's defaults.

    Attributes:
        certificate: what the sweep kept of each target; None before it, and for a method without a sweep.
        explained: the logits whose gradients the method takes; the targets themselves unless a method needs more.

    Raises:
        ArgumentError: the method cannot explain these targets.
    """

    name: ClassVar[str]
    # A method that reads no gradient lets the forward run without activations.
    needs_gradient: ClassVar[bool] = True
    options_type: ClassVar[type | None] = None
    # Makes one gradient of all slots'; None where each has its own.
    collect: Collect | None = None

    def __init__(
        self,
        targets: Targets,
        inputs: Mapping[str, Any],
        prompt_length: int | Sequence[int] | None = None,
        options: Any = None,
    ) -> None:
        if options is not None and (self.options_type is None or not isinstance(options, self.options_type)):
            expected = "no options" if self.options_type is None else self.options_type.__name__
            raise ArgumentError(f"options: method {self.name!r} takes {expected}, got {options!r}")
        self.targets = targets
        self.explained = targets
        self.certificate: Certificate | None = None

    @abstractmethod
    def rows(self, sweep: Sweep) -> Tensor:
        """(N, S) relevancy of every column for every target, self entry included; fp32 (fp64 for an fp64 model)."""

    def in_chunks(self, sweep: Sweep) -> Tensor:
        """(N, S) rows: :meth:`swept` for as many slots at once as memory allows."""
        targets, result = self.targets, self.empty_rows(sweep)
        scalars, slots = targets.scalars(sweep.logits), targets.slots
        chunk = slots_at_once(sweep, targets)
        for first in range(0, len(slots), chunk):
            part = slice(first, first + chunk)
            row = self.swept(sweep, scalars[part], slots[part], keep=first + chunk < len(slots))
            targets.scatter(row, slots[part], result)
        return result

    def swept(
        self, sweep: Sweep, scalars: Sequence[Tensor], slots: Sequence[Sequence[int]], *, keep: bool = False
    ) -> Tensor:
        """(B, n, S) rows of ``slots`` after a descent; arguments as in :meth:`Sweep.descend`.

        Where the sweep has several tolerances to try, the first whose estimated error is below the dtype's rounding.
        """
        *attempts, last = sweep.tolerances
        for tolerance in (*attempts, last):
            final = tolerance == last
            row, ledger = self.descend(sweep, scalars, slots, tolerance, keep=keep or not final)
            if final or bool((sweep.ranks.agree(ledger.close(row)[2]) <= sweep.error_limit).all()):
                break
        self._enter(ledger, row, slots)
        return row

    def descend(
        self, sweep: Sweep, scalars: Sequence[Tensor], slots: Sequence[Sequence[int]], tolerance: float, *, keep: bool
    ) -> tuple[Tensor, Ledger]:
        """(B, n, S) rows of ``slots`` after one descent, and what it kept."""
        row, ledger = self.targets.start_rows(slots, sweep.logits.device, row_dtype(sweep)), Ledger()
        collect = self.collect

        def running() -> Tensor:
            # Slots that make one gradient together have no rows of their own.
            return row if collect is None else row.mean(1, keepdim=True)

        for step in sweep.descend(scalars, keep=keep, collect=collect, row_tolerance=tolerance, relevancy=running):
            row = advance(row, step, ledger, sweep.ranks)
        return row, ledger

    def _enter(self, ledger: Ledger, row: Tensor, slots: Sequence[Sequence[int]]) -> None:
        """Take what a descent over ``slots`` has kept into the method's certificate."""
        kept, dropped, error = ledger.close(row)
        if self.certificate is None:
            count, layers = len(self.targets), kept.shape[-1]
            self.certificate = Certificate(
                torch.zeros(count, layers, dtype=torch.int64), torch.zeros(count, layers), torch.zeros(count)
            )
        for found, into in (
            (kept, self.certificate.rows_kept),
            (dropped, self.certificate.dropped),
            (error, self.certificate.error),
        ):
            self.targets.scatter(found, slots, into)

    def empty_rows(self, sweep: Sweep) -> Tensor:
        """(N, S) zeros for the result."""
        shape = len(self.targets), self.targets.columns
        return torch.zeros(shape, dtype=row_dtype(sweep), device=sweep.logits.device)


def row_dtype(sweep: Sweep) -> torch.dtype:
    """Of running rows and results."""
    return torch.float64 if sweep.logits.dtype == torch.float64 else torch.float32


def advance(row: Tensor, step: LayerStep, ledger: Ledger, ranks: Ranks) -> Tensor:
    """row + row @ mean_h max(0, dP_h ∘ P_h): the running rows (B, N, S) one layer further down."""
    row = row.to(step.query.device)
    product = _product(row, step) if step.product is None else step.product
    product = ranks.mean(product.view_as(row))
    ledger.enter(step.selection, row, product)
    return row + product


def _product(row: Tensor, step: LayerStep) -> Tensor:
    weights = row
    if step.selection is not None:
        rows = step.selection.rows
        weights = row.gather(2, rows.expand(-1, row.shape[1], -1)).reshape(step.query.shape[0], -1, rows.shape[-1])
    return ops.relevancy_product(
        step.query,
        step.key,
        step.value,
        step.grad_output,
        step.logsumexp,
        weights,
        scale=step.scale,
        key_ranges=step.key_ranges,
    )


def slots_at_once(sweep: Sweep, targets: Targets) -> int:
    """How many slots' gradients fit in ``GRADIENT_BUDGET_BYTES``; at least one."""
    width = sweep.hidden_size
    size = targets.batch * targets.columns * width * sweep.logits.element_size()
    return max(1, GRADIENT_BUDGET_BYTES // size)
