"""Relevancy of image columns by a FastRM head, in one pass over their hidden states."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from lvlm_fastxai.choices import Activation, BackendName, Norm
from lvlm_fastxai.ops import _backends, _dispatch
from lvlm_fastxai.ops._arguments import check_axes, check_choice, check_dtypes, check_integers, check_sizes, refuse
from lvlm_fastxai.reference.proxy_relevancy import proxy_relevancy as dense

OPERATOR = "proxy_relevancy"
SCHEMA = (
    "(Tensor hidden, Tensor query, Tensor offset, Tensor lengths, float eps, bool centered, bool softmax) "
    "-> (Tensor, Tensor, Tensor)"
)
NORMS: tuple[Norm, ...] = get_args(Norm)
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


def proxy_relevancy(
    hidden: Tensor,
    query: Tensor,
    offset: Tensor,
    *,
    norm: Norm = "rms",
    activation: Activation = "sigmoid",
    eps: float = 1e-6,
    lengths: Tensor | None = None,
    backend: BackendName | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply a FastRM head (arXiv 2412.01487) to all columns of an image; its key projection is folded into the query.

    With the norm's weight g and bias c, and the projected query u = W_kᵀ q / √d_p, the single-head score of a state is
    a dot product with ``query`` = g ∘ u, plus ``offset`` = c · u + b:

        s_j       = ((x_j − μ_j) · query) / σ_j + offset         σ_j² = mean((x_j − μ_j)²) + eps; RMSNorm: μ = 0
        m_j       = sigmoid(s_j), or softmax over the columns
        entropy   = −Σ_j p_j log p_j / log S                     p = m / Σ m: 0 on one column, 1 on all alike
        bernoulli = −mean_j (m_j log m_j + (1 − m_j) log(1 − m_j)) / log 2

    The states are read once. Everything else is S numbers for each row, and nothing but the results is stored.

    Args:
        hidden: (B, S, D) hidden states of the image's columns; float32, bfloat16, float16 or float64.
        query: (B, N, D) float32 (float64 with float64 states), one folded query per explained token.
        offset: (B, N), dtype of ``query``.
        norm: "rms" or "layer".
        activation: "sigmoid" or "softmax".
        eps: of the norm.
        lengths: (B,) integers, number of columns of each sample, padding behind them; default all S. Padding is 0 in
            the map and counts for nothing, even where it holds NaN.
        backend: "cuda", "triton", "cpu" or "reference"; default the first that can serve the call.

    Returns:
        map (B, N, S), entropy (B, N) and bernoulli (B, N), in the dtype of ``query``, each in 0 … 1. Entropies of a
        sample without columns are 0. None is differentiable: backward through one raises; training uses the twin.

    Raises:
        ArgumentError: a shape, dtype, device or option is wrong.
        BackendUnavailableError: the backend that was asked for cannot serve the call.
        NotDifferentiableError: on backward through a result.

    Example:
        >>> import torch, lvlm_fastxai as fx
        >>> hidden = torch.tensor([[[3.0, -3.0], [2.0, 2.0]]])
        >>> found = fx.ops.proxy_relevancy(hidden, torch.tensor([[[1.0, -1.0]]]), torch.zeros(1, 1))
        >>> [[round(x, 3) for x in part.flatten().tolist()] for part in found]
        [[0.881, 0.5], [0.944], [0.764]]
    """
    tensors = {"hidden": (hidden, "B S D"), "query": (query, "B N D"), "offset": (offset, "B N")}
    check_axes(OPERATOR, tensors)
    check_dtypes(OPERATOR, {"hidden": hidden}, {"query": query, "offset": offset})
    check_sizes(OPERATOR, tensors)
    batch, columns, width = hidden.shape
    if width == 0:
        refuse(OPERATOR, "hidden", "have a width of at least 1", tuple(hidden.shape))
    check_choice(OPERATOR, "norm", norm, Norm)
    check_choice(OPERATOR, "activation", activation, Activation)
    if lengths is None:
        lengths = torch.full((batch,), columns, dtype=torch.int32, device=hidden.device)
    else:
        check_integers(OPERATOR, "lengths", lengths, [(batch,)], "(B,)", hidden.device)
        if lengths.dtype == torch.int64:
            lengths = lengths.clamp(0, columns).to(torch.int32)  # what is int32 already is cut by the backends
    run = _dispatch.select(OPERATOR, hidden, backend)
    return run(hidden, query, offset, lengths, float(eps), norm == "layer", activation == "softmax")


def _fake(
    hidden: Tensor, query: Tensor, offset: Tensor, lengths: Tensor, eps: float, centered: bool, softmax: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows = query.shape[:2]
    return query.new_empty((*rows, hidden.shape[1])), query.new_empty(rows), query.new_empty(rows)


_backends.register(OPERATOR, SCHEMA, dense, _fake, kind="states")
