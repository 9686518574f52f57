"""Dense twin of `attention_backward_relevancy`: stores every S×S matrix, on any device, in any floating dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_backward_relevancy(
    query: Tensor,  # (B, H, Sq, d)
    key: Tensor,  # (B, Hkv, Sk, d)
    value: Tensor,  # (B, Hkv, Sk, d)
    output: Tensor,  # (B, H, Sq, d)
    grad_output: Tensor,  # (B, N, H, Sq, d)
    logsumexp: Tensor,  # (B, H, Sq)
    row: Tensor,  # (B, N, Sq)
    key_start: Tensor,  # (B, Sq)
    key_end: Tensor,  # (B, Sq)
    scale: float,
    *,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute flash attention's backward and, from its P and dP, the product of `relevancy_product`.

    The backward is algorithm 2 of Dao, "FlashAttention-2" (2023).
    With P_ij = exp(scale·q_i·k_j − logsumexp_i), dP_ij = dO_i·v_j, D_i = dO_i·O_i and dS = P ∘ (dP − D):
    dQ = scale·dS·K, dK = scale·dSᵀ·Q and dV = Pᵀ·dO, the last two summed over the query heads that share a key head.
    Row i sees keys key_start_i ≤ j < key_end_i. Rows of weight zero add nothing to the product, but have gradients.

    Args:
        compute_dtype: dtype of the matrices; default float64 for float64 inputs, float32 otherwise. Passing the
            16-bit dtype of the inputs shows what eager PyTorch loses by rounding every matrix to it.

    Returns:
        dQ (B, N, H, Sq, d), dK and dV (B, N, Hkv, Sk, d) in the dtype of `query`, and the product (B, N, Sk) in float64
        for float64 inputs, float32 otherwise.

    Example:
        >>> q = torch.ones(1, 1, 2, 4)
        >>> lse = torch.tensor([[[2.0, 2.0 + 0.6931472]]])
        >>> start, end = torch.tensor([[0, 0]]), torch.tensor([[1, 2]])
        >>> found = attention_backward_relevancy(q, q, q, q, q[:, None], lse, torch.ones(1, 1, 2), start, end, 0.5)
        >>> found[3]
        tensor([[[6., 2.]]])
    """
    result_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    dtype = compute_dtype or result_dtype
    key_heads = key.shape[1]
    group = query.shape[1] // key_heads
    queries, gradients = query.to(dtype), grad_output.to(dtype)
    keys = key.to(dtype).repeat_interleave(group, dim=1)  # (B, H, Sk, d)
    values = value.to(dtype).repeat_interleave(group, dim=1)

    position = torch.arange(key.shape[2], device=key.device)
    visible = (position >= key_start[..., None]) & (position < key_end[..., None])  # (B, Sq, Sk)

    scores = (queries @ keys.mT) * scale
    probability = torch.exp(scores.to(result_dtype) - logsumexp[..., None])
    probability = probability.masked_fill(~visible[:, None], 0).to(dtype)[:, None]  # (B, 1, H, Sq, Sk)
    grad_probability = gradients @ values[:, None].mT  # (B, N, H, Sq, Sk)
    delta = (gradients.to(result_dtype) * output.to(result_dtype)[:, None]).sum(-1, keepdim=True)
    grad_scores = (probability * (grad_probability - delta) * scale).to(dtype)
    grad_query = grad_scores @ keys[:, None]
    grad_key = grad_scores.mT @ queries[:, None]  # (B, N, H, Sk, d)
    grad_value = probability.mT @ gradients

    positive = (probability * grad_probability).clamp(min=0)
    weights = row.to(result_dtype)[..., None]  # (B, N, Sq, 1)
    shares = weights * positive.mean(dim=2, dtype=result_dtype)
    product = shares.masked_fill(weights == 0, 0).sum(dim=2)

    def of_key_heads(gradient: Tensor) -> Tensor:
        return gradient.unflatten(2, (key_heads, group)).sum(3, dtype=result_dtype).to(query.dtype)

    return grad_query.to(query.dtype), of_key_heads(grad_key), of_key_heads(grad_value), product
