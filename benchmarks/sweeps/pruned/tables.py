"""The measured parts as Markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy

from ...common.results import Point, as_points
from ...common.tables import markdown, percent

NOT_MEASURED = "(not yet measured)"
KINDS = {"answer": "answer to a question", "prose": "prose, next token", "code": "code, next token"}
SERIES = {"dense_seconds": "dense", "seconds": "pruned", "key_value_seconds": "key/value part", "rows": "rows kept"}


def estimate(point: Point) -> float:
    """Compute the error estimate, with the constants that the library holds now."""
    from lvlm_fastxai.sweep import pruning

    return pruning.MISSING_FACTOR * point["missing"] + pruning.DROPPED_FACTOR * point["dropped"]


def quantile(values: Sequence[float], share: float) -> float:
    """Return a quantile of values."""
    return float(numpy.quantile(numpy.array(values), share))


def exponent(points: Iterable[Point], name: str) -> float:
    """Fit log(value) = p · log(S) + c by least squares; returns p."""
    pairs = [(point["columns"], point[name]) for point in points if point[name] > 0]
    if len({columns for columns, _ in pairs}) < 2:
        return float("nan")
    x, y = numpy.log(numpy.array(pairs, dtype=float)).T
    return float(numpy.polyfit(x, y, 1)[0])


def values(points: Sequence[Point], name: str) -> list[float]:
    """Take one figure of every point."""
    return [point[name] for point in points]


def text_tables(settings: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Show the texts, by length and all together."""
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
    """Show the answers about pictures, and the pointing game of their maps."""
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
    """Show rows kept and error of every kind and length."""
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
                cells.append(
                    f"{percent(statistics.median(values(own, 'kept')))}, {statistics.median(values(own, 'error')):.1e}"
                )
            bf16 = f"{statistics.median(values(halves, 'error')):.1e}"
            rows.append([f"{title}, S = {columns} ({len(halves)})", *cells, bf16])
    return markdown(["targets", *(f"ε = {t:g}" for t in tolerances), "dense bf16"], rows)


def same_target(point: Point) -> tuple[Any, ...]:
    """Return what tells a target from the others."""
    return point["case"], point["columns"], point["row"], point["kind"]


def by_tolerance(points: Sequence[Point], dense: Sequence[Point]) -> str:
    """Show all targets at every ε, under `auto`, and in dense bf16."""
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
            percent(statistics.median(values(own, "kept"))) if halves is not None else "100%",
            f"{statistics.median(errors):.1e}",
            f"{quantile(errors, 0.95):.1e}",
            f"{statistics.median(correlations):.4f}",
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
    """Choose what "auto" would take of each target in a 16-bit model; None where its tolerances were not measured."""
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
    """Show the pointing game of every way's maps."""
    names = [name for name in points[0] if name != "kind" and not name.startswith("same cell")]
    rows = []
    for name in names:
        title = {"exact": "exact", "bf16": "dense bf16"}.get(name, f"ε = {name}")
        same = statistics.fmean(values(points, f"same cell, {name}"))
        rows.append([title, f"{statistics.fmean(values(points, name)):.1%}", f"{same:.1%}"])
    return markdown(["", "pointing game", "highest cell is the exact map's"], rows)


def weight_table(settings: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Show the rows kept under every weight."""
    points = as_points(results["points"])
    rows = []
    for weight in sorted({point["weight"] for point in points}):
        own = values([point for point in points if point["weight"] == weight], "kept")
        rows.append([f"{weight:g}", percent(statistics.geometric_mean(own)), percent(min(own)), percent(max(own))])
    count = len(points) // len(rows)
    header = [f"weight ({count} targets, S = {', '.join(map(str, settings['lengths']))})"]
    return markdown([*header, "rows kept, geometric mean", "fewest", "most"], rows)


def calibration_tables(settings: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Show the fitted constants, and how often the estimate covers."""
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
    """Group the points by target, the largest tolerance first."""
    targets: dict[tuple[Any, ...], list[Point]] = {}
    for point in points:
        targets.setdefault((*same_target(point), point["target"]), []).append(point)
    return [sorted(own, key=lambda p: -p["tolerance"]) for own in targets.values()]


def choose(points: Sequence[Point], allowed: Callable[[Point], bool]) -> Point | None:
    """Return the point of the largest tolerance that is allowed."""
    return next((point for point in points if allowed(point)), None)


def is_at(tolerance: float, point: Point) -> bool:
    """Say whether a point is of this ε."""
    return point["tolerance"] == tolerance


def target_tables(settings: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Show what a further target costs under several rules for ε, and each answer at each ε."""
    targets = by_target(as_points(results))
    dense = statistics.median([target[0]["dense_seconds"] for target in targets])
    lost = statistics.median([target[0]["bf16_error"] for target in targets])
    return "\n\n".join(
        [
            rule_table(settings["columns"], targets),
            "**The answers one by one: time / dense backward, rows kept, error**",
            each_answer_table(targets),
            f"Medians of {settings['rounds']} rounds and over targets: dense backward {dense:.2f} s, "
            f"error of dense bf16 {lost:.1e}.",
        ]
    )


def rule_table(columns: int, targets: Sequence[list[Point]]) -> str:
    """Show time, rows kept and error of answers and of next tokens, for several rules that choose ε."""
    import torch

    from lvlm_fastxai.sweep import pruning

    limit = pruning.ROUNDING_ERROR[torch.bfloat16]
    rules: dict[str, Callable[[Point], bool]] = {
        "largest ε with an error ≤ its bf16 error": lambda p: p["error"] <= p["bf16_error"],
        f"largest ε with an estimate ≤ {limit:g}": lambda p: estimate(p) <= limit,
        **{f"ε = {t:g}": partial(is_at, t) for t in sorted({point["tolerance"] for point in targets[0]})},
    }
    header = [
        f"S = {columns}",
        "time / dense backward, median",
        "quartiles",
        "rows kept",
        "error",
        "error ≤ bf16's",
        "none allowed (counted as 1)",
    ]
    rows = []
    for title, is_answer in (("answers", True), ("next tokens", False)):
        own = [target for target in targets if (target[0]["kind"] == "answer") == is_answer]
        if own:
            rows += [[f"{title} ({len(own)}), {rule}", *rule_cells(own, allowed)] for rule, allowed in rules.items()]
    return markdown(header, rows)


def rule_cells(targets: Sequence[list[Point]], allowed: Callable[[Point], bool]) -> list[str]:
    """Take the largest ε that is allowed for each target; where there is none the sweep is exact and dense."""
    chosen = [choose(target, allowed) for target in targets]
    found = [point for point in chosen if point is not None]
    ratios = [1.0 if point is None else point["ratio"] for point in chosen]
    good = [point is None or point["error"] <= point["bf16_error"] for point in chosen]
    return [
        f"**{statistics.median(ratios):.3f}**",
        f"{quantile(ratios, 0.25):.3f} … {quantile(ratios, 0.75):.3f}",
        percent(statistics.median(values(found, "kept"))) if found else "–",
        f"{statistics.median(values(found, 'error')):.1e}" if found else "–",
        percent(statistics.fmean(good)),
        str(len(chosen) - len(found)),
    ]


def each_answer_table(targets: Sequence[list[Point]]) -> str:
    """Show each answer at each ε, the largest first."""
    shown = sorted({point["tolerance"] for point in targets[0]}, reverse=True)
    rows = []
    for target in targets:
        if target[0]["kind"] == "answer":
            cells = [f"{point['ratio']:.3f}, {percent(point['kept'])}, {point['error']:.1e}" for point in target]
            rows.append([target[0]["case"], *cells, f"{target[0]['bf16_error']:.1e}"])
    return markdown(["answer", *(f"ε = {t:g}" for t in shown), "dense bf16"], rows)


def answer_table(settings: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Show the times of a whole answer."""
    rows = [
        [
            f"ε = {name}",
            f"{figures['seconds']:.2f} s",
            f"**{figures['times_faster']:.2f}×**",
            f"{figures['recorded_seconds']:.2f} s",
            f"**{figures['recorded_times_faster']:.2f}×**",
            f"{statistics.median(figures['errors']):.1e}",
            f"{max(figures['errors']):.1e}",
            f"{figures['within_bf16']} of {results['tokens']}",
        ]
        for name, figures in results["tolerances"].items()
    ]
    lost = results["bf16_errors"]
    rows.append(["exact", f"{results['exact_seconds']:.2f} s", "1×", "–", "–", "–", "–", "–"])
    rows.append(["dense bf16", "–", "–", "–", "–", f"{statistics.median(lost):.1e}", f"{max(lost):.1e}", "–"])
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
    """Show the peak memory of one explanation."""
    base = results.get("exact, lean")
    rows = []
    for name, size in results.items():
        number = isinstance(size, int)
        share = f"{size / base:.2f}" if number and isinstance(base, int) else "–"
        rows.append([name, f"{size / 2**20:,.0f} MiB" if number else str(size), share])
    title = f"one target, S = {settings['columns']}, ε = {settings['tolerance']:g}"
    return markdown([title, "extra peak memory", "× exact lean's"], rows)


def growth_table(settings: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Show the times over S, with fitted power laws."""
    points = as_points(results)
    rows = []
    for columns in sorted({point["columns"] for point in points}):
        own = [point for point in points if point["columns"] == columns]
        rows.append(
            [
                f"S = {columns} ({len(own)} targets)",
                f"{statistics.median(values(own, 'dense_seconds')):.3f} s",
                f"{statistics.median(values(own, 'seconds')):.3f} s",
                f"**{statistics.median(values(own, 'ratio')):.3f}**",
                f"{statistics.median(values(own, 'key_value_seconds')):.3f} s",
                f"{statistics.median(values(own, 'rows')):.0f} ({percent(statistics.median(values(own, 'kept')))})",
            ]
        )
    if len(rows) > 1:
        fitted = [f"S^{exponent(points, name):.2f}" for name in SERIES]
        rows.append(["least squares on the logarithms", fitted[0], fitted[1], "", fitted[2], fitted[3]])
    header = ["", "dense backward", f"pruned, ε = {settings['tolerance']:g}", "ratio", "key/value part", "rows kept"]
    return markdown(header, rows)
