"""The evaluation: metrics against hand-made and independent results, and the pipeline on an untrained LVLM."""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from lvlm_fastxai import families
from lvlm_fastxai.errors import ArgumentError, FastXAIError
from lvlm_fastxai.evaluate import commands as command
from lvlm_fastxai.evaluate import curves, evaluation, maps, output, plot
from lvlm_fastxai.evaluate.bootstrap import ClusterBootstrap
from lvlm_fastxai.evaluate.cases import Case, held_out_cases, held_out_descriptions
from lvlm_fastxai.evaluate.defaults import METHODS
from lvlm_fastxai.evaluate.metrics import (
    area_under_curve,
    average_precision,
    cell_coverage,
    evidence_cells,
    l1_distance,
    mass_in_mask,
    normalized_scanpath_saliency,
    pointing_game,
)
from lvlm_fastxai.evaluate.scores import ScoreTable, map_scores
from lvlm_fastxai.explain.aggregation import aggregate
from lvlm_fastxai.explain.explainer import Explainer
from lvlm_fastxai.explain.relevancy_rows import explain_rows
from lvlm_fastxai.methods import GlimpseOptions
from lvlm_fastxai.prompting.answering import Answerer
from lvlm_fastxai.tiny import scenes
from lvlm_fastxai.tiny.model import build_model, build_processor, chat, save_checkpoint

WHOLE = (0.0, 0.0, 1.0, 1.0)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Everything here is tiny."""


def untrained() -> LlavaForConditionalGeneration:
    """The shipped model's layout, grid and vocabulary, thin and without training."""
    with torch.random.fork_rng():
        config = build_model(3).config
        config.vision_config.update({"hidden_size": 20, "intermediate_size": 40, "num_hidden_layers": 1})
        config.text_config.update({"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8})
        return LlavaForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    return Answerer(untrained(), build_processor())


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return held_out_cases(2, 5)


def right_answers(answerer: Answerer, cases: Sequence[Case], *_: Any, **__: Any) -> list[list[int]]:
    """In place of an untrained model's babble."""
    return [answerer.processor.tokenizer(case.question.answer, add_special_tokens=False)["input_ids"] for case in cases]


# Masks on the grid


def test_coverage_of_whole_and_half_cells() -> None:
    mask = np.zeros((4, 4), dtype=bool)
    mask[0:2, 0:3] = True
    assert cell_coverage(mask, (2, 2)).tolist() == [[1.0, 0.5], [0.0, 0.0]]
    # Three cells a side over four pixels: the first cell holds the first pixel and a third of the second.
    mask = np.zeros((4, 4), dtype=bool)
    mask[1] = True
    assert cell_coverage(mask, (3, 1))[:, 0] == pytest.approx([0.25, 0.5, 0.0])


def test_coverage_keeps_the_area_on_any_grid() -> None:
    mask = np.random.default_rng(0).random((37, 53)) < 0.3
    for shape in ((12, 12), (5, 9), (37, 53), (60, 100)):
        assert cell_coverage(mask, shape).mean() == pytest.approx(mask.mean())


def test_coverage_outside_the_picture_is_empty() -> None:
    mask = np.ones((10, 20), dtype=bool)
    # A picture padded to a square: a quarter of the grid above it, a quarter below.
    assert cell_coverage(mask, (4, 2), (0.0, -0.5, 1.0, 1.5)).tolist() == [[0, 0], [1, 1], [1, 1], [0, 0]]
    # The centred half of the width.
    mask[:, :10] = False
    assert cell_coverage(mask, (1, 4), (0.25, 0.0, 0.75, 1.0)).tolist() == [[0, 0, 1, 1]]


def test_coverage_refuses_what_is_no_mask() -> None:
    with pytest.raises(ArgumentError, match=r"\(H, W\) bool"):
        cell_coverage(np.zeros((4, 4)), (2, 2))  # type: ignore[arg-type]


def test_evidence_cells_are_half_covered_or_the_best_there_is() -> None:
    assert evidence_cells(np.array([[0.49, 0.5], [1.0, 0.0]])).tolist() == [[False, True], [True, False]]
    assert evidence_cells(np.array([[0.1, 0.3], [0.3, 0.0]])).tolist() == [[False, True], [True, False]]
    assert not evidence_cells(np.zeros((2, 2))).any()


# Metrics


def test_pointing_game() -> None:
    evidence = np.array([[True, False], [False, True]])
    assert pointing_game(np.array([[3.0, 1], [1, 2]]), evidence) == 1
    assert pointing_game(np.array([[1.0, 3], [1, 2]]), evidence) == 0
    assert pointing_game(np.array([[3.0, 3], [1, 3]]), evidence) == pytest.approx(2 / 3)
    assert pointing_game(np.zeros((2, 2)), evidence) == 0.5


def test_mass_in_mask() -> None:
    relevancy = np.array([[2.0, 4.0], [0.0, 2.0]])
    assert mass_in_mask(relevancy, np.array([[1.0, 0.25], [1.0, 0.0]])) == pytest.approx(3 / 8)
    assert mass_in_mask(relevancy, np.array([[True, True], [False, True]])) == 1
    assert mass_in_mask(np.zeros((2, 2)), np.array([[1.0, 0.5], [0.0, 0.0]])) == pytest.approx(0.375)
    assert mass_in_mask(np.full((2, 2), 7.0), np.array([[1.0, 0.5], [0.0, 0.0]])) == pytest.approx(0.375)


def test_average_precision_by_hand() -> None:
    relevancy = np.array([[4.0, 3.0, 2.0, 1.0]])
    assert average_precision(relevancy, np.array([[True, False, True, False]])) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(relevancy, np.array([[False, False, False, True]])) == pytest.approx(1 / 4)
    # The two tied cells enter together: precision 2/3 at recall 1, after 1/1 at recall 1/2.
    tied = np.array([[4.0, 3.0, 3.0, 1.0]])
    assert average_precision(tied, np.array([[True, True, False, False]])) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_average_precision_equals_a_threshold_sweep() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        relevancy = rng.integers(0, 6, (4, 5)).astype(float)
        evidence = rng.random((4, 5)) < 0.3
        evidence[0, 0] = True
        expected, before = 0.0, 0.0
        for threshold in sorted(set(relevancy.ravel().tolist()), reverse=True):
            kept = relevancy >= threshold
            recall = (kept & evidence).sum() / evidence.sum()
            expected += (recall - before) * (kept & evidence).sum() / kept.sum()
            before = recall
        assert average_precision(relevancy, evidence) == pytest.approx(expected)


def test_average_precision_of_random_rankings_meets_its_expectation() -> None:
    rng = np.random.default_rng(2)
    cells, positives = 144, 9
    evidence = np.zeros((12, 12), dtype=bool)
    evidence.flat[:positives] = True
    measured = np.mean([average_precision(rng.random((12, 12)), evidence) for _ in range(4000)])
    harmonic = sum(1 / rank for rank in range(1, cells + 1))
    expected = (harmonic + (positives - 1) / (cells - 1) * (cells - harmonic)) / cells
    assert measured == pytest.approx(expected, abs=0.003)


def test_scanpath_saliency_by_hand() -> None:
    relevancy = np.array([[3.0, 1.0], [1.0, 1.0]])  # mean 1.5, deviation √0.75
    assert normalized_scanpath_saliency(relevancy, np.array([[True, False], [False, False]])) == pytest.approx(3**0.5)
    assert normalized_scanpath_saliency(relevancy, np.array([[0.25, 0.75], [0.0, 0.0]])) == pytest.approx(0.0)
    assert normalized_scanpath_saliency(np.full((2, 2), 0.1), np.array([[1.0, 0], [0, 0]])) == 0


def test_scanpath_saliency_is_the_mean_over_the_pixels_of_the_mask() -> None:
    rng = np.random.default_rng(11)
    relevancy, mask = rng.random((6, 6)), rng.random((48, 48)) < 0.2
    enlarged = relevancy.repeat(8, 0).repeat(8, 1)
    expected = ((enlarged - enlarged.mean()) / enlarged.std())[mask].mean()
    assert normalized_scanpath_saliency(relevancy, cell_coverage(mask, (6, 6))) == pytest.approx(expected)
    assert normalized_scanpath_saliency(7 * relevancy + 2, cell_coverage(mask, (6, 6))) == pytest.approx(expected)


def test_l1_distance() -> None:
    relevancy = np.array([[3.0, 1.0], [0.0, 0.0]])
    assert l1_distance(relevancy, 5 * relevancy) == pytest.approx(0)
    assert l1_distance(relevancy, relevancy[::-1]) == pytest.approx(2)
    assert l1_distance(relevancy, np.zeros((2, 2))) == pytest.approx(0.5 + 0 + 0.25 + 0.25)


@pytest.mark.parametrize("metric", [pointing_game, average_precision, mass_in_mask, normalized_scanpath_saliency])
def test_metrics_refuse_bad_maps(metric: Any) -> None:
    evidence = np.array([[True, False]])
    with pytest.raises(ArgumentError, match="one shape"):
        metric(np.zeros((2, 1)), evidence)
    with pytest.raises(ArgumentError, match="finite"):
        metric(np.array([[math.nan, 1.0]]), evidence)
    with pytest.raises(ArgumentError, match="no cell is evidence"):
        metric(np.zeros((1, 2)), ~evidence & evidence)


def test_mass_refuses_negative_relevancy() -> None:
    with pytest.raises(ArgumentError, match="negative"):
        mass_in_mask(np.array([[-1.0, 2.0]]), np.array([[True, False]]))


def test_area_under_curve() -> None:
    assert area_under_curve([0, 0.5, 1], [1, 1, 0]) == pytest.approx(0.75)
    assert area_under_curve([0, 0.1, 1], [1, 0, 0]) == pytest.approx(0.05)
    for fractions, values in (([0, 1], [1, 2, 3]), ([0.1, 1], [1, 1]), ([0, 0.5, 0.5, 1], [1, 1, 1, 1])):
        with pytest.raises(ArgumentError):
            area_under_curve(fractions, values)


def test_perfect_map_scores_one_and_noise_scores_chance() -> None:
    some = [case for case in held_out_cases(30, 7) if case.has_evidence]
    rng = np.random.default_rng(3)
    perfect, noise = [], []
    for case in some:
        coverage = cell_coverage(case.question.mask, (12, 12))
        perfect.append(map_scores(evidence_cells(coverage) * 1.0, case.question.mask, WHOLE, case.objects_mask))
        noise.append(map_scores(rng.random((12, 12)), case.question.mask, WHOLE, case.objects_mask))
    assert all(row["pointing"] == 1 and row["average_precision"] == pytest.approx(1) for row in perfect)
    assert all(row["mass"] >= 3 * row["area"] or row["area"] > 0.2 for row in perfect)
    scene = np.array([case.scene.seed for case in some])
    for score, chance in (("pointing", "evidence_share"), ("mass", "area"), ("selectivity", "object_share")):
        excess = np.array([row[score] - row[chance] for row in noise])
        assert abs(np.nanmean(excess)) < 0.03
        interval = ClusterBootstrap(scene).mean(excess)
        assert interval.low - 0.01 < 0 < interval.high + 0.01
    assert abs(np.mean([row["nss"] for row in noise])) < 0.05 and min(row["nss"] for row in perfect) > 1
    # Without another object in the picture there is nothing to prefer.
    for case, row in zip(some, noise, strict=True):
        assert math.isnan(row["selectivity"]) == (not case.has_distractors)


def test_selectivity_by_hand() -> None:
    mask, objects = np.zeros((2, 2), dtype=bool), np.zeros((2, 2), dtype=bool)
    mask[0, 0] = objects[0, 0] = objects[0, 1] = True
    row = map_scores(np.array([[3.0, 1.0], [6.0, 0.0]]), mask, WHOLE, objects)
    assert row["selectivity"] == pytest.approx(0.75)
    assert row["object_share"] == pytest.approx(0.5)
    assert row["mass"] == pytest.approx(0.3)


# Intervals


def test_bootstrap_resamples_scenes_not_questions() -> None:
    rng = np.random.default_rng(4)
    per_scene = rng.normal(size=40)
    values = np.repeat(per_scene, 10)  # ten identical questions a scene carry no more than one
    clustered = ClusterBootstrap(np.repeat(np.arange(40), 10)).mean(values)
    alone = ClusterBootstrap(np.arange(40)).mean(per_scene)
    assert clustered == pytest.approx(alone)
    independent = ClusterBootstrap(np.arange(400)).mean(values)
    assert clustered.high - clustered.low > 2.5 * (independent.high - independent.low)


def test_bootstrap_covers_the_truth_about_19_times_in_20() -> None:
    rng = np.random.default_rng(5)
    hits = 0
    for trial in range(300):
        sizes = rng.integers(1, 6, 50)
        scene = np.repeat(np.arange(50), sizes)
        values = np.repeat(rng.normal(size=50), sizes) + rng.normal(size=len(scene))
        interval = ClusterBootstrap(scene, resamples=400, seed=trial).mean(values)
        hits += interval.low <= 0 <= interval.high
    assert 0.89 <= hits / 300 <= 0.99


def test_bootstrap_ratio_and_gaps() -> None:
    scene = np.array([0, 0, 1, 2])
    bootstrap = ClusterBootstrap(scene)
    mass, area = np.array([0.2, 0.4, 0.6, math.nan]), np.array([0.1, 0.2, 0.3, 0.5])
    assert bootstrap.ratio(mass, area) == pytest.approx((2, 2, 2))
    assert bootstrap.mean(mass).value == pytest.approx(0.4)
    single = bootstrap.mean(np.array([1.0, 2.0, math.nan, math.nan]))
    assert single.value == 1.5 and math.isnan(single.low) and math.isnan(single.high)
    assert math.isnan(bootstrap.mean(np.full(4, math.nan)).value)


def test_summary_pairs_methods_and_skips_empty_groups() -> None:
    rng = np.random.default_rng(6)
    common = rng.normal(size=60) * 10 + 50
    rows = {
        "chefer": [{"pointing": value} for value in common],
        "random": [{"pointing": value - 1} for value in common],
    }
    for entries in rows.values():
        for entry in entries:
            entry["evidence_share"] = 0.1
    groups = {"overall": [True] * 60, "color": [index < 20 for index in range(60)], "shape": [False] * 60}
    table = ScoreTable.collect(list(range(60)), groups, rows)
    summary = table.summary(np.arange(60) < 40, resamples=200, seed=0)
    assert list(summary) == ["overall", "color"]
    assert (summary["overall"]["maps"], summary["color"]["maps"]) == (40, 20)
    expected = {"pointing": 0.1, "average_precision": 0.1, "mass_ratio": 1.0, "nss": 0.0}
    assert summary["overall"]["chance"] == pytest.approx(expected)
    random = summary["overall"]["methods"]["random"]["pointing"]
    # The scores vary by tens, their difference not at all.
    assert random["high"] - random["low"] > 2
    assert [random["difference"][part] for part in ("mean", "low", "high")] == pytest.approx([-1, -1, -1])
    assert "difference" not in summary["overall"]["methods"]["chefer"]["pointing"]
    turned = table.summary(np.arange(60) < 40, reference="random", resamples=200, seed=0)["overall"]["methods"]
    assert turned["chefer"]["pointing"]["difference"]["mean"] == pytest.approx(1)
    assert "difference" not in turned["random"]["pointing"]


# Questions


def test_cases_are_held_out_and_reproducible(cases: list[Case]) -> None:
    again = held_out_cases(2, 5)
    assert [(c.scene.seed, c.question.text, c.question.answer) for c in cases] == [
        (c.scene.seed, c.question.text, c.question.answer) for c in again
    ]
    assert all(c.scene.seed in scenes.HELD_OUT_SEEDS for c in cases)
    assert not {c.scene.seed for c in cases} & {c.scene.seed for c in held_out_cases(2, 6)}
    assert len({c.question.kind for c in cases}) >= 8
    absent = [c for c in held_out_cases(20, 0) if not c.has_evidence]
    assert absent and all(c.question.answer in ("no", "0") for c in absent)


def test_descriptions_are_those_of_the_same_scenes() -> None:
    every = held_out_cases(6, 2)
    found = held_out_descriptions(6, 2)
    assert [(c.scene.seed, c.question.text, c.question.answer) for c in found] == [
        (c.scene.seed, c.question.text, c.question.answer) for c in every if c.question.kind == "description"
    ]
    assert found and all(len(c.question.word_masks or ()) == len(c.question.answer.split()) for c in found)


@pytest.mark.parametrize(("count", "seed"), [(0, 0), (1_000_001, 0), (1, -1), (1, 1000)])
def test_cases_out_of_range(count: int, seed: int) -> None:
    with pytest.raises(ArgumentError):
        held_out_cases(count, seed)


def test_word_roles() -> None:
    words = ["a", "small", "red", "striped", "star", "left", "of"]
    roles = ["article", "size", "color", "texture", "shape", "relation", "relation"]
    assert [evaluation.word_role(word) for word in words] == roles


# The model in batches


def alone(answerer: Answerer, case: Case) -> dict[str, torch.Tensor]:
    """One question as a user would ask it, without padding."""
    prompt = answerer.processor.apply_chat_template(chat(case.question.text), add_generation_prompt=True)
    return dict(answerer.processor(images=case.scene.image, text=prompt, return_tensors="pt"))


def test_batched_answers_equal_single_ones(answerer: Answerer, cases: list[Case]) -> None:
    batch = answerer.answer(
        answerer.encode([c.scene.image for c in cases], [c.question.text for c in cases]), max_new_tokens=4
    )
    assert len({len(c.question.text.split()) for c in cases}) > 1  # so that the batch has padding
    for case, answer in zip(cases, batch, strict=True):
        inputs = alone(answerer, case)
        with torch.inference_mode():
            output = answerer.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        generated = output[0, inputs["input_ids"].shape[1] :].tolist()
        end = next((place for place, token in enumerate(generated) if token in answerer.ends), len(generated))
        assert answer == generated[:end]


def test_words_of_tokens(answerer: Answerer) -> None:
    tokens = answerer.processor.tokenizer("a small red star left of a", add_special_tokens=False)["input_ids"]
    assert answerer.word_of_token(tokens) == [0, 1, 2, 3, 4, 5, 6]


def test_columns_of_question_and_picture(answerer: Answerer, cases: list[Case]) -> None:
    questions = [case.question.text for case in cases]
    prompts = answerer.encode([case.scene.image for case in cases], questions)
    assert not prompts["attention_mask"].bool().all()
    marker = answerer.model.config.image_token_index
    for sample, question in enumerate(questions):
        tokens = prompts["input_ids"][sample]
        spelled = answerer.processor.tokenizer.decode(tokens[answerer.question_columns(prompts, sample, question)])
        assert spelled.replace(" ", "") == question.replace(" ", "")
        assert answerer.image_columns(prompts, sample) == (tokens == marker).nonzero()[:, 0].tolist()


def test_maps_equal_single_explanations(answerer: Answerer, cases: list[Case]) -> None:
    some = [case for case in cases if case.has_evidence][:5]
    answers = [[20, 21], [22], [23, 24], [25], [26]]
    methods = ("chefer", "lvlm_interpret", "glimpse", "raw_attention")
    found, boxes = maps.compute_maps(answerer, some, answers, methods, seed=0, batch=3)
    assert boxes == [WHOLE] * 5
    for index, (case, answer) in enumerate(zip(some, answers, strict=True)):
        inputs = alone(answerer, case)
        start = inputs["input_ids"].shape[1]
        joined = {
            **inputs,
            "input_ids": torch.cat([inputs["input_ids"], torch.tensor([answer])], 1),
            "attention_mask": torch.ones(1, start + len(answer), dtype=torch.long),
        }
        targets = [(0, start - 1 + place, token) for place, token in enumerate(answer)]
        (layout,) = families.image_layouts(answerer.model.config, inputs)
        for method in methods:
            rows = explain_rows(answerer.model, joined, targets, method=method, prompt_length=start).rows
            expected = np.stack([layout.read(row).numpy() for row in rows])
            tokens = found[index][method].tokens
            assert tokens.shape == (len(answer), 12, 12)
            np.testing.assert_allclose(tokens, expected, rtol=2e-3, atol=2e-4 * expected.max())
            if method != "glimpse":
                np.testing.assert_allclose(found[index][method].answer, tokens.mean(0))


def test_map_of_an_answer_is_what_the_explainer_shows(answerer: Answerer, cases: list[Case]) -> None:
    case = max(cases, key=lambda case: len(case.question.text))
    short = min(cases, key=lambda case: len(case.question.text))
    explanation = Explainer(answerer.model, answerer.processor, method="glimpse")(
        case.scene.image, case.question.text, max_new_tokens=2
    )
    tokens = [token.token_id for token in explanation.tokens]
    assert len(tokens) == 2  # neither is special: `compute_maps` reads answers without such tokens
    # A second question of another length, so that there is padding.
    found, _ = maps.compute_maps(answerer, [short, case], [tokens, tokens], ["glimpse"], seed=0)
    weights = [token.weight.image_weight for token in explanation.tokens if token.weight]
    np.testing.assert_allclose(found[1]["glimpse"].weights, weights, rtol=2e-3)
    assert len(weights) > 1 and np.ptp(weights) > 1e-3
    np.testing.assert_allclose(found[1]["glimpse"].answer, explanation.image_maps[0], rtol=2e-3)


def test_every_variant_is_what_its_name_says(answerer: Answerer, cases: list[Case]) -> None:
    (case, *_), answer = cases, [20, 21, 22]
    (found,), _ = maps.compute_maps(answerer, [case], [answer], list(maps.VARIANTS), seed=0)
    inputs = alone(answerer, case)
    start = inputs["input_ids"].shape[1]
    joined = answerer.join(inputs, [answer])
    targets = [(0, start - 1 + place, token) for place, token in enumerate(answer)]
    (layout,) = families.image_layouts(answerer.model.config, inputs)
    image = answerer.image_columns(inputs, 0)
    question = answerer.question_columns(inputs, 0, case.question.text)
    expected = {
        "glimpse": ("glimpse", "glimpse", GlimpseOptions()),
        "glimpse weighting=confidence": ("glimpse", "confidence", GlimpseOptions()),
        "glimpse weighting=prompt": ("glimpse", "prompt", GlimpseOptions()),
        "glimpse weighting=uniform": ("glimpse", "uniform", GlimpseOptions()),
        "glimpse depth_rate=0": ("glimpse", "glimpse", GlimpseOptions(depth_rate=0.0)),
        "glimpse depth_rate=scaled": ("glimpse", "glimpse", GlimpseOptions(depth_rate="scaled")),
        "glimpse layers=top:0.6": ("glimpse", "glimpse", GlimpseOptions(layers="top:0.6")),
        "glimpse propagation=identity": ("glimpse", "glimpse", GlimpseOptions(propagation="identity")),
        "glimpse stats_domain=causal": ("glimpse", "glimpse", GlimpseOptions(stats_domain="causal")),
        "chefer weighting=glimpse": ("chefer", "glimpse", None),
    }
    assert set(expected) == {"glimpse", *maps.ABLATIONS}
    seen: list[np.ndarray] = []
    for name, (method, weighting, options) in expected.items():
        result = explain_rows(answerer.model, joined, targets, method=method, options=options)
        rows = [row for _, row, _ in targets]
        whole = aggregate(
            result.rows, result.probabilities, image, question, weighting=weighting, query_rows=rows
        ).image_map
        row = torch.zeros(start)
        row[image] = whole
        np.testing.assert_allclose(found[name].answer, layout.read(row).numpy(), rtol=1e-4, err_msg=name)
        assert all(not np.allclose(found[name].answer, other, rtol=1e-4) for other in seen), name
        seen.append(found[name].answer)


def test_gradient_input_equals_plain_autograd(answerer: Answerer, cases: list[Case]) -> None:
    model = answerer.model
    some = [cases[0], cases[-1]]
    inputs = answerer.encode([c.scene.image for c in some], [c.question.text for c in some])
    columns = inputs["input_ids"].shape[1]
    targets = [(0, columns - 1, 30), (1, columns - 1, 31), (1, columns - 2, 32)]
    rows = maps.gradient_input_rows(model, inputs, targets)

    picture = model.model.get_image_features(pixel_values=inputs["pixel_values"])
    features = torch.cat(list(picture if isinstance(picture, list | tuple) else picture.pooler_output))
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach()
    embedded[inputs["input_ids"] == model.config.image_token_index] = features.detach()
    embedded.requires_grad_()
    logits = model(inputs_embeds=embedded, attention_mask=inputs["attention_mask"]).logits
    for row, (sample, query_row, token) in zip(rows, targets, strict=True):
        (gradient,) = torch.autograd.grad(logits[sample, query_row, token], embedded, retain_graph=True)
        expected = (gradient * embedded).sum(-1).abs()[sample].detach()
        torch.testing.assert_close(row, expected, rtol=1e-3, atol=1e-5 * float(expected.max()))


def test_untrained_twin_has_other_weights_and_leaves_the_generator(answerer: Answerer) -> None:
    state = torch.random.get_rng_state()
    twin = maps.untrained_twin(answerer.model, 1)
    assert torch.equal(torch.random.get_rng_state(), state)
    ours, theirs = answerer.model.state_dict(), twin.state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}
    assert not torch.equal(ours["lm_head.weight"], theirs["lm_head.weight"])
    assert not twin.training


# Deletion and insertion


def test_cell_of_pixel() -> None:
    assert curves.cell_of_pixel((4, 4), (2, 2), WHOLE).tolist() == [[0, 0, 1, 1]] * 2 + [[2, 2, 3, 3]] * 2
    # A grid over the centred half of the width, and one that reaches beyond the picture.
    assert curves.cell_of_pixel((1, 4), (1, 2), (0.25, 0.0, 0.75, 1.0)).tolist() == [[-1, 0, 1, -1]]
    assert curves.cell_of_pixel((2, 2), (2, 1), (0.0, -1.0, 1.0, 1.0)).tolist() == [[1, 1], [1, 1]]


def test_cell_order_is_descending_and_breaks_ties_at_random() -> None:
    relevancy = np.array([[1.0, 5.0], [1.0, 3.0]])
    orders = {tuple(curves.cell_order(relevancy, np.random.default_rng(seed)).tolist()) for seed in range(20)}
    assert orders == {(1, 3, 0, 2), (1, 3, 2, 0)}


def test_fills() -> None:
    picture = Image.fromarray(np.array([[[0, 0, 0], [255, 100, 3]]], dtype=np.uint8))
    assert curves.fill_picture(picture, "mean").tolist() == [[[128, 50, 2]] * 2]
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert curves.fill_picture(noise, "blur").std() < 0.2 * np.asarray(noise).std()
    with pytest.raises(ArgumentError, match="fill"):
        curves.fill_picture(picture, "black")


@pytest.mark.parametrize("fill", curves.FILLS)
def test_curves_equal_single_forward_passes(answerer: Answerer, cases: list[Case], fill: str) -> None:
    case, answer = cases[0], [40, 41, 42]
    relevancy = np.random.default_rng(8).random((12, 12))
    given = {"some": relevancy, "opposite": -relevancy}
    image, question = case.scene.image, case.question.text
    found = curves.deletion_insertion(answerer, image, question, answer, given, WHOLE, fill=fill)

    def probability(pixels: np.ndarray) -> float:
        inputs = answerer.encode([Image.fromarray(pixels)], [question])
        start = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([answer])], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.inference_mode():
            chances = answerer.model(**inputs).logits[0].softmax(-1)
        return float(np.prod([float(chances[start - 1 + k, token]) for k, token in enumerate(answer)]) ** (1 / 3))

    pixels, replaced = np.asarray(image), curves.fill_picture(image, fill)
    side = pixels.shape[0] // 12
    for method, values in given.items():
        ranking = np.argsort(-values.ravel())
        for place in (0, 2, 5, len(curves.FRACTIONS) - 1):
            chosen = np.zeros(144, dtype=bool)
            chosen[ranking[: round(curves.FRACTIONS[place] * 144)]] = True
            mask = chosen.reshape(12, 12).repeat(side, 0).repeat(side, 1)[..., None]
            deleted, inserted = np.where(mask, replaced, pixels), np.where(mask, pixels, replaced)
            assert found[method].deletion[place] == pytest.approx(probability(deleted), rel=1e-3)
            assert found[method].insertion[place] == pytest.approx(probability(inserted), rel=1e-3)
    # Deleting in one order is inserting in the other, read backwards, wherever both have a step.
    assert found["some"].deletion[-1] == found["opposite"].insertion[0]
    assert found["some"].deletion_area == pytest.approx(area_under_curve(curves.FRACTIONS, found["some"].deletion))


def test_curves_run_the_pictures_that_maps_share_once(
    answerer: Answerer, cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []

    def counted(answerer: Answerer, images: Sequence[Image.Image], *_: Any) -> np.ndarray:
        counts.append(len(images))
        return np.array([np.asarray(image).mean() for image in images])

    monkeypatch.setattr(curves, "answer_probabilities", counted)
    relevancy = np.random.default_rng(12).random((12, 12))
    case = cases[0]

    def run(given: dict[str, np.ndarray]) -> dict[str, curves.Curves]:
        return curves.deletion_insertion(answerer, case.scene.image, case.question.text, [40], given, WHOLE)

    several = run({"some": relevancy, "other": relevancy.T, "some again": 2 * relevancy})
    for name, values in (("some", relevancy), ("other", relevancy.T), ("some again", relevancy)):
        single = run({name: values})[name]
        np.testing.assert_array_equal(several[name].deletion, single.deletion)
        np.testing.assert_array_equal(several[name].insertion, single.insertion)
    inner = 2 * (len(curves.FRACTIONS) - 2)
    assert counts == [2 + 2 * inner, 2 + inner, 2 + inner, 2 + inner]


# The whole


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(untrained(), folder)
    return folder


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.fixture
def _knows_the_answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(evaluation, "answer_cases", right_answers)
    yield


@pytest.mark.usefixtures("_knows_the_answers")
def test_command_writes_everything(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = tmp_path / "evaluation.md"
    document.write_text(f"Before.\n{output.BEGIN}\nold figures\n{output.END}\nAfter.\n")
    out = tmp_path / "out"
    arguments = ["--model", str(checkpoint), "--scenes", "2", "--curves", "6", "--seed", "5", "--out", str(out)]
    assert command.run(parse(*arguments, "--descriptions", "3", "--document", str(document), "--json")) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result == json.loads((out / "evaluation.json").read_text())
    assert "2 held-out scenes" in printed.err and "explaining" in printed.err and "curves" in printed.err

    asked = held_out_cases(2, 5)
    scored = [case for case in asked if case.has_evidence]
    questions = result["questions"]
    assert questions["skipped"] == {"no evidence": len(asked) - len(scored), "empty answer": 0}
    assert questions["accuracy"]["overall"] == {"correct": len(asked), "questions": len(asked)}
    overall = questions["summary"]["correct"]["overall"]
    assert overall["maps"] == len(scored) and overall["scenes"] == 2
    assert list(overall["methods"]) == list(METHODS)
    check_summary(overall, "chefer", curves=6)

    described = held_out_descriptions(3, 5)
    answers = result["whole_answers"]["summary"]["correct"]["overall"]
    assert answers["maps"] == len(described) > 1
    assert list(answers["methods"]) == [*METHODS, *maps.ABLATIONS]
    check_summary(answers, "glimpse", curves=min(3, len(described)))
    distances = {name: entry["distance"]["mean"] for name, entry in answers["methods"].items()}
    assert distances["glimpse"] == 0 and all(value > 0 for name, value in distances.items() if name != "glimpse")
    assert "difference" not in answers["methods"]["chefer"]["distance"]
    words = result["words"]["overall"]
    assert words["maps"] == sum(len(case.question.answer.split()) for case in described)
    # An answer's weights sum to one, whatever the weighting.
    for entry in words["methods"].values():
        assert entry["weight"]["mean"] * words["maps"] == pytest.approx(len(described), rel=1e-5)

    for part in (questions, result["whole_answers"]):
        assert len(part["curves"]["chefer"]["deletion"]["mean"]) == len(result["fractions"])
        # All methods start at the whole picture and end at the blank one.
        assert len({curve["deletion"]["mean"][0] for curve in part["curves"].values()}) == 1
        assert len({curve["insertion"]["mean"][0] for curve in part["curves"].values()}) == 1

    with (out / "evaluation.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    of_questions = [row for row in rows if row["part"] == "questions"]
    assert len(of_questions) == len(scored) * len(METHODS)
    assert len(rows) - len(of_questions) == len(described) * (len(METHODS) + len(maps.ABLATIONS))
    mean = np.mean([float(row["pointing"]) for row in of_questions if row["method"] == "chefer"])
    assert mean == pytest.approx(overall["methods"]["chefer"]["pointing"]["mean"], abs=1e-5)
    assert sum(row["deletion"] != "" for row in of_questions) == 6 * len(METHODS)

    text = document.read_text()
    assert text.startswith("Before.\n") and text.endswith("\nAfter.\n") and "old figures" not in text
    assert "| chefer |" in text and "--scenes 2" in text and "--descriptions 3" in text and str(tmp_path) not in text
    assert "Difference to glimpse" in text and "| glimpse layers=top:0.6 |" in text
    for name in ("evaluation.png", "evaluation-answers.png"):
        with Image.open(out / name) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 50
        assert (tmp_path / name).is_file()


def check_summary(group: dict[str, Any], reference: str, *, curves: int) -> None:
    for name, entry in group["methods"].items():
        for metric in ("pointing", "mass", "mass_ratio", "average_precision", "nss", "deletion", "insertion"):
            assert entry[metric]["low"] <= entry[metric]["mean"] <= entry[metric]["high"]
            assert ("difference" in entry[metric]) == (name != reference)
        assert entry["deletion"]["maps"] == curves


@pytest.mark.usefixtures("_knows_the_answers")
def test_same_seed_same_figures_and_tables(answerer: Answerer) -> None:
    settings = evaluation.Settings(
        scenes=1, seed=9, methods=("chefer", "random"), curves=1, descriptions=0, resamples=100
    )
    before = {name: value.clone() for name, value in answerer.model.state_dict().items()}
    first, second = (evaluation.evaluate(answerer.model, answerer.processor, settings).to_dict() for _ in range(2))
    first.pop("seconds"), second.pop("seconds")
    assert first == second
    after = answerer.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(parameter.requires_grad for parameter in answerer.model.parameters())
    shown = "\n".join(table.text() for table in output.tables(first))
    chefer = first["questions"]["summary"]["correct"]["overall"]["methods"]["chefer"]["average_precision"]["mean"]
    assert f"{chefer:.3f}" in shown and "Difference to chefer" in shown
    assert first["whole_answers"] is None and "Whole answers" not in shown


def test_wrong_answers_are_scored_apart(answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    def babble(answerer: Answerer, cases: Sequence[Case], *_: Any) -> list[list[int]]:
        answers = right_answers(answerer, cases)
        # "x" for the first, nothing for the second, the rest right.
        scored = [index for index, case in enumerate(cases) if case.has_evidence]
        answers[scored[0]], answers[scored[1]] = [answerer.processor.tokenizer.convert_tokens_to_ids("not")], []
        return answers

    monkeypatch.setattr(evaluation, "answer_cases", babble)
    settings = evaluation.Settings(1, 9, methods=("raw_attention",), curves=0, descriptions=0, resamples=10)
    found = evaluation.evaluate(answerer.model, answerer.processor, settings).questions
    asked = held_out_cases(1, 9)
    assert found.skipped["empty answer"] == 1
    assert found.accuracy["overall"] == {"correct": len(asked) - 2, "questions": len(asked)}
    assert found.summary["all"]["overall"]["maps"] == found.summary["correct"]["overall"]["maps"] + 1
    assert found.curves == {}


def test_questions_for_curves_are_right_and_spread_over_kinds() -> None:
    questions = [
        evaluation.Scored(case, [1], case.question.answer if index % 3 else "wrong")
        for index, case in enumerate(held_out_cases(12, 1))
        if case.has_evidence
    ]
    chosen = evaluation.curve_questions(questions, 20, seed=0)
    kinds = [questions[index].case.question.kind for index in chosen]
    assert len(chosen) == len(set(chosen)) == 20
    assert all(questions[index].correct for index in chosen)
    assert len(set(kinds)) >= 9 and max(kinds.count(kind) for kind in kinds) <= 3
    assert evaluation.curve_questions(questions, 0, seed=0) == []
    assert len(evaluation.curve_questions(questions, 10_000, seed=0)) == sum(q.correct for q in questions)


def test_without_matplotlib_the_tables_still_come(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluation, "answer_cases", right_answers)
    monkeypatch.setattr(plot, "available", lambda: False)
    arguments = ["--scenes", "1", "--methods", "random", "--curves", "0", "--descriptions", "0", "--out", str(tmp_path)]
    assert command.run(parse("--model", str(checkpoint), *arguments)) == 0
    printed = capsys.readouterr()
    assert "matplotlib is not installed" in printed.err
    assert "pointing game" in printed.out and not (tmp_path / "evaluation.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "chefer,gradcam"), "methods: .*gradcam"),
        (("--methods", "chefer,chefer"), "methods: "),
        (("--methods", ","), "methods: "),
        (("--fill", "black"), "fill: "),
        (("--curves", "-1"), "curves: "),
        (("--descriptions", "-1"), "descriptions: "),
        (("--scenes", "0"), "scenes: "),
        (("--seed", "-1"), "seed: "),
        (("--model", "nowhere"), "model: .*nowhere"),
    ],
)
def test_bad_input_is_one_typed_line(
    checkpoint: Path, tmp_path: Path, arguments: tuple[str, str], message: str
) -> None:
    given = ["--model", str(checkpoint), "--out", str(tmp_path), *arguments]
    with pytest.raises(FastXAIError, match=message) as raised:
        command.run(parse(*given))
    assert "\n" not in str(raised.value)


def test_unwritable_places(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="output folder"):
        command.run(parse("--model", str(checkpoint), "--out", str(tmp_path / "file" / "below")))
    (tmp_path / "plain.md").write_text("no markers")
    with pytest.raises(ArgumentError, match=r"document .*plain\.md"):
        output.check_document(tmp_path / "plain.md")
    with pytest.raises(ArgumentError, match="document"):
        output.check_document(tmp_path / "absent.md")


def test_importing_the_options_loads_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import argparse, sys; from lvlm_fastxai.evaluate import commands; "
        "commands.add_arguments(argparse.ArgumentParser()); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
