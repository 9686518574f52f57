"""The time of a further target against the dense backward, of a whole answer, and peak memory."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...common import memory as peak
from ...common import timing
from ...common.results import Point, as_table
from ...models import smollm2
from . import cases
from .cases import Case
from .descents import (
    Descents,
    bar,
    compare,
    exact_rows,
    half_copy,
    half_points,
    load_smollm2,
    opened,
    points_of,
)
from .texts import QUESTIONS, SUMMARY, TEXTS, Reader


class Dense:
    """transformers' own model with SDPA: one forward, then one activation-only backward per target."""

    def __init__(self, model: Any, case: Case) -> None:
        model.set_attn_implementation("sdpa")
        with torch.enable_grad():
            ids = case.inputs["input_ids"]
            self._leaf = model.get_input_embeddings()(ids).detach().requires_grad_()
            hidden = model.get_decoder()(inputs_embeds=self._leaf, use_cache=False).last_hidden_state
            head = model.get_output_embeddings()
            self._logits = [head(hidden[0, row])[token] for _, row, token in case.targets]

    def backward(self, number: int) -> Tensor:
        """Compute the (1, S, D) gradient at the input embeddings."""
        return torch.autograd.grad(self._logits[number], self._leaf, retain_graph=True)[0]


def targets(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time one further target's descent against one further dense backward, taking turns in one process."""
    model, tokenizer = load_smollm2()
    half, reader = half_copy(model), Reader(tokenizer, args.texts)
    each = -(-args.targets // len(TEXTS))
    chosen = cases.answers(model, reader, QUESTIONS, args.columns)
    chosen += cases.ordinary(reader, TEXTS, args.columns, each)
    points: list[Point] = []
    with bar(sum(len(case.targets) for case in chosen), "targets") as progress:
        for case in chosen:
            points += target_points(model, half, case, args)
            progress.update(len(case.targets))
            yield as_table(points)


def target_points(model: Any, half: Any, case: Case, args: argparse.Namespace) -> list[Point]:
    """Measure one point per target and tolerance; its ratio is to the dense backward of the same round."""
    exact = exact_rows(model, case)
    dense = Dense(model, case)
    with opened(model, case) as descents:
        # Also what warms up: keys and values are there afterwards.
        found = points_of(descents, case, exact, args.tolerances)
        clocks = [clock(dense, descents, number, args) for number in range(len(case.targets))]
    del dense
    lost = [point["error"] for point in half_points(half, case, exact)]
    places = [(number, tolerance) for number in range(len(case.targets)) for tolerance in args.tolerances]
    return [
        {
            **point,
            "target": number,
            "seconds": statistics.median(clocks[number][tolerance]),
            "dense_seconds": statistics.median(clocks[number]["dense"]),
            "ratio": timing.median_ratio(clocks[number][tolerance], clocks[number]["dense"]),
            "bf16_error": lost[number],
        }
        for (number, tolerance), point in zip(places, found, strict=True)
    ]


def clock(dense: Dense, descents: Descents, number: int, args: argparse.Namespace) -> dict[Any, list[float]]:
    """Time the dense backward and the descent at every tolerance, once each per round."""
    calls: dict[Any, Callable[[], object]] = {"dense": partial(dense.backward, number)}
    calls |= {tolerance: partial(descents.row, number, tolerance) for tolerance in args.tolerances}
    if number == 0:  # warms up
        dense.backward(number)
    return timing.in_turns(calls, args.rounds, warm_up=False)


def answer(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time all tokens of an answer in one call: the exact sweep, whose targets share a forward, against the pruned one.

    The pruned sweep is timed with a forward of its own, and from what `generate()` computed, as `Explainer` runs it.
    """
    from lvlm_fastxai.explain.relevancy_rows import explain_rows

    model, tokenizer = load_smollm2()
    half = half_copy(model)
    case = cases.answer(model, Reader(tokenizer, args.texts), "summary", SUMMARY, args.columns, args.answer)
    recording = recorded(model, case, args.answer)

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
    calls: dict[Any, Callable[[], object]] = {0.0: partial(explain, 0.0)}
    for t in tolerances:
        calls |= {t: partial(explain, t), (t, "recorded"): partial(explain, t, recording)}
    taken = timing.in_turns(calls, args.rounds, warm_up=False)
    yield {
        "tokens": args.answer,
        "exact_seconds": statistics.median(taken[0.0]),
        "bf16_errors": [float(f"{error:.4g}") for error in lost],
        "tolerances": {
            str(t): {
                "seconds": statistics.median(taken[t]),
                "times_faster": timing.median_ratio(taken[0.0], taken[t]),
                "recorded_seconds": statistics.median(taken[t, "recorded"]),
                "recorded_times_faster": timing.median_ratio(taken[0.0], taken[t, "recorded"]),
                "errors": [float(f"{error:.4g}") for error in errors[t]],
                "within_bf16": sum(a <= b for a, b in zip(errors[t], lost, strict=True)),
            }
            for t in tolerances
        },
    }


def recorded(model: Any, case: Case, count: int) -> Any:
    """Generate the answer of ``count`` tokens again, and keep what the sweep can start from.

    Raises:
        SystemExit: it left nothing.
    """
    from lvlm_fastxai.sweep.recording import Recorder

    recorder = Recorder(model)
    with recorder:
        prompt = case.inputs["input_ids"][:, : case.columns - (count - 1)]
        model.generate(prompt, attention_mask=prompt.new_ones(prompt.shape), **cases.greedy(count))
    recording, reason = recorder.recording()
    if recording is None or recording.columns != case.columns:
        raise SystemExit(f"time: generate() left nothing to start from: {reason}")
    return recording


MEMORY_VARIANTS = {
    "exact, fast": ("fast", False),
    "exact, lean": ("lean", False),
    "pruned, fast": ("fast", True),
    "pruned, lean": ("lean", True),
}


def memory(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure the peak extra memory of one explanation, each variant in a fresh process."""
    results: dict[str, int | str] = {}
    with bar(len(MEMORY_VARIANTS), "memory", "process") as progress:
        for name, (mode, pruned) in MEMORY_VARIANTS.items():
            tolerance = args.tolerance if pruned else 0.0
            how = mode, tolerance, args.columns, args.threads, args.texts
            results[name] = peak.in_fresh_process(extra_bytes, *how)
            progress.update(1)
            yield results


def extra_bytes(mode: str, tolerance: float, columns: int, threads: int, commit: str) -> int:
    """Measure the peak extra memory of one explanation. Runs in a fresh process."""
    import lvlm_fastxai as fx

    torch.set_num_threads(threads)
    model, tokenizer = smollm2.load_smollm2()
    case = cases.ordinary_case(Reader(tokenizer, commit), "documentation", TEXTS["documentation"], columns, 1)
    peak.limit_memory()
    explain = partial(fx.relevancy_rows, model, case.inputs, case.targets, memory=mode, row_tolerance=tolerance)
    return peak.second_call_bytes(explain)
