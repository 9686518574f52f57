"""Whole explanations: ours against eager relevancy, the bare forward + backward, and the plain forward.

Time: every variant once per round, all in one process, ratios taken within a round, medians over the rounds.
Memory: every variant in a process of its own, peak resident memory above what the loaded model takes.

Two eager baselines: with frozen parameters, the best it can be, and as published tools run it. All variants stand in
`benchmarks/sweeps/variants.py`, all decoders in `benchmarks/models/decoders.py`.

Predictions, written before the first run (decoder 8 x 1024, 16 heads, S = 704, fp32, one target): a layer's matrix
products are 18 GFLOP each way, its attention 1.0 forward and 2.5 backward, the relevancy product 1.0. So fast mode
should cost 1.03x of forward + backward, and lean mode, which runs the forward twice, 1.5x. Memory: fast 1.0x of theirs;
lean one layer's activations of eight and eight layer inputs, 18 %.

Measured at commit a2ce71d: 1.03x, 1.50x, 1.00x as predicted; lean takes 24 %, because the backward through a layer's
MLP holds three gradients of its width beside its activations, which the prediction left out.

Predicted for the fused backward, which takes half of the time of torch's alone: 0.88x and 1.28x. Measured
(results/end-to-end.json): 0.98x and 1.44x at S = 704, 0.93x and 1.45x at S = 4096. Attention's backward is a smaller
part of the whole than the prediction took it for.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..common import machine, memory, results, timing
from ..models.decoders import CASES, Case, build
from .variants import DEFAULT, VARIANTS, Problem, work


def measure_time(case: Case, variants: list[str], rounds: int, device: str) -> dict[str, dict[str, float]]:
    """Take median seconds, and the median over rounds of the ratio to forward + backward in the same round."""
    problem = Problem(*build(case, device))
    taken = timing.in_turns({variant: work(variant, problem) for variant in variants}, rounds, device)
    figures = {}
    for variant, times in taken.items():
        ratios = timing.ratios(times, taken["forward_backward"])
        figures[variant] = {
            "seconds": statistics.median(times),
            "time_ratio": statistics.median(ratios),
            "time_ratio_min": min(ratios),
            "time_ratio_max": max(ratios),
        }
    return figures


def extra_bytes(name: str, variant: str, device: str) -> int:
    """Measure the peak extra bytes of one variant. Runs in a fresh process."""
    problem = Problem(*build(CASES[name], device))
    if device == "cpu":
        memory.limit_memory()
    return memory.second_call_bytes(work(variant, problem), device)


def measure(name: str, variants: list[str], rounds: int, device: str) -> dict[str, Any]:
    """Measure memory and time of one case."""
    extra = {variant: memory.in_fresh_process(extra_bytes, name, variant, device) for variant in variants}
    fits = [variant for variant in variants if extra[variant] != memory.OUT_OF_MEMORY]
    times = measure_time(CASES[name], fits, rounds, device)
    nothing: dict[str, Any] = {"seconds": memory.OUT_OF_MEMORY}
    figures = {v: {**times.get(v, nothing), "extra_bytes": extra[v]} for v in variants}
    add_memory_ratios(figures)
    return {"case": asdict(CASES[name]), "variants": figures}


def add_memory_ratios(figures: dict[str, dict[str, Any]]) -> None:
    """Add each variant's memory over that of forward + backward, where both are known."""
    base = figures["forward_backward"]["extra_bytes"]
    for found in figures.values():
        if isinstance(found["extra_bytes"], str):
            found["memory_ratio"] = found["extra_bytes"]
        elif not isinstance(base, str) and base > 0:
            found["memory_ratio"] = found["extra_bytes"] / base


def table(name: str, result: dict[str, Any]) -> str:
    """Lay out one case as text: ratios to forward + activation-only backward."""
    lines = [name, f"  {'variant':24}{'seconds':>10}{'x fwd+bwd':>11}{'extra MiB':>11}{'x fwd+bwd':>11}"]
    for variant, figures in result["variants"].items():
        if figures["extra_bytes"] == memory.OUT_OF_MEMORY:
            lines.append(f"  {variant:24}{memory.OUT_OF_MEMORY:>14}")
            continue
        # Where forward + backward itself does not fit there is nothing to compare with.
        time_ratio, memory_ratio = figures.get("time_ratio", math.nan), figures.get("memory_ratio", math.nan)
        lines.append(
            f"  {variant:24}{figures['seconds']:10.3f}{time_ratio:11.3f}"
            f"{figures['extra_bytes'] / 2**20:11.1f}{memory_ratio:11.3f}"
        )
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", action="append", choices=CASES, help="repeatable; default decoder-704")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="repeatable; default the exact ones")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="results file (JSON)")


def main(args: argparse.Namespace) -> int:
    import torch

    torch.set_num_threads(args.threads)
    variants = args.variant or list(DEFAULT)
    if "forward_backward" not in variants:
        variants = ["forward_backward", *variants]
    head, found = machine.describe(), {}
    for name in args.case or ["decoder-704"]:
        found[name] = measure(name, variants, args.rounds, args.device)
        print(table(name, found[name]), flush=True)
        if args.out:
            results.write_results(args.out, head, found)
    return 0
