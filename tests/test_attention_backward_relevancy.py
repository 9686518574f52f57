"""The fused backward against its dense twin in float64, over every layout, dtype and instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
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
    device_of,
    make_case,
    native,
    ragged_case,
    with_gaps,
)
from torch import Tensor

import lvlm_fastxai as fx
from lvlm_fastxai import _native
from lvlm_fastxai.errors import ArgumentError, BackendUnavailableError, NotDifferentiableError
from lvlm_fastxai.ops import key_ranges
from lvlm_fastxai.reference import attention_backward_relevancy as dense

# At least so many of these tests run in Triton's interpreter; test_triton.py starts it.
INTERPRETED_TESTS = 55

OPERATORS = {
    "cpu": torch.ops.lvlm_fastxai.attention_backward_relevancy.default,
    "triton": torch.ops.lvlm_fastxai.attention_backward_relevancy_triton.default,
}
operator = OPERATORS["triton" if INTERPRETED else "cpu"]
RESULTS = ("grad_query", "grad_key", "grad_value", "product")


@dataclass
class Backward:
    """A problem with what its attention's forward gave."""

    case: Case
    output: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        case = self.case
        return case.query, case.key, case.value, self.output, case.grad_output, case.logsumexp, case.row

    def dense(self, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Tensor, ...]:
        """The twin on these inputs, converted to a dtype."""
        state = torch.float64 if dtype == torch.float64 else torch.float32
        moved = [t.to(dtype) for t in self.tensors[:5]] + [t.to(state) for t in self.tensors[5:]]
        return dense(*moved, *self.case.ranges.unbind(-1), self.case.query.shape[-1] ** -0.5, **options)

    def run(self, backend: str = "cpu") -> tuple[Tensor, ...]:
        """The operator on these inputs, on the backend's device; the results are on the CPU."""
        device = device_of(backend)
        moved = [t.to(device) for t in self.tensors]
        ranges = self.case.ranges.to(device)
        found = fx.ops.attention_backward_relevancy(*moved, key_ranges=ranges, backend=backend)
        return tuple(tensor.cpu() for tensor in found)


def with_output(case: Case) -> Backward:
    """The case with its attention's output, in its dtype."""
    query, key, value = case.query.double(), case.key.double(), case.value.double()
    group = query.shape[1] // key.shape[1]
    position = torch.arange(key.shape[2])
    visible = (position >= case.ranges[..., :1]) & (position < case.ranges[..., 1:])
    scores = query @ key.repeat_interleave(group, 1).mT * query.shape[-1] ** -0.5 - case.logsumexp[..., None]
    probability = scores.exp().masked_fill(~visible[:, None], 0)
    return Backward(case, (probability @ value.repeat_interleave(group, 1)).to(case.query.dtype))


def make(**options: Any) -> Backward:
    return with_output(make_case(**options))


def assert_accurate(problem: Backward, backend: str = "cpu") -> None:
    """float32 within 1e-6 in relative L1; 16-bit within twice the error of eager PyTorch in that dtype."""
    found, truths = problem.run(backend), problem.dense()
    dtype = problem.case.query.dtype
    assert truths[3].abs().sum() > 0
    # P∘dP and P∘D nearly cancel in dS where a row sees few keys, so that dQ and dK are measured by their parts.
    parts = dense_without_delta(problem)
    eager = problem.dense(dtype, compute_dtype=dtype)
    for name, result, truth, part, rounded in zip(RESULTS, found, truths, parts, eager, strict=True):
        assert result.shape == truth.shape, name
        assert result.dtype == (torch.float32 if name == "product" else dtype), name
        error = (result.double() - truth).abs().sum()
        if dtype == torch.float32:
            assert error <= 1e-6 * part.abs().sum(), name
        else:
            assert error <= 2 * (rounded.double() - truth).abs().sum(), name


def dense_without_delta(problem: Backward) -> tuple[Tensor, ...]:
    return replace(problem, output=torch.zeros_like(problem.output)).dense()


@pytest.mark.parametrize("options", PROBLEMS)
def test_equals_the_twin(options: dict[str, Any], backend: str, poisoned_empty: None) -> None:
    assert_accurate(make(**options), backend)


def test_ranges_in_any_order(backend: str, poisoned_empty: None) -> None:
    assert_accurate(with_output(ragged_case()), backend)


def test_two_runs_are_equal_bit_by_bit(backend: str) -> None:
    problem = make(batch=2, targets=3, queries=130)
    assert all(map(torch.equal, problem.run(backend), problem.run(backend)))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_equals_autograd_and_the_relevancy_product(backend: str) -> None:
    """Gradients against autograd's of attention as it is written, in float64; the product against its own operator."""
    problem = make(batch=2, targets=3, queries=40, keys=90, window=30)
    case = problem.case
    query, key, value = (t.double().requires_grad_() for t in (case.query, case.key, case.value))
    scores = query @ key.repeat_interleave(2, 1).mT * case.query.shape[-1] ** -0.5
    position = torch.arange(90)
    visible = (position >= case.ranges[..., :1]) & (position < case.ranges[..., 1:])
    probability = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    output = probability @ value.repeat_interleave(2, 1)
    found = problem.run(backend)
    for n in range(3):
        wanted = torch.autograd.grad(output, (query, key, value), case.grad_output[:, n].double(), retain_graph=True)
        for result, truth in zip(found[:3], wanted, strict=True):
            assert (result[:, n].double() - truth).abs().sum() <= 1e-5 * truth.abs().sum()
    product = case.run("triton" if INTERPRETED else backend)
    torch.testing.assert_close(found[3], product, rtol=1e-5, atol=1e-6)


def test_subset_of_rows_equals_the_full_set_whose_other_rows_have_no_gradient(backend: str) -> None:
    problem = make(batch=2, targets=2, queries=200, window=90)
    case = problem.case
    kept = torch.tensor([[3, 5, 77, 120, 199], [0, 1, 64, 65, 130]])
    sample = torch.arange(2)[:, None]
    subset = Backward(
        replace(
            case,
            query=case.query[sample, :, kept].transpose(1, 2).contiguous(),
            grad_output=case.grad_output[sample, :, :, kept].permute(0, 2, 3, 1, 4).contiguous(),
            logsumexp=case.logsumexp[sample, :, kept].transpose(1, 2).contiguous(),
            row=case.row.gather(2, kept[:, None].expand(-1, 2, -1)),
            ranges=key_ranges(2, 5, 200, window=90, query_positions=kept),
        ),
        problem.output[sample, :, kept].transpose(1, 2).contiguous(),
    )
    where = torch.zeros(2, 200, dtype=torch.bool).scatter(1, kept, True)
    full = Backward(
        replace(
            case,
            grad_output=case.grad_output * where[:, None, None, :, None],
            row=case.row * where[:, None],
        ),
        problem.output,
    ).run(backend)
    found = subset.run(backend)
    grad_query = full[0][sample, :, :, kept].permute(0, 2, 3, 1, 4)
    for result, truth in zip(found, (grad_query, *full[1:]), strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs(dtype: torch.dtype, backend: str) -> None:
    """Views as transformers passes them, (B, S, H, d) transposed, and a last axis that is not contiguous."""
    problem = make(batch=2, targets=2, queries=75, width=40, dtype=dtype)
    expected = problem.run(backend)

    for change in (as_view, with_gaps):
        case = replace(
            problem.case.laid_out(change),
            logsumexp=with_gaps(problem.case.logsumexp),
            row=with_gaps(problem.case.row),
        )
        assert all(map(torch.equal, Backward(case, change(problem.output)).run(backend), expected))


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", _native.build_info().get("cpu_instruction_sets", ()))
def test_instruction_sets(isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, poisoned_empty: None) -> None:
    monkeypatch.setenv("LVLM_FASTXAI_CPU_ISA", isa)
    problem = make(batch=2, targets=3, queries=97, keys=331, width=37, dtype=dtype, window=50)
    try:
        problem.run()
    except RuntimeError as error:
        if "this processor does not have it" in str(error):
            pytest.skip(f"this processor does not have {isa}")
        raise
    assert_accurate(problem)


@native
@pytest.mark.parametrize("key_heads", [1, 6])
def test_thread_count_changes_rounding_of_grad_query_alone(key_heads: int) -> None:
    """Keys are dealt into more shares where there are more threads than key heads; dQ is the sum of the shares."""
    problem = make(batch=1, heads=6, key_heads=key_heads, targets=2, queries=700)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            first, again = problem.run(), problem.run()
            assert all(map(torch.equal, first, again))
            results.append(first)
    finally:
        torch.set_num_threads(threads)
    for found in results:
        assert all(map(torch.equal, found[1:], results[0][1:]))
        torch.testing.assert_close(found[0], results[0][0], rtol=1e-5, atol=1e-6)


def test_float16_subnormals_and_extremes(backend: str) -> None:
    problem = make(queries=32, dtype=torch.float16)
    case = problem.case
    case.grad_output.view(torch.int16)[..., ::2] &= 0x83FF  # subnormal
    case.grad_output *= 2.0**-10  # and so are the gradients
    assert_accurate(with_output(case), backend)
    large = replace(case, grad_output=torch.full_like(case.grad_output, 6e4))
    found = with_output(large).run(backend)[2]
    assert found.isinf().any() and not found.isnan().any()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_rows_that_see_nothing_have_no_gradient_and_give_none(backend: str, poisoned_empty: None) -> None:
    problem = make(targets=2, queries=100)
    problem.case.ranges[:, 50:60] = 7  # start = end
    found = problem.run(backend)
    assert (found[0][:, :, :, 50:60] == 0).all() and (found[0][:, :, :, 60:] != 0).any()
    problem.case.logsumexp[:, :, 50:60] = -torch.inf
    problem.case.row[:, :, 50:60] = 1e30
    again = problem.run(backend)
    assert all(map(torch.equal, found, again))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_weight_of_zero_hides_a_row_from_the_product_only(backend: str) -> None:
    problem = make(targets=2, queries=60)
    expected = problem.run(backend)
    problem.case.row[0, 0, 30] = 0
    found = problem.run(backend)
    assert all(map(torch.equal, found[:3], expected[:3]))
    assert not torch.equal(found[3][0, 0], expected[3][0, 0]) and torch.equal(found[3][0, 1], expected[3][0, 1])
    problem.case.grad_output[0, 0, :, 30] = torch.nan
    spoiled = problem.run(backend)
    assert torch.equal(spoiled[3][0, 0], found[3][0, 0]) and spoiled[2][0, 0].isnan().any()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_nothing_to_add(backend: str, poisoned_empty: None) -> None:
    problem = make(batch=2, targets=2, queries=70)
    blind = Backward(replace(problem.case, ranges=torch.zeros_like(problem.case.ranges)), problem.output)
    assert all((tensor == 0).all() for tensor in blind.run(backend))
    assert [tuple(t.shape) for t in make(batch=0).run(backend)][3] == (0, 1, 63)
    found = make(queries=0, keys=9).run(backend)
    assert found[0].numel() == 0 and all((tensor == 0).all() for tensor in found[1:])
    assert make(queries=9, keys=0).run(backend)[0].abs().sum() == 0


def test_ranges_that_leave_the_keys_are_clamped(backend: str) -> None:
    problem = make(queries=40, causal=False)
    wild = torch.tensor([-5, 2**31 - 1], dtype=torch.int32).expand(1, 40, 2)
    found = Backward(replace(problem.case, ranges=wild), problem.output).run(backend)
    assert all(map(torch.equal, found, problem.run(backend)))


WRONG_ARGUMENTS: dict[str, tuple[Any, str]] = {
    "output shape": (lambda p: {"output": p.output[:, :, 1:]}, "`output` must have shape"),
    "output dtype": (lambda p: {"output": p.output.half()}, "`output` must have dtype"),
    "output dimensions": (lambda p: {"output": p.output[0]}, "`output` must have shape"),
    "one gradient for all": (lambda p: {"grad_output": p.case.grad_output[:, :1]}, r"`grad_output` must .* \(2, 2, 4"),
    "key heads": (lambda p: {"key": p.case.key[:, [0, 1, 1]], "value": p.case.value[:, [0, 1, 1]]}, "got 3"),
    "window": (lambda p: {"window": 0}, "`window` must be at least 1"),
    "ranges and window": (lambda p: {"key_ranges": p.case.ranges, "window": 3}, "`key_ranges` replaces"),
    "backend": (lambda p: {"backend": "tpu"}, "`backend` must be one of"),
}


@pytest.mark.parametrize(("change", "message"), WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS.keys())
def test_wrong_arguments(change: Any, message: str) -> None:
    problem = make(batch=2, targets=2)
    names = ("query", "key", "value", "output", "grad_output", "logsumexp", "row")
    arguments = {**dict(zip(names, problem.tensors, strict=True)), **change(problem)}
    with pytest.raises(ArgumentError, match=message):
        fx.ops.attention_backward_relevancy(**arguments)


def test_options_reach_the_operator() -> None:
    problem = make(batch=2, queries=30, keys=90)
    options: dict[str, Any] = {
        "window": 20,
        "lengths": torch.tensor([[3, 80], [0, 90]]),
        "query_positions": torch.arange(0, 90, 3).expand(2, 30),
    }
    ranges = key_ranges(2, 30, 90, **options)
    given = fx.ops.attention_backward_relevancy(*problem.tensors, scale=0.3, **options)
    same = fx.ops.attention_backward_relevancy(*problem.tensors, scale=0.3, key_ranges=ranges)
    other = fx.ops.attention_backward_relevancy(*problem.tensors, key_ranges=ranges)
    assert all(map(torch.equal, given, same)) and not torch.equal(given[3], other[3])


def test_choice_of_backend() -> None:
    problem = make(queries=300)
    assert list(fx.ops.backends("attention_backward_relevancy")) == ["cuda", "triton", "cpu", "reference"]
    wide = [t.double() for t in problem.tensors]
    with pytest.raises(BackendUnavailableError, match=r"torch\.float64 is served by the reference only"):
        fx.ops.attention_backward_relevancy(*wide, backend="cpu")
    assert all(map(torch.equal, fx.ops.attention_backward_relevancy(*wide), problem.dense()))


def test_opcheck() -> None:
    problem = make(batch=2, targets=2, queries=20)
    arguments = (*problem.tensors, *problem.case.ranges.unbind(-1), 0.125)
    torch.library.opcheck(operator, arguments)
    with_gradient = [t.requires_grad_() if t.is_floating_point() else t for t in arguments[:-1]]
    torch.library.opcheck(operator, (*with_gradient, 0.125), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", [None, "reference", *(["triton"] if INTERPRETED else [])])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(backend: str | None, dynamic: bool) -> None:
    torch._dynamo.reset()
    call = fx.ops.attention_backward_relevancy
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for queries in (20, 33):
        problem = make(batch=2, targets=2, queries=queries)
        options = {"window": 7, "lengths": torch.tensor([15, 18]), "backend": backend}
        expected = call(*problem.tensors, **options)
        for result, wanted in zip(compiled(*problem.tensors, **options), expected, strict=True):
            torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_backward_is_refused(backend: str) -> None:
    problem = make(queries=10)
    problem.case.query.requires_grad_()
    for result in problem.run(backend):
        with pytest.raises(NotDifferentiableError, match="not differentiable"):
            result.sum().backward(retain_graph=True)
    with torch.no_grad():
        assert not any(result.requires_grad for result in problem.run(backend))


def test_runs_without_the_native_library() -> None:
    code = (
        "import torch, lvlm_fastxai as fx\n"
        "q = torch.ones(1, 1, 2, 4); lse = torch.tensor([[[2.0, 2.0 + 0.6931472]]])\n"
        "arguments = (q, q, q, q, q[:, None], lse, torch.ones(1, 1, 2))\n"
        "assert fx.ops.attention_backward_relevancy(*arguments)[3].tolist() == [[[6.0, 2.0]]]\n"
        "ranges = torch.tensor([[[0, 1], [0, 2]]], dtype=torch.int32).unbind(-1)\n"
        "operator = torch.ops.lvlm_fastxai.attention_backward_relevancy.default\n"
        "torch.library.opcheck(operator, (*arguments, *ranges, 0.5))\n"
    )
    environment = {**os.environ, "LVLM_FASTXAI_NO_EXT": "1"}
    environment.pop("LVLM_FASTXAI_BACKEND", None)
    finished = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


@native
def test_allocates_no_score_matrix() -> None:
    """All that a call allocates, from torch's own profiler: below one S×S matrix of one head."""
    length = 2000
    problem = make(heads=2, key_heads=2, queries=length, width=32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        problem.run()
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert 0 < allocated < 4 * length * length / 2


def test_docstring_examples() -> None:
    import doctest

    for package in ("ops", "reference"):
        outcome = doctest.testmod(sys.modules[f"lvlm_fastxai.{package}.attention_backward_relevancy"])
        assert outcome.attempted > 0 and outcome.failed == 0, package
