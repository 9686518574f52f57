"""The pruned sweep's figures as tables and plots: ``python -m benchmarks pruned report``."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from . import machine
from .pruned import Point, as_points, exponent
from .summary import provenance

DOCUMENT = machine.ROOT / "docs" / "pruned-sweep.md"
IMAGES = machine.ROOT / "docs" / "images"
NOT_MEASURED = "(not yet measured)"
COMMANDS = {
    "tradeoff-text": "tradeoff --measure text",
    "tradeoff-picture": "tradeoff --measure picture",
    "tradeoff-real": "tradeoff --measure real",
    "weights": "weights",
    "calibrate": "calibrate",
    "time-targets": "time --measure targets",
    "time-answer": "time --measure answer",
    "time-memory": "time --measure memory",
    "growth": "growth",
}
KINDS = {"answer": "answer to a question", "prose": "prose, next token", "code": "code, next token"}


def estimate(point: Point) -> float:
    """The error estimate, with the constants that the library holds now."""
    from lvlm_fastxai.sweep import pruning

    return pruning.MISSING_FACTOR * point["missing"] + pruning.DROPPED_FACTOR * point["dropped"]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def quantile(values: Sequence[float], share: float) -> float:
    import numpy

    return float(numpy.quantile(numpy.array(values), share))


def percent(value: float) -> str:
    return f"{value:.1%}" if value < 0.1 else f"{value:.0%}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def section(part: str, results: Mapping[str, Any]) -> str:
    """One part of the results as Markdown, where it comes from included."""
    if part not in results:
        return NOT_MEASURED
    entry = results[part]
    made: dict[str, Callable[[Mapping[str, Any], Any], str]] = {
        "tradeoff-text": text_tables,
        "tradeoff-picture": picture_tables,
        "tradeoff-real": picture_tables,
        "weights": weight_table,
        "calibrate": calibration_tables,
        "time-targets": target_tables,
        "time-answer": answer_table,
        "time-memory": memory_table,
        "growth": growth_table,
    }
    source = f"`python -m benchmarks pruned {COMMANDS[part]}`: {provenance(entry['machine'])}."
    return f"{made[part](entry['settings'], entry['results'])}\n\n{source}"


def main(results: Mapping[str, Any], *, only_print: bool) -> int:
    """Print every part; unless told not to, rewrite the document's figures and draw the plots."""
    sections = {part: section(part, results) for part in COMMANDS}
    for part, text in sections.items():
        print(f"## {part}\n\n{text}\n")
    if only_print:
        return 0
    document = DOCUMENT.read_text(encoding="utf-8")
    trades = {
        kind: results[f"tradeoff-{kind}"] for kind in ("text", "picture", "real") if f"tradeoff-{kind}" in results
    }
    if trades:
        plot_tradeoff(trades, IMAGES / "pruned-tradeoff.png")
    if "growth" in results:
        plot_growth(results["growth"], IMAGES / "pruned-growth.png")
    pictures = {
        "tradeoff-plot": (trades, "pruned-tradeoff.png", "Error against rows kept and against ε, beside dense bf16"),
        "growth-plot": ("growth" in results, "pruned-growth.png", "Seconds per target and rows kept against S"),
    }
    for part, (measured, file, caption) in pictures.items():
        sections[part] = f"![{caption}](images/{file})" if measured else NOT_MEASURED
    DOCUMENT.write_text(written(document, sections), encoding="utf-8")
    return 0


def written(document: str, sections: Mapping[str, str]) -> str:
    """The document with each section between the comments that name it.

    Raises:
        SystemExit: it has no place for one.
    """
    for part, text in sections.items():
        place = re.compile(rf"(<!-- {part}: written by .*? -->\n).*?(<!-- end of {part} -->)", re.DOTALL)
        if not place.search(document):
            raise SystemExit(f"the document has no place for {part!r}")
        # Through a function, so that no backslash in the text is taken for an escape.
        document = place.sub(partial(filled, text), document)
    return document


def filled(text: str, place: re.Match[str]) -> str:
    return f"{place[1]}\n{text}\n\n{place[2]}"


# Tables


def values(points: Sequence[Point], name: str) -> list[float]:
    return [point[name] for point in points]


def text_tables(settings: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    points, dense = as_points(results["points"]), as_points(results["bf16"])
    return "\n\n".join(
        [
            "**Medians over the targets: rows kept, error**",
            by_length(points, dense),
            "**All targets**",
            by_tolerance(points, dense),
        ]
    )


def picture_tables(settings: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    points, dense, pointing = (as_points(results[name]) for name in ("points", "bf16", "pointing"))
    return "\n\n".join(
        [
            f"**Every token of the answers about {len(pointing)} held-out pictures ({len(dense)} targets)**",
            by_tolerance(points, dense),
            "**The answers' image maps**",
            pointing_table(pointing),
        ]
    )


def by_length(points: Sequence[Point], dense: Sequence[Point]) -> str:
    tolerances = sorted({point["tolerance"] for point in points})
    rows = []
    for kind, title in KINDS.items():
        for columns in sorted({point["columns"] for point in points}):
            halves = [p for p in dense if (p["kind"], p["columns"]) == (kind, columns)]
            if not halves:
                continue
            cells = []
            for tolerance in tolerances:
                own = [p for p in points if (p["kind"], p["columns"], p["tolerance"]) == (kind, columns, tolerance)]
                cells.append(f"{percent(median(values(own, 'kept')))}, {median(values(own, 'error')):.1e}")
            bf16 = f"{median(values(halves, 'error')):.1e}"
            rows.append([f"{title}, S = {columns} ({len(halves)})", *cells, bf16])
    return markdown(["targets", *(f"ε = {t:g}" for t in tolerances), "dense bf16"], rows)


def same_target(point: Point) -> tuple[Any, ...]:
    return point["case"], point["columns"], point["row"], point["kind"]


def by_tolerance(points: Sequence[Point], dense: Sequence[Point]) -> str:
    header = [
        "",
        "rows kept",
        "error, median",
        "error, 95 %",
        "rank correlation, median",
        "5 %",
        "top-10 overlap, mean",
        "error ≤ bf16's",
        "estimate covers",
    ]

    def cells(own: Sequence[Point], halves: Sequence[Point] | None) -> list[str]:
        errors, correlations = values(own, "error"), values(own, "rank_correlation")
        inside = None if halves is None else [a["error"] <= b["error"] for a, b in zip(own, halves, strict=True)]
        left_out = [p for p in own if p.get("dropped", 0) > 0]
        covered = [p["error"] <= estimate(p) for p in left_out]
        return [
            percent(median(values(own, "kept"))) if halves is not None else "100%",
            f"{median(errors):.1e}",
            f"{quantile(errors, 0.95):.1e}",
            f"{median(correlations):.4f}",
            f"{quantile(correlations, 0.05):.4f}",
            f"{statistics.fmean(values(own, 'top_10')):.1%}",
            "–" if inside is None else percent(statistics.fmean(inside)),
            percent(statistics.fmean(covered)) if covered else "–",
        ]

    tolerances = sorted({point["tolerance"] for point in points})
    ordered = {t: [p for p in points if p["tolerance"] == t] for t in tolerances}
    rows = [[f"ε = {t:g}", *cells(own, dense)] for t, own in ordered.items()]
    chosen = automatic(ordered)
    if chosen is not None:
        pruned = [point for point in chosen if point["tolerance"] > 0]
        title = f"`auto` of a bf16 model ({percent(len(pruned) / len(chosen))} pruned)"
        rows.append([title, *cells(chosen, dense)])
    return markdown(header, [*rows, ["dense bf16", *cells(dense, None)]])


def automatic(ordered: Mapping[float, Sequence[Point]]) -> list[Point] | None:
    """What "auto" would take of each target in a 16-bit model; None where its tolerances were not measured."""
    import torch

    from lvlm_fastxai.sweep import pruning

    if not set(pruning.AUTO_TOLERANCES) <= set(ordered):
        return None
    limit, chosen = pruning.ROUNDING_ERROR[torch.bfloat16], []
    for points in zip(*(ordered[t] for t in pruning.AUTO_TOLERANCES), strict=True):
        exact = {"tolerance": 0.0, "kept": 1.0, "error": 0.0, "rank_correlation": 1.0, "top_10": 1.0, "dropped": 0.0}
        long_enough = points[0]["columns"] >= pruning.SHORTEST_PRUNED
        chosen.append(next((p for p in points if long_enough and estimate(p) <= limit), exact))
    return chosen


def pointing_table(points: Sequence[Point]) -> str:
    names = [name for name in points[0] if name != "kind" and not name.startswith("same cell")]
    rows = []
    for name in names:
        title = {"exact": "exact", "bf16": "dense bf16"}.get(name, f"ε = {name}")
        same = statistics.fmean(values(points, f"same cell, {name}"))
        rows.append([title, f"{statistics.fmean(values(points, name)):.1%}", f"{same:.1%}"])
    return markdown(["", "pointing game", "highest cell is the exact map's"], rows)


def weight_table(settings: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    points = as_points(results["points"])
    rows = []
    for weight in sorted({point["weight"] for point in points}):
        own = values([point for point in points if point["weight"] == weight], "kept")
        rows.append([f"{weight:g}", percent(statistics.geometric_mean(own)), percent(min(own)), percent(max(own))])
    count = len(points) // len(rows)
    header = [f"weight ({count} targets, S = {', '.join(map(str, settings['lengths']))})"]
    return markdown([*header, "rows kept, geometric mean", "fewest", "most"], rows)


def calibration_tables(settings: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    if "fitted" not in results:  # cut off while measuring
        return NOT_MEASURED
    fitted = results["fitted"]
    rows = []
    for name, groups in results["coverage"].items():
        for group, figures in groups.items():
            low, middle, high = figures["over"]
            rows.append(
                [
                    f"{name}, {group.replace('tolerance', 'ε =').replace('columns', 'S =').replace('kind ', '')}",
                    str(figures["points"]),
                    f"{figures['covered']:.1%}",
                    f"{low:.2g} … **{middle:.2g}** … {high:.2g}",
                ]
            )
    plain = results["fitted without pictures"]
    transfer = results["coverage without pictures"]["held out"].get("kind picture")
    lines = [
        f"Fitted: `MISSING_FACTOR = {fitted['MISSING_FACTOR']:g}`, `DROPPED_FACTOR = {fitted['DROPPED_FACTOR']:g}`.",
        markdown(["cases", "rows of relevancy", "covered", "estimate / error: 5 %, median, 95 %"], rows),
    ]
    if transfer is not None:
        lines.append(
            f"Fitted to SmolLM2 alone ({plain['MISSING_FACTOR']:g}, {plain['DROPPED_FACTOR']:g}), the estimate covers "
            f"{transfer['covered']:.1%} of the shipped LVLM's held-out errors: another model, another size, pictures."
        )
    return "\n\n".join(lines)


def by_target(points: Sequence[Point]) -> list[list[Point]]:
    """The points of each target, its largest tolerance first."""
    targets: dict[tuple[Any, ...], list[Point]] = {}
    for point in points:
        targets.setdefault((*same_target(point), point["target"]), []).append(point)
    return [sorted(own, key=lambda p: -p["tolerance"]) for own in targets.values()]


def choose(points: Sequence[Point], allowed: Callable[[Point], bool]) -> Point | None:
    """The largest tolerance that is allowed."""
    return next((point for point in points if allowed(point)), None)


def is_at(tolerance: float, point: Point) -> bool:
    return point["tolerance"] == tolerance


def target_tables(settings: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    import torch

    from lvlm_fastxai.sweep import pruning

    targets = by_target(as_points(results))
    limit = pruning.ROUNDING_ERROR[torch.bfloat16]
    rules: dict[str, Callable[[Point], bool]] = {
        "largest ε with an error ≤ its bf16 error": lambda p: p["error"] <= p["bf16_error"],
        f"largest ε with an estimate ≤ {limit:g}": lambda p: estimate(p) <= limit,
        **{f"ε = {t:g}": partial(is_at, t) for t in sorted({point["tolerance"] for point in targets[0]})},
    }
    rows = []
    for title, ordinary in (("answers", False), ("next tokens", True)):
        own = [target for target in targets if (target[0]["kind"] != "answer") == ordinary]
        if not own:
            continue
        for rule, allowed in rules.items():
            chosen = [choose(target, allowed) for target in own]
            found = [point for point in chosen if point is not None]
            # Where no tolerance is allowed the sweep is exact and dense.
            ratios = [1.0 if point is None else point["ratio"] for point in chosen]
            good = [point is None or point["error"] <= point["bf16_error"] for point in chosen]
            rows.append(
                [
                    f"{title} ({len(own)}), {rule}",
                    f"**{median(ratios):.3f}**",
                    f"{quantile(ratios, 0.25):.3f} … {quantile(ratios, 0.75):.3f}",
                    percent(median(values(found, "kept"))) if found else "–",
                    f"{median(values(found, 'error')):.1e}" if found else "–",
                    percent(statistics.fmean(good)),
                    str(len(chosen) - len(found)),
                ]
            )
    header = [
        f"S = {settings['columns']}",
        "time / dense backward, median",
        "quartiles",
        "rows kept",
        "error",
        "error ≤ bf16's",
        "none allowed (counted as 1)",
    ]
    dense = median([target[0]["dense_seconds"] for target in targets])
    lost = median([target[0]["bf16_error"] for target in targets])
    answers = [target for target in targets if target[0]["kind"] == "answer"]
    each = [
        [
            target[0]["case"],
            *(
                f"{point['ratio']:.3f}, {percent(point['kept'])}, {point['error']:.1e}"
                for point in sorted(target, key=lambda point: -point["tolerance"])
            ),
            f"{target[0]['bf16_error']:.1e}",
        ]
        for target in answers
    ]
    shown = sorted({point["tolerance"] for point in targets[0]}, reverse=True)
    return "\n\n".join(
        [
            markdown(header, rows),
            "**The answers one by one: time / dense backward, rows kept, error**",
            markdown(["answer", *(f"ε = {t:g}" for t in shown), "dense bf16"], each),
            f"Medians of {settings['rounds']} rounds and over targets: dense backward {dense:.2f} s, "
            f"error of dense bf16 {lost:.1e}.",
        ]
    )


def answer_table(settings: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    rows = [
        [
            f"ε = {name}",
            f"{figures['seconds']:.2f} s",
            f"**{figures['times_faster']:.2f}×**",
            f"{figures['recorded_seconds']:.2f} s",
            f"**{figures['recorded_times_faster']:.2f}×**",
            f"{median(figures['errors']):.1e}",
            f"{max(figures['errors']):.1e}",
            f"{figures['within_bf16']} of {results['tokens']}",
        ]
        for name, figures in results["tolerances"].items()
    ]
    lost = results["bf16_errors"]
    rows.append(["exact", f"{results['exact_seconds']:.2f} s", "1×", "–", "–", "–", "–", "–"])
    rows.append(["dense bf16", "–", "–", "–", "–", f"{median(lost):.1e}", f"{max(lost):.1e}", "–"])
    header = [
        f"{results['tokens']} tokens, S = {settings['columns']}",
        "whole call, forward included",
        "faster than exact",
        "after generate()",
        "faster than exact",
        "error, median",
        "largest",
        "tokens with error ≤ bf16's",
    ]
    return markdown(header, rows)


def memory_table(settings: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    base = results.get("exact, lean")
    rows = []
    for name, size in results.items():
        number = isinstance(size, int)
        share = f"{size / base:.2f}" if number and isinstance(base, int) else "–"
        rows.append([name, f"{size / 2**20:,.0f} MiB" if number else str(size), share])
    title = f"one target, S = {settings['columns']}, ε = {settings['tolerance']:g}"
    return markdown([title, "extra peak memory", "× exact lean's"], rows)


SERIES = {"dense_seconds": "dense", "seconds": "pruned", "key_value_seconds": "key/value part", "rows": "rows kept"}


def growth_table(settings: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    points = as_points(results)
    rows = []
    for columns in sorted({point["columns"] for point in points}):
        own = [point for point in points if point["columns"] == columns]
        rows.append(
            [
                f"S = {columns} ({len(own)} targets)",
                f"{median(values(own, 'dense_seconds')):.3f} s",
                f"{median(values(own, 'seconds')):.3f} s",
                f"**{median(values(own, 'ratio')):.3f}**",
                f"{median(values(own, 'key_value_seconds')):.3f} s",
                f"{median(values(own, 'rows')):.0f} ({percent(median(values(own, 'kept')))})",
            ]
        )
    if len(rows) > 1:
        fitted = [f"S^{exponent(points, name):.2f}" for name in SERIES]
        rows.append(["least squares on the logarithms", fitted[0], fitted[1], "", fitted[2], fitted[3]])
    header = ["", "dense backward", f"pruned, ε = {settings['tolerance']:g}", "ratio", "key/value part", "rows kept"]
    return markdown(header, rows)


# Plots

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


def figure_of(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def finish(figure: Any, axes: Sequence[Any], head: Mapping[str, Any], path: Path) -> None:
    for axis in axes:
        axis.grid(alpha=0.3, which="both", linewidth=0.5)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(provenance(dict(head)), fontsize=7, color="#60646c", x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def plot_tradeoff(entries: Mapping[str, Any], path: Path) -> None:
    """Error against the rows kept and against ε, every target a dot, medians joined; dense bf16 on the same axes."""
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
    """Seconds per further target, and rows kept, against S, with the fitted power laws."""
    import numpy

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
