"""glimpse_product against its dense twin, on every backend of the operator whose kernels it shares."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.cases import DTYPES, Case, device_of, make_case
from torch import Tensor

import lvlm_fastxai as fx
from lvlm_fastxai.errors import ArgumentError, NotDifferentiableError
from lvlm_fastxai.reference import glimpse_product as dense
from lvlm_fastxai.reference import glimpse_statistics

Weights = tuple[Tensor, Tensor, Tensor]  # row (B,N,K,Sq), head_weights (B,N,H), row_sums (B,N,H,Sq)


def weights_of(case: Case, count: int = 3) -> Weights:
    """Rows, weights and the sums that belong to them, fp64."""
    tensors = [tensor.double() for tensor in (*case.tensors[:4], case.logsumexp)]
    ranges = case.ranges.unbind(-1)
    sums, *_ = glimpse_statistics(*tensors, *ranges, *ranges, case.query.shape[-1] ** -0.5)
    generator = torch.Generator().manual_seed(1)
    rows = torch.rand(*sums.shape[:2], count, sums.shape[-1], generator=generator, dtype=torch.float64)
    return rows, torch.rand(sums.shape[:3], generator=generator, dtype=torch.float64) + 0.1, sums


def run(case: Case, weights: Weights, backend: str = "cpu", **options: Any) -> Tensor:
    device = device_of(backend)
    state = torch.float64 if case.query.dtype == torch.float64 else torch.float32
    tensors = [t.to(device) for t in (*case.tensors[:4], case.logsumexp)]
    extra = [t.to(device, state) for t in weights]
    return fx.ops.glimpse_product(*tensors, *extra, key_ranges=case.ranges.to(device), backend=backend, **options).cpu()


def truth_of(case: Case, weights: Weights) -> Tensor:
    tensors = [tensor.double() for tensor in (*case.tensors[:4], case.logsumexp)]
    row, head_weights, _ = weights
    return dense(*tensors, row, head_weights, *case.ranges.unbind(-1), case.query.shape[-1] ** -0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("targets", [1, 2])
def test_equals_the_dense_twin(backend: str, dtype: torch.dtype, targets: int) -> None:
    case = make_case(batch=2, targets=targets, dtype=dtype, lengths=torch.tensor([[0, 63], [5, 60]]))
    weights = weights_of(case)
    found, truth = run(case, weights, backend), truth_of(case, weights)
    error = (found - truth).abs().sum((-1, -2)) / truth.abs().sum((-1, -2))
    assert found.dtype == torch.float32
    assert error.max() <= 1e-5


def test_equals_the_twin_in_fp64() -> None:
    case = make_case(dtype=torch.float64, targets=2)
    case = replace(case, row=case.row.double(), logsumexp=case.logsumexp.double())
    weights = weights_of(case)
    torch.testing.assert_close(run(case, weights, "reference"), truth_of(case, weights), rtol=1e-12, atol=1e-14)


def test_rows_of_e_sum_to_one_or_are_zero() -> None:
    case = make_case(queries=20, dtype=torch.float64)
    case = replace(case, row=case.row.double(), logsumexp=case.logsumexp.double())
    case.grad_output[..., 7, :] = 0
    row, heads, sums = weights_of(case, count=20)
    row = torch.eye(20, dtype=torch.float64).expand_as(row)
    matrix = run(case, (row, heads, sums), "reference")[0, 0]
    expected = torch.ones(20, dtype=torch.float64)
    expected[7] = 0
    torch.testing.assert_close(matrix.sum(-1), expected)


def test_a_head_s_weight_counts() -> None:
    case = make_case(dtype=torch.float64)
    case = replace(case, row=case.row.double(), logsumexp=case.logsumexp.double())
    row, heads, sums = weights_of(case)
    lone = heads.clone()
    lone[..., 1:] *= 1e-9
    of_all, of_one = run(case, (row, heads, sums), "reference"), run(case, (row, lone, sums), "reference")
    assert (of_all - of_one).abs().max() > 1e-3
    torch.testing.assert_close(of_one, truth_of(case, (row, lone, sums)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row": torch.zeros(1, 1, 63)}, "`row`"),
        ({"head_weights": torch.zeros(1, 1, 3)}, "head_weights"),
        ({"head_weights": torch.zeros(1, 1, 4, dtype=torch.float64)}, "head_weights"),
        ({"row_sums": torch.zeros(1, 1, 4, 62)}, "row_sums"),
        ({"grad_output": torch.zeros(1, 2, 4, 63, 64)}, "grad_output"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Tensor], message: str) -> None:
    case = make_case()
    names = ("query", "key", "value", "grad_output", "logsumexp", "row", "head_weights", "row_sums")
    extra = [tensor.float() for tensor in weights_of(case)]
    arguments = dict(zip(names, (*case.tensors[:4], case.logsumexp, *extra), strict=True)) | change
    with pytest.raises(ArgumentError, match=message):
        fx.ops.glimpse_product(*arguments.values(), backend="reference")


def test_backward_is_refused() -> None:
    case = make_case()
    query = case.query.clone().requires_grad_()
    extra = [tensor.float() for tensor in weights_of(case)]
    found = fx.ops.glimpse_product(query, *case.tensors[1:4], case.logsumexp, *extra, backend="reference")
    with pytest.raises(NotDifferentiableError):
        found.sum().backward()


def test_compiles_to_one_graph() -> None:
    case = make_case()
    extra = [tensor.float() for tensor in weights_of(case)]
    arguments = (*case.tensors[:4], case.logsumexp, *extra)
    torch._dynamo.reset()
    compiled = torch.compile(fx.ops.glimpse_product, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), fx.ops.glimpse_product(*arguments))
