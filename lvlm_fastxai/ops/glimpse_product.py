"""Rows times a layer's GLIMPSE matrix E, on `relevancy_product`.

A head's weight is positive, so w_h·max(0, P∘dP) = max(0, (w_h·P)∘dP), and w_h·P is P with another logsumexp:
exp(s − logsumexp + log w_h). And Σ_i row_i·E_ij is a product with row_i over the sum of row i. So this operator
has no kernels of its own: it calls `relevancy_product`, and stores and rounds nothing more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lvlm_fastxai.choices import BackendName
from lvlm_fastxai.ops import _backends
from lvlm_fastxai.ops._arguments import check_axes, check_sizes, refuse
from lvlm_fastxai.ops.relevancy_product import OPERATOR as PART
from lvlm_fastxai.ops.relevancy_product import relevancy_product

OPERATOR = "glimpse_product"


def glimpse_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor,
    logsumexp: Tensor,
    row: Tensor,
    head_weights: Tensor,
    row_sums: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    query_positions: Tensor | None = None,
    lengths: Tensor | None = None,
    key_ranges: Tensor | None = None,
    backend: BackendName | None = None,
) -> Tensor:
    """Compute row @ E with E = rownorm(Σ_h w_h max(0, dP_h ∘ P_h)), without ever storing an S×S tensor.

    The layer relevance of GLIMPSE (arXiv 2506.18985); rows of the sum that are zero stay zero. The K rows of a target
    share the score tiles and the gradient's.

    Args:
        query: (B, H, Sq, d) after rotary embedding; float32, bfloat16, float16 or float64.
        key, value: (B, Hkv, Sk, d), un-repeated; head h uses key/value head h // (H / Hkv).
        grad_output: (B, N, H, Sq, d), gradient of each of N targets at the attention output P·V.
        logsumexp: (B, H, Sq) of the masked, scaled scores; float32 (float64 with float64 inputs).
        row: (B, N, K, Sq), K rows for each target, float32 (float64 with float64 inputs).
        head_weights: (B, N, H), positive; dtype of `row`.
        row_sums: (B, N, H, Sq) of max(0, dP_h ∘ P_h), from `glimpse_statistics`; dtype of `row`.
        scale, causal, window, query_positions, lengths, key_ranges, backend: as for `relevancy_product`.

    Returns:
        (B, N, K, Sk), float32 (float64 with float64 inputs). Not differentiable: backward through it raises.

    Raises:
        ArgumentError: a shape, dtype, device or combination of arguments is wrong.
        BackendUnavailableError: the backend that was asked for cannot serve the call.
        NotDifferentiableError: on backward through the result.

    Example:
        >>> import torch, lvlm_fastxai as fx
        >>> q = torch.ones(1, 1, 2, 4)
        >>> lse = torch.tensor([[[2.0, 2.0 + 0.6931472]]])
        >>> sums = torch.full((1, 1, 1, 2), 4.0)
        >>> fx.ops.glimpse_product(q, q, q, q[:, None], lse, torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1), sums)
        tensor([[[[1.5000, 0.5000]]]])
    """
    tensors = {
        "query": (query, "B H Sq d"),
        "row": (row, "B N K Sq"),
        "grad_output": (grad_output, "B N H Sq d"),
        "head_weights": (head_weights, "B N H"),
        "row_sums": (row_sums, "B N H Sq"),
    }
    check_axes(OPERATOR, tensors)
    check_sizes(OPERATOR, tensors)
    for name, tensor in (("head_weights", head_weights), ("row_sums", row_sums)):
        if tensor.dtype != row.dtype:
            refuse(OPERATOR, name, f"have dtype {row.dtype} like `row`", tensor.dtype)
    heads, targets = query.shape[1], row.shape[1]
    totals = (head_weights[..., None] * row_sums).sum(2)[:, :, None]  # (B, N, 1, Sq)
    # A total below the smallest normal number is one of values that are zero but for rounding.
    normalised = torch.where(totals >= torch.finfo(row.dtype).tiny, row / totals, 0)
    # `relevancy_product` takes the mean over heads.
    shifted = logsumexp[:, None] - (heads * head_weights).log()[..., None]  # (B, N, H, Sq)
    return torch.stack(
        [
            relevancy_product(
                *(query, key, value, grad_output[:, n, None], shifted[:, n], normalised[:, n]),
                scale=scale,
                causal=causal,
                window=window,
                query_positions=query_positions,
                lengths=lengths,
                key_ranges=key_ranges,
                backend=backend,
            )
            for n in range(targets)
        ],
        dim=1,
    )


_backends.compose(OPERATOR, of=PART)
