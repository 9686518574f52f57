"""The evaluation in one picture. Needs matplotlib, which is an optional extra."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..methods import registry
from ..tiny import scenes
from .scores import METRICS

# Okabe and Ito's palette: told apart by colour-blind readers too.
COLORS: dict[str, str] = {
    **{str(traits.name): traits.colour for traits in registry.METHODS.values() if traits.sweeps},
    "gradient_input": "#009E73",
    "chefer_untrained": "#CC79A7",
    "random": "#999999",
}
MARKERS = dict(zip(COLORS, "osP^Dvx", strict=True))


def available() -> bool:
    """Say whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(result: Mapping[str, Any], path: Path) -> list[str]:
    """Draw an evaluation's dictionary (`Evaluation.to_dict`) as PNG: ``path``, and ``<stem>-answers.png`` beside it.

    The first, top: pointing game, mass in mask and AUPRC per method with 95 % intervals, dotted lines at chance.
    Middle: mean probability of the answer along deletion and insertion. Bottom: AUPRC by question kind. The second, of
    whole answers, if there are any: pointing game, AUPRC and NSS per method and ablation, and the curves of the
    methods.

    Returns:
        names of the files written.

    Raises:
        ImportError: matplotlib is not installed.
    """
    _draw_questions(result, path)
    if not result["whole_answers"]:
        return [path.name]
    answers = path.with_name(f"{path.stem}-answers.png")
    _draw_answers(result, answers)
    return [path.name, answers.name]


def _figure(size: tuple[float, float]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _subset(part: Mapping[str, Any]) -> str:
    return "correct" if "overall" in part["summary"]["correct"] else "all"


def _draw_questions(result: Mapping[str, Any], path: Path) -> None:
    part = result["questions"]
    groups = part["summary"][_subset(part)]
    figure = _figure((11, 11))
    grid = figure.add_gridspec(3, 6)
    for place, name in enumerate(("pointing", "mass", "average_precision")):
        _methods(figure.add_subplot(grid[0, 2 * place : 2 * place + 2]), groups["overall"], name)
    for place, name in enumerate(("deletion", "insertion")):
        axes = figure.add_subplot(grid[1, 3 * place : 3 * place + 3])
        _curves(axes, result["fractions"], part["curves"], name)
    _kinds(figure.add_subplot(grid[2, :]), groups, "average_precision")
    overall = groups["overall"]
    answered = "correctly answered" if _subset(part) == "correct" else "answered"
    figure.suptitle(
        f"Maps against evidence masks: {overall['maps']} {answered} questions about {overall['scenes']} held-out scenes"
    )
    figure.savefig(path, dpi=110)


def _draw_answers(result: Mapping[str, Any], path: Path) -> None:
    part = result["whole_answers"]
    overall = part["summary"][_subset(part)]["overall"]
    figure = _figure((12, 9.5))
    grid = figure.add_gridspec(2, 6, height_ratios=(1.3, 1))
    for place, name in enumerate(("pointing", "average_precision", "nss")):
        _methods(figure.add_subplot(grid[0, 2 * place : 2 * place + 2]), overall, name, labels=place == 0)
    curves = {method: part["curves"][method] for method in result["settings"]["methods"] if part["curves"]}
    for place, name in enumerate(("deletion", "insertion")):
        _curves(figure.add_subplot(grid[1, 3 * place : 3 * place + 3]), result["fractions"], curves, name)
    described = "right descriptions" if _subset(part) == "correct" else "descriptions"
    figure.suptitle(f"Maps of whole answers: {overall['maps']} {described} of {overall['scenes']} held-out scenes")
    figure.savefig(path, dpi=110)


def _title(name: str) -> str:
    return next(metric.title for metric in METRICS if metric.name == name)


def _methods(axes: Any, group: Mapping[str, Any], name: str, *, labels: bool = True) -> None:
    methods = [method for method in group["methods"] if name in group["methods"][method]]
    for height, method in enumerate(reversed(methods)):
        _point(axes, group["methods"][method][name], height, method, horizontal=True)
    axes.axvline(group["chance"][name], color="black", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(methods)), list(reversed(methods)) if labels else [])
    if name != "nss":
        axes.set_xlim(0, None if name == "mass" else 1)
    axes.set_ylim(-0.6, len(methods) - 0.4)
    axes.set_title(_title(name), fontsize=11)
    axes.grid(axis="x", alpha=0.3)


def _point(axes: Any, entry: Mapping[str, Any], place: float, method: str, *, horizontal: bool) -> None:
    base = method.split()[0]
    style = {"color": COLORS[base], "marker": MARKERS[base], "markersize": 6, "capsize": 3, "linestyle": "none"}
    if method != base:
        style["markerfacecolor"] = "white"  # an ablation of the filled one
    value = entry["mean"]
    low = value if entry["low"] is None else entry["low"]
    high = value if entry["high"] is None else entry["high"]
    error = [[value - low], [high - value]]
    if horizontal:
        axes.errorbar([value], [place], xerr=error, **style)
    else:
        axes.errorbar([place], [value], yerr=error, **style)


def _curves(axes: Any, fractions: Sequence[float], curves: Mapping[str, Any], name: str) -> None:
    for method, both in curves.items():
        curve = both[name]
        axes.plot(fractions, curve["mean"], color=COLORS[method], marker=MARKERS[method], markersize=4, label=method)
        if None not in curve["low"]:
            axes.fill_between(fractions, curve["low"], curve["high"], color=COLORS[method], alpha=0.12)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("share of cells deleted" if name == "deletion" else "share of cells inserted")
    axes.set_ylabel("probability of the answer")
    axes.set_title(f"{name} ({'lower' if name == 'deletion' else 'higher'} is better)", fontsize=11)
    axes.grid(alpha=0.3)
    if name == "insertion" and curves:
        axes.legend(fontsize=9, loc="lower right")
    if not curves:
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
