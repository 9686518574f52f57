"""Variants of proxy_relevancy's kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from lvlm_fastxai.triton_kernels import proxy_relevancy

from . import Variant

variant = partial(Variant, "proxy_relevancy")
VARIANTS = [
    *(
        variant("column_scores", dtype, width, centered=centered)
        for dtype, width in (*((torch.bfloat16, width) for width in (128, 4096, 5120, 8192)), (torch.float32, 8192))
        for centered in (False, True)
    ),
    variant("column_scores", torch.bfloat16, 100, centered=True),
    *(
        variant("tile_scores", dtype, width, targets, centered=True)
        for dtype in (torch.bfloat16, torch.float32)
        for width, targets in ((128, 64), (4096, 16), (4096, 64))
    ),
    # It reads scores, which have no width.
    variant("finish_rows", torch.float32, 1),
]
# The products of a folded query are of float32 numbers: no tensor core computes them.
EXACT = True
# The query is float32 here; `hidden` has the variant's dtype.
POINTERS = dict.fromkeys(("query", "offset", "scores", "entropy", "bernoulli"), "*fp32") | {"lengths": "*i32"}


def compile_time(variant: Variant) -> tuple[Any, dict[str, Any]]:
    """Return the kernel and its compile-time arguments."""
    kernel = getattr(proxy_relevancy, variant.kernel)
    if variant.kernel == "finish_rows":
        return kernel, {"SOFTMAX": True, "PIECE": proxy_relevancy.ROW_PIECE}
    chosen = proxy_relevancy.configuration(variant.dtype, variant.width, variant.targets)
    return kernel, proxy_relevancy.constants(chosen, variant.width, variant.alignment, variant.centered)
