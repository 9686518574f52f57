"""An operator against its dense twin and against this machine's own fp32 matrix-product rate.

Time: ours, the twin and a large torch.mm take turns in one process, and relevancy_product where another operator is
measured; ratios are taken within a round, medians over the rounds. Operations are counted as the mask needs them: 2·d
for the score and 2·d for the gradient of each visible entry, 4·S²·d·H/2 for a causal square; glimpse_statistics takes
the gradient of every entry, 6·S²·d·H/2. Memory: each in a process of its own, peak resident memory above what the
inputs take. The shapes are `CASES` and `COLUMNS` in `benchmarks/ops/cases.py`.

Predictions for relevancy_product's AVX-512 kernel at d = 128, from its instruction counts, before it was first run: a
tile of 8 rows by 48 keys does 24 multiply-adds for 11 loads, so the multiply-adds bound it; exponential, rectification
and column sums add about 5 % of that and packing keys and values 2 to 4 %, so nine tenths of the multiply-add bound,
above 75 % of torch.mm. bf16 is widened while packing, so it should cost what fp32 costs. Extra memory: H·Sk floats of
partial sums and a quarter of a megabyte a thread. Those for glimpse_statistics stand in its own benchmark.

proxy_relevancy reads its states once and does little else, so its measure is the bytes of states a second over the
bytes a second, read and written, of Tensor.copy_; with many targets its products are measured like the others'.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ..common import machine, memory, results, timing
from . import cases
from .cases import CASES, COLUMNS

MATRIX = 3072  # side of the square product that stands for the machine's rate
COPY_BYTES = 256 * 2**20  # least that a copy moves: more than a cache holds
REPEATED_BYTES = 64 * 2**20  # states that a round of short calls reads, times their targets
OPERATORS = ("relevancy_product", "glimpse_statistics", "proxy_relevancy")


def call_of(operator: str, tensors: dict[str, Any], **options: Any) -> Callable[[], object]:
    """Prepare a call of the operator on what `cases.build` makes."""
    from lvlm_fastxai import ops

    return partial(getattr(ops, operator), *cases.arguments_of(operator, tensors), **options)


def matrix_product() -> Callable[[], object]:
    """Prepare the product that stands for this machine's rate."""
    import torch

    square = torch.randn(MATRIX, MATRIX)
    return lambda: square @ square


def measure_time(operator: str, name: str, rounds: int, backend: str | None) -> dict[str, float]:
    """Measure one case; medians over the rounds."""
    case = CASES[name]
    tensors, options = cases.build(case)
    ours = {**options, "backend": backend}
    calls = {"matrix_product": matrix_product(), "ours": call_of(operator, tensors, **ours)}
    if operator != "relevancy_product":
        calls["relevancy_product"] = call_of("relevancy_product", tensors, **ours)
    if case.twin:
        calls["twin"] = call_of(operator, tensors, **options, backend="reference")
    if case.dtype != "float32":
        calls["float32"] = call_of(operator, {name: tensor.float() for name, tensor in tensors.items()}, **ours)
    seconds = timing.in_turns(calls, rounds)
    work = cases.operations(case, options["key_ranges"], operator)
    figures = {f"{variant}_seconds": statistics.median(values) for variant, values in seconds.items()}
    figures["gflops"] = work / figures["ours_seconds"] / 1e9
    figures["matrix_product_gflops"] = 2 * MATRIX**3 / figures["matrix_product_seconds"] / 1e9
    share = timing.median_ratio(seconds["matrix_product"], seconds["ours"])
    figures["share_of_matrix_product_rate"] = share * work / (2 * MATRIX**3)
    if "twin" in calls:
        figures["speedup_over_twin"] = timing.median_ratio(seconds["twin"], seconds["ours"])
    for base in ("relevancy_product", "float32"):
        if base in calls:
            figures[f"time_over_{base}"] = timing.median_ratio(seconds["ours"], seconds[base])
    return figures


def measure_bandwidth(name: str, rounds: int, backend: str | None) -> dict[str, float]:
    """Measure one case of proxy_relevancy; medians over the rounds. A round repeats short calls."""
    import torch

    from lvlm_fastxai import ops

    case = COLUMNS[name]
    hidden, query, offset = cases.build_columns(case)
    # The copy is of a whole batch's states, which no cache holds.
    source = hidden if hidden.nbytes > COPY_BYTES else torch.ones(COPY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    repeats = max(1, REPEATED_BYTES // (hidden.nbytes * case.targets))

    def repeat() -> None:
        for _ in range(repeats):
            ops.proxy_relevancy(hidden, query, offset, norm=case.norm, backend=backend)

    calls: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source), "ours": repeat}
    if case.targets > 1:
        calls["matrix_product"] = matrix_product()
    seconds = timing.in_turns(calls, rounds)
    seconds["ours"] = [elapsed / repeats for elapsed in seconds["ours"]]
    figures = {f"{variant}_seconds": statistics.median(values) for variant, values in seconds.items()}
    figures["gigabytes_per_second"] = hidden.nbytes / figures["ours_seconds"] / 1e9
    figures["copy_gigabytes_per_second"] = 2 * source.nbytes / figures["copy_seconds"] / 1e9
    share = timing.median_ratio(seconds["copy"], seconds["ours"])
    figures["share_of_copy_bandwidth"] = share * hidden.nbytes / (2 * source.nbytes)
    if case.targets > 1:
        work = 2.0 * hidden.numel() * case.targets
        figures["gflops"] = work / figures["ours_seconds"] / 1e9
        share = timing.median_ratio(seconds["matrix_product"], seconds["ours"])
        figures["share_of_matrix_product_rate"] = share * work / (2 * MATRIX**3)
    return figures


def extra_bytes(operator: str, name: str, backend: str | None, threads: int) -> int:
    """Measure the peak bytes that one call adds. Runs in a fresh process."""
    import torch

    torch.set_num_threads(threads)
    tensors, options = cases.build(CASES[name])
    return memory.second_call_bytes(call_of(operator, tensors, **options, backend=backend))


def measure(operator: str, name: str, rounds: int, threads: int, backend: str | None) -> dict[str, Any]:
    """Measure time and memory of one case."""
    if operator == "proxy_relevancy":
        return {"case": asdict(COLUMNS[name]), **measure_bandwidth(name, rounds, backend)}
    figures: dict[str, Any] = measure_time(operator, name, rounds, backend)
    figures["extra_bytes"] = memory.in_fresh_process(extra_bytes, operator, name, backend, threads)
    if CASES[name].twin:
        figures["twin_extra_bytes"] = memory.in_fresh_process(extra_bytes, operator, name, "reference", threads)
        figures["memory_over_twin"] = figures["extra_bytes"] / figures["twin_extra_bytes"]
    return {"case": asdict(CASES[name]), **figures}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--operator", choices=OPERATORS, default=OPERATORS[0])
    parser.add_argument(
        "--case", action="append", choices=[*CASES, *COLUMNS, "all"], help="repeatable; default LLaVA-1.5-7B's"
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backend", help="default: the first that serves the call")
    parser.add_argument("--out", type=Path, help="results file (JSON)")


def main(args: argparse.Namespace) -> int:
    import torch

    torch.set_num_threads(args.threads)
    known: dict[str, Any] = COLUMNS if args.operator == "proxy_relevancy" else CASES
    names = args.case or list(COLUMNS if args.operator == "proxy_relevancy" else cases.DEFAULT)
    names = list(known) if "all" in names else names
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"{args.operator} has no case {', '.join(unknown)}; it has {', '.join(known)}")
    head, found = machine.describe(), {}
    for name in names:
        found[name] = figures = measure(args.operator, name, args.rounds, args.threads, args.backend)
        lines = [f"  {key:30}{value:14.4g}" for key, value in figures.items() if key != "case"]
        print("\n".join([name, *lines]), flush=True)
        if args.out:
            results.write_results(args.out, head, found)
    return 0
