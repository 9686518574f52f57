"""The pruned sweep's figures as tables and plots: ``python -m benchmarks pruned report``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...common import machine
from ...common.tables import provenance, written
from . import tables

DOCUMENT = machine.DOCUMENTS / "pruned-sweep.md"

Table = Callable[[Mapping[str, Any], Any], str]
# part: the command that measures it, its tables
PARTS: dict[str, tuple[str, Table]] = {
    "tradeoff-text": ("tradeoff --measure text", tables.text_tables),
    "tradeoff-picture": ("tradeoff --measure picture", tables.picture_tables),
    "tradeoff-real": ("tradeoff --measure real", tables.picture_tables),
    "weights": ("weights", tables.weight_table),
    "calibrate": ("calibrate", tables.calibration_tables),
    "time-targets": ("time --measure targets", tables.target_tables),
    "time-answer": ("time --measure answer", tables.answer_table),
    "time-memory": ("time --measure memory", tables.memory_table),
    "growth": ("growth", tables.growth_table),
}


def section(part: str, results: Mapping[str, Any]) -> str:
    """Write one part of the results as Markdown, where it comes from included."""
    if part not in results:
        return tables.NOT_MEASURED
    entry, (command, table) = results[part], PARTS[part]
    source = f"`python -m benchmarks pruned {command}`: {provenance(entry['machine'])}."
    return f"{table(entry['settings'], entry['results'])}\n\n{source}"


def report(results: Mapping[str, Any], *, only_print: bool) -> int:
    """Print every part; unless told not to, rewrite the document's figures and draw the plots."""
    sections = {part: section(part, results) for part in PARTS}
    for part, text in sections.items():
        print(f"## {part}\n\n{text}\n")
    if only_print:
        return 0
    from . import plots

    document = DOCUMENT.read_text(encoding="utf-8")
    trades = {
        kind: results[f"tradeoff-{kind}"] for kind in ("text", "picture", "real") if f"tradeoff-{kind}" in results
    }
    if trades:
        plots.plot_tradeoff(trades, machine.IMAGES / "pruned-tradeoff.png")
    if "growth" in results:
        plots.plot_growth(results["growth"], machine.IMAGES / "pruned-growth.png")
    pictures = {
        "tradeoff-plot": (trades, "pruned-tradeoff.png", "Error against rows kept and against ε, beside dense bf16"),
        "growth-plot": ("growth" in results, "pruned-growth.png", "Seconds per target and rows kept against S"),
    }
    for part, (measured, file, caption) in pictures.items():
        sections[part] = f"![{caption}](images/{file})" if measured else tables.NOT_MEASURED
    DOCUMENT.write_text(written(document, sections), encoding="utf-8")
    return 0
