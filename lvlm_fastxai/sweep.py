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

from . import attention
from .attention import LayerTape, current_tape
from .errors import ArgumentError, UnsupportedModelError

MEMORY_MODES = ("fast", "lean", "min")


@dataclass(slots=True)
class LayerStep:
    """One layer on the way down; its tensors are let go when the next step is asked for.

    query (B,H,Sq,d) · key, value (B,Hkv,Sk,d) · logsumexp (B,H,Sq) · key_ranges (B,Sq,2) int32 · scale ·
    grad_output (B,N,H,Sq,d): dO of each slot of targets (or what ``collect`` made of them).
    """

    index: int
    query: Tensor
    key: Tensor
    value: Tensor
    logsumexp: Tensor
    key_ranges: Tensor
    scale: float
    grad_output: Tensor

    def _release(self) -> None:
        # The caller's loop variable would keep these alive while the next layer is recomputed, at lean mode's peak.
        self.query = self.key = self.value = self.logsumexp = self.grad_output = torch.empty(0)


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
    tape: LayerTape = field(default_factory=LayerTape)


class Sweep:
    """The forward pass of ``model`` on ``inputs``, ready to be swept. Use as a context manager: it restores the model.

    Args:
        model: a transformers image-text-to-text or causal-LM model; put back exactly as it was on exit.
        inputs: keyword arguments of ``model.forward`` for B samples of S columns.
        query_rows: (B, R) int64, the rows whose logits are wanted.
        memory: "fast" keeps every layer's activations, "lean" only its input, "min" only its input off the device.

    Attributes:
        logits: (B, R, V) at ``query_rows``, in the model's dtype.
        input_gradients: after a descent, one (B, S, D) gradient at the first layer's input per slot.
        first_input: (B, S, D) the first layer's input (the merged embeddings), after the descent.

    Raises:
        UnsupportedModelError: the model has no decoder layers that can be found, or they never call the registered
            attention.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], query_rows: Tensor, memory: str = "fast") -> None:
        if memory not in MEMORY_MODES:
            raise ArgumentError(f"memory: expected one of {', '.join(MEMORY_MODES)}, got {memory!r}")
        self.memory = memory
        self.model = model
        self.query_rows = query_rows
        self._inputs = {name: value for name, value in inputs.items() if name != "labels"}
        self._decoder, self._modules = find_decoder_layers(model)
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
            self._forward()
            self._resources = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._layers.clear()
        self._resources.close()

    def __len__(self) -> int:
        return len(self._modules)

    @property
    def hidden_size(self) -> int:
        config: Any = self._decoder.config
        return int(config.get_text_config().hidden_size)

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
        collect: Callable[[int, list[Tensor]], Tensor] | None = None,
    ) -> Iterator[LayerStep]:
        """Walk down from the top layer.

        Args:
            slots: N scalars, each a sum of explained logits of different samples; one backward each, over one forward.
            keep: keep the activations for another descent (fast mode; the others recompute anyway).
            collect: ``(layer index, [dO (B,H,Sq,d) per slot]) -> (B,N',H,Sq,d)``; stacks by default.
        """
        top = len(self._layers) - 1
        # gradients[n][l]: of slot n at the output of layer l. More than one entry is open only while a model feeds an
        # earlier layer's output past the next layer.
        gradients: list[dict[int, Tensor]] = [{} for _ in slots]
        for number, slot in enumerate(slots):
            self._pull(slot, None, top, gradients[number], keep=keep or number + 1 < len(slots))
        self.input_gradients = []
        for index in range(top, -1, -1):
            layer = self._layers[index]
            leaf = self._recompute(layer) if layer.graph is None else layer.input
            graph, tape = layer.graph, layer.tape
            collected: list[Tensor] = []
            for number in range(len(slots)):
                last = not keep and number + 1 == len(slots)
                gradient = gradients[number].pop(index, None)
                if gradient is None:
                    gradient = torch.zeros_like(leaf)
                tape.grad_output = None
                (gradient,) = torch.autograd.grad(graph, leaf, gradient, retain_graph=not last)
                if tape.grad_output is None:
                    raise UnsupportedModelError(f"decoder layer {index}: no gradient reaches its attention")
                collected.append(tape.grad_output)
                if index == 0:
                    self.input_gradients.append(gradient)
                    self.first_input = leaf.detach()
                elif layer.bridge is None:
                    _accumulate(gradients[number], index - 1, gradient)
                else:
                    self._pull(layer.bridge, gradient, index - 1, gradients[number], keep=not last)
                del gradient
            step = LayerStep(
                index,
                tape.query,  # type: ignore[arg-type]
                tape.key,  # type: ignore[arg-type]
                tape.value,  # type: ignore[arg-type]
                tape.logsumexp,  # type: ignore[arg-type]
                tape.key_ranges,  # type: ignore[arg-type]
                tape.scale,
                _stack(collected) if collect is None else collect(index, collected),
            )
            collected.clear()
            tape.grad_output = None
            if not keep or self.memory != "fast":
                layer.graph, layer.tape = None, LayerTape()
            if not keep:
                layer.input = layer.bridge = None
            del graph, tape, leaf
            yield step
            step._release()

    def _pull(
        self, tensor: Tensor, gradient: Tensor | None, below: int, into: dict[int, Tensor], *, keep: bool
    ) -> None:
        """Differentiate ``tensor`` with respect to every layer output it was made from."""
        sources = [layer.boundary for layer in self._layers[: below + 1]]
        found = torch.autograd.grad(tensor, sources, gradient, retain_graph=keep, allow_unused=True)
        for index, part in enumerate(found):
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

    def _enter_layer(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        name = None if args else "hidden_states"
        hidden = args[0] if name is None else kwargs[name]
        leaf = hidden.detach().requires_grad_()
        layer = _Layer(module, args[1:], {k: v for k, v in kwargs.items() if k != name}, leaf)
        if self._layers and hidden is not self._last_output:
            layer.bridge = hidden
        self._last_output = None
        self._layers.append(layer)
        if self.memory == "fast":
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
        if self.memory == "fast":
            layer.graph = torch.autograd.graph.get_gradient_edge(hidden)
            self._check_tape(layer)
        self._last_output = _Boundary.apply(self._anchor, hidden.detach())
        layer.boundary = torch.autograd.graph.get_gradient_edge(self._last_output)
        return (self._last_output, *output[1:]) if isinstance(output, tuple) else self._last_output

    def _recompute(self, layer: _Layer) -> Tensor:
        """Run one layer again with its graph; returns the leaf its input was."""
        leaf = self._store.get(layer.input)
        layer.tape = LayerTape()
        token = current_tape.set(layer.tape)
        try:
            output = layer.module(leaf, *layer.args, **layer.kwargs)
        finally:
            current_tape.reset(token)
        self._check_tape(layer)
        layer.graph = torch.autograd.graph.get_gradient_edge(output[0] if isinstance(output, tuple) else output)
        return leaf

    def _check_tape(self, layer: _Layer) -> None:
        if layer.tape.calls != 1:
            raise UnsupportedModelError(
                f"{type(self.model).__name__}: a decoder layer ({type(layer.module).__name__}) called the registered "
                f"attention {layer.tape.calls} times instead of once; its attention cannot be registered with "
                "transformers' AttentionInterface, or it is not a plain self-attention decoder"
            )


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


def find_decoder_layers(model: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """The language model inside ``model`` and its decoder layers, in order.

    Raises:
        UnsupportedModelError: no list of ``num_hidden_layers`` layers was found, or the model is an encoder-decoder.
    """
    kind = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_decoder"):
        raise UnsupportedModelError(f"{kind} is not a transformers model with a decoder")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{kind} is an encoder-decoder; only decoder-only language models can be swept")
    decoder = model.get_decoder()  # type: ignore[operator]
    wanted = decoder.config.get_text_config().num_hidden_layers
    if getattr(decoder.config.get_text_config(), "num_kv_shared_layers", 0):
        raise UnsupportedModelError(
            f"{kind} shares keys and values between layers, which the sweep does not follow yet"
        )
    lists = [module for _, module in decoder.named_modules() if isinstance(module, nn.ModuleList)]
    for layers in lists:
        if len(layers) == wanted:
            return decoder, list(layers)
    raise UnsupportedModelError(f"{kind}: no list of {wanted} decoder layers was found in {type(decoder).__name__}")


@contextlib.contextmanager
def prepared(model: nn.Module, decoder: nn.Module) -> Iterator[None]:
    """Evaluation mode, frozen parameters, our attention in the decoder; everything exactly as before on the way out."""
    attention.register()
    config: Any = decoder.config
    implementation = config._attn_implementation_internal
    training = [module for module in model.modules() if module.training]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for module in training:
            module.training = False
        for parameter in trainable:
            parameter.requires_grad_(False)
        # The decoder's own configuration, not set_attn_implementation: that walks every sub-model and would also reset
        # implementations that a user has set by hand.
        config._attn_implementation_internal = attention.NAME
        yield
    finally:
        config._attn_implementation_internal = implementation
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True
