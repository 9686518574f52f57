"""Confidence intervals by resampling clusters: questions about one picture are not independent, pictures are."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError


class Interval(NamedTuple):
    """An estimate with its 95 % interval; low and high are NaN where fewer than two clusters were measured."""

    value: float
    low: float
    high: float


class ClusterBootstrap:
    """Percentile bootstrap over clusters, with the same resamples for every quantity.

    Because the resamples are shared, the interval of ``mean(a - b)`` is that of the paired difference of a and b.

    Args:
        clusters: (n,) integers, the cluster of each observation.
        resamples: number of resamples; each draws as many clusters as there are, with replacement.
        seed: of the draw.
    """

    def __init__(self, clusters: NDArray[np.integer], *, resamples: int = 2000, seed: int = 0) -> None:
        names, self._cluster = np.unique(clusters, return_inverse=True)
        self._count = len(names)
        if self._count == 0:
            raise ArgumentError("clusters: there is nothing to resample")
        share = np.full(self._count, 1 / self._count)
        draws = np.random.default_rng(seed).multinomial(self._count, share, size=resamples)
        self._weights = draws.astype(np.float64)  # (resamples, clusters)

    def mean(self, values: NDArray[np.float64]) -> Interval:
        """Average (n,) ``values``; NaN entries were not measured and do not count."""
        return self.ratio(values, np.ones(len(values)))

    def ratio(self, numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> Interval:
        """Σ numerator / Σ denominator of (n,) arrays, over the entries where both are numbers."""
        measured = np.isfinite(numerator) & np.isfinite(denominator)
        cluster = self._cluster[measured]
        above, below = (
            np.bincount(cluster, weights=values[measured], minlength=self._count) for values in (numerator, denominator)
        )
        if below.sum() == 0:
            return Interval(math.nan, math.nan, math.nan)
        value = float(above.sum() / below.sum())
        if len(np.unique(cluster)) < 2:
            return Interval(value, math.nan, math.nan)
        totals = self._weights @ below
        drawn = totals != 0  # a small group can be missing from a resample
        low, high = np.percentile((self._weights @ above)[drawn] / totals[drawn], (2.5, 97.5))
        return Interval(value, float(low), float(high))
