"""The way down: the gradients of N slots, from the explained logits through the layers to the first layer's input.

A method says what it does with a layer in a :class:`Walk`. The :class:`Descent` does the rest: it chooses the rows that
take part, takes the gradients through the layer and hands the method its queries, keys, values and dO.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from .forward import Sweep
from .pruning import WHOLE_LAYER_SHARE, Selection, select_rows
from .rows import Group, LayerStep, joined, through_all_rows, through_selected_rows, together
from .tape import Tape

Gradients = Sequence[Tensor | None]  # (B, S, D) of each slot at a layer's output; None for zeros


class Walk:
    """What a method does on the way down. A method overrides the hooks that it needs.

    Attributes:
        one_by_one: take every slot, or group of slots, as soon as its dO is there, so that the dO of only one is held.
        joins: whether :meth:`join` makes one dO of all slots'. They then share their rows: see `select_rows`.
    """

    one_by_one: ClassVar[bool] = False
    joins: ClassVar[bool] = False

    def running(self) -> Tensor | None:
        """Return the rows (B, N, S) above the next layer, or (B, 1, S) where slots are joined: its rows are chosen by
        them. None to choose by the gradients alone."""
        return None

    def identity(self) -> Tensor | None:
        """Return (B, N, S) identity rows if the method normalises the rows of its layers: see `select_rows`."""
        return None

    def weights(self) -> Tensor | None:
        """Return the rows (B, N, S) whose product a backward may give along the way; None if none is known yet."""
        return None

    def join(self, layer: int, grad_outputs: list[Tensor], rows: Tensor | None) -> Tensor:
        """Make one dO (B, 1, H, n, d) of the slots' (B, H, n, d), which stand at ``rows`` (B, n), or at all rows."""
        raise NotImplementedError

    def down(self, step: LayerStep, slots: slice) -> None:
        """Go down through one layer with the slots that ``step`` holds."""


class RowChoice(Protocol):
    """Which rows of a layer take part."""

    def choose(self, above: Gradients, walk: Walk) -> Selection | None:
        """Return a part of the rows, or None for all of them, by the gradients at the layer's output."""


class AllRows:
    """Every row of every layer: the exact sweep."""

    def choose(self, above: Gradients, walk: Walk) -> Selection | None:
        """Return None: all rows."""
        return None


class RowsWithGradient:
    """The rows that hold a share 1 − ``tolerance`` of a layer's score: the pruned sweep (see `select_rows`)."""

    def __init__(self, sweep: Sweep, tolerance: float) -> None:
        self._sweep = sweep
        self._tolerance = tolerance

    def choose(self, above: Gradients, walk: Walk) -> Selection | None:
        """Return the rows to keep, or None where they are so many that the whole layer costs less."""
        running, agree = walk.running(), self._sweep.ranks.agree
        selection = select_rows(
            row_norms(above), self._tolerance, relevancy=running, own=walk.identity(), shared=walk.joins
        )
        selection = Selection(*map(agree, (selection.rows, selection.counts, selection.norms)))
        return selection if selection.rows.shape[-1] <= WHOLE_LAYER_SHARE * self._sweep.columns else None


def row_norms(gradients: Gradients) -> Tensor:
    """(B, N, S) Euclidean norms of the rows of N gradients (B, S, D), in fp32 or above."""
    present = next(gradient for gradient in gradients if gradient is not None)
    norms = [
        present.new_zeros(present.shape[:2], dtype=torch.float32)
        if gradient is None
        else torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.promote_types(gradient.dtype, torch.float32))
        for gradient in gradients
    ]
    return torch.stack(norms, dim=1)


class Descent:
    """One way down the layers of a sweep: iterate over it once. Every layer is a :class:`LayerStep`, top layer first.

    Args:
        sweep: the forward, entered.
        slots: N scalars, each a sum of explained logits of different samples; one backward each, over one forward.
        walk: what is done with every layer, before the layer's step is handed out.
        row_tolerance: ε, one of ``sweep.tolerances``; 0 for all rows.
        keep: keep the activations for another descent (fast mode; the other modes recompute anyway).

    Attributes:
        first_input: (B, S, D) the first layer's input (the merged embeddings), after the last layer.
        input_gradients: (B, S, D) gradient at the first layer's input, one per slot, after the last layer.
    """

    def __init__(
        self,
        sweep: Sweep,
        slots: Sequence[Tensor],
        walk: Walk | None = None,
        *,
        row_tolerance: float = 0.0,
        keep: bool = False,
    ) -> None:
        self._sweep = sweep
        self._slots = slots
        self._walk = walk or Walk()
        self._keep = keep
        if row_tolerance > 0 and sweep.fallback is None:
            sweep.fallback = sweep.reason_against_parts()
        exact = row_tolerance == 0 or sweep.fallback is not None
        self._choice: RowChoice = AllRows() if exact else RowsWithGradient(sweep, row_tolerance)
        # Of every slot: layer → gradient at its output. More than one entry is open only while a model feeds an earlier
        # layer's output past the next layer.
        self._open: list[dict[int, Tensor]] = [{} for _ in slots]
        self.input_gradients: list[Tensor] = []
        self.first_input: Tensor

    def __iter__(self) -> Iterator[LayerStep]:
        top = len(self._sweep) - 1
        for number, slot in enumerate(self._slots):
            self._pull(number, slot, None, top, keep=self._keep or number + 1 < len(self._slots))
        for index in range(top, -1, -1):
            step = self._through(index)
            self._let_go(index)
            yield step
            step.release()

    def _through(self, index: int) -> LayerStep:
        """Take all slots through one layer, and the method with them."""
        walk, sweep = self._walk, self._sweep
        above = [gradients.pop(index, None) for gradients in self._open]
        selection = self._choice.choose(above, walk)
        if selection is None:
            groups = through_all_rows(sweep, index, above, walk.weights(), keep=self._keep)
        else:
            groups = through_selected_rows(sweep, index, above, selection, walk.weights(), keep=self._keep)
        steps = []
        for group in groups:
            if walk.one_by_one:
                walk.down(group.step, group.slots)
                group.step.release()
            elif group.step.product is not None:
                group.step.grad_output = torch.empty(0)
            steps.append(group.step)
            self._hand_on(index, group)
            self.first_input = group.leaf.detach()
        if walk.one_by_one:
            return replace(steps[0], selection=selection)
        step = joined(steps, selection, walk.join) if walk.joins else together(steps, selection)
        walk.down(step, slice(0, len(self._slots)))
        return step

    def _hand_on(self, index: int, group: Group) -> None:
        """Take a group's gradients at a layer's input to the outputs of the layers that it was made of."""
        bridge = self._sweep.layers[index].bridge
        for number, gradient in zip(range(len(self._slots))[group.slots], group.gradients, strict=True):
            if index == 0:
                self.input_gradients.append(gradient)
            elif bridge is None:
                self._add(number, index - 1, gradient)
            else:
                last = not self._keep and number + 1 == len(self._slots)
                self._pull(number, bridge, gradient, index - 1, keep=not last)
            del gradient

    def _pull(self, number: int, tensor: Tensor, gradient: Tensor | None, below: int, *, keep: bool) -> None:
        """Differentiate ``tensor`` with respect to every layer output that it was made of."""
        # A recording knows the boundary below the last layer's output only; no state goes past a layer in it.
        layers = self._sweep.layers[: below + 1]
        sources = {index: layer.boundary for index, layer in enumerate(layers) if layer.boundary is not None}
        found = torch.autograd.grad(tensor, list(sources.values()), gradient, retain_graph=keep, allow_unused=True)
        for index, part in zip(sources, found, strict=True):
            if part is not None:
                self._add(number, index, part)

    def _add(self, number: int, index: int, gradient: Tensor) -> None:
        gradients = self._open[number]
        gradients[index] = gradients[index] + gradient if index in gradients else gradient

    def _let_go(self, index: int) -> None:
        """Drop what no other descent needs of a layer."""
        layer, sweep = self._sweep.layers[index], self._sweep
        if not self._keep or not sweep.keeps_graphs:
            layer.graph, layer.tape = None, Tape()
        if not self._keep or sweep.memory != "fast":
            layer.keys = None
        if not self._keep:
            layer.input = layer.bridge = None
