"""Variants of attention_backward_relevancy's kernels."""

from __future__ import annotations

from typing import Any

import torch

from lvlm_fastxai.triton_kernels import attention_backward_relevancy

from . import Variant

VARIANTS = [
    Variant("attention_backward_relevancy", kernel, dtype, width)
    for kernel in ("key_gradients", "query_gradients")
    for dtype, width in (
        *((torch.bfloat16, width) for width in (72, 96, 100, 128, 256)),
        *((torch.float32, width) for width in (128, 300)),
    )
]


def compile_time(variant: Variant) -> tuple[Any, dict[str, Any]]:
    """Return the kernel and its compile-time arguments."""
    kernel = getattr(attention_backward_relevancy, variant.kernel)
    chosen = attention_backward_relevancy.configuration(variant.dtype, variant.width)
    tile = chosen.key_tile if variant.kernel == "key_gradients" else chosen.query_tile
    return kernel, attention_backward_relevancy.constants(chosen, variant.width, variant.alignment, tile)
