"""The attention function registered with transformers: torch's own flash attention, with the tape a sweep reads.

The forward calls the fastest attention of torch that returns the logsumexp. The backward hands dO (the gradient at the
attention's output) to the layer's :class:`LayerTape` and then lets torch's flash backward continue. Nothing is patched:
the function and its mask are entries in transformers' ``AttentionInterface`` and ``AttentionMaskInterface``.

Every mask in scope (causal, bidirectional prefix, image blocks, sliding window, padding on either side, packed
sequences) lets a query row see one contiguous range of keys. So the mask that travels through the model is an int32
tensor (B, 1, Sq, 2) of half-open key ranges, and no (B, 1, Sq, Sk) tensor ever exists.
"""

from __future__ import annotations

import contextvars
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import ops
from ..errors import UnsupportedModelError

# Neither "flash" nor "sdpa" may occur in the name: transformers treats both specially.
NAME = "lvlm_fastxai"

# Rows handled at once wherever a mask has to be looked at or applied; far below any S that matters for memory.
ROW_BLOCK = 128


@dataclass(slots=True)
class LayerTape:
    """What one decoder layer's attention leaves for the sweep.

    query (B,H,Sq,d) · key, value (B,Hkv,Sk,d) · logsumexp (B,H,Sq) · key_ranges (B,Sq,2) int32 · scale ·
    grad_output (B,H,Sq,d): dO of the backward that ran last.

    ``keys_only`` ends the layer with :class:`KeysTaken` as soon as its key and value, graph included, are on the tape.
    ``given`` makes the layer's queries, a few rows of the sequence, attend to these (key, value, key_ranges) instead of
    their own. ``backend``: whose `attention_backward_relevancy` the next backward is; None for torch's own. ``weights``
    (B,1,Sq), the running relevancy of the query rows, make it leave the ``product`` (B,1,Sk) of `relevancy_product`.
    """

    calls: int = 0
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    logsumexp: Tensor | None = None
    key_ranges: Tensor | None = None
    scale: float = 1.0
    grad_output: Tensor | None = None
    keys_only: bool = False
    given: tuple[Tensor, Tensor, Tensor] | None = None
    weights: Tensor | None = None
    backend: str | None = None
    product: Tensor | None = None

    def weigh(self, weights: Tensor | None) -> None:
        """Prepare for a backward: take the fastest and, of these weights (B,1,Sq), the product along the way, if it can
        give that."""
        self.grad_output = self.product = self.weights = self.backend = None
        if self.query is not None:
            # Here, since autograd runs a backward in another thread where no `use_backend` reaches.
            self.backend = fused_backend(self.query.device, self.query.dtype)
            if self.backend is not None and weights is not None:
                self.weights = weights.to(self.query.device)


class KeysTaken(Exception):
    """What ends a layer that was called for its keys and values alone."""


# Largest time of `attention_backward_relevancy` over that of torch's flash backward followed by `relevancy_product`,
# over the shapes of `python -m benchmarks backward`. A backend that is not here has not been measured.
FUSED_RATIO = {"cpu": 0.48}


def fused_backend(device: torch.device, dtype: torch.dtype) -> str | None:
    """The backend whose fused backward a layer should take; None if torch's own and `relevancy_product` are faster."""
    name = ops.chosen_backend("attention_backward_relevancy", device, dtype)
    return name if FUSED_RATIO.get(name, 1.0) < 1.0 else None


# Which tape the attention of the layer now running writes to. A context variable, so that two threads that explain two
# models do not see each other's.
current_tape: contextvars.ContextVar[LayerTape | None] = contextvars.ContextVar("lvlm_fastxai_tape", default=None)


@dataclass(frozen=True, slots=True)
class Segment:
    """A rectangle of the attention that one library call can do: samples × query rows × keys."""

    samples: slice
    rows: slice
    keys: slice
    causal: bool = False
    masked: bool = False


@dataclass(slots=True)
class AttentionPlan:
    """Key ranges (B, Sq, 2) int32 and the library calls that cover them.

    ``keep_biases``: whether the small masks are kept for further calls. A plan for a few rows of one layer serves a
    forward and a backward only, and its masks together would be as large as those rows times the keys.
    """

    key_ranges: Tensor
    segments: tuple[Segment, ...]
    keep_biases: bool = True
    biases: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)

    def bias(self, index: int, dtype: torch.dtype) -> Tensor | None:
        """Additive mask (1, 1, rows, keys) of one segment, whose samples see the same keys; at most ``ROW_BLOCK`` rows
        high; None if it needs none."""
        segment = self.segments[index]
        if not segment.masked:
            return None
        if (index, dtype) in self.biases:
            return self.biases[index, dtype]
        ranges = self.key_ranges[segment.samples, segment.rows][:1]  # (1, rows, 2)
        columns = torch.arange(segment.keys.start, segment.keys.stop, device=ranges.device, dtype=torch.int32)
        visible = (columns >= ranges[..., :1]) & (columns < ranges[..., 1:])
        bias = torch.zeros(visible.shape, dtype=dtype, device=ranges.device).masked_fill_(~visible, -math.inf)[:, None]
        if self.keep_biases:
            self.biases[index, dtype] = bias
        return bias


def plan_attention(key_ranges: Tensor, *, keep_biases: bool = True) -> AttentionPlan:
    """Cover (B, Sq, 2) key ranges with as few library calls as their structure allows.

    Samples with equal ranges share a call. A run of rows that is plain causal becomes one causal call, rows that all
    see the same keys one unmasked call, and anything else blocks of at most ``ROW_BLOCK`` rows with a small bias.
    """
    host = key_ranges.detach().cpu()
    if bool((host == host[:1]).all()):
        groups = [(slice(0, host.shape[0]), host[0])]
    else:
        groups = [(slice(sample, sample + 1), ranges) for sample, ranges in enumerate(host)]
    segments: list[Segment] = []
    for samples, ranges in groups:
        segments += [
            Segment(samples, slice(top, bottom), slice(first, last), causal, masked)
            for top, bottom, first, last, causal, masked in _row_segments(ranges)
        ]
    return AttentionPlan(key_ranges, tuple(segments), keep_biases)


def plan_blind(key_ranges: Tensor, keys: int) -> AttentionPlan:
    """Cover (B, Sq, 2) key ranges without a look at them: blocks of at most ``ROW_BLOCK`` rows over all keys, masked.

    A look is a transfer to the host, for which an accelerator waits with nothing to do.
    """
    batch, rows = key_ranges.shape[:2]
    segments = [
        Segment(slice(sample, sample + 1), slice(top, min(top + ROW_BLOCK, rows)), slice(0, keys), masked=True)
        for sample in range(batch)
        for top in range(0, rows, ROW_BLOCK)
    ]
    return AttentionPlan(key_ranges, tuple(segments), keep_biases=False)


def _row_segments(ranges: Tensor) -> list[tuple[int, int, int, int, bool, bool]]:
    """(top, bottom, first key, last key, causal, masked) for one sample's (Sq, 2) ranges, empty rows left out."""
    starts, ends = ranges[:, 0].tolist(), ranges[:, 1].tolist()
    segments: list[tuple[int, int, int, int, bool, bool]] = []
    top, rows = 0, len(starts)
    while top < rows:
        if ends[top] <= starts[top]:
            top += 1
            continue
        bottom = top + 1
        if ends[top] == starts[top] + 1:  # may open a causal run: each row sees one key more than the last
            while bottom < rows and starts[bottom] == starts[top] and ends[bottom] == ends[bottom - 1] + 1:
                bottom += 1
            if bottom - top > 1 or bottom == rows:
                segments.append((top, bottom, starts[top], ends[bottom - 1], bottom - top > 1, False))
                top = bottom
                continue
        while bottom < rows and starts[bottom] == starts[top] and ends[bottom] == ends[top]:
            bottom += 1
        if bottom - top > 1:
            segments.append((top, bottom, starts[top], ends[top], False, False))
            top = bottom
            continue
        # A ragged block: stop before a run of rows that a single unmasked call covers better.
        while bottom < min(rows, top + ROW_BLOCK) and ends[bottom] > starts[bottom]:
            if bottom + 1 < rows and (starts[bottom], ends[bottom]) == (starts[bottom + 1], ends[bottom + 1]):
                break
            bottom += 1
        segments.append((top, bottom, min(starts[top:bottom]), max(ends[top:bottom]), False, bottom - top > 1))
        top = bottom
    return segments


def plain_ranges(batch: int, rows: int, keys: int, causal: bool, device: torch.device) -> Tensor:
    """Key ranges (B, Sq, 2) int32 without padding: causal (query rows are the last of the keys) or everything."""
    end = torch.arange(keys - rows + 1, keys + 1, dtype=torch.int32, device=device)
    if not causal:
        end = torch.full_like(end, keys)
    return torch.stack([torch.zeros_like(end), end], dim=-1).expand(batch, rows, 2)


def key_range_mask(*args: Any, **kwargs: Any) -> Tensor:
    """transformers mask function: (B, 1, Sq, 2) int32 key ranges instead of a (B, 1, Sq, Sk) mask.

    Four dimensions, because a mask of four is what transformers hands on as it is; PaliGemma makes its mask outside the
    decoder, which would otherwise take the ranges for a (B, S) padding mask and build another mask from them.

    The library's own boolean mask is evaluated ``ROW_BLOCK`` rows at a time and reduced at once, so whatever mask a
    model composes (windows, image blocks, packed sequences) is honoured without knowing it.

    Raises:
        UnsupportedModelError: a row that sees keys with a gap between them (a hole in ``attention_mask``).
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    boolean_mask = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    kwargs = {**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    positions = kwargs.get("cache_position")  # transformers < 5.3 describes the query rows by this tensor
    rows = kwargs["q_length"] if positions is None else positions.shape[0]
    block = max(1, min(ROW_BLOCK, rows - 1))
    ranges = []
    for top in range(0, rows, block):
        part = min(block, rows - top)
        if positions is None:
            select = {"q_length": part, "q_offset": kwargs.get("q_offset", 0) + top}
        else:
            select = {"cache_position": positions[top : top + part]}
        visible = boolean_mask(*args, **{**kwargs, **select})[:, 0]  # (B, part, Sk)
        count = visible.sum(-1, dtype=torch.int32)
        start = visible.to(torch.uint8).argmax(-1).to(torch.int32)
        end = visible.shape[-1] - visible.to(torch.uint8).flip(-1).argmax(-1).to(torch.int32)
        ranges.append(torch.stack([start, torch.where(count > 0, end, start)], dim=-1))
        if bool((count != ranges[-1][..., 1] - ranges[-1][..., 0]).any()):
            raise UnsupportedModelError(
                "attention mask: a query row sees keys with a gap between them; every row must see one contiguous "
                "range of keys (causal, prefix, image blocks, windows and padding at either end are fine)"
            )
    return torch.cat(ranges, dim=1)[:, None]


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention with transformers' ``AttentionInterface`` signature: query (B,H,Sq,d), key/value (B,Hkv,Sk,d).

    ``attention_mask`` is what :func:`key_range_mask` returned, or None. Returns the output (B, Sq, H, d), no weights.
    """
    for feature in ("softcap", "s_aux", "sinks"):
        if kwargs.get(feature) is not None:
            raise UnsupportedModelError(f"{type(module).__name__}: attention with {feature!r} is not supported yet")
    if query.shape[-1] != value.shape[-1]:
        raise UnsupportedModelError(
            f"{type(module).__name__}: value width {value.shape[-1]} differs from query width {query.shape[-1]}"
        )
    tape = current_tape.get()
    if tape is not None and tape.given is not None:
        key, value, ranges = tape.given
        on_host = ranges.device.type == "cpu"
        plan = plan_attention(ranges, keep_biases=False) if on_host else plan_blind(ranges, key.shape[2])
    else:
        plan = _plan_for(module, query, key, attention_mask, is_causal)
    if tape is not None and tape.keys_only:
        tape.calls += 1
        tape.key, tape.value, tape.key_ranges = key, value, plan.key_ranges
        raise KeysTaken
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    output = FlashAttention.apply(query, key, value, plan, scale, tape)
    return output.transpose(1, 2).contiguous(), None


def _plan_for(
    module: torch.nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool | None
) -> AttentionPlan:
    batch, rows, keys = query.shape[0], query.shape[2], key.shape[2]
    if mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        ranges = plain_ranges(batch, rows, keys, causal and rows > 1, query.device)
        if causal and rows > 1 and rows == keys:
            return AttentionPlan(ranges, (Segment(slice(0, batch), slice(0, rows), slice(0, keys), causal=True),))
        if not causal or rows == 1:
            return AttentionPlan(ranges, (Segment(slice(0, batch), slice(0, rows), slice(0, keys)),))
        return plan_attention(ranges)
    if mask.dtype != torch.int32 or mask.shape != (batch, 1, rows, 2):
        raise UnsupportedModelError(
            f"{type(module).__name__}: expected (B, 1, Sq, 2) int32 key ranges as attention mask, got "
            f"{tuple(mask.shape)} {mask.dtype}; pass a (B, S) attention_mask of zeros and ones to the model"
        )
    # The same mask tensor serves every layer of its kind; planning it costs a transfer to the host.
    plan = getattr(mask, "_lvlm_fastxai_plan", None)
    if plan is None:
        plan = plan_attention(mask[:, 0])
        mask._lvlm_fastxai_plan = plan  # type: ignore[attr-defined]
    return plan


@dataclass(frozen=True, slots=True)
class Call:
    """One library call: query (b,H,rows,d) · key, value (b,Hkv,keys,d) · bias (1,1,rows,keys) or None."""

    query: Tensor
    key: Tensor
    value: Tensor
    causal: bool
    bias: Tensor | None
    scale: float


class FlashAttention(torch.autograd.Function):
    """Attention over a plan's segments; its backward writes dO to the tape before it goes on."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float, tape: LayerTape | None
    ) -> Tensor:
        library = _library(query)
        parts = [library.forward(call) for call in _calls(plan, query, key, value, scale)]
        if len(parts) == 1 and parts[0][0].shape == query.shape:
            output, logsumexp, _ = parts[0]
        else:
            batch, heads, rows, width = query.shape
            output = query.new_zeros(batch, rows, heads, width).transpose(1, 2)
            logsumexp = query.new_full((batch, heads, rows), -math.inf, dtype=_accumulator(query.dtype))
            for segment, (part, part_logsumexp, _) in zip(plan.segments, parts, strict=True):
                output[segment.samples, :, segment.rows] = part
                logsumexp[segment.samples, :, segment.rows] = part_logsumexp
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.plan, ctx.scale, ctx.tape, ctx.extras = plan, scale, tape, [extra for _, _, extra in parts]
        if tape is not None:
            tape.calls += 1
            tape.query, tape.key, tape.value = query.detach(), key.detach(), value.detach()
            tape.logsumexp, tape.key_ranges, tape.scale = logsumexp, plan.key_ranges, scale
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value, output, logsumexp = ctx.saved_tensors
        library, plan, tape = _library(query), ctx.plan, ctx.tape
        if tape is not None:
            tape.grad_output = grad_output
            if tape.backend is not None:
                weights = tape.weights
                *gradients, product = ops.attention_backward_relevancy(
                    *(query, key, value, output, grad_output[:, None], logsumexp),
                    logsumexp.new_zeros(query.shape[0], 1, query.shape[2]) if weights is None else weights,
                    scale=ctx.scale,
                    key_ranges=plan.key_ranges,
                    backend=tape.backend,
                )
                tape.product = None if weights is None else product
                return (*(gradient[:, 0] for gradient in gradients), None, None, None)  # type: ignore[return-value]
        parts = []
        for segment, call, extra in zip(
            plan.segments, _calls(plan, query, key, value, ctx.scale), ctx.extras, strict=True
        ):
            rows = (segment.samples, slice(None), segment.rows)
            parts.append(library.backward(call, grad_output[rows], output[rows], logsumexp[rows], extra))
        if len(parts) == 1 and parts[0][0].shape == query.shape and parts[0][1].shape == key.shape:
            return (*parts[0], None, None, None)
        grads = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for segment, (grad_query, grad_key, grad_value) in zip(plan.segments, parts, strict=True):
            grads[0][segment.samples, :, segment.rows] = grad_query
            grads[1][segment.samples, :, segment.keys] += grad_key
            grads[2][segment.samples, :, segment.keys] += grad_value
        return (*grads, None, None, None)


def _calls(plan: AttentionPlan, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Iterator[Call]:
    for index, segment in enumerate(plan.segments):
        keys = (segment.samples, slice(None), segment.keys)
        rows = query[segment.samples, :, segment.rows]
        yield Call(rows, key[keys], value[keys], segment.causal, plan.bias(index, query.dtype), scale)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _Library(Protocol):
    """``forward`` gives the output, the logsumexp and whatever its own ``backward`` wants back."""

    @staticmethod
    def forward(call: Call) -> tuple[Tensor, Tensor, tuple]: ...

    @staticmethod
    def backward(
        call: Call, grad: Tensor, output: Tensor, logsumexp: Tensor, extra: tuple
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def _library(query: Tensor) -> type[_Library]:
    if query.device.type == "cpu":
        return _CpuFlash
    if query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] % 8 == 0:
        return _CudaFlash
    return _Blocked


class _CpuFlash:
    """torch's CPU flash attention: any float dtype and width, grouped keys as they are."""

    @staticmethod
    def forward(call: Call) -> tuple[Tensor, Tensor, tuple]:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output, logsumexp = kernel(
            call.query, call.key, call.value, 0.0, call.causal, attn_mask=call.bias, scale=call.scale
        )
        return output, logsumexp, ()

    @staticmethod
    def backward(
        call: Call, grad: Tensor, output: Tensor, logsumexp: Tensor, extra: tuple
    ) -> tuple[Tensor, Tensor, Tensor]:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        forward = (call.query, call.key, call.value, output, logsumexp, 0.0, call.causal)
        return kernel(grad, *forward, attn_mask=call.bias, scale=call.scale)


class _Blocked:
    """Attention in matrix products of ``ROW_BLOCK`` rows, for devices and dtypes that torch's flash kernels refuse."""

    @staticmethod
    def forward(call: Call) -> tuple[Tensor, Tensor, tuple]:
        key, value = _expand_groups(call)
        outputs, logsumexps = [], []
        for top in range(0, call.query.shape[2], ROW_BLOCK):
            scores = _Blocked._scores(call, key, top)
            logsumexp = scores.logsumexp(-1)
            outputs.append(_Blocked._probability(scores, logsumexp).to(value.dtype) @ value)
            logsumexps.append(logsumexp)
        return torch.cat(outputs, 2), torch.cat(logsumexps, 2), ()

    @staticmethod
    def backward(
        call: Call, grad: Tensor, output: Tensor, logsumexp: Tensor, extra: tuple
    ) -> tuple[Tensor, Tensor, Tensor]:
        key, value = _expand_groups(call)
        query, dtype = call.query, _accumulator(call.query.dtype)
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros(key.shape, dtype=dtype, device=key.device) for _ in range(2))
        for top in range(0, query.shape[2], ROW_BLOCK):
            rows = (slice(None), slice(None), slice(top, top + ROW_BLOCK))
            probability = _Blocked._probability(_Blocked._scores(call, key, top), logsumexp[rows])
            grad_probability = (grad[rows] @ value.mT).to(dtype)
            delta = (grad[rows].to(dtype) * output[rows]).sum(-1, keepdim=True)
            grad_scores = (probability * (grad_probability - delta) * call.scale).to(query.dtype)
            grad_query[rows] = grad_scores @ key
            grad_key += grad_scores.mT @ query[rows]
            grad_value += probability.to(grad.dtype).mT @ grad[rows]
        return grad_query, _sum_groups(call, grad_key), _sum_groups(call, grad_value)

    @staticmethod
    def _probability(scores: Tensor, logsumexp: Tensor) -> Tensor:
        # A row that sees no key has a logsumexp of -inf, which would make NaN of its zeros.
        return (scores - logsumexp.masked_fill(logsumexp == -math.inf, 0)[..., None]).exp()

    @staticmethod
    def _scores(call: Call, key: Tensor, top: int) -> Tensor:
        block = call.query[:, :, top : top + ROW_BLOCK]
        scores = (block @ key.mT).to(_accumulator(block.dtype)) * call.scale
        if call.causal:
            row = torch.arange(top, top + block.shape[2], device=block.device)
            hidden = torch.arange(key.shape[2], device=block.device) > row[:, None]
            scores = scores.masked_fill(hidden, -math.inf)
        return scores if call.bias is None else scores + call.bias[:, :, top : top + ROW_BLOCK]


class _CudaFlash:
    """torch's CUDA flash attention for 16-bit inputs; a segment with a bias goes to :class:`_Blocked`."""

    @staticmethod
    def forward(call: Call) -> tuple[Tensor, Tensor, tuple]:
        if call.bias is not None:
            return _Blocked.forward(call)
        output, logsumexp, *extra = torch.ops.aten._scaled_dot_product_flash_attention(
            call.query, *_expand_groups(call), 0.0, call.causal, False, scale=call.scale
        )
        return output, logsumexp, tuple(extra[:6])

    @staticmethod
    def backward(
        call: Call, grad: Tensor, output: Tensor, logsumexp: Tensor, extra: tuple
    ) -> tuple[Tensor, Tensor, Tensor]:
        if call.bias is not None:
            return _Blocked.backward(call, grad, output, logsumexp, extra)
        *lengths, seed, offset = extra  # cumulative lengths (None here) and longest rows of query and key
        forward = (call.query, *_expand_groups(call), output, logsumexp, *lengths, 0.0, call.causal, seed, offset)
        grad_query, grad_key, grad_value = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad.contiguous(), *forward, scale=call.scale
        )
        return grad_query, _sum_groups(call, grad_key), _sum_groups(call, grad_value)


def _expand_groups(call: Call) -> tuple[Tensor, Tensor]:
    """key, value (b, H, keys, d)."""
    repeats = call.query.shape[1] // call.key.shape[1]
    if repeats == 1:
        return call.key, call.value
    return call.key.repeat_interleave(repeats, dim=1), call.value.repeat_interleave(repeats, dim=1)


def _sum_groups(call: Call, gradient: Tensor) -> Tensor:
    """(b, H, keys, d) to (b, Hkv, keys, d)."""
    return gradient.unflatten(1, (call.key.shape[1], -1)).sum(2).to(call.key.dtype)


def register() -> None:
    """Enter the attention and its mask in transformers' registries; repeated calls change nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, key_range_mask)
