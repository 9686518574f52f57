"""Scores of every map, and their means with confidence intervals by group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bootstrap import ClusterBootstrap, Interval
from .metrics import (
    average_precision,
    cell_coverage,
    evidence_cells,
    mass_in_mask,
    normalized_scanpath_saliency,
    pointing_game,
)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """A column of the tables.

    Attributes:
        name: key in JSON and CSV.
        title: in words, without unit.
        better: "higher" or "lower".
        percent: shown as a percentage.
        over: the score by whose mean the score's mean is divided, None for a plain mean.
        paired: whether its difference to another method says anything.
    """

    name: str
    title: str
    better: str = "higher"
    percent: bool = True
    over: str | None = None
    score: str = ""
    paired: bool = True

    @property
    def heading(self) -> str:
        """Title with its unit."""
        return f"{self.title}, %" if self.percent else self.title

    @property
    def key(self) -> str:
        """The per-map score that it averages."""
        return self.score or self.name


METRICS = (
    Metric("pointing", "pointing game"),
    Metric("mass", "mass in mask"),
    Metric("mass_ratio", "mass / area", percent=False, over="area", score="mass"),
    Metric("average_precision", "AUPRC", percent=False),
    Metric("nss", "NSS", percent=False),
    Metric("selectivity", "selectivity"),
    Metric("deletion", "deletion", better="lower", percent=False),
    Metric("insertion", "insertion", percent=False),
    Metric("distance", "L1 to glimpse", better="lower", percent=False, paired=False),
    Metric("weight", "weight", paired=False),
)


def map_scores(
    relevancy: Floats, mask: NDArray[np.bool_], box: tuple[float, float, float, float], objects: NDArray[np.bool_]
) -> dict[str, float]:
    """Compute every score of one (h, w) map against one (H, W) evidence mask.

    Args:
        relevancy: the map.
        mask: evidence, with at least one pixel.
        box: of the grid in shares of the picture.
        objects: (H, W) bool, every object of the picture, evidence or not.

    Returns:
        pointing, mass, average_precision, nss as in `metrics`; selectivity, the share of the relevancy on objects that
        is on evidence, NaN where the picture shows no other object or no relevancy is on any; and the chance levels:
        area (of mass), evidence_share (of pointing and average_precision), object_share (of selectivity).
    """
    shape = (relevancy.shape[0], relevancy.shape[1])
    coverage = cell_coverage(mask, shape, box)
    evidence = evidence_cells(coverage)
    on_objects = cell_coverage(objects, shape, box)
    distractors = bool((objects & ~mask).any())
    mass_on_objects = float((relevancy * on_objects).sum())
    selective = distractors and mass_on_objects > 0
    return {
        "pointing": pointing_game(relevancy, evidence),
        "mass": mass_in_mask(relevancy, coverage),
        "average_precision": average_precision(relevancy, evidence),
        "nss": normalized_scanpath_saliency(relevancy, coverage),
        "selectivity": float((relevancy * coverage).sum()) / mass_on_objects if selective else math.nan,
        "area": float(coverage.mean()),
        "evidence_share": float(evidence.mean()),
        "object_share": float(coverage.sum() / on_objects.sum()) if distractors else math.nan,
    }


CHANCE = {
    "pointing": "evidence_share",
    "mass": "area",
    "average_precision": "evidence_share",
    "selectivity": "object_share",
}
# The same for every question.
FIXED_CHANCE = {"mass_ratio": 1.0, "nss": 0.0}


@dataclass
class ScoreTable:
    """Scores of n maps per method.

    Attributes:
        scene: (n,) integers, the cluster of each map.
        groups: (n,) bool per name, in the order in which they are reported; "overall" first.
        scores: {method: {score: (n,)}}, NaN where not measured.
    """

    scene: NDArray[np.int64]
    groups: dict[str, NDArray[np.bool_]]
    scores: dict[str, dict[str, Floats]]

    @classmethod
    def collect(
        cls,
        scene: Sequence[int],
        groups: Mapping[str, Sequence[bool]],
        rows: Mapping[str, Sequence[Mapping[str, float]]],
    ) -> ScoreTable:
        """Collect one dictionary of scores per map and method."""
        names = sorted({name for maps in rows.values() for row in maps for name in row})
        return cls(
            np.asarray(scene, dtype=np.int64),
            {name: np.asarray(members, dtype=bool) for name, members in groups.items()},
            {
                method: {name: np.array([row.get(name, math.nan) for row in maps]) for name in names}
                for method, maps in rows.items()
            },
        )

    def summary(
        self, select: NDArray[np.bool_], *, reference: str = "chefer", resamples: int, seed: int
    ) -> dict[str, Any]:
        """Average with 95 % intervals, per group, method and metric, over the maps of ``select``.

        Args:
            select: (n,) bool.
            reference: the method that the others are compared with, pair by pair.
            resamples, seed: of the bootstrap.

        Returns:
            {group: {"maps": count, "scenes": count, "chance": {metric: mean}, "methods": {method: {metric:
            {"mean", "low", "high", "maps", "difference"}}}}}, where "difference" is the paired one to ``reference``
            with its interval. A metric without any measured map is left out, as is an empty group.
        """
        result: dict[str, Any] = {}
        for group, members in self.groups.items():
            chosen = members & select
            if not chosen.any():
                continue
            bootstrap = ClusterBootstrap(self.scene[chosen], resamples=resamples, seed=seed)
            first = next(iter(self.scores.values()))
            chance = {
                metric: float(np.nanmean(first[score][chosen]))
                for metric, score in CHANCE.items()
                if score in first and np.isfinite(first[score][chosen]).any()
            }
            result[group] = {
                "maps": int(chosen.sum()),
                "scenes": len(np.unique(self.scene[chosen])),
                "chance": chance | FIXED_CHANCE,
                "methods": {method: self._method(method, reference, chosen, bootstrap) for method in self.scores},
            }
        return result

    def _method(
        self, method: str, reference: str, chosen: NDArray[np.bool_], bootstrap: ClusterBootstrap
    ) -> dict[str, Any]:
        own, other = self.scores[method], self.scores.get(reference)
        result: dict[str, Any] = {}
        for metric in METRICS:
            if metric.key not in own or not np.isfinite(own[metric.key][chosen]).any():
                continue
            values = own[metric.key][chosen]
            below = own[metric.over][chosen] if metric.over else np.ones(len(values))
            entry: dict[str, Any] = _as_dict(bootstrap.ratio(values, below))
            entry["maps"] = int(np.isfinite(values).sum())
            if other is not None and method != reference and metric.paired:
                difference = values - other[metric.key][chosen]
                entry["difference"] = _as_dict(bootstrap.ratio(difference, below))
            result[metric.name] = entry
        return result


def _as_dict(interval: Interval) -> dict[str, float | None]:
    """Write an interval for JSON, which has no NaN."""
    value, low, high = (None if math.isnan(number) else number for number in interval)
    return {"mean": value, "low": low, "high": high}
