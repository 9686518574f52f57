"""GLIMPSE against chefer: time per target, several targets in one call, peak memory.

Time: chefer and every variant take turns in one process; ratios are taken within a round, medians over the rounds.
``sweep``: what a target costs once the forward has run, the figure that an answer's length multiplies. ``call``: one
target from the start, forward and all. ``together``: 16 targets in one call over 16 calls of one. Memory: each in a
process of its own, lean mode, peak resident memory above what the loaded model takes.

Predictions (decoder 8 x 1024, 16 heads x 64, fp32), in causal products of one layer's S x S attention, S²·1024
operations: chefer's backward with the product along the way takes 5, at the rate of `attention_backward_relevancy`.
GLIMPSE takes the same 5, then 3 for the sums (the gradient's product over all columns, not half of them), then 2 for
the weighted product: 10. With the layer's linear products, 24 times S·1024² operations, at 140 GFLOP/s and what the
operators take alone (19 + 7 ms at S = 704, 124 + 52 at 2048, sums one and a half times a product): sweep 1.13 at S =
704 and 1.26 at 2048; call 1.06 and 1.14. 16 targets together: one forward for 16, 0.65. Memory as chefer's, but for dO,
which chefer's fused backward never gathers: at most 1.05.

Measured (results/glimpse.json): sweep 1.06 and 1.19, call 1.14 and 1.09, 16 targets together 0.54 (the forward is
nearly half of a call), memory 1.00. Medians of four rounds on a shared machine; a single round's sweep lay between 0.90
and 1.35.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..common import machine, memory, results, timing
from ..models.decoders import CASES, Case, build
from .variants import Problem

# name: method, options, chefer's rows too
VARIANTS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "chefer": ("chefer", {}, False),
    "glimpse": ("glimpse", {}, False),
    "glimpse_causal": ("glimpse", {"stats_domain": "causal"}, False),
    "glimpse_and_chefer": ("glimpse", {}, True),
    "glimpse_top_0.6": ("glimpse", {"layers": "top:0.6"}, False),
    "glimpse_two_sweeps": ("glimpse", {"route": "two_sweeps"}, False),
}
DEFAULT = ("decoder-704", "decoder-2048")
TOGETHER = 16


def options_of(variant: str) -> Any:
    """Make the method's options; chefer has none."""
    import lvlm_fastxai as fx

    method, options, _ = VARIANTS[variant]
    return fx.GlimpseOptions(**options) if method == "glimpse" else None


def explain(variant: str, problem: Problem, memory_mode: str = "fast") -> Any:
    """Run the whole call."""
    from lvlm_fastxai.explain.relevancy_rows import explain_rows

    method, _, compare = VARIANTS[variant]
    how: dict[str, Any] = {"method": method, "options": options_of(variant), "compare": compare, "memory": memory_mode}
    return explain_rows(problem.model, problem.inputs, problem.targets, **how).rows


def sweep_seconds(variant: str, problem: Problem, device: str) -> float:
    """Time the sweep alone."""
    from lvlm_fastxai import methods
    from lvlm_fastxai.sweep.forward import Sweep
    from lvlm_fastxai.sweep.targets import check_targets

    method, _, compare = VARIANTS[variant]
    checked = check_targets(problem.targets, problem.inputs, None)
    run: Any = methods.find(method)(checked, problem.inputs, None, options_of(variant))
    if compare:
        run.compare = True
    with Sweep(problem.model, problem.inputs, checked.row_table()) as sweep:
        return timing.seconds(lambda: run.rows(sweep), device)


def measure_time(case: Case, variants: list[str], rounds: int, device: str) -> dict[str, dict[str, Any]]:
    """Take median seconds of sweep and call, and their ratios to chefer's of the same round."""
    problem = Problem(*build(case, device))
    timers: dict[str, Callable[[str], float]] = {
        "sweep": lambda variant: sweep_seconds(variant, problem, device),
        "call": lambda variant: timing.seconds(partial(explain, variant, problem), device),
    }
    taken: dict[str, dict[str, list[float]]] = {variant: {name: [] for name in timers} for variant in variants}
    for number in range(rounds + 1):
        for variant in variants:
            for name, timer in timers.items():
                found = timer(variant)
                if number:  # the first round warms up
                    taken[variant][name].append(found)
    return {
        variant: {name: summarise(times, taken["chefer"][name]) for name, times in of_variant.items()}
        for variant, of_variant in taken.items()
    }


def measure_together(case: Case, variants: list[str], rounds: int, device: str) -> dict[str, dict[str, float]]:
    """Time one call for all targets, and take its ratio to as many calls of one in the same round."""
    problem = Problem(*build(replace(case, targets=TOGETHER), device))
    each = [replace(problem, targets=[target]) for target in problem.targets]
    found = {}
    for variant in variants:
        calls: dict[str, Callable[[], object]] = {
            "together": partial(explain, variant, problem),
            "apart": lambda variant=variant: [explain(variant, one) for one in each],
        }
        calls["together"]()
        taken = timing.in_turns(calls, rounds, device, warm_up=False)
        found[variant] = summarise(taken["together"], taken["apart"])
    return found


def summarise(times: list[float], base: list[float]) -> dict[str, float]:
    """Take the median seconds, and of the ratios to ``base`` the median and both ends."""
    ratios = timing.ratios(times, base)
    return {
        "seconds": statistics.median(times),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def extra_bytes(name: str, variant: str, targets: int, device: str) -> int:
    """Measure the peak extra bytes of a call in lean mode. Runs in a fresh process."""
    problem = Problem(*build(replace(CASES[name], targets=targets), device))
    return memory.second_call_bytes(partial(explain, variant, problem, "lean"), device)


def measure_memory(name: str, variants: list[str], targets: int, device: str) -> dict[str, Any]:
    """Measure peak extra bytes in lean mode, and their ratio to chefer's."""
    found = {v: memory.in_fresh_process(extra_bytes, name, v, targets, device) for v in variants}
    base = found["chefer"]
    return {
        variant: {
            "extra_bytes": size,
            "ratio": size / base if isinstance(size, int) and isinstance(base, int) else None,
        }
        for variant, size in found.items()
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--case", action="append", choices=CASES, help="repeatable; default the two decoders of 8 layers"
    )
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="repeatable; default all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--together-rounds", type=int, default=3, help="0 leaves the 16 targets out")
    parser.add_argument("--memory-targets", type=int, nargs="*", default=[1, TOGETHER], metavar="N")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="results file (JSON)")


def main(args: argparse.Namespace) -> int:
    import torch

    torch.set_num_threads(args.threads)
    variants = args.variant or list(VARIANTS)
    variants = variants if "chefer" in variants else ["chefer", *variants]
    head, found = machine.describe(), {}
    for name in args.case or DEFAULT:
        case = CASES[name]
        figures: dict[str, Any] = {"case": asdict(case)}
        figures["time"] = measure_time(case, variants, args.rounds, args.device)
        two = [variant for variant in variants if variant in ("chefer", "glimpse")]
        if args.together_rounds:
            figures["together"] = measure_together(case, two[1:], args.together_rounds, args.device)
        figures["memory"] = {str(count): measure_memory(name, two, count, args.device) for count in args.memory_targets}
        found[name] = figures
        print(table(name, figures), flush=True)
        if args.out:
            results.write_results(args.out, head, found)
    return 0


def table(name: str, figures: dict[str, Any]) -> str:
    """Lay out one case as text."""
    lines = [name, f"  {'variant':22}{'sweep s':>9}{'x chefer':>10}{'call s':>9}{'x chefer':>10}"]
    for variant, of in figures["time"].items():
        lines.append(
            f"  {variant:22}{of['sweep']['seconds']:9.3f}{of['sweep']['ratio']:10.3f}{of['call']['seconds']:9.3f}"
            f"{of['call']['ratio']:10.3f}"
        )
    for variant, found in figures.get("together", {}).items():
        lines.append(f"  {variant}: {TOGETHER} targets {found['seconds']:.2f} s, {found['ratio']:.3f} of single calls")
    for count, of_count in figures.get("memory", {}).items():
        for variant, found in of_count.items():
            size = found["extra_bytes"]
            shown = size if isinstance(size, str) else f"{size / 2**20:.1f} MiB, {found['ratio']:.3f} of chefer's"
            lines.append(f"  {variant}, lean, {count} target(s): {shown}")
    return "\n".join(lines)
