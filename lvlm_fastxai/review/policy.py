"""A calibrated decision about one answer: accept it, or have a person look at it.

A policy turns the features of an answer into an estimate of the chance that the answer is right, and accepts from a
threshold on. `calibration` fits policies; this module applies them and needs numpy alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ArgumentError, ModelMismatchError
from ..files import write_whole
from .features import FEATURES, apart, finite_features, parse_features

__all__ = ["SCHEMA", "Decision", "Identity", "Policy", "Verdict", "feature_matrix"]

SCHEMA = "lvlm-fastxai/policy/2"
FIRST_SCHEMA = "lvlm-fastxai/policy/1"

Verdict = Literal["accept", "review"]

# Probabilities closer to 0 or 1 than this are rounding: a bf16 model says 1 exactly.
_EDGE = 1e-6


@dataclass(frozen=True)
class Decision:
    """What a policy says of one answer.

    Attributes:
        verdict: "accept" or "review".
        score: estimated chance that the answer is right, 0 … 1; 0 where a feature is missing or not a number.
        reason: one to three sentences for the person who looks at it.
    """

    verdict: Verdict
    score: float
    reason: str

    @property
    def accepted(self) -> bool:
        """Whether nobody needs to look at the answer."""
        return self.verdict == "accept"


@dataclass(frozen=True)
class Identity:
    """Whose answers: a model, and the head that made their maps.

    Attributes:
        model_name: for people.
        model_fingerprint, head_fingerprint: for comparisons; "" where there is none.
    """

    model_name: str = ""
    model_fingerprint: str = ""
    head_fingerprint: str = ""


@dataclass(frozen=True)
class Policy:
    """A logistic model of an answer being right, and the score from which answers are accepted.

    Attributes:
        features: names of the k features that it decides by, of `features.FEATURES`.
        mean, scale: (k,) of the features on the answers that the model was fitted on; features enter standardised.
        coefficients, intercept: (k,) and one number, of the logistic model.
        threshold: accept where score ≥ threshold; None: no threshold kept the promise, everything is reviewed.
        target: share of the accepted answers that must be right.
        delta: chance that calibration picks a threshold that misses the target.
        typical: feature → median over the right answers, for the reasons given.
        model_name, model_fingerprint, head_fingerprint: whose answers the policy was fitted on; it holds for no others.
        fitted_on: what it was fitted on, in words and numbers.
        figures: what it achieved there, and on held-out answers if there were any.

    Example:
        >>> policy = Policy(("probability",), (3.0,), (2.0,), (2.0,), 1.0, threshold=0.9, target=0.95, delta=0.05)
        >>> policy.decide({"probability": 0.99}).verdict, policy.decide({"probability": 0.5}).verdict
        ('accept', 'review')
    """

    features: tuple[str, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    coefficients: tuple[float, ...]
    intercept: float
    threshold: float | None
    target: float
    delta: float
    typical: Mapping[str, float] = field(default_factory=dict)
    model_name: str = ""
    model_fingerprint: str = ""
    head_fingerprint: str = ""
    fitted_on: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.features, tuple) or parse_features(self.features) != self.features:
            raise ArgumentError(f"features: expected a tuple of names, got {self.features!r}")
        width = len(self.features)
        for name in ("mean", "scale", "coefficients"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or len(values) != width or not all(map(_is_number, values)):
                raise ArgumentError(f"{name}: expected {width} finite numbers, got {values!r}")
        if min(self.scale) <= 0:
            raise ArgumentError(f"scale: expected positive numbers, got {self.scale!r}")
        if not _is_number(self.intercept):
            raise ArgumentError(f"intercept: expected a finite number, got {self.intercept!r}")
        if self.threshold is not None and not _is_share(self.threshold):
            raise ArgumentError(f"threshold: expected a number in 0 … 1 or nothing, got {self.threshold!r}")
        for name in ("target", "delta"):
            value = getattr(self, name)
            if not (_is_number(value) and 0 < value < 1):
                raise ArgumentError(f"{name}: expected a number between 0 and 1, got {value!r}")
        for name in ("model_name", "model_fingerprint", "head_fingerprint"):
            if not isinstance(getattr(self, name), str):
                raise ArgumentError(f"{name}: expected text, got {getattr(self, name)!r}")
        for name in ("typical", "fitted_on", "figures"):
            if not isinstance(getattr(self, name), Mapping):
                raise ArgumentError(f"{name}: expected names with values, got {getattr(self, name)!r}")
        for name, value in self.typical.items():
            if not _is_share(value):
                raise ArgumentError(f"typical: expected a number in 0 … 1 as {name!r}, got {value!r}")

    def scores(self, features: Mapping[str, ArrayLike]) -> NDArray[np.float64]:
        """Return the estimated chances of being right, (n,), of answers with these features, (n,) each.

        NaN where a feature that the policy uses is not a finite number.
        """
        matrix = feature_matrix(self.features, features)
        # A product with `@` may round one row differently alone than among others; a score must not depend on that.
        standard = (matrix - np.array(self.mean)) / np.array(self.scale)
        logit = (standard * np.array(self.coefficients)).sum(axis=1) + self.intercept
        score: NDArray[np.float64] = 1 / (1 + np.exp(-np.clip(logit, -700, 700)))
        return np.where(np.isfinite(matrix).all(axis=1), score, math.nan)

    def decide(self, features: Mapping[str, float | None]) -> Decision:
        """Accept or review one answer.

        Args:
            features: of the answer, by name. Others than the policy's are ignored; None means not measured.

        Returns:
            The decision; an answer without a feature that the policy needs goes to review.
        """
        given = finite_features(features)
        missing = [name for name in self.features if name not in given]
        if missing:
            return Decision("review", 0.0, f"Nothing can be said: the answer has no {' and no '.join(missing)}.")
        score = float(self.scores({name: [given[name]] for name in self.features})[0])
        doubts = self._doubts(given)
        if self.threshold is None:
            reason = f"Every answer is reviewed: no threshold promises {100 * self.target:.3g}% right answers."
            return Decision("review", score, " ".join([reason, *doubts]))
        estimate, least = apart(score, self.threshold)
        judged = f"Estimated chance of being right: {estimate}; accepted from {least} on."
        if score >= self.threshold:
            return Decision("accept", score, judged)
        doubts = doubts or ["Neither figure stands out alone; together they fall short."]
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
                from ..models.fingerprint import is_outdated

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
        write_whole(path, text.encode(errors="backslashreplace"), argument="policy")

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """Read a policy that `save` wrote, in this version or in the first.

        Raises:
            ArgumentError: there is no such file, or it does not hold a policy.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        # JSON of many brackets goes deeper than Python's stack.
        except (OSError, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ArgumentError(f"policy: cannot read '{path}': {reason}") from error
        schema = found.pop("schema", None) if isinstance(found, dict) else None
        if schema not in (SCHEMA, FIRST_SCHEMA):
            raise ArgumentError(f"policy: '{path}' holds no policy of the schema {SCHEMA}; write one with `calibrate`")
        try:
            if schema == FIRST_SCHEMA:
                found = _from_first_schema(found)
            if unknown := found.keys() - {entry.name for entry in fields(cls)}:
                raise ArgumentError(f"unknown entries {', '.join(sorted(unknown))}")
            for name in ("features", "mean", "scale", "coefficients"):
                if isinstance(found.get(name), list):
                    found[name] = tuple(found[name])
            return cls(**found)
        except (ArgumentError, TypeError) as error:
            raise ArgumentError(f"policy: '{path}' is damaged: {error}") from error

    def _doubts(self, given: Mapping[str, float]) -> list[str]:
        """Say what lowers the score below that of a typical right answer, the weightier first."""
        usual = {name: self.typical.get(name, 0.0) for name in self.features}
        now, then = (
            feature_matrix(self.features, {name: [values[name]] for name in self.features})[0]
            for values in (given, usual)
        )
        found = []
        for name, weight, own, other, scale in zip(
            self.features, self.coefficients, now, then, self.scale, strict=True
        ):
            lowered = weight * (own - other) / scale
            if name in self.typical and lowered < 0:
                found.append((lowered, FEATURES[name].compared(given[name], usual[name])))
        return [text for _, text in sorted(found)]


def feature_matrix(names: Sequence[str], features: Mapping[str, ArrayLike]) -> NDArray[np.float64]:
    """Return what the logistic model sees of (n,) features before they are standardised, (n, names).

    Raises:
        ArgumentError: one of the names is not among the features.
    """
    if missing := [name for name in names if name not in features]:
        raise ArgumentError(f"features: expected {', '.join(names)}; there is no {', '.join(missing)}")
    columns = []
    for name in names:
        values = np.asarray(features[name], dtype=np.float64)
        if FEATURES[name].enters_as == "log-odds":
            share = np.clip(values, _EDGE, 1 - _EDGE)
            values = np.log(share / (1 - share))
        columns.append(values)
    return np.stack(columns, axis=1)


def _from_first_schema(found: dict[str, Any]) -> dict[str, Any]:
    """Entries as they are called now: the first version knew two features, each with an entry of its own."""
    renamed = {name: value for name, value in found.items() if not name.startswith("typical_")}
    if isinstance(renamed.get("features"), str):
        renamed["features"] = parse_features(renamed["features"])
    typical = {name: found.get(f"typical_{name}") for name in ("entropy", "probability")}
    return renamed | {"typical": {name: value for name, value in typical.items() if value is not None}}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1
