"""The eight oracles of the relevancy definition, on a tiny model of every family."""

from __future__ import annotations

import copy

import pytest
import torch
from support import models, oracle
from support.rows import (
    LENGTH,
    MEMORY,
    NoSquare,
    cast,
    errors,
    largest_allocation,
    long_batch,
    some_targets,
    without_self,
)

import lvlm_fastxai as fx
from lvlm_fastxai.sweep.descent import Descent
from lvlm_fastxai.sweep.forward import Sweep
from lvlm_fastxai.sweep.targets import check_targets

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", models.NAMES)
def test_the_dense_oracle_computes_the_model_s_own_logits(name: str) -> None:
    model, inputs = models.build(name, torch.float32, batch=2, padding="left")
    before = model.config.get_text_config()._attn_implementation
    logits, kept = oracle.forward(model, inputs)
    assert len(kept) == model.config.get_text_config().num_hidden_layers
    assert model.config.get_text_config()._attn_implementation == before
    model.set_attn_implementation("eager")
    seen = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs).logits[seen]
    # Rounding grows with the logits: on a processor without AVX-512, PaliGemma's of 16 differ by 1.3e-5.
    torch.testing.assert_close(logits[seen], expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


# 1. The dense R in fp64 against the swept row.
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("name", models.NAMES)
def test_1_rows_equal_the_dense_product(name: str, memory: str) -> None:
    model, inputs = models.build(name, batch=2, padding="left" if memory != "lean" else "right")
    targets = some_targets(inputs)
    truth = oracle.chefer_rows(model, inputs, targets)
    assert (without_self(truth, targets).sum(-1) > 0.1).all(), "a degenerate model proves nothing"
    found = fx.relevancy_rows(model, inputs, targets, memory=memory)
    assert errors(found, truth, targets).max() <= 1e-10
    single = copy.deepcopy(model).float()
    found = fx.relevancy_rows(single, cast(inputs, torch.float32), targets, memory=memory)
    truth = oracle.chefer_rows(single.double(), cast(cast(inputs, torch.float32), torch.float64), targets)
    assert found.dtype == torch.float32
    assert errors(found, truth, targets).max() <= 1e-5


# 2. 16-bit within twice eager's own error.
@pytest.mark.parametrize("name", models.NAMES)
def test_2_bf16_errs_at_most_twice_as_much_as_eager(name: str) -> None:
    ours, eager = [], []
    for seed in range(4):
        model, inputs = models.build(name, torch.bfloat16, seed=seed, text=20)
        targets = models.answer_targets(inputs, 0)
        truth = oracle.chefer_rows(copy.deepcopy(model).double(), cast(inputs, torch.float64), targets)
        ours.append(errors(fx.relevancy_rows(model, inputs, targets), truth, targets))
        eager.append(errors(oracle.chefer_rows(model, inputs, targets), truth, targets))
    # One target's two errors are two draws of rounding noise; their means over 24 targets can be compared.
    assert torch.cat(ours).mean() <= 2 * torch.cat(eager).mean()


# 3. dP = dO Vᵀ is autograd's gradient at the post-softmax attention.
@pytest.mark.parametrize("name", models.NAMES)
def test_3_the_gradient_of_the_attention_is_rebuilt_from_its_output(name: str) -> None:
    model, inputs = models.build(name)
    target = models.answer_targets(inputs, 0)[2]
    logits, kept = oracle.forward(model, inputs)
    dense = oracle.gradients(logits, kept, target)
    targets = check_targets([target], inputs, None)
    with Sweep(model, inputs, targets.row_table()) as sweep:
        for step in Descent(sweep, targets.scalars(sweep.logits)):
            groups = step.query.shape[1] // step.key.shape[1]
            key, value = (x[0].repeat_interleave(groups, dim=0) for x in (step.key, step.value))
            gradient = step.grad_output[0, 0] @ value.mT  # (H, S, S)
            probabilities = (step.scale * step.query[0] @ key.mT - step.logsumexp[0, :, :, None].double()).exp()
            visible = kept[step.index].probabilities[0] > 0
            truth = dense[step.index]
            assert (gradient - truth).abs().sum() <= 1e-10 * truth.abs().sum()
            kept_there = kept[step.index].probabilities[0]
            assert (probabilities - kept_there)[visible].abs().max() <= 1e-6


# 4. Off by one: seen from its own position, a token's logit depends on nothing.
@pytest.mark.parametrize("name", models.NAMES)
def test_4_the_row_at_the_token_s_own_position_is_a_unit_vector(name: str) -> None:
    model, inputs = models.build(name)
    sample, query_row, token = models.answer_targets(inputs, 0)[-2]
    own = query_row + 1
    logits, kept = oracle.forward(model, inputs)
    layers = oracle.relevance(kept, oracle.gradients(logits, kept, (sample, query_row, token)), sample)
    unit = torch.zeros(layers[0].shape[-1], dtype=torch.float64)
    unit[own] = 1.0
    assert torch.equal(oracle.product(layers)[own].detach(), unit)
    # The swept rows must not see it either: nothing at or after the token itself.
    for method in ("chefer", "raw_attention"):
        row = fx.relevancy_rows(model, inputs, [(sample, query_row, token)], method=method)[0]
        assert (row[own:] == 0).all()
        assert row[query_row] > 0


# 5. Chefer's rule is not invariant to the scale of the logit.
@pytest.mark.parametrize("name", ["llama", "llava", "qwen2_5_vl"])
def test_5_a_temperature_changes_chefer_rows(name: str) -> None:
    model, inputs = models.build(name)
    targets = models.answer_targets(inputs, 0)[:2]
    plain = fx.relevancy_rows(model, inputs, targets)
    truth = oracle.chefer_rows(model, inputs, targets, temperature=0.2)
    model.lm_head.weight.data /= 0.2
    sharp = fx.relevancy_rows(model, inputs, targets)
    assert errors(sharp, truth, targets).max() <= 1e-10
    shares = [
        rows / rows.sum(-1, keepdim=True) for rows in (without_self(plain, targets), without_self(sharp, targets))
    ]
    assert (shares[0] - shares[1]).abs().sum(-1).min() > 1e-2, "not only the scale, the map itself differs"


# 6. LVLM-Interpret's generation-time maps.
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("name", models.NAMES)
def test_6_lvlm_interpret_equals_its_dense_construction(name: str, memory: str) -> None:
    model, inputs = models.build(name, batch=2, padding="left")
    every = [models.answer_targets(inputs, sample) for sample in range(2)]
    starts = [answer[0][1] + 1 for answer in every]
    assert starts[0] == starts[1]
    targets = [every[0][0], every[0][1], every[0][4], every[1][3], every[1][0]]
    found = fx.relevancy_rows(model, inputs, targets, method="lvlm_interpret", memory=memory, prompt_length=starts[0])
    truth = oracle.lvlm_interpret_rows(model, inputs, targets, starts[0])
    assert oracle.relative_error(found, truth).max() <= 1e-10
    chefer = oracle.chefer_rows(model, inputs, targets)
    processed = torch.stack([oracle.post_steps(row, q) for row, (_, q, _) in zip(chefer, targets, strict=True)])
    distance = oracle.relative_error(found, processed)
    assert distance[[0, 4]].max() <= 1e-10
    assert distance[[1, 2, 3]].min() > 1e-3


@pytest.mark.parametrize("name", models.NAMES)
def test_raw_attention_is_the_last_layer_s_mean_row(name: str) -> None:
    model, inputs = models.build(name, batch=2, padding="right")
    targets = some_targets(inputs)
    found = fx.relevancy_rows(model, inputs, targets, method="raw_attention")
    assert oracle.relative_error(found, oracle.raw_attention_rows(model, inputs, targets)).max() <= 1e-10


# 7. What else is in the batch does not matter.
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", models.NAMES)
def test_7_rows_do_not_depend_on_the_batch(name: str, side: str) -> None:
    model = models.make_model(name)
    samples = [models.make_sample(name, model, seed=10 * i, text=10 + 4 * i) for i in range(3)]
    alone = [fx.relevancy_rows(model, s, some_targets(s)) for s in samples]
    longest = max(s["input_ids"].shape[1] for s in samples)
    for order, length in (([0, 1, 2], 0), ([2, 0, 1], 0), ([1], longest + 3), ([1, 0], longest + 3)):
        batch = models.join(name, [samples[i] for i in order], side, length)
        for place, i in enumerate(order):
            width = samples[i]["input_ids"].shape[1]
            shift = batch["input_ids"].shape[1] - width if side == "left" else 0
            targets = some_targets(samples[i])
            moved = [(place, query_row + shift, token) for _, query_row, token in targets]
            rows = fx.relevancy_rows(model, batch, moved)
            inside = rows[:, shift : shift + width]
            assert errors(inside, alone[i], targets).max() <= 1e-10
            assert rows.count_nonzero() == inside.count_nonzero()


"""Columns in the guarded runs: more than any width, vocabulary or number of patches of a tiny model."""


@pytest.mark.parametrize("name", models.NAMES)
def test_8_no_tensor_is_quadratic_in_the_sequence(name: str) -> None:
    model, inputs = long_batch(name)
    targets = [models.answer_targets(inputs, 0)[0], models.answer_targets(inputs, 0)[-1]]
    targets += [models.answer_targets(inputs, 1)[2]]
    start = models.answer_targets(inputs, 0)[0][1] + 1
    for method, memory in [
        *(("chefer", memory) for memory in MEMORY),
        ("lvlm_interpret", "fast"),
        ("lvlm_interpret", "lean"),
        ("glimpse", "fast"),
        ("glimpse", "lean"),
        ("raw_attention", "fast"),
    ]:
        options = {"method": method, "memory": memory, "prompt_length": start}
        with NoSquare(LENGTH) as guard:
            rows = fx.relevancy_rows(model, inputs, targets, **options)
        assert rows.shape == (3, LENGTH)
        assert guard.calls > 100


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("name", ["llava", "gemma3", "paligemma", "qwen2_5_vl"])
def test_8_no_operator_allocates_a_square_inside(name: str, memory: str) -> None:
    model, inputs = long_batch(name)
    targets = models.answer_targets(inputs, 0)[:2]
    for method in ("chefer", "glimpse"):
        with largest_allocation() as largest:
            fx.relevancy_rows(model, inputs, targets, method=method, memory=memory)
        assert 0 < largest[0] < 4 * LENGTH**2


def test_8_the_guards_see_a_square() -> None:
    model, inputs = long_batch("llava")
    targets = models.answer_targets(inputs, 0)[:1]
    with pytest.raises(AssertionError, match="made a tensor"), NoSquare(LENGTH):
        oracle.chefer_rows(model, inputs, targets)
    square = torch.ones(LENGTH, LENGTH, requires_grad=True)
    product = (torch.ones(1, LENGTH) @ square).sum()
    with pytest.raises(AssertionError, match="made a tensor"), NoSquare(LENGTH):  # in a backward
        torch.autograd.grad(product, square)
    with largest_allocation() as largest:
        oracle.chefer_rows(model, inputs, targets)
    assert largest[0] >= 4 * LENGTH**2
