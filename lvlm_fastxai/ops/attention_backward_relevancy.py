"""Flash attention's backward, which also gives the relevancy product: it has P and dP anyway."""

from __future__ import annotations

from torch import Tensor

from lvlm_fastxai.choices import BackendName
from lvlm_fastxai.ops import _backends, _dispatch
from lvlm_fastxai.ops._attention import KIND, AttentionArguments
from lvlm_fastxai.reference.attention_backward_relevancy import attention_backward_relevancy as dense

OPERATOR = "attention_backward_relevancy"
SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor output, Tensor grad_output, Tensor logsumexp, Tensor row, "
    "Tensor key_start, Tensor key_end, float scale) -> (Tensor, Tensor, Tensor, Tensor)"
)


def attention_backward_relevancy(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of attention, and row @ mean_h max(0, dP_h ∘ P_h), without ever storing an S×S tensor.

    This takes one pass over the score tiles instead of two. The backward of Dao, "FlashAttention-2" (2023), algorithm
    2, has P and dP anyway, and `relevancy_product` needs nothing else (Chefer, Gur and Wolf, ICCV 2021, eq. 5).

    Args:
        query: (B, H, Sq, d) after rotary embedding; float32, bfloat16, float16 or float64.
        key, value: (B, Hkv, Sk, d), un-repeated; head h uses key/value head h // (H / Hkv).
        output: (B, H, Sq, d), what the attention's forward gave.
        grad_output: (B, N, H, Sq, d), gradient of each of N targets at `output`.
        logsumexp: (B, H, Sq) of the masked, scaled scores; float32 (float64 with float64 inputs). Ignored for rows
            that see no key.
        row: (B, N, Sq) relevancy of the query rows, float32 (float64 with float64 inputs). Rows of weight zero add
            nothing to the product; they have gradients all the same.
        scale: softmax scale; default d**-0.5.
        causal: a row at position i sees keys j ≤ i only.
        window: sliding window counting the row itself: i − window < j ≤ i, or |i − j| < window when not causal.
        query_positions: (B, Sq) increasing integers, where the rows stand among the keys; default the last Sq.
        lengths: (B,) number of real keys (padding on the right) or (B, 2) half-open range of the real keys.
        key_ranges: (B, Sq, 2) integers, half-open range of keys that each row sees; replaces causal, window,
            query_positions and lengths. See `lvlm_fastxai.ops.key_ranges`.
        backend: "cuda", "triton", "cpu" or "reference"; default the first that can serve the call.

    Returns:
        grad_query (B, N, H, Sq, d), grad_key and grad_value (B, N, Hkv, Sk, d) in the dtype of `query`, and the product
        (B, N, Sk), float32 (float64 with float64 inputs). None is differentiable: backward through one raises.

    Raises:
        ArgumentError: a shape, dtype, device or combination of arguments is wrong.
        BackendUnavailableError: the backend that was asked for cannot serve the call.
        NotDifferentiableError: on backward through a result.

    Example:
        >>> import torch, lvlm_fastxai as fx
        >>> q = torch.ones(1, 1, 2, 4)
        >>> lse = torch.tensor([[[2.0, 2.0 + 0.6931472]]])
        >>> found = fx.ops.attention_backward_relevancy(q, q, q, q, q[:, None], lse, torch.ones(1, 1, 2))
        >>> found[2][0, 0, 0, :, 0], found[3]
        (tensor([1.5000, 0.5000]), tensor([[[6., 2.]]]))
    """
    arguments = AttentionArguments(OPERATOR, query, key, value, grad_output, logsumexp, row, output)
    arguments.check(shared_gradient=False)
    key_start, key_end = arguments.key_ranges(
        causal=causal, window=window, query_positions=query_positions, lengths=lengths, key_ranges=key_ranges
    )
    run = _dispatch.select(OPERATOR, query, backend)
    return run(query, key, value, output, grad_output, logsumexp, row, key_start, key_end, arguments.scale(scale))


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    grad_output: Tensor,
    logsumexp: Tensor,
    row: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, targets, _ = row.shape
    of_keys = batch, targets, *key.shape[1:]
    return (
        query.new_empty((batch, targets, *query.shape[1:])),
        query.new_empty(of_keys),
        query.new_empty(of_keys),
        row.new_empty((batch, targets, key.shape[2])),
    )


_backends.register(OPERATOR, SCHEMA, dense, _fake, kind=KIND)
