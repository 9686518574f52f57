"""Whole explanations on a GPU, at the real sizes of 7B models, with random bf16 weights made on the device.

The variants are those of `benchmarks.end_to_end`. The allocator counts a GPU's memory exactly, so one process measures
both memory and time: one variant after the other, since the eager ones fill the device, and forward + backward once
more at the end, for the drift. Memory is the peak above the weights and the input embeddings. A variant that does not
fit is recorded as such. Before each variant the allocator gives back what it holds.

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
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from . import end_to_end, machine
from .end_to_end import VARIANTS, Case

# Timed rounds of one variant take about this long; at least one is taken.
SECONDS_OF_ONE = 2.5

FURTHER = ("forward_backward", "fast", "lean", "pruned_5_percent", *end_to_end.FUSED)
WITHOUT_EAGER = tuple(variant for variant in VARIANTS if not variant.startswith("eager"))
OF_GLIMPSE = ("forward_backward", "fast", "lean", "pruned_5_percent", *end_to_end.GLIMPSE)
# Backward of all 32768 columns keeps every layer's activations, which is more than any GPU has.
LONGEST = ("forward_backward", "forward", "lean")


def llava_7b(columns: int, targets: int = 1) -> Case:
    """LLaVA-1.5-7B's language model; 576 image tokens and a question are 620 columns."""
    return Case(32, 4096, 32, 32, 11008, columns, targets, "bfloat16", "Llama", 32064)


def qwen_7b(columns: int, targets: int = 1) -> Case:
    """Qwen2.5-VL-7B's language model, with rotary embeddings of one axis for those of three, which cost the same."""
    return Case(28, 3584, 28, 4, 18944, columns, targets, "bfloat16", "Qwen2", 152064)


def qwen3_8b(columns: int, targets: int = 1) -> Case:
    """The sizes of Qwen3-VL-8B's language model (36 layers, 32 query and 8 key heads of 128): what a published exact
    implementation of GLIMPSE reports its times and memory for."""
    return Case(36, 4096, 32, 8, 12288, columns, targets, "bfloat16", "Qwen3", 151936)


# The most wanted first, those of one decoder in a row: they share a model.
CASES = {
    "llava-1.5-7b-2400": (llava_7b(2400), VARIANTS),
    "llava-1.5-7b-2400-5-targets": (llava_7b(2400, targets=5), FURTHER),
    "llava-1.5-7b-8192": (llava_7b(8192), VARIANTS),
    "llava-1.5-7b-32768": (llava_7b(32768), LONGEST),
    "llava-1.5-7b-8192-5-targets": (llava_7b(8192, targets=5), FURTHER),
    "llava-1.5-7b-620": (llava_7b(620), VARIANTS),
    "qwen2.5-vl-7b-2400": (qwen_7b(2400), VARIANTS),
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
    "llava-1.5-7b-2400": (Case(2, 32, 2, 2, 48, 40, 1, "bfloat16", "Llama", 64), VARIANTS),
    "llava-1.5-7b-2400-5-targets": (Case(2, 32, 2, 2, 48, 40, 5, "bfloat16", "Llama", 64), FURTHER),
    "qwen2.5-vl-7b-2400": (Case(2, 32, 4, 2, 48, 40, 1, "bfloat16", "Qwen2", 64), WITHOUT_EAGER),
    "qwen3-vl-8b-2400-8-targets": (Case(2, 32, 4, 2, 48, 40, 8, "bfloat16", "Qwen3", 64), OF_GLIMPSE),
}


def decoder(case: Case) -> tuple[Any, ...]:
    """What two cases have in common that can share a model."""
    sizes = case.layers, case.width, case.heads, case.key_heads, case.intermediate
    return (*sizes, case.dtype, case.architecture, case.vocabulary)


def measure(
    model: Any, case: Case, variants: tuple[str, ...], rounds: int, device: str, until: float = math.inf
) -> dict[str, dict[str, Any]]:
    """Figures of every variant; from the (monotonic) moment ``until`` on, no other is begun."""
    inputs, targets = end_to_end.build_inputs(case, device)
    rows: dict[str, Any] = {}

    def figures_of(variant: str) -> dict[str, Any]:
        call = end_to_end.work(variant, model, inputs, targets)
        result = call()  # compiles, and plans
        if variant not in ("forward", "forward_backward"):
            rows[variant] = without_self(result, targets)
        del result
        extra = machine.peak_extra_bytes(call, device)
        times = [machine.seconds(call, device)]
        affordable = min(rounds, int(SECONDS_OF_ONE / max(times[0], 1e-9)))
        times += [machine.seconds(call, device) for _ in range(affordable - 1)]
        spread = {"seconds_min": min(times), "seconds_max": max(times), "rounds": len(times)}
        return {"seconds": statistics.median(times), **spread, "extra_bytes": extra}

    figures: dict[str, dict[str, Any]] = {}
    # What all the others are measured by comes first, in case that time runs out.
    for variant in ("forward_backward", *(variant for variant in variants if variant != "forward_backward")):
        if time.monotonic() > until:
            break
        machine.free(device)
        found = machine.attempt(partial(figures_of, variant), device)
        figures[variant] = {"seconds": found, "extra_bytes": found} if isinstance(found, str) else found
    if not figures:
        return {}
    base = figures["forward_backward"]
    if not isinstance(base["seconds"], str):
        machine.free(device)
        again = end_to_end.work("forward_backward", model, inputs, targets)
        base["seconds_at_the_end"] = statistics.median(machine.seconds(again, device) for _ in range(rounds))
        for found in figures.values():
            if not isinstance(found["seconds"], str):
                found["time_ratio"] = found["seconds"] / base["seconds"]
    for variant, found in figures.items():
        of = "glimpse" if variant.startswith("glimpse") else "fast"
        if variant in rows and of in rows:
            found["difference"] = ((rows[variant] - rows[of]).abs().sum() / rows[of].abs().sum()).item()
    end_to_end.add_memory_ratios(figures)
    return figures


def without_self(rows: Any, targets: list[tuple[int, int, int]]) -> Any:
    """(N, S) rows in fp64 on the CPU, zero where a target looks at itself."""
    import torch

    stacked = torch.stack([row.double().cpu() for row in rows])
    stacked[torch.arange(len(targets)), torch.tensor([row for _, row, _ in targets])] = 0
    return stacked


def further_targets(cases: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Case → variant → seconds of one more target, over forward + backward for one target."""
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
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rehearse", action="store_true", help="tiny models")
    parser.add_argument("--case", action="append", choices=CASES, help="repeatable; default all")
    choices = (*VARIANTS, *end_to_end.GLIMPSE)
    parser.add_argument("--variant", action="append", choices=choices, help="repeatable; default the case's")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3600.0, help="nothing is begun after this time")
    parser.add_argument("--out", type=Path, help="results file (JSON), rewritten after every case")


def main(args: argparse.Namespace) -> int:
    import torch

    until = time.monotonic() + args.seconds
    suite = REHEARSED_CASES if args.rehearse else CASES
    names = args.case or list(suite)
    head, left_out = machine.describe(), list(names)
    results: dict[str, Any] = {"cases": {}, "further_targets": {}, "left_out": left_out}
    for _, group in itertools.groupby(names, key=lambda name: decoder(suite[name][0])):
        model = None
        for name in group:
            case, variants = suite[name]
            if time.monotonic() > until:
                break
            if model is None:
                torch.manual_seed(0)
                model = end_to_end.build_model(case, args.device)
            variants = tuple(variant for variant in variants if variant in (args.variant or variants))
            figures = measure(model, case, variants, args.rounds, args.device, until)
            if not figures:
                break
            left_out.remove(name)
            left_out += [f"{name} {variant}" for variant in variants if variant not in figures]
            results["cases"][name] = {"case": asdict(case), "variants": figures}
            results["further_targets"] = further_targets(results["cases"])
            print(end_to_end.table(name, results["cases"][name]), flush=True)
            if args.out:
                machine.write_results(args.out, head, results)
        del model
        machine.free(args.device)
    for name, shares in results["further_targets"].items():
        text = ", ".join(f"{variant} {share:.3f}" for variant, share in shares.items())
        print(f"{name}: a further target, of one forward + backward: {text}")
    print(f"left out for lack of time: {len(left_out)} {' '.join(left_out)}")
    return 0
