"""The attention function registered with transformers: torch's own flash attention, with the tape a sweep reads.

The forward calls the fastest attention of torch that returns the logsumexp. The backward leaves dO (the gradient at the
attention's output) on the layer's :class:`~lvlm_fastxai.sweep.tape.Tape` and then lets torch's flash backward continue.
Nothing is patched: the function and its mask are entries in transformers' ``AttentionInterface`` and
``AttentionMaskInterface``.

Every mask in scope (causal, bidirectional prefix, image blocks, sliding window, padding on either side, packed
sequences) lets a query row see one contiguous range of keys. So the mask that travels through the model is an int32
tensor (B, 1, Sq, 2) of half-open key ranges, and no (B, 1, Sq, Sk) tensor ever exists.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..errors import UnsupportedModelError
from .flash import accumulator, calls_of, library_of
from .plan import ROW_BLOCK, AttentionPlan, Segment, plain_ranges, plan_attention, plan_blind
from .tape import KeysTaken, Tape, current_tape

# Neither "flash" nor "sdpa" may occur in the name: transformers treats both specially.
NAME = "lvlm_fastxai"

# Largest time of `attention_backward_relevancy` over that of torch's flash backward followed by `relevancy_product`,
# over the shapes of `python -m benchmarks backward`. A backend that is not here has not been measured.
FUSED_RATIO = {"cpu": 0.48}


def fused_backend(device: torch.device, dtype: torch.dtype) -> str | None:
    """The backend whose fused backward a layer should take; None if torch's own and `relevancy_product` are faster."""
    name = ops.chosen_backend("attention_backward_relevancy", device, dtype)
    return name if FUSED_RATIO.get(name, 1.0) < 1.0 else None


def request_backward(tape: Tape, weights: Tensor | None) -> None:
    """Ask for the fastest backward of the layer on ``tape``, and for its product with ``weights`` where it gives one.

    Args:
        weights: (B, 1, Sq) running relevancy of the layer's query rows; None if no product is wanted.
    """
    request, record = tape.request, tape.record
    record.grad_output = record.product = request.weights = request.backend = None
    if record.query is not None:
        # Chosen here: autograd may run the backward in another thread, which no `use_backend` reaches.
        request.backend = fused_backend(record.query.device, record.query.dtype)
        if request.backend is not None and weights is not None:
            request.weights = weights.to(record.query.device)


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
    if tape is not None and tape.request.given is not None:
        key, value, ranges = tape.request.given
        on_host = ranges.device.type == "cpu"
        plan = plan_attention(ranges, keep_biases=False) if on_host else plan_blind(ranges, key.shape[2])
    else:
        plan = _plan_for(module, query, key, attention_mask, is_causal)
    if tape is not None and tape.request.keys_only:
        record = tape.record
        record.calls += 1
        record.key, record.value, record.key_ranges = key, value, plan.key_ranges
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


class FlashAttention(torch.autograd.Function):
    """Attention over a plan's segments; its backward writes dO to the tape before it goes on."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float, tape: Tape | None
    ) -> Tensor:
        library = library_of(query)
        parts = [library.forward(call) for call in calls_of(plan, query, key, value, scale)]
        if len(parts) == 1 and parts[0][0].shape == query.shape:
            output, logsumexp, _ = parts[0]
        else:
            batch, heads, rows, width = query.shape
            output = query.new_zeros(batch, rows, heads, width).transpose(1, 2)
            logsumexp = query.new_full((batch, heads, rows), -math.inf, dtype=accumulator(query.dtype))
            for segment, (part, part_logsumexp, _) in zip(plan.segments, parts, strict=True):
                output[segment.samples, :, segment.rows] = part
                logsumexp[segment.samples, :, segment.rows] = part_logsumexp
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.plan, ctx.scale, ctx.tape, ctx.extras = plan, scale, tape, [extra for _, _, extra in parts]
        if tape is not None:
            record = tape.record
            record.calls += 1
            record.query, record.key, record.value = query.detach(), key.detach(), value.detach()
            record.logsumexp, record.key_ranges, record.scale = logsumexp, plan.key_ranges, scale
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value, output, logsumexp = ctx.saved_tensors
        library, plan, tape = library_of(query), ctx.plan, ctx.tape
        if tape is not None:
            tape.record.grad_output = grad_output
            if tape.request.backend is not None:
                weights = tape.request.weights
                *gradients, product = ops.attention_backward_relevancy(
                    *(query, key, value, output, grad_output[:, None], logsumexp),
                    logsumexp.new_zeros(query.shape[0], 1, query.shape[2]) if weights is None else weights,
                    scale=ctx.scale,
                    key_ranges=plan.key_ranges,
                    backend=tape.request.backend,
                )
                tape.record.product = None if weights is None else product
                return (*(gradient[:, 0] for gradient in gradients), None, None, None)  # type: ignore[return-value]
        parts = []
        for segment, call, extra in zip(
            plan.segments, calls_of(plan, query, key, value, ctx.scale), ctx.extras, strict=True
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


def register() -> None:
    """Enter the attention and its mask in transformers' registries; repeated calls change nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, key_range_mask)
