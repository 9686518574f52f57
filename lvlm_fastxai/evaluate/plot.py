"""The evaluation in one picture. Needs matplotlib, which is an optional extra."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..tiny import scenes
from .scores import METRICS

# Okabe and Ito's palette: told apart by colour-blind readers too.
COLORS = {
    "chefer": "#0072B2",
    "lvlm_interpret": "#56B4E9",
    "raw_attention": "#E69F00",
    "gradient_input": "#009E73",
    "chefer_untrained": "#CC79A7",
    "random": "#999999",
}
MARKERS = dict(zip(COLORS, "os^Dvx", strict=True))


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw an evaluation's dictionary (`Evaluation.to_dict`) as PNG.

    Top: pointing game, mass in mask and AUPRC per method with 95 % intervals, dotted lines at chance. Middle: mean
    probability of the answer along deletion and insertion. Bottom: AUPRC by question kind.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    subset = "correct" if "overall" in result["summary"]["correct"] else "all"
    groups = result["summary"][subset]
    figure = Figure(figsize=(11, 11), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, 6)
    for place, name in enumerate(("pointing", "mass", "average_precision")):
        _methods(figure.add_subplot(grid[0, 2 * place : 2 * place + 2]), groups["overall"], name)
    for place, name in enumerate(("deletion", "insertion")):
        _curves(figure.add_subplot(grid[1, 3 * place : 3 * place + 3]), result, name)
    _kinds(figure.add_subplot(grid[2, :]), groups, "average_precision")
    overall = groups["overall"]
    answered = "correctly answered" if subset == "correct" else "answered"
    figure.suptitle(
        f"Maps against evidence masks: {overall['maps']} {answered} questions about {overall['scenes']} held-out scenes"
    )
    figure.savefig(path, dpi=110)


def _title(name: str) -> str:
    return next(metric.title for metric in METRICS if metric.name == name)


def _methods(axes: Any, group: Mapping[str, Any], name: str) -> None:
    methods = [method for method in group["methods"] if name in group["methods"][method]]
    for height, method in enumerate(reversed(methods)):
        _point(axes, group["methods"][method][name], height, method, horizontal=True)
    axes.axvline(group["chance"][name], color="black", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(methods)), list(reversed(methods)))
    axes.set_xlim(0, None if name == "mass" else 1)
    axes.set_ylim(-0.6, len(methods) - 0.4)
    axes.set_title(_title(name), fontsize=11)
    axes.grid(axis="x", alpha=0.3)


def _point(axes: Any, entry: Mapping[str, Any], place: float, method: str, *, horizontal: bool) -> None:
    style = {"color": COLORS[method], "marker": MARKERS[method], "markersize": 6, "capsize": 3, "linestyle": "none"}
    value = entry["mean"]
    low = value if entry["low"] is None else entry["low"]
    high = value if entry["high"] is None else entry["high"]
    error = [[value - low], [high - value]]
    if horizontal:
        axes.errorbar([value], [place], xerr=error, **style)
    else:
        axes.errorbar([place], [value], yerr=error, **style)


def _curves(axes: Any, result: Mapping[str, Any], name: str) -> None:
    for method, curves in result["curves"].items():
        curve = curves[name]
        axes.plot(
            result["fractions"], curve["mean"], color=COLORS[method], marker=MARKERS[method], markersize=4, label=method
        )
        if None not in curve["low"]:
            axes.fill_between(result["fractions"], curve["low"], curve["high"], color=COLORS[method], alpha=0.12)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("share of cells deleted" if name == "deletion" else "share of cells inserted")
    axes.set_ylabel("probability of the answer")
    axes.set_title(f"{name} ({'lower' if name == 'deletion' else 'higher'} is better)", fontsize=11)
    axes.grid(alpha=0.3)
    if name == "insertion" and result["curves"]:
        axes.legend(fontsize=9, loc="lower right")
    if not result["curves"]:
        axes.text(0.5, 0.5, "no curves", ha="center")


def _kinds(axes: Any, groups: Mapping[str, Any], name: str) -> None:
    kinds = [kind for kind in scenes.KINDS if kind in groups]
    methods = list(groups["overall"]["methods"])
    for number, method in enumerate(methods):
        for place, kind in enumerate(kinds):
            shift = (number - (len(methods) - 1) / 2) * 0.12
            _point(axes, groups[kind]["methods"][method][name], place + shift, method, horizontal=False)
    for place, kind in enumerate(kinds):
        axes.hlines(groups[kind]["chance"][name], place - 0.4, place + 0.4, color="black", linestyle=":", linewidth=1)
    axes.set_xticks(range(len(kinds)), [f"{kind}\n(n = {groups[kind]['maps']})" for kind in kinds])
    axes.set_ylim(0, 1)
    axes.set_title(f"{_title(name)} by question kind; dotted: chance", fontsize=11)
    axes.grid(axis="y", alpha=0.3)
