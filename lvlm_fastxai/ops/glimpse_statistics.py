"""Sums over a layer's P and dP that GLIMPSE weights heads and layers by, without an S×S tensor."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lvlm_fastxai.choices import BackendName
from lvlm_fastxai.ops import _backends, _dispatch
from lvlm_fastxai.ops._arguments import as_int32, check_choice, check_integers
from lvlm_fastxai.ops._attention import KIND, AttentionArguments
from lvlm_fastxai.ops.key_ranges import real_columns
from lvlm_fastxai.reference.glimpse_statistics import glimpse_statistics as dense

OPERATOR = "glimpse_statistics"
SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor grad_output, Tensor logsumexp, Tensor key_start, Tensor key_end, "
    "Tensor sum_start, Tensor sum_end, float scale) -> (Tensor, Tensor, Tensor)"
)
Domain = Literal["full", "causal"]
DOMAINS: tuple[Domain, ...] = get_args(Domain)


def glimpse_statistics(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor,
    logsumexp: Tensor,
    *,
    domain: Domain = "full",
    columns: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    query_positions: Tensor | None = None,
    lengths: Tensor | None = None,
    key_ranges: Tensor | None = None,
    backend: BackendName | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the sums that GLIMPSE (arXiv 2506.18985) needs of a layer before it can weight its rows.

    With P_ij = exp(scale·q_i·k_j − logsumexp_i) over the keys that row i sees, and dP_ij = dO_i·v_j:

        row_sums[h, i]    = Σ_j max(0, P_ij[h] · dP_ij[h])          over the keys that row i sees
        gradient_sums[h]  = Σ_ij max(0, dP_ij[h])                   over the domain
        norm              = Σ_ij |Σ_h dP_ij[h]|                     over the domain, heads summed before the magnitude

    dP is not zero where a row sees no key, so the domain matters: "full" sums over all real keys of the sample, as
    published code does, "causal" over the keys that a row sees. Rows that see no key count in neither.

    Args:
        query: (B, H, Sq, d) after rotary embedding; float32, bfloat16, float16 or float64.
        key, value: (B, Hkv, Sk, d), un-repeated; head h uses key/value head h // (H / Hkv).
        grad_output: (B, N, H, Sq, d), gradient of each of N targets at the attention output P·V.
        logsumexp: (B, H, Sq) of the masked, scaled scores; float32 (float64 with float64 inputs). Ignored for rows
            that see no key.
        domain: "full" or "causal".
        columns: (B, 2) integers, half-open range of the sample's real keys, for "full"; default the smallest that
            contains every row's keys. Give it where the rows are only a part of the sequence. A row's own keys count
            even where they lie outside.
        scale: softmax scale; default d**-0.5.
        causal: a row at position i sees keys j ≤ i only.
        window: sliding window counting the row itself: i − window < j ≤ i, or |i − j| < window when not causal.
        query_positions: (B, Sq) increasing integers, where the rows stand among the keys; default the last Sq.
        lengths: (B,) number of real keys (padding on the right) or (B, 2) half-open range of the real keys.
        key_ranges: (B, Sq, 2) integers, half-open range of keys that each row sees; replaces causal, window,
            query_positions and lengths. See `lvlm_fastxai.ops.key_ranges`.
        backend: "cuda", "triton", "cpu" or "reference"; default the first that can serve the call.

    Returns:
        row_sums (B, N, H, Sq), gradient_sums (B, N, H) and norm (B, N), float32 (float64 with float64 inputs). None is
        differentiable: backward through one raises.

    Raises:
        ArgumentError: a shape, dtype, device or combination of arguments is wrong.
        BackendUnavailableError: the backend that was asked for cannot serve the call.
        NotDifferentiableError: on backward through a result.

    Example:
        >>> import torch, lvlm_fastxai as fx
        >>> q = torch.ones(1, 1, 2, 4)
        >>> lse = torch.tensor([[[2.0, 2.0 + 0.6931472]]])
        >>> found = fx.ops.glimpse_statistics(q, q, q, q[:, None], lse)
        >>> [part.flatten().tolist() for part in found]
        [[4.0, 4.0], [16.0], [16.0]]
    """
    arguments = AttentionArguments(OPERATOR, query, key, value, grad_output, logsumexp)
    arguments.check(shared_gradient=False)
    key_start, key_end = arguments.key_ranges(
        causal=causal, window=window, query_positions=query_positions, lengths=lengths, key_ranges=key_ranges
    )
    check_choice(OPERATOR, "domain", domain, Domain)
    # The backends would each have a view of their own of a range that begins behind the last key.
    keys = key.shape[2]
    key_start, key_end = key_start.clamp(0, keys), key_end.clamp(0, keys)
    sum_start, sum_end = key_start, key_end
    if domain == "full":
        if columns is None:
            columns = real_columns(torch.stack((key_start, key_end), dim=-1))
        else:
            check_integers(OPERATOR, "columns", columns, [(query.shape[0], 2)], "(B, 2)", query.device)
            columns = as_int32(OPERATOR, "columns", columns).clamp(0, keys)
        first, last = columns[:, :1], columns[:, 1:]
        seen = key_start < key_end
        sum_start = torch.where(seen, first.minimum(key_start), 0)
        sum_end = torch.where(seen, last.maximum(key_end), 0)
    run = _dispatch.select(OPERATOR, query, backend)
    return run(
        *(query, key, value, grad_output, logsumexp, key_start, key_end, sum_start, sum_end), arguments.scale(scale)
    )


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor,
    logsumexp: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    sum_start: Tensor,
    sum_end: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = grad_output.shape[:4]
    return logsumexp.new_empty(shape), logsumexp.new_empty(shape[:3]), logsumexp.new_empty(shape[:2])


_backends.register(OPERATOR, SCHEMA, dense, _fake, kind=KIND)
