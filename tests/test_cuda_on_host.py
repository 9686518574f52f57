"""The CUDA kernels run on the host: the same source, one fiber per CUDA thread.

What can be proven without a GPU: every fragment of every tensor-core instruction, every mask and every ragged edge.
What cannot: races beyond a missing wait, and speed.
"""

from __future__ import annotations

import ctypes
import mmap
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cases import DTYPES, LAYOUTS, Case, as_view, logsumexp, make_case, relative_error
from support.commands import compiler, run
from torch import Tensor

from lvlm_fastxai import ops
from lvlm_fastxai.ops.key_ranges import real_columns
from lvlm_fastxai.reference import attention_backward_relevancy as dense_backward
from lvlm_fastxai.reference import glimpse_statistics as dense_statistics
from lvlm_fastxai.reference import proxy_relevancy as dense_proxy

NATIVE_SOURCES = Path(__file__).with_name("native")
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def integers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def output_of(case: Case) -> Tensor:
    """Laid out like the query. What the forward would give lets the gradients of rows that see one key vanish."""
    noise = torch.randn(case.query.shape, generator=torch.Generator().manual_seed(1))
    return torch.empty_like(case.query).copy_(noise)


@dataclass
class Kernels:
    """The launch of one operator; domain: of glimpse_statistics."""

    library: ctypes.CDLL
    operator: str
    domain: str = "full"

    def __call__(
        self,
        case: Case,
        *,
        tensor_cores: bool = True,
        multiprocessors: int = 0,
        backwards: bool = False,
        atomics: bool = False,
    ) -> tuple[Tensor, ...]:
        """The results, a product last; as many blocks share rows, or keys, as with so many multiprocessors."""
        start, end = (t.to(torch.int32).contiguous() for t in case.ranges.unbind(-1))
        batch, heads, queries, width = case.query.shape
        key_heads, keys = case.key.shape[1:3]
        targets, gradients = case.row.shape[1], case.grad_output.shape[1]
        laid_out = [case.query, case.key, case.value, case.grad_output]
        tensors = [*laid_out, case.logsumexp.contiguous(), case.row.contiguous(), start, end]
        shapes = []
        if self.operator == "attention_backward_relevancy":
            shapes = [(batch, targets, heads, queries, width)] + [(batch, targets, key_heads, keys, width)] * 2
            laid_out.append(output_of(case))
            tensors.append(laid_out[-1])
        results = [torch.full(shape, torch.nan, dtype=case.query.dtype) for shape in shapes]
        sums = [(batch, targets, keys)]
        if self.operator == "glimpse_statistics":
            sums = [(batch, targets, heads, queries), (batch, targets, heads), (batch, targets)]
            tensors += [t.to(torch.int32).contiguous() for t in self.sum_ranges(case).unbind(-1)]
        results += [torch.full(shape, torch.nan) for shape in sums]
        getattr(self.library, self.operator)(
            ELEMENTS[case.query.dtype],
            pointers(tensors),
            integers((batch, targets, heads, key_heads, queries, keys, width, gradients)),
            integers([stride for tensor in laid_out for stride in tensor.stride()[:-1]]),
            ctypes.c_float(width**-0.5),
            (ctypes.c_int32 * 4)(multiprocessors, tensor_cores, backwards, atomics),
            pointers(results),
        )
        return tuple(results)

    def sum_ranges(self, case: Case) -> Tensor:
        """(B, Sq, 2), as the operator's Python side makes them of the rows' key ranges."""
        if self.domain == "causal":
            return case.ranges
        seen = case.ranges[..., :1] < case.ranges[..., 1:]
        return torch.where(seen, real_columns(case.ranges)[:, None], 0)

    def dense(self, case: Case, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Tensor, ...]:
        """The twin on these inputs, converted to a dtype."""
        if self.operator == "relevancy_product":
            return (case.dense(dtype, **options),)
        if self.operator == "glimpse_statistics":
            matrices = [t.to(dtype) for t in (case.query, case.key, case.value, case.grad_output)]
            state = case.logsumexp.to(torch.float64 if dtype == torch.float64 else torch.float32)
            bounds = *case.ranges.unbind(-1), *self.sum_ranges(case).unbind(-1)
            return dense_statistics(*matrices, state, *bounds, case.query.shape[-1] ** -0.5, **options)
        attention = [t.to(dtype) for t in (case.query, case.key, case.value, output_of(case), case.grad_output)]
        state = [t.to(torch.float64 if dtype == torch.float64 else torch.float32) for t in (case.logsumexp, case.row)]
        return dense_backward(*attention, *state, *case.ranges.unbind(-1), case.query.shape[-1] ** -0.5, **options)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("cuda_on_host") / "cuda_on_host.so"
    flags = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-shared")
    with_cuda = [name for name in ops.operators() if "cuda" in ops.catalogue()[name].backends]
    included = [word for name in with_cuda for word in ("-include", NATIVE_SOURCES / f"{name}.h")]
    run([compiler("g++", "clang++"), *flags, *included, NATIVE_SOURCES / "on_host.cpp", "-o", path])
    return ctypes.CDLL(str(path))


@pytest.fixture
def product(library: ctypes.CDLL) -> Kernels:
    return Kernels(library, "relevancy_product")


@pytest.fixture
def backward(library: ctypes.CDLL) -> Kernels:
    return Kernels(library, "attention_backward_relevancy")


@pytest.fixture
def statistics(library: ctypes.CDLL) -> Kernels:
    return Kernels(library, "glimpse_statistics")


@pytest.fixture(params=["relevancy_product", "attention_backward_relevancy", "glimpse_statistics"])
def kernels(library: ctypes.CDLL, request: pytest.FixtureRequest) -> Kernels:
    return Kernels(library, request.param)


def assert_accurate(kernels: Kernels, case: Case, **options: Any) -> None:
    """Relative L1 within 1e-6 of the twin in fp64 on the same inputs; 16-bit gradients within what eager errs by.

    Products of 16-bit elements are exact in float32 and everything after them is float32, so the rounding of the
    inputs, which the twin shares, is all that 16 bit costs results in float32. 1e-6 is what the CPU kernel is held to
    in float32. A gradient's matrices P and dS are rounded once, and so is the gradient; eager rounds every matrix.
    """
    results, truths = kernels(case, **options), kernels.dense(case)
    eager: tuple[Tensor, ...] = truths
    if any(result.dtype != torch.float32 for result in results):
        eager = kernels.dense(case, case.query.dtype, compute_dtype=case.query.dtype)
    for result, truth, rounded in zip(results, truths, eager, strict=True):
        assert truth.any()
        allowed = 1e-6 if result.dtype == torch.float32 else relative_error(rounded, truth)
        assert relative_error(result, truth) <= allowed


def assert_equal(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """The same bits."""
    for result, other in zip(results, expected, strict=True):
        assert torch.equal(result, other)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(layout: dict[str, Any], dtype: torch.dtype, kernels: Kernels) -> None:
    assert_accurate(kernels, make_case(batch=2, heads=2, key_heads=1, targets=2, queries=130, dtype=dtype, **layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_in_any_order_that_see_any_range(dtype: torch.dtype, kernels: Kernels) -> None:
    """A pruned sweep's rows; some see nothing, and whole tiles of rows see the first or the last keys only."""
    generator = torch.Generator().manual_seed(2)
    ranges = torch.randint(0, 301, (2, 100, 2), generator=generator)
    ranges[0, :64] = ranges[0, :64] % 20
    ranges[1, 32:] = 300 - ranges[1, 32:] % 20
    assert (ranges[..., 0] >= ranges[..., 1]).any(dim=-1).all()
    assert_accurate(
        kernels, make_case(batch=2, heads=2, key_heads=1, queries=100, keys=300, dtype=dtype, ranges=ranges)
    )


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
    case = make_case(batch=2, heads=2, key_heads=1, targets=5, queries=130, width=72, dtype=dtype, window=50)
    assert_accurate(kernels, case, tensor_cores=False)


@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (8, 2), (9, 3), (6, 1)])
def test_grouped_heads(heads: int, key_heads: int, kernels: Kernels) -> None:
    assert_accurate(kernels, make_case(batch=2, heads=heads, key_heads=key_heads, queries=70, dtype=torch.bfloat16))


@pytest.mark.parametrize(("queries", "keys"), [(1, 300), (40, 300), (300, 40)])
@pytest.mark.parametrize("causal", [False, True])
def test_queries_and_keys_of_different_length(queries: int, keys: int, causal: bool, kernels: Kernels) -> None:
    assert_accurate(kernels, make_case(queries=queries, keys=keys, causal=causal, dtype=torch.float16))


def assert_same_bits_alone(kernels: Kernels, case: Case) -> None:
    """Targets have the bits together that they have each alone."""
    targets, shared_gradient = case.row.shape[1], case.grad_output.shape[1] == 1
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
    assert_equal(kernels(case), tuple(torch.cat(parts, dim=1) for parts in zip(*alone, strict=True)))


@pytest.mark.parametrize("targets", [2, 5, 18])
@pytest.mark.parametrize("shared_gradient", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_targets(targets: int, shared_gradient: bool, dtype: torch.dtype, product: Kernels) -> None:
    """Also across what one block takes on (4 and 16 targets)."""
    case = make_case(heads=2, targets=targets, gradients=1 if shared_gradient else None, queries=60, dtype=dtype)
    case.row[:, 0, 40:] = 0
    assert_accurate(product, case)
    assert_same_bits_alone(product, case)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_targets_of_several_samples(dtype: torch.dtype, kernels: Kernels) -> None:
    case = make_case(batch=2, heads=2, targets=3, queries=40, dtype=dtype)
    case.row[:, 0, 20:] = 0
    assert_accurate(kernels, case)
    assert_same_bits_alone(kernels, case)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_rows_shared_among_blocks(dtype: torch.dtype, product: Kernels) -> None:
    case = make_case(heads=2, queries=513, keys=140, causal=False, dtype=dtype)
    case.row[:, :, 64:160] = 0
    assert_accurate(product, case, multiprocessors=5)
    assert not torch.equal(product(case, multiprocessors=5)[0], product(case)[0])


@pytest.mark.parametrize("domain", ["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_keys_shared_among_blocks(dtype: torch.dtype, domain: str, statistics: Kernels) -> None:
    """More keys than the least number of blocks takes on with one tile each, and rows that see few of them."""
    kernels = replace(statistics, domain=domain)
    case = make_case(heads=2, key_heads=1, queries=130, keys=1200, width=24, dtype=dtype)
    case.ranges[:, :100] = case.ranges[:, :100].clamp(max=300)
    case = replace(case, logsumexp=logsumexp(case))
    assert_accurate(kernels, case)
    assert_accurate(kernels, case, multiprocessors=9)
    assert not torch.equal(kernels(case, multiprocessors=9)[0], kernels(case)[0])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_statistics_of_the_causal_domain(layout: dict[str, Any], dtype: torch.dtype, statistics: Kernels) -> None:
    case = make_case(batch=2, heads=2, key_heads=1, targets=2, queries=130, dtype=dtype, **layout)
    assert_accurate(replace(statistics, domain="causal"), case)


@pytest.mark.parametrize("multiprocessors", [0, 5])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_atomics(dtype: torch.dtype, multiprocessors: int, product: Kernels) -> None:
    """Of rows shared among blocks, of heads and of more targets than one block takes on."""
    case = make_case(batch=2, heads=2, targets=5, queries=260, keys=70, width=24, causal=False, dtype=dtype)
    assert_accurate(product, case, multiprocessors=multiprocessors, atomics=True)
    assert_equal(product(make_case(queries=0, keys=9), atomics=True), (torch.zeros(1, 1, 9),))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_order_of_threads_does_not_matter(dtype: torch.dtype, kernels: Kernels) -> None:
    case = make_case(batch=2, heads=2, targets=3, queries=97, keys=131, width=37, dtype=dtype, window=50)
    assert_equal(kernels(case), kernels(case, backwards=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs(dtype: torch.dtype, kernels: Kernels) -> None:
    """Views as transformers passes them, (B, S, H, d) transposed, and rows that do not begin at 16 bytes."""
    case = make_case(batch=2, targets=2, queries=75, width=40, dtype=dtype)
    expected = kernels(case)

    def off_by_one(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (1, 0))[..., 1:]

    for change in (as_view, off_by_one):
        assert_equal(kernels(case.laid_out(change)), expected)
    expanded = replace(case, grad_output=case.grad_output[:, :1].expand(-1, 2, -1, -1, -1))
    assert_equal(kernels(expanded), kernels(replace(expanded, grad_output=expanded.grad_output.contiguous())))


def test_one_gradient_for_all_targets(product: Kernels) -> None:
    case = make_case(targets=2, gradients=1, queries=75, width=40)
    own = replace(case, grad_output=case.grad_output.expand(-1, 2, -1, -1, -1))
    assert_equal(product(case), product(own))


def test_float16_subnormals_and_extremes(product: Kernels) -> None:
    case = make_case(queries=32, dtype=torch.float16)
    case.grad_output.view(torch.int16)[..., ::2] &= 0x83FF  # subnormal
    case.value.view(torch.int16)[..., 1::2] &= -0x7C01  # subnormal, other columns
    for tensor_cores in (True, False):
        assert_accurate(product, case, tensor_cores=tensor_cores)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_rows_of_weight_zero_and_rows_that_see_nothing_are_ignored(dtype: torch.dtype, product: Kernels) -> None:
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
    assert_equal(product(spoiled), product(case()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_of_rows_that_see_nothing_and_of_weight_zero(dtype: torch.dtype, backward: Kernels) -> None:
    case = make_case(heads=2, queries=100, dtype=dtype)
    case.ranges[:, 50:60] = 7  # start = end
    case.logsumexp[:, :, 50:60] = -torch.inf
    spoiled = replace(case, logsumexp=case.logsumexp.nan_to_num(neginf=torch.nan), row=case.row.clone())
    spoiled.row[:, :, 50:60] = torch.nan
    assert_equal(backward(spoiled), backward(case))
    assert_accurate(backward, case)
    assert not backward(case)[0][:, :, :, 50:60].any()

    weightless = replace(case, row=torch.zeros_like(case.row), query=case.query.clone())
    assert_equal(backward(weightless)[:3], backward(case)[:3])
    weightless.query[:, :, 20] = torch.nan
    assert not backward(weightless)[3].any()


@pytest.mark.parametrize("domain", ["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_statistics_of_what_lies_outside_the_ranges(dtype: torch.dtype, domain: str, statistics: Kernels) -> None:
    kernels = replace(statistics, domain=domain)
    case = make_case(batch=2, queries=100, lengths=torch.tensor([80, 100]), dtype=dtype)
    case.ranges[:, 50:60] = 7  # start = end
    spoiled = replace(case, **{name: getattr(case, name).clone() for name in ("query", "key", "value", "grad_output")})
    spoiled.logsumexp[:, :, 50:60] = torch.nan
    spoiled.query[:, :, 50:60] = torch.nan
    spoiled.grad_output[:, :, :, 50:60] = torch.nan
    spoiled.key[0, :, 80:] = torch.nan
    spoiled.value[0, :, 80:] = torch.nan
    expected = kernels(case)
    assert_equal(kernels(spoiled), expected)
    assert not expected[0][:, :, :, 50:60].any()
    assert_accurate(kernels, case)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", ["query", "key", "value", "grad_output", "logsumexp"])
@pytest.mark.parametrize("domain", ["full", "causal"])
def test_nan_reaches_the_statistics_it_is_part_of(
    domain: str, name: str, dtype: torch.dtype, statistics: Kernels
) -> None:
    """Of row or key 20 of the first head. Below a causal mask the rows before the key 20 do not see it."""
    case = make_case(heads=2, key_heads=2, queries=50, dtype=dtype)
    tensor = getattr(case, name)
    tensor[(0,) * (tensor.dim() - (1 if name == "logsumexp" else 2)) + (20,)] = torch.nan
    of_gradient = name in ("value", "grad_output")
    rows = torch.zeros(2, 50, dtype=torch.bool)
    rows[0, slice(20, 50) if name in ("key", "value") else slice(20, 21)] = True
    row_sums, gradient_sums, norm = replace(statistics, domain=domain)(case)
    assert torch.equal(row_sums[0, 0].isnan(), rows)
    assert gradient_sums[0, 0].isnan().tolist() == [of_gradient, False]
    assert norm.isnan().item() == of_gradient


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_row_counts_for_its_own_target_only(dtype: torch.dtype, product: Kernels) -> None:
    case = make_case(targets=2, queries=60, dtype=dtype)
    case.row[0, 0, 30] = 0
    case.query[0, :, 30] = torch.nan
    (result,) = product(case)
    assert not result[0, 0].isnan().any()
    assert result[0, 1, :31].isnan().all() and not result[0, 1, 31:].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", ["query", "key", "value", "grad_output", "logsumexp", "row"])
def test_nan_propagates(dtype: torch.dtype, name: str, product: Kernels) -> None:
    case = make_case(heads=2, key_heads=2, queries=50, dtype=dtype)
    tensor = getattr(case, name)
    tensor[(0,) * (tensor.dim() - (1 if name in ("logsumexp", "row") else 2)) + (20,)] = torch.nan
    expected = torch.zeros(50, dtype=torch.bool)
    expected[slice(20, 21) if name in ("key", "value") else slice(0, 21)] = True
    assert torch.equal(product(case)[0][0, 0].isnan(), expected)


def test_nothing_to_add(product: Kernels) -> None:
    case = make_case(batch=2, targets=2, queries=70, dtype=torch.bfloat16)
    assert torch.equal(product(replace(case, row=torch.zeros_like(case.row)))[0], torch.zeros(2, 2, 70))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_nothing_to_see(dtype: torch.dtype, kernels: Kernels) -> None:
    case = make_case(batch=2, targets=2, queries=70, dtype=dtype)
    unseen = replace(case, ranges=torch.zeros_like(case.ranges), logsumexp=torch.full_like(case.logsumexp, -torch.inf))
    for empty in (unseen, make_case(queries=0, keys=9, dtype=dtype)):
        for result in kernels(empty):
            assert torch.equal(result, torch.zeros_like(result))


@pytest.mark.parametrize("operator", ["attention_backward_relevancy", "glimpse_statistics"])
def test_without_keys(operator: str, library: ctypes.CDLL) -> None:
    case = make_case(queries=9, keys=9)
    for result in Kernels(library, operator)(replace(case, key=case.key[:, :, :0], value=case.value[:, :, :0])):
        assert torch.equal(result, torch.zeros_like(result))


def test_more_rows_than_one_list_of_tiles_holds(backward: Kernels) -> None:
    """2048 tiles of 32 rows. The first rows see one block of keys, the last both: one block's first list is empty."""
    ranges = torch.zeros(1, 2048 * 32 + 40, 2, dtype=torch.int32)
    ranges[:, :50, 1], ranges[:, -60:, 1] = 40, 80
    assert_accurate(backward, make_case(heads=1, key_heads=1, queries=ranges.shape[1], keys=80, width=1, ranges=ranges))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_ranges_that_leave_the_keys_are_clamped(dtype: torch.dtype, kernels: Kernels) -> None:
    case = make_case(queries=40, causal=False, dtype=dtype)
    wild = torch.tensor([-5, 2**31 - 1], dtype=torch.int32).expand(1, 40, 2)
    assert_equal(kernels(replace(case, ranges=wild)), kernels(case))


@dataclass
class ProxyCase:
    """Arguments of proxy_relevancy."""

    hidden: Tensor
    query: Tensor
    offset: Tensor
    lengths: Tensor
    eps: float = 1e-6
    centered: bool = False
    softmax: bool = False

    def truth(self) -> tuple[Tensor, ...]:
        tensors = (t.double() for t in (self.hidden, self.query, self.offset))
        return dense_proxy(*tensors, self.lengths, self.eps, self.centered, self.softmax)


def make_proxy(
    batch: int = 2,
    columns: int = 9,
    targets: int = 1,
    width: int = 40,
    *,
    dtype: torch.dtype = torch.float32,
    mean: float = 0.0,
    **options: Any,
) -> ProxyCase:
    """Scores of a few units; mean: of every state, in its standard deviations."""
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(batch, columns, width, generator=generator) * 3 + 3 * mean).to(dtype)
    query = torch.randn(batch, targets, width, generator=generator) * (4 / width**0.5)
    offset = torch.randn(batch, targets, generator=generator)
    return ProxyCase(hidden, query, offset, torch.full((batch,), columns, dtype=torch.int32), **options)


Proxy = Callable[..., tuple[Tensor, ...]]


@pytest.fixture
def proxy(library: ctypes.CDLL) -> Proxy:
    def run_kernels(case: ProxyCase, backwards: bool = False) -> tuple[Tensor, ...]:
        batch, columns, width = case.hidden.shape
        targets = case.query.shape[1]
        shapes = (batch, targets, columns), (batch, targets), (batch, targets)
        results = [torch.full(shape, torch.nan) for shape in shapes]
        library.proxy_relevancy(
            ELEMENTS[case.hidden.dtype],
            pointers((case.hidden, case.query, case.offset, case.lengths)),
            integers((batch, columns, targets, width)),
            integers(case.hidden.stride()[:2]),
            *(ctypes.c_float(case.eps), case.centered, case.softmax, backwards),
            pointers(results),
        )
        return tuple(results)

    return run_kernels


def assert_near(results: tuple[Tensor, ...], case: ProxyCase) -> None:
    """Within 1e-5 of the twin in fp64 on the same inputs, which 16-bit states are exact in."""
    for result, truth in zip(results, case.truth(), strict=True):
        assert (result - truth).abs().max() <= 1e-5


HEADS = [{"centered": centered, "softmax": softmax} for centered in (False, True) for softmax in (False, True)]


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 8, 37, 1032, 4100, 8200])
def test_proxy_widths(width: int, dtype: torch.dtype, head: dict[str, bool], proxy: Proxy) -> None:
    """Less than 16 bytes, rows that start at 16 bytes and rows that do not, and more than a block holds at once."""
    case = make_proxy(columns=6, width=width, dtype=dtype, **head)
    assert_near(proxy(case), case)


@pytest.mark.parametrize("columns", [1, 2, 5, 576, 2100])
@pytest.mark.parametrize("softmax", [False, True])
def test_proxy_columns(columns: int, softmax: bool, proxy: Proxy) -> None:
    """Also more than the threads of a block read at a time."""
    case = make_proxy(batch=1, columns=columns, width=16, softmax=softmax)
    assert_near(proxy(case), case)
    assert columns > 1 or proxy(case)[1].tolist() == [[0.0]]


@pytest.mark.parametrize("targets", [2, 5, 67])
@pytest.mark.parametrize("width", [40, 41, 4200])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_proxy_targets(targets: int, width: int, dtype: torch.dtype, proxy: Proxy) -> None:
    """Across what a block takes on at a time and at all (4 and 32); a target has the same bits in any place."""
    case = make_proxy(columns=5, targets=targets, width=width, dtype=dtype, centered=True)
    assert_near(proxy(case), case)
    turned = replace(case, query=case.query.flip(1).contiguous(), offset=case.offset.flip(1).contiguous())
    assert_equal(proxy(turned), tuple(result.flip(1) for result in proxy(case)))


@pytest.mark.parametrize("width", [40, 1030, 8200])
@pytest.mark.parametrize("first", [0.0, 1000.0])
def test_proxy_of_a_mean_that_hides_the_deviation(width: int, first: float, proxy: Proxy) -> None:
    """A mean of 100 deviations, also where the states that are read first are far from the others."""
    case = make_proxy(width=width, mean=100.0, centered=True)
    case.hidden[..., : width // 2] += first
    assert_near(proxy(case), case)


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_proxy_padding_is_not_read(head: dict[str, bool], proxy: Proxy) -> None:
    case = make_proxy(batch=5, columns=11, targets=3, **head)
    case.lengths = torch.tensor([11, 6, 1, 0, 99], dtype=torch.int32)
    for b, length in enumerate(case.lengths.tolist()):
        case.hidden[b, length:] = torch.nan
    found = proxy(case)
    assert_near(found, replace(case, lengths=case.lengths.clamp(max=11)))
    assert not found[0][1, :, 6:].any() and not found[1][2:4].any() and not found[2][3].any()


@pytest.mark.parametrize("targets", [1, 2])
def test_proxy_memory_behind_the_columns_is_not_touched(targets: int, proxy: Proxy) -> None:
    """Three of five columns of one page each; whoever reads the other two pages is stopped by the machine."""
    case = make_proxy(batch=1, columns=5, targets=targets, width=mmap.PAGESIZE // 4)
    case.lengths[0] = 3
    expected = proxy(case)
    memory = mmap.mmap(-1, case.hidden.nbytes)
    guarded = torch.frombuffer(memory, dtype=torch.float32).view_as(case.hidden).copy_(case.hidden)
    behind = ctypes.c_void_p(guarded[0, 3].data_ptr()), ctypes.c_size_t(2 * mmap.PAGESIZE)
    protect = ctypes.CDLL(None).mprotect
    assert protect(*behind, 0) == 0
    try:
        assert_equal(proxy(replace(case, hidden=guarded)), expected)
    finally:
        assert protect(*behind, mmap.PROT_READ | mmap.PROT_WRITE) == 0


@pytest.mark.parametrize("softmax", [False, True])
def test_proxy_scores_whose_maps_underflow(softmax: bool, proxy: Proxy) -> None:
    """Entropies come from logarithms: maps of 0 have one, and so do those of 1."""
    case = make_proxy(columns=300, targets=2, softmax=softmax)
    case.offset[:, 0], case.offset[:, 1] = -150.0, 150.0
    found = proxy(case)
    assert_near(found, case)
    assert found[1].min() > 0.1 and (softmax or found[0][:, 0].max() == 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_proxy_order_of_threads_does_not_matter(dtype: torch.dtype, proxy: Proxy) -> None:
    for softmax in (False, True):
        case = make_proxy(columns=70, targets=6, width=4200, dtype=dtype, centered=True, softmax=softmax)
        assert_equal(proxy(case), proxy(case, backwards=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gap", [1, 8])
def test_proxy_views(dtype: torch.dtype, gap: int, proxy: Proxy) -> None:
    """Columns cut out of a longer sequence and of wider states, which do or do not start at 16 bytes."""
    case = make_proxy(columns=6, width=40, dtype=dtype)
    wider = torch.full((2, 10, 40 + 2 * gap), torch.nan, dtype=dtype)
    wider[:, 3:9, gap:-gap] = case.hidden
    assert_near(proxy(replace(case, hidden=wider[:, 3:9, gap:-gap])), case)


def test_proxy_without_columns(proxy: Proxy) -> None:
    relevancy, entropy, bernoulli = proxy(make_proxy(columns=0, targets=3))
    assert relevancy.numel() == 0 and not entropy.any() and not bernoulli.any()


@pytest.mark.parametrize("softmax", [False, True])
def test_proxy_nan_reaches_what_it_is_part_of(softmax: bool, proxy: Proxy) -> None:
    case = make_proxy(columns=20, targets=2, softmax=softmax)
    case.hidden[0, 7, 3] = torch.nan
    relevancy, entropy, bernoulli = proxy(case)
    assert relevancy[0, :, 7].isnan().all() and (softmax or relevancy.isnan().sum() == 2)
    assert entropy.isnan().tolist() == bernoulli.isnan().tolist() == [[True, True], [False, False]]


def test_launching_neither_waits_for_the_device_nor_allocates() -> None:
    """Everything else of the CUDA runtime is kept out of the entry points: these calls may be made while a stream is
    captured in a graph (CUDA Programming Guide, "CUDA Graphs", prohibited operations), and memory comes from torch."""
    sources = [path.read_text() for path in (NATIVE_SOURCES.parents[1] / "csrc" / "cuda").iterdir()]
    called = {name for source in sources for name in re.findall(r"\b(cu(?:da)?[A-Z]\w+)\(", source)}
    device = {"cudaGetDevice", "cudaSetDevice", "cudaDeviceGetAttribute", "cudaFuncSetAttribute"}
    assert called == device | {"cudaFuncGetAttributes", "cudaLaunchKernelEx", "cudaGetErrorString"}
    assert not any("<<<" in source for source in sources)
