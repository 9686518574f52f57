"""Variants of glimpse_statistics' kernel."""

from __future__ import annotations

from typing import Any

import torch

from lvlm_fastxai.triton_kernels import glimpse_statistics

from . import Variant

# Query heads to a key head, which is compiled in: LLaMA 3 8B's.
GROUP = 4
VARIANTS = [
    Variant("glimpse_statistics", "tile_sums", dtype, width)
    for dtype, widths in ((torch.bfloat16, (64, 72, 96, 100, 128, 256)), (torch.float32, (128, 300)))
    for width in widths
]


def compile_time(variant: Variant) -> tuple[Any, dict[str, Any]]:
    """Return the kernel and its compile-time arguments."""
    chosen = glimpse_statistics.configuration(variant.dtype, variant.width)
    return glimpse_statistics.tile_sums, glimpse_statistics.constants(chosen, GROUP, variant.width, variant.alignment)
