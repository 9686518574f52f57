"""Dense twin of `glimpse_statistics`: stores every S×S matrix, on any device, in any floating dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def glimpse_statistics(
    query: Tensor,  # (B, H, Sq, d)
    key: Tensor,  # (B, Hkv, Sk, d)
    value: Tensor,  # (B, Hkv, Sk, d)
    grad_output: Tensor,  # (B, N, H, Sq, d)
    logsumexp: Tensor,  # (B, H, Sq)
    key_start: Tensor,  # (B, Sq)
    key_end: Tensor,  # (B, Sq)
    sum_start: Tensor,  # (B, Sq)
    sum_end: Tensor,  # (B, Sq)
    scale: float,
    *,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the sums over a layer's P and dP by which GLIMPSE (arXiv 2506.18985) weights heads and layers.

    With P_ij = exp(scale·q_i·k_j − logsumexp_i) for key_start_i ≤ j < key_end_i, and dP_ij = dO_i·v_j for
    sum_start_i ≤ j < sum_end_i, a range that contains the first; both are zero elsewhere, even where their inputs are
    NaN:

        row_sums[h, i]    = Σ_j max(0, P_ij[h] · dP_ij[h])
        gradient_sums[h]  = Σ_ij max(0, dP_ij[h])
        norm              = Σ_ij |Σ_h dP_ij[h]|

    Args:
        compute_dtype: dtype of the matrices; default float64 for float64 inputs, float32 otherwise. Passing the
            16-bit dtype of the inputs shows what eager PyTorch loses by rounding every matrix to it.

    Returns:
        row_sums (B, N, H, Sq), gradient_sums (B, N, H) and norm (B, N), float64 for float64 inputs, float32 otherwise.

    Example:
        >>> q = torch.ones(1, 1, 2, 4)
        >>> lse = torch.tensor([[[2.0, 2.0 + 0.6931472]]])
        >>> start, end = torch.tensor([[0, 0]]), torch.tensor([[1, 2]])
        >>> found = glimpse_statistics(q, q, q, q[:, None], lse, start, end, start, end.new_full((1, 2), 2), 0.5)
        >>> [part.flatten().tolist() for part in found]
        [[4.0, 4.0], [16.0], [16.0]]
    """
    result_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    dtype = compute_dtype or result_dtype
    group = query.shape[1] // key.shape[1]
    key = key.to(dtype).repeat_interleave(group, dim=1)  # (B, H, Sk, d)
    value = value.to(dtype).repeat_interleave(group, dim=1)

    position = torch.arange(key.shape[2], device=key.device)
    visible = (position >= key_start[..., None]) & (position < key_end[..., None])  # (B, Sq, Sk)
    summed = (position >= sum_start[..., None]) & (position < sum_end[..., None])

    scores = (query.to(dtype) @ key.mT) * scale
    probability = torch.exp(scores.to(result_dtype) - logsumexp[..., None]).to(dtype)  # (B, H, Sq, Sk)
    grad_probability = grad_output.to(dtype) @ value[:, None].mT  # (B, N, H, Sq, Sk)
    positive = (probability[:, None] * grad_probability).clamp(min=0).masked_fill(~visible[:, None, None], 0)
    grad_probability = grad_probability.masked_fill(~summed[:, None, None], 0)
    return (
        positive.sum(-1, dtype=result_dtype),
        grad_probability.clamp(min=0).sum((-1, -2), dtype=result_dtype),
        grad_probability.sum(2, dtype=result_dtype).abs().sum((-1, -2)),
    )
