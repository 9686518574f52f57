"""Variants of relevancy_product's kernel."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from lvlm_fastxai.triton_kernels import relevancy_product

from . import Variant

variant = partial(Variant, "relevancy_product", "column_sums")
VARIANTS = [
    *(variant(torch.bfloat16, width) for width in (64, 72, 96, 100, 128, 256)),
    *(variant(torch.bfloat16, width, 2) for width in (72, 96, 128)),
    *(variant(torch.bfloat16, width, 8, True) for width in (128, 256, 512)),
    variant(torch.float16, 128, 2),
    variant(torch.float32, 128, 2),
    variant(torch.float32, 300),
]


def compile_time(variant: Variant) -> tuple[Any, dict[str, Any]]:
    """Return the kernel and its compile-time arguments."""
    problem = variant.dtype, variant.width, variant.targets, variant.shared_gradient
    chosen = relevancy_product.configuration(*problem)
    return relevancy_product.column_sums, relevancy_product.constants(
        chosen, variant.width, variant.shared_gradient, variant.alignment
    )
