"""A calibrated decision about one answer: accept it, or have a person look at it.

A policy turns the entropy of the answer's map and the answer's probability into an estimate of the chance that the
answer is right, and accepts from a threshold on. `calibration` fits it; this module only applies it and needs numpy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ArgumentError, ModelMismatchError
from ..files import write_whole
from ..models.fingerprint import is_outdated

__all__ = ["FEATURES", "SCHEMA", "Decision", "Policy", "feature_matrix"]

SCHEMA = "lvlm-fastxai/policy/1"
FEATURES = {"entropy": ("entropy",), "probability": ("probability",), "both": ("entropy", "probability")}

# Probabilities closer to 0 or 1 than this are rounding: a bf16 model says 1 exactly.
_EDGE = 1e-6


@dataclass(frozen=True)
class Decision:
    """What a policy says of one answer.

    Attributes:
        verdict: "accept" or "review".
        score: estimated chance that the answer is right, 0 … 1; 0 where a feature is missing or no number.
        reason: one to three sentences for the person who looks at it.
    """

    verdict: str
    score: float
    reason: str

    @property
    def accepted(self) -> bool:
        return self.verdict == "accept"


@dataclass(frozen=True)
class Policy:
    """A logistic model of an answer being right, and the score from which answers are accepted.

    Attributes:
        features: "entropy" (of the map), "probability" (of the answer; its log-odds enter the model) or "both".
        mean, scale: of each feature on the answers that the model was fitted on; features enter standardised.
        coefficients, intercept: of the logistic model.
        threshold: accept where score ≥ threshold; None: no threshold kept the promise, everything is reviewed.
        target: share of the accepted answers that must be right.
        delta: chance that calibration picks a threshold that misses the target.
        typical_entropy, typical_probability: medians over the right answers, for the reasons given; None without one.
        model_name, model_fingerprint, head_fingerprint: whose answers the policy was fitted on; it holds for no others.
        fitted_on: what it was fitted on, in words and numbers.
        figures: what it achieved there, and on held-out answers if there were any.
    """

    features: str
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    coefficients: tuple[float, ...]
    intercept: float
    threshold: float | None
    target: float
    delta: float
    typical_entropy: float | None = None
    typical_probability: float | None = None
    model_name: str = ""
    model_fingerprint: str = ""
    head_fingerprint: str = ""
    fitted_on: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.features not in FEATURES:
            raise ArgumentError(f"features: expected one of {', '.join(FEATURES)}, got {self.features!r}")
        width = len(FEATURES[self.features])
        for name in ("mean", "scale", "coefficients"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or len(values) != width or not all(map(_is_number, values)):
                raise ArgumentError(f"{name}: expected {width} finite numbers, got {values!r}")
        if min(self.scale) <= 0:
            raise ArgumentError(f"scale: expected positive numbers, got {self.scale!r}")
        if not _is_number(self.intercept):
            raise ArgumentError(f"intercept: expected a finite number, got {self.intercept!r}")
        for name in ("threshold", "typical_entropy", "typical_probability"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 <= value <= 1):
                raise ArgumentError(f"{name}: expected a number in 0 … 1 or nothing, got {value!r}")
        for name in ("target", "delta"):
            value = getattr(self, name)
            if not (_is_number(value) and 0 < value < 1):
                raise ArgumentError(f"{name}: expected a number between 0 and 1, got {value!r}")
        for name in ("model_name", "model_fingerprint", "head_fingerprint"):
            if not isinstance(getattr(self, name), str):
                raise ArgumentError(f"{name}: expected text, got {getattr(self, name)!r}")
        for name in ("fitted_on", "figures"):
            if not isinstance(getattr(self, name), Mapping):
                raise ArgumentError(f"{name}: expected names with values, got {getattr(self, name)!r}")

    def scores(self, entropy: ArrayLike, probability: ArrayLike) -> NDArray[np.float64]:
        """Estimated chances of being right, (n,), of answers with (n,) map entropies and answer probabilities.

        NaN where a feature that the policy uses is no finite number.
        """
        matrix = feature_matrix(self.features, entropy, probability)
        # A product with `@` may round one row differently alone than among others; a score must not depend on that.
        standard = (matrix - np.array(self.mean)) / np.array(self.scale)
        logit = (standard * np.array(self.coefficients)).sum(axis=1) + self.intercept
        score: NDArray[np.float64] = 1 / (1 + np.exp(-np.clip(logit, -700, 700)))
        return np.where(np.isfinite(matrix).all(axis=1), score, math.nan)

    def decide(self, entropy: float | None, probability: float | None) -> Decision:
        """Accept or review one answer.

        Args:
            entropy: of its map, 0 … 1, mean over the answer's tokens; None if there is none.
            probability: geometric mean of its tokens' probabilities; None if there is none.

        Returns:
            The decision; an answer without a feature that the policy needs goes to review.
        """
        of_answer = [math.nan if value is None else float(value) for value in (entropy, probability)]
        given = dict(zip(FEATURES["both"], of_answer, strict=True))
        missing = [name for name in FEATURES[self.features] if not math.isfinite(given[name])]
        if missing:
            return Decision("review", 0.0, f"Nothing can be said: the answer has no {' and no '.join(missing)}.")
        score = float(self.scores(of_answer[:1], of_answer[1:])[0])
        if self.threshold is None:
            reason = f"Every answer is reviewed: no threshold promises {100 * self.target:.3g}% right answers."
            return Decision("review", score, " ".join([reason, *self._doubts(*of_answer)]))
        estimate, least = _apart(score, self.threshold)
        judged = f"Estimated chance of being right: {estimate}; accepted from {least} on."
        if score >= self.threshold:
            return Decision("accept", score, judged)
        doubts = self._doubts(*of_answer) or ["Neither figure stands out alone; together they fall short."]
        return Decision("review", score, " ".join([judged, *doubts]))

    def check(self, model_fingerprint: str, head_fingerprint: str) -> None:
        """Refuse answers of another model or map head than the policy was fitted on.

        Raises:
            ModelMismatchError: they differ; the message names both and what to do.
        """
        for what, own, given in (
            ("model", self.model_fingerprint, model_fingerprint),
            ("map head", self.head_fingerprint, head_fingerprint),
        ):
            if own != given:
                earlier = "; its fingerprint is of an earlier version, which read a part of the weights only"
                name = f" ({self.model_name})" if what == "model" and self.model_name else ""
                raise ModelMismatchError(
                    f"policy: it was calibrated on answers of the {what} {own or 'without fingerprint'}{name}, these "
                    f"are of {given or 'one without fingerprint'}; what it promises does not hold for them: "
                    "calibrate one with `lvlm-fastxai calibrate`" + earlier * is_outdated(own)
                )

    def save(self, path: str | Path) -> None:
        """Write the policy as JSON; a reader sees the old file or the new one, never a part.

        Raises:
            ArgumentError: the file cannot be written.
        """
        text = json.dumps({"schema": SCHEMA, **asdict(self)}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        write_whole(path, text.encode(), argument="policy")

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """Read a policy that `save` wrote.

        Raises:
            ArgumentError: there is no such file, or it holds no policy of this schema.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ArgumentError(f"policy: cannot read '{path}': {reason}") from error
        if not isinstance(found, dict) or found.pop("schema", None) != SCHEMA:
            raise ArgumentError(f"policy: '{path}' holds no policy of the schema {SCHEMA}; write one with `calibrate`")
        known = {entry.name for entry in fields(cls)}
        for name in ("mean", "scale", "coefficients"):
            if isinstance(found.get(name), list):
                found[name] = tuple(found[name])
        try:
            if unknown := found.keys() - known:
                raise ArgumentError(f"unknown entries {', '.join(sorted(unknown))}")
            return cls(**found)
        except (ArgumentError, TypeError) as error:
            raise ArgumentError(f"policy: '{path}' is damaged: {error}") from error

    def _doubts(self, entropy: float, probability: float) -> list[str]:
        """What lowers the score below that of a typical right answer, the weightier first."""
        found = []
        used = FEATURES[self.features]
        typical = {"entropy": self.typical_entropy, "probability": self.typical_probability}
        usual = [0.0 if value is None else value for value in typical.values()]
        now, then = (feature_matrix(self.features, [e], [p])[0] for e, p in ((entropy, probability), usual))
        for name, weight, own, other, scale in zip(used, self.coefficients, now, then, self.scale, strict=True):
            lowered = weight * (own - other) / scale
            if typical[name] is None or lowered >= 0:
                continue
            if name == "entropy":
                more, bound = ("spread out", "at most") if entropy > usual[0] else ("concentrated", "at least")
                text = f"The map is more {more} than usual: entropy {entropy:.3f}, "
                text += f"for half of the right answers {bound} {usual[0]:.3f}."
            else:
                less, bound = ("less", "at least") if probability < usual[1] else ("more", "at most")
                shown, half = _apart(probability, usual[1])
                text = f"The model was {less} sure of its words than usual: probability {shown}, "
                text += f"for half of the right answers {bound} {half}."
            found.append((lowered, text))
        return [text for _, text in sorted(found)]


def feature_matrix(features: str, entropy: ArrayLike, probability: ArrayLike) -> NDArray[np.float64]:
    """(n, 1 or 2) what the logistic model sees, before standardising: the entropy, the log-odds of the probability.

    Log-odds, because probabilities crowd just below 1, where 0.9 and 0.999 differ by more than they look.
    """
    share = np.clip(np.asarray(probability, dtype=np.float64), _EDGE, 1 - _EDGE)
    columns = {"entropy": np.asarray(entropy, dtype=np.float64), "probability": np.log(share / (1 - share))}
    return np.stack([columns[name] for name in FEATURES[features]], axis=1)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _apart(one: float, other: float) -> tuple[str, str]:
    """Two shares as percentages, with as many decimals as tell them apart."""
    for decimals in range(7):
        shown = f"{one:.{decimals}%}", f"{other:.{decimals}%}"
        if shown[0] != shown[1]:
            break
    return shown
