"""One forward pass whose backward can be walked down layer by layer: what every gradient method is written on.

:class:`Sweep` runs the model once. Every decoder layer's input becomes a leaf and its output is detached, so that each
layer is a graph of its own: kept alive (``memory="fast"``), or recomputed when the sweep comes down to it
(``"lean"``, and ``"min"``, which also moves the layer inputs off the device). :meth:`Sweep.descend` then yields one
:class:`LayerStep` per layer, top first, with the dO of every target. A method is a loop over these steps.

No model code is needed or patched: hooks on the decoder layers for the one forward, the registered attention, and the
layers' own modules for the recomputation. What a model computes between two layers (Qwen3-VL adds visual features
there) keeps its own small graph and is differentiated like the rest.
"""

from __future__ import annotations

import contextlib
import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, UnsupportedModelError
from ..models.decoder import find_decoder_layers
from ..models.lock import holding
from ..ops.key_ranges import real_columns
from . import attention
from .attention import KeysTaken, LayerTape, current_tape
from .pruning import (
    ROUNDING_ERROR,
    WHOLE_LAYER_SHARE,
    Selection,
    reason_against,
    rows_of_call,
    select_rows,
    take_rows,
    tolerances,
)
from .sharding import find_ranks

MEMORY_MODES = ("fast", "lean", "min")

# (layer index, dO (B,H,n,d) of each slot, the rows (B,n) they stand at or None for all) -> (B,N',H,n,d)
Collect = Callable[[int, list[Tensor], Tensor | None], Tensor]
# One layer of the slots in the slice, as soon as their dO is known.
Each = Callable[["LayerStep", slice], None]
# (number of the slot, its gradient (B,S,D) at the layer's input, last=whether nothing will need this graph again)
HandOn = Callable[..., None]


@dataclass(slots=True)
class LayerStep:
    """One layer on the way down; its tensors are let go when the next step is asked for.

    query (B,H,Sq,d) · key, value (B,Hkv,Sk,d) · logsumexp (B,H,Sq) · key_ranges (B,Sq,2) int32 · scale ·
    grad_output (B,N,H,Sq,d): dO of each slot of targets (or what ``collect`` made of them) · selection: None for all
    rows. Where it is given, the query rows are ``selection.rows`` (B,N,n): each slot has rows of its own, so samples
    and slots share the first axis, B·N long, and the targets' axis has length one; ``collect`` makes one slot of all.
    product (B,N,Sk), or (B·N,1,Sk) where there is a selection: what `relevancy_product` would give for the running
    rows, where the backward gave it along the way; grad_output is empty then.
    columns (B,2), or (B·N,2): half-open range of each sample's real columns, which a part's key_ranges do not tell.
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

    def _release(self) -> None:
        # The caller's loop variable would keep these alive while the next layer is recomputed, at lean mode's peak.
        self.query = self.key = self.value = self.logsumexp = self.grad_output = torch.empty(0)
        self.product = None


@dataclass(slots=True)
class _Layer:
    """A decoder layer as the forward met it."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    input: Any  # leaf (B, S, D), or the ticket of an offloaded one
    bridge: Tensor | None = None  # the input before it was made a leaf, where the model changed it between layers
    graph: Any = None  # the gradient edge of its output, which holds the layer's graph; kept in fast mode only
    boundary: Any = None  # the gradient edge at which the graph above this layer ends
    keys: tuple[Tensor, Tensor, Tensor] | None = None  # key and value with their graph, key ranges: of a pruned sweep
    tape: LayerTape = field(default_factory=LayerTape)


@dataclass(frozen=True)
class Recording:
    """What a sweep can start from in the place of a forward: the decoder's pass over S positions of one sample.

    Attributes:
        inputs: (1, S, D) input of every layer, bottom layer first.
        kwargs: keyword arguments of every layer's call, for all S rows.
        output: (1, S, D) output of the last layer.
        norm: the module between the last layer and the output embeddings.
    """

    inputs: list[Tensor]
    kwargs: list[dict[str, Any]]
    output: Tensor
    norm: nn.Module

    @property
    def columns(self) -> int:
        """S."""
        return self.output.shape[1]

    @property
    def nbytes(self) -> int:
        """Of the layer inputs and the output; what is handed to every layer alike is small beside them."""
        return sum(tensor.nbytes for tensor in (*self.inputs, self.output))


class Sweep:
    """The forward pass of ``model`` on ``inputs``, ready to be swept. Use as a context manager: it restores the model.

    Args:
        model: a transformers image-text-to-text or causal-LM model; put back exactly as it was on exit.
        inputs: keyword arguments of ``model.forward`` for B samples of S columns.
        query_rows: (B, R) int64, the rows whose logits are wanted.
        memory: "fast" keeps every layer's activations, "lean" only its input, "min" only its input off the device.
        row_tolerance: ε of the pruned sweep, or "auto"; every layer's input is then all that the forward keeps, and
            "fast" keeps the layers' keys and values from one descent to the next. 0 is exact.
        recording: what ``generate()`` computed for ``inputs``; it takes the forward's place.

    Attributes:
        tolerances: what to try in turn, the last one whatever its error.
        error_limit: the estimated error below which an earlier one will do.
        ranks: over which the model's heads are split; every rank makes the same sweep.
        fallback: why layers are swept whole although ``row_tolerance`` is not 0; None if they are not.
        logits: (B, R, V) at ``query_rows``, in the model's dtype.
        input_gradients: after a descent, one (B, S, D) gradient at the first layer's input per slot.
        first_input: (B, S, D) the first layer's input (the merged embeddings), after the descent.

    Raises:
        UnsupportedModelError: the model has no decoder layers that can be found, or they never call the registered
            attention.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        query_rows: Tensor,
        memory: str = "fast",
        row_tolerance: float | str = 0.0,
        recording: Recording | None = None,
    ) -> None:
        if memory not in MEMORY_MODES:
            raise ArgumentError(f"memory: expected one of {', '.join(MEMORY_MODES)}, got {memory!r}")
        self.memory = memory
        self.fallback: str | None = None
        self.model = model
        self.query_rows = query_rows
        self._inputs = {name: value for name, value in inputs.items() if name != "labels"}
        self._decoder, self._modules = find_decoder_layers(model)
        self.ranks = find_ranks(model, self._text_config)
        shape = next(inputs[name].shape for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None)
        dtype: Any = model.dtype
        self._columns = int(shape[1])
        self.tolerances = tolerances(row_tolerance, dtype, self._columns)
        self.error_limit = ROUNDING_ERROR.get(dtype, 0.0)
        self._recording = recording
        self._keep_graphs = memory == "fast" and self.tolerances == (0.0,) and recording is None
        self._layers: list[_Layer] = []
        self._resources = contextlib.ExitStack()
        self._store = _Store()
        self._anchor = torch.empty(0, requires_grad=True)
        self._last_output: Tensor | None = None
        self.logits: Tensor
        self.input_gradients: list[Tensor] = []
        self.first_input: Tensor

    def __enter__(self) -> Sweep:
        with contextlib.ExitStack() as stack:
            stack.enter_context(prepared(self.model, self._decoder))
            stack.enter_context(self._store)
            stack.enter_context(torch.enable_grad())
            if self._recording is None:
                self._forward()
            else:
                self._replay(self._recording)
            self._resources = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._layers.clear()
        self._resources.close()

    def __len__(self) -> int:
        return len(self._modules)

    @property
    def _text_config(self) -> Any:
        config: Any = self._decoder.config
        return config.get_text_config()

    @property
    def hidden_size(self) -> int:
        return int(self._text_config.hidden_size)

    def top_layer(self) -> LayerTape:
        """The last layer's tape without a backward (``grad_output`` is None)."""
        layer = self._layers[-1]
        if layer.graph is None:
            self._recompute(layer)
        return layer.tape

    def descend(
        self,
        slots: Sequence[Tensor],
        *,
        keep: bool = False,
        collect: Collect | None = None,
        each: Each | None = None,
        row_tolerance: float = 0.0,
        relevancy: Callable[[], Tensor] | None = None,
        own: Tensor | None = None,
        along: Callable[[], Tensor] | None = None,
    ) -> Iterator[LayerStep]:
        """Walk down from the top layer.

        Args:
            slots: N scalars, each a sum of explained logits of different samples; one backward each, over one forward.
            keep: keep the activations for another descent (fast mode; the others recompute anyway).
            collect: makes one dO of all slots'; they are stacked by default. The slots then share their rows.
            each: takes every layer of every slot, or group of slots, as soon as its dO is there, so that the dO of only
                one is held at a time. What is yielded then has no tensors but the selection's.
            row_tolerance: ε; one of ``tolerances``.
            relevancy: gives the running rows (B, N, S), or (B, 1, S) with ``collect``, as they are above the next
                layer, for the choice of its rows.
            own: (B, N, S) identity rows, for a method that normalises the rows of its layers: see `select_rows`.
            along: gives the rows (B, N, S) whose product a backward may give along the way; not with ``collect``.
        """
        top = len(self._layers) - 1
        # gradients[n][l]: of slot n at the output of layer l. More than one entry is open only while a model feeds an
        # earlier layer's output past the next layer.
        gradients: list[dict[int, Tensor]] = [{} for _ in slots]
        for number, slot in enumerate(slots):
            self._pull(slot, None, top, gradients[number], keep=keep or number + 1 < len(slots))
        self.input_gradients = []
        if row_tolerance > 0 and self.fallback is None:
            self.fallback = self._reason_against_parts()
        for index in range(top, -1, -1):
            layer = self._layers[index]

            def hand_on(number: int, gradient: Tensor, *, last: bool, index: int = index) -> None:
                bridge = self._layers[index].bridge
                if index == 0:
                    self.input_gradients.append(gradient)
                elif bridge is None:
                    _accumulate(gradients[number], index - 1, gradient)
                else:
                    self._pull(bridge, gradient, index - 1, gradients[number], keep=not last)

            incoming = [part.pop(index, None) for part in gradients]
            running = None if relevancy is None else relevancy()
            selection = self._select(incoming, row_tolerance, running, own, shared=collect is not None)
            weights = None if along is None else along()
            if selection is None:
                step = self._whole(index, incoming, hand_on, keep, collect, each, weights)
            else:
                step = self._part(index, incoming, selection, hand_on, keep, collect, each, weights)
            if not keep or not self._keep_graphs:
                layer.graph, layer.tape = None, LayerTape()
            if not keep or self.memory != "fast":
                layer.keys = None
            if not keep:
                layer.input = layer.bridge = None
            yield step
            step._release()

    def _whole(
        self,
        index: int,
        incoming: list[Tensor | None],
        hand_on: HandOn,
        keep: bool,
        collect: Collect | None,
        each: Each | None,
        weights: Tensor | None,
    ) -> LayerStep:
        """Backward of every slot through all rows of a layer."""
        layer = self._layers[index]
        leaf = self._recompute(layer) if layer.graph is None else layer.input
        tape, collected, products = layer.tape, [], []
        for number in range(len(incoming)):
            last = not keep and number + 1 == len(incoming)
            gradient, incoming[number] = incoming[number], None
            if gradient is None:
                gradient = torch.zeros_like(leaf)
            tape.weigh(None if weights is None else weights[:, number, None])
            (gradient,) = torch.autograd.grad(layer.graph, leaf, gradient, retain_graph=not last)
            grad_output = _grad_output([tape], index, leaf.shape[0])[:, 0]
            if each is not None:
                each(_step(index, tape, grad_output[:, None], None), slice(number, number + 1))
            elif tape.product is None:
                collected.append(grad_output)
            else:
                products.append(tape.product)
            del grad_output
            hand_on(number, gradient, last=last)
            del gradient
        if index == 0:
            self.first_input = leaf.detach()
        if each is not None:
            return _empty_step(index, None)
        if products:
            tape.product = torch.cat(products, dim=1)
            return _step(index, tape, None, None)
        gathered = _stack(collected) if collect is None else collect(index, collected, None)
        return _step(index, tape, gathered, None)

    def _part(
        self,
        index: int,
        incoming: list[Tensor | None],
        selection: Selection,
        hand_on: HandOn,
        keep: bool,
        collect: Collect | None,
        each: Each | None,
        weights: Tensor | None,
    ) -> LayerStep:
        """Backward of every slot through the selected rows of a layer, recomputed, and through all keys and values."""
        layer = self._layers[index]
        leaf = self._store.get(layer.input)
        rows = selection.rows.to(leaf.device)  # the layer's output may be on another
        if layer.keys is None:
            layer.keys = self._take_keys(layer, leaf)
        key, value, key_ranges = layer.keys
        batch, slots, count = rows.shape
        # As many slots at once as have together no more rows than the layer, which is what an exact sweep would run.
        at_once = max(1, leaf.shape[1] // count)
        tapes: list[LayerTape] = []
        for first in range(0, slots, at_once):
            chosen = rows[:, first : first + at_once]
            group = chosen.shape[1]

            def fold(tensor: Tensor, group: int = group) -> Tensor:
                return tensor.detach()[:, None].expand(-1, group, *tensor.shape[1:]).flatten(0, 1).requires_grad_()

            part = take_rows(leaf.detach(), chosen).requires_grad_()
            seen = fold(key), fold(value)
            tape = LayerTape(given=(*seen, take_rows(key_ranges, chosen)))
            output = self._call(layer, tape, part, rows_of_call(layer.kwargs, chosen, leaf.shape[1]))
            of_group = None
            if weights is not None:
                of_group = weights[:, first : first + group].to(chosen.device).gather(2, chosen).flatten(0, 1)[:, None]
            tape.weigh(of_group)
            above = [
                torch.zeros_like(leaf) if full is None else full.to(leaf.device)
                for full in incoming[first : first + group]
            ]
            incoming[first : first + group] = [None] * group
            gradient = torch.stack([take_rows(full, chosen[:, n, None]) for n, full in enumerate(above)], dim=1)
            found = torch.autograd.grad(output, (part, *seen), gradient.flatten(0, 1).to(output.device))
            del output, gradient, part, seen
            tape.given = None
            if each is None:
                tapes.append(tape)
            else:
                slots_of_group = slice(first, first + group)
                part_of = Selection(chosen, selection.counts[:, slots_of_group], selection.norms[:, slots_of_group])
                step = _step(index, tape, _grad_output([tape], index, batch).flatten(0, 1)[:, None], part_of)
                step.columns = real_columns(key_ranges).repeat_interleave(group, dim=0)
                each(step, slots_of_group)
                step._release()
            rows_gradient, key_gradient, value_gradient = (each.unflatten(0, (batch, group)) for each in found)
            for number in range(group):
                last = not keep and first + number + 1 == slots
                (down,) = torch.autograd.grad(
                    (key, value), leaf, (key_gradient[:, number], value_gradient[:, number]), retain_graph=not last
                )
                where = chosen[:, number, :, None].expand(-1, -1, down.shape[-1])
                # The gradient of rows that are left out goes past the layer, on its residual connection.
                down += above[number].scatter(1, where, rows_gradient[:, number])
                hand_on(first + number, down, last=last)
                del down
            del above
        if index == 0:
            self.first_input = leaf.detach()
        if each is not None:
            return _empty_step(index, selection)
        if tapes[0].product is not None:
            return _step(index, _joined(tapes, batch), None, selection)
        grad_output = _grad_output(tapes, index, batch)
        if collect is None:
            return _step(index, _joined(tapes, batch), grad_output.flatten(0, 1)[:, None], selection)
        shared = _first_slot(tapes[0], batch)
        # What the joined gradient's rows weigh: each by the slot that it comes from.
        norms = collect(index, [norm[:, None, :, None] for norm in selection.norms.unbind(1)], None)
        one = Selection(selection.rows[:, :1], selection.counts.amax(1, keepdim=True), norms[:, :, 0, :, 0])
        return _step(index, shared, collect(index, list(grad_output.unbind(1)), selection.rows[:, 0]), one)

    def _reason_against_parts(self) -> str | None:
        """Why the layers cannot be called on a part of their rows. One that cannot speaks for all: a sweep that has
        pruned above it would not be exact."""
        for layer in self._layers:
            reason = reason_against(layer.args, layer.kwargs, self._columns)
            if reason is not None:
                return f"{type(layer.module).__name__}: {reason}"
        return None

    def _select(
        self,
        incoming: list[Tensor | None],
        tolerance: float,
        running: Tensor | None,
        own: Tensor | None,
        *,
        shared: bool,
    ) -> Selection | None:
        """Rows to keep, or None for all of them."""
        if tolerance == 0 or self.fallback is not None:
            return None
        present = next(gradient for gradient in incoming if gradient is not None)
        norms = [
            present.new_zeros(present.shape[:2], dtype=torch.float32)
            if gradient is None
            else torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.promote_types(gradient.dtype, torch.float32))
            for gradient in incoming
        ]
        selection = select_rows(torch.stack(norms, dim=1), tolerance, relevancy=running, own=own, shared=shared)
        selection = Selection(*map(self.ranks.agree, (selection.rows, selection.counts, selection.norms)))
        return selection if selection.rows.shape[-1] <= WHOLE_LAYER_SHARE * self._columns else None

    def _pull(
        self, tensor: Tensor, gradient: Tensor | None, below: int, into: dict[int, Tensor], *, keep: bool
    ) -> None:
        """Differentiate ``tensor`` with respect to every layer output it was made from."""
        # A recording knows the boundary below the last layer's output only; no state goes past a layer in it.
        sources = {i: layer.boundary for i, layer in enumerate(self._layers[: below + 1]) if layer.boundary is not None}
        found = torch.autograd.grad(tensor, list(sources.values()), gradient, retain_graph=keep, allow_unused=True)
        for index, part in zip(sources, found, strict=True):
            if part is not None:
                _accumulate(into, index, part)

    def _forward(self) -> None:
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        if head is None:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has no output embeddings, so no logits to explain"
            )

        def keep_rows(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden = args[0]
            rows = self.query_rows.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1])
            return (hidden.gather(1, rows), *args[1:])

        with contextlib.ExitStack() as hooks:
            hooks.callback(head.register_forward_pre_hook(keep_rows).remove)
            hooks.callback(current_tape.set, None)
            for module in self._modules:
                hooks.callback(module.register_forward_pre_hook(self._enter_layer, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(self._leave_layer).remove)
            accepted = inspect.signature(self.model.forward).parameters
            extra = {"use_cache": False} if "use_cache" in accepted or "kwargs" in accepted else {}
            self.logits = self.model(**{**self._inputs, **extra}, return_dict=True).logits
            self._last_output = None
        if len(self._layers) != len(self._modules):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} ran {len(self._layers)} of its {len(self._modules)} decoder layers"
            )

    def _replay(self, recording: Recording) -> None:
        """Stand where the forward would: with every layer's input, and the logits in a graph of their own."""
        for module, hidden, kwargs in zip(self._modules, recording.inputs, recording.kwargs, strict=True):
            leaf: Any = hidden.detach().requires_grad_()
            if self.memory == "min":
                leaf = self._store.put(leaf)
            self._layers.append(_Layer(module, (), kwargs, leaf))
        output = _Boundary.apply(self._anchor, recording.output)
        self._layers[-1].boundary = torch.autograd.graph.get_gradient_edge(output)
        rows = self.query_rows.to(output.device)[..., None].expand(-1, -1, output.shape[-1])
        head: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        self.logits = head(recording.norm(output.gather(1, rows)))

    def _enter_layer(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        name = None if args else "hidden_states"
        hidden = args[0] if name is None else kwargs[name]
        leaf = hidden.detach().requires_grad_()
        layer = _Layer(module, args[1:], {k: v for k, v in kwargs.items() if k != name}, leaf)
        if self._layers and hidden is not self._last_output:
            layer.bridge = hidden
        self._last_output = None
        self._layers.append(layer)
        if self._keep_graphs:
            current_tape.set(layer.tape)
        else:
            if self.memory == "min":
                layer.input = self._store.put(leaf)
            torch.set_grad_enabled(False)
        return ((leaf, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: leaf})

    def _leave_layer(self, module: nn.Module, args: tuple, output: Any) -> Any:
        torch.set_grad_enabled(True)
        current_tape.set(None)
        layer = self._layers[-1]
        hidden = output[0] if isinstance(output, tuple) else output
        if self._keep_graphs:
            layer.graph = torch.autograd.graph.get_gradient_edge(hidden)
            self._check_tape(layer.tape, layer)
        self._last_output = _Boundary.apply(self._anchor, hidden.detach())
        layer.boundary = torch.autograd.graph.get_gradient_edge(self._last_output)
        return (self._last_output, *output[1:]) if isinstance(output, tuple) else self._last_output

    def _recompute(self, layer: _Layer) -> Tensor:
        """Run one layer again with its graph; returns the leaf its input was."""
        leaf = self._store.get(layer.input)
        layer.tape = LayerTape()
        output = self._call(layer, layer.tape, leaf, layer.kwargs)
        layer.graph = torch.autograd.graph.get_gradient_edge(output)
        return leaf

    def _call(self, layer: _Layer, tape: LayerTape, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        token = current_tape.set(tape)
        try:
            output = layer.module(hidden, *layer.args, **kwargs)
        finally:
            current_tape.reset(token)
        self._check_tape(tape, layer)
        return output[0] if isinstance(output, tuple) else output

    def _take_keys(self, layer: _Layer, leaf: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """key and value (B, Hkv, S, d) of all rows with the graph that leads to ``leaf``, and the rows' key ranges."""
        tape = LayerTape(keys_only=True)
        with contextlib.suppress(KeysTaken):
            self._call(layer, tape, leaf, layer.kwargs)
        self._check_tape(tape, layer)
        return tape.key, tape.value, tape.key_ranges  # type: ignore[return-value]

    def _check_tape(self, tape: LayerTape, layer: _Layer) -> None:
        if tape.calls != 1:
            raise UnsupportedModelError(
                f"{type(self.model).__name__}: a decoder layer ({type(layer.module).__name__}) called the registered "
                f"attention {tape.calls} times instead of once; its attention cannot be registered with "
                "transformers' AttentionInterface, or it is not a plain self-attention decoder"
            )
        if tape.query is not None:
            self.ranks.check_heads(tape.query.shape[1], getattr(self._text_config, "num_attention_heads", None))


def _grad_output(tapes: list[LayerTape], index: int, batch: int) -> Tensor:
    """(B, N, H, n, d) of all slots' tapes, (B·g, H, n, d) each; a tape's own is let go."""
    parts = []
    for tape in tapes:
        if tape.grad_output is None:
            raise UnsupportedModelError(f"decoder layer {index}: no gradient reaches its attention")
        parts.append(tape.grad_output.unflatten(0, (batch, -1)))
        tape.grad_output = None
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


_TAPED = ("query", "key", "value", "logsumexp", "key_ranges")


def _joined(tapes: list[LayerTape], batch: int) -> LayerTape:
    """One tape (B·N, …) of several groups of slots, (B·g, …) each."""
    joined = tapes[0]
    if len(tapes) > 1:
        for name in _TAPED if joined.product is None else (*_TAPED, "product"):
            parts = [getattr(tape, name).unflatten(0, (batch, -1)) for tape in tapes]
            setattr(joined, name, torch.cat(parts, dim=1).flatten(0, 1))
    return joined


def _first_slot(tape: LayerTape, batch: int) -> LayerTape:
    """The tape (B, …) of the first slot of (B·g, …)."""
    for name in _TAPED:
        setattr(tape, name, getattr(tape, name).unflatten(0, (batch, -1))[:, 0])
    return tape


def _step(index: int, tape: LayerTape, grad_output: Tensor | None, selection: Selection | None) -> LayerStep:
    return LayerStep(
        index,
        tape.query,  # type: ignore[arg-type]
        tape.key,  # type: ignore[arg-type]
        tape.value,  # type: ignore[arg-type]
        tape.logsumexp,  # type: ignore[arg-type]
        tape.key_ranges,  # type: ignore[arg-type]
        tape.scale,
        torch.empty(0) if grad_output is None else grad_output,
        selection,
        tape.product,
    )


def _empty_step(index: int, selection: Selection | None) -> LayerStep:
    """What is left of a layer whose slots were taken one by one."""
    nothing = torch.empty(0)
    return LayerStep(index, nothing, nothing, nothing, nothing, nothing, 1.0, nothing, selection)


def _stack(grad_outputs: list[Tensor]) -> Tensor:
    return grad_outputs[0][:, None] if len(grad_outputs) == 1 else torch.stack(grad_outputs, dim=1)


def _accumulate(gradients: dict[int, Tensor], index: int, gradient: Tensor) -> None:
    gradients[index] = gradients[index] + gradient if index in gradients else gradient


class _Boundary(torch.autograd.Function):
    """Starts a graph of its own without holding on to any tensor, as a leaf would."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, hidden: Tensor) -> Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


class _Store:
    """Where ``memory="min"`` puts layer inputs: the host for a model on an accelerator, files for one on the CPU."""

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._count = 0

    def __enter__(self) -> _Store:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def put(self, leaf: Tensor) -> Callable[[], Tensor]:
        device = leaf.device
        if device.type != "cpu":
            host = leaf.detach().to("cpu")
            return lambda: host.to(device).requires_grad_()
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="lvlm_fastxai_")
        path = Path(self._folder.name, f"layer{self._count}.pt")
        self._count += 1
        torch.save(leaf.detach().clone(), path)
        return lambda: torch.load(path, weights_only=True).requires_grad_()

    @staticmethod
    def get(ticket: Any) -> Tensor:
        return ticket if isinstance(ticket, Tensor) else ticket()


@contextlib.contextmanager
def prepared(model: nn.Module, decoder: nn.Module) -> Iterator[None]:
    """Evaluation mode, frozen parameters, our attention in the decoder; everything exactly as before on the way out.

    The model's lock is held in between: another thread that wants the same model waits.
    """
    attention.register()
    with holding(model):
        yield from _prepared(model, decoder)


def _prepared(model: nn.Module, decoder: nn.Module) -> Iterator[None]:
    config: Any = decoder.config
    implementation = config._attn_implementation_internal
    training = [module for module in model.modules() if module.training]
    # By name: accelerate puts other parameters in the place of offloaded ones whenever their module runs.
    trainable = [
        (module, name)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad
    ]
    try:
        for module in training:
            module.training = False
        for module, name in trainable:
            module.get_parameter(name).requires_grad_(False)
        # The decoder's own configuration, not set_attn_implementation: that walks every sub-model and would also reset
        # implementations that a user has set by hand.
        config._attn_implementation_internal = attention.NAME
        yield
    finally:
        config._attn_implementation_internal = implementation
        for module, name in trainable:
            module.get_parameter(name).requires_grad_(True)
        for module in training:
            module.training = True
