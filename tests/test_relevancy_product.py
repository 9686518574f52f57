"""The operator against its dense twin in float64, over every layout, dtype and instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
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

# At least so many of these tests run in Triton's interpreter; test_triton.py starts it.
INTERPRETED_TESTS = 67

OPERATORS = {
    "cpu": torch.ops.lvlm_fastxai.relevancy_product.default,
    "triton": torch.ops.lvlm_fastxai.relevancy_product_triton.default,
}
operator = OPERATORS["triton" if INTERPRETED else "cpu"]


def assert_accurate(case: Case, backend: str = "cpu") -> None:
    """float32 within 1e-6 in relative L1; 16-bit within twice the error of eager PyTorch in that dtype."""
    result, truth = case.run(backend), case.dense()
    assert result.dtype == torch.float32 and result.shape == truth.shape
    assert truth.abs().sum() > 0
    if case.query.dtype == torch.float32:
        assert relative_error(result, truth) <= 1e-6
    else:
        eager = case.dense(case.query.dtype, compute_dtype=case.query.dtype)
        assert relative_error(result, truth) <= 2 * relative_error(eager, truth)


@pytest.mark.parametrize("options", PROBLEMS)
def test_equals_the_twin(options: dict[str, Any], backend: str, poisoned_empty: None) -> None:
    assert_accurate(make_case(**options), backend)


@pytest.mark.parametrize("targets", [1, 2, 7])
@pytest.mark.parametrize("shared_gradient", [False, True])
def test_targets(targets: int, shared_gradient: bool, backend: str, poisoned_empty: None) -> None:
    case = make_case(batch=2, targets=targets, gradients=1 if shared_gradient else None, queries=90)
    assert_accurate(case, backend)
    alone = torch.cat(
        [
            replace(
                case,
                row=case.row[:, n : n + 1],
                grad_output=case.grad_output if shared_gradient else case.grad_output[:, n : n + 1],
            ).run(backend)
            for n in range(targets)
        ],
        dim=1,
    )
    assert_same(case.run(backend), alone, backend)


def test_ranges_in_any_order(backend: str, poisoned_empty: None) -> None:
    assert_accurate(ragged_case(), backend)


def test_two_runs_are_equal_bit_by_bit(backend: str) -> None:
    case = make_case(batch=2, targets=3, queries=130)
    assert torch.equal(case.run(backend), case.run(backend))


def test_subset_of_rows_equals_the_full_set_with_the_others_at_zero(backend: str) -> None:
    case = make_case(batch=2, targets=2, queries=200, window=90)
    kept = torch.tensor([[3, 5, 77, 120, 199], [0, 1, 64, 65, 130]])
    weight = torch.zeros_like(case.row).scatter(
        2, kept[:, None].expand(-1, 2, -1), case.row.gather(2, kept[:, None].expand(-1, 2, -1))
    )
    full = replace(case, row=weight).run(backend)
    sample = torch.arange(2)[:, None]
    subset = replace(
        case,
        query=case.query[sample, :, kept].transpose(1, 2).contiguous(),
        grad_output=case.grad_output[sample, :, :, kept].permute(0, 2, 3, 1, 4).contiguous(),
        logsumexp=case.logsumexp[sample, :, kept].transpose(1, 2).contiguous(),
        row=case.row.gather(2, kept[:, None].expand(-1, 2, -1)),
        ranges=key_ranges(2, 5, 200, window=90, query_positions=kept),
    )
    assert_same(subset.run(backend), full, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs(dtype: torch.dtype, backend: str) -> None:
    """Views as transformers passes them, (B, S, H, d) transposed, and a last axis that is not contiguous."""
    case = make_case(batch=2, targets=2, queries=75, width=40, dtype=dtype)
    expected = case.run(backend)

    for change in (as_view, with_gaps):
        changed = replace(case.laid_out(change), logsumexp=with_gaps(case.logsumexp), row=with_gaps(case.row))
        assert torch.equal(changed.run(backend), expected)
    expanded = replace(case, grad_output=case.grad_output[:, :1].expand(-1, 2, -1, -1, -1))
    assert torch.equal(expanded.run(backend), replace(case, grad_output=case.grad_output[:, :1]).run(backend))


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", _native.build_info().get("cpu_instruction_sets", ()))
def test_instruction_sets(isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, poisoned_empty: None) -> None:
    monkeypatch.setenv("LVLM_FASTXAI_CPU_ISA", isa)
    case = make_case(batch=2, targets=3, queries=97, keys=131, width=37, dtype=dtype, window=50)
    try:
        case.run()
    except RuntimeError as error:
        if "this processor does not have it" in str(error):
            pytest.skip(f"this processor does not have {isa}")
        raise
    assert_accurate(case)


@native
def test_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LVLM_FASTXAI_CPU_ISA", "avx1024")
    with pytest.raises(RuntimeError, match="avx1024"):
        make_case().run()


def test_float16_subnormals_and_extremes(backend: str) -> None:
    case = make_case(queries=32, dtype=torch.float16)
    case.grad_output.view(torch.int16)[..., ::2] &= 0x83FF  # subnormal
    case.value.view(torch.int16)[..., 1::2] &= -0x7C01  # subnormal, other columns
    assert_accurate(case, backend)


@native
def test_thread_count_does_not_change_a_bit() -> None:
    case = make_case(batch=2, heads=6, key_heads=3, targets=2, queries=400)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results += [case.run(), case.run()]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@native
def test_concurrent_callers() -> None:
    case = make_case(batch=1, targets=2, queries=300)
    expected = case.run()
    results: list[Tensor] = []
    callers = [threading.Thread(target=lambda: results.append(case.run())) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 4 and all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_rows_of_weight_zero_and_rows_that_see_nothing_are_ignored(backend: str, poisoned_empty: None) -> None:
    case = make_case(targets=2, queries=100, lengths=torch.tensor([80]))
    case.row[:, :, 20:40] = 0
    case.ranges[:, 50:60] = 7  # start = end
    expected = case.run(backend)
    spoiled = make_case(targets=2, queries=100, lengths=torch.tensor([80]))
    spoiled.row[:, :, 20:40] = 0
    spoiled.query[:, :, 20:40] = torch.nan
    spoiled.grad_output[:, :, :, 20:40] = torch.nan
    spoiled.ranges[:, 50:60] = 7
    spoiled.logsumexp[:, :, 50:60] = torch.nan
    spoiled.key[:, :, 80:] = torch.nan
    spoiled.value[:, :, 80:] = torch.nan
    assert torch.equal(spoiled.run(backend), expected)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_row_counts_for_its_own_target_only(backend: str) -> None:
    """Weight zero for one target hides that row's NaN from it and not from the other."""
    case = make_case(targets=2, queries=60)
    case.row[0, 0, 30] = 0
    case.query[0, :, 30] = torch.nan
    result = case.run(backend)
    assert not result[0, 0].isnan().any()
    assert result[0, 1, :31].isnan().all() and not result[0, 1, 31:].isnan().any()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("name", ["query", "key", "value", "grad_output", "logsumexp", "row"])
def test_nan_propagates(backend: str, name: str) -> None:
    case = make_case(heads=2, key_heads=2, queries=50)
    tensor = getattr(case, name)
    tensor[(0,) * (tensor.dim() - (1 if name in ("logsumexp", "row") else 2)) + (20,)] = torch.nan
    result = case.run(backend)[0, 0]
    expected = torch.zeros(50, dtype=torch.bool)
    expected[slice(20, 21) if name in ("key", "value") else slice(0, 21)] = True
    assert torch.equal(result.isnan(), expected)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_nothing_to_add(backend: str, poisoned_empty: None) -> None:
    case = make_case(batch=2, targets=2, queries=70)
    assert torch.equal(replace(case, row=torch.zeros_like(case.row)).run(backend), torch.zeros(2, 2, 70))
    assert torch.equal(replace(case, ranges=torch.zeros_like(case.ranges)).run(backend), torch.zeros(2, 2, 70))
    assert make_case(batch=0).run(backend).shape == (0, 1, 63)
    assert torch.equal(make_case(queries=0, keys=9).run(backend), torch.zeros(1, 1, 9))
    assert make_case(queries=9, keys=0).run(backend).shape == (1, 1, 0)


def test_ranges_that_leave_the_keys_are_clamped(backend: str) -> None:
    case = make_case(queries=40, causal=False)
    wild = torch.tensor([-5, 2**31 - 1], dtype=torch.int32).expand(1, 40, 2)
    assert torch.equal(replace(case, ranges=wild).run(backend), case.run(backend))


@pytest.mark.parametrize("causal", [True, False])
def test_equals_autograd_of_eager_attention(causal: bool) -> None:
    """dP against autograd's gradient at the post-softmax tensor, in float64: the rule as it is published."""
    case = make_case(batch=2, heads=4, key_heads=2, queries=40)
    query, key, value = (t.double() for t in (case.query, case.key, case.value))
    scores = query @ key.repeat_interleave(2, 1).mT * 64**-0.5
    if causal:
        scores = scores.masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf)
    probability = scores.softmax(-1).requires_grad_()
    ((probability @ value.repeat_interleave(2, 1)) * case.grad_output[:, 0].double()).sum().backward()
    assert probability.grad is not None
    layer = (probability.grad * probability).clamp(min=0).mean(1)
    expected = case.row.double() @ layer
    result = fx.ops.relevancy_product(
        query, key, value, case.grad_output.double(), scores.logsumexp(-1), case.row.double(), causal=causal
    )
    assert result.dtype == torch.float64
    assert relative_error(result, expected) <= 1e-12


def test_ranges_follow_the_definition() -> None:
    """Every option against the predicate it stands for, entry by entry."""
    positions = torch.tensor([[0, 3, 4, 9], [1, 2, 10, 11]])
    lengths = torch.tensor([[0, 10], [2, 12]])
    for causal in (True, False):
        for window in (None, 1, 3, 100):
            ranges = key_ranges(2, 4, 12, causal=causal, window=window, query_positions=positions, lengths=lengths)
            for b in range(2):
                for r, i in enumerate(positions[b].tolist()):
                    start, end = ranges[b, r].tolist()
                    for j in range(12):
                        real = lengths[b, 0] <= j < lengths[b, 1]
                        near = window is None or (i - window < j if causal else abs(i - j) < window)
                        assert (start <= j < end) == bool(real and near and (j <= i or not causal))
    assert key_ranges(1, 2, 5).tolist() == [[[0, 4], [0, 5]]]
    assert key_ranges(2, 1, 5, lengths=torch.tensor([2, 5])).tolist() == [[[0, 2]], [[0, 5]]]


def test_options_reach_the_operator() -> None:
    case = make_case(batch=2, queries=30, keys=90)
    options: dict[str, Any] = {
        "window": 20,
        "lengths": torch.tensor([[3, 80], [0, 90]]),
        "query_positions": torch.arange(0, 90, 3).expand(2, 30),
    }
    ranges = key_ranges(2, 30, 90, **options)
    given = fx.ops.relevancy_product(*case.tensors, scale=0.3, **options)
    assert torch.equal(given, fx.ops.relevancy_product(*case.tensors, scale=0.3, key_ranges=ranges))
    assert not torch.equal(given, fx.ops.relevancy_product(*case.tensors, key_ranges=ranges))


WRONG_ARGUMENTS: dict[str, tuple[Any, str]] = {
    "query dimensions": (lambda c: {"query": c.query[0]}, "`query` must have shape"),
    "query dtype": (lambda c: {"query": c.query.int()}, "`query` must be float32"),
    "mixed dtypes": (lambda c: {"value": c.value.half()}, "`value` must have dtype torch.float32"),
    "logsumexp dtype": (lambda c: {"logsumexp": c.logsumexp.double()}, "`logsumexp` must have dtype"),
    "row dtype": (lambda c: {"row": c.row.bfloat16()}, "`row` must have dtype torch.float32"),
    "key heads": (lambda c: {"key": c.key[:, [0, 1, 1]], "value": c.value[:, [0, 1, 1]]}, "divides H = 4, got 3"),
    "key width": (lambda c: {"key": c.key[..., :5]}, r"`key` must have shape .*, got \(2, 2, 63, 5\)"),
    "value length": (lambda c: {"value": c.value[:, :, 1:]}, "`value` must have shape"),
    "gradients": (lambda c: {"grad_output": c.grad_output[:, [0, 0, 0]]}, "`grad_output` must have shape"),
    "row length": (lambda c: {"row": c.row[..., 1:]}, "`row` must have shape"),
    "no target": (lambda c: {"row": c.row[:, :0]}, "`row` must hold at least one target"),
    "window": (lambda c: {"window": 0}, "`window` must be at least 1, got 0"),
    "lengths shape": (lambda c: {"lengths": torch.tensor([1, 2, 3])}, "`lengths` must have shape"),
    "lengths dtype": (lambda c: {"lengths": torch.tensor([1.0, 2.0])}, "`lengths` must hold integers"),
    "positions": (lambda c: {"query_positions": torch.arange(63)}, "`query_positions` must have shape"),
    "ranges shape": (lambda c: {"key_ranges": c.ranges[:, 1:]}, "`key_ranges` must have shape"),
    "ranges dtype": (lambda c: {"key_ranges": c.ranges.float()}, "`key_ranges` must hold int32"),
    "ranges and window": (lambda c: {"key_ranges": c.ranges, "window": 3}, "`key_ranges` replaces"),
    "device": (lambda c: {"key": c.key.to("meta")}, "`key` must be on cpu"),
    "backend": (lambda c: {"backend": "tpu"}, "`backend` must be one of .*, got 'tpu'"),
}


@pytest.mark.parametrize(("change", "message"), WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS.keys())
def test_wrong_arguments(change: Any, message: str) -> None:
    case = make_case(batch=2, targets=2)
    names = ("query", "key", "value", "grad_output", "logsumexp", "row")
    arguments = {**dict(zip(names, case.tensors, strict=True)), **change(case)}
    with pytest.raises(ArgumentError, match=message):
        fx.ops.relevancy_product(**arguments)


def test_backends_say_why_not() -> None:
    reasons = fx.ops.backends("relevancy_product")
    assert list(reasons) == ["cuda", "triton", "cpu", "reference"]
    assert reasons["reference"] is None
    assert all(reason is None or reason for reason in reasons.values())
    with pytest.raises(ArgumentError, match="relevancy_product"):
        fx.ops.backends("no_such_operator")


def test_a_backend_that_was_asked_for_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    unavailable = pytest.raises(BackendUnavailableError, match=r"'cuda' is unavailable: .+")
    if fx.ops.backends("relevancy_product")["cuda"] is None:
        unavailable = pytest.raises(BackendUnavailableError, match="the tensors are on cpu")
    with unavailable:
        case.run("cuda")
    with unavailable, fx.use_backend("cuda"):
        fx.ops.relevancy_product(*case.tensors)
    monkeypatch.setenv("LVLM_FASTXAI_BACKEND", "cuda")
    with unavailable:
        fx.ops.relevancy_product(*case.tensors)
    with fx.use_backend("reference"):
        assert torch.equal(fx.ops.relevancy_product(*case.tensors), case.run("reference"))
    monkeypatch.setenv("LVLM_FASTXAI_BACKEND", "abacus")
    with pytest.raises(ArgumentError, match=r"LVLM_FASTXAI_BACKEND must be one of .*'abacus'"):
        fx.ops.relevancy_product(*case.tensors)
    with pytest.raises(ArgumentError, match="'abacus'"), fx.use_backend("abacus"):
        pass


@native
def test_float64_is_refused_by_the_cpu_kernel_and_served_by_the_reference() -> None:
    case = make_case()
    wide = [t.double() for t in case.tensors]
    with pytest.raises(BackendUnavailableError, match=r"torch\.float64 is served by the reference only"):
        fx.ops.relevancy_product(*wide, backend="cpu")
    assert torch.equal(fx.ops.relevancy_product(*wide), case.dense())


@native
def test_the_first_choice_on_the_cpu_is_the_cpu_kernel() -> None:
    case = make_case(queries=300)
    assert torch.equal(fx.ops.relevancy_product(*case.tensors), case.run("cpu"))
    assert not torch.equal(case.run("cpu"), case.run("reference"))


def test_opcheck() -> None:
    case = make_case(batch=2, targets=2, queries=20)
    arguments = (*case.tensors, *case.ranges.unbind(-1), 0.125)
    torch.library.opcheck(operator, arguments)
    with_gradient = [t.requires_grad_() if t.is_floating_point() else t for t in arguments[:-1]]
    torch.library.opcheck(operator, (*with_gradient, 0.125), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", [None, "reference", *(["triton"] if INTERPRETED else [])])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(backend: str | None, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(fx.ops.relevancy_product, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for queries in (20, 33):
        case = make_case(batch=2, targets=2, queries=queries)
        options = {"window": 7, "lengths": torch.tensor([15, 18]), "backend": backend}
        expected = fx.ops.relevancy_product(*case.tensors, **options)
        assert torch.allclose(compiled(*case.tensors, **options), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_backward_is_refused(backend: str) -> None:
    case = make_case(queries=10)
    case.query.requires_grad_()
    with pytest.raises(NotDifferentiableError, match="not differentiable"):
        case.run(backend).sum().backward()
    with torch.no_grad():
        assert not case.run(backend).requires_grad


def test_runs_without_the_native_library() -> None:
    code = (
        "import torch, lvlm_fastxai as fx\n"
        "q = torch.ones(1, 1, 2, 4); lse = torch.tensor([[[2.0, 2.0 + 0.6931472]]])\n"
        "arguments = (q, q, q, torch.ones(1, 1, 1, 2, 4), lse, torch.ones(1, 1, 2))\n"
        "assert fx.ops.relevancy_product(*arguments).tolist() == [[[6.0, 2.0]]]\n"
        "assert 'LVLM_FASTXAI_NO_EXT' in fx.ops.backends('relevancy_product')['cpu']\n"
        "ranges = torch.tensor([[[0, 1], [0, 2]]], dtype=torch.int32).unbind(-1)\n"
        "operator = torch.ops.lvlm_fastxai.relevancy_product.default\n"
        "torch.library.opcheck(operator, (*arguments, *ranges, 0.5))\n"
    )
    environment = {**os.environ, "LVLM_FASTXAI_NO_EXT": "1"}
    environment.pop("LVLM_FASTXAI_BACKEND", None)
    finished = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


@native
def test_allocates_no_score_matrix() -> None:
    """Largest single allocation of a call, from torch's own profiler: far below one S×S matrix of one head."""
    length = 1000
    case = make_case(heads=2, key_heads=2, queries=length)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        case.run()
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert 0 < allocated < 4 * length * length / 2


def test_docstring_examples() -> None:
    import doctest

    from lvlm_fastxai.ops import _dispatch
    from lvlm_fastxai.ops import key_ranges as _  # noqa: F401

    modules = [
        sys.modules["lvlm_fastxai.ops.relevancy_product"],
        sys.modules["lvlm_fastxai.ops.key_ranges"],
        sys.modules["lvlm_fastxai.reference.relevancy_product"],
        _dispatch,
    ]
    for module in modules:
        outcome = doctest.testmod(module)
        assert outcome.attempted > 0 and outcome.failed == 0, module.__name__
