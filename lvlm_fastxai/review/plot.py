"""Draws the risk–coverage curves of a calibration."""

from __future__ import annotations

import io
from pathlib import Path

from ..errors import ArgumentError
from ..files import write_whole
from .calibration import Calibration
from .features import FEATURES, set_name

__all__ = ["draw"]

# Okabe and Ito's palette: told apart by colour-blind readers too. Sets of several features are black.
COLOURS = ("#D55E00", "#56B4E9", "#009E73", "#E69F00", "#0072B2", "#F0E442")
POLICY_COLOUR = "#CC79A7"


def draw(calibration: Calibration, path: str | Path) -> None:
    """Draw the risk–coverage curves and where the policy stands as a PNG.

    Raises:
        ArgumentError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ArgumentError("no plot: matplotlib is not installed (pip install matplotlib)") from None
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    policy = calibration.policy
    held = calibration.report.get("held_out")
    part = held or calibration.report["threshold_part"]
    colours = dict(zip(FEATURES, COLOURS, strict=False))
    for name, (coverage, risk) in calibration.curves.items():
        area = part["figures"][name]["aurc"]
        axes.plot(coverage, risk, color=colours.get(name, "#000000"), label=f"{name}: AURC {area:.3f}")
    axes.axhline(1 - policy.target, color="#666666", ls="--", lw=1, label=f"target: {1 - policy.target:.1%} wrong")
    axes.axhline(1 - part["right"], color="#666666", ls=":", lw=1, label=f"no selection: {1 - part['right']:.1%} wrong")
    if part["precision"] is not None:
        bars = None
        if held:
            bars = [[held["precision_high"] - held["precision"]], [held["precision"] - held["precision_low"]]]
        accepted = f"{part['coverage']:.1%} accepted, {part['precision']:.1%} of them right"
        label = f"policy ({set_name(policy.features)}): {accepted}"
        place = ([part["coverage"]], [1 - part["precision"]])
        axes.errorbar(*place, yerr=bars, color=POLICY_COLOUR, fmt="o", capsize=4, label=label, zorder=5)
    axes.set(xlim=(0, 1.01), ylim=(0, None), xlabel="coverage: share of answers accepted", ylabel="risk: share wrong")
    axes.set_title(f"{part['answers']} {calibration.curves_of}", fontsize=11)
    axes.legend(fontsize=9)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, format="png")
    write_whole(path, drawn.getvalue(), argument="plot")
