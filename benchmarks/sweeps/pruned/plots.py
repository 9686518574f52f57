"""The measured parts as plots."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy

from ...common.plots import figure_of, finish
from ...common.results import as_points
from .tables import KINDS, SERIES, exponent, quantile, values

COLORS = {
    "answer": "#0072B2",
    "prose": "#009E73",
    "code": "#E69F00",
    "picture": "#CC79A7",
    "real": "#D55E00",
    "bf16": "#40444b",
}
MARKERS = dict(zip(COLORS, "os^Dvx", strict=True))
PLOT_TITLES = {**KINDS, "picture": "shipped LVLM, pictures", "real": "DINOv2 + SmolLM2, pictures"}
HALF_TITLES = {"text": ("SmolLM2", "-"), "picture": ("shipped LVLM", "--"), "real": ("DINOv2 + SmolLM2", "-.")}


def plot_tradeoff(entries: Mapping[str, Any], path: Path) -> None:
    """Plot error against rows kept and against ε, each target a dot, medians joined; dense bf16 on the same axes."""
    halves = {name: as_points(entry["results"]["bf16"]) for name, entry in entries.items()}
    # Both LVLMs' targets are pictures.
    points = [
        {**point, "kind": name if name == "real" else point["kind"]}
        for name, entry in entries.items()
        for point in as_points(entry["results"]["points"])
    ]
    dense = [point for half in halves.values() for point in half]
    tolerances = sorted({point["tolerance"] for point in points})
    figure = figure_of(11, 5)
    kept, over = figure.subplots(1, 2, sharey=True)
    kinds = [kind for kind in PLOT_TITLES if any(p["kind"] == kind for p in points)]
    for number, kind in enumerate(kinds):
        own = [point for point in points if point["kind"] == kind]
        style: dict[str, Any] = {"color": COLORS[kind], "marker": MARKERS[kind]}
        shift = 1 + 0.06 * (number - (len(kinds) - 1) / 2)
        errors = [max(point["error"], 1e-7) for point in own]
        kept.scatter([100 * point["kept"] for point in own], errors, s=7, alpha=0.25, linewidths=0, **style)
        over.scatter([shift * point["tolerance"] for point in own], errors, s=7, alpha=0.25, linewidths=0, **style)
        groups = [[point for point in own if point["tolerance"] == t] for t in tolerances]
        middle = [median([max(p["error"], 1e-7) for p in group]) for group in groups]
        kept.plot([100 * median(values(g, "kept")) for g in groups], middle, label=PLOT_TITLES[kind], **style)
        over.plot([shift * t for t in tolerances], middle, **style)
    for name, half in halves.items():
        lost, (model, line) = values(half, "error"), HALF_TITLES[name]
        for axis in (kept, over):
            axis.axhline(median(lost), color=COLORS["bf16"], linestyle=line, linewidth=1, label=f"dense bf16, {model}")
            axis.axhspan(quantile(lost, 0.25), quantile(lost, 0.75), color=COLORS["bf16"], alpha=0.08, linewidth=0)
    errors = values(dense, "error")
    kept.scatter([100] * len(errors), errors, s=7, alpha=0.3, color=COLORS["bf16"], marker=MARKERS["bf16"])
    for axis in (kept, over):
        axis.set_xscale("log")
        axis.set_yscale("log")
    kept.set_xlabel("rows kept, % of those up to the target")
    over.set_xlabel("ε, share of gradient and relevancy left out at each layer")
    over.set_xticks(tolerances, [f"{t:g}" for t in tolerances])
    over.minorticks_off()
    kept.set_ylabel("relative L1 error of the row")
    kept.legend(fontsize=8, loc="lower left")
    figure.suptitle("Pruned sweep against exact fp32; band: quartiles of dense bf16", fontsize=11)
    finish(figure, (kept, over), next(iter(entries.values()))["machine"], path)


def plot_growth(entry: Mapping[str, Any], path: Path) -> None:
    """Plot seconds per further target, and rows kept, against S, with the fitted power laws."""
    points = as_points(entry["results"])
    lengths = sorted({point["columns"] for point in points})
    figure = figure_of(11, 4.6)
    times, rows = figure.subplots(1, 2)
    colors = dict(zip(SERIES, ("#40444b", "#0072B2", "#E69F00", "#009E73"), strict=True))
    for name, title in SERIES.items():
        axis = rows if name == "rows" else times
        own = [point for point in points if point[name] > 0]
        if not own:
            continue
        middle = [median([p[name] for p in own if p["columns"] == columns] or [float("nan")]) for columns in lengths]
        power = exponent(own, name)
        axis.scatter(values(own, "columns"), values(own, name), s=9, alpha=0.35, color=colors[name], linewidths=0)
        axis.plot(lengths, middle, color=colors[name], marker="o", markersize=4, label=f"{title}: S^{power:.2f}")
        if len(lengths) > 1:
            logs = numpy.log([point["columns"] for point in own]), numpy.log(values(own, name))
            offset = float(numpy.mean(logs[1] - power * logs[0]))
            fitted = [float(numpy.exp(offset + power * numpy.log(columns))) for columns in lengths]
            axis.plot(lengths, fitted, color=colors[name], linestyle=":", linewidth=1)
    rows.plot(lengths, lengths, color="#999999", linewidth=0.8, linestyle="--", label="all rows")
    for axis in (times, rows):
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(lengths, [str(columns) for columns in lengths])
        axis.minorticks_off()
        axis.set_xlabel("S")
        axis.legend(fontsize=8)
    times.set_ylabel("seconds per further target")
    rows.set_ylabel("rows kept per layer, mean")
    figure.suptitle(f"SmolLM2, ε = {entry['settings']['tolerance']:g}; dotted: fitted power laws", fontsize=11)
    finish(figure, (times, rows), entry["machine"], path)
