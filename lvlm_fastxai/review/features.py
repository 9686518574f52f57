"""The features that a policy can decide by: one list, read by calibration, records, queue and page.

A feature is a number in 0 … 1 that is known of an answer without anybody looking at it. Answers carry a mapping from
names to values. A new feature needs a producer that puts its value into that mapping, and an entry in `FEATURES`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ArgumentError

__all__ = ["FEATURES", "Feature", "apart", "finite_features", "listed_values", "parse_features", "set_name"]


@dataclass(frozen=True)
class Feature:
    """What a policy and its readers need to know of a feature.

    Attributes:
        label: heading on the page.
        high_means: whether high values speak against the answer or for it.
        enters_as: what the logistic model sees. Log-odds suit shares that crowd just below 1, where 0.9 and 0.999
            differ by more than they look.
        shown_as: how values are written.
        above, below: what to tell a reviewer about a value that is higher or lower than usual.
    """

    label: str
    high_means: Literal["doubt", "confidence"]
    enters_as: Literal["value", "log-odds"]
    shown_as: Literal["number", "percentage"]
    above: str
    below: str

    def shown(self, value: float) -> str:
        """Write a value for a person."""
        return f"{value:.3f}" if self.shown_as == "number" else f"{value:.1%}"

    def compared(self, value: float, usual: float) -> str:
        """Say how a value differs from the usual one."""
        sentence, bound = (self.above, "at most") if value > usual else (self.below, "at least")
        own, half = (f"{value:.3f}", f"{usual:.3f}") if self.shown_as == "number" else apart(value, usual)
        name = next(name for name, feature in FEATURES.items() if feature is self)
        return f"{sentence}: {name} {own}, for half of the right answers {bound} {half}."


FEATURES: dict[str, Feature] = {
    "entropy": Feature(
        "Entropy of the map",
        high_means="doubt",
        enters_as="value",
        shown_as="number",
        above="The map is more spread out than usual",
        below="The map is more concentrated than usual",
    ),
    "probability": Feature(
        "Probability",
        high_means="confidence",
        enters_as="log-odds",
        shown_as="percentage",
        above="The model was more sure of its words than usual",
        below="The model was less sure of its words than usual",
    ),
}
"""By name, in the order in which they are shown."""

_SETS = {"both": ("entropy", "probability")}
"""Sets with a name of their own: policies, scripts and figures of the first version call this one so."""

_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")


def parse_features(given: str | Sequence[str]) -> tuple[str, ...]:
    """Read a choice of features.

    Args:
        given: names, in a sequence or joined by commas; "both" stands for entropy and probability.

    Returns:
        The names.

    Raises:
        ArgumentError: a name is not in `FEATURES` or stands twice, or there is none.

    Example:
        >>> parse_features("both"), parse_features("entropy")
        (('entropy', 'probability'), ('entropy',))
    """
    names = tuple(_SETS.get(given, given.split(","))) if isinstance(given, str) else tuple(given)
    if not names or len(set(names)) < len(names) or not set(names) <= FEATURES.keys():
        raise ArgumentError(f"features: expected some of {', '.join((*FEATURES, *_SETS))}, got {given!r}")
    return names


def set_name(names: Sequence[str]) -> str:
    """Name a set of features as figures and tables do.

    Example:
        >>> set_name(["entropy"]), set_name(["entropy", "probability"])
        ('entropy', 'both')
    """
    return next((name for name, members in _SETS.items() if members == tuple(names)), "+".join(names))


def finite_features(features: Mapping[str, Any]) -> dict[str, float]:
    """Return the features that are finite numbers, as floats; None and NaN mean that nobody measured a feature.

    Features that are not listed are kept too: whoever queues an answer may know more than this program.

    Raises:
        ArgumentError: a name is not a short lower-case word, or a value is neither a number nor None.

    Example:
        >>> finite_features({"entropy": 0.5, "probability": None})
        {'entropy': 0.5}
    """
    if not isinstance(features, Mapping):
        raise ArgumentError(f"features: expected names with numbers, got {type(features).__name__}")
    found = {}
    for name, value in features.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ArgumentError(f"features: expected a name of at most 40 lower-case letters and digits, got {name!r}")
        try:
            number = math.nan if value is None else float(value)
        except (TypeError, ValueError):
            raise ArgumentError(f"features: expected a number as {name!r}, got {value!r}") from None
        if math.isfinite(number):
            found[name] = number
    return found


def listed_values(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return the features of a line of records or of an export, unchecked.

    Lines hold them under "features"; those of the first version held each under its own name.

    Example:
        >>> listed_values({"features": {"entropy": 0.5}}), listed_values({"entropy": 0.5, "right": True})
        ({'entropy': 0.5}, {'entropy': 0.5})
    """
    features = line.get("features")
    if isinstance(features, Mapping):
        return dict(features)
    return {name: line[name] for name in FEATURES if name in line}


def apart(one: float, other: float) -> tuple[str, str]:
    """Write two shares as percentages, with as many decimals as tell them apart.

    Example:
        >>> apart(0.5, 0.25), apart(0.8999, 0.9)
        (('50%', '25%'), ('89.99%', '90.00%'))
    """
    for decimals in range(7):
        shown = f"{one:.{decimals}%}", f"{other:.{decimals}%}"
        if shown[0] != shown[1]:
            break
    return shown
