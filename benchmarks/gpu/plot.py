"""gpu.png: the operator's share of the matrix product's rate, and whole explanations over forward + backward."""

from __future__ import annotations

import importlib.util
from typing import Any

from ..common.plots import LINE, OURS, THEIRS, figure_of, save
from .run import Run, Skip


def plot(run: Run, seconds: float) -> None:
    """Draw gpu.png."""
    if importlib.util.find_spec("matplotlib") is None:
        raise Skip("no matplotlib beside this Python")
    operator_cases = run.results.get("op", {}).get("cases", {})
    whole_cases = run.results.get("end-to-end", {}).get("cases", {})
    if not operator_cases and not whole_cases:
        raise Skip("no figures to draw")
    rows = sum(len(result["variants"]) for result in whole_cases.values())
    figure = figure_of(12, 0.5 + 0.24 * max(20, rows), layout=None)
    left, right = figure.subplots(1, 2)
    draw_shares(left, shares(operator_cases))
    draw_ratios(right, whole_cases)
    where = run.head["gpu"] or run.head["processor"]
    notice = "REHEARSAL, figures mean nothing. " if run.rehearse else ""
    stamp = f"{where}, torch {run.head['torch']}, {run.head['date']}, commit {run.head['commit']}"
    figure.text(0.01, 0.005, notice + stamp, fontsize=7)
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    save(figure, run.out / "gpu.png")


def draw_shares(axis: Any, found: dict[str, dict[int, float]]) -> None:
    """Draw each model's and backend's share of the matrix product's rate over S."""
    for label, points in found.items():
        axis.plot(*zip(*sorted(points.items()), strict=True), marker="o", label=label)
    axis.set_xscale("log")
    ticks = sorted({size for points in found.values() for size in points})
    axis.set_xticks(ticks, [str(size) for size in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("S")
    axis.set_title("relevancy_product, one target: share of the matrix product's rate", fontsize=9)
    axis.axhline(0.45, color=THEIRS, linewidth=0.8)
    if found:
        axis.legend(fontsize=7)


def draw_ratios(axis: Any, cases: dict[str, Any]) -> None:
    """Draw each case's and variant's time over forward + backward."""
    labels, ratios = [], []
    for name, result in cases.items():
        for variant, found in result["variants"].items():
            labels.append(f"{name} {variant}" + ("" if "time_ratio" in found else f": {found['seconds']}"))
            ratios.append(found.get("time_ratio", 0.0))
    axis.barh(labels, ratios, color=OURS)
    axis.axvline(1, color=LINE, linewidth=0.8)
    axis.invert_yaxis()
    axis.tick_params(labelsize=6)
    axis.set_title("time over forward + activation-only backward", fontsize=9)


def shares(cases: dict[str, Any]) -> dict[str, dict[int, float]]:
    """Collect model and backend → S → share of the matrix product's rate, for one target and all rows."""
    found: dict[str, dict[int, float]] = {}
    for name, result in cases.items():
        model, _, kind = name.rsplit("-", 2)
        for backend, each in result.get("relevancy_product", {}).items():
            if kind == "1" and "share_of_matrix_rate" in each:
                found.setdefault(f"{model}, {backend}", {})[result["case"]["keys"]] = each["share_of_matrix_rate"]
    return found
