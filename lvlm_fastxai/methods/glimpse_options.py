"""The choices of method "glimpse"; no torch is needed to make them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..errors import ArgumentError

# What cutting the polynomial in 1/Z off may cost of a row of length 1.
TRUNCATION = 1e-6
# λ_d was tuned on a backbone with this many layers; "scaled" keeps the prior's shape over all layers.
TUNED_LAYERS = 64

Propagation = Literal["literal", "identity"]
StatsDomain = Literal["full", "causal"]
Route = Literal["one_sweep", "two_sweeps"]
PROPAGATIONS: dict[Propagation, float] = {"literal": 0.5, "identity": 1.0}  # how much of α_l a layer adds


@dataclass(frozen=True)
class GlimpseOptions:
    """The choices that GLIMPSE (arXiv 2506.18985) leaves, and two of ours.

    Attributes:
        propagation: "literal", Π (2I + α_l E_l) as the paper writes it, whose common factor 2^L is left out; or
            "identity", Π (I + α_l E_l).
        stats_domain: where dP is summed for w and γ: "full", over all columns of the sample as published code does,
            although no row sees the columns after it, or "causal", over the columns that a row sees.
        head_temperature: λ of the softmax over heads, above 0.
        depth_rate: λ_d of the prior over layers; "scaled" is 0.2·64/L for L layers.
        layers: "all", or "top:F" with 0 < F ≤ 1: the share F of the layers, counted from the top; the others are left
            out of the product, and of the backward.
        route: "one_sweep", or "two_sweeps": the first for Z alone. Twice the time; the referee of the other.

    Raises:
        ArgumentError: a value is none of these.

    Example:
        >>> GlimpseOptions(layers="top:0.6").lowest(10)
        4
    """

    propagation: Propagation = "literal"
    stats_domain: StatsDomain = "full"
    head_temperature: float = 0.5
    depth_rate: float | str = 0.2
    layers: str = "all"
    route: Route = "one_sweep"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("propagation", get_args(Propagation)),
            ("stats_domain", get_args(StatsDomain)),
            ("route", get_args(Route)),
        ):
            if getattr(self, name) not in allowed:
                raise ArgumentError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not _is_finite(self.head_temperature) or self.head_temperature <= 0:
            raise ArgumentError(f"head_temperature: expected a number above 0, got {self.head_temperature!r}")
        if self.depth_rate != "scaled" and not _is_finite(self.depth_rate):
            raise ArgumentError(f'depth_rate: expected a number or "scaled", got {self.depth_rate!r}')
        if not 0 < self._share <= 1:
            raise ArgumentError(f'layers: expected "all" or "top:F" with 0 < F ≤ 1, got {self.layers!r}')

    @property
    def _share(self) -> float:
        if self.layers == "all":
            return 1.0
        head, _, share = str(self.layers).partition(":")
        try:
            return float(share) if head == "top" else math.nan
        except ValueError:
            return math.nan

    def lowest(self, layers: int) -> int:
        """Return the index of the lowest layer that takes part."""
        return layers - max(1, round(self._share * layers))

    def priors(self, layers: int) -> list[float]:
        """Return s_l of every layer, bottom first, scaled so that the largest is 1: Z divides by the same scale."""
        rate = 0.2 * TUNED_LAYERS / layers if self.depth_rate == "scaled" else float(self.depth_rate)
        top = max(0.0, rate * (layers - 1))
        return [math.exp(rate * index - top) for index in range(layers)]

    def terms(self, layers: int) -> int:
        """Return K, the number of powers of 1/Z that are carried; each layer adds one at most."""
        factor = PROPAGATIONS[self.propagation]
        enough = next(k for k in itertools.count(1) if factor ** (k + 1) / math.factorial(k + 1) < TRUNCATION)
        return min(enough, layers - self.lowest(layers))


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
