"""Chooses the score from which answers are accepted, so that a promise on their precision is kept.

The threshold is chosen by fixed-sequence testing (Angelopoulos, Bates, Candès, Jordan, Lei: Learn then Test, arXiv
2110.01052, section 2.3). Thresholds are tried from a strict one downwards, in an order fixed by the answers that fitted
the model, as long as the one-sided Clopper–Pearson bound on the precision of what is accepted reaches the target. The
first that fails ends it. However many are tried, the chance that the chosen one misses the target is at most δ; taking
the best of all thresholds, each tested at δ, would not keep that.

Answers about one picture are right or wrong together, while Clopper–Pearson counts independent answers. Their number is
therefore divided by the design effect 1 + (m − 1) ρ (Korn and Graubard 1998): m answers per picture, ρ their
correlation, estimated on the answers that fitted the model.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .answers import Answers
from .policy import Policy

__all__ = ["accepted_part", "choose_threshold", "correlation_within_group", "precision_bound"]

STEPS = 60
"""Thresholds that are tried at most."""


def precision_bound(right: float, accepted: float, level: float) -> float:
    """Return the one-sided Clopper–Pearson lower bound on a precision.

    It is the precision at which `right` or more of `accepted` answers are right with the chance `level`.

    Args:
        right, accepted: counts; not necessarily integers, since a design effect divides both.
        level: in 0 … 1.

    Example:
        >>> round(precision_bound(59, 59, 0.05), 4)
        0.9505
    """
    from scipy.special import betaincinv

    return 0.0 if right <= 0 else float(betaincinv(right, accepted - right + 1, level))


def correlation_within_group(part: Answers, policy: Policy) -> float:
    """Return the correlation of being right, beyond what the score says, between two answers of one group.

    0 where every group has one answer.
    """
    rest = part.right - policy.scores(part.features)
    rest = rest - rest.mean()
    _, group = np.unique(part.groups, return_inverse=True)
    size, total, square = (np.bincount(group, weights=values) for values in (np.ones(len(rest)), rest, rest**2))
    pairs, spread = float((size * (size - 1)).sum()), float(square.sum()) / len(rest)
    if pairs == 0 or spread == 0:
        return 0.0
    return float(np.clip(((total**2).sum() - square.sum()) / pairs / spread, 0, 1))


def design_effect(groups: NDArray[np.int64], correlation: float) -> float:
    """Return how many dependent answers count as one.

    Kish's 1 + (m − 1) ρ with m = Σ m_g² / Σ m_g answers per group.
    """
    size = np.bincount(groups - groups.min()).astype(np.float64)
    return 1 + float((size**2).sum() / size.sum() - 1) * correlation


def choose_threshold(fit: Answers, tune: Answers, policy: Policy, correlation: float) -> tuple[float | None, int]:
    """Return the lowest threshold before the first whose bound misses the target, and how many were tried.

    Args:
        fit: the answers that fitted the policy's model; they fix the order.
        tune: the answers that test the thresholds.
        policy: without a threshold yet.
        correlation: of answers within a group.

    Returns:
        The threshold, None if the first one fails; the number of tries.
    """
    score = policy.scores(tune.features)
    found, tried = None, 0
    for threshold in _sequence(fit, len(tune), policy, correlation):
        accepted = score >= threshold
        tried += 1
        if not accepted.any():
            break
        effect = design_effect(tune.groups[accepted], correlation)
        right, count = float(tune.right[accepted].sum()), float(accepted.sum())
        if precision_bound(right / effect, count / effect, policy.delta) < policy.target:
            break
        found = threshold
    return found, tried


def accepted_part(part: Answers, policy: Policy, correlation: float) -> dict[str, Any]:
    """Return what a policy accepts: how many, how many right, precision, its bound at δ and its 95 % interval."""
    score = policy.scores(part.features)
    accepted = score >= policy.threshold if policy.threshold is not None else np.zeros(len(part), bool)
    count, right = int(accepted.sum()), int(part.right[accepted].sum())
    found: dict[str, Any] = {"accepted": count, "accepted_right": right, "coverage": count / len(part)}
    if count == 0:
        return {**found, **dict.fromkeys(("precision", "precision_bound", "precision_low", "precision_high"))}
    effect = design_effect(part.groups[accepted], correlation)
    sure, of = right / effect, count / effect
    return {
        **found,
        "precision": right / count,
        "precision_bound": precision_bound(sure, of, policy.delta),
        "precision_low": precision_bound(sure, of, 0.025),
        "precision_high": 1 - precision_bound(of - sure, of, 0.025),
    }


def _sequence(fit: Answers, tune: int, policy: Policy, correlation: float) -> list[float]:
    """Return the thresholds to try, strictest first; each accepts a larger share of the part that fitted the model.

    They must not depend on the `tune` answers that test them. Few accepted answers prove nothing and many include
    wrong ones, so the first threshold is the one that most likely passes, as far as the first part can tell.
    """
    from scipy.stats import betabinom

    score = policy.scores(fit.features)
    order = np.argsort(-score, kind="stable")
    score, right = score[order], np.cumsum(fit.right[order])
    shares = np.arange(1, STEPS + 1) / STEPS
    places = np.ceil(shares * len(score)).astype(int) - 1
    effect = design_effect(fit.groups, correlation)
    count = shares * tune / effect
    errors = [_errors_allowed(n, policy.target, policy.delta) for n in count.tolist()]
    # Jeffreys' posterior of the precision, so that a share of few answers does not look safer than it is.
    sure, unsure = right[places] / effect + 0.5, (places + 1 - right[places]) / effect + 0.5
    passes = betabinom.cdf(errors, np.maximum(np.floor(count), 1), unsure, sure)
    sequence: list[float] = np.unique(score[places[np.argmax(passes) :]])[::-1].tolist()
    return sequence


def _errors_allowed(count: float, target: float, delta: float) -> int:
    """Return the most wrong answers among `count` accepted ones with which the bound reaches the target, or -1."""

    def too_many(errors: int) -> bool:
        return precision_bound(count - errors, count, delta) < target

    return bisect_left(range(math.ceil(count)), True, key=too_many) - 1
