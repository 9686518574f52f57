"""What a pass of ``generate()`` leaves for a sweep, so that explaining an answer needs no second forward.

The tokens that ``generate()`` has read went through every decoder layer once, the prompt together and each answer token
after it. :class:`Recorder` keeps what each layer was given; a sweep that starts from the :class:`Recording` recomputes
layers from there on its way down. Keys and values are recomputed from the layer inputs with the graph that the sweep
needs; the cache of ``generate()`` holds them without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..models.decoder import find_decoder_layers
from ..models.guard import Guard, shielded
from .forward import Recording
from .preparation import prepare
from .pruning import reason_against

# What transformers hands a decoder layer for each row, and the axis, counted from the end, along which the rows stand.
_PER_ROW = {"attention_mask": -2, "position_embeddings": -2, "position_ids": -1}
# Cache and bookkeeping of `generate()`; a sweep has none.
_OF_THE_CACHE = {"past_key_values": None, "use_cache": False, "cache_position": None}


@dataclass
class _Parts:
    """A layer's calls, one after the other."""

    inputs: list[Tensor] = field(default_factory=list)
    kwargs: list[dict[str, Any]] = field(default_factory=list)


class Recorder:
    """Inside its ``with`` block the model runs with the library's attention, and what its layers are given is kept.

    Args:
        model: a transformers model; put back exactly as it was on exit.

    Raises:
        UnsupportedModelError: the model has no decoder layers that can be found.

    Example:
        >>> import lvlm_fastxai as fx
        >>> model, processor = fx.load_tiny_lvlm()
        >>> inputs = processor(text=["what color is the circle?"], return_tensors="pt")
        >>> with torch.no_grad(), Recorder(model) as recorder:
        ...     tokens = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2)
        >>> recording, reason = recorder.recording()
        >>> recording.output.shape[1] == tokens.shape[1] - 1, reason
        (True, None)
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._decoder, self._modules = find_decoder_layers(model)
        self._parts = [_Parts() for _ in self._modules]
        self._outputs: list[Tensor] = []
        self._norms: list[nn.Module] = []
        self._last_output: Tensor | None = None
        self._reason: str | None = None
        self._guard = Guard(model)

    def __enter__(self) -> Recorder:
        guard = self._guard
        try:
            guard.open()
            prepare(guard, self.model, self._decoder)
            for index, module in enumerate(self._modules):
                guard.hook(module.register_forward_pre_hook, self._enter(index), with_kwargs=True)
                guard.hook(module.register_forward_hook, self._leave(index))
            for module in self._decoder.children():
                guard.hook(module.register_forward_pre_hook, self._after)
            return self
        except BaseException:
            guard.close()
            raise

    @shielded
    def __exit__(self, *exception: object) -> None:
        self._last_output = None
        self._guard.close()

    def recording(self) -> tuple[Recording | None, str | None]:
        """What was recorded, or None and why it is of no use."""
        reason = self._reason or self._missing()
        if reason is not None:
            return None, reason
        inputs = [torch.cat(parts.inputs, dim=1) for parts in self._parts]
        joined: dict[tuple[int, ...], Any] = {}
        kwargs = [self._join(parts.kwargs, joined) for parts in self._parts]
        output = torch.cat(self._outputs, dim=1)
        for of_layer in kwargs:
            ranges = of_layer.get("attention_mask")
            columns, steps = output.shape[1], self._outputs[0].shape[1]
            if not isinstance(ranges, Tensor) or ranges.dtype != torch.int32 or ranges.shape[2:] != (columns, 2):
                return None, "its layers were not given the key ranges of every row"
            causal = torch.arange(steps + 1, columns + 1, device=ranges.device)
            if bool((ranges[0, 0, steps:, 1] != causal).any()):
                return None, "its cache dropped keys that a window hides, so the key ranges count from elsewhere"
        return Recording(inputs, kwargs, output, self._norms[0]), None

    def _missing(self) -> str | None:
        if not self._outputs or any(len(parts.inputs) != len(self._outputs) for parts in self._parts):
            return "not every decoder layer ran in every step"
        if len(self._norms) != len(self._outputs) or any(norm is not self._norms[0] for norm in self._norms):
            return "what follows the last decoder layer is not one module"
        return None

    def _join(self, calls: list[dict[str, Any]], joined: dict[tuple[int, ...], Any]) -> dict[str, Any]:
        whole = dict(calls[0])
        for name, value in whole.items():
            axis = _PER_ROW.get(name)
            if name in _OF_THE_CACHE:
                whole[name] = _OF_THE_CACHE[name]
            elif axis is not None and value is not None:
                parts = [call[name] for call in calls]
                # Layers share these tensors: joined once, they are shared again.
                key = tuple(id(part) for part in parts)
                if key not in joined:
                    joined[key] = _cat(parts, axis)
                whole[name] = joined[key]
        return whole

    def _enter(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            if index > 0 and hidden is not self._last_output:
                self._reason = "the model changes the states between its decoder layers"
            if hidden.is_inference():
                self._reason = "it ran in inference mode, whose tensors no graph can start from"
            self._reason = self._reason or reason_against(args[1:], _without_cache(rest), hidden.shape[1])
            self._last_output = None
            self._parts[index].inputs.append(hidden.detach())
            self._parts[index].kwargs.append(rest)

        return hook

    def _leave(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._last_output = output[0] if isinstance(output, tuple) else output
            if index + 1 == len(self._modules):
                self._outputs.append(self._last_output.detach())

        return hook

    def _after(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and args[0] is self._last_output and len(self._norms) < len(self._outputs):
            self._norms.append(module)


def _without_cache(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in _OF_THE_CACHE}


def _cat(parts: list[Any], axis: int) -> Any:
    if isinstance(parts[0], tuple | list):
        return type(parts[0])(_cat(list(column), axis) for column in zip(*parts, strict=True))
    return torch.cat(parts, dim=axis)


def logits_agree(found: Tensor, recorded: Tensor, largest: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits of a sweep that starts from a recording are those that ``generate()`` chose its tokens by.

    They are not where the model does something to them after its output embeddings (a scale, a soft cap).

    Args:
        found, recorded: (N,).
        largest: of the recorded logits' absolute values; rounding is measured by it.
        dtype: of the model.
    """
    limit = 64 * torch.finfo(dtype).eps * float(largest)
    return float((found.cpu().double() - recorded.cpu().double()).abs().max()) <= limit
