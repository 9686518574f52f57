"""One forward pass whose backward can be walked down layer by layer: what every gradient method is written on.

:class:`Sweep` runs the model once. Every decoder layer's input becomes a leaf and its output is detached, so that each
layer is a graph of its own: kept alive (``memory="fast"``), or recomputed when a descent comes down to it (``"lean"``,
and ``"min"``, which also moves the layer inputs off the device). A :class:`~lvlm_fastxai.sweep.descent.Descent` then
goes down the layers, top first.

No model code is needed or patched: hooks on the decoder layers for the one forward, the registered attention, and the
layers' own modules for the recomputation. What a model computes between two layers (Qwen3-VL adds visual features
there) keeps its own small graph and is differentiated like the rest.
"""

from __future__ import annotations

import contextlib
import inspect
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ..choices import Memory
from ..errors import ArgumentError, UnsupportedModelError
from ..models.decoder import find_decoder_layers, unwrap
from ..models.guard import Guard, Undo, shielded
from .preparation import prepare
from .pruning import ROUNDING_ERROR, reason_against
from .sharding import find_ranks
from .tape import KeysTaken, Record, Request, Tape, current_tape

MEMORY_MODES = get_args(Memory)


@dataclass(slots=True)
class Layer:
    """A decoder layer as the forward met it."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    input: Any  # leaf (B, S, D), or the ticket of an offloaded one
    bridge: Tensor | None = None  # the input before it was made a leaf, where the model changed it between layers
    graph: Any = None  # the gradient edge of its output, which holds the layer's graph; kept in fast mode only
    boundary: Any = None  # the gradient edge at which the graph above this layer ends
    keys: tuple[Tensor, Tensor, Tensor] | None = None  # key and value with their graph, key ranges: of a pruned sweep
    tape: Tape = field(default_factory=Tape)


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
        row_tolerance: ε of the pruned sweep, or several to try in turn; every layer's input is then all that the
            forward keeps, and "fast" keeps the layers' keys and values from one descent to the next. 0 is exact.
        recording: what ``generate()`` computed for ``inputs``; it takes the forward's place.

    Attributes:
        tolerances: what to try in turn, the last one whatever its error.
        error_limit: the estimated error below which an earlier one will do.
        ranks: over which the model's heads are split; every rank makes the same sweep.
        fallback: why layers are swept whole although ``row_tolerance`` is not 0; None if they are not.
        columns: S.
        layers: what the forward left of every decoder layer, bottom layer first.
        store: where the layer inputs of memory "min" are.
        logits: (B, R, V) at ``query_rows``, in the model's dtype.

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
        row_tolerance: float | tuple[float, ...] = 0.0,
        recording: Recording | None = None,
    ) -> None:
        if memory not in MEMORY_MODES:
            raise ArgumentError(f"memory: expected one of {', '.join(MEMORY_MODES)}, got {memory!r}")
        self.memory = memory
        self.fallback: str | None = None
        # A wrapper computes nothing of its own (`find_decoder_layers` refuses those that do).
        self.model = unwrap(model)
        self.query_rows = query_rows
        self._inputs = {name: value for name, value in inputs.items() if name != "labels"}
        self._decoder, self._modules = find_decoder_layers(model)
        self.ranks = find_ranks(self.model, self._text_config)
        shape = next(inputs[name].shape for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None)
        dtype: Any = self.model.dtype
        self.columns = int(shape[1])
        self.tolerances = row_tolerance if isinstance(row_tolerance, tuple) else (row_tolerance,)
        self.error_limit = ROUNDING_ERROR.get(dtype, 0.0)
        self._recording = recording
        self.keeps_graphs = memory == "fast" and self.tolerances == (0.0,)
        self.layers: list[Layer] = []
        self._guard = Guard(model)
        self.store = Store()
        self._anchor = torch.empty(0, requires_grad=True)
        self._last_output: Tensor | None = None
        self.logits: Tensor

    def __enter__(self) -> Sweep:
        try:
            self._guard.open()
            prepare(self._guard, self.model, self._decoder)
            self._guard.on_close(self.store.close)
            self._guard.on_close(self.layers.clear)
            torch.set_grad_enabled(True)
            if self._recording is None:
                self._forward()
            else:
                self._replay(self._recording)
            return self
        except BaseException:
            self._guard.close()
            raise

    @shielded
    def __exit__(self, *exception: object) -> None:
        self._guard.close()

    def __len__(self) -> int:
        return len(self._modules)

    @property
    def _text_config(self) -> Any:
        config: Any = self._decoder.config
        return config.get_text_config()

    @property
    def hidden_size(self) -> int:
        return int(self._text_config.hidden_size)

    def top_layer(self) -> Record:
        """Return what the last layer's attention has recorded; there was no backward (``grad_output`` is None)."""
        layer = self.layers[-1]
        if layer.graph is None:
            self.recompute(layer)
        return layer.tape.record

    def reason_against_parts(self) -> str | None:
        """Say why the layers cannot be called on a part of their rows; None if they can.

        One layer that cannot speaks for all: a sweep that has pruned above it would not be exact.
        """
        for layer in self.layers:
            reason = reason_against(layer.args, layer.kwargs, self.columns)
            if reason is not None:
                return f"{type(layer.module).__name__}: {reason}"
        return None

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

        hooks = Undo()
        try:
            hooks.hook(head.register_forward_pre_hook, keep_rows)
            for module in self._modules:
                hooks.hook(module.register_forward_pre_hook, self._enter_layer, with_kwargs=True)
                hooks.hook(module.register_forward_hook, self._leave_layer)
            accepted = inspect.signature(self.model.forward).parameters
            extra = {"use_cache": False} if "use_cache" in accepted or "kwargs" in accepted else {}
            self.logits = self.model(**{**self._inputs, **extra}, return_dict=True).logits
            self._last_output = None
        finally:
            hooks.close()
        if len(self.layers) != len(self._modules):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} ran {len(self.layers)} of its {len(self._modules)} decoder layers"
            )

    def _replay(self, recording: Recording) -> None:
        """Stand where the forward would: with every layer's input, and the logits in a graph of their own."""
        for module, hidden, kwargs in zip(self._modules, recording.inputs, recording.kwargs, strict=True):
            leaf: Any = hidden.detach().requires_grad_()
            if self.memory == "min":
                leaf = self.store.put(leaf)
            self.layers.append(Layer(module, (), kwargs, leaf))
        output = _Boundary.apply(self._anchor, recording.output)
        self.layers[-1].boundary = torch.autograd.graph.get_gradient_edge(output)
        rows = self.query_rows.to(output.device)[..., None].expand(-1, -1, output.shape[-1])
        head: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        self.logits = head(recording.norm(output.gather(1, rows)))

    def _enter_layer(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        name = None if args else "hidden_states"
        hidden = args[0] if name is None else kwargs[name]
        leaf = hidden.detach().requires_grad_()
        layer = Layer(module, args[1:], {k: v for k, v in kwargs.items() if k != name}, leaf)
        if self.layers and hidden is not self._last_output:
            layer.bridge = hidden
        self._last_output = None
        self.layers.append(layer)
        if self.keeps_graphs:
            current_tape.set(layer.tape)
        else:
            if self.memory == "min":
                layer.input = self.store.put(leaf)
            torch.set_grad_enabled(False)
        return ((leaf, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: leaf})

    def _leave_layer(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        torch.set_grad_enabled(True)
        current_tape.set(None)
        layer = self.layers[-1]
        hidden = output[0] if isinstance(output, tuple) else output
        if self.keeps_graphs:
            layer.graph = torch.autograd.graph.get_gradient_edge(hidden)
            self._check_record(layer.tape.record, layer)
        self._last_output = _Boundary.apply(self._anchor, hidden.detach())
        layer.boundary = torch.autograd.graph.get_gradient_edge(self._last_output)
        return (self._last_output, *output[1:]) if isinstance(output, tuple) else self._last_output

    def recompute(self, layer: Layer) -> Tensor:
        """Run one layer again with its graph; return the leaf that its input was."""
        leaf = self.store.get(layer.input)
        layer.tape = Tape()
        output = self.call(layer, layer.tape, leaf, layer.kwargs)
        layer.graph = torch.autograd.graph.get_gradient_edge(output)
        return leaf

    def take_keys(self, layer: Layer, leaf: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return key and value (B, Hkv, S, d) of all rows, with the graph that leads to ``leaf``, and key ranges."""
        tape = Tape(Request(keys_only=True))
        with contextlib.suppress(KeysTaken):
            self.call(layer, tape, leaf, layer.kwargs)
        self._check_record(tape.record, layer)
        return tape.record.key, tape.record.value, tape.record.key_ranges  # type: ignore[return-value]

    def call(self, layer: Layer, tape: Tape, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """Run a layer on ``hidden`` (…, n, D) with a tape of its own; return its output, graph included."""
        token = current_tape.set(tape)
        try:
            output = layer.module(hidden, *layer.args, **kwargs)
        finally:
            current_tape.reset(token)
        self._check_record(tape.record, layer)
        return output[0] if isinstance(output, tuple) else output

    def _check_record(self, record: Record, layer: Layer) -> None:
        if record.calls != 1:
            raise UnsupportedModelError(
                f"{type(self.model).__name__}: a decoder layer ({type(layer.module).__name__}) called the registered "
                f"attention {record.calls} times instead of once; its attention cannot be registered with "
                "transformers' AttentionInterface, or it is not a plain self-attention decoder"
            )
        if record.query is not None:
            self.ranks.check_heads(record.query.shape[1], getattr(self._text_config, "num_attention_heads", None))


class _Boundary(torch.autograd.Function):
    """Starts a graph of its own without holding on to any tensor, as a leaf would."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, hidden: Tensor) -> Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


class Store:
    """Where ``memory="min"`` puts layer inputs: the host for a model on an accelerator, files for one on the CPU."""

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._count = 0

    def close(self) -> None:
        """Delete the files."""
        if self._folder is not None:
            self._folder.cleanup()

    def put(self, leaf: Tensor) -> Callable[[], Tensor]:
        """Store a leaf; return what :meth:`get` takes to make it again."""
        device = leaf.device
        if device.type != "cpu":
            host = leaf.detach().to("cpu")
            return lambda: host.to(device).requires_grad_()
        path = self._next_file()
        torch.save(leaf.detach().clone(), path)
        return lambda: torch.load(path, weights_only=True).requires_grad_()

    @shielded
    def _next_file(self) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="lvlm_fastxai_")
        self._count += 1
        return Path(self._folder.name, f"layer{self._count}.pt")

    @staticmethod
    def get(ticket: Any) -> Tensor:
        """Return the leaf that was stored, or a leaf that never was."""
        return ticket if isinstance(ticket, Tensor) else ticket()
