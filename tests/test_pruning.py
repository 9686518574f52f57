"""The pruned sweep: its rows against their dense definition, what it keeps, its estimate, and that it leaves no trace.

RMSNorm computes in fp32 whatever the model's dtype. A pruned sweep sends a row's gradient through it in two parts, one
by way of the row's own output and one by way of its key and value, which round on their own: 1e-8 to 1e-7 of a row. So
that fp64 can be held to 1e-10, as in test_oracles.py, :func:`build` replaces the norms by ones that stay in fp64; the
models as they are run in fp32 and bf16.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from support import models, oracle
from support.rows import (
    LENGTH,
    MEMORY,
    NoSquare,
    Target,
    errors,
    largest_allocation,
    long_batch,
    some_targets,
)
from support.state import Stop, assert_same, fingerprint, in_two_threads, put_to_use
from torch import Tensor, nn

import lvlm_fastxai as fx
from lvlm_fastxai.explain.relevancy_rows import RelevancyRows, explain_rows
from lvlm_fastxai.methods import _base
from lvlm_fastxai.sweep import attention, descent, plan, pruning
from lvlm_fastxai.sweep.descent import Descent
from lvlm_fastxai.sweep.forward import Sweep
from lvlm_fastxai.sweep.pruning import Ledger, Selection, rows_of_call, select_rows
from lvlm_fastxai.sweep.tape import current_tape
from lvlm_fastxai.sweep.targets import check_targets

pytestmark = pytest.mark.usefixtures("one_thread")

ALL_ROWS = 1e-14
"""A tolerance that leaves out nothing but rows whose gradient is zero, and is still not the exact sweep's 0."""
RUNS_OF_A_LAYER = {"fast": 1, "lean": 2, "min": 2}
"""How often an exact explanation runs each decoder layer."""


@pytest.fixture
def never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """No layer is swept whole, however many of its rows are kept."""
    monkeypatch.setattr(descent, "WHOLE_LAYER_SHARE", 2.0)


@pytest.fixture
def descents(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, list[Selection | None]]]:
    """Tolerance and each layer's selection (top layer first) of every descent that the test makes."""
    seen: list[tuple[float, list[Selection | None]]] = []
    layers = Descent.__iter__
    create = Descent.__init__

    def created(self: Descent, sweep: Sweep, slots: Sequence[Tensor], *args: Any, **options: Any) -> None:
        seen.append((options.get("row_tolerance", 0.0), []))
        create(self, sweep, slots, *args, **options)

    def watched(self: Descent) -> Iterator[Any]:
        for step in layers(self):
            seen[-1][1].append(step.selection)
            yield step

    monkeypatch.setattr(Descent, "__init__", created)
    monkeypatch.setattr(Descent, "__iter__", watched)
    return seen


def build(name: str, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """As `models.build` in fp64, with RMSNorms that compute in fp64."""
    model, inputs = models.build(name, torch.float64, **options)
    for norm in [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]:
        forward = _norm_in_double(norm)
        probe = torch.randn(4, *norm.weight.shape, dtype=torch.float64)
        torch.testing.assert_close(forward(probe), norm(probe), rtol=1e-5, atol=1e-6)
        norm.forward = forward
    return model, inputs


def _norm_in_double(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    epsilon = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    weight = norm.weight + 1 if "Gemma" in type(norm).__name__ else norm.weight
    return lambda hidden: hidden * (hidden.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt() * weight


def start_of_answer(inputs: Mapping[str, Any]) -> int:
    return models.answer_targets(inputs, 0)[0][1] + 1


def kept(result: RelevancyRows) -> list[list[int]]:
    """(N, L) rows kept."""
    assert result.certificate is not None
    return result.certificate.rows_kept.tolist()


def calls_in(model: nn.Module, part: str = "mlp") -> list[int]:
    """Counts, as they happen, the calls of one part of the lowest decoder layer."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    model.get_decoder().layers[0].get_submodule(part).register_forward_hook(count)
    return calls


# 1. All rows that have a gradient: nothing is lost but rounding.
@pytest.mark.usefixtures("never_whole")
@pytest.mark.parametrize("name", models.NAMES)
def test_a_sweep_over_every_row_is_the_exact_one(name: str, descents: list) -> None:
    model, inputs = build(name, batch=2, padding="left")
    truth = fx.relevancy_rows(model, inputs, targets := some_targets(inputs))
    for memory in MEMORY:
        found = explain_rows(model, inputs, targets, memory=memory, row_tolerance=ALL_ROWS)
        assert errors(found.rows, truth, targets).max() <= 1e-10
        assert found.fallback is None
        assert all(selection is not None for selection in descents[-1][1]), "a layer was swept whole"
    # fp32 and the library's own norms. Two sweeps in fp32 differ by about 3e-7 of a row; one left-out row is 1e-3.
    model, inputs = models.build(name, torch.float32, batch=2, padding="right")
    truth = fx.relevancy_rows(model, inputs, targets := some_targets(inputs))
    for memory in MEMORY:
        found = explain_rows(model, inputs, targets, memory=memory, row_tolerance=ALL_ROWS)
        assert found.rows.dtype == torch.float32
        assert errors(found.rows, truth, targets).mean() <= 1e-6


@pytest.mark.usefixtures("never_whole")
@pytest.mark.parametrize("name", ["llama", "qwen3_vl"])
def test_the_gradient_at_the_first_layer_is_the_exact_one(name: str) -> None:
    """What evaluation reads from a sweep: every slot's gradient, in the slots' order, all rows of it."""
    model, inputs = build(name, batch=2, padding="left")
    targets = check_targets(some_targets(inputs), inputs, None)
    found = []
    for tolerance in (0.0, ALL_ROWS):
        with Sweep(model, inputs, targets.row_table(), row_tolerance=tolerance) as swept:
            scalars = targets.scalars(swept.logits)
            way = Descent(swept, scalars, row_tolerance=tolerance)
            assert len(list(way)) == len(swept)
            found.append((torch.stack(way.input_gradients), way.first_input))
    assert found[0][0].shape[0] == len(targets.slots) == 3
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


# 2. One target against the definition.
@pytest.mark.usefixtures("never_whole")
@pytest.mark.parametrize("tolerance", [0.1, 0.4])
@pytest.mark.parametrize("name", models.NAMES)
def test_rows_equal_the_dense_definition(name: str, tolerance: float) -> None:
    model, inputs = build(name)
    targets = models.answer_targets(inputs, 0)[3:4]
    truth, counts = oracle.pruned_chefer_row(model, inputs, targets[0], tolerance)
    found = explain_rows(model, inputs, targets, row_tolerance=tolerance)
    assert errors(found.rows, truth[None], targets) <= 1e-10
    assert kept(found) == [counts]
    exact = fx.relevancy_rows(model, inputs, targets)
    assert errors(found.rows, exact, targets) > 1e-4, "nothing was pruned"


@pytest.mark.parametrize("name", ["llava_siglip", "qwen2_5_vl", "gemma3"])
def test_a_layer_that_keeps_most_rows_is_swept_whole(name: str, descents: list) -> None:
    """At ε = 0.02 the lowest layer of these models keeps more than WHOLE_LAYER_SHARE of its rows, the next one less."""
    model, inputs = build(name)
    columns = inputs["input_ids"].shape[1]
    targets = models.answer_targets(inputs, 0)[3:4]
    found = explain_rows(model, inputs, targets, row_tolerance=0.02)
    counts = kept(found)[0]
    assert counts[0] == columns > counts[1] and counts[-1] == 1
    assert [selection is None for selection in descents[-1][1]] == [count == columns for count in reversed(counts)]
    truth, _ = oracle.pruned_chefer_row(model, inputs, targets[0], 0.02, rows_kept=counts)
    assert errors(found.rows, truth[None], targets) <= 1e-10
    assert found.certificate is not None and found.certificate.dropped[0, 0] == 0 < found.certificate.dropped[0, 1]


# 3. Many targets at once. Their sets are filled up to the largest, so the definition is told how many rows that is.
def assert_follows_certificate(
    model: nn.Module, inputs: dict[str, Any], targets: Sequence[Target], found: RelevancyRows, tolerance: float
) -> None:
    """Every row against its own run of the definition."""
    for index, (target, counts) in enumerate(zip(targets, kept(found), strict=True)):
        truth, _ = oracle.pruned_chefer_row(model, inputs, target, tolerance, rows_kept=counts)
        assert errors(found.rows[index, None], truth[None], [target]) <= 1e-10, target


@pytest.mark.usefixtures("never_whole")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", models.NAMES)
def test_targets_of_a_batch_have_rows_of_their_own(name: str, side: str, descents: list) -> None:
    model, inputs = build(name, batch=2, padding=side)
    targets = some_targets(inputs)  # three of the first sample, two of the second
    found = explain_rows(model, inputs, targets, row_tolerance=0.2)
    ((_, selections),) = descents
    assert all(selection.rows.shape[:2] == (2, 3) for selection in selections)
    bottom = selections[-1].rows
    assert any(not torch.equal(bottom[0, 0], bottom[0, slot]) for slot in (1, 2)), "the targets keep the same rows"
    assert_follows_certificate(model, inputs, targets, found, 0.2)


@pytest.mark.usefixtures("never_whole")
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_targets_in_several_descents(name: str, memory: str, descents: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slot by slot over one forward: the graphs between layers and the fast mode's keys must last until the end."""
    monkeypatch.setattr(_base, "GRADIENT_BUDGET_BYTES", 1)
    model, inputs = build(name, batch=2, padding="left")
    targets = some_targets(inputs)
    runs, projections = calls_in(model), calls_in(model, "self_attn.k_proj")
    found = explain_rows(model, inputs, targets, memory=memory, row_tolerance=0.2)
    assert runs[0] == 1 + 3, "the forward, and the kept rows in each descent"
    assert projections[0] == 1 + 3 + (1 if memory == "fast" else 3), "fast mode keeps all rows' keys"
    assert [selections[-1].rows.shape[1] for _, selections in descents] == [1, 1, 1]
    assert_follows_certificate(model, inputs, targets, found, 0.2)


# 4. LVLM-Interpret: one gradient made of several backwards, which share their rows.
def interpret_on_rows(
    model: nn.Module, inputs: Mapping[str, Any], target: Target, start: int, masks: Sequence[Tensor]
) -> Tensor:
    """Dense generation-time row where every backward goes through the rows of `masks` (L of (B, S), bottom first)."""
    sample, query_row, _ = target

    def of_row(row: int) -> list[Tensor]:
        own = sample, row, int(inputs["input_ids"][sample, row + 1])
        matrices, _ = oracle.pruned_relevance(model, inputs, own, lambda index, *_: masks[index][sample])
        return matrices

    mixed = of_row(start - 1)
    for row in range(start, query_row + 1):
        for layer, fresh in zip(mixed, of_row(row), strict=True):
            layer[row] = fresh[row]
    return oracle.post_steps(oracle.product(mixed)[query_row], query_row)


@pytest.mark.usefixtures("never_whole")
@pytest.mark.parametrize("name", models.NAMES)
def test_lvlm_interpret_on_shared_rows(name: str, descents: list) -> None:
    model, inputs = build(name, batch=2, padding="left")
    every = [models.answer_targets(inputs, sample) for sample in range(2)]
    targets = [every[0][0], every[0][2], every[1][1]]
    options = {"method": "lvlm_interpret", "prompt_length": start_of_answer(inputs)}
    exact = fx.relevancy_rows(model, inputs, targets, **options)
    found = fx.relevancy_rows(model, inputs, targets, row_tolerance=ALL_ROWS, **options)
    assert errors(found, exact, targets).max() <= 1e-10
    found = fx.relevancy_rows(model, inputs, targets, memory="min", row_tolerance=0.2, **options)
    assert 1e-6 < errors(found, exact, targets).max() <= 0.05
    masks = []
    for selection in reversed(descents[-1][1]):
        assert selection.rows.shape[1] == 1, "one set of rows for all backwards"
        masks.append(torch.zeros(inputs["input_ids"].shape, dtype=torch.bool).scatter(1, selection.rows[:, 0], True))
    for index, target in enumerate(targets):
        truth = interpret_on_rows(model, inputs, target, options["prompt_length"], masks)
        assert errors(found[index, None], truth[None], [target]) <= 1e-10


# 5. Which rows, and what is said about them.
def smallest_set(norms: Sequence[float], tolerance: Fraction) -> int:
    """How many rows the smallest set that holds 1 − ε of the norm has; every subset is looked at, in fractions."""
    exact = [Fraction(norm) for norm in norms]
    wanted = (1 - tolerance) * sum(exact)
    sizes = range(1, len(exact) + 1)
    return next(size for size in sizes if any(sum(rows) >= wanted for rows in combinations(exact, size)))


def some_norms(kind: str, seed: int, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "random":
        return torch.rand(shape, generator=generator) ** 3
    norms = torch.randint(0, 4, shape, generator=generator).float()  # ties, zeros, sums that meet the share exactly
    norms[0, 0] = 0
    return norms


@pytest.mark.parametrize("tolerance", [0.0, 0.125, 0.5, 0.875])  # in binary 1 − ε is then exact
@pytest.mark.parametrize("kind", ["random", "ties"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("relevancy", ["none", "one for all targets", "one each"])
def test_the_rows_are_the_smallest_set_that_holds_the_share(
    kind: str, tolerance: float, seed: int, relevancy: str
) -> None:
    norms = some_norms(kind, seed, (2, 3, 7))
    scores, running = norms, None
    if relevancy != "none":
        running = some_norms("random", seed + 10, (2, 3 if relevancy == "one each" else 1, 7))
        running[0, 0, 2] = 0
        parts = norms.double() * running
        tiny = 1e-300
        scores = norms.double() / norms.double().sum(-1, keepdim=True).clamp(min=tiny)
        scores = scores + 5 * parts / parts.sum(-1, keepdim=True).clamp(min=tiny)
    selection = select_rows(norms, tolerance, relevancy=running)
    assert torch.equal(selection.norms, norms)
    size = selection.rows.shape[-1]
    assert selection.rows.shape == (2, 3, size) and selection.counts.shape == (2, 3)
    assert size == selection.counts.max()
    assert (selection.rows.diff(dim=-1) > 0).all(), "ascending, none twice"
    for sample in range(2):
        for target in range(3):
            of_target = scores[sample, target].tolist()
            if tolerance == 0:
                count = max(1, sum(norm > 0 for norm in of_target))
            else:
                count = smallest_set(of_target, Fraction(tolerance))
            assert selection.counts[sample, target] == count
            # Filled up with the next largest: the n largest of all, whichever of equal ones.
            rows = selection.rows[sample, target].tolist()
            assert sorted(of_target[row] for row in rows) == sorted(of_target)[-size:]
            left = [0.0 if row in rows else norm for row, norm in enumerate(norms[sample, target].tolist())]
            assert selection.left_out()[sample, target].tolist() == left


@pytest.mark.parametrize("tolerance", [0.0, 0.125, 0.5, 0.875])
@pytest.mark.parametrize("seed", range(6))
def test_shared_rows_are_the_union(tolerance: float, seed: int) -> None:
    norms = some_norms("random", seed, (3, 2, 7))
    norms[0, :, 4:] = 0  # a sample that needs fewer rows than the others, and is filled up
    norms[1, 0] *= 1e3  # the targets' scales differ; shares are compared, not norms
    selection = select_rows(norms, tolerance, shared=True)
    own = select_rows(norms, tolerance)
    unions = []
    for sample in range(3):
        union: set[int] = set()
        for target in range(2):
            largest = norms[sample, target].argsort(descending=True)
            union |= set(largest[: own.counts[sample, target]].tolist())
        unions.append(union)
    size = max(map(len, unions))
    assert selection.rows.shape == (3, 2, size)
    assert (selection.rows.diff(dim=-1) > 0).all()
    shares = (norms.double() / norms.double().sum(-1, keepdim=True)).amax(1)
    for sample, union in enumerate(unions):
        assert selection.counts[sample].tolist() == [len(union)] * 2
        others = sorted(set(range(7)) - union, key=lambda row, sample=sample: (-float(shares[sample, row]), row))
        expected = sorted(union | set(others[: size - len(union)]))
        assert selection.rows[sample].tolist() == [expected] * 2


def test_shared_rows_with_ties_hold_every_target_s_share() -> None:
    for seed in range(20):
        norms = some_norms("ties", seed, (2, 3, 9))
        selection = select_rows(norms, 0.25, shared=True)
        assert (selection.rows == selection.rows[:, :1]).all()
        assert (selection.rows.diff(dim=-1) > 0).all()
        assert (selection.left_out().sum(-1) <= 0.25 * norms.sum(-1)).all()
        assert selection.rows.shape[-1] == selection.counts.max() <= select_rows(norms, 0.25).counts.sum(-1).max()


def test_a_small_tolerance_is_not_lost_in_rounding() -> None:
    """Steps of 1e-8 of the sum, which sums in fp32 cannot tell apart."""
    norms = torch.full((1, 1, 4000), 1e-8)
    norms[0, 0, 17] = 1.0
    for tolerance, count in ((1e-4, 1), (2.0005e-5, 2000), (1.005e-6, 3900)):
        # The sum is 1.00004: the last two leave out 2000.6 and 100.5 of the small ones at most.
        assert int(select_rows(norms, tolerance).counts) == count


def test_a_target_without_a_gradient_keeps_one_row() -> None:
    for tolerance in (0.0, 0.1):
        for shared in (False, True):
            selection = select_rows(torch.zeros(1, 2, 5), tolerance, shared=shared)
            assert selection.rows.shape == (1, 2, 1) and selection.counts.tolist() == [[1, 1]]


@pytest.mark.parametrize("shape", [(11, 4), (1, 11, 4), (2, 11, 4), (3, 1, 11, 4), (3, 2, 11, 4)])
def test_what_a_layer_is_given_per_row(shape: tuple[int, ...]) -> None:
    """Samples and slots folded, slots fastest; without an axis for samples, what is given holds for all of them."""
    rows = torch.tensor([[[0, 3], [2, 10]], [[4, 5], [1, 9]]])  # B = 2 samples, N = 2 slots
    angles, mask = torch.randn(shape), torch.zeros(2, 1, 11, 2)
    positions = angles[..., 0]
    given = {"position_embeddings": (angles, -angles), "position_ids": positions, "attention_mask": mask, "flag": None}
    found = rows_of_call(given, rows, 11)
    assert found["attention_mask"] is mask and found["flag"] is None
    for number, (sample, slot) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        of_sample = angles if len(shape) == 2 else angles[..., sample if shape[-3] == 2 else 0, :, :]
        expected = of_sample[..., rows[sample, slot], :]
        cosine, sine = (each[..., number, :, :] for each in found["position_embeddings"])
        assert torch.equal(cosine, expected) and torch.equal(sine, -expected)
        assert torch.equal(found["position_ids"][..., number, :], expected[..., 0])


def test_the_ledger_s_sums() -> None:
    """One layer by hand, top layer first as a sweep goes; the other was swept whole."""
    norms = torch.tensor([[[3.0, 1.0, 0.0], [0.0, 2.0, 2.0]]])
    selection = Selection(torch.tensor([[[0], [2]]]), torch.ones(1, 2, dtype=torch.int64), norms)
    row = torch.tensor([[[1.0, 0.5, 0.0], [0.0, 1.0, 0.25]]])
    product = torch.tensor([[[0.2, 0.1, 0.0], [0.0, 0.4, 0.1]]])
    finished = torch.tensor([[[1.5, 0.0, 0.0], [1.0, 1.0, 3.0]]])  # 0.5 and 4 were added to the self entry
    # Target 0: the kept row added 0.3 for row·norm = 3, the other has 0.5: 0.05 of 0.5 added. Target 1: 0.5 · 2 / 0.5.
    for factors, expected in (((1.0, 0.0), [0.1, 0.5]), ((0.0, 1.0), [0.125, 0.25]), ((2.0, 4.0), [0.7, 2.0])):
        ledger = Ledger(factors)
        ledger.enter(selection, row, product)
        ledger.enter(None, row, product)
        rows_kept, dropped, error = ledger.close(finished)
        torch.testing.assert_close(error, torch.tensor([expected]))
        assert rows_kept.tolist() == [[[3, 1], [3, 1]]]
        torch.testing.assert_close(dropped, torch.tensor([[[0.0, 0.25], [0.0, 0.5]]]))


def test_rows_whose_sums_are_one_are_chosen_by_their_relevancy() -> None:
    norms = torch.tensor([[[4.0, 1.0, 0.5, 0.0, 3.0]]])
    own = torch.tensor([[[0.0, 0.0, 0.0, 0.0, 1.0]]])
    row = own + torch.tensor([[[0.01, 0.02, 0.6, 5.0, 0.3]]])  # the row without a gradient adds nothing

    def kept(tolerance: float) -> list[int]:
        return select_rows(norms, tolerance, relevancy=row, own=own).rows[0, 0].tolist()

    # Of the others row 2 has 0.6 of 0.63 of the relevancy, row 0 has 4 of 8.5 of the gradient, in the score's order.
    assert kept(0.99) == [2, 4]
    assert kept(0.1) == [0, 2, 4]
    assert kept(0.0) == [0, 1, 2, 4]
    alone = select_rows(torch.tensor([[[0.0, 0.0, 1.0]]]), 0.1, relevancy=own[..., 2:], own=own[..., 2:])
    assert alone.rows.tolist() == [[[2]]], "no other row has a gradient"


@pytest.mark.parametrize("method", ["chefer", "lvlm_interpret"])
@pytest.mark.parametrize("tolerance", [0.0, 0.01, 0.1])
def test_the_certificate_bounds_what_was_left_out(method: str, tolerance: float) -> None:
    model, inputs = models.build("llava_next", torch.float32, batch=2, padding="left")
    columns = inputs["input_ids"].shape[1]
    targets = [*models.answer_targets(inputs, 1)[:2], *models.answer_targets(inputs, 0)]
    options = {"method": method, "prompt_length": start_of_answer(inputs)}
    found = explain_rows(model, inputs, targets, row_tolerance=tolerance, **options)
    certificate = found.certificate
    assert certificate is not None
    assert certificate.rows_kept.shape == certificate.dropped.shape == (8, 3)
    assert certificate.error.shape == (8,)
    # The gradient's share is one of two in the score of which ε is left out, the smaller one.
    assert (certificate.dropped <= (1 + pruning.RELEVANCY_WEIGHT) * tolerance + 1e-6).all()
    assert (certificate.dropped[certificate.rows_kept == columns] == 0).all()
    assert ((certificate.rows_kept >= 1) & (certificate.rows_kept <= columns)).all()
    if tolerance == 0:
        assert (certificate.rows_kept == columns).all()
        assert (certificate.error == 0).all()
    elif method == "chefer":
        assert (certificate.rows_kept[:, -1] == 1).all() and (certificate.dropped[:, -1] == 0).all()
        assert (certificate.dropped[:, 1] > 0).all() == (tolerance == 0.1)
        assert ((certificate.error > 0) == (certificate.dropped > 0).any(-1)).all()


def test_the_estimate_is_above_the_error() -> None:
    """In 95 % of the cases, as it is calibrated; random models are not among what it was calibrated on."""
    estimated, true = [], []
    for name in ("llama", "llava_next", "qwen2_5_vl", "smolvlm", "gemma3"):
        model, inputs = build(name, text=40)
        targets = models.answer_targets(inputs, 0)
        exact = fx.relevancy_rows(model, inputs, targets)
        for tolerance in (0.1, 0.3, 0.5):
            found = explain_rows(model, inputs, targets, row_tolerance=tolerance)
            assert found.certificate is not None
            estimated.append(found.certificate.error)
            true.append(errors(found.rows, exact, targets))
    left_out = torch.cat(estimated) > 0
    assert left_out.sum() >= 60
    assert (torch.cat(true)[~left_out] <= 1e-6).all()
    assert (torch.cat(true) <= torch.cat(estimated))[left_out].float().mean() >= 0.95


def test_logits_and_the_method_without_a_sweep_do_not_change() -> None:
    model, inputs = models.build("llava", torch.float32, batch=2, padding="left")
    targets = some_targets(inputs)
    exact = explain_rows(model, inputs, targets)
    found = explain_rows(model, inputs, targets, row_tolerance=0.3)
    assert torch.equal(found.logits, exact.logits) and torch.equal(found.probabilities, exact.probabilities)
    for tolerance in (0.3, "auto"):
        raw = explain_rows(model, inputs, targets, method="raw_attention", row_tolerance=tolerance)
        assert torch.equal(raw.rows, fx.relevancy_rows(model, inputs, targets, method="raw_attention"))
        assert raw.certificate is None and raw.fallback is None


# 6. "auto".
def in_bf16(name: str, text: int = 12) -> tuple[nn.Module, dict[str, Any], list[Target]]:
    model, inputs = models.build(name, torch.bfloat16, text=text)
    return model, inputs, models.answer_targets(inputs, 0)[:3]


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_auto_is_exact_where_rounding_is_small_or_unknown(
    dtype: torch.dtype, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "SHORTEST_PRUNED", 1)
    model, inputs = models.build("llava", dtype)
    targets = models.answer_targets(inputs, 0)
    exact = fx.relevancy_rows(model, inputs, targets, memory=memory)
    runs = calls_in(model)
    found = explain_rows(model, inputs, targets, memory=memory, row_tolerance="auto")
    assert torch.equal(found.rows, exact)
    assert found.certificate is not None and (found.certificate.error == 0).all()
    assert runs[0] == RUNS_OF_A_LAYER[memory], "fast mode keeps the graphs of its forward"


def test_auto_is_exact_for_a_short_sequence() -> None:
    model, inputs, targets = in_bf16("llava")
    assert inputs["input_ids"].shape[1] < pruning.SHORTEST_PRUNED
    exact = fx.relevancy_rows(model, inputs, targets)
    runs = calls_in(model)
    assert torch.equal(fx.relevancy_rows(model, inputs, targets, row_tolerance="auto"), exact)
    assert runs[0] == 1


@pytest.mark.parametrize("name", ["llama", "llava", "qwen3_vl", "gemma3"])
def test_auto_prunes_below_the_dtype_s_rounding(name: str, descents: list) -> None:
    model, inputs, targets = in_bf16(name, text=140)
    columns = inputs["input_ids"].shape[1]
    assert columns >= pruning.SHORTEST_PRUNED
    found = explain_rows(model, inputs, targets, row_tolerance="auto")
    limit = pruning.ROUNDING_ERROR[torch.bfloat16]
    assert found.certificate is not None and (found.certificate.error <= limit).all()
    tried = [tolerance for tolerance, _ in descents]
    assert tried == [*pruning.AUTO_TOLERANCES, 0.0][: len(tried)]
    assert found.certificate.rows_kept[:, -1].tolist() == [1 if tried[-1] else columns] * 3
    # The estimate is of what pruning adds. Two bf16 sweeps, the exact one included, are each 2e-2 off at most.
    exact = fx.relevancy_rows(model, inputs, targets)
    assert errors(found.rows, exact, targets).max() <= 0.04


@pytest.mark.usefixtures("never_whole")
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("method", ["chefer", "lvlm_interpret"])
@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_auto_ends_with_the_exact_sweep(
    name: str, method: str, memory: str, descents: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No estimate is good enough: every attempt is made over the same forward, in two chunks for `chefer`."""
    monkeypatch.setattr(pruning, "SHORTEST_PRUNED", 1)
    monkeypatch.setattr(pruning, "AUTO_TOLERANCES", (0.1, 0.03))
    monkeypatch.setitem(pruning.ROUNDING_ERROR, torch.bfloat16, 0.0)
    model, inputs, targets = in_bf16(name)
    slot = inputs["input_ids"].numel() * models.WIDTH * 2  # bytes
    monkeypatch.setattr(_base, "GRADIENT_BUDGET_BYTES", 2 * slot)
    options = {"method": method, "prompt_length": start_of_answer(inputs)}
    # Recomputed layers as in the sweep that starts over; fast mode's kept graphs give the same numbers.
    exact = explain_rows(model, inputs, targets, memory="lean", **options)
    descents.clear()
    found = explain_rows(model, inputs, targets, memory=memory, row_tolerance="auto", **options)
    assert [tolerance for tolerance, _ in descents] == [0.1, 0.03, 0.0] * (2 if method == "chefer" else 1)
    for tolerance, selections in descents:
        assert all((selection is None) == (tolerance == 0) for selection in selections)
    assert torch.equal(found.rows, exact.rows)
    assert kept(found) == kept(exact)
    assert found.certificate is not None and (found.certificate.error == 0).all()


@pytest.mark.usefixtures("never_whole")
@pytest.mark.parametrize("memory", MEMORY)
def test_auto_takes_the_first_tolerance_that_will_do(
    memory: str, descents: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "SHORTEST_PRUNED", 1)
    monkeypatch.setattr(pruning, "AUTO_TOLERANCES", (0.1, 0.03))
    model, inputs, targets = in_bf16("qwen3_vl")
    coarse, fine = (explain_rows(model, inputs, targets, memory=memory, row_tolerance=t) for t in (0.1, 0.03))
    assert coarse.certificate is not None and fine.certificate is not None
    # One target above the limit is enough to try again.
    low, high = float(fine.certificate.error.max()), float(coarse.certificate.error.max())
    assert 0 < low < high
    for limit, expected, tried in ((2 * high, coarse, [0.1]), ((low + high) / 2, fine, [0.1, 0.03])):
        monkeypatch.setitem(pruning.ROUNDING_ERROR, torch.bfloat16, limit)
        descents.clear()
        found = explain_rows(model, inputs, targets, memory=memory, row_tolerance="auto")
        assert [tolerance for tolerance, _ in descents] == tried
        assert torch.equal(found.rows, expected.rows)
        assert kept(found) == kept(expected)
        assert found.certificate is not None
        assert torch.equal(found.certificate.error, expected.certificate.error)


# 7. Layers that cannot be called on a part of their rows.
class Gated(nn.Module):
    """A decoder layer whose output is scaled row by row, with the gain it is called with."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, row_gain: Any = None, **kwargs: Any) -> Tensor:
        (gain,) = row_gain if isinstance(row_gain, tuple) else (row_gain,)
        return self.layer(hidden_states, **kwargs) * gain


def gated(gain: Tensor, given: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model whose top layer gets `gain`: by keyword, by position, or in a tuple."""
    model, inputs = models.build("llama", torch.float32)

    def give(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if given == "position":
            return (args[0], gain), kwargs
        return args, {**kwargs, "row_gain": (gain,) if given == "tuple" else gain}

    model.model.layers[-1] = Gated(model.model.layers[-1])
    model.model.layers[-1].register_forward_pre_hook(give, with_kwargs=True)
    return model, inputs


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize(
    ("given", "name"), [("keyword", "row_gain"), ("tuple", "row_gain"), ("position", "argument 0")]
)
def test_below_an_unknown_entry_per_row_all_layers_are_swept_whole(given: str, name: str, memory: str) -> None:
    columns = 19
    model, inputs = gated(torch.linspace(0.5, 1.5, columns)[None, :, None], given)
    assert inputs["input_ids"].shape == (1, columns)
    targets = models.answer_targets(inputs, 0)
    exact = explain_rows(model, inputs, targets, memory="lean")
    found = explain_rows(model, inputs, targets, memory=memory, row_tolerance=0.3)
    assert found.fallback is not None and found.fallback.startswith(f"Gated: its {name} has an entry for each row")
    assert torch.equal(found.rows, exact.rows)
    assert kept(found) == [[columns] * 3] * len(targets)
    assert found.certificate is not None and (found.certificate.error == 0).all()
    assert exact.fallback is None, "an exact sweep falls back from nothing"


@pytest.mark.parametrize("given", ["keyword", "tuple", "position"])
def test_an_argument_that_is_the_same_for_all_rows_is_no_reason(given: str) -> None:
    model, inputs = gated(torch.tensor([[[0.9]]]), given)
    targets = models.answer_targets(inputs, 0)[2:3]
    found = explain_rows(model, inputs, targets, row_tolerance=0.3)
    assert found.fallback is None
    truth, counts = oracle.pruned_chefer_row(model.double(), inputs, targets[0], 0.3)
    assert kept(found) == [counts] and max(counts) < 19
    assert errors(found.rows, truth[None], targets) <= 1e-5


# 8. No trace.
@pytest.fixture
def in_use() -> tuple[nn.Module, dict[str, Any]]:
    """A model in the middle of its owner's work: partly frozen, in training mode, with gradients."""
    model, inputs = models.build("llava", torch.float32)
    put_to_use(model)
    return model, inputs


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("method", ["chefer", "lvlm_interpret"])
def test_the_model_comes_back_as_it_was(in_use: tuple[nn.Module, dict], memory: str, method: str) -> None:
    model, inputs = in_use
    before = fingerprint(model)
    targets = models.answer_targets(inputs, 0)
    options = {"method": method, "prompt_length": start_of_answer(inputs)}
    fx.relevancy_rows(model, inputs, targets, memory=memory, row_tolerance=0.4, **options)
    assert_same(before, fingerprint(model))
    assert current_tape.get() is None
    assert torch.is_grad_enabled()


@pytest.mark.usefixtures("never_whole")
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("where", ["product", "attention", "keys", "rows"])
@pytest.mark.parametrize("error", [RuntimeError, Stop])
def test_an_exception_in_the_middle_leaves_nothing_behind(
    in_use: tuple[nn.Module, dict],
    memory: str,
    where: str,
    error: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """In the second layer from the top, whose rows are pruned; the first is through by then."""
    model, inputs = in_use
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    targets = models.answer_targets(inputs, 0)
    expected = fx.relevancy_rows(model, inputs, targets, memory=memory, row_tolerance=0.3)
    before = fingerprint(model)
    layer = model.get_decoder().layers[1]
    owner, name = {
        "product": (attention.ops, "attention_backward_relevancy"),
        "attention": (attention.FlashAttention, "backward"),
        "keys": (layer.self_attn.k_proj, "forward"),  # called in the forward, for all keys, and for the kept rows
        "rows": (layer.mlp, "forward"),  # called in the forward and for the kept rows
    }[where]
    original, calls = getattr(owner, name), [0]

    def fail_second(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise error
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, staticmethod(fail_second) if where == "attention" else fail_second)
        with pytest.raises(error):
            fx.relevancy_rows(model, inputs, targets, memory=memory, row_tolerance=0.3)
    assert calls[0] == 2
    assert_same(before, fingerprint(model))
    assert current_tape.get() is None
    assert torch.is_grad_enabled()
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(fx.relevancy_rows(model, inputs, targets, memory=memory, row_tolerance=0.3), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("memory", MEMORY)
def test_the_caller_s_gradient_mode_does_not_matter(mode: type, memory: str) -> None:
    model, inputs = models.build("qwen3_vl", torch.float32)
    targets = models.answer_targets(inputs, 0)
    expected = fx.relevancy_rows(model, inputs, targets, row_tolerance=0.4)
    with mode():
        found = fx.relevancy_rows(model, inputs, targets, memory=memory, row_tolerance=0.4)
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_two_models_in_two_threads() -> None:
    """A tape of the wrong thread would give a layer the other model's keys."""
    pairs = [models.build("llava", torch.float32), models.build("qwen2_5_vl", torch.float32)]

    def explain(index: int, memory: str) -> RelevancyRows:
        model, inputs = pairs[index]
        return explain_rows(model, inputs, models.answer_targets(inputs, 0), memory=memory, row_tolerance=0.3)

    expected = [explain(index, "fast") for index in range(2)]
    assert all(alone.certificate is not None and (alone.certificate.error > 0).any() for alone in expected)
    failures: list[str] = []

    def run(index: int) -> None:
        for memory in MEMORY * 3:
            found = explain(index, memory)
            if not torch.allclose(found.rows, expected[index].rows, rtol=1e-5, atol=1e-7):
                failures.append(f"model {index}, {memory}: other rows")

    in_two_threads(run)
    assert failures == []


# 9. Nothing quadratic in S, but for blocks of at most ROW_BLOCK rows with their own mask.
@pytest.mark.usefixtures("never_whole")
@pytest.mark.parametrize("name", ["llama", "llava", "qwen3_vl", "paligemma", "gemma3"])
def test_no_tensor_is_quadratic_in_the_sequence(name: str, descents: list) -> None:
    model, inputs = long_batch(name)
    targets = [models.answer_targets(inputs, 0)[0], models.answer_targets(inputs, 0)[-1]]
    targets += [models.answer_targets(inputs, 1)[2]]
    # One backward per token up to the last explained one, and each folds its rows into the batch: few, so that a size
    # LENGTH² still means a square.
    early = [models.answer_targets(inputs, 0)[1], models.answer_targets(inputs, 1)[0]]
    for method, memory in [*(("chefer", memory) for memory in MEMORY), ("lvlm_interpret", "fast")]:
        options = {"method": method, "memory": memory, "prompt_length": start_of_answer(inputs)}
        explained = targets if method == "chefer" else early
        descents.clear()
        with NoSquare(LENGTH) as guard:
            rows = fx.relevancy_rows(model, inputs, explained, row_tolerance=0.01, **options)
        assert rows.shape == (len(explained), LENGTH)
        assert guard.calls > 100
        ((_, selections),) = descents
        assert all(selection is not None for selection in selections)
        if name != "gemma3":  # its window ends the gradient within a few rows
            bottom = selections[-1].rows
            assert bottom.shape[-1] > plan.ROW_BLOCK, "fewer rows than a block is high"
            assert (bottom.diff(dim=-1) > 1).any(), "rows without a gap need no mask"


@pytest.mark.usefixtures("never_whole")
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_no_operator_allocates_a_square_inside(name: str) -> None:
    model, inputs = long_batch(name)
    targets = models.answer_targets(inputs, 0)[:2]
    for memory in MEMORY:
        with largest_allocation() as largest:
            fx.relevancy_rows(model, inputs, targets, memory=memory, row_tolerance=0.05)
        assert 0 < largest[0] < 4 * LENGTH**2
