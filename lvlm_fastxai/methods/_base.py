"""What the methods share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import ops
from ..sweep import LayerStep, Sweep
from ..targets import Targets

# Gradients of further targets that are held at once, one (B, S, D) tensor each; more targets go in several descents.
GRADIENT_BUDGET_BYTES = 512 * 2**20


class Method(ABC):
    """One call's worth of a relevancy method.

    Args:
        targets: what is explained.
        inputs: keyword arguments of ``model.forward``.
        prompt_length: column at which the answer starts, one for all samples or one each; where a method needs it.

    Attributes:
        explained: the logits whose gradients the method takes; the targets themselves unless a method needs more.

    Raises:
        ArgumentError: the method cannot explain these targets.
    """

    name: ClassVar[str]
    # A method that reads no gradient lets the forward run without activations.
    needs_gradient: ClassVar[bool] = True

    def __init__(
        self, targets: Targets, inputs: Mapping[str, Any], prompt_length: int | Sequence[int] | None = None
    ) -> None:
        self.targets = targets
        self.explained = targets

    @abstractmethod
    def rows(self, sweep: Sweep) -> Tensor:
        """(N, S) relevancy of every column for every target, self entry included; fp32 (fp64 for an fp64 model)."""

    def empty_rows(self, sweep: Sweep) -> Tensor:
        """(N, S) zeros for the result."""
        dtype = torch.float64 if sweep.logits.dtype == torch.float64 else torch.float32
        return torch.zeros(len(self.targets), self.targets.columns, dtype=dtype, device=sweep.logits.device)


def advance(row: Tensor, step: LayerStep) -> Tensor:
    """row + row @ mean_h max(0, dP_h ∘ P_h): the running rows (B, N, S) one layer further down."""
    row = row.to(step.query.device)
    return row + ops.relevancy_product(
        step.query,
        step.key,
        step.value,
        step.grad_output,
        step.logsumexp,
        row,
        scale=step.scale,
        key_ranges=step.key_ranges,
    )


def slots_at_once(sweep: Sweep, targets: Targets) -> int:
    """How many slots' gradients fit in ``GRADIENT_BUDGET_BYTES``; at least one."""
    width = sweep.hidden_size
    size = targets.batch * targets.columns * width * sweep.logits.element_size()
    return max(1, GRADIENT_BUDGET_BYTES // size)
