"""The last layer's attention row, averaged over heads: the baseline that people use today. No gradient is taken."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..sweep.forward import Sweep
from ._base import Method
from .registry import MethodName


class RawAttention(Method):
    """row_j = mean_h P_L[h][q*, j]."""

    name: ClassVar[MethodName] = "raw_attention"

    def rows(self, sweep: Sweep) -> Tensor:
        targets, result = self.targets, self.empty_rows(sweep)
        record = sweep.top_layer()
        assert record.query is not None and record.key is not None
        assert record.logsumexp is not None and record.key_ranges is not None
        device = record.query.device
        samples = torch.tensor(targets.samples, device=device)
        rows = torch.tensor(targets.query_rows, device=device)
        query = record.query[samples, :, rows].to(result.dtype)  # (N, H, d)
        groups = query.unflatten(1, (record.key.shape[1], -1))  # (N, Hkv, H/Hkv, d)
        columns = torch.arange(record.key.shape[2], device=device)
        for target, sample in enumerate(targets.samples):
            scores = groups[target] @ record.key[sample].to(result.dtype).mT * record.scale  # (Hkv, H/Hkv, S)
            logsumexp = record.logsumexp[sample, :, rows[target]].view(*scores.shape[:2], 1)
            first, last = record.key_ranges[sample, rows[target]]
            visible = (columns >= first) & (columns < last)
            result[target] = torch.where(visible, (scores - logsumexp).exp(), 0).mean((0, 1)).to(result)
        return sweep.ranks.mean(result)
