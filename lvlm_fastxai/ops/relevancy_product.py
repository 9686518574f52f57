"""The product of a relevancy row with the head-averaged, rectified attention-gradient of one layer."""

from __future__ import annotations

from torch import Tensor

from lvlm_fastxai.choices import BackendName
from lvlm_fastxai.ops import _backends, _dispatch
from lvlm_fastxai.ops._attention import KIND, AttentionArguments
from lvlm_fastxai.reference.relevancy_product import relevancy_product as dense

OPERATOR = "relevancy_product"
SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor grad_output, Tensor logsumexp, Tensor row, "
    "Tensor key_start, Tensor key_end, float scale) -> Tensor"
)


def relevancy_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor,
    logsumexp: Tensor,
    row: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    query_positions: Tensor | None = None,
    lengths: Tensor | None = None,
    key_ranges: Tensor | None = None,
    backend: BackendName | None = None,
) -> Tensor:
    """Compute row @ mean_h max(0, dP_h ∘ P_h) without ever storing an S×S tensor.

    One layer of the self-attention rule of Chefer, Gur and Wolf, "Generic Attention-model Explainability"
    (ICCV 2021), eq. 5, for a single row of R, with P_ij = exp(scale·q_i·k_j − logsumexp_i) and dP_ij = dO_i·v_j.
    The caller adds the result to `row`. Hidden keys and rows of weight zero contribute nothing.

    Args:
        query: (B, H, Sq, d) after rotary embedding; float32, bfloat16, float16 or float64.
        key, value: (B, Hkv, Sk, d), un-repeated; head h uses key/value head h // (H / Hkv).
        grad_output: (B, N, H, Sq, d), gradient of each of N targets at the attention output P·V, or (B, 1, H, Sq, d)
            to apply one gradient to all N rows.
        logsumexp: (B, H, Sq) of the masked, scaled scores; float32 (float64 with float64 inputs). Ignored for rows
            that see no key.
        row: (B, N, Sq) relevancy of the query rows, float32 (float64 with float64 inputs).
        scale: softmax scale; default d**-0.5.
        causal: a row at position i sees keys j ≤ i only.
        window: sliding window counting the row itself: i − window < j ≤ i, or |i − j| < window when not causal.
        query_positions: (B, Sq) increasing integers, where the rows stand among the keys; default the last Sq.
        lengths: (B,) number of real keys (padding on the right) or (B, 2) half-open range of the real keys.
        key_ranges: (B, Sq, 2) integers, half-open range of keys that each row sees; replaces causal, window,
            query_positions and lengths. See `lvlm_fastxai.ops.key_ranges`.
        backend: "cuda", "triton", "cpu" or "reference"; default the first that can serve the call.

    Returns:
        (B, N, Sk), float32 (float64 with float64 inputs). Not differentiable: backward through it raises.

    Raises:
        ArgumentError: a shape, dtype, device or combination of arguments is wrong.
        BackendUnavailableError: the backend that was asked for cannot serve the call.
        NotDifferentiableError: on backward through the result.

    Example:
        >>> import torch, lvlm_fastxai as fx
        >>> q = torch.ones(1, 1, 2, 4)
        >>> lse = torch.tensor([[[2.0, 2.0 + 0.6931472]]])
        >>> fx.ops.relevancy_product(q, q, q, torch.ones(1, 1, 1, 2, 4), lse, torch.ones(1, 1, 2))
        tensor([[[6., 2.]]])
    """
    arguments = AttentionArguments(OPERATOR, query, key, value, grad_output, logsumexp, row)
    arguments.check(shared_gradient=True)
    key_start, key_end = arguments.key_ranges(
        causal=causal, window=window, query_positions=query_positions, lengths=lengths, key_ranges=key_ranges
    )
    run = _dispatch.select(OPERATOR, query, backend)
    return run(query, key, value, grad_output, logsumexp, row, key_start, key_end, arguments.scale(scale))


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor,
    logsumexp: Tensor,
    row: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    scale: float,
) -> Tensor:
    return row.new_empty((row.shape[0], row.shape[1], key.shape[2]))


_backends.register(OPERATOR, SCHEMA, dense, _fake, kind=KIND)
