"""Draw with matplotlib, without its global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .tables import provenance

OURS, THEIRS, LINE = "#b5541c", "#8a8f98", "#40444b"


def figure_of(width: float, height: float, layout: str | None = "constrained") -> Any:
    """Make an empty figure of this size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: Path) -> None:
    """Write the picture, its folder included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def finish(figure: Any, axes: Sequence[Any], head: Mapping[str, Any], path: Path) -> None:
    """Add a grid and where the figures come from, and write the picture."""
    for axis in axes:
        axis.grid(alpha=0.3, which="both", linewidth=0.5)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(provenance(head), fontsize=7, color="#60646c", x=0.01, ha="left")
    save(figure, path)
