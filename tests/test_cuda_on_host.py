"""The CUDA kernels of relevancy_product, run on the host: the same source, one fiber per CUDA thread.

What can be proven without a GPU: every fragment of every tensor-core instruction, every mask and every ragged edge.
What cannot: races beyond a missing wait, and speed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DTYPES, LAYOUTS, Case, as_view, make_case, relative_error
from test_build import compiler, run
from torch import Tensor

NATIVE_SOURCES = Path(__file__).with_name("native")
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
Kernels = Callable[..., Tensor]


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    folder = tmp_path_factory.mktemp("cuda_on_host")
    library = folder / "cuda_on_host.so"
    flags = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-shared")
    run([compiler("g++", "clang++"), *flags, NATIVE_SOURCES / "cuda_on_host.cpp", "-o", library])
    function = ctypes.CDLL(str(library)).relevancy_product

    def call(case: Case, *, tensor_cores: bool = True, multiprocessors: int = 0, backwards: bool = False) -> Tensor:
        """The result; as many blocks share a head's rows as on a device with so many multiprocessors."""
        start, end = (t.to(torch.int32).contiguous() for t in case.ranges.unbind(-1))
        logsumexp, row = case.logsumexp.contiguous(), case.row.contiguous()
        batch, heads, queries, width = case.query.shape
        result = torch.full((batch, row.shape[1], case.key.shape[2]), torch.nan)
        sizes = (batch, row.shape[1], case.grad_output.shape[1], heads, case.key.shape[1], queries)
        sizes = (*sizes, case.key.shape[2], width)
        four = (case.query, case.key, case.value, case.grad_output)
        strides = [stride for tensor in four for stride in tensor.stride()[:-1]]
        function(
            ELEMENTS[case.query.dtype],
            *(ctypes.c_void_p(t.data_ptr()) for t in (*four, logsumexp, row, start, end)),
            (ctypes.c_int64 * len(sizes))(*sizes),
            (ctypes.c_int64 * len(strides))(*strides),
            ctypes.c_float(width**-0.5),
            multiprocessors,
            int(tensor_cores),
            int(backwards),
            ctypes.c_void_p(result.data_ptr()),
        )
        return result

    return call


def assert_accurate(kernels: Kernels, case: Case, **options: Any) -> None:
    """Relative L1 within 1e-6 of the twin in fp64 on the same inputs, also for 16-bit ones.

    Products of 16-bit elements are exact in float32 and everything after them is float32, so the rounding of the
    inputs, which the twin shares, is all that 16 bit costs. 1e-6 is what the CPU kernel is held to in float32.
    """
    result, truth = kernels(case, **options), case.dense()
    assert truth.abs().sum() > 0
    assert relative_error(result, truth) <= 1e-6


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(layout: dict[str, Any], dtype: torch.dtype, kernels: Kernels) -> None:
    assert_accurate(kernels, make_case(batch=2, targets=2, queries=130, dtype=dtype, **layout))


@pytest.mark.parametrize("length", [1, 31, 63, 257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_lengths(length: int, dtype: torch.dtype, kernels: Kernels) -> None:
    assert_accurate(kernels, make_case(heads=2, key_heads=1, queries=length, dtype=dtype))


@pytest.mark.parametrize("width", [1, 17, 64, 72, 80, 96, 128, 200, 256, 264])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_widths(width: int, dtype: torch.dtype, kernels: Kernels) -> None:
    """Every width that has a kernel of its own, others between them, rows that 16-byte copies fit and rows that not."""
    assert_accurate(kernels, make_case(heads=2, key_heads=1, queries=100, width=width, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_without_tensor_cores(dtype: torch.dtype, kernels: Kernels) -> None:
    """What sm_75 runs."""
    case = make_case(batch=2, targets=5, queries=130, width=72, dtype=dtype, window=50)
    assert_accurate(kernels, case, tensor_cores=False)


@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (8, 2), (9, 3), (6, 1)])
def test_grouped_heads(heads: int, key_heads: int, kernels: Kernels) -> None:
    assert_accurate(kernels, make_case(batch=2, heads=heads, key_heads=key_heads, queries=70, dtype=torch.bfloat16))


@pytest.mark.parametrize(("queries", "keys"), [(1, 300), (40, 300), (300, 40)])
@pytest.mark.parametrize("causal", [False, True])
def test_queries_and_keys_of_different_length(queries: int, keys: int, causal: bool, kernels: Kernels) -> None:
    assert_accurate(kernels, make_case(queries=queries, keys=keys, causal=causal, dtype=torch.float16))


@pytest.mark.parametrize("targets", [2, 5, 18])
@pytest.mark.parametrize("shared_gradient", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_targets(targets: int, shared_gradient: bool, dtype: torch.dtype, kernels: Kernels) -> None:
    """Together and alone they have the same bits, also across what one block takes on (4 and 16 targets)."""
    case = make_case(heads=2, targets=targets, gradients=1 if shared_gradient else None, queries=60, dtype=dtype)
    case.row[:, 0, 40:] = 0
    assert_accurate(kernels, case)
    alone = [
        kernels(
            replace(
                case,
                row=case.row[:, n : n + 1],
                grad_output=case.grad_output if shared_gradient else case.grad_output[:, n : n + 1],
            )
        )
        for n in range(targets)
    ]
    assert torch.equal(kernels(case), torch.cat(alone, dim=1))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_rows_shared_among_blocks(dtype: torch.dtype, kernels: Kernels) -> None:
    case = make_case(heads=2, queries=513, keys=140, causal=False, dtype=dtype)
    case.row[:, :, 64:160] = 0
    assert_accurate(kernels, case, multiprocessors=5)
    assert not torch.equal(kernels(case, multiprocessors=5), kernels(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_order_of_threads_does_not_matter(dtype: torch.dtype, kernels: Kernels) -> None:
    case = make_case(batch=2, targets=3, queries=97, keys=131, width=37, dtype=dtype, window=50)
    assert torch.equal(kernels(case), kernels(case, backwards=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs(dtype: torch.dtype, kernels: Kernels) -> None:
    """Views as transformers passes them, (B, S, H, d) transposed, and rows that do not begin at 16 bytes."""
    case = make_case(batch=2, targets=2, queries=75, width=40, dtype=dtype)
    expected = kernels(case)

    def off_by_one(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (1, 0))[..., 1:]

    for change in (as_view, off_by_one):
        assert torch.equal(kernels(case.laid_out(change)), expected)
    expanded = replace(case, grad_output=case.grad_output[:, :1].expand(-1, 2, -1, -1, -1))
    assert torch.equal(kernels(expanded), kernels(replace(case, grad_output=case.grad_output[:, :1])))


def test_float16_subnormals_and_extremes(kernels: Kernels) -> None:
    case = make_case(queries=32, dtype=torch.float16)
    case.grad_output.view(torch.int16)[..., ::2] &= 0x83FF  # subnormal
    case.value.view(torch.int16)[..., 1::2] &= -0x7C01  # subnormal, other columns
    for tensor_cores in (True, False):
        assert_accurate(kernels, case, tensor_cores=tensor_cores)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_rows_of_weight_zero_and_rows_that_see_nothing_are_ignored(dtype: torch.dtype, kernels: Kernels) -> None:
    def case() -> Case:
        made = make_case(targets=2, queries=100, lengths=torch.tensor([80]), dtype=dtype)
        made.row[:, :, 20:40] = 0
        made.ranges[:, 50:60] = 7  # start = end
        return made

    spoiled = case()
    spoiled.query[:, :, 20:40] = torch.nan
    spoiled.grad_output[:, :, :, 20:40] = torch.nan
    spoiled.logsumexp[:, :, 50:60] = torch.nan
    spoiled.key[:, :, 80:] = torch.nan
    spoiled.value[:, :, 80:] = torch.nan
    assert torch.equal(kernels(spoiled), kernels(case()))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_row_counts_for_its_own_target_only(dtype: torch.dtype, kernels: Kernels) -> None:
    case = make_case(targets=2, queries=60, dtype=dtype)
    case.row[0, 0, 30] = 0
    case.query[0, :, 30] = torch.nan
    result = kernels(case)
    assert not result[0, 0].isnan().any()
    assert result[0, 1, :31].isnan().all() and not result[0, 1, 31:].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", ["query", "key", "value", "grad_output", "logsumexp", "row"])
def test_nan_propagates(dtype: torch.dtype, name: str, kernels: Kernels) -> None:
    case = make_case(heads=2, key_heads=2, queries=50, dtype=dtype)
    tensor = getattr(case, name)
    tensor[(0,) * (tensor.dim() - (1 if name in ("logsumexp", "row") else 2)) + (20,)] = torch.nan
    expected = torch.zeros(50, dtype=torch.bool)
    expected[slice(20, 21) if name in ("key", "value") else slice(0, 21)] = True
    assert torch.equal(kernels(case)[0, 0].isnan(), expected)


def test_nothing_to_add(kernels: Kernels) -> None:
    case = make_case(batch=2, targets=2, queries=70, dtype=torch.bfloat16)
    assert torch.equal(kernels(replace(case, row=torch.zeros_like(case.row))), torch.zeros(2, 2, 70))
    assert torch.equal(kernels(replace(case, ranges=torch.zeros_like(case.ranges))), torch.zeros(2, 2, 70))
    assert torch.equal(kernels(make_case(queries=0, keys=9)), torch.zeros(1, 1, 9))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_ranges_that_leave_the_keys_are_clamped(dtype: torch.dtype, kernels: Kernels) -> None:
    case = make_case(queries=40, causal=False, dtype=dtype)
    wild = torch.tensor([-5, 2**31 - 1], dtype=torch.int32).expand(1, 40, 2)
    assert torch.equal(kernels(replace(case, ranges=wild)), kernels(case))
