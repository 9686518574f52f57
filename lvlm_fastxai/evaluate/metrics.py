"""How well maps agree with evidence, and how well doubt tells wrong answers from right ones: functions of numpy arrays.

A map is (h, w), one relevancy per grid cell, not negative. A mask is (H, W) bool in pixels of the picture. It meets the
map as *coverage*, the share of each cell's area that the mask takes, and as *evidence cells*, a bool of each cell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

WHOLE_PICTURE = (0.0, 0.0, 1.0, 1.0)


def cell_coverage(
    mask: Mask, shape: tuple[int, int], box: tuple[float, float, float, float] = WHOLE_PICTURE
) -> NDArray[np.float64]:
    """Compute the share of each grid cell's area that a pixel mask takes.

    Args:
        mask: (H, W) bool.
        shape: (h, w) of the grid.
        box: (left, top, right, bottom) of the grid in shares of the picture's width and height, as
            `families.ImageLayout.box`; outside 0 … 1 the mask is False.

    Returns:
        (h, w) float64 in 0 … 1.

    Raises:
        ArgumentError: the mask is not a two-dimensional bool array.
    """
    if mask.ndim != 2 or mask.dtype != np.bool_:
        raise ArgumentError(f"mask: expected a (H, W) bool array, got {mask.shape} {mask.dtype}")
    left, top, right, bottom = box
    down = _overlap(np.linspace(top, bottom, shape[0] + 1) * mask.shape[0], mask.shape[0])
    across = _overlap(np.linspace(left, right, shape[1] + 1) * mask.shape[1], mask.shape[1])
    # Rounded so that a cell covered by exactly the threshold does not fall below it by an ulp.
    rounded: Array = np.round(down @ mask.astype(np.float64) @ across.T, 12)
    return rounded


def _overlap(edges: Array, pixels: int) -> Array:
    """(cells, pixels): the share of each cell, bounded by ``edges`` in pixels, that each pixel takes."""
    low, high = edges[:-1, None], edges[1:, None]
    first = np.arange(pixels)
    shares: Array = np.clip(np.minimum(high, first + 1) - np.maximum(low, first), 0, None) / (high - low)
    return shares


def evidence_cells(coverage: Array, threshold: float = 0.5) -> Mask:
    """Choose the cells that count as evidence: covered to at least ``threshold``.

    An object too small to cover any cell that far is represented by the cell (or cells, if equal) it covers most.

    Args:
        coverage: (h, w) in 0 … 1.
        threshold: in 0 … 1, 0 excluded.

    Returns:
        (h, w) bool; False everywhere only for a mask without any pixel on the grid.
    """
    cells = coverage >= threshold
    if not cells.any() and coverage.max() > 0:
        cells = coverage == coverage.max()
    return cells


def pointing_game(relevancy: Array, evidence: Mask) -> float:
    """Say whether the map's highest cell is evidence (Zhang et al. 2018), without any tolerance around the mask.

    Ties: where several cells share the maximum the result is the share of them that is evidence, which is what picking
    one at random would give in the mean. A constant map therefore scores the evidence's share of the grid: chance.

    Args:
        relevancy: (h, w), finite.
        evidence: (h, w) bool with at least one True.

    Returns:
        A number in 0 … 1; 0 or 1 where no tie is at the top.

    Raises:
        ArgumentError: shapes differ, a value is not finite, or there is no evidence.
    """
    _check(relevancy, evidence)
    return float(evidence[relevancy == relevancy.max()].mean())


def mass_in_mask(relevancy: Array, coverage: Array) -> float:
    """Compute the share of the map's sum that lies inside the mask, each cell's spread evenly over its area.

    A map of zeros says nothing, as a constant one does, and scores the same: the mask's share of the area.

    Args:
        relevancy: (h, w), finite, not negative.
        coverage: (h, w) in 0 … 1, or bool for whole cells; not zero everywhere.

    Returns:
        A number in 0 … 1. Its chance level is the mask's share of the area, ``coverage.mean()``; 1 needs all relevancy
        in cells that the mask covers whole.

    Raises:
        ArgumentError: shapes differ, a value is negative or not finite, or the coverage is zero everywhere.
    """
    _check(relevancy, coverage)
    if relevancy.min() < 0:
        raise ArgumentError(f"relevancy: expected no negative value, got {relevancy.min()}")
    total = relevancy.sum(dtype=np.float64)
    if total == 0:
        return float(coverage.mean())
    return float((relevancy * coverage).sum(dtype=np.float64) / total)


def normalized_scanpath_saliency(relevancy: Array, coverage: Array) -> float:
    """Average, over the mask's pixels, the map standardised to mean 0 and deviation 1 over the grid (NSS).

    The score of saliency maps against human fixations (Peters et al. 2005), with the mask's pixels as the fixations.

    Args:
        relevancy: (h, w), finite.
        coverage: (h, w) in 0 … 1, or bool for whole cells; not zero everywhere.

    Returns:
        A number: how many standard deviations the mask lies above the map's mean. 0 is chance, and what a constant map
        scores.

    Raises:
        ArgumentError: shapes differ, a value is not finite, or the coverage is zero everywhere.
    """
    _check(relevancy, coverage)
    if relevancy.min() == relevancy.max():
        return 0.0
    inside = (relevancy * coverage).sum(dtype=np.float64) / coverage.sum(dtype=np.float64)
    return float((inside - relevancy.mean()) / relevancy.std())


def l1_distance(relevancy: Array, other: Array) -> float:
    """Compute Σ |a − b| of two maps, each scaled to sum one: 0 for maps that differ in scale only, 2 for disjoint ones.

    A map of zeros counts as constant, as in `mass_in_mask`.

    Args:
        relevancy, other: (h, w), finite, not negative.
    """

    def scaled(values: Array) -> Array:
        return values / values.sum() if values.any() else np.full(values.shape, 1 / values.size)

    return float(np.abs(scaled(relevancy) - scaled(other)).sum())


def average_precision(relevancy: Array, evidence: Mask) -> float:
    """Compute the area under the precision-recall curve (AUPRC) of the map as a ranking of the cells.

    AP = Σ_n (R_n − R_{n−1}) P_n over the distinct thresholds, highest first: step-wise, without interpolation. Cells of
    equal relevancy enter together, so a constant map scores the evidence's share of the grid.

    Args:
        relevancy: (h, w), finite.
        evidence: (h, w) bool with at least one True.

    Returns:
        A number in 0 … 1; 1 where every evidence cell ranks above every other.

    Raises:
        ArgumentError: shapes differ, a value is not finite, or there is no evidence.
    """
    _check(relevancy, evidence)
    values, inverse = np.unique(-relevancy.ravel(), return_inverse=True)  # ascending: the highest relevancy first
    cells = np.bincount(inverse, minlength=len(values))
    hits = np.bincount(inverse, weights=evidence.ravel(), minlength=len(values))
    precision = hits.cumsum() / cells.cumsum()
    return float((precision * hits).sum() / hits.sum())


def area_under_curve(fractions: Sequence[float] | Array, values: Sequence[float] | Array) -> float:
    """Compute the trapezoidal area under ``values`` over ``fractions``, ascending from 0 to 1: the mean height.

    Raises:
        ArgumentError: lengths differ, or the fractions do not ascend from 0 to 1.
    """
    x, y = np.asarray(fractions, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1 or len(x) < 2:
        raise ArgumentError(f"fractions, values: expected two sequences of one length, got {x.shape} and {y.shape}")
    if x[0] != 0 or x[-1] != 1 or (np.diff(x) <= 0).any():
        raise ArgumentError("fractions: expected ascending numbers from 0 to 1")
    return float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum())


def auroc(doubt: Array, wrong: Mask, weights: Array | None = None) -> Any:
    """Return the chance that a wrong answer has more doubt than a right one; ties count half.

    Args:
        doubt: (n,).
        wrong: (n,) bool.
        weights: (resamples, n) how often each answer counts; None: once.

    Returns:
        A float, or (resamples,) with weights. NaN without answers of both kinds.

    Example:
        >>> auroc(np.array([0.1, 0.4, 0.4, 0.9]), np.array([False, False, True, True]))
        0.875
    """
    values, place = np.unique(doubt, return_inverse=True)
    counts = np.ones((1, len(doubt))) if weights is None else weights
    order = np.argsort(place, kind="stable")
    starts = np.searchsorted(place[order], np.arange(len(values)))
    of_right, of_wrong = (np.add.reduceat((counts * mask)[:, order], starts, axis=1) for mask in (~wrong, wrong))
    below = np.cumsum(of_right, axis=1) - of_right
    pairs = of_wrong.sum(axis=1) * of_right.sum(axis=1)
    with np.errstate(invalid="ignore"):
        area = ((below + of_right / 2) * of_wrong).sum(axis=1) / np.where(pairs > 0, pairs, math.nan)
    return float(area[0]) if weights is None else area


def risk_coverage(score: Array, right: Mask) -> tuple[Array, Array]:
    """Return the share of wrong answers among the k of highest score, k = 1 … n, beside k / n.

    Answers of equal score have no order; the share is the expected one. The mean of the risks is the area under the
    risk–coverage curve, AURC (Geifman, Uziel, El-Yaniv, arXiv 1805.08206).

    Args:
        score: (n,) of being right.
        right: (n,) bool.

    Returns:
        coverage (n,), risk (n,).

    Example:
        >>> coverage, risk = risk_coverage(np.array([0.9, 0.8, 0.1, 0.2]), np.array([True, True, False, True]))
        >>> coverage.tolist(), risk.tolist()
        ([0.25, 0.5, 0.75, 1.0], [0.0, 0.0, 0.0, 0.25])
    """
    _, place = np.unique(-score, return_inverse=True)
    wrong_share = np.bincount(place, weights=~right) / np.bincount(place)
    expected = wrong_share[np.sort(place)]
    number = np.arange(1, len(score) + 1)
    return number / len(score), np.cumsum(expected) / number


def _check(relevancy: Array, mask: NDArray[Any]) -> None:
    if relevancy.shape != mask.shape:
        raise ArgumentError(f"relevancy and mask: expected one shape, got {relevancy.shape} and {mask.shape}")
    if not np.isfinite(relevancy).all():
        raise ArgumentError("relevancy: expected finite values")
    if not mask.any():
        raise ArgumentError("mask: no cell is evidence, so there is nothing to score against")
