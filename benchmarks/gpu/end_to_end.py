"""Whole explanations on a GPU, at the real sizes of 7B models, with random bf16 weights made on the device.

The variants are those of `benchmarks.sweeps.variants`. The allocator counts a GPU's memory exactly, so one process
measures both memory and time: one variant after the other, since the eager ones fill the device, and forward + backward
once more at the end, for the drift. Memory is the peak above the weights and the input embeddings. A variant that does
not fit is recorded as such. Before each variant the allocator gives back what it holds.

``difference`` of a variant's rows from `fast`'s (`glimpse…`: from `glimpse`'s), without the self entries, relative L1:
rounding, apart from the pruned ones. A bf16 model's own rounding is of the order of 1e-2 (docs/pruned-sweep.md).

The image's tokens are given as embeddings, as a vision tower's output would be; the tower is not run.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from functools import partial
from typing import Any

from ..common import memory, timing
from ..models.decoders import Case, build_inputs, build_model
from ..sweeps.end_to_end import add_memory_ratios, table
from ..sweeps.variants import CHEFER, FUSED, GLIMPSE, VARIANTS, Problem, work
from . import suite
from .suite import Suite

# Timed rounds of one variant take about this long; at least one is taken.
SECONDS_OF_ONE = 2.5

FURTHER = ("forward_backward", "fast", "lean", "pruned_5_percent", *FUSED)
WITHOUT_EAGER = tuple(variant for variant in CHEFER if not variant.startswith("eager"))
OF_GLIMPSE = ("forward_backward", "fast", "lean", "pruned_5_percent", *GLIMPSE)
# Backward of all 32768 columns keeps every layer's activations, which is more than any GPU has.
LONGEST = ("forward_backward", "forward", "lean")


def llava_7b(columns: int, targets: int = 1) -> Case:
    """Describe LLaVA-1.5-7B's language model; 576 image tokens and a question are 620 columns."""
    return Case(32, 4096, 32, 32, 11008, columns, targets, "bfloat16", "Llama", 32064)


def qwen_7b(columns: int, targets: int = 1) -> Case:
    """Describe Qwen2.5-VL-7B's language model, with rotary embeddings of one axis for three, which cost the same."""
    return Case(28, 3584, 28, 4, 18944, columns, targets, "bfloat16", "Qwen2", 152064)


def qwen3_8b(columns: int, targets: int = 1) -> Case:
    """Describe Qwen3-VL-8B's language model: 36 layers, 32 query and 8 key heads of 128.

    A published exact implementation of GLIMPSE reports its times and memory for these sizes.
    """
    return Case(36, 4096, 32, 8, 12288, columns, targets, "bfloat16", "Qwen3", 151936)


# The most wanted first, those of one decoder in a row: they share a model.
CASES = {
    "llava-1.5-7b-2400": (llava_7b(2400), CHEFER),
    "llava-1.5-7b-2400-5-targets": (llava_7b(2400, targets=5), FURTHER),
    "llava-1.5-7b-8192": (llava_7b(8192), CHEFER),
    "llava-1.5-7b-32768": (llava_7b(32768), LONGEST),
    "llava-1.5-7b-8192-5-targets": (llava_7b(8192, targets=5), FURTHER),
    "llava-1.5-7b-620": (llava_7b(620), CHEFER),
    "qwen2.5-vl-7b-2400": (qwen_7b(2400), CHEFER),
    "qwen2.5-vl-7b-2400-5-targets": (qwen_7b(2400, targets=5), FURTHER),
    "qwen2.5-vl-7b-8192": (qwen_7b(8192), WITHOUT_EAGER),
    "qwen2.5-vl-7b-32768": (qwen_7b(32768), LONGEST),
    "qwen3-vl-8b-2400": (qwen3_8b(2400), OF_GLIMPSE),
    "qwen3-vl-8b-2400-8-targets": (qwen3_8b(2400, targets=8), OF_GLIMPSE),
    "qwen3-vl-8b-1200": (qwen3_8b(1200), OF_GLIMPSE),
    "qwen3-vl-8b-1200-8-targets": (qwen3_8b(1200, targets=8), OF_GLIMPSE),
    "qwen3-vl-8b-450": (qwen3_8b(450), OF_GLIMPSE),
    "qwen3-vl-8b-450-8-targets": (qwen3_8b(450, targets=8), OF_GLIMPSE),
}
# The same code on any machine, in seconds.
REHEARSED_CASES = {
    "llava-1.5-7b-2400": (Case(2, 32, 2, 2, 48, 40, 1, "bfloat16", "Llama", 64), CHEFER),
    "llava-1.5-7b-2400-5-targets": (Case(2, 32, 2, 2, 48, 40, 5, "bfloat16", "Llama", 64), FURTHER),
    "qwen2.5-vl-7b-2400": (Case(2, 32, 4, 2, 48, 40, 1, "bfloat16", "Qwen2", 64), WITHOUT_EAGER),
    "qwen3-vl-8b-2400-8-targets": (Case(2, 32, 4, 2, 48, 40, 8, "bfloat16", "Qwen3", 64), OF_GLIMPSE),
}


def decoder(case: Case) -> tuple[Any, ...]:
    """Return what two cases must have in common to share a model."""
    sizes = case.layers, case.width, case.heads, case.key_heads, case.intermediate
    return (*sizes, case.dtype, case.architecture, case.vocabulary)


def measure(
    model: Any, case: Case, variants: tuple[str, ...], rounds: int, device: str, until: float = math.inf
) -> dict[str, dict[str, Any]]:
    """Measure every variant; from the (monotonic) moment ``until`` on, no other is begun."""
    problem = Problem(model, *build_inputs(case, device))
    rows: dict[str, Any] = {}
    figures: dict[str, dict[str, Any]] = {}
    # What all the others are measured by comes first, in case that time runs out.
    for variant in ("forward_backward", *(variant for variant in variants if variant != "forward_backward")):
        if time.monotonic() > until:
            break
        memory.free(device)
        found = memory.attempt(partial(measure_variant, variant, problem, rounds, device, rows), device)
        figures[variant] = {"seconds": found, "extra_bytes": found} if isinstance(found, str) else found
    if figures and not isinstance(figures["forward_backward"]["seconds"], str):
        memory.free(device)
        add_time_ratios(figures, problem, rounds, device)
    for variant, found in figures.items():
        of = "glimpse" if variant.startswith("glimpse") else "fast"
        if variant in rows and of in rows:
            found["difference"] = ((rows[variant] - rows[of]).abs().sum() / rows[of].abs().sum()).item()
    if figures:
        add_memory_ratios(figures)
    return figures


def measure_variant(variant: str, problem: Problem, rounds: int, device: str, rows: dict[str, Any]) -> dict[str, Any]:
    """Measure memory and time of one variant; keeps what it explains in ``rows``."""
    call = work(variant, problem)
    result = call()  # compiles, and plans
    if variant not in ("forward", "forward_backward"):
        rows[variant] = without_self(result, problem)
    del result
    extra = memory.peak_extra_bytes(call, device)
    times = [timing.seconds(call, device)]
    affordable = min(rounds, int(SECONDS_OF_ONE / max(times[0], 1e-9)))
    times += [timing.seconds(call, device) for _ in range(affordable - 1)]
    spread = {"seconds_min": min(times), "seconds_max": max(times), "rounds": len(times)}
    return {"seconds": statistics.median(times), **spread, "extra_bytes": extra}


def add_time_ratios(figures: dict[str, dict[str, Any]], problem: Problem, rounds: int, device: str) -> None:
    """Add each variant's time over that of forward + backward, which is timed once more, for the drift."""
    base = figures["forward_backward"]
    again = work("forward_backward", problem)
    base["seconds_at_the_end"] = statistics.median(timing.seconds(again, device) for _ in range(rounds))
    for found in figures.values():
        if not isinstance(found["seconds"], str):
            found["time_ratio"] = found["seconds"] / base["seconds"]


def without_self(rows: Any, problem: Problem) -> Any:
    """Stack (N, S) rows in fp64 on the CPU, zero where a target looks at itself."""
    import torch

    stacked = torch.stack([row.double().cpu() for row in rows])
    stacked[torch.arange(len(stacked)), problem.rows.cpu()] = 0
    return stacked


def further_targets(cases: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Divide, for each case and variant, the seconds of one more target by forward + backward for one target."""
    found: dict[str, dict[str, float]] = {}
    for name, one in cases.items():
        several = next((cases[other] for other in cases if other.startswith(f"{name}-")), None)
        base = one["variants"].get("forward_backward", {}).get("seconds")
        if several is None or not isinstance(base, float):
            continue
        more = several["case"]["targets"] - one["case"]["targets"]
        found[name] = {
            variant: (figures["seconds"] - one["variants"][variant]["seconds"]) / more / base
            for variant, figures in several["variants"].items()
            if isinstance(figures["seconds"], float)
            and isinstance(one["variants"].get(variant, {}).get("seconds"), float)
        }
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    suite.add_arguments(parser, CASES)
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="repeatable; default the case's")
    parser.add_argument("--rounds", type=int, default=5)


def main(args: argparse.Namespace) -> int:
    import torch

    every = REHEARSED_CASES if args.rehearse else CASES
    names = args.case or list(every)
    run = Suite(args, names)
    run.results["further_targets"] = {}
    for _, group in itertools.groupby(names, key=lambda name: decoder(every[name][0])):
        model = None
        for name in group:
            case, variants = every[name]
            if not run.has_time():
                break
            if model is None:
                torch.manual_seed(0)
                model = build_model(case, args.device)
            variants = tuple(variant for variant in variants if variant in (args.variant or variants))
            figures = measure(model, case, variants, args.rounds, args.device, run.until)
            if not figures:
                break
            run.left_out += [f"{name} {variant}" for variant in variants if variant not in figures]
            run.add(name, case, {"variants": figures})
            run.results["further_targets"] = further_targets(run.results["cases"])
            run.write()
            print(table(name, run.results["cases"][name]), flush=True)
        del model
        memory.free(args.device)
    for name, shares in run.results["further_targets"].items():
        text = ", ".join(f"{variant} {share:.3f}" for variant, share in shares.items())
        print(f"{name}: a further target, of one forward + backward: {text}")
    return run.finish()
