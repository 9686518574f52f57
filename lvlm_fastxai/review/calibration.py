"""Fits a policy to labelled answers, with a promise on the share of accepted answers that are right.

The answers are split by group (all questions about one picture stay together). On one part a logistic model learns to
estimate the chance of being right; on the other part the threshold is chosen by fixed-sequence testing (Angelopoulos,
Bates, Candès, Jordan, Lei: Learn then Test, arXiv 2110.01052, section 2.3): thresholds are tried from a strict one
downwards, in an order fixed by the first part alone, as long as the one-sided Clopper–Pearson bound on the precision
of what is accepted reaches the target. The first that fails ends it, so however many are tried, the chance that the
chosen one misses the target is at most δ; taking the best of all thresholds, each tested at δ, would not keep that.

Answers about one picture are right or wrong together. Clopper–Pearson counts independent answers, so their number is
reduced by the design effect 1 + (m − 1) ρ (Korn and Graubard 1998): m answers per picture, ρ their correlation,
estimated on the first part.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ArgumentError
from ..evaluate.bootstrap import Interval
from ..evaluate.metrics import auroc, risk_coverage
from .policy import FEATURES, Policy, feature_matrix

__all__ = ["Answers", "Calibration", "calibrate", "check", "draw", "precision_bound"]

FIT_SHARE = 1 / 3
"""Of the groups that the logistic model is fitted on; three numbers need fewer answers than a tail of a precision."""

STEPS = 60
"""Thresholds that are tried at most."""


@dataclass(frozen=True)
class Answers:
    """Labelled answers.

    Attributes:
        entropy: (n,) of their maps, 0 … 1.
        probability: (n,) geometric means of their tokens' probabilities.
        right: (n,) bool.
        groups: (n,) integers; answers of one group are about one picture.
    """

    entropy: NDArray[np.float64]
    probability: NDArray[np.float64]
    right: NDArray[np.bool_]
    groups: NDArray[np.int64]

    @classmethod
    def of(
        cls,
        entropy: ArrayLike,
        probability: ArrayLike,
        right: ArrayLike,
        groups: Sequence[Hashable] | NDArray[Any] | None = None,
    ) -> Answers:
        """Checked arrays; without `groups` every answer is a group of its own.

        Raises:
            ArgumentError: lengths differ, there are none, or a feature is no finite number.
        """
        count = len(np.atleast_1d(np.asarray(right)))
        if count == 0:
            raise ArgumentError("answers: there are none")
        features = {"entropy": np.asarray(entropy, np.float64), "probability": np.asarray(probability, np.float64)}
        for name, values in features.items():
            if values.shape != (count,):
                raise ArgumentError(f"{name}: expected {count} numbers, one per label, got shape {values.shape}")
            if not np.isfinite(values).all():
                raise ArgumentError(f"{name}: expected finite numbers, got {values[~np.isfinite(values)][0]}")
        labels = np.asarray(right)
        if labels.shape != (count,) or not np.isin(labels, (0, 1)).all():
            raise ArgumentError("right: expected one of true and false per answer")
        numbers: dict[Hashable, int] = {}
        names = range(count) if groups is None else groups
        if len(names) != count:
            raise ArgumentError(f"groups: expected {count}, one per label, got {len(names)}")
        indices = [numbers.setdefault(name, len(numbers)) for name in names]
        return cls(**features, right=labels.astype(bool), groups=np.array(indices, np.int64))

    def __len__(self) -> int:
        return len(self.right)

    @property
    def pictures(self) -> int:
        """Number of groups."""
        return len(np.unique(self.groups))

    def __getitem__(self, chosen: NDArray[Any]) -> Answers:
        return Answers(self.entropy[chosen], self.probability[chosen], self.right[chosen], self.groups[chosen])


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
    entropy: ArrayLike,
    probability: ArrayLike,
    right: ArrayLike,
    groups: Sequence[Hashable] | NDArray[Any] | None = None,
    *,
    target: float = 0.95,
    delta: float = 0.05,
    features: str = "both",
    held_out: Answers | None = None,
    fit_share: float = FIT_SHARE,
    seed: int = 0,
    resamples: int = 1000,
    model_name: str = "",
    model_fingerprint: str = "",
    head_fingerprint: str = "",
    source: str = "",
) -> Calibration:
    """Fit a policy to (n,) labelled answers.

    Args:
        entropy: of each answer's map, 0 … 1.
        probability: of each answer.
        right: whether it is.
        groups: the picture of each answer; None: every answer has its own.
        target: share of accepted answers that must be right.
        delta: chance that the threshold chosen misses the target.
        features: that the policy uses: "entropy", "probability" or "both"; figures are reported for all three.
        held_out: further answers, of other pictures, that the policy is checked on and that nothing is chosen by.
        fit_share: of the groups, for the logistic model; the rest chooses the threshold.
        seed: of the split and of the bootstrap.
        resamples: of the bootstrap over groups.
        model_name, model_fingerprint, head_fingerprint, source: whose answers these are; kept in the policy.

    Returns:
        The policy, which reviews everything where no threshold keeps the promise, and its figures.

    Raises:
        ArgumentError: fewer than two groups, or an argument that makes no sense.
    """
    if features not in FEATURES:
        raise ArgumentError(f"features: expected one of {', '.join(FEATURES)}, got {features!r}")
    for name, share in (("target", target), ("delta", delta), ("fit_share", fit_share)):
        if not 0 < share < 1:
            raise ArgumentError(f"{name}: expected a number between 0 and 1, got {share}")
    answers = Answers.of(entropy, probability, right, groups)
    if answers.pictures < 2:
        raise ArgumentError("groups: expected answers about two pictures at least, one part to fit and one to choose")
    fit, tune = _split(answers, fit_share, seed)
    notes = []
    policies = {
        name: replace(
            _fit_logistic(fit, name, target, delta),
            model_name=model_name,
            model_fingerprint=model_fingerprint,
            head_fingerprint=head_fingerprint,
        )
        for name in FEATURES
    }
    chosen = policies[features]
    if fit.right.all() or not fit.right.any():
        same = "right" if fit.right.all() else "wrong"
        notes.append(f"every answer that the model was fitted on is {same}: it gives all answers the same score")
    correlation = _correlation(fit, chosen)
    threshold, tried = _threshold(fit, tune, chosen, correlation)
    chosen = replace(chosen, threshold=threshold)
    if threshold is None:
        needed = math.ceil(math.log(delta) / math.log(target))  # Clopper–Pearson without a wrong answer
        notes.append(
            f"no threshold promises {100 * target:.3g}% right: the policy sends every answer to review (a promise at "
            f"δ = {delta:g} needs at least {needed} accepted answers that are all right; there are {len(tune)} to "
            f"choose by, {tune.right.mean():.1%} of them right)"
        )
    report: dict[str, Any] = {
        "target": target,
        "delta": delta,
        "features": features,
        "answers": len(answers),
        "groups": answers.pictures,
        "fit": {"answers": len(fit), "groups": fit.pictures, "right": float(fit.right.mean())},
        "threshold_part": {
            "answers": len(tune),
            "groups": tune.pictures,
            "right": float(tune.right.mean()),
            "thresholds_tried": tried,
            "correlation_within_group": correlation,
            **_accepted(tune, chosen, correlation),
            "figures": _figures(tune, policies, resamples, seed),
        },
    }
    curves_of, shown = "answers that chose the threshold", tune
    if held_out is not None:
        report["held_out"] = {**check(chosen, held_out), "figures": _figures(held_out, policies, resamples, seed)}
        curves_of, shown = "held-out answers", held_out
    right_ones = fit[fit.right]
    chosen = replace(
        chosen,
        typical_entropy=_median(right_ones.entropy),
        typical_probability=_median(right_ones.probability),
        fitted_on={"source": source, "answers": len(answers), "groups": answers.pictures, "seed": seed},
        figures={name: report[name] for name in ("fit", "threshold_part", "held_out") if name in report},
    )
    curves = {name: risk_coverage(-_doubt(policy, shown), shown.right) for name, policy in policies.items()}
    return Calibration(chosen, report, curves, curves_of, tuple(notes))


def check(policy: Policy, answers: Answers) -> dict[str, Any]:
    """What a policy accepts of answers that had no part in it.

    Returns:
        "answers", "groups", "right" (share of all); "accepted", "coverage", "accepted_right"; "precision" of the
        accepted, "precision_bound" at the policy's δ, "precision_low" and "precision_high", the 95 % Clopper–Pearson
        interval, all with the design effect of the groups; "kept": whether that interval reaches the target. None for
        what no accepted answer defines.
    """
    correlation = _correlation(answers, policy)
    found = _accepted(answers, policy, correlation)
    return {
        "answers": len(answers),
        "groups": answers.pictures,
        "right": float(answers.right.mean()),
        "correlation_within_group": correlation,
        **found,
        "kept": found["precision_high"] >= policy.target if found["accepted"] else None,
    }


def policy_scores(policy: Policy, answers: Answers) -> NDArray[np.float64]:
    """(n,) `Policy.scores` of answers."""
    return policy.scores(answers.entropy, answers.probability)


def precision_bound(right: float, accepted: float, level: float) -> float:
    """One-sided Clopper–Pearson lower bound: the precision p at which `right` or more of `accepted` has chance `level`.

    Counts need not be integers: a design effect divides both.
    """
    from scipy.special import betaincinv

    return 0.0 if right <= 0 else float(betaincinv(right, accepted - right + 1, level))


def draw(calibration: Calibration, path: str | Path) -> None:
    """Draw the risk–coverage curves and where the policy stands as a PNG.

    Raises:
        ArgumentError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ArgumentError("no plot: matplotlib is not installed (pip install matplotlib)") from None
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    policy = calibration.policy
    held = calibration.report.get("held_out")
    part = held or calibration.report["threshold_part"]
    # Okabe and Ito's palette: told apart by colour-blind readers too.
    colors = {"entropy": "#D55E00", "probability": "#56B4E9", "both": "#000000"}
    for name, (coverage, risk) in calibration.curves.items():
        area = part["figures"][name]["aurc"]
        axes.plot(coverage, risk, color=colors[name], label=f"{name}: AURC {area:.3f}")
    axes.axhline(1 - policy.target, color="#666666", ls="--", lw=1, label=f"target: {1 - policy.target:.1%} wrong")
    axes.axhline(1 - part["right"], color="#666666", ls=":", lw=1, label=f"no selection: {1 - part['right']:.1%} wrong")
    if part["precision"] is not None:
        bars = None
        if held:
            bars = [[held["precision_high"] - held["precision"]], [held["precision"] - held["precision_low"]]]
        label = f"policy ({policy.features}): {part['coverage']:.1%} accepted, {part['precision']:.1%} of them right"
        place = ([part["coverage"]], [1 - part["precision"]])
        axes.errorbar(*place, yerr=bars, color="#CC79A7", fmt="o", capsize=4, label=label, zorder=5)
    axes.set(xlim=(0, 1.01), ylim=(0, None), xlabel="coverage: share of answers accepted", ylabel="risk: share wrong")
    axes.set_title(f"{part['answers']} {calibration.curves_of}", fontsize=11)
    axes.legend(fontsize=9)
    try:
        figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise ArgumentError(f"plot: cannot write '{path}': {error.strerror or error}") from error


def _split(answers: Answers, fit_share: float, seed: int) -> tuple[Answers, Answers]:
    """Two parts with no group in common, each with one at least."""
    names = np.random.default_rng(seed).permutation(np.unique(answers.groups))
    count = min(max(1, round(fit_share * len(names))), len(names) - 1)
    inside = np.isin(answers.groups, names[:count])
    return answers[inside], answers[~inside]


def _fit_logistic(part: Answers, features: str, target: float, delta: float) -> Policy:
    matrix = feature_matrix(features, part.entropy, part.probability)
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


def _correlation(part: Answers, policy: Policy) -> float:
    """Of being right beyond what the score says, between two answers of one group; 0 where groups have one answer."""
    rest = part.right - policy_scores(policy, part)
    rest = rest - rest.mean()
    _, group = np.unique(part.groups, return_inverse=True)
    size, total, square = (np.bincount(group, weights=values) for values in (np.ones(len(rest)), rest, rest**2))
    pairs, spread = float((size * (size - 1)).sum()), float(square.sum()) / len(rest)
    if pairs == 0 or spread == 0:
        return 0.0
    return float(np.clip(((total**2).sum() - square.sum()) / pairs / spread, 0, 1))


def _design_effect(groups: NDArray[np.int64], correlation: float) -> float:
    """How many dependent answers count as one: Kish's 1 + (m − 1) ρ with m = Σ m_g² / Σ m_g answers per group."""
    size = np.bincount(groups - groups.min()).astype(np.float64)
    return 1 + ((size**2).sum() / size.sum() - 1) * correlation


def _errors_allowed(count: float, target: float, delta: float) -> int:
    """Most wrong answers among `count` accepted ones with which the bound reaches the target; -1 where none do."""

    def too_many(errors: int) -> bool:
        return precision_bound(count - errors, count, delta) < target

    return bisect_left(range(math.ceil(count)), True, key=too_many) - 1


def _sequence(fit: Answers, tune: int, policy: Policy, correlation: float) -> list[float]:
    """Thresholds to try, strictest first, that accept a growing share of the part that fitted the model.

    They must not depend on the `tune` answers that test them. Few accepted answers prove nothing and many include
    wrong ones, so the first threshold is the one that most likely passes, as far as the first part can tell.
    """
    from scipy.stats import betabinom

    score = policy_scores(policy, fit)
    order = np.argsort(-score, kind="stable")
    score, right = score[order], np.cumsum(fit.right[order])
    shares = np.arange(1, STEPS + 1) / STEPS
    places = np.ceil(shares * len(score)).astype(int) - 1
    effect = _design_effect(fit.groups, correlation)
    count = shares * tune / effect
    errors = [_errors_allowed(n, policy.target, policy.delta) for n in count.tolist()]
    # Jeffreys' posterior of the precision, so that a share of few answers does not look safer than it is.
    sure, unsure = right[places] / effect + 0.5, (places + 1 - right[places]) / effect + 0.5
    passes = betabinom.cdf(errors, np.maximum(np.floor(count), 1), unsure, sure)
    sequence: list[float] = np.unique(score[places[np.argmax(passes) :]])[::-1].tolist()
    return sequence


def _threshold(fit: Answers, tune: Answers, policy: Policy, correlation: float) -> tuple[float | None, int]:
    """The lowest threshold before the first whose bound misses the target; None if that is the first. And the tries."""
    score = policy_scores(policy, tune)
    found, tried = None, 0
    for threshold in _sequence(fit, len(tune), policy, correlation):
        accepted = score >= threshold
        tried += 1
        if not accepted.any():
            break
        effect = _design_effect(tune.groups[accepted], correlation)
        right, count = float(tune.right[accepted].sum()), float(accepted.sum())
        if precision_bound(right / effect, count / effect, policy.delta) < policy.target:
            break
        found = threshold
    return found, tried


def _accepted(part: Answers, policy: Policy, correlation: float) -> dict[str, Any]:
    """What the policy accepts: how many, how many right, precision, its one-sided bound and its 95 % interval."""
    score = policy_scores(policy, part)
    accepted = score >= policy.threshold if policy.threshold is not None else np.zeros(len(part), bool)
    count, right = int(accepted.sum()), int(part.right[accepted].sum())
    found: dict[str, Any] = {"accepted": count, "accepted_right": right, "coverage": count / len(part)}
    if count == 0:
        return {**found, **dict.fromkeys(("precision", "precision_bound", "precision_low", "precision_high"))}
    effect = _design_effect(part.groups[accepted], correlation)
    sure, of = right / effect, count / effect
    return {
        **found,
        "precision": right / count,
        "precision_bound": precision_bound(sure, of, policy.delta),
        "precision_low": precision_bound(sure, of, 0.025),
        "precision_high": 1 - precision_bound(of - sure, of, 0.025),
    }


def _figures(part: Answers, policies: Mapping[str, Policy], resamples: int, seed: int) -> dict[str, Any]:
    """Per feature set: AUROC of finding wrong answers with its 95 % interval over groups, and AURC."""
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
    """A single feature is judged as it is, so that no model can turn it round; both by the model's score."""
    if policy.features == "both":
        return -policy_scores(policy, part)
    return part.entropy if policy.features == "entropy" else -part.probability


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


def _median(values: NDArray[np.float64]) -> float | None:
    return float(np.clip(np.median(values), 0, 1)) if len(values) else None


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
