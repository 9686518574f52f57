"""The results files as a table for the README and a plot: ``python -m benchmarks summary``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .common import machine
from .common.plots import LINE, OURS, THEIRS, figure_of, save
from .common.tables import provenance

README = machine.ROOT / "README.md"
PLOT = machine.IMAGES / "benchmarks.png"
BEGIN, END = "<!-- figures:begin (python -m benchmarks summary) -->", "<!-- figures:end -->"
NAMES = {
    "forward": "forward alone",
    "forward_backward": "forward + activation-only backward",
    "fast": "**explanation, `fast`**",
    "lean": "**explanation, `lean`**",
    "min": "**explanation, `min`**",
    "eager": "eager relevancy, full R, parameters frozen",
    "eager_as_published": "eager relevancy, full R, gradients to parameters too",
}


def load(name: str) -> dict[str, Any]:
    """Read one results file of the suite ``name``."""
    return json.loads((machine.RESULTS / f"{name}.json").read_text())


def shape(case: dict[str, Any]) -> str:
    """Describe a decoder in words."""
    targets = "one target" if case["targets"] == 1 else f"{case['targets']} targets"
    return (
        f"{case['layers']} layers, width {case['width']}, {case['heads']} heads / {case['key_heads']} key-value heads, "
        f"S = {case['columns']}, {case['dtype']}, {targets}"
    )


def end_to_end_table(results: dict[str, Any]) -> str:
    """Lay out one block of rows per case; ratios are to forward + activation-only backward in the same run."""
    lines = ["| | time | × forward + backward | extra peak memory | × theirs |", "|---|---:|---:|---:|---:|"]
    for result in results["results"].values():
        lines.append(f"| *{shape(result['case'])}* | | | | |")
        for variant, figures in result["variants"].items():
            if isinstance(figures["extra_bytes"], str):
                lines.append(f"| {NAMES[variant]} | {figures['extra_bytes']} | | | |")
                continue
            lines.append(
                f"| {NAMES[variant]} | {figures['seconds']:.2f} s | {figures['time_ratio']:.2f} | "
                f"{figures['extra_bytes'] / 2**20:,.0f} MiB | {figures['memory_ratio']:.2f} |"
            )
    return "\n".join(lines)


def operator_table(results: dict[str, Any]) -> str:
    """Lay out one row per shape of the operator."""
    lines = [
        "| `relevancy_product` on the CPU | × faster than the dense twin | share of `torch.mm`'s fp32 rate "
        "| extra memory, share of the twin's |",
        "|---|---:|---:|---:|",
    ]
    for name, figures in results["results"].items():
        memory = figures.get("memory_over_twin")
        lines.append(
            f"| {name} | {figures['speedup_over_twin']:.1f} | {figures['share_of_matrix_product_rate']:.0%} | "
            f"{'' if memory is None else f'{memory:.2%}'} |"
        )
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Plot time and extra memory of every variant, relative to forward + activation-only backward."""
    cases = list(results["results"].values())
    figure = figure_of(4.4 * len(cases), 5.2, layout=None)
    axes = figure.subplots(2, len(cases), squeeze=False)
    for column, result in enumerate(cases):
        length = f"\nS = {result['case']['columns']}"
        draw(axes[0][column], result["variants"], "time_ratio", f"time, × forward + backward{length}")
        draw(axes[1][column], result["variants"], "memory_ratio", "extra peak memory, × forward + backward")
    figure.text(0.01, 0.005, provenance(results["machine"]), fontsize=7, color="#60646c")
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    save(figure, path)


def draw(axis: Any, variants: dict[str, Any], key: str, title: str) -> None:
    """Draw one ratio of every variant."""
    labels = ["forward + backward" if v == "forward_backward" else v.replace("_", " ") for v in variants]
    colors = [OURS if variant in ("fast", "lean", "min") else THEIRS for variant in variants]
    values = [figures.get(key) for figures in variants.values()]
    numbers = [value if isinstance(value, float | int) else 0 for value in values]
    bars = axis.barh(labels, numbers, color=colors)
    texts = [f" {value:.2f}" if isinstance(value, float | int) else " out of memory" for value in values]
    axis.bar_label(bars, texts, fontsize=8)
    axis.axvline(1, color=LINE, linewidth=0.8)
    axis.set_xlim(0, 1.25 * max([*numbers, 1]))
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(title, fontsize=9)
    axis.tick_params(labelsize=8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--print", action="store_true", dest="only_print", help="print the tables; write nothing")


def main(args: argparse.Namespace) -> int:
    whole, operator = load("end-to-end"), load("op")
    text = "\n\n".join(
        [
            end_to_end_table(whole),
            operator_table(operator),
            f"Medians of ratios taken within a round. {provenance(whole['machine'])}. "
            "`python -m benchmarks end-to-end`, `python -m benchmarks op`; raw figures in `benchmarks/results/`.",
            f"![Time and memory of every variant]({PLOT.relative_to(machine.ROOT).as_posix()})",
        ]
    )
    print(text)
    if not args.only_print:
        readme = README.read_text()
        before, _, rest = readme.partition(BEGIN)
        _, _, after = rest.partition(END)
        README.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
        plot(whole, PLOT)
    return 0
