"""Dense twin of the toy operator `softplus_product`."""

from __future__ import annotations

import torch
from torch import Tensor


def softplus_product(rows: Tensor, weight: Tensor, beta: float) -> Tensor:
    """Return log(1 + exp(beta · rows @ weight)) / beta, (M,), for rows (M, I) and weight (I,)."""
    return torch.log1p(torch.exp(beta * (rows @ weight))) / beta
