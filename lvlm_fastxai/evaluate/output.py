"""What comes out, written down: tables for terminal and Markdown, JSON, and one CSV row per map."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from ..methods import registry
from .evaluation import Evaluation
from .maps import WEIGHTINGS
from .scores import METRICS, Metric

BEGIN, END = "<!-- figures: written by `lvlm-fastxai evaluate --document` -->", "<!-- end of figures -->"


@dataclass(frozen=True)
class Table:
    """A titled table of strings; the first column is left-aligned, the others right-aligned."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def text(self) -> str:
        """Write it for a terminal."""
        widths = [max(len(row[column]) for row in (self.header, *self.rows)) for column in range(len(self.header))]

        def line(row: Sequence[str]) -> str:
            cells = [
                cell.ljust(width) if not place else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            return "  ".join(cells).rstrip()

        rule = "  ".join("-" * width for width in widths)
        return "\n".join([self.title, "", line(self.header), rule, *map(line, self.rows), *filter(None, [self.note])])

    def markdown(self) -> str:
        """Write it for a document."""
        rule = [":--", *["--:"] * (len(self.header) - 1)]
        lines = [f"| {' | '.join(row)} |" for row in (self.header, rule, *self.rows)]
        return "\n".join([f"**{self.title}**", "", *lines, *(["", self.note] if self.note else [])])


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Make the tables of an evaluation's dictionary (`Evaluation.to_dict`): questions, whole answers, words."""
    questions, answers, words = result["questions"], result["whole_answers"], result["words"]
    correct, methods = questions["summary"]["correct"], result["settings"]["methods"]
    found = [_accuracy(questions)]
    if correct:
        found += _compared(correct, questions["reference"], "Correctly answered questions", "questions")
        for name in ("pointing", "mass_ratio", "average_precision"):
            found.append(_by_group(correct, methods, name, "By question kind, correct answers", "maps"))
    everything = questions["summary"]["all"]["overall"]
    found.append(_overall(everything, "All questions, answered right or wrong", "questions"))
    if answers and (correct := answers["summary"]["correct"]):
        found += _compared(correct, answers["reference"], "Whole answers: right descriptions", "descriptions")
        for name in ("pointing", "average_precision", "nss"):
            found.append(_by_group(correct, methods, name, "Whole answers, by what is described", "descriptions"))
    if words:
        for name in ("pointing", "average_precision", "selectivity"):
            found.append(_by_group(words, methods, name, "By word of a right description", "words"))
        weighted = [
            name
            for name in words["overall"]["methods"]
            if name in (*registry.names(lambda traits: traits.weighs_tokens), *WEIGHTINGS)
        ]
        if weighted:
            found.append(_by_group(words, weighted, "weight", "What a word counts for in its answer's map", "words"))
    return found


def _compared(groups: Mapping[str, Any], reference: str, title: str, unit: str) -> list[Table]:
    """Tabulate means, and the differences to ``reference`` if it is there."""
    difference = _difference(groups["overall"], f"Difference to {reference}, {title[0].lower()}{title[1:]}", unit)
    return [_overall(groups["overall"], title, unit), *([difference] if difference else [])]


def _accuracy(result: Mapping[str, Any]) -> Table:
    rows = [
        [name, f"{100 * entry['correct'] / entry['questions']:.1f} %", str(entry["questions"])]
        for name, entry in result["accuracy"].items()
    ]
    skipped = ", ".join(f"{count} {reason}" for reason, count in result["skipped"].items())
    scored = result["scored"]
    note = (
        f"Maps of {scored['questions']} questions are scored, {scored['correct']} of them answered right. "
        f"Skipped: {skipped}."
    )
    return Table("The model's answers", ["kind", "right", "questions"], rows, note)


def _overall(group: Mapping[str, Any], title: str, unit: str) -> Table:
    metrics = [metric for metric in METRICS if any(metric.name in entry for entry in group["methods"].values())]
    rows = [
        [method, *(_with_interval(entry.get(metric.name), metric) for metric in metrics)]
        for method, entry in group["methods"].items()
    ]
    chance = ["chance", *(_number(group["chance"].get(metric.name), metric) for metric in metrics)]
    note = f"{group['maps']} {unit} about {group['scenes']} scenes; ± half the width of the 95 % interval."
    curves = group["methods"][next(iter(group["methods"]))].get("deletion")
    if curves:
        note += f" Deletion (lower is better) and insertion: {curves['maps']} right answers, drawn evenly over kinds."
    return Table(title, ["method", *(metric.heading for metric in metrics)], [*rows, chance], note)


def _difference(group: Mapping[str, Any], title: str, unit: str) -> Table | None:
    methods = {
        name: {key: value["difference"] for key, value in entry.items() if "difference" in value}
        for name, entry in group["methods"].items()
    }
    methods = {name: entry for name, entry in methods.items() if entry}
    if not methods:
        return None
    metrics = [metric for metric in METRICS if any(metric.name in entry for entry in methods.values())]
    rows = [
        [name, *(_with_interval(entry.get(metric.name), metric, signed=True) for metric in metrics)]
        for name, entry in methods.items()
    ]
    note = f"Paired over the same {unit}; * where the 95 % interval excludes zero (not corrected for their number)."
    return Table(title, ["method", *(metric.heading for metric in metrics)], rows, note)


def _by_group(groups: Mapping[str, Any], methods: Sequence[str], name: str, heading: str, unit: str) -> Table:
    metric = next(metric for metric in METRICS if metric.name == name)
    # The random map only measures chance, which stands in a column of its own.
    methods = [method for method in methods if method != "random"]
    rows = [
        [
            title,
            str(next(iter(group["methods"].values())).get(metric.name, {}).get("maps", group["maps"])),
            *(_with_interval(group["methods"][method].get(metric.name), metric) for method in methods),
            _number(group["chance"].get(metric.name), metric),
        ]
        for title, group in groups.items()
        if any(metric.name in group["methods"][method] for method in methods)
    ]
    return Table(f"{heading}: {metric.heading}", ["group", unit, *methods, "chance"], rows)


def _with_interval(entry: Mapping[str, Any] | None, metric: Metric, *, signed: bool = False) -> str:
    if entry is None:
        return "–"
    mean = _number(entry["mean"], metric, signed=signed)
    if entry["low"] is None:
        return mean
    outside = signed and (entry["low"] > 0 or entry["high"] < 0)
    return f"{mean} ±{_number((entry['high'] - entry['low']) / 2, metric)}{'*' if outside else ''}"


def _number(value: float | None, metric: Metric, *, signed: bool = False) -> str:
    if value is None:
        return "–"
    sign = "+" if signed else ""
    if metric.percent:
        return f"{100 * value:{sign}.1f}"
    return f"{value:{sign}.2f}" if metric.name in ("mass_ratio", "nss") else f"{value:{sign}.3f}"


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write an evaluation's dictionary."""
    path.write_text(json.dumps(result, ensure_ascii=False, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_csv(path: Path, evaluation: Evaluation) -> None:
    """Write one row per question and method with every score, whole answers last; an empty field was not measured."""
    parts = {"questions": evaluation.questions, "whole answers": evaluation.whole_answers}
    questions = [(name, q) for name, part in parts.items() if part for q in part.scored]
    scores = sorted({name for _, q in questions for entry in q.scores.values() for name in entry})
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        header = ["part", "scene", "difficulty", "objects", "kind", "question", "right_answer", "answer"]
        writer.writerow([*header, "correct", "method", *scores])
        for name, q in questions:
            scene, asked = q.case.scene, q.case.question
            of_scene = [scene.seed, scene.difficulty, len(scene.objects)]
            about = [name, *of_scene, asked.kind, asked.text, asked.answer, q.answer]
            for method, entry in q.scores.items():
                values = [entry.get(name) for name in scores]
                # NaN is the one number that differs from itself.
                writer.writerow(
                    [*about, int(q.correct), method]
                    + ["" if value is None or value != value else f"{value:.6g}" for value in values]
                )


def provenance(result: Mapping[str, Any]) -> str:
    """Write one paragraph in Markdown: the command, the model and the versions behind the figures."""
    model, versions = result["model"], result["versions"]
    seconds = sum(result["seconds"].values())
    return (
        f"`{result['command']}`: {model['name']}, {model['parameters'] / 1e6:.1f} million parameters"
        + (f", weights `{model['fingerprint']}` (start of their SHA-256)" if model["fingerprint"] else "")
        + f"; lvlm_fastxai {versions['lvlm_fastxai']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, "
        f"{model['device']}, {result['threads']} threads, {seconds:.0f} s."
    )


def check_document(path: Path) -> tuple[str, str]:
    """Find what stands before and after the figures of a Markdown document.

    Raises:
        ArgumentError: the document cannot be read or holds no pair of markers.
    """
    try:
        before, marker, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    except OSError as error:
        raise ArgumentError(f"document '{path}': {error.strerror or error}") from error
    _, end, after = rest.partition(END)
    if not marker or not end:
        raise ArgumentError(f"document '{path}': expected the lines {BEGIN!r} and {END!r} around the figures")
    return before, after


def update_document(path: Path, result: Mapping[str, Any]) -> None:
    """Replace the figures between the two markers of a Markdown document; errors as `check_document`."""
    before, after = check_document(path)
    parts = [BEGIN, provenance(result), *(table.markdown() for table in tables(result)), END]
    path.write_text(before + "\n\n".join(parts) + after, encoding="utf-8")
