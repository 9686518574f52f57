"""Dense twin of `glimpse_product`: stores every S×S matrix, on any device, in any floating dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def glimpse_product(
    query: Tensor,  # (B, H, Sq, d)
    key: Tensor,  # (B, Hkv, Sk, d)
    value: Tensor,  # (B, Hkv, Sk, d)
    grad_output: Tensor,  # (B, N, H, Sq, d)
    logsumexp: Tensor,  # (B, H, Sq)
    row: Tensor,  # (B, N, K, Sq)
    head_weights: Tensor,  # (B, N, H)
    key_start: Tensor,  # (B, Sq)
    key_end: Tensor,  # (B, Sq)
    scale: float,
) -> Tensor:
    """Compute row @ E with E = rownorm(Σ_h w_h max(0, P_h ∘ dP_h)).

    P_ij is exp(scale·q_i·k_j − logsumexp_i), and dP_ij is dO_i·v_j.
    The layer relevance of GLIMPSE (arXiv 2506.18985). Row i sees keys key_start_i ≤ j < key_end_i; rows of the sum that
    are zero stay zero.

    Returns:
        (B, N, K, Sk) in float64 for float64 inputs, float32 otherwise.

    Example:
        >>> q = torch.ones(1, 1, 2, 4)
        >>> lse = torch.tensor([[[2.0, 2.0 + 0.6931472]]])
        >>> start, end = torch.tensor([[0, 0]]), torch.tensor([[1, 2]])
        >>> row, weights = torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1)
        >>> glimpse_product(q, q, q, q[:, None], lse, row, weights, start, end, 0.5)
        tensor([[[[1.5000, 0.5000]]]])
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    group = query.shape[1] // key.shape[1]
    key = key.to(dtype).repeat_interleave(group, dim=1)  # (B, H, Sk, d)
    value = value.to(dtype).repeat_interleave(group, dim=1)
    position = torch.arange(key.shape[2], device=key.device)
    visible = (position >= key_start[..., None]) & (position < key_end[..., None])  # (B, Sq, Sk)
    probability = torch.exp((query.to(dtype) @ key.mT) * scale - logsumexp[..., None])  # (B, H, Sq, Sk)
    grad_probability = grad_output.to(dtype) @ value[:, None].mT  # (B, N, H, Sq, Sk)
    positive = (probability[:, None] * grad_probability).clamp(min=0).masked_fill(~visible[:, None, None], 0)
    weighted = (head_weights[..., None, None] * positive).sum(2)  # (B, N, Sq, Sk)
    total = weighted.sum(-1, keepdim=True)
    return row @ torch.where(total > 0, weighted / total, 0)
