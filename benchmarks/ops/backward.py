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
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..common import machine, results, timing
from . import cases
from .cases import BACKWARD_CASES, Case
from .op import call_of


def flash_backward(
    query: Any, key: Any, value: Any, grad_output: Any, key_ranges: Any
) -> tuple[Any, Callable[[], None]]:
    """Prepare the library's backward as the sweep calls it.

    Args:
        grad_output: (1, targets, rows, H, d) seen as (1, targets, H, rows, d).

    Returns:
        The attention's output, and a call that runs the backward once for each target.
    """
    import torch

    from lvlm_fastxai.sweep.attention import FlashAttention, plan_attention

    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    plan = plan_attention(key_ranges, keep_biases=False)
    with torch.enable_grad():
        output = FlashAttention.apply(*leaves, plan, query.shape[-1] ** -0.5, None)

    def backward() -> None:
        for target in range(grad_output.shape[1]):
            torch.autograd.grad(output, leaves, grad_output[:, target], retain_graph=True)

    return output.detach(), backward


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Measure the median seconds of each, and the median ratio."""
    tensors, options = cases.build(case)
    taken_by_library = (tensors[name] for name in ("query", "key", "value", "grad_output"))
    tensors["output"], library = flash_backward(*taken_by_library, options["key_ranges"])
    calls: dict[str, Callable[[], object]] = {
        "library": library,
        "relevancy_product": call_of("relevancy_product", tensors, **options),
        "fused": call_of("attention_backward_relevancy", tensors, **options),
    }
    seconds = timing.in_turns(calls, rounds)
    both = [sum(pair) for pair in zip(seconds["library"], seconds["relevancy_product"], strict=True)]
    figures = {name: statistics.median(each) for name, each in seconds.items()}
    return figures | {"ratio": timing.median_ratio(seconds["fused"], both)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", nargs="+", choices=BACKWARD_CASES, default=list(BACKWARD_CASES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=None, help="default: torch's own choice")
    parser.add_argument("--out", type=Path, default=machine.RESULTS / "backward.json")


def main(args: argparse.Namespace) -> int:
    import torch

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    head, found = machine.describe() | {"rounds": args.rounds}, {}
    for name in args.cases:
        case = BACKWARD_CASES[name]
        found[name] = {"case": asdict(case), **measure(case, args.rounds)}
        times = [f"{part} {found[name][part] * 1e3:.2f} ms" for part in ("library", "relevancy_product", "fused")]
        print(f"{name}: {', '.join(times)}, ratio {found[name]['ratio']:.2f}", flush=True)
    largest = max(each["ratio"] for each in found.values())
    print(f"largest ratio: {largest:.2f}")
    results.write_results(args.out, head | {"largest_ratio": largest}, found)
    return 0
