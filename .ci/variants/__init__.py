"""What cubins.py compiles of each operator's Triton kernels: the extremes of each choice that `configuration` makes.

The module of an operator's name holds VARIANTS and `compile_time`, and may hold POINTERS and EXACT. fp16 compiles to
the same as bf16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lvlm_fastxai.triton_kernels._tiles import ALIGNMENT

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Variant(NamedTuple):
    """One kernel as it is compiled for one problem."""

    operator: str
    kernel: str
    dtype: torch.dtype
    width: int
    targets: int = 1
    shared_gradient: bool = False
    centered: bool = False

    @property
    def is_aligned(self) -> bool:
        """Whether a contiguous tensor's rows all begin at a multiple of 16 bytes."""
        return self.width % ALIGNMENT == 0

    @property
    def alignment(self) -> int:
        return ALIGNMENT if self.is_aligned else 1
