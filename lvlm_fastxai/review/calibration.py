"""Fits a policy to labelled answers, with a promise on the share of accepted answers that are right.

The answers are split by group, so that all questions about one picture stay together. On one part a logistic model
learns to estimate the chance of being right; the other part chooses the threshold (`thresholds`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError
from ..evaluate.bootstrap import Interval
from ..evaluate.metrics import auroc, risk_coverage
from .answers import Answers
from .features import FEATURES, parse_features, set_name
from .policy import Identity, Policy, feature_matrix
from .thresholds import accepted_part, choose_threshold, correlation_within_group

__all__ = ["Calibration", "calibrate", "check"]

FIT_SHARE = 1 / 3
"""Of the groups that the logistic model is fitted on; three numbers need fewer answers than a tail of a precision."""


@dataclass(frozen=True)
class Calibration:
    """A policy and how it came about.

    Attributes:
        policy: to save.
        report: figures of every feature set on the threshold part, and of the held-out answers if there were any.
        curves: name of the feature set → (coverage, risk), each (n,), on the held-out answers or the threshold part.
        curves_of: which of the two.
        notes: what a reader must know, in sentences.
    """

    policy: Policy
    report: Mapping[str, Any]
    curves: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]]
    curves_of: str
    notes: tuple[str, ...] = ()


def calibrate(
    answers: Answers,
    *,
    features: str | Sequence[str] | None = None,
    target: float = 0.95,
    delta: float = 0.05,
    held_out: Answers | None = None,
    fit_share: float = FIT_SHARE,
    seed: int = 0,
    resamples: int = 1000,
    identity: Identity | None = None,
    source: str = "",
) -> Calibration:
    """Fit a policy to labelled answers.

    Args:
        answers: of one model and head.
        features: that the policy decides by; None: all that the answers have. Figures are reported for each feature
            alone and for all together.
        target: share of accepted answers that must be right.
        delta: chance that the threshold chosen misses the target.
        held_out: further answers, of other pictures, that the policy is checked on and that nothing is chosen by.
        fit_share: of the groups, for the logistic model; the rest chooses the threshold.
        seed: of the split and of the bootstrap.
        resamples: of the bootstrap over groups.
        identity: whose answers these are; kept in the policy.
        source: where they are from; kept in the policy.

    Returns:
        The policy, which reviews everything where no threshold keeps the promise, and its figures.

    Raises:
        ArgumentError: fewer than two groups, or an argument that makes no sense.

    Example:
        >>> confidence = np.linspace(0, 1, 600)
        >>> found = calibrate(Answers.of({"probability": confidence}, confidence > 0.3), target=0.9, resamples=10)
        >>> found.policy.decide({"probability": 0.9}).accepted, found.policy.decide({"probability": 0.1}).accepted
        (True, False)
    """
    known = [name for name in FEATURES if name in answers.features]
    chosen_names = parse_features(known if features is None else features)
    used = tuple(name for name in FEATURES if name in chosen_names)
    for name, share in (("target", target), ("delta", delta), ("fit_share", fit_share)):
        if not 0 < share < 1:
            raise ArgumentError(f"{name}: expected a number between 0 and 1, got {share}")
    if answers.pictures < 2:
        raise ArgumentError("groups: expected answers about two pictures at least, one part to fit and one to choose")
    fit, tune = _split(answers, fit_share, seed)
    sets = [*((name,) for name in known), tuple(known), used]
    policies = {set_name(names): _fit_logistic(fit, names, target, delta) for names in dict.fromkeys(sets)}
    chosen = policies[set_name(used)]
    correlation = correlation_within_group(fit, chosen)
    threshold, tried = choose_threshold(fit, tune, chosen, correlation)
    chosen = replace(chosen, threshold=threshold)
    report: dict[str, Any] = {
        "target": target,
        "delta": delta,
        "features": set_name(used),
        "answers": len(answers),
        "groups": answers.pictures,
        "fit": _part(fit),
        "threshold_part": {
            **_part(tune),
            "thresholds_tried": tried,
            "correlation_within_group": correlation,
            **accepted_part(tune, chosen, correlation),
            "figures": _figures(tune, policies, resamples, seed),
        },
    }
    curves_of, shown = "answers that chose the threshold", tune
    if held_out is not None:
        report["held_out"] = {**check(chosen, held_out), "figures": _figures(held_out, policies, resamples, seed)}
        curves_of, shown = "held-out answers", held_out
    chosen = replace(
        chosen,
        **asdict(identity or Identity()),
        typical=_typical(fit),
        fitted_on={"source": source, "answers": len(answers), "groups": answers.pictures, "seed": seed},
        figures={name: report[name] for name in ("fit", "threshold_part", "held_out") if name in report},
    )
    curves = {name: risk_coverage(-_doubt(policy, shown), shown.right) for name, policy in policies.items()}
    return Calibration(chosen, report, curves, curves_of, _notes(fit, tune, chosen))


def check(policy: Policy, answers: Answers) -> dict[str, Any]:
    """Return what a policy accepts of answers that had no part in it.

    Returns:
        "answers", "groups", "right" (share of all); "accepted", "coverage", "accepted_right"; "precision" of the
        accepted, "precision_bound" at the policy's δ, "precision_low" and "precision_high", the 95 % Clopper–Pearson
        interval, all with the design effect of the groups; "kept": whether that interval reaches the target. None for
        what no accepted answer defines.

    Example:
        >>> policy = Policy(("entropy",), (0.5,), (0.1,), (-1.0,), 0.0, threshold=0.5, target=0.95, delta=0.05)
        >>> check(policy, Answers.of({"entropy": [0.1, 0.2, 0.9]}, [True, True, False]))["accepted"]
        2
    """
    correlation = correlation_within_group(answers, policy)
    found = accepted_part(answers, policy, correlation)
    return {
        **_part(answers),
        "correlation_within_group": correlation,
        **found,
        "kept": found["precision_high"] >= policy.target if found["accepted"] else None,
    }


def _part(part: Answers) -> dict[str, Any]:
    return {"answers": len(part), "groups": part.pictures, "right": float(part.right.mean())}


def _notes(fit: Answers, tune: Answers, policy: Policy) -> tuple[str, ...]:
    notes = []
    if fit.right.all() or not fit.right.any():
        same = "right" if fit.right.all() else "wrong"
        notes.append(f"every answer that the model was fitted on is {same}: it gives all answers the same score")
    if policy.threshold is None:
        needed = math.ceil(math.log(policy.delta) / math.log(policy.target))  # Clopper–Pearson without a wrong answer
        notes.append(
            f"no threshold promises {100 * policy.target:.3g}% right: the policy sends every answer to review (a "
            f"promise at δ = {policy.delta:g} needs at least {needed} accepted answers that are all right; there are "
            f"{len(tune)} to choose by, {tune.right.mean():.1%} of them right)"
        )
    return tuple(notes)


def _split(answers: Answers, fit_share: float, seed: int) -> tuple[Answers, Answers]:
    """Split into two parts that have no group in common, each with one at least."""
    names = np.random.default_rng(seed).permutation(np.unique(answers.groups))
    count = min(max(1, round(fit_share * len(names))), len(names) - 1)
    inside = np.isin(answers.groups, names[:count])
    return answers[inside], answers[~inside]


def _fit_logistic(part: Answers, features: tuple[str, ...], target: float, delta: float) -> Policy:
    matrix = feature_matrix(features, part.features)
    mean, scale = matrix.mean(axis=0), matrix.std(axis=0)
    # A constant feature has a spread of rounding errors, which standardising would turn into a feature.
    scale = np.where(scale > 1e-9 * np.maximum(1, np.abs(mean)), scale, 1.0)
    if part.right.all() or not part.right.any():
        # One class has no logistic model; Laplace's rule of succession instead of an infinite intercept.
        share = (part.right.sum() + 1) / (len(part) + 2)
        coefficients, intercept = np.zeros(len(mean)), math.log(share / (1 - share))
    else:
        try:
            from sklearn.linear_model import LogisticRegression
        except ImportError:
            raise ArgumentError(
                "calibrate: scikit-learn is not installed (pip install 'lvlm_fastxai[fastrm]')"
            ) from None
        model = LogisticRegression().fit((matrix - mean) / scale, part.right)
        coefficients, intercept = model.coef_[0], float(model.intercept_[0])

    def plain(values: NDArray[np.float64]) -> tuple[float, ...]:
        return tuple(float(value) for value in values)

    return Policy(features, plain(mean), plain(scale), plain(coefficients), intercept, None, target, delta)


def _typical(part: Answers) -> dict[str, float]:
    """Return the median of each feature over the right answers; nothing where there are none."""
    right = part[part.right]
    if not len(right):
        return {}
    return {name: float(np.clip(np.median(values), 0, 1)) for name, values in right.features.items()}


def _figures(part: Answers, policies: Mapping[str, Policy], resamples: int, seed: int) -> dict[str, Any]:
    """Return, per feature set, AUROC of finding wrong answers with its 95 % interval over groups, and AURC."""
    found = {}
    for name, policy in policies.items():
        doubt = _doubt(policy, part)
        area = _auroc_interval(doubt, part, resamples, seed)
        found[name] = {
            "auroc": _or_none(area.value),
            "auroc_low": _or_none(area.low),
            "auroc_high": _or_none(area.high),
            "aurc": float(risk_coverage(-doubt, part.right)[1].mean()),
        }
    return found


def _doubt(policy: Policy, part: Answers) -> NDArray[np.float64]:
    """Return (n,) doubts: of a single feature its values, which no model can turn round; else the model's scores."""
    if len(policy.features) > 1:
        return -policy.scores(part.features)
    values = part.features[policy.features[0]]
    return values if FEATURES[policy.features[0]].high_means == "doubt" else -values


def _auroc_interval(doubt: NDArray[np.float64], part: Answers, resamples: int, seed: int) -> Interval:
    """Percentile bootstrap over groups."""
    value = auroc(doubt, ~part.right)
    _, group = np.unique(part.groups, return_inverse=True)
    count = int(group.max()) + 1
    if math.isnan(value) or count < 2:
        return Interval(value, math.nan, math.nan)
    generator = np.random.default_rng(seed)
    areas = []
    # In pieces: all resamples of a large set at once would be gigabytes.
    piece = max(1, 4_000_000 // len(part))
    for start in range(0, resamples, piece):
        draws = generator.multinomial(count, np.full(count, 1 / count), size=min(piece, resamples - start))
        areas.append(auroc(doubt, ~part.right, draws[:, group].astype(np.float64)))
    drawn = np.concatenate(areas)
    drawn = drawn[np.isfinite(drawn)]  # a few wrong answers can all be missing from a resample
    if len(drawn) == 0:
        return Interval(value, math.nan, math.nan)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Interval(value, float(low), float(high))


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
