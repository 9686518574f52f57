"""Dense twin of `relevancy_product`: stores every S×S matrix, on any device, in any floating dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def relevancy_product(
    query: Tensor,  # (B, H, Sq, d)
    key: Tensor,  # (B, Hkv, Sk, d)
    value: Tensor,  # (B, Hkv, Sk, d)
    grad_output: Tensor,  # (B, N or 1, H, Sq, d)
    logsumexp: Tensor,  # (B, H, Sq)
    row: Tensor,  # (B, N, Sq)
    key_start: Tensor,  # (B, Sq)
    key_end: Tensor,  # (B, Sq)
    scale: float,
    *,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute Σ_i row_i · (1/H) Σ_h max(0, P_ij ∘ dP_ij).

    P_ij is exp(scale·q_i·k_j − logsumexp_i), and dP_ij is dO_i·v_j. This is the self-attention rule of Chefer, Gur and
    Wolf, "Generic Attention-model Explainability" (ICCV 2021), eq. 5, applied to one row of R. Row i sees keys
    key_start_i ≤ j < key_end_i. Hidden entries and rows of weight zero contribute nothing, even where their inputs are
    NaN.

    Args:
        compute_dtype: dtype of the matrices; default float64 for float64 inputs, float32 otherwise. Passing the
            16-bit dtype of the inputs shows what eager PyTorch loses by rounding every matrix to it.

    Returns:
        (B, N, Sk) in float64 for float64 inputs, float32 otherwise.

    Example:
        >>> q = torch.ones(1, 1, 2, 4)
        >>> lse = torch.tensor([[[2.0, 2.0 + 0.6931472]]])
        >>> start, end = torch.tensor([[0, 0]]), torch.tensor([[1, 2]])
        >>> relevancy_product(q, q, q, torch.ones(1, 1, 1, 2, 4), lse, torch.ones(1, 1, 2), start, end, 0.5)
        tensor([[[6., 2.]]])
    """
    result_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    dtype = compute_dtype or result_dtype
    group = query.shape[1] // key.shape[1]
    key = key.to(dtype).repeat_interleave(group, dim=1)  # (B, H, Sk, d)
    value = value.to(dtype).repeat_interleave(group, dim=1)

    position = torch.arange(key.shape[2], device=key.device)
    visible = (position >= key_start[..., None]) & (position < key_end[..., None])  # (B, Sq, Sk)

    scores = (query.to(dtype) @ key.transpose(-1, -2)) * scale
    probability = torch.exp(scores.to(result_dtype) - logsumexp[..., None]).to(dtype)  # (B, H, Sq, Sk)
    grad_probability = grad_output.to(dtype) @ value[:, None].transpose(-1, -2)  # (B, N, H, Sq, Sk)
    positive = (probability[:, None] * grad_probability).clamp(min=0)
    mean = positive.mean(dim=2, dtype=result_dtype)  # (B, N, Sq, Sk)

    row = row.to(result_dtype)[..., None]  # (B, N, Sq, 1)
    contributes = visible[:, None] & (row != 0)
    return (row * mean).masked_fill(~contributes, 0).sum(dim=2)
