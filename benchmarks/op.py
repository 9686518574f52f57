"""An operator against its dense twin and against this machine's own fp32 matrix-product rate.

Time: ours, the twin and a large torch.mm take turns in one process, and relevancy_product where another operator is
measured; ratios are taken within a round, medians over the rounds. Operations are counted as the mask needs them: 2·d
for the score and 2·d for the gradient of each visible entry, 4·S²·d·H/2 for a causal square; glimpse_statistics takes
the gradient of every entry, 6·S²·d·H/2. Memory: each in a process of its own, peak resident memory above what the
inputs take.

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import machine

MATRIX = 3072  # side of the square product that stands for the machine's rate
COPY_BYTES = 256 * 2**20  # least that a copy moves: more than a cache holds
REPEATED_BYTES = 64 * 2**20  # states that a round of short calls reads, times their targets
ROW_BLOCK = 4096  # rows whose scores the set-up holds at once


@dataclass(frozen=True)
class Case:
    """Shape of one call; the rows are spread evenly over the keys when there are fewer of them."""

    heads: int
    key_heads: int
    keys: int
    width: int
    dtype: str = "float32"
    targets: int = 1
    rows: int | None = None
    causal: bool = True
    twin: bool = True


CASES = {
    # Decoders' attention: LLaVA-1.5-7B (also at its 576 image tokens + 128 of text), Qwen2.5-VL-7B, SmolLM2-135M,
    # PaliGemma's bidirectional prefix.
    "llava-1.5-7b-1536": Case(32, 32, 1536, 128),
    "llava-1.5-7b-1536-bf16": Case(32, 32, 1536, 128, dtype="bfloat16"),
    "llava-1.5-7b-704": Case(32, 32, 704, 128),
    "qwen2.5-vl-7b-1536": Case(28, 4, 1536, 128),
    "smollm2-135m-1024": Case(9, 3, 1024, 64),
    "smollm2-135m-1024-8-targets": Case(9, 3, 1024, 64, targets=8),
    "paligemma-3b-512": Case(8, 1, 512, 256, causal=False),
    # What a pruned sweep asks for: few rows against all keys.
    "llava-1.5-7b-2048-100-rows": Case(32, 32, 2048, 128, rows=100),
    # Layers of the decoders that the end-to-end suites explain.
    "decoder-704": Case(16, 16, 704, 64),
    "decoder-2048": Case(16, 16, 2048, 64),
    "decoder-2048-4-key-heads": Case(16, 4, 2048, 64),
}
OPERATORS = ("relevancy_product", "glimpse_statistics", "proxy_relevancy")


@dataclass(frozen=True)
class Columns:
    """Shape of one call of proxy_relevancy."""

    batch: int
    columns: int
    width: int
    targets: int = 1
    dtype: str = "bfloat16"
    norm: str = "rms"


# LLaVA-1.5-7B's 576 image tokens: a batch while it decodes, one sample, and an answer of 64 tokens at once.
COLUMNS = {
    "llava-1.5-7b-64-samples": Columns(64, 576, 4096),
    "llava-1.5-7b-64-samples-layer-norm": Columns(64, 576, 4096, norm="layer"),
    "llava-1.5-7b-64-samples-fp32": Columns(64, 576, 4096, dtype="float32"),
    "llava-1.5-7b": Columns(1, 576, 4096),
    "llava-1.5-7b-64-targets": Columns(1, 576, 4096, targets=64),
    "llava-1.5-7b-64-targets-fp32": Columns(1, 576, 4096, targets=64, dtype="float32"),
}
DEFAULT = ("llava-1.5-7b-1536", "llava-1.5-7b-1536-bf16", "llava-1.5-7b-704")


def build(case: Case, device: str = "cpu") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the call; views of (B, S, H, d) tensors, as transformers passes them."""
    import torch

    from lvlm_fastxai import ops

    generator = torch.Generator(device).manual_seed(0)
    rows = case.keys if case.rows is None else case.rows

    def normal(*shape: int) -> torch.Tensor:
        drawn = torch.randn(*shape, generator=generator, device=device)
        return drawn.to(getattr(torch, case.dtype)).transpose(-3, -2)

    query = normal(1, rows, case.heads, case.width)
    key = normal(1, case.keys, case.key_heads, case.width)
    value = normal(1, case.keys, case.key_heads, case.width)
    grad_output = normal(1, case.targets, rows, case.heads, case.width)
    weight = torch.rand(1, case.targets, rows, generator=generator, device=device)
    positions = torch.linspace(0, case.keys - 1, rows, device=device).round().int()[None]
    ranges = ops.key_ranges(1, rows, case.keys, causal=case.causal, query_positions=positions)
    logsumexp = torch.empty(1, case.heads, rows, device=device)
    columns = torch.arange(case.keys, device=device)
    for head in range(case.heads):
        group = head // (case.heads // case.key_heads)
        for top in range(0, rows, ROW_BLOCK):
            part = slice(top, top + ROW_BLOCK)
            scores = query[0, head, part].float() @ key[0, group].float().T * case.width**-0.5
            hidden = columns >= ranges[0, part, 1:]
            logsumexp[0, head, part] = scores.masked_fill_(hidden, -torch.inf).logsumexp(-1)
    return (query, key, value, grad_output, logsumexp, weight), {"key_ranges": ranges}


def operations(case: Case, ranges: Any, operator: str = "relevancy_product") -> float:
    """Floating-point operations of the two products: on the visible entries, or the gradient's on every one."""
    start, end = ranges.unbind(-1)
    visible = gradients = (end - start).clamp(min=0).sum().item()
    if operator == "glimpse_statistics":
        gradients = (start < end).sum().item() * case.keys
    return 2.0 * case.width * case.heads * (visible + gradients * case.targets)


def call(operator: str, arguments: tuple[Any, ...], **options: Any) -> object:
    """The operator on what `build` gives; glimpse_statistics weights no rows."""
    from lvlm_fastxai import ops

    return getattr(ops, operator)(*arguments[: 5 if operator == "glimpse_statistics" else 6], **options)


def measure_time(operator: str, name: str, rounds: int, backend: str | None) -> dict[str, float]:
    """Medians over the rounds of one case."""
    import torch

    case = CASES[name]
    arguments, options = build(case)
    square = torch.randn(MATRIX, MATRIX)
    calls: dict[str, Callable[[], object]] = {
        "matrix_product": lambda: square @ square,
        "ours": lambda: call(operator, arguments, **options, backend=backend),
    }
    if operator != "relevancy_product":
        calls["relevancy_product"] = lambda: call("relevancy_product", arguments, **options, backend=backend)
    if case.twin:
        calls["twin"] = lambda: call(operator, arguments, **options, backend="reference")
    if case.dtype != "float32":
        wide = tuple(tensor.float() for tensor in arguments)
        calls["float32"] = lambda: call(operator, wide, **options, backend=backend)
    seconds: dict[str, list[float]] = {variant: [] for variant in calls}
    for index in range(rounds + 1):
        for variant, run_variant in calls.items():
            elapsed = machine.seconds(run_variant, "cpu")
            if index > 0:  # the first round fills caches and thread pools
                seconds[variant].append(elapsed)

    def ratio(numerator: str, denominator: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[numerator], seconds[denominator], strict=True))

    work = operations(case, options["key_ranges"], operator)
    figures = {f"{variant}_seconds": statistics.median(values) for variant, values in seconds.items()}
    figures["gflops"] = work / figures["ours_seconds"] / 1e9
    figures["matrix_product_gflops"] = 2 * MATRIX**3 / figures["matrix_product_seconds"] / 1e9
    figures["share_of_matrix_product_rate"] = ratio("matrix_product", "ours") * work / (2 * MATRIX**3)
    if "twin" in calls:
        figures["speedup_over_twin"] = ratio("twin", "ours")
    if "relevancy_product" in calls:
        figures["time_over_relevancy_product"] = ratio("ours", "relevancy_product")
    if "float32" in calls:
        figures["time_over_float32"] = ratio("ours", "float32")
    return figures


def build_columns(case: Columns) -> tuple[Any, ...]:
    """States, queries and offsets of one call of proxy_relevancy."""
    import torch

    generator = torch.Generator().manual_seed(0)
    hidden = torch.empty(case.batch, case.columns, case.width, dtype=getattr(torch, case.dtype))
    for sample in hidden:  # float32 states of a whole batch would be most of this machine's memory
        sample.copy_(torch.randn(case.columns, case.width, generator=generator))
    query = torch.randn(case.batch, case.targets, case.width, generator=generator) * case.width**-0.5
    return hidden, query, torch.zeros(case.batch, case.targets)


def measure_bandwidth(name: str, rounds: int, backend: str | None) -> dict[str, float]:
    """Medians over the rounds of one case of proxy_relevancy; short calls are repeated within a round."""
    import torch

    from lvlm_fastxai import ops

    case = COLUMNS[name]
    hidden, query, offset = build_columns(case)
    # The copy is of a whole batch's states, which no cache holds.
    source = hidden if hidden.nbytes > COPY_BYTES else torch.ones(COPY_BYTES, dtype=torch.uint8)
    target, square = torch.empty_like(source), torch.randn(MATRIX, MATRIX)
    repeats = max(1, REPEATED_BYTES // (hidden.nbytes * case.targets))

    def repeat() -> None:
        for _ in range(repeats):
            ops.proxy_relevancy(hidden, query, offset, norm=case.norm, backend=backend)

    calls: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source), "ours": repeat}
    if case.targets > 1:
        calls["matrix_product"] = lambda: square @ square
    seconds: dict[str, list[float]] = {variant: [] for variant in calls}
    for index in range(rounds + 1):
        for variant, run_variant in calls.items():
            elapsed = machine.seconds(run_variant, "cpu")
            if index > 0:
                seconds[variant].append(elapsed)
    seconds["ours"] = [elapsed / repeats for elapsed in seconds["ours"]]

    def ratio(numerator: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[numerator], seconds["ours"], strict=True))

    figures = {f"{variant}_seconds": statistics.median(values) for variant, values in seconds.items()}
    figures["gigabytes_per_second"] = hidden.nbytes / figures["ours_seconds"] / 1e9
    figures["copy_gigabytes_per_second"] = 2 * source.nbytes / figures["copy_seconds"] / 1e9
    figures["share_of_copy_bandwidth"] = ratio("copy") * hidden.nbytes / (2 * source.nbytes)
    if case.targets > 1:
        work = 2.0 * hidden.numel() * case.targets
        figures["gflops"] = work / figures["ours_seconds"] / 1e9
        figures["share_of_matrix_product_rate"] = ratio("matrix_product") * work / (2 * MATRIX**3)
    return figures


def measure_memory(operator: str, name: str, variant: str, threads: int) -> int | str:
    """Peak bytes that one call adds, in a fresh process."""
    return machine.in_fresh_process("benchmarks.op", operator, name, variant, str(threads))


def _memory_worker(operator: str, name: str, variant: str, threads: int) -> int:
    import torch

    torch.set_num_threads(threads)
    arguments, options = build(CASES[name])
    options["backend"] = "reference" if variant == "twin" else None
    call(operator, arguments, **options)  # what libraries and thread pools keep for good is not part of a call
    return machine.peak_extra_bytes(lambda: call(operator, arguments, **options), "cpu")


def run(operator: str, names: list[str], rounds: int, threads: int, backend: str | None) -> dict[str, Any]:
    """All figures of the named cases."""
    results: dict[str, Any] = {}
    for name in names:
        if operator == "proxy_relevancy":
            results[name] = {"case": asdict(COLUMNS[name]), **measure_bandwidth(name, rounds, backend)}
            show(name, results[name])
            continue
        figures: dict[str, Any] = measure_time(operator, name, rounds, backend)
        figures["extra_bytes"] = measure_memory(operator, name, "ours", threads)
        if CASES[name].twin:
            figures["twin_extra_bytes"] = measure_memory(operator, name, "twin", threads)
            figures["memory_over_twin"] = figures["extra_bytes"] / figures["twin_extra_bytes"]
        results[name] = {"case": asdict(CASES[name]), **figures}
        show(name, figures)
    return results


def show(name: str, figures: dict[str, Any]) -> None:
    lines = [f"  {key:30}{value:14.4g}" for key, value in figures.items() if key != "case"]
    print("\n".join([name, *lines]), flush=True)


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
    names = args.case or list(COLUMNS if args.operator == "proxy_relevancy" else DEFAULT)
    names = list(known) if "all" in names else names
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"{args.operator} has no case {', '.join(unknown)}; it has {', '.join(known)}")
    head = machine.describe()
    results = run(args.operator, names, args.rounds, args.threads, args.backend)
    if args.out:
        machine.write_results(args.out, head, results)
    return 0


if __name__ == "__main__":
    worker = argparse.ArgumentParser()
    worker.add_argument("--worker", nargs=4, required=True)
    operator_name, case_name, kind, thread_count = worker.parse_args().worker
    print(_memory_worker(operator_name, case_name, kind, int(thread_count)))
