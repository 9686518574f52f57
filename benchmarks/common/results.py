"""Write figures: a results file with one head, one with a head for each part, and points as a table in either."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Point = dict[str, Any]


def write_results(path: Path, head: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Write a results file: the machine, then the figures. A process that is killed meanwhile leaves the last one."""
    write(path, json.dumps({"machine": head, "results": results}, indent=1))


def write(path: Path, text: str) -> None:
    """Replace a file at once, its folder included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text + "\n")
    part.replace(path)


def load_parts(path: Path) -> dict[str, Any]:
    """Read all parts measured so far."""
    return json.loads(path.read_text()) if path.is_file() else {}


def save_part(path: Path, part: str, head: Mapping[str, Any], settings: Mapping[str, Any], results: Any) -> None:
    """Replace one part of a results file whose parts were measured at different times."""
    everything = {**load_parts(path), part: {"machine": head, "settings": dict(settings), "results": results}}
    text = json.dumps({name: everything[name] for name in sorted(everything)}, indent=1)
    # Innermost lists on one line.
    write(path, re.sub(r"\[[^][{}]*\]", lambda found: re.sub(r"\s*\n\s*", " ", found[0]), text))


def as_table(points: Sequence[Point]) -> dict[str, Any]:
    """Store points as one line each, floats with four significant digits.

    >>> as_table([{"case": "prose", "error": 0.123456}])
    {'columns': ['case', 'error'], 'rows': [['prose', 0.1235]]}
    """
    names = list(points[0]) if points else []

    def short(value: Any) -> Any:
        return float(f"{value:.4g}") if isinstance(value, float) else value

    return {"columns": names, "rows": [[short(point[name]) for name in names] for point in points]}


def as_points(table: Mapping[str, Any]) -> list[Point]:
    """Read points back."""
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
