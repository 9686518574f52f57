"""Policies: what they promise, on simulated answers; how they are written, read, refused and put in words."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from lvlm_fastxai.errors import ArgumentError, ModelMismatchError
from lvlm_fastxai.evaluate.metrics import auroc, risk_coverage
from lvlm_fastxai.review import FEATURES, Answers, Feature, Policy, calibrate, check
from lvlm_fastxai.review.plot import draw
from lvlm_fastxai.review.thresholds import precision_bound


def simulate(pictures: int, questions: int, seed: int, shared: float = 0.7) -> Answers:
    """Answers with entropy and probability; those about one picture are right or wrong together as `shared` says."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(pictures), questions)
    ease = rng.normal(3.0, 2.2, len(groups))
    right = rng.random(len(groups)) < 1 / (1 + np.exp(-ease - shared * rng.normal(size=pictures)[groups]))
    probability = 1 / (1 + np.exp(-1.5 * ease - rng.normal(size=len(groups)) - 1))
    entropy = np.clip(0.6 - 0.08 * ease + 0.1 * rng.normal(size=len(groups)), 0, 1)
    return of(entropy, probability, right, groups)


def given(entropy: Any, probability: Any) -> dict[str, Any]:
    return {"entropy": entropy, "probability": probability}


def of(entropy: Any, probability: Any, right: Any, groups: Any = None) -> Answers:
    return Answers.of(given(entropy, probability), right, groups)


def make(**changes: Any) -> Policy:
    policy = Policy(
        features=("entropy", "probability"),
        mean=(0.5, 3.0),
        scale=(0.1, 2.0),
        coefficients=(-1.0, 2.0),
        intercept=1.0,
        threshold=0.9,
        target=0.95,
        delta=0.05,
        typical={"entropy": 0.45, "probability": 0.98},
        model_name="a model",
        model_fingerprint="0123456789abcdef",
        head_fingerprint="fedcba9876543210",
        fitted_on={"answers": 10},
        figures={"coverage": 0.5},
    )
    return replace(policy, **changes)


@pytest.mark.parametrize(("pictures", "questions", "shared"), [(500, 1, 0.0), (200, 4, 0.7), (120, 8, 1.5)])
def test_the_promise_holds_on_new_answers(pictures, questions, shared):
    """δ = 5 % of calibrations may miss the target; of 50, more than 6 happen with a chance of 1 % at that rate."""
    runs, missed, coverage = 50, 0, []
    assert stats.binom.sf(6, runs, 0.05) < 0.012
    fresh = simulate(40_000, 1, 12345, shared)
    for seed in range(runs):
        policy = calibrate(simulate(pictures, questions, seed, shared), seed=seed, resamples=2).policy
        accepted = policy.scores(fresh.features) >= (math.inf if policy.threshold is None else policy.threshold)
        coverage.append(accepted.mean())
        missed += bool(accepted.any() and fresh.right[accepted].mean() < 0.95)
    assert missed <= 6
    # Sending everything to review would keep every promise.
    assert np.median(coverage) > 0.25


def test_answers_that_are_right_or_wrong_together_count_as_few(monkeypatch):
    """All ten answers about a picture are right or all wrong, and exactly 95 % right: each policy is an error."""
    from lvlm_fastxai.review import thresholds

    def policies() -> int:
        rng, found = np.random.default_rng(3), 0
        for seed in range(80):
            right = np.repeat(np.random.default_rng(seed).random(120) < 0.95, 10)
            groups = np.repeat(np.arange(120), 10)
            answers = of(*rng.random((2, 1200)), right, groups)
            found += calibrate(answers, seed=seed, resamples=2).policy.threshold is not None
        return found

    assert policies() <= 8
    # Counted as independent, the promise would not be kept.
    monkeypatch.setattr(thresholds, "design_effect", lambda groups, correlation: 1.0)
    assert policies() > 9


def test_many_thresholds_are_one_look():
    """Exactly 95 % are right at every threshold: each policy is an error. The best of all would be one in eight."""
    rng, found = np.random.default_rng(3), 0
    for seed in range(200):
        right = np.random.default_rng(seed).random(900) < 0.95
        found += calibrate(of(*rng.random((2, 900)), right), seed=seed, resamples=2).policy.threshold is not None
    assert found <= 15


def test_nothing_is_promised_where_the_answers_are_not_good_enough():
    found = calibrate(simulate(40, 1, 0), resamples=10)
    assert found.policy.threshold is None
    assert "every answer to review" in found.notes[0] and "59" in found.notes[0]
    decision = found.policy.decide(given(0.0, 1.0))
    assert decision.verdict == "review" and "Every answer is reviewed" in decision.reason
    assert found.report["threshold_part"]["accepted"] == 0 and found.report["threshold_part"]["precision"] is None


def test_held_out_answers_are_checked_and_decide_nothing():
    data, fresh = simulate(400, 2, 1), simulate(300, 2, 2)
    found, alone = calibrate(data, held_out=fresh, resamples=50), calibrate(data, resamples=50)
    held = found.report["held_out"]
    assert found.policy.threshold == alone.policy.threshold and found.policy.coefficients == alone.policy.coefficients
    assert found.curves_of == "held-out answers" and len(found.curves["both"][0]) == len(fresh)
    accepted = found.policy.scores(fresh.features) >= found.policy.threshold
    assert held["accepted"] == accepted.sum() and held["precision"] == fresh.right[accepted].mean()
    assert held["coverage"] == accepted.mean()
    assert held["precision_low"] < held["precision"] < held["precision_high"] and held["kept"]
    assert held["figures"]["both"]["auroc"] > 0.8
    # A policy that accepts everything does not keep this promise, and says so.
    assert check(replace(found.policy, threshold=0.0, target=0.99), fresh)["kept"] is False


def test_the_interval_of_the_precision_is_clopper_and_pearsons():
    entropy = np.linspace(0, 1, 200)
    answers = of(entropy, np.full(200, 0.9), entropy < 0.9)
    held = check(make(features=("entropy",), mean=(0.5,), scale=(1.0,), coefficients=(-1.0,), threshold=0.0), answers)
    exact = stats.binomtest(int(answers.right.sum()), 200).proportion_ci(0.95, "exact")
    assert (held["precision_low"], held["precision_high"]) == pytest.approx((exact.low, exact.high))
    one_sided = stats.binomtest(57, 60, alternative="greater").proportion_ci(0.95, "exact").low
    assert precision_bound(57, 60, 0.05) == pytest.approx(one_sided)
    assert precision_bound(0, 60, 0.05) == 0


def test_splits_keep_pictures_together_and_names_of_groups_do_not_matter():
    answers = simulate(100, 5, 4)
    found = calibrate(answers, resamples=2)
    report = found.report
    assert report["fit"]["groups"] + report["threshold_part"]["groups"] == report["groups"] == 100
    assert report["fit"]["answers"] == 5 * report["fit"]["groups"]
    names = [f"picture {group}" for group in answers.groups]
    named = calibrate(Answers.of(answers.features, answers.right, names), resamples=2)
    assert named.policy == found.policy


def test_all_right():
    found = calibrate(replace(simulate(300, 1, 5), right=np.ones(300, bool)), resamples=10)
    assert found.policy.coefficients == (0.0, 0.0) and found.policy.decide(given(0.99, 0.01)).accepted
    assert "every answer that the model was fitted on is right" in found.notes[0]
    assert found.report["threshold_part"]["figures"]["both"]["auroc"] is None


def test_all_wrong():
    found = calibrate(replace(simulate(300, 1, 6), right=np.zeros(300, bool)), resamples=10)
    assert found.policy.threshold is None and len(found.notes) == 2
    assert not found.policy.decide(given(0.1, 0.999)).accepted
    assert found.policy.typical == {}


def test_ties_are_accepted_or_reviewed_together():
    rng = np.random.default_rng(7)
    sure = rng.random(900) < 0.7
    right = np.where(sure, rng.random(900) < 0.995, rng.random(900) < 0.6)
    found = calibrate(of(np.full(900, 0.5), np.where(sure, 1.0, 0.5), right), resamples=10)
    assert found.policy.decide(given(0.5, 1.0)).accepted and not found.policy.decide(given(0.5, 0.5)).accepted
    # A constant feature has no spread to standardise by, and no say.
    assert found.policy.scale[0] == 1 and found.policy.coefficients[0] == 0


@pytest.mark.parametrize("features", ["entropy", "probability", "both"])
def test_every_feature_set(features):
    found = calibrate(simulate(600, 2, 8), features=features, resamples=100)
    policy = found.policy
    assert policy.features == (("entropy", "probability") if features == "both" else (features,))
    assert len(policy.coefficients) == len(policy.features)
    assert policy.threshold is not None
    figures = found.report["threshold_part"]["figures"]
    for figure in figures.values():
        assert figure["auroc_low"] < figure["auroc"] < figure["auroc_high"]
    assert figures["both"]["auroc"] > figures["entropy"]["auroc"] > 0.5
    assert figures["both"]["aurc"] < figures["entropy"]["aurc"] < 1 - found.report["threshold_part"]["right"]


def test_score_of_one_answer_is_that_among_many():
    answers = simulate(50, 4, 9)
    policy = calibrate(answers, resamples=2).policy
    together = policy.scores(answers.features)
    pairs = zip(*answers.features.values(), strict=True)
    assert [policy.decide(given(*pair)).score for pair in pairs] == together.tolist()


def test_auroc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    doubt, wrong = rng.integers(0, 12, 80).astype(float), rng.random(80) < 0.3
    expected = stats.mannwhitneyu(doubt[wrong], doubt[~wrong]).statistic / (wrong.sum() * (~wrong).sum())
    assert auroc(doubt, wrong) == pytest.approx(expected)
    times = rng.integers(0, 4, (5, 80))
    drawn = [auroc(np.repeat(doubt, row), np.repeat(wrong, row)) for row in times]
    assert auroc(doubt, wrong, times.astype(float)) == pytest.approx(np.array(drawn))
    assert math.isnan(auroc(doubt, np.zeros(80, bool)))


def test_risk_coverage():
    score, right = np.array([0.9, 0.8, 0.8, 0.1]), np.array([True, False, True, False])
    coverage, risk = risk_coverage(score, right)
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1]
    assert risk == pytest.approx([0, 0.25, 1 / 3, 0.5])  # the two of 0.8 are half wrong in either place


def test_plot(tmp_path):
    found = calibrate(simulate(300, 2, 10), held_out=simulate(200, 1, 11), resamples=20)
    for number, calibration in enumerate((found, calibrate(simulate(20, 1, 12), resamples=20))):
        draw(calibration, tmp_path / f"{number}.png")
        with Image.open(tmp_path / f"{number}.png") as picture:
            assert picture.format == "PNG" and picture.width > 600
    with pytest.raises(ArgumentError, match="cannot write"):
        draw(found, tmp_path / "none" / "plot.png")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entropy": [0.5, math.nan]}, "finite"),
        ({"entropy": [0.5]}, "expected 2 numbers"),
        ({"right": [1, 2]}, "true and false"),
        ({"right": []}, "there are none"),
        ({"groups": ["a"]}, "expected 2, one per label"),
        ({"groups": ["a", "a"]}, "two pictures"),
        ({"target": 1.0}, "target"),
        ({"delta": 0.0}, "delta"),
        ({"features": "all"}, "entropy, probability, both"),
    ],
)
def test_bad_arguments(changes, message):
    arguments: dict[str, Any] = {"entropy": [0.5, 0.6], "probability": [0.5, 0.6], "right": [1, 0], "groups": None}
    with pytest.raises(ArgumentError, match=message):
        values = arguments | changes
        answers = of(*(values.pop(name) for name in ("entropy", "probability", "right", "groups")))
        calibrate(answers, **values)


def test_policy_comes_back_from_its_file(tmp_path):
    for policy in (make(), make(threshold=None, typical={}), calibrate(simulate(300, 2, 13)).policy):
        policy.save(tmp_path / "policy.json")
        assert Policy.load(tmp_path / "policy.json") == policy
    assert [path.name for path in tmp_path.iterdir()] == ["policy.json"]
    with pytest.raises(ArgumentError, match="cannot write"):
        make().save(tmp_path / "none" / "policy.json")


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("schema", "lvlm-fastxai/policy/3", "no policy of the schema"),
        ("features", "three", "features"),
        ("features", ["entropy", "three"], "features"),
        ("features", ["entropy", "entropy"], "features"),
        ("features", [["entropy"], "probability"], "damaged"),
        ("typical", {"entropy": 1.5}, "typical"),
        ("coefficients", [1.0], "expected 2 finite numbers"),
        ("coefficients", [1.0, "2"], "expected 2 finite numbers"),
        ("scale", [1.0, 0.0], "positive"),
        ("threshold", 1.5, "threshold"),
        ("threshold", True, "threshold"),
        ("target", None, "target"),
        ("model_fingerprint", 12, "text"),
        ("figures", [], "figures"),
        ("surprise", 1, "unknown entries surprise"),
    ],
)
def test_damaged_policies_are_refused(tmp_path, entry, value, message):
    path = tmp_path / "policy.json"
    make().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {entry: value}))
    with pytest.raises(ArgumentError, match=message):
        Policy.load(path)


@pytest.mark.parametrize(
    "content", [None, b"", b"[1]", b"{", b"\xff\xfe", b'{"schema": "lvlm-fastxai/policy/2"}', b"[" * 200_000]
)
def test_files_that_hold_no_policy_are_refused(tmp_path, content):
    path = tmp_path / "policy.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArgumentError, match=r"policy\.json"):
        Policy.load(path)


def test_policy_is_refused_on_another_model_or_head():
    policy = make()
    policy.check("0123456789abcdef", "fedcba9876543210")
    with pytest.raises(
        ModelMismatchError, match=r"of the model 0123456789abcdef \(a model\), these are of ffff.*calibrate"
    ):
        policy.check("ffff", "fedcba9876543210")
    with pytest.raises(
        ModelMismatchError, match="of the map head fedcba9876543210, these are of one without fingerprint"
    ):
        policy.check("0123456789abcdef", "")


def test_reasons_say_what_is_unusual():
    policy = make()
    good = policy.decide(given(0.45, 0.98))
    assert good.accepted and good.reason.endswith("accepted from 90% on.")
    spread = policy.decide(given(0.9, 0.98))
    assert (
        spread.verdict == "review"
        and "more spread out than usual" in spread.reason
        and "sure of its words" not in spread.reason
    )
    assert "entropy 0.900, for half of the right answers at most 0.450" in spread.reason
    unsure = policy.decide(given(0.45, 0.3))
    assert (
        "less sure of its words than usual: probability 30%, for half of the right answers at least 98%"
        in unsure.reason
    )
    assert "spread" not in unsure.reason
    two = policy.decide(given(0.9, 0.4)).reason
    assert two.index("spread") < two.index("less sure")  # 4.5 against 4.3 units of the score's log-odds
    neither = make(threshold=0.999).decide(given(0.4, 0.985))
    assert neither.reason.endswith("together they fall short.")


def test_shares_that_round_to_the_same_are_told_apart():
    policy = make(threshold=0.9)
    entropy = 0.5 - 0.1 * (math.log(0.8999 / 0.1001) - 1.0)
    reason = policy.decide(given(entropy, 1 / (1 + math.exp(-3)))).reason
    assert "right: 89.99%; accepted from 90.00% on" in reason


@pytest.mark.parametrize(
    ("entropy", "probability", "missing"),
    [(None, 0.9, "no entropy"), (0.5, None, "no probability"), (math.nan, math.inf, "no entropy and no probability")],
)
def test_answers_without_features_go_to_review(entropy, probability, missing):
    decision = make().decide(given(entropy, probability))
    assert (decision.verdict, decision.score) == ("review", 0.0) and missing in decision.reason
    only = make(features=("entropy",), mean=(0.5,), scale=(0.1,), coefficients=(-1.0,), threshold=0.5)
    assert only.decide(given(0.4, None)).accepted


def test_features_of_numpy_and_at_the_ends():
    policy = make()
    assert policy.decide(given(np.float32(0.25), np.float16(0.75))) == policy.decide(given(0.25, 0.75))
    assert policy.decide(given(0.45, 1.0)).accepted and not policy.decide(given(0.45, 0.0)).accepted


def test_a_policy_of_the_first_version_decides_as_it_did(tmp_path):
    """The file was written by that version; what it decided about these two answers is in its words."""
    policy = Policy.load(Path(__file__).parent / "support" / "policy_version_1.json")
    assert policy == make()
    assert policy.decide(given(0.45, 0.98)).accepted
    assert policy.decide(given(0.9, 0.4)).score == 0.0016497751952068206
    policy.save(tmp_path / "policy.json")
    assert json.loads((tmp_path / "policy.json").read_text())["schema"] == "lvlm-fastxai/policy/2"
    assert Policy.load(tmp_path / "policy.json") == policy


@pytest.mark.parametrize(("features", "names"), [("both", ("entropy", "probability")), ("entropy", ("entropy",))])
def test_feature_sets_of_the_first_version(tmp_path, features, names):
    path = tmp_path / "policy.json"
    stored = json.loads((Path(__file__).parent / "support" / "policy_version_1.json").read_text())
    width = len(names)
    lists = {name: stored[name][:width] for name in ("mean", "scale", "coefficients")}
    path.write_text(json.dumps(stored | lists | {"features": features, "typical_probability": None}))
    policy = Policy.load(path)
    assert policy.features == names and policy.typical == {"entropy": 0.45}
    path.write_text(json.dumps(stored | {"features": 3}))
    with pytest.raises(ArgumentError, match="damaged"):
        Policy.load(path)


def test_a_new_feature_needs_its_entry_in_the_list_alone(monkeypatch):
    """Calibrated, decided by, explained and stored like the two that there are."""
    entry = Feature(
        "Trust", "confidence", "log-odds", "percentage", "More trusted", "The judge trusts it less than usual"
    )
    monkeypatch.setitem(FEATURES, "trust", entry)
    answers = simulate(600, 2, 21)
    trust = np.clip(answers.right * 0.5 + 0.5 * np.random.default_rng(0).random(len(answers)), 0, 1)
    answers = Answers.of({**answers.features, "trust": trust}, answers.right, answers.groups)
    found = calibrate(answers, resamples=20)
    assert found.policy.features == ("entropy", "probability", "trust")
    assert list(found.curves) == ["entropy", "probability", "trust", "entropy+probability+trust"]
    assert found.report["threshold_part"]["figures"]["trust"]["auroc"] > 0.8
    alone = calibrate(answers, features="trust", resamples=20).policy
    decision = alone.decide({"trust": 0.1})
    assert decision.verdict == "review" and "The judge trusts it less than usual: trust 10%" in decision.reason
    assert alone.decide({"entropy": 0.1}).reason == "Nothing can be said: the answer has no trust."
