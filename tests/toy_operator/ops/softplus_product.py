"""A toy operator that is no attention's and has a backward: the example of docs/extending.md, used by tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lvlm_fastxai.ops import _backends, _dispatch
from lvlm_fastxai.ops._arguments import check_axes, check_dtypes, check_sizes, refuse
from lvlm_fastxai.ops._dispatch import BackendName
from lvlm_fastxai.reference.softplus_product import softplus_product as dense

OPERATOR = "softplus_product"
SCHEMA = "(Tensor rows, Tensor weight, float beta) -> Tensor"


def softplus_product(rows: Tensor, weight: Tensor, *, beta: float = 1.0, backend: BackendName | None = None) -> Tensor:
    """Return log(1 + exp(beta · rows @ weight)) / beta.

    Args:
        rows: (M, I) float32 or float64.
        weight: (I,), dtype of `rows`.
        beta: positive.
        backend: "cpu" or "reference"; default the first that can serve the call.

    Returns:
        (M,), dtype of `rows`. Differentiable in `rows` and `weight`.

    Raises:
        ArgumentError: a shape, dtype, device or `beta` is wrong.
        BackendUnavailableError: the backend that was asked for cannot serve the call.
    """
    tensors = {"rows": (rows, "M I"), "weight": (weight, "I")}
    check_axes(OPERATOR, tensors)
    check_dtypes(OPERATOR, {"rows": rows, "weight": weight}, {})
    check_sizes(OPERATOR, tensors)
    if rows.dtype not in (torch.float32, torch.float64):
        refuse(OPERATOR, "rows", "be float32 or float64", rows.dtype)
    if not beta > 0:
        refuse(OPERATOR, "beta", "be positive", beta)
    run = _dispatch.select(OPERATOR, rows, backend)
    result: Tensor = run(rows, weight, float(beta))
    return result


def _fake(rows: Tensor, weight: Tensor, beta: float) -> Tensor:
    return rows.new_empty(rows.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weight, ctx.beta = inputs
    ctx.save_for_backward(rows, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    rows, weight = ctx.saved_tensors
    slope = grad * torch.sigmoid(ctx.beta * (rows @ weight))
    return slope[:, None] * weight, slope @ rows, None


_backends.register(
    OPERATOR,
    SCHEMA,
    dense,
    _fake,
    kind="rows",
    backends=("cpu", "reference"),
    setup_context=_setup_context,
    backward=_backward,
)
