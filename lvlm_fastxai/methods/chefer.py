"""Chefer, Gur and Wolf, "Generic Attention-model Explainability" (ICCV 2021), self-attention rule, decoder-only.

Ā_l = mean_h max(0, dP_l[h] ∘ P_l[h])        row ← e_{q*};   for l = L … 1:  row ← row + row @ Ā_l
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ..sweep.descent import Sweep
from ._base import Method


class Chefer(Method):
    """The rule on a teacher-forced pass over prompt and answer; every row uses the target's own gradient."""

    name: ClassVar[str] = "chefer"

    def rows(self, sweep: Sweep) -> Tensor:
        return self.in_chunks(sweep)
