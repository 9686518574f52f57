"""The fused backward against torch's flash backward followed by relevancy_product: which of them a sweep should take.

The three take turns in one process; ratios are taken within a round, medians over the rounds. Shapes are those of
decoders, whole and with the rows that a pruned sweep keeps. The largest ratio of this machine's backend is its entry in
`lvlm_fastxai.sweep.attention.FUSED_RATIO`; a GPU's is measured by `python -m benchmarks gpu`.

Prediction, written before the first run: five matrix products in the place of seven, and the exponentials once, so 0.7
where torch's backward is as fast as its own matrix products, and less for rows in an irregular order, for which it is
called in blocks with a mask.

Measured (results/backward.json): 0.27 to 0.48. The prediction took torch's backward for as fast as its matrix
products; the fused one alone takes about half as long as it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import machine, op
from .gpu_op import flash_backward

CASES = {
    "llava-1.5-7b-704": op.Case(32, 32, 704, 128),
    "qwen2.5-vl-7b-704": op.Case(28, 4, 704, 128),
    "paligemma-3b-512": op.Case(8, 1, 512, 256, causal=False),
    "smollm2-135m-128": op.Case(9, 3, 128, 64),
    "smollm2-135m-512": op.Case(9, 3, 512, 64),
    "smollm2-135m-2048": op.Case(9, 3, 2048, 64),
    "smollm2-135m-1024-bf16": op.Case(9, 3, 1024, 64, dtype="bfloat16"),
    "smollm2-135m-512-30-rows": op.Case(9, 3, 512, 64, rows=30),
    "smollm2-135m-2048-80-rows": op.Case(9, 3, 2048, 64, rows=80),
    "smollm2-135m-2048-600-rows": op.Case(9, 3, 2048, 64, rows=600),
    "shipped-196": op.Case(6, 2, 196, 32),
}


def measure(case: op.Case, rounds: int) -> dict[str, Any]:
    """Median seconds of each, and the median ratio."""
    from lvlm_fastxai import ops

    arguments, options = op.build(case)
    query, key, value, grad_output, logsumexp, row = arguments
    output, library = flash_backward(query, key, value, grad_output, options["key_ranges"])
    calls = {
        "library": library,
        "relevancy_product": lambda: ops.relevancy_product(*arguments, **options),
        "fused": lambda: ops.attention_backward_relevancy(
            query, key, value, output, grad_output, logsumexp, row, **options
        ),
    }
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    ratios = [fused / (library + product) for library, product, fused in zip(*seconds.values(), strict=True)]
    return {name: statistics.median(each) for name, each in seconds.items()} | {"ratio": statistics.median(ratios)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=None, help="default: torch's own choice")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "backward.json")


def main(args: argparse.Namespace) -> int:
    import torch

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    head, results = machine.describe() | {"rounds": args.rounds}, {}
    for name in args.cases:
        results[name] = {"case": asdict(CASES[name]), **measure(CASES[name], args.rounds)}
        figures = ", ".join(f"{part} {results[name][part] * 1e3:.2f} ms" for part in ("library", "relevancy_product"))
        print(f"{name}: {figures}, fused {results[name]['fused'] * 1e3:.2f} ms, ratio {results[name]['ratio']:.2f}")
    largest = max(result["ratio"] for result in results.values())
    print(f"largest ratio: {largest:.2f}")
    machine.write_results(args.out, head | {"largest_ratio": largest}, results)
    return 0
