"""GLIMPSE's rows against R made of dense matrices, and what the definition promises of them."""

from __future__ import annotations

import copy
import itertools
import json
import math
from typing import Any

import pytest
import torch
from support import models, oracle
from support.oracle import Target
from support.rows import MEMORY, cast, errors, some_targets
from torch import Tensor

import lvlm_fastxai as fx
from lvlm_fastxai.errors import ArgumentError, UnsupportedModelError
from lvlm_fastxai.explain.relevancy_rows import explain_rows
from lvlm_fastxai.methods import Glimpse
from lvlm_fastxai.sweep.descent import Descent
from lvlm_fastxai.sweep.forward import Sweep
from lvlm_fastxai.sweep.sharding import Ranks
from lvlm_fastxai.sweep.targets import check_targets

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("llava", "qwen2_5_vl")
ROUTES = ("one_sweep", "two_sweeps")


def rows(model: Any, inputs: Any, targets: list[Target], memory: str = "fast", **options: Any) -> Tensor:
    return fx.relevancy_rows(
        model, inputs, targets, method="glimpse", memory=memory, options=fx.GlimpseOptions(**options)
    )


def build(name: str, **how: Any) -> tuple[Any, dict[str, Any], list[Target]]:
    model, inputs = models.build(name, **how)
    return model, inputs, some_targets(inputs)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", NAMES)
def test_rows_equal_the_dense_product_with_every_option(name: str, route: str) -> None:
    model, inputs, targets = build(name, batch=2, padding="left")
    single = copy.deepcopy(model).float()
    inputs32 = cast(inputs, torch.float32)
    wide, inputs64 = copy.deepcopy(single).double(), cast(inputs32, torch.float64)
    layers = model.config.get_text_config().num_hidden_layers
    found = []
    for propagation, domain, rate, (share, top) in itertools.product(
        ("literal", "identity"), ("full", "causal"), (0.2, "scaled"), (("all", None), ("top:0.5", round(layers / 2)))
    ):
        options = {"propagation": propagation, "stats_domain": domain, "depth_rate": rate, "layers": share}
        expected = dict(options, depth_rate=0.2 * 64 / layers if rate == "scaled" else rate, top=top)
        del expected["layers"]
        truth = oracle.glimpse_rows(model, inputs, targets, **expected)
        assert errors(rows(model, inputs, targets, route=route, **options), truth, targets).max() <= 1e-6
        truth = oracle.glimpse_rows(wide, inputs64, targets, **expected)
        assert errors(rows(single, inputs32, targets, route=route, **options), truth, targets).max() <= 1e-5
        found.append(truth)
    # Options that made no difference would prove nothing.
    for one, other in itertools.combinations(found, 2):
        assert errors(one, other, targets).max() > 1e-4


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("name", models.NAMES)
def test_every_family_and_memory_mode(name: str, memory: str) -> None:
    model, inputs, targets = build(name, batch=2, padding="right")
    truth = oracle.glimpse_rows(model, inputs, targets)
    assert errors(rows(model, inputs, targets, memory=memory), truth, targets).max() <= 1e-6


def deep(layers: int) -> tuple[Any, dict[str, Any], list[Target]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    model: Any = LlamaForCausalLM(config).double().eval()
    return model, {"input_ids": torch.arange(12)[None]}, [(0, 11, 3), (0, 8, 9)]


@pytest.mark.parametrize("propagation", ["literal", "identity"])
@pytest.mark.parametrize("rate", [0.0, 0.2, -0.5])
def test_the_polynomial_is_cut_where_that_costs_less_than_its_bound(propagation: str, rate: float) -> None:
    model, inputs, targets = deep(16)
    options = {"propagation": propagation, "depth_rate": rate}
    terms = fx.GlimpseOptions(**options).terms(16)
    assert terms < 16, "nothing is cut"
    truth = oracle.glimpse_rows(model, inputs, targets, **options)
    one, two = rows(model, inputs, targets, **options), rows(model, inputs, targets, route="two_sweeps", **options)
    assert errors(two, truth, targets).max() <= 1e-12
    # The bound is on what a row of length 1 loses.
    assert (one - truth).abs().sum(-1).max() <= 1e-6
    assert errors(one, two, targets).max() <= 1e-6


def test_how_many_terms_are_carried() -> None:
    assert fx.GlimpseOptions().terms(32) == 7
    assert fx.GlimpseOptions(propagation="identity").terms(32) == 9
    assert 0.5**8 / math.factorial(8) < 1e-6 < 0.5**7 / math.factorial(7)
    assert fx.GlimpseOptions().terms(3) == 3
    assert fx.GlimpseOptions(layers="top:0.5").terms(4) == 2


def test_gradients_of_any_size_do_not_overflow() -> None:
    model, inputs, targets = deep(16)
    model.float()
    truth = rows(model, inputs, targets)
    with torch.no_grad():
        model.lm_head.weight *= 1e9
    scaled = rows(model, inputs, targets)
    assert torch.isfinite(scaled).all()
    assert errors(scaled, truth, targets).max() <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_depend_on_the_logit_s_scale(name: str) -> None:
    model, inputs, targets = build(name)
    truth = rows(model, inputs, targets)
    assert errors(oracle.glimpse_rows(model, inputs, targets, temperature=7.0), truth, targets).max() <= 1e-6
    of_chefer = [oracle.chefer_rows(model, inputs, targets, temperature=t) for t in (1.0, 7.0)]
    assert errors(*of_chefer, targets).max() > 0.1, "chefer's do"


@pytest.mark.parametrize("name", NAMES)
def test_the_row_at_the_token_s_own_position_is_blank(name: str) -> None:
    model, inputs, _ = build(name)
    sample, query_row, token = models.answer_targets(inputs, 0)[-2]
    row = rows(model, inputs, [(sample, query_row, token)])[0]
    assert (row[query_row + 1 :] == 0).all()
    assert row[query_row] >= 1
    assert row[:query_row].sum() > 0.01


def test_the_layer_norm_sums_heads_first() -> None:
    model, inputs, _ = build("llava")
    targets = check_targets([models.answer_targets(inputs, 0)[2]], inputs, None)
    with Sweep(model, inputs, targets.row_table()) as sweep:
        for step in Descent(sweep, targets.scalars(sweep.logits)):
            *_, norm = fx.ops.glimpse_statistics(
                step.query, step.key, step.value, step.grad_output, step.logsumexp, key_ranges=step.key_ranges
            )
            groups = step.query.shape[1] // step.key.shape[1]
            value = step.value[0].repeat_interleave(groups, dim=0)
            wide = step.grad_output[0, 0].transpose(0, 1).flatten(1) @ value.transpose(0, 1).flatten(1).T
            torch.testing.assert_close(norm[0, 0], wide.abs().sum())
            per_head = (step.grad_output[0, 0] @ value.mT).abs().sum()
            assert per_head > 1.1 * norm[0, 0]


def test_chefer_s_rows_come_of_the_same_backward() -> None:
    for dtype in (torch.float64, torch.float32):
        model, inputs = models.build("llava", dtype, batch=2, padding="left")
        targets = some_targets(inputs)
        for memory in ("fast", "lean"):
            found = explain_rows(model, inputs, targets, method="glimpse", memory=memory, compare=True)
            assert found.compared is not None
            torch.testing.assert_close(found.compared, fx.relevancy_rows(model, inputs, targets))
            torch.testing.assert_close(found.rows, rows(model, inputs, targets))
    with pytest.raises(ArgumentError, match="compare"):
        explain_rows(model, inputs, targets, method="chefer", compare=True)
    with pytest.raises(ArgumentError, match="on_rows"):
        explain_rows(model, inputs, targets, method="glimpse", compare=True, on_rows=lambda *part: None)


def test_rows_that_are_handed_on_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = models.build("llava", batch=2, padding="left")
    targets = some_targets(inputs)
    whole = explain_rows(model, inputs, targets, method="glimpse")
    monkeypatch.setattr("lvlm_fastxai.methods._base.GRADIENT_BUDGET_BYTES", 1)  # one slot a descent
    taken: list[tuple[list[int], Tensor, Tensor]] = []
    found = explain_rows(model, inputs, targets, method="glimpse", on_rows=lambda *part: taken.append(part))
    assert found.rows.shape == (0, whole.rows.shape[1])
    assert len(taken) > 1
    numbers = [number for part, _, _ in taken for number in part]
    assert sorted(numbers) == list(range(len(targets)))
    torch.testing.assert_close(torch.cat([part for _, part, _ in taken]), whole.rows[numbers])
    torch.testing.assert_close(torch.cat([part for *_, part in taken]), whole.probabilities[numbers])


@pytest.mark.parametrize("method", ["chefer", "glimpse", "lvlm_interpret"])
def test_progress_reaches_its_end(method: str) -> None:
    model, inputs = models.build("llava")
    told: list[tuple[int, int]] = []
    start = models.answer_targets(inputs, 0)[0][1] + 1
    explain_rows(
        model,
        inputs,
        models.answer_targets(inputs, 0)[:2],
        method=method,
        prompt_length=start,
        progress=lambda *step: told.append(step),
    )
    assert len({total for _, total in told}) == 1
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == told[-1][1]
    assert len(told) == model.config.get_text_config().num_hidden_layers


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_a_pruned_sweep_that_keeps_everything_is_exact(memory: str) -> None:
    model, inputs = models.build("llava", batch=2, padding="left", text=150)
    targets = some_targets(inputs)
    truth = rows(model, inputs, targets)
    found = explain_rows(model, inputs, targets, method="glimpse", memory=memory, row_tolerance=1e-9)
    assert errors(found.rows, truth, targets).max() <= 1e-6


@pytest.mark.parametrize("name", ["llama", "llava", "qwen2_5_vl"])
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_a_pruned_sweep_equals_its_dense_definition(name: str, memory: str) -> None:
    model, inputs = models.build(name, text=150)
    targets = models.answer_targets(inputs, 0)[1:3]
    exact = rows(model, inputs, targets)
    pruned_somewhere = False
    for target, truth_exact in zip(targets, exact, strict=True):
        for tolerance in (0.1, 0.4):
            truth, kept = oracle.pruned_glimpse_row(model, inputs, target, tolerance)
            found = explain_rows(model, inputs, [target], method="glimpse", memory=memory, row_tolerance=tolerance)
            assert found.certificate is not None
            columns = truth.shape[0]
            whole = [count > 0.6 * columns for count in kept]
            if any(whole):
                continue  # such layers are swept whole, which the definition does not know of
            pruned_somewhere = True
            assert found.certificate.rows_kept[0].tolist() == kept
            assert errors(found.rows, truth[None], [target]).max() <= 1e-6
            assert float(found.certificate.error[0]) > 0
            assert errors(found.rows, truth_exact[None], [target]).max() > 1e-4, "nothing was lost"
    assert pruned_somewhere


def test_nothing_is_left_out_unasked() -> None:
    model, inputs = models.build("llava", torch.bfloat16, text=150)
    targets = models.answer_targets(inputs, 0)[:1]
    found = explain_rows(model, inputs, targets, method="glimpse", row_tolerance="auto")
    assert found.certificate is not None
    assert not found.certificate.dropped.any()
    torch.testing.assert_close(found.rows, rows(model, inputs, targets))


def test_layers_below_the_share_are_not_visited() -> None:
    model, inputs, targets = deep(16)
    checked = check_targets(targets, inputs, None)
    run = Glimpse(checked, inputs, None, fx.GlimpseOptions(layers="top:0.25"))
    told: list[tuple[int, int]] = []
    run.progress = lambda *step: told.append(step)
    with Sweep(model, inputs, checked.row_table(), "lean") as sweep:
        found = run.rows(sweep)
    assert len(told) == 4
    assert errors(found, oracle.glimpse_rows(model, inputs, targets, top=4), targets).max() <= 1e-6


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"propagation": "exact"}, "propagation"),
        ({"stats_domain": "half"}, "stats_domain"),
        ({"route": "three_sweeps"}, "route"),
        ({"head_temperature": 0.0}, "head_temperature"),
        ({"head_temperature": "hot"}, "head_temperature"),
        ({"depth_rate": "steep"}, "depth_rate"),
        ({"depth_rate": math.inf}, "depth_rate"),
        ({"layers": "top:0"}, "layers"),
        ({"layers": "top:1.5"}, "layers"),
        ({"layers": "bottom:0.5"}, "layers"),
        ({"layers": "top:half"}, "layers"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ArgumentError, match=name):
        fx.GlimpseOptions(**options)


def test_heads_on_different_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, targets = deep(2)
    monkeypatch.setattr("lvlm_fastxai.sweep.forward.find_ranks", lambda *model: Ranks(2, object()))
    with pytest.raises(UnsupportedModelError, match="heads on different ranks"):
        fx.relevancy_rows(model, inputs, targets, method="glimpse")


def test_options_of_another_method_are_refused() -> None:
    model, inputs, targets = deep(2)
    for method, options in (("chefer", fx.GlimpseOptions()), ("glimpse", {"layers": "all"})):
        with pytest.raises(ArgumentError, match="options"):
            fx.relevancy_rows(model, inputs, targets, method=method, options=options)
    with pytest.raises(ArgumentError, match="options"):
        fx.Explainer(*fx.load_tiny_lvlm(), options=fx.GlimpseOptions())


def test_an_explained_answer_and_its_report(tmp_path: Any) -> None:
    from lvlm_fastxai import tiny

    model, processor = fx.load_tiny_lvlm()
    explainer = fx.Explainer(model, processor, method="glimpse")
    found = explainer(tiny.SAMPLE_IMAGE, "describe the image.")
    assert found.weighted
    weights = [token.weight for token in found.tokens]
    assert sum(weight.image_weight for weight in weights if weight) == pytest.approx(1)
    assert sum(weight.prompt_weight for weight in weights if weight) == pytest.approx(1)
    mixed = sum(token.weight.image_weight * token.image_map for token in found.tokens if token.weight)
    torch.testing.assert_close(torch.tensor(found.image_map), torch.tensor(mixed), rtol=1e-5, atol=1e-9)
    assert found.comparison is not None
    plain = fx.Explainer(model, processor)(tiny.SAMPLE_IMAGE, "describe the image.")
    torch.testing.assert_close(
        torch.tensor(found.comparison.image_maps[0]), torch.tensor(plain.image_map), rtol=1e-4, atol=1e-7
    )
    saved = json.loads(found.save(tmp_path)["json"].read_text())
    assert saved["options"]["propagation"] == "literal"
    assert saved["tokens"][0]["weight"]["image_weight"] == pytest.approx(found.tokens[0].weight.image_weight)
    assert saved["comparison"]["method"] == "chefer"

    few = fx.Explainer(model, processor, method="glimpse", tokens="top:2")(tiny.SAMPLE_IMAGE, "describe the image.")
    assert len(few.tokens) == 2
    assert len(few.tokens) + len(few.untouched) == len(found.tokens)
    by_place = {token.position: token for token in found.tokens}
    for token in few.tokens:
        torch.testing.assert_close(
            torch.tensor(token.image_map), torch.tensor(by_place[token.position].image_map), rtol=1e-3, atol=1e-7
        )
    mass = sum(token.probability for token in few.untouched) / sum(token.probability for token in found.tokens)
    assert few.untouched_share == pytest.approx(mass, rel=1e-4)
    assert few.confidence == pytest.approx(found.confidence, rel=1e-4)
