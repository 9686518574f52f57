"""The operators on a GPU, against their dense twins, torch's own flash backward, and two limits measured beside them.

A case is a shape of a real model. Everything in it runs in one process, one after the other: a large 16-bit matrix
product (the limit of arithmetic, taken anew for each case, since a GPU's clock moves), every usable backend of
`relevancy_product`, the dense twin, the same of `glimpse_statistics` in the full domain, torch's flash backward as the
sweep calls it, once per target, and every usable backend of `attention_backward_relevancy`. Times are medians on the
device, with a cold L2 (`timing.median_seconds`). The limit of memory, a copy on the device, is taken once.

Operations are counted as the mask needs them, for each visible entry of each head: relevancy_product 2·d for the score
and 2·d for each target's gradient, so 4·S²·d·H/2 for one target and a causal square; the fused backward 2·d for the
score and 8·d for each target's dP, dV, dQ and dK; glimpse_statistics what relevancy_product needs, with the gradient of
every entry, visible or not: 6·S²·d·H/2.

``ratio`` is fused backward / (library's backward + relevancy_product), each by its fastest backend; the largest of one
backend's ``ratios`` over the cases of one target, which is what a sweep calls, is its entry in
`lvlm_fastxai.sweep.attention.FUSED_RATIO`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from ..common import memory, timing
from ..ops import cases as ops_cases
from ..ops.backward import flash_backward
from ..ops.cases import Case
from . import suite
from .suite import Suite, figures_or_reason

MODELS = {
    # query heads, key heads, head width
    "llava-1.5-7b": (32, 32, 128),
    "qwen2.5-vl-7b": (28, 4, 128),
    "smollm2-135m": (9, 3, 64),
    "qwen3-vl-8b": (32, 8, 128),
}
# The shapes of the acceptance lines first: when time runs out, what is left out is at the end.
LENGTHS = (8192, 2400, 620, 32768)
TARGETS = (1, 4, 16)
# Of the rows, what a pruned sweep keeps of real weights (docs/pruned-sweep.md: 1 to 6 %).
KEPT = 0.05
MATRIX = 8192
COPIED_BYTES = 2**30

# The same for a rehearsal, on a machine without a GPU.
REHEARSED_MODELS = {"llava-1.5-7b": (2, 2, 16), "qwen2.5-vl-7b": (4, 2, 16), "smollm2-135m": (3, 1, 8)}
REHEARSED_LENGTHS = (48,)
REHEARSED_TARGETS = (1, 2)


def cases(rehearse: bool) -> dict[str, Case]:
    """Name all cases, the most wanted first."""
    models, lengths, counts = MODELS, LENGTHS, TARGETS
    if rehearse:
        models, lengths, counts = REHEARSED_MODELS, REHEARSED_LENGTHS, REHEARSED_TARGETS
    found = {}
    for targets in counts:
        for keys in lengths:
            for model, (heads, key_heads, width) in models.items():
                case = Case(heads, key_heads, keys, width, dtype="bfloat16", targets=targets)
                found[f"{model}-{keys}-{targets}"] = case
                if targets == 1:
                    found[f"{model}-{keys}-pruned"] = replace(case, rows=max(1, round(KEPT * keys)))
    return found


def measure(case: Case, device: str, side: int, copied: float) -> dict[str, Any]:
    """Measure a case: seconds and rates, ``memory.OUT_OF_MEMORY``, or the reason why there is none.

    Args:
        side: of the square matrix product.
        copied: bytes per second of a copy.
    """
    limits = matrix_product_rate(device, side), copied
    tensors, options = ops_cases.build(case, device)

    def of(operator: str) -> dict[str, Any]:
        arguments = ops_cases.arguments_of(operator, tensors)
        operations = ops_cases.operations(case, options["key_ranges"], operator)
        return timed(backends_of(operator, arguments, options), operations, limits, device)

    figures: dict[str, Any] = {
        "matrix_product_tflops": limits[0] / 1e12,
        "operations": ops_cases.operations(case, options["key_ranges"]),
        "relevancy_product": of("relevancy_product"),
        "glimpse_statistics": of("glimpse_statistics"),
    }
    # What the sweep runs: the flash attention of the forward, whose backward is called once for each target.
    taken_by_library = (tensors[name] for name in ("query", "key", "value", "grad_output"))
    tensors["output"], library = flash_backward(*taken_by_library, options["key_ranges"])
    figures["library_backward"] = timed({"library": library}, 0.0, limits, device)
    del library
    figures["attention_backward_relevancy"] = of("attention_backward_relevancy")
    figures["ratios"] = ratios(figures)
    figures["ratio"] = min(figures["ratios"].values(), default=None)
    return figures


def matrix_product_rate(device: str, side: int) -> float:
    """Measure operations per second of a square bf16 matrix product (float32 in a rehearsal: a CPU emulates bf16)."""
    import torch

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    square = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / timing.median_seconds(lambda: torch.mm(square, square), device, budget=0.1)


def copy_rate(device: str, size: int) -> float:
    """Measure bytes per second of a copy on the device, read and written ones counted."""
    import torch

    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / timing.median_seconds(lambda: target.copy_(source), device)


def backends_of(
    operator: str, arguments: tuple[Any, ...], options: dict[str, Any]
) -> dict[str, Callable[[], Any] | str]:
    """Map each backend to the call, or the reason why it cannot serve it. The twin comes last: it takes most memory."""
    from lvlm_fastxai import ops
    from lvlm_fastxai.errors import BackendUnavailableError

    calls: dict[str, Callable[[], Any] | str] = {}
    for backend in ops.backends(operator):
        try:
            ops.chosen_backend(operator, arguments[0].device, arguments[0].dtype, backend)
            calls[backend] = partial(getattr(ops, operator), *arguments, **options, backend=backend)
        except BackendUnavailableError as error:
            calls[backend] = str(error)
    calls["reference"] = calls.pop("reference")
    return calls


def timed(
    calls: dict[str, Callable[[], Any] | str], operations: float, limits: tuple[float, float], device: str
) -> dict[str, Any]:
    """Time each call. Where operations are given, also compute its rates.

    ``tflops`` and ``share_of_matrix_rate``: operations over seconds, and over the matrix product's rate.
    ``share_of_copy_rate``: bytes of its arguments and results, each moved once, over its seconds and the copy's rate.
    ``difference``: of an operator's last result (the product, or the norm) from the first backend's, relative L1.
    """
    found: dict[str, Any] = {}
    first = None
    for name, call in calls.items():
        if isinstance(call, str):
            found[name] = {"unavailable": call}
            continue
        found[name] = figures = figures_or_reason(partial(time_and_result, call, device), device)
        last, moved = figures.pop("last", None), figures.pop("result_bytes", 0)
        if operations and last is not None:
            first = last if first is None else first
            seconds = figures["seconds"]
            found[name] |= {
                "tflops": operations / seconds / 1e12,
                "share_of_matrix_rate": operations / seconds / limits[0],
                "share_of_copy_rate": (moved + bytes_of_arguments(call)) / seconds / limits[1],
                "difference": ((last - first).abs().sum() / first.abs().sum()).item(),
            }
    return found


def time_and_result(call: Callable[[], Any], device: str) -> dict[str, Any]:
    """Take a call's median seconds; where it returns tensors also the last one in fp64 and the bytes of all."""
    seconds = timing.median_seconds(call, device)
    result = call()
    if result is None:
        return {"seconds": seconds}
    every = result if isinstance(result, tuple) else (result,)
    return {"seconds": seconds, "last": every[-1].double(), "result_bytes": sum(tensor.nbytes for tensor in every)}


def bytes_of_arguments(call: Any) -> int:
    """Count the bytes of the tensors that a partial call takes."""
    return sum(tensor.nbytes for tensor in call.args)


def best(figures: dict[str, Any]) -> tuple[str | None, float | None]:
    """Find the fastest backend with kernels of its own, and its seconds."""
    times = {name: each.get("seconds") for name, each in figures.items() if name != "reference"}
    usable = {name: seconds for name, seconds in times.items() if isinstance(seconds, float)}
    name = min(usable, key=usable.__getitem__, default=None)
    return name, None if name is None else usable[name]


def ratios(figures: dict[str, Any]) -> dict[str, float]:
    """Divide each backend's fused backward by (library's backward + the fastest relevancy_product)."""
    (_, product), (_, library) = best(figures["relevancy_product"]), best(figures["library_backward"])
    if product is None or library is None:
        return {}
    fused = {name: each.get("seconds") for name, each in figures["attention_backward_relevancy"].items()}
    return {
        name: seconds / (library + product)
        for name, seconds in fused.items()
        if isinstance(seconds, float) and name != "reference"
    }


def errors(figures: dict[str, Any]) -> list[str]:
    """List what went wrong in a case, apart from its memory."""
    each = [(operator, found) for operator, found in figures.items() if isinstance(found, dict)]
    named = [(operator, backend, one) for operator, found in each for backend, one in found.items()]
    return [
        f"{operator} {backend}: {one['error']}"
        for operator, backend, one in named
        if isinstance(one, dict) and "error" in one
    ]


def line(name: str, figures: dict[str, Any]) -> str:
    """Lay out one case for the terminal."""
    parts = []
    for operator in ("relevancy_product", "glimpse_statistics", "attention_backward_relevancy"):
        for backend, each in figures.get(operator, {}).items():
            if isinstance(each.get("seconds"), float):
                parts.append(f"{backend} {each['seconds'] * 1e3:.3f} ms = {each['share_of_matrix_rate']:.1%}")
            elif "seconds" in each:
                parts.append(f"{backend} {each['seconds']}")
        parts.append("|")
    if "set_up" in figures:
        parts.append(f"set-up {figures['set_up']}")
    if figures.get("ratio") is not None:
        parts.append(f"fused/(library + product) {figures['ratio']:.2f}")
    return f"{name}: " + " ".join(parts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    suite.add_arguments(parser)


def main(args: argparse.Namespace) -> int:
    wanted = cases(args.rehearse)
    if args.case:
        wanted = {name: wanted[name] for name in args.case}
    side, size = (128, 2**16) if args.rehearse else (MATRIX, COPIED_BYTES)
    run = Suite(args, wanted)
    copied = copy_rate(args.device, size)
    run.results["copy_gigabytes_per_second"] = copied / 1e9
    run.results["failed"] = failed = []
    for name, case in wanted.items():
        if not run.has_time():
            break
        figures = memory.attempt(partial(measure, case, args.device, side, copied), args.device)
        figures = {"set_up": figures} if isinstance(figures, str) else figures
        memory.free(args.device)
        failed += [f"{name}: {error}" for error in errors(figures)]
        run.add(name, case, figures)
        print(line(name, figures), flush=True)
    return run.finish(failed)
