"""Numbers and tokens as the page writes them."""

from __future__ import annotations

import math
from collections.abc import Iterable

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def percent(share: float) -> str:
    return f"{100 * share:.1f}\u202f%"


def token_label(text: str) -> str:
    """A token's text as it is shown: white space made visible when there is nothing else."""
    return text.strip() or text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") or "∅"


def unit_of(values: Iterable[float]) -> int:
    """One power of ten for all values of a kind, so that they can be compared at a glance."""
    most = max(values, default=0.0)
    return math.floor(math.log10(most)) if most > 0 else 0


def unit_text(unit: int) -> str:
    return "×\u202f10" + str(unit).translate(_SUPERSCRIPTS) if unit else ""
