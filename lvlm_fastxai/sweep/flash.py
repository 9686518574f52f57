"""The attention of torch that returns its logsumexp, for each device: flash attention where there is one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .plan import ROW_BLOCK, AttentionPlan


@dataclass(frozen=True, slots=True)
class Call:
    """One library call: query (b,H,rows,d) · key, value (b,Hkv,keys,d) · bias (1,1,rows,keys) or None."""

    query: Tensor
    key: Tensor
    value: Tensor
    causal: bool
    bias: Tensor | None
    scale: float


def calls_of(plan: AttentionPlan, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Iterator[Call]:
    for index, segment in enumerate(plan.segments):
        keys = (segment.samples, slice(None), segment.keys)
        rows = query[segment.samples, :, segment.rows]
        yield Call(rows, key[keys], value[keys], segment.causal, plan.bias(index, query.dtype), scale)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class Library(Protocol):
    """``forward`` gives the output, the logsumexp and whatever its own ``backward`` wants back."""

    @staticmethod
    def forward(call: Call) -> tuple[Tensor, Tensor, tuple[Any, ...]]: ...

    @staticmethod
    def backward(
        call: Call, grad: Tensor, output: Tensor, logsumexp: Tensor, extra: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def library_of(query: Tensor) -> type[Library]:
    if query.device.type == "cpu":
        return CpuFlash
    if query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] % 8 == 0:
        return CudaFlash
    return Blocked


class CpuFlash:
    """torch's CPU flash attention: any float dtype and width, grouped keys as they are."""

    @staticmethod
    def forward(call: Call) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output, logsumexp = kernel(
            call.query, call.key, call.value, 0.0, call.causal, attn_mask=call.bias, scale=call.scale
        )
        return output, logsumexp, ()

    @staticmethod
    def backward(
        call: Call, grad: Tensor, output: Tensor, logsumexp: Tensor, extra: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        forward = (call.query, call.key, call.value, output, logsumexp, 0.0, call.causal)
        return kernel(grad, *forward, attn_mask=call.bias, scale=call.scale)


class Blocked:
    """Attention in matrix products of ``ROW_BLOCK`` rows, for devices and dtypes that torch's flash kernels refuse."""

    @staticmethod
    def forward(call: Call) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        key, value = _expand_groups(call)
        outputs, logsumexps = [], []
        for top in range(0, call.query.shape[2], ROW_BLOCK):
            scores = Blocked._scores(call, key, top)
            logsumexp = scores.logsumexp(-1)
            outputs.append(Blocked._probability(scores, logsumexp).to(value.dtype) @ value)
            logsumexps.append(logsumexp)
        return torch.cat(outputs, 2), torch.cat(logsumexps, 2), ()

    @staticmethod
    def backward(
        call: Call, grad: Tensor, output: Tensor, logsumexp: Tensor, extra: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        key, value = _expand_groups(call)
        query, dtype = call.query, accumulator(call.query.dtype)
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros(key.shape, dtype=dtype, device=key.device) for _ in range(2))
        for top in range(0, query.shape[2], ROW_BLOCK):
            rows = (slice(None), slice(None), slice(top, top + ROW_BLOCK))
            probability = Blocked._probability(Blocked._scores(call, key, top), logsumexp[rows])
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
        scores = (block @ key.mT).to(accumulator(block.dtype)) * call.scale
        if call.causal:
            row = torch.arange(top, top + block.shape[2], device=block.device)
            hidden = torch.arange(key.shape[2], device=block.device) > row[:, None]
            scores = scores.masked_fill(hidden, -math.inf)
        return scores if call.bias is None else scores + call.bias[:, :, top : top + ROW_BLOCK]


class CudaFlash:
    """torch's CUDA flash attention for 16-bit inputs; a segment with a bias goes to :class:`Blocked`."""

    @staticmethod
    def forward(call: Call) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        if call.bias is not None:
            return Blocked.forward(call)
        output, logsumexp, *extra = torch.ops.aten._scaled_dot_product_flash_attention(
            call.query, *_expand_groups(call), 0.0, call.causal, False, scale=call.scale
        )
        return output, logsumexp, tuple(extra[:6])

    @staticmethod
    def backward(
        call: Call, grad: Tensor, output: Tensor, logsumexp: Tensor, extra: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        if call.bias is not None:
            return Blocked.backward(call, grad, output, logsumexp, extra)
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
