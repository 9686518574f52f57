"""Dense twin of `proxy_relevancy`: normalises the states, keeps every score, on any device, in any floating dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def proxy_relevancy(
    hidden: Tensor,  # (B, S, D)
    query: Tensor,  # (B, N, D)
    offset: Tensor,  # (B, N)
    lengths: Tensor,  # (B,)
    eps: float,
    centered: bool,
    softmax: bool,
    *,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the relevancy of image columns by a FastRM head (arXiv 2412.01487), and how sure the head is.

    Column j < lengths_b, with μ_j and σ_j² = mean((x_j − μ_j)²) + eps over the D states (RMSNorm: μ = 0):

        s_j       = ((x_j − μ_j) · query) / σ_j + offset
        m_j       = sigmoid(s_j), or softmax over the columns
        entropy   = −Σ_j p_j log p_j / log lengths_b             p = m / Σ m
        bernoulli = −mean_j (m_j log m_j + (1 − m_j) log(1 − m_j)) / log 2

    Entropies are taken from log m, so that a map whose values underflow has one too. The entropy of a single column is
    0, as are both of no columns. Columns from lengths_b on are 0 and count for nothing, even where they hold NaN.

    Args:
        compute_dtype: dtype of the products; default the state dtype, that of `query`.

    Returns:
        map (B, N, S), entropy (B, N), bernoulli (B, N), in the dtype of `query`.
    """
    dtype = compute_dtype or query.dtype
    lengths = lengths.clamp(0, hidden.shape[1])
    real = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]  # (B, S)
    states = hidden.to(dtype).masked_fill(~real[..., None], 0)
    if centered:
        states = states - states.mean(-1, keepdim=True)
    states = states * (states.square().mean(-1, keepdim=True) + eps).rsqrt()
    scores = query.to(dtype) @ states.mT + offset[..., None].to(dtype)  # (B, N, S)
    kept = real[:, None].expand_as(scores)
    if softmax:
        log_map = torch.log_softmax(scores.masked_fill(~kept, -torch.inf), -1).masked_fill(~kept, -torch.inf)
        log_rest = torch.log1p(-log_map.exp())
    else:
        log_map = functional.logsigmoid(scores).masked_fill(~kept, -torch.inf)
        log_rest = functional.logsigmoid(-scores)
    share = (log_map - log_map.logsumexp(-1, keepdim=True)).masked_fill(~kept, -torch.inf)
    count = lengths.to(dtype).clamp(min=1)[:, None]
    entropy = -_times(share.exp(), share).sum(-1) / count.clamp(min=2).log()
    relevancy = log_map.exp()
    uncertain = -(_times(relevancy, log_map) + _times(1 - relevancy, log_rest)).masked_fill(~kept, 0)
    bernoulli = uncertain.sum(-1) / (count * math.log(2))
    return relevancy.to(query.dtype), entropy.to(query.dtype), bernoulli.to(query.dtype)


def _times(probability: Tensor, logarithm: Tensor) -> Tensor:
    """Return p · log p, and 0 where p is 0. NaN stays NaN, so that a state that is NaN never looks certain."""
    return torch.where(probability == 0, 0, probability * logarithm)
