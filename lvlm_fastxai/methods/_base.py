"""What the methods share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..sweep.forward import Sweep
from ..sweep.pruning import Certificate, Ledger
from ..sweep.targets import Targets
from . import registry
from .registry import MethodName, MethodTraits

# Gradients of further targets that are held at once, one (B, S, D) tensor each; more targets go in several descents.
GRADIENT_BUDGET_BYTES = 512 * 2**20


class Method(ABC):
    """One call's worth of a relevancy method.

    Args:
        targets: what is explained.
        inputs: keyword arguments of ``model.forward``.
        prompt_length: column at which the answer starts, one for all samples or one each; where a method needs it.
        options: of the class that the registry names; None for the method's defaults.

    Attributes:
        certificate: what the sweep kept of each target; None before it, and for a method without a sweep.
        explained: the logits whose gradients the method takes; the targets themselves unless a method needs more.
        progress: called as ``progress(done, total)`` whenever a layer is done.
        compare: whether the companion's rows are wanted too; they come of the same backward.
        compared: (N, S) rows of the companion for the same targets, where they were asked for.
        on_rows: takes the targets' numbers and their rows (n, S) as they are done; none are kept then.

    Raises:
        ArgumentError: the method cannot explain these targets.
    """

    name: ClassVar[MethodName]

    def __init__(
        self,
        targets: Targets,
        inputs: Mapping[str, Any],
        prompt_length: int | Sequence[int] | None = None,
        options: Any = None,
    ) -> None:
        self.targets = targets
        self.explained = targets
        self.certificate: Certificate | None = None
        self.compare = False
        self.compared: Tensor | None = None
        self.progress: Callable[[int, int], None] = lambda done, total: None
        self.on_rows: Callable[[list[int], Tensor], None] | None = None
        self._done = 0

    @property
    def traits(self) -> MethodTraits:
        """What the registry says of the method."""
        return registry.find(self.name)

    @abstractmethod
    def rows(self, sweep: Sweep) -> Tensor:
        """(N, S) relevancy of every column for every target, self entry included; fp32 (fp64 for an fp64 model)."""

    def empty_rows(self, sweep: Sweep) -> Tensor:
        """(N, S) zeros for the result; (0, S) where rows are handed on."""
        shape = len(self.targets) if self.on_rows is None else 0, self.targets.columns
        return torch.zeros(shape, dtype=row_dtype(sweep), device=sweep.logits.device)


class SweptMethod(Method):
    """A method whose rows come down the layers of a sweep, as many slots at once as memory allows."""

    def rows(self, sweep: Sweep) -> Tensor:
        return self.in_chunks(sweep)

    def in_chunks(self, sweep: Sweep) -> Tensor:
        """(N, S) rows, (0, S) with ``on_rows``: :meth:`swept` for as many slots at once as memory allows."""
        targets, result = self.targets, self.empty_rows(sweep)
        scalars, slots = targets.scalars(sweep.logits), targets.slots
        chunk = slots_at_once(sweep, targets)
        for first in range(0, len(slots), chunk):
            part = slice(first, first + chunk)
            row = self.swept(sweep, scalars[part], slots[part], keep=first + chunk < len(slots))
            if self.on_rows is None:
                targets.scatter(row, slots[part], result)
            else:
                numbers = [target for slot in slots[part] for target in slot]
                places = [number for number, slot in enumerate(slots[part]) for _ in slot]
                self.on_rows(numbers, row[[targets.samples[target] for target in numbers], places])
        return result

    def advanced(self, slots: int, layers: int) -> None:
        """Tell of one more layer, of so many slots."""
        total = layers * len(self.explained.slots)
        # A descent that is made again, at a lower tolerance, finds its layers counted.
        self._done = min(self._done + slots, total)
        self.progress(self._done, total)

    def swept(
        self, sweep: Sweep, scalars: Sequence[Tensor], slots: Sequence[Sequence[int]], *, keep: bool = False
    ) -> Tensor:
        """(B, n, S) rows of ``slots`` after a descent; arguments as of a `Descent`.

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

    @abstractmethod
    def descend(
        self, sweep: Sweep, scalars: Sequence[Tensor], slots: Sequence[Sequence[int]], tolerance: float, *, keep: bool
    ) -> tuple[Tensor, Ledger]:
        """Return the (B, n, S) rows of ``slots`` after one descent, and what it kept."""

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


def row_dtype(sweep: Sweep) -> torch.dtype:
    """Of running rows and results."""
    return torch.float64 if sweep.logits.dtype == torch.float64 else torch.float32


def slots_at_once(sweep: Sweep, targets: Targets) -> int:
    """How many slots' gradients fit in ``GRADIENT_BUDGET_BYTES``; at least one."""
    width = sweep.hidden_size
    size = targets.batch * targets.columns * width * sweep.logits.element_size()
    return max(1, GRADIENT_BUDGET_BYTES // size)
