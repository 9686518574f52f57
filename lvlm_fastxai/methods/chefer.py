"""Chefer, Gur and Wolf, "Generic Attention-model Explainability" (ICCV 2021), self-attention rule, decoder-only.

Ā_l = mean_h max(0, dP_l[h] ∘ P_l[h])        row ← e_{q*};   for l = L … 1:  row ← row + row @ Ā_l
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ..sweep import Sweep
from ._base import Method, slots_at_once


class Chefer(Method):
    """The rule on a teacher-forced pass over prompt and answer; every row uses the target's own gradient."""

    name: ClassVar[str] = "chefer"

    def rows(self, sweep: Sweep) -> Tensor:
        targets, result = self.targets, self.empty_rows(sweep)
        scalars, slots = targets.scalars(sweep.logits), targets.slots
        chunk = slots_at_once(sweep, targets)
        for first in range(0, len(slots), chunk):
            part = slice(first, first + chunk)
            row = self.swept(sweep, scalars[part], slots[part], keep=first + chunk < len(slots))
            targets.scatter(row, slots[part], result)
        return result
