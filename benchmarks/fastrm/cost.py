"""What one map costs: of eager attention, of our exact sweeps, and of a head."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch

from ..common import memory, timing
from ..models.decoders import CASES, build
from ..sweeps.variants import Problem, work
from .models import CASE, IMAGE, new_head

EXACT = ("eager", "eager_as_published", "fast", "lean")
HEADS = ("head_after_forward", "head")


def call_of(variant: str) -> tuple[Callable[[], object], int]:
    """Prepare the call of one variant; returns it with the bytes of the model's weights."""
    problem = Problem(*build(CASES[CASE], "cpu"))
    weights = sum(parameter.numel() * parameter.element_size() for parameter in problem.model.parameters())
    if variant not in HEADS:
        return work(variant, problem), weights
    return call_of_head(problem, forward_first=variant == "head_after_forward"), weights


def call_of_head(problem: Problem, *, forward_first: bool) -> Callable[[], object]:
    """Prepare a head's prediction from what it sees of a forward; the forward is part of the call where it is asked."""
    model = problem.model
    head = new_head(model)
    kept: dict[str, Any] = {}

    def keep(module: Any, arguments: tuple, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        kept["hidden"], kept["state"] = states[:, 8 : 8 + IMAGE], states[:, -1:]

    model.model.layers[head.config.layer].register_forward_hook(keep)

    def forward() -> None:
        model.set_attn_implementation("sdpa")
        with torch.no_grad():
            model(**problem.inputs, use_cache=False, logits_to_keep=1)

    def predict() -> Any:
        return head.predict(kept["hidden"], kept["state"])

    def both() -> Any:
        forward()
        return predict()

    forward()
    return both if forward_first else predict


def extra_bytes(variant: str) -> int:
    """Measure the peak memory of one variant. Runs in a fresh process."""
    memory.limit_memory()
    return memory.second_call_bytes(call_of(variant)[0])


def cost(args: argparse.Namespace) -> dict[str, Any]:
    """Measure seconds and peak bytes of one map, and what a head saves against each exact way."""
    variants = (*EXACT, *HEADS)
    extra = {variant: memory.in_fresh_process(extra_bytes, variant) for variant in variants}
    calls = {}
    weights = 0
    for variant in variants:
        calls[variant], weights = call_of(variant)
    taken = timing.in_turns(calls, args.rounds)
    figures: dict[str, Any] = {}
    for variant in variants:
        figures[variant] = {"seconds": statistics.median(taken[variant]), "extra_bytes": extra[variant], "saved": {}}
        for base in EXACT if variant in HEADS else ():
            ratio = timing.median_ratio(taken[variant], taken[base])
            own, theirs = extra[variant], extra[base]
            assert isinstance(own, int) and isinstance(theirs, int)
            figures[variant]["saved"][base] = {
                "time": 1 - ratio,
                "times_faster": 1 / ratio,
                "extra_memory": 1 - own / theirs,
                "memory_with_weights": 1 - (own + weights) / (theirs + weights),
            }
    show(figures, weights)
    return {"case": CASE, "weights_bytes": weights, "variants": figures}


def show(figures: dict[str, Any], weights: int) -> None:
    """Print every variant."""
    print(f"one map, {CASE}, weights {weights / 2**20:.0f} MiB")
    for variant, found in figures.items():
        print(f"  {variant:20}{found['seconds']:10.4f} s{found['extra_bytes'] / 2**20:10.1f} MiB")
        for base, saved in found["saved"].items():
            print(
                f"    against {base:20}{saved['time']:8.2%} less time ({saved['times_faster']:.4g}x), "
                f"{saved['extra_memory']:.1%} less memory ({saved['memory_with_weights']:.1%} with the weights)"
            )
