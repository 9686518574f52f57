"""GLIMPSE's sums over a layer against their dense twin in float64, over every layout, dtype and instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.cases import (
    BACKENDS,
    DTYPES,
    INTERPRETED,
    PROBLEMS,
    Case,
    as_view,
    assert_same,
    device_of,
    make_case,
    native,
    ragged_case,
    relative_error,
    with_gaps,
)
from torch import Tensor

import lvlm_fastxai as fx
from lvlm_fastxai import _native
from lvlm_fastxai.errors import ArgumentError, BackendUnavailableError, NotDifferentiableError
from lvlm_fastxai.ops import key_ranges
from lvlm_fastxai.reference import glimpse_statistics as dense

# At least so many of these tests run in Triton's interpreter; test_triton.py starts it.
INTERPRETED_TESTS = 65

OPERATORS = {
    "cpu": torch.ops.lvlm_fastxai.glimpse_statistics.default,
    "triton": torch.ops.lvlm_fastxai.glimpse_statistics_triton.default,
}
operator = OPERATORS["triton" if INTERPRETED else "cpu"]
RESULTS = ("row_sums", "gradient_sums", "norm")
DOMAINS = ("full", "causal")
Sums = tuple[Tensor, Tensor, Tensor]


def run(case: Case, backend: str = "cpu", columns: Tensor | None = None, **options: Any) -> Sums:
    """The operator on these inputs, on the backend's device; the results are on the CPU."""
    device = device_of(backend)
    moved = [t.to(device) for t in case.tensors[:5]]
    options["key_ranges"] = case.ranges.to(device)
    options["columns"] = None if columns is None else columns.to(device)
    row_sums, gradient_sums, norm = fx.ops.glimpse_statistics(*moved, **options, backend=backend)
    return row_sums.cpu(), gradient_sums.cpu(), norm.cpu()


def summed(case: Case, domain: str) -> Tensor:
    """The keys that each row's gradients are summed over, (B, Sq, 2): its own, or those that any row of it sees."""
    if domain == "causal":
        return case.ranges
    start, end = case.ranges.unbind(-1)
    seen = start < end
    first = torch.where(seen, start, 2**31 - 1).amin(1, keepdim=True)
    last = torch.where(seen, end, 0).amax(1, keepdim=True)
    return torch.stack((torch.where(seen, first, 0), torch.where(seen, last, 0)), -1)


def twin(case: Case, domain: str = "full", dtype: torch.dtype = torch.float64, **options: Any) -> Sums:
    """The twin on these inputs, converted to a dtype."""
    state = torch.float64 if dtype == torch.float64 else torch.float32
    moved = [t.to(dtype) for t in case.tensors[:4]] + [case.logsumexp.to(state)]
    bounds = (*case.ranges.unbind(-1), *summed(case, domain).unbind(-1))
    return dense(*moved, *bounds, case.query.shape[-1] ** -0.5, **options)


def assert_accurate(case: Case, domain: str, backend: str = "cpu") -> None:
    """float32 within 1e-6 in relative L1; 16-bit within twice the error of eager PyTorch in that dtype."""
    found, truths = run(case, backend, domain=domain), twin(case, domain)
    dtype = case.query.dtype
    eager = twin(case, domain, dtype, compute_dtype=dtype)
    for name, result, truth, rounded in zip(RESULTS, found, truths, eager, strict=True):
        assert result.dtype == torch.float32 and result.shape == truth.shape, name
        assert truth.abs().sum() > 0, name
        limit = 1e-6 if dtype == torch.float32 else 2 * relative_error(rounded, truth)
        assert relative_error(result, truth) <= limit, name


# A kernel takes the causal domain's tiles on its way through the full one's, and the interpreter takes its time.
@pytest.mark.parametrize("domain", DOMAINS[:1] if INTERPRETED else DOMAINS)
@pytest.mark.parametrize("options", PROBLEMS)
def test_equals_the_twin(options: dict[str, Any], domain: str, backend: str, poisoned_empty: None) -> None:
    assert_accurate(make_case(**options), domain, backend)


@pytest.mark.parametrize("domain", DOMAINS)
def test_ranges_in_any_order(domain: str, backend: str, poisoned_empty: None) -> None:
    assert_accurate(ragged_case(), domain, backend)


@pytest.mark.parametrize("domain", DOMAINS)
def test_targets_that_end_at_different_rows(domain: str, backend: str, poisoned_empty: None) -> None:
    """Rows behind the one that a target reads have no gradient."""
    case = make_case(batch=2, targets=3, queries=90)
    for n, end in enumerate((90, 17, 64)):
        case.grad_output[:, n, :, end:] = 0
    assert_accurate(case, domain, backend)
    found = run(case, backend, domain=domain)
    for n in range(3):
        alone = run(replace(case, grad_output=case.grad_output[:, n : n + 1]), backend, domain=domain)
        for together, single in zip(found, alone, strict=True):
            torch.testing.assert_close(together[:, n : n + 1], single, rtol=1e-5, atol=1e-6)


def test_two_runs_are_equal_bit_by_bit(backend: str) -> None:
    case = make_case(batch=2, targets=3, queries=130)
    assert all(map(torch.equal, run(case, backend), run(case, backend)))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_norm_is_that_of_the_wide_dot_product(backend: str) -> None:
    """Σ_h dP_ij is the dot product over concatenated heads: heads are summed before the magnitude, not after."""
    case = make_case(heads=6, key_heads=3, queries=70, causal=False)
    value = case.value[0].double().repeat_interleave(2, 0)  # (H, Sk, d)
    gradient = case.grad_output[0, 0].double()  # (H, Sq, d)
    norm = (gradient.transpose(0, 1).flatten(1) @ value.transpose(0, 1).flatten(1).T).abs().sum()
    apart = (gradient @ value.mT).abs().sum()
    assert apart > 2 * norm
    assert run(case, backend)[2].item() == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("domain", DOMAINS)
def test_equals_autograd_of_eager_attention(domain: str, backend: str) -> None:
    """dP against autograd's gradient at the post-softmax tensor, which is not zero above the diagonal."""
    case = make_case(batch=2, heads=4, key_heads=2, queries=40)
    query, key, value = (t.double() for t in (case.query, case.key, case.value))
    hidden = torch.ones(40, 40).triu(1).bool()
    scores = (query @ key.repeat_interleave(2, 1).mT * 64**-0.5).masked_fill(hidden, -torch.inf)
    probability = scores.softmax(-1).requires_grad_()
    ((probability @ value.repeat_interleave(2, 1)) * case.grad_output[:, 0].double()).sum().backward()
    gradient = probability.grad
    assert gradient is not None
    if domain == "causal":
        gradient = gradient.masked_fill(hidden, 0)
    wanted = (
        (gradient * probability.detach()).clamp(min=0).sum(-1),
        gradient.clamp(min=0).sum((-1, -2)),
        gradient.sum(1).abs().sum((-1, -2)),
    )
    for result, truth in zip(run(case, backend, domain=domain), wanted, strict=True):
        assert relative_error(result[:, 0], truth) <= 1e-6


def test_subset_of_rows_equals_the_full_set_whose_other_rows_have_no_gradient(backend: str) -> None:
    """The rows that are kept do not see every key that the sample has, so that the domain has to be told."""
    case = make_case(batch=2, targets=2, queries=200, window=90)
    kept = torch.tensor([[3, 5, 77, 120, 188], [0, 1, 64, 65, 130]])
    sample = torch.arange(2)[:, None]
    subset = replace(
        case,
        query=case.query[sample, :, kept].transpose(1, 2).contiguous(),
        grad_output=case.grad_output[sample, :, :, kept].permute(0, 2, 3, 1, 4).contiguous(),
        logsumexp=case.logsumexp[sample, :, kept].transpose(1, 2).contiguous(),
        ranges=key_ranges(2, 5, 200, window=90, query_positions=kept),
    )
    where = torch.zeros(2, 200, dtype=torch.bool).scatter(1, kept, True)
    full = run(replace(case, grad_output=case.grad_output * where[:, None, None, :, None]), backend)
    columns = torch.tensor([[0, 200], [0, 200]])
    row_sums, *sums = run(subset, backend, columns=columns)
    torch.testing.assert_close(row_sums, full[0][sample, :, :, kept].permute(0, 2, 3, 1), rtol=1e-5, atol=1e-6)
    for result, truth in zip(sums, full[1:], strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-5, atol=1e-6)
    untold = run(subset, backend)
    assert_same(untold[0], row_sums, backend)
    assert (untold[1] < sums[0]).all() and (untold[2] < sums[1]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs(dtype: torch.dtype, backend: str) -> None:
    """Views as transformers passes them, (B, S, H, d) transposed, and a last axis that is not contiguous."""
    case = make_case(batch=2, targets=2, queries=75, width=40, dtype=dtype)
    expected = run(case, backend)
    for change in (as_view, with_gaps):
        changed = replace(case.laid_out(change), logsumexp=with_gaps(case.logsumexp))
        assert all(map(torch.equal, run(changed, backend), expected))


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", _native.build_info().get("cpu_instruction_sets", ()))
def test_instruction_sets(isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, poisoned_empty: None) -> None:
    monkeypatch.setenv("LVLM_FASTXAI_CPU_ISA", isa)
    case = make_case(batch=2, targets=3, queries=297, keys=331, width=37, dtype=dtype, window=50)
    try:
        run(case)
    except RuntimeError as error:
        if "this processor does not have it" in str(error):
            pytest.skip(f"this processor does not have {isa}")
        raise
    for domain in DOMAINS:
        assert_accurate(case, domain)


@native
def test_thread_count_does_not_change_a_bit() -> None:
    case = make_case(batch=2, heads=6, key_heads=3, targets=2, queries=700)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results += [run(case), run(case)]
    finally:
        torch.set_num_threads(threads)
    assert all(all(map(torch.equal, found, results[0])) for found in results)


def test_float16_subnormals_and_extremes(backend: str) -> None:
    case = make_case(queries=32, dtype=torch.float16)
    case.grad_output.view(torch.int16)[..., ::2] &= 0x83FF  # subnormal
    case.value.view(torch.int16)[..., 1::2] &= -0x7C01  # subnormal, other columns
    assert_accurate(case, "full", backend)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_what_no_row_sees_may_be_nan(backend: str, poisoned_empty: None) -> None:
    """Keys of the padding, rows that see nothing, and a gap in the keys, which the full domain sums the values of."""

    def gapped() -> Case:
        case = make_case(targets=2, queries=100, lengths=torch.tensor([[5, 80]]))
        case.ranges[:, :50, 1] = case.ranges[:, :50, 1].clamp(max=30)
        case.ranges[:, 50:, 0] = 40  # keys 30 … 39 are nobody's
        case.ranges[:, 60:70] = 7  # start = end
        return case

    for domain in DOMAINS:
        case, spoiled = gapped(), gapped()
        spoiled.query[:, :, 60:70] = torch.nan
        spoiled.grad_output[:, :, :, 60:70] = torch.nan
        spoiled.logsumexp[:, :, 60:70] = torch.nan
        for hidden in (spoiled.key, spoiled.value):
            hidden[:, :, :5] = torch.nan
            hidden[:, :, 80:] = torch.nan
        spoiled.key[:, :, 30:40] = torch.nan
        if domain == "causal":
            spoiled.value[:, :, 30:40] = torch.nan
        expected = run(case, backend, domain=domain)
        assert (expected[0][:, :, :, 60:70] == 0).all() and expected[0][:, :, :, 70:].all()
        assert all(map(torch.equal, run(spoiled, backend, domain=domain), expected))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("name", ["query", "key", "value", "grad_output", "logsumexp"])
def test_nan_propagates(backend: str, name: str) -> None:
    case = make_case(heads=2, key_heads=2, queries=50)
    tensor = getattr(case, name)
    tensor[(0,) * (tensor.dim() - (1 if name == "logsumexp" else 2)) + (20,)] = torch.nan
    row_sums, gradient_sums, norm = run(case, backend)
    expected = torch.zeros(50, dtype=torch.bool)
    expected[slice(20, None) if name in ("key", "value") else slice(20, 21)] = True
    assert torch.equal(row_sums[0, 0, 0].isnan(), expected) and not row_sums[0, 0, 1].isnan().any()
    of_gradient = name in ("value", "grad_output")
    assert gradient_sums.isnan().flatten().tolist() == [of_gradient, False]
    assert norm.isnan().item() == of_gradient


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_nothing_to_add(backend: str, poisoned_empty: None) -> None:
    case = make_case(batch=2, targets=2, queries=70)
    for empty in (
        replace(case, ranges=torch.zeros_like(case.ranges)),
        replace(case, grad_output=torch.zeros_like(case.grad_output)),
        make_case(targets=2, queries=9, keys=0),
    ):
        assert all((result == 0).all() for result in run(empty, backend))
    assert [tuple(t.shape) for t in run(make_case(batch=0, heads=2), backend)] == [(0, 1, 2, 63), (0, 1, 2), (0, 1)]
    row_sums, *sums = run(make_case(queries=0, keys=9), backend)
    assert row_sums.numel() == 0 and all((result == 0).all() for result in sums)


@pytest.mark.parametrize("domain", DOMAINS)
def test_ranges_that_leave_the_keys_are_clamped(domain: str, backend: str) -> None:
    case = make_case(queries=40, causal=False)
    wild = torch.tensor([-5, 2**31 - 1], dtype=torch.int32).expand(1, 40, 2)
    found = run(replace(case, ranges=wild), backend, domain=domain)
    assert all(map(torch.equal, found, run(case, backend, domain=domain)))


@pytest.mark.parametrize("domain", DOMAINS)
def test_ranges_and_columns_out_of_range_mean_the_same_to_every_backend(domain: str, backend: str) -> None:
    """Rows whose ranges lie behind the last key or before the first see nothing; columns contain what rows see."""
    case = make_case(batch=2, queries=70, width=24)
    case.ranges[0, :20] = torch.tensor([75, 90], dtype=torch.int32)
    case.ranges[0, 20:30] = torch.tensor([-9, -2], dtype=torch.int32)
    case.ranges[1, :, 1] += 5
    for columns in (None, torch.tensor([[10, 30], [-4, 2**31 - 1]], dtype=torch.int32)):
        found = run(case, backend, columns, domain=domain)
        expected = run(case, "reference", columns, domain=domain)
        assert all(result.any() for result in expected)
        for result, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-5)


WRONG_ARGUMENTS: dict[str, tuple[Any, str]] = {
    "domain": (lambda c: {"domain": "upper"}, "`domain` must be one of full, causal, got 'upper'"),
    "columns shape": (lambda c: {"columns": torch.tensor([0, 63])}, r"`columns` must have shape \(B, 2\)"),
    "columns dtype": (lambda c: {"columns": torch.zeros(2, 2)}, "`columns` must hold int32 or int64"),
    "columns beyond int32": (
        lambda c: {"columns": torch.tensor([[0, 63], [0, 2**32 + 63]])},
        "`columns` must hold numbers within int32, got 4294967359",
    ),
    "columns device": (lambda c: {"columns": torch.zeros(2, 2, device="meta").int()}, "`columns` must be on cpu"),
    "logsumexp dtype": (lambda c: {"logsumexp": c.logsumexp.double()}, "`logsumexp` must have dtype"),
    "no target": (lambda c: {"grad_output": c.grad_output[:, :0]}, "`grad_output` must hold at least one target"),
    "gradient shape": (lambda c: {"grad_output": c.grad_output[:, :, 1:]}, "`grad_output` must have shape"),
    "key heads": (lambda c: {"key": c.key[:, [0, 1, 1]], "value": c.value[:, [0, 1, 1]]}, "divides H = 4, got 3"),
    "window": (lambda c: {"window": 0}, "`window` must be at least 1"),
    "ranges and window": (lambda c: {"key_ranges": c.ranges, "window": 3}, "`key_ranges` replaces"),
    "backend": (lambda c: {"backend": "tpu"}, "`backend` must be one of"),
}


@pytest.mark.parametrize(("change", "message"), WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS.keys())
def test_wrong_arguments(change: Any, message: str) -> None:
    case = make_case(batch=2, heads=4, key_heads=2, targets=2)
    names = ("query", "key", "value", "grad_output", "logsumexp")
    arguments = {**dict(zip(names, case.tensors[:5], strict=True)), **change(case)}
    with pytest.raises(ArgumentError, match=message):
        fx.ops.glimpse_statistics(**arguments)


def test_options_reach_the_operator() -> None:
    case = make_case(batch=2, queries=30, keys=90)
    options: dict[str, Any] = {
        "window": 20,
        "lengths": torch.tensor([[3, 80], [0, 90]]),
        "query_positions": torch.arange(0, 90, 3).expand(2, 30),
    }
    tensors, ranges = case.tensors[:5], key_ranges(2, 30, 90, **options)
    given = fx.ops.glimpse_statistics(*tensors, scale=0.3, **options)
    same = fx.ops.glimpse_statistics(*tensors, scale=0.3, key_ranges=ranges, domain="full")
    assert all(map(torch.equal, given, same))
    columns = torch.tensor([[3, 80], [0, 88]])  # the last row, at 87, sees no further
    assert all(map(torch.equal, given, fx.ops.glimpse_statistics(*tensors, scale=0.3, columns=columns, **options)))
    other = fx.ops.glimpse_statistics(*tensors, key_ranges=ranges)
    assert not torch.equal(given[0], other[0]) and torch.equal(given[2], other[2])
    assert (fx.ops.glimpse_statistics(*tensors, domain="causal", **options)[2] < given[2]).all()


def test_choice_of_backend() -> None:
    case = make_case(queries=300)
    assert list(fx.ops.backends("glimpse_statistics")) == ["cuda", "triton", "cpu", "reference"]
    wide = [t.double() for t in case.tensors[:5]]
    with pytest.raises(BackendUnavailableError, match=r"torch\.float64 is served by the reference only"):
        fx.ops.glimpse_statistics(*wide, backend="cpu")
    assert all(map(torch.equal, fx.ops.glimpse_statistics(*wide), twin(case)))


def test_opcheck() -> None:
    case = make_case(batch=2, targets=2, queries=20)
    arguments = (*case.tensors[:5], *case.ranges.unbind(-1), *summed(case, "full").unbind(-1), 0.125)
    torch.library.opcheck(operator, arguments)
    with_gradient = [t.requires_grad_() if t.is_floating_point() else t for t in arguments[:-1]]
    torch.library.opcheck(operator, (*with_gradient, 0.125), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", [None, "reference", *(["triton"] if INTERPRETED else [])])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(backend: str | None, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(fx.ops.glimpse_statistics, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for queries in (20, 33):
        tensors = make_case(batch=2, targets=2, queries=queries).tensors[:5]
        options = {"window": 7, "lengths": torch.tensor([15, 18]), "backend": backend}
        expected = fx.ops.glimpse_statistics(*tensors, **options)
        for result, wanted in zip(compiled(*tensors, **options), expected, strict=True):
            torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_backward_is_refused(backend: str) -> None:
    case = make_case(queries=10)
    case.query.requires_grad_()
    for result in run(case, backend):
        with pytest.raises(NotDifferentiableError, match="not differentiable"):
            result.sum().backward(retain_graph=True)
    with torch.no_grad():
        assert not any(result.requires_grad for result in run(case, backend))


def test_runs_without_the_native_library() -> None:
    code = (
        "import torch, lvlm_fastxai as fx\n"
        "q = torch.ones(1, 1, 2, 4); lse = torch.tensor([[[2.0, 2.0 + 0.6931472]]])\n"
        "found = fx.ops.glimpse_statistics(q, q, q, q[:, None], lse)\n"
        "assert [part.flatten().tolist() for part in found] == [[4.0, 4.0], [16.0], [16.0]]\n"
        "start, end = torch.tensor([[0, 0]], dtype=torch.int32), torch.tensor([[1, 2]], dtype=torch.int32)\n"
        "operator = torch.ops.lvlm_fastxai.glimpse_statistics.default\n"
        "torch.library.opcheck(operator, (q, q, q, q[:, None], lse, start, end, start, end, 0.5))\n"
    )
    environment = {**os.environ, "LVLM_FASTXAI_NO_EXT": "1"}
    environment.pop("LVLM_FASTXAI_BACKEND", None)
    finished = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


@native
def test_allocates_no_score_matrix() -> None:
    """All that a call allocates, from torch's own profiler: below one S×S matrix of one head."""
    length = 2000
    case = make_case(heads=2, key_heads=2, queries=length, width=32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run(case)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert 0 < allocated < 4 * length * length / 2


def test_docstring_examples() -> None:
    import doctest

    for package in ("ops", "reference"):
        outcome = doctest.testmod(sys.modules[f"lvlm_fastxai.{package}.glimpse_statistics"])
        assert outcome.attempted > 0 and outcome.failed == 0, package
