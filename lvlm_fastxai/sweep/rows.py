"""How the gradients of the slots go through one layer: through all of its rows, or through a part of them.

Both ways give one :class:`LayerStep` for each group of slots that goes through the layer together, and the gradients
that these slots leave at the layer's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ops.key_ranges import real_columns
from .attention import request_backward
from .forward import Layer, Sweep
from .pruning import Selection, rows_of_call, take_rows
from .tape import Record, Request, Tape

# Makes one dO of all slots': (layer, dO (B, H, n, d) of each slot, the rows (B, n) they stand at or None for all) to
# (B, N', H, n, d).
Join = Callable[[int, list[Tensor], Tensor | None], Tensor]
# The tensors of a step whose first axis is B·N where each slot has rows of its own.
FOLDED = ("query", "key", "value", "logsumexp", "key_ranges")


@dataclass(slots=True)
class LayerStep:
    """One layer on the way down; its tensors are let go when the next step is asked for.

    Attributes:
        index: of the layer, 0 at the bottom.
        query: (B, H, Sq, d).
        key, value: (B, Hkv, Sk, d).
        logsumexp: (B, H, Sq).
        key_ranges: (B, Sq, 2) int32, half-open.
        scale: of the scores.
        grad_output: (B, N, H, Sq, d), dO of each slot, or one for all slots where the method joins them.
        selection: None where all rows take part. Otherwise the query rows are ``selection.rows`` (B, N, n): each slot
            has rows of its own, so samples and slots share the first axis, B·N long, and the slots' axis has length 1.
        product: (B, N, Sk), or (B·N, 1, Sk) with a selection: what `relevancy_product` would give for the running rows,
            where the backward gave it along the way; ``grad_output`` is empty then.
        columns: (B·N, 2) half-open range of each sample's real columns, which a part's key ranges do not tell.
    """

    index: int
    query: Tensor
    key: Tensor
    value: Tensor
    logsumexp: Tensor
    key_ranges: Tensor
    scale: float
    grad_output: Tensor
    selection: Selection | None = None
    product: Tensor | None = None
    columns: Tensor | None = None

    def release(self) -> None:
        """Let go of the tensors.

        A caller's loop variable would keep them alive while the next layer is recomputed, at lean mode's peak.
        """
        self.query = self.key = self.value = self.logsumexp = self.key_ranges = self.grad_output = torch.empty(0)
        self.product = None

    def at_rows(self, row: Tensor) -> Tensor:
        """(B, N, …, S) running rows at the step's own query rows: as they are, or (B·N, …, n) with a selection."""
        if self.selection is None:
            return row
        kept = self.selection.rows.to(row.device)  # (B, N, n)
        kept = kept.view(*kept.shape[:2], *[1] * (row.dim() - 3), -1).expand(*row.shape[:-1], -1)
        return row.gather(-1, kept).reshape(self.query.shape[0], -1, kept.shape[-1])


@dataclass(slots=True)
class Group:
    """Slots that have gone through a layer together.

    Attributes:
        slots: which.
        step: of these slots alone.
        leaf: (B, S, D) the layer's input.
        gradients: (B, S, D) gradient of each slot at the layer's input, computed as they are asked for.
    """

    slots: slice
    step: LayerStep
    leaf: Tensor
    gradients: Iterator[Tensor]


def through_all_rows(
    sweep: Sweep, index: int, incoming: list[Tensor | None], weights: Tensor | None, *, keep: bool
) -> Iterator[Group]:
    """Take every slot, one after the other, through all rows of a layer.

    Args:
        sweep: whose layer it is.
        index: of the layer.
        incoming: (B, S, D) gradient of each slot at the layer's output, None for zeros; let go as they are used.
        weights: (B, N, S) running rows, for the product along the way; None if none is wanted.
        keep: whether the layer's graph is needed again.
    """
    layer = sweep.layers[index]
    leaf = sweep.recompute(layer) if layer.graph is None else layer.input
    tape = layer.tape
    for number in range(len(incoming)):
        above, incoming[number] = incoming[number], None
        if above is None:
            above = torch.zeros_like(leaf)
        request_backward(tape, None if weights is None else weights[:, number, None])
        last = number + 1 == len(incoming)
        (below,) = torch.autograd.grad(layer.graph, leaf, above, retain_graph=keep or not last)
        del above
        grad_output = tape.record.take_grad_output(index)[:, None]
        step = step_of(index, tape.record, grad_output)
        del grad_output
        yield Group(slice(number, number + 1), step, leaf, iter([below]))
        del below, step


def through_selected_rows(
    sweep: Sweep,
    index: int,
    incoming: list[Tensor | None],
    selection: Selection,
    weights: Tensor | None,
    *,
    keep: bool,
) -> Iterator[Group]:
    """Take every slot through its selected rows of a layer, recomputed, and through the keys and values of all rows.

    The gradient of the rows that are left out goes past the layer, on its residual connection. As many slots go
    together as have no more rows together than the layer has, which is what an exact sweep would run. Arguments as of
    :func:`through_all_rows`.
    """
    layer = sweep.layers[index]
    leaf = sweep.store.get(layer.input)
    rows = selection.rows.to(leaf.device)  # the layer's output may be on another device
    if layer.keys is None:
        layer.keys = sweep.take_keys(layer, leaf)
    key_ranges = layer.keys[2]
    slots, count = rows.shape[1:]
    at_once = max(1, leaf.shape[1] // count)
    for first in range(0, slots, at_once):
        chosen = rows[:, first : first + at_once]
        group = slice(first, first + chosen.shape[1])
        above = [torch.zeros_like(leaf) if full is None else full.to(leaf.device) for full in incoming[group]]
        incoming[group] = [None] * len(above)
        record, found = _run_part(sweep, layer, leaf, chosen, above, None if weights is None else weights[:, group])
        grad_output = record.take_grad_output(index)[:, None]
        step = step_of(index, record, grad_output, _slots_of(selection, chosen, group))
        step.columns = real_columns(key_ranges).repeat_interleave(len(above), dim=0)
        del grad_output, record
        retain = keep or group.stop < slots
        yield Group(group, step, leaf, _below(layer, leaf, chosen, above, found, retain_last=retain))
        del above, found, step


def _run_part(
    sweep: Sweep, layer: Layer, leaf: Tensor, chosen: Tensor, above: Sequence[Tensor], weights: Tensor | None
) -> tuple[Record, tuple[Tensor, ...]]:
    """Run a layer on the ``chosen`` rows (B, g, n) of each slot, forwards and backwards.

    Returns:
        The record, and the gradients at the rows (B·g, n, D), the key and the value (B·g, Hkv, S, d).
    """
    assert layer.keys is not None
    *seen, key_ranges = layer.keys
    group = chosen.shape[1]

    def fold(tensor: Tensor) -> Tensor:
        return tensor.detach()[:, None].expand(-1, group, *tensor.shape[1:]).flatten(0, 1).requires_grad_()

    part = take_rows(leaf.detach(), chosen).requires_grad_()
    key, value = map(fold, seen)
    tape = Tape(Request(given=(key, value, take_rows(key_ranges, chosen))))
    output = sweep.call(layer, tape, part, rows_of_call(layer.kwargs, chosen, leaf.shape[1]))
    if weights is not None:
        weights = weights.to(chosen.device).gather(2, chosen).flatten(0, 1)[:, None]
    request_backward(tape, weights)
    gradient = torch.stack([take_rows(full, chosen[:, n, None]) for n, full in enumerate(above)], dim=1)
    found = torch.autograd.grad(output, (part, key, value), gradient.flatten(0, 1).to(output.device))
    return tape.record, found


def _below(
    layer: Layer,
    leaf: Tensor,
    chosen: Tensor,
    above: list[Tensor],
    found: tuple[Tensor, ...],
    *,
    retain_last: bool,
) -> Iterator[Tensor]:
    """(B, S, D) gradient at the layer's input of each slot of a group, from the gradients that its part gave."""
    assert layer.keys is not None
    key, value, _ = layer.keys
    at_rows, at_key, at_value = (gradient.unflatten(0, chosen.shape[:2]) for gradient in found)
    for number, full in enumerate(above):
        retain = retain_last or number + 1 < len(above)
        (down,) = torch.autograd.grad((key, value), leaf, (at_key[:, number], at_value[:, number]), retain_graph=retain)
        where = chosen[:, number, :, None].expand(-1, -1, down.shape[-1])
        yield down.add_(full.scatter(1, where, at_rows[:, number]))


def step_of(index: int, record: Record, grad_output: Tensor, selection: Selection | None = None) -> LayerStep:
    """Return what a method sees of one backward of a layer, with dO ``grad_output`` (B, N, H, Sq, d)."""
    return LayerStep(
        index,
        record.query,  # type: ignore[arg-type]
        record.key,  # type: ignore[arg-type]
        record.value,  # type: ignore[arg-type]
        record.logsumexp,  # type: ignore[arg-type]
        record.key_ranges,  # type: ignore[arg-type]
        record.scale,
        grad_output,
        selection,
        record.product,
    )


def together(steps: list[LayerStep], selection: Selection | None) -> LayerStep:
    """Return one step for all slots, from the steps of their groups."""
    step = replace(steps[0], selection=selection)
    if len(steps) > 1:
        # Groups that ran all rows share everything but what their backwards gave.
        names = ("grad_output", "product") if selection is None else (*FOLDED, "grad_output", "product", "columns")
        for name in names:
            parts = [getattr(of_group, name) for of_group in steps]
            if parts[0] is not None and parts[0].dim() > 1:
                setattr(step, name, _cat(parts, None if selection is None else len(selection.rows)))
    return step


def joined(steps: list[LayerStep], selection: Selection | None, join: Join) -> LayerStep:
    """Return one step whose dO is made of those of all slots, which share their rows."""
    first = steps[0]
    if selection is None:
        grad_outputs = [step.grad_output[:, 0] for step in steps]
        return replace(first, grad_output=join(first.index, grad_outputs, None))
    batch = len(selection.rows)
    grad_outputs = [of_slot for step in steps for of_slot in step.grad_output[:, 0].unflatten(0, (batch, -1)).unbind(1)]
    # What the rows of the joined gradient weigh: each as in the slot that it comes from.
    norms = join(first.index, [norm[:, None, :, None] for norm in selection.norms.unbind(1)], None)
    return replace(
        first,
        **{name: getattr(first, name).unflatten(0, (batch, -1))[:, 0] for name in FOLDED},
        grad_output=join(first.index, grad_outputs, selection.rows[:, 0]),
        selection=Selection(selection.rows[:, :1], selection.counts.amax(1, keepdim=True), norms[:, :, 0, :, 0]),
    )


def _cat(parts: list[Tensor], batch: int | None) -> Tensor:
    """(B, N, …) of all groups from (B, g, …) of each; (B·N, …) from (B·g, …) where ``batch`` B is given."""
    if batch is None:
        return torch.cat(parts, dim=1)
    return torch.cat([part.unflatten(0, (batch, -1)) for part in parts], dim=1).flatten(0, 1)


def _slots_of(selection: Selection, chosen: Tensor, slots: slice) -> Selection:
    return Selection(chosen, selection.counts[:, slots], selection.norms[:, slots])
