"""A FastRM head's relevancy against its dense twin in float64, and against the module that it was folded from."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.cases import BACKENDS, DTYPES, INTERPRETED, device_of, native, with_gaps
from torch import Tensor, nn

import lvlm_fastxai as fx
from lvlm_fastxai import _native
from lvlm_fastxai.errors import ArgumentError, BackendUnavailableError, NotDifferentiableError
from lvlm_fastxai.reference import proxy_relevancy as dense

# At least so many of these tests run in Triton's interpreter; test_triton.py starts it.
INTERPRETED_TESTS = 160

OPERATORS = {
    "cpu": torch.ops.lvlm_fastxai.proxy_relevancy.default,
    "triton": torch.ops.lvlm_fastxai.proxy_relevancy_triton.default,
}
operator = OPERATORS["triton" if INTERPRETED else "cpu"]
RESULTS = ("map", "entropy", "bernoulli")
NORMS = ("rms", "layer")
ACTIVATIONS = ("sigmoid", "softmax")
TOLERANCE = 1e-5
EPS = 1e-6
Found = tuple[Tensor, Tensor, Tensor]


@dataclass
class Head:
    hidden: Tensor
    query: Tensor
    offset: Tensor
    lengths: Tensor | None = None
    norm: str = "rms"
    activation: str = "sigmoid"

    def run(self, backend: str = "cpu") -> Found:
        """The operator on the backend's device; the results are on the CPU."""
        device = device_of(backend)
        relevancy, entropy, bernoulli = fx.ops.proxy_relevancy(
            *(self.hidden.to(device), self.query.to(device), self.offset.to(device)),
            norm=self.norm,
            activation=self.activation,
            eps=EPS,
            lengths=None if self.lengths is None else self.lengths.to(device),
            backend=backend,
        )
        return relevancy.cpu(), entropy.cpu(), bernoulli.cpu()

    def twin(self) -> Found:
        """The twin on the same numbers in float64."""
        batch, columns, _ = self.hidden.shape
        lengths = torch.full((batch,), columns) if self.lengths is None else self.lengths
        hidden, query, offset = self.hidden.double(), self.query.double(), self.offset.double()
        return dense(hidden, query, offset, lengths, EPS, self.norm == "layer", self.activation == "softmax")


def make_head(
    batch: int = 2,
    columns: int = 63,
    width: int = 96,
    targets: int = 1,
    dtype: torch.dtype = torch.float32,
    scale: float = 3.0,
    mean: float = 0.0,
    seed: int = 0,
    **options: Any,
) -> Head:
    """Scores of a deviation of about `scale`, states of mean `mean` and deviation 1."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, columns, width, generator=generator, dtype=torch.float64) + mean
    query = torch.randn(batch, targets, width, generator=generator) * (scale * width**-0.5)
    offset = torch.randn(batch, targets, generator=generator)
    return Head(hidden.to(dtype), query, offset, **options)


def assert_accurate(head: Head, backend: str = "cpu") -> None:
    for name, result, truth in zip(RESULTS, head.run(backend), head.twin(), strict=True):
        assert result.dtype == torch.float32 and result.shape == truth.shape, name
        assert (result - truth).abs().amax() <= TOLERANCE, name


PROBLEMS: dict[str, dict[str, Any]] = {
    # The interpreter takes its time per column and per pair of vectors.
    **{f"width-{width}": {"width": width, "targets": 2} for width in (1, 63, 257, 1000)},
    **{f"columns-{columns}": {"columns": columns, "width": 40} for columns in (1, 7, 63, 257, 1000)},
    **{f"targets-{targets}": {"targets": targets, "columns": 33} for targets in (1, 2, 5, 13, 64)},
    "padding": {"columns": 90, "batch": 5, "targets": 3, "lengths": torch.tensor([90, 0, 1, 2, 37])},
    "large-scores": {"scale": 15.0, "columns": 200},
    "mean-of-100-deviations": {"mean": 100.0, "width": 1000, "targets": 2},
    "llava-1.5-7b": {"batch": 1, "columns": 30 if INTERPRETED else 576, "width": 4096},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("options", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_equals_the_twin(
    options: dict[str, Any], norm: str, activation: str, dtype: torch.dtype, backend: str, poisoned_empty: None
) -> None:
    assert_accurate(make_head(**options, norm=norm, activation=activation, dtype=dtype), backend)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("norm", NORMS)
def test_equals_the_module_before_folding(norm: str, backend: str) -> None:
    """Norm with weight and bias, both projections, one head's scores, sigmoid: torch's own modules, in float32."""
    torch.manual_seed(3)
    batch, columns, targets, width, inner = 2, 50, 3, 128, 32
    hidden, rows = torch.randn(batch, columns, width), torch.randn(batch, targets, width)
    normalise = nn.RMSNorm(width, eps=EPS) if norm == "rms" else nn.LayerNorm(width, eps=EPS)
    projections = [nn.Linear(width, inner, bias=False) for _ in range(2)]
    for parameter in normalise.parameters():
        nn.init.normal_(parameter, 1.0, 0.3)
    constant = 0.4
    with torch.no_grad():
        query, key = projections[0](normalise(rows)), projections[1](normalise(hidden))
        wanted = torch.sigmoid(query @ key.mT * inner**-0.5 + constant)
        folded = query @ projections[1].weight * inner**-0.5  # (B, N, D)
        bias = normalise.bias if norm == "layer" else torch.zeros(width)
        head = Head(hidden, folded * normalise.weight, folded @ bias + constant, norm=norm)
        found = head.run(backend)[0]
    assert wanted.std() > 0.05
    assert (found - wanted).abs().amax() <= TOLERANCE


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_scores_beyond_the_exponential(activation: str, backend: str) -> None:
    """Scores to ±1000; a map that underflows everywhere has the entropy of its logarithms."""
    head = make_head(columns=80, width=64, targets=2, activation=activation)
    head.query.zero_()
    head.query[..., 0] = 64**-0.5  # of a state of ±8 in the first place and 0 elsewhere: ±1
    head.hidden.zero_()
    head.hidden[..., 0] = torch.where(torch.arange(80) % 3 == 0, 8.0, -8.0)
    head.query *= torch.tensor([[[1000.0], [0.25]]])
    head.offset[:] = torch.tensor([0.0, -1000.0])
    relevancy, entropy, bernoulli = head.run(backend)
    assert all(result.isfinite().all() for result in (relevancy, entropy, bernoulli))
    # Two values e^±0.25 apart, a third of the columns the larger one: nothing of it is left in a float32 sigmoid.
    shares = torch.tensor([0.25, -0.25, -0.25], dtype=torch.float64).repeat(27)[:80].softmax(0)
    wanted = -(shares * shares.log()).sum() / torch.tensor(80.0).log()
    assert entropy[:, 1].numpy() == pytest.approx([wanted.item()] * 2, abs=2e-5)  # a score of 1000 has steps of 6e-5
    if activation == "sigmoid":
        assert (relevancy[:, 1] == 0).all() and (bernoulli == 0).all()
        assert torch.equal(relevancy[0, 0], (torch.arange(80) % 3 == 0).float())
    else:
        assert (relevancy.sum(-1) - 1).abs().amax() < 1e-5


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_one_column_has_all_of_a_softmax(backend: str) -> None:
    """Where 1 − m is lost in float32, and at the switch to more than half of the sum."""
    for gap in (0.0, 1e-4, 0.7, 5.0, 40.0):
        hidden = torch.full((1, 20, 1), -1.0)
        hidden[0, 11] = 1.0
        head = Head(hidden, torch.full((1, 1, 1), gap / 2), torch.zeros(1, 1), activation="softmax")
        assert_accurate(head, backend)
        head.lengths = torch.tensor([12])
        head.hidden[0, 1:11] = 1.0
        assert_accurate(head, backend)
        assert_accurate(Head(hidden[:, 10:12], head.query, head.offset, activation="softmax"), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cancellation(dtype: torch.dtype, backend: str) -> None:
    """Deviation a hundredth of the mean, and a weight on the mean that only its exact subtraction cancels."""
    head = make_head(columns=40, width=1000, mean=100.0, norm="layer", dtype=dtype)
    head.query += 0.05
    assert_accurate(head, backend)
    uncentered = (head.hidden.double() @ head.query.double().mT).abs().amin()
    assert uncentered > 1000  # what the mean would have added


@pytest.mark.parametrize("norm", NORMS)
def test_outliers_in_the_first_states(norm: str, backend: str) -> None:
    """Massive activations: a few states of every column are a thousand times the others."""
    head = make_head(columns=40, width=512, norm=norm, targets=2)
    head.hidden[..., :2] *= 1000
    assert_accurate(head, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("targets", [1, 3])
def test_strided_states(targets: int, dtype: torch.dtype, backend: str) -> None:
    head = make_head(batch=3, columns=40, width=48, targets=targets, dtype=dtype, norm="layer")
    expected = head.run(backend)
    inside = torch.full((3, 60, 48), torch.nan, dtype=dtype)
    inside[:, 7:47] = head.hidden  # the image's columns of a longer sequence
    views = {
        "columns of a sequence": inside[:, 7:47],
        "columns first": head.hidden.transpose(0, 1).contiguous().transpose(0, 1),
        "odd offset": torch.cat((head.hidden[..., :1], head.hidden), -1)[..., 1:],
        "gaps": with_gaps(head.hidden),
    }
    for name, view in views.items():
        changed = Head(view, with_gaps(head.query), with_gaps(head.offset), norm="layer")
        assert not view.is_contiguous() and all(map(torch.equal, changed.run(backend), expected)), name
    shared = Head(head.hidden[:1].expand(3, -1, -1), head.query, head.offset, norm="layer")
    assert_accurate(shared, backend)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_padding_may_be_nan(activation: str, backend: str, poisoned_empty: None) -> None:
    lengths = torch.tensor([70, 0, 1, 33])
    head = make_head(batch=4, columns=70, targets=3, lengths=lengths, activation=activation)
    expected = head.run(backend)
    head.hidden[torch.arange(70) >= lengths[:, None]] = torch.nan
    found = head.run(backend)
    assert all(map(torch.equal, found, expected))
    relevancy, entropy, bernoulli = found
    assert all((relevancy[b, :, length:] == 0).all() for b, length in enumerate(lengths.tolist()))
    assert (entropy[1:3] == 0).all() and (bernoulli[1] == 0).all() and (entropy[[0, 3]] > 0).all()
    for length, sample in ((70, 0), (33, 3)):
        alone = Head(
            head.hidden[sample, :length][None],
            head.query[sample][None],
            head.offset[sample][None],
            activation=activation,
        )
        for whole, single in zip(found, alone.run(backend), strict=True):
            cut = whole[sample, :, :length] if whole.dim() == 3 else whole[sample]
            torch.testing.assert_close(cut, single[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_propagates(activation: str, backend: str) -> None:
    head = make_head(batch=2, columns=40, targets=2, activation=activation)
    head.hidden[0, 20, 5] = torch.nan
    relevancy, entropy, bernoulli = head.run(backend)
    expected = torch.zeros(40, dtype=torch.bool)
    expected[slice(20, 21) if activation == "sigmoid" else slice(None)] = True
    assert torch.equal(relevancy[0, 0].isnan(), expected) and torch.equal(relevancy[0, 1].isnan(), expected)
    assert entropy[0].isnan().all() and bernoulli[0].isnan().all()
    assert not any(result[1].isnan().any() for result in (relevancy, entropy, bernoulli))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_entropies_of_known_maps(activation: str, backend: str) -> None:
    """All columns alike: 1; half of the columns certain, half impossible: log(n / 2) / log n."""
    hidden = torch.ones(1, 64, 8)
    alike = Head(hidden, torch.zeros(1, 1, 8), torch.zeros(1, 1), activation=activation)
    relevancy, entropy, bernoulli = alike.run(backend)
    assert entropy.item() == pytest.approx(1.0, abs=1e-6)
    if activation == "sigmoid":
        assert (relevancy == 0.5).all() and bernoulli.item() == pytest.approx(1.0, abs=1e-6)
    hidden[:, 32:] = -1
    halves = Head(hidden, torch.full((1, 1, 8), 50.0), torch.zeros(1, 1), activation=activation)
    assert halves.run(backend)[1].item() == pytest.approx(5 / 6, abs=1e-6)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_nothing_to_do(backend: str, poisoned_empty: None) -> None:
    for shape in ({"columns": 0}, {"batch": 0}, {"targets": 0}):
        options: dict[str, Any] = {"batch": 2, "columns": 5, "targets": 3, **shape}
        relevancy, entropy, bernoulli = make_head(**options).run(backend)
        rows = (options["batch"], options["targets"])
        assert relevancy.shape == (*rows, options["columns"]) and entropy.shape == bernoulli.shape == rows
        assert (entropy == 0).all() and (bernoulli == 0).all()


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", _native.build_info().get("cpu_instruction_sets", ()))
def test_instruction_sets(isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, poisoned_empty: None) -> None:
    monkeypatch.setenv("LVLM_FASTXAI_CPU_ISA", isa)
    options: dict[str, Any] = {"dtype": dtype, "targets": 9, "columns": 101, "lengths": torch.tensor([101, 50])}
    try:
        make_head().run()
    except RuntimeError as error:
        if "this processor does not have it" in str(error):
            pytest.skip(f"this processor does not have {isa}")
        raise
    for norm in NORMS:
        for activation in ACTIVATIONS:
            for width, mean in ((333, 0.0), (4096, 100.0)):
                assert_accurate(make_head(width=width, mean=mean, norm=norm, activation=activation, **options))


@native
@pytest.mark.parametrize("targets", [1, 8])
def test_thread_count_does_not_change_a_bit(targets: int) -> None:
    head = make_head(batch=2, columns=301, width=515, targets=targets, norm="layer", dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results += [head.run(), head.run()]
    finally:
        torch.set_num_threads(threads)
    assert all(all(map(torch.equal, found, results[0])) for found in results)


def test_two_runs_are_equal_bit_by_bit(backend: str) -> None:
    head = make_head(columns=130, targets=3, norm="layer")
    assert all(map(torch.equal, head.run(backend), head.run(backend)))


@native
def test_allocates_no_copy_of_the_states() -> None:
    """All that a call allocates, from torch's own profiler: a few columns of a thread beside the results."""
    for targets in (1, 4):
        head = make_head(batch=8, columns=576, width=1024, targets=targets, dtype=torch.bfloat16)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            head.run()
        allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
        assert 0 < allocated < head.hidden.nbytes / 4


WRONG_ARGUMENTS: dict[str, tuple[Any, str]] = {
    "norm": (lambda h: {"norm": "batch"}, "`norm` must be one of rms, layer, got 'batch'"),
    "activation": (lambda h: {"activation": "relu"}, "`activation` must be one of sigmoid, softmax, got 'relu'"),
    "hidden shape": (lambda h: {"hidden": h.hidden[0]}, r"`hidden` must have shape \(B, S, D\), got \(63, 96\)"),
    "hidden dtype": (lambda h: {"hidden": h.hidden.int()}, "`hidden` must be float32, bfloat16, float16 or float64"),
    "no width": (lambda h: {"hidden": h.hidden[..., :0], "query": h.query[..., :0]}, "a width of at least 1"),
    "query shape": (lambda h: {"query": h.query[..., 1:]}, r"`query` must have shape \(2, 1, 96\)"),
    "query samples": (lambda h: {"query": h.query[:1]}, r"`query` must have shape \(2, 1, 96\)"),
    "query dtype": (lambda h: {"query": h.query.bfloat16()}, r"`query` must have dtype torch\.float32"),
    "query device": (lambda h: {"query": h.query.to("meta")}, "`query` must be on cpu like `hidden`, got meta"),
    "offset shape": (lambda h: {"offset": h.offset[:, [0, 0]]}, r"`offset` must have shape \(2, 1\)"),
    "offset dtype": (lambda h: {"offset": h.offset.double()}, r"`offset` must have dtype torch\.float32"),
    "float64": (lambda h: {"hidden": h.hidden.double()}, r"`query` must have dtype torch\.float64"),
    "lengths shape": (lambda h: {"lengths": torch.tensor([3])}, r"`lengths` must have shape \(B,\) = \(2,\)"),
    "lengths dtype": (lambda h: {"lengths": torch.tensor([3.0, 4.0])}, "`lengths` must hold int32 or int64"),
    "lengths device": (lambda h: {"lengths": torch.zeros(2, device="meta").int()}, "`lengths` must be on cpu"),
    "backend": (lambda h: {"backend": "tpu"}, "`backend` must be one of"),
}


@pytest.mark.parametrize(("change", "message"), WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS.keys())
def test_wrong_arguments(change: Any, message: str) -> None:
    head = make_head()
    arguments = {"hidden": head.hidden, "query": head.query, "offset": head.offset, **change(head)}
    with pytest.raises(ArgumentError, match=message):
        fx.ops.proxy_relevancy(**arguments)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_that_leave_the_columns_are_clamped(dtype: torch.dtype, backend: str) -> None:
    head = make_head(lengths=torch.tensor([-3, 2**31 - 1], dtype=dtype))
    found = head.run(backend)
    head.lengths = torch.tensor([0, 63])
    assert all(map(torch.equal, found, head.run(backend)))


def test_choice_of_backend() -> None:
    head = make_head()
    assert list(fx.ops.backends("proxy_relevancy")) == ["cuda", "triton", "cpu", "reference"]
    wide = [t.double() for t in (head.hidden, head.query, head.offset)]
    with pytest.raises(BackendUnavailableError, match=r"torch\.float64 is served by the reference only"):
        fx.ops.proxy_relevancy(*wide, backend="cpu")
    found = fx.ops.proxy_relevancy(*wide)
    assert all(result.dtype == torch.float64 for result in found)
    assert all(map(torch.equal, found, head.twin()))


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("softmax", [False, True])
def test_opcheck(centered: bool, softmax: bool) -> None:
    head = make_head(columns=20, targets=2)
    lengths = torch.tensor([20, 9], dtype=torch.int32)
    options = (lengths, EPS, centered, softmax)
    torch.library.opcheck(operator, (head.hidden, head.query, head.offset, *options))
    with_gradient = [t.requires_grad_() for t in (head.hidden, head.query, head.offset)]
    torch.library.opcheck(operator, (*with_gradient, *options), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", [None, "reference", *(["triton"] if INTERPRETED else [])])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(backend: str | None, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(fx.ops.proxy_relevancy, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for columns in (20, 33):
        head = make_head(columns=columns, targets=2)
        tensors = head.hidden, head.query, head.offset
        options: dict[str, Any] = {"norm": "layer", "lengths": torch.tensor([15, 18]), "backend": backend}
        expected = fx.ops.proxy_relevancy(*tensors, **options)
        for result, wanted in zip(compiled(*tensors, **options), expected, strict=True):
            torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_backward_is_refused(backend: str) -> None:
    head = make_head(columns=10)
    head.query.requires_grad_()
    for result in head.run(backend):
        with pytest.raises(NotDifferentiableError, match="not differentiable"):
            result.sum().backward(retain_graph=True)
    with torch.no_grad():
        assert not any(result.requires_grad for result in head.run(backend))


def test_runs_without_the_native_library() -> None:
    code = (
        "import torch, lvlm_fastxai as fx\n"
        "hidden = torch.tensor([[[3.0, -3.0], [2.0, 2.0]]]); query = torch.tensor([[[1.0, -1.0]]])\n"
        "found = fx.ops.proxy_relevancy(hidden, query, torch.zeros(1, 1))\n"
        "assert [round(x, 3) for x in found[0].flatten().tolist()] == [0.881, 0.5], found\n"
        "lengths = torch.tensor([2], dtype=torch.int32)\n"
        "operator = torch.ops.lvlm_fastxai.proxy_relevancy.default\n"
        "torch.library.opcheck(operator, (hidden, query, torch.zeros(1, 1), lengths, 1e-6, False, False))\n"
    )
    environment = {**os.environ, "LVLM_FASTXAI_NO_EXT": "1"}
    environment.pop("LVLM_FASTXAI_BACKEND", None)
    finished = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_docstring_examples() -> None:
    import doctest

    outcome = doctest.testmod(sys.modules["lvlm_fastxai.ops.proxy_relevancy"])
    assert outcome.attempted > 0 and outcome.failed == 0
