"""Launches the kernels of every operator once: what a smoke test, compute-sanitizer and ncu are pointed at.

    python -m benchmarks gpu-launch                             small shapes, compared with the twin in float64
    python -m benchmarks gpu-launch --profile llava-1.5-7b-8192-1 --operator relevancy_product --backend cuda

Inputs and the truth are made on the CPU, so beside the operators' own kernels only copies run on the device. A small
shape is one entry of :data:`ATTENTION_LAUNCHES` or :data:`PROXY_LAUNCHES`; an operator that takes other tensors than
attention's gets a list of its own in :data:`LAUNCHES`.
"""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ..common import machine, results, timing
from ..ops import cases as ops_cases
from ..ops.backward import flash_backward
from ..ops.cases import Case
from .op import backends_of, cases


class Launch(Protocol):
    """A small call."""

    def compare(self, operator: str, backend: str, device: str) -> dict[str, float]:
        """Return the error against the twin in float64, and what is allowed."""


@dataclass(frozen=True)
class AttentionLaunch:
    """A small shape, in what differs between kernels: dtype, head width, groups, targets, few rows, window."""

    case: Case
    window: int | None = None

    def arguments_of(self, operator: str) -> tuple[tuple[Any, ...], Any]:
        """Make the operator's arguments on the CPU, and key ranges.

        Raises:
            LookupError: `ops.cases.build` does not make what the operator takes.
        """
        from lvlm_fastxai import ops

        tensors, options = ops_cases.build(self.case)
        ranges = options["key_ranges"]
        if self.window is not None:
            ranges = ops.key_ranges(1, self.case.keys, self.case.keys, window=self.window)
        logsumexp, output = attention(*(tensors[name] for name in ("query", "key", "value")), ranges)
        return ops_cases.arguments_of(operator, {**tensors, "logsumexp": logsumexp, "output": output}), ranges

    def compare(self, operator: str, backend: str, device: str) -> dict[str, float]:
        """Compare every result with the twin in float64, as relative L1 error.

        float32 is allowed 1e-6, 16-bit twice the error of eager PyTorch in that dtype. The result that is nearest to
        its limit, or over it, stands for all.
        """
        import torch

        from lvlm_fastxai import ops
        from lvlm_fastxai.ops.key_ranges import real_columns

        arguments, ranges = self.arguments_of(operator)
        bounds = ranges.unbind(-1)
        if operator == "glimpse_statistics":  # in the full domain; every row sees a key
            bounds += real_columns(ranges)[:, None].expand_as(ranges).unbind(-1)
        dense = getattr(importlib.import_module("lvlm_fastxai.reference"), operator)
        scale = self.case.width**-0.5
        truth = as_tuple(dense(*(tensor.double() for tensor in arguments), *bounds, scale))
        eager = as_tuple(dense(*arguments, *bounds, scale, compute_dtype=arguments[0].dtype))
        moved = [tensor.to(device) for tensor in arguments]
        found = getattr(ops, operator)(*moved, key_ranges=ranges.to(device), backend=backend)
        if device == "cuda":
            torch.cuda.synchronize()
        figures = []
        for result, expected, rounded in zip(as_tuple(found), truth, eager, strict=True):
            is_float32 = arguments[0].dtype == torch.float32
            allowed = 1e-6 if is_float32 else 2 * relative_error(rounded, expected)
            figures.append({"error": relative_error(result.cpu(), expected), "allowed": allowed})
        # NaN, which is in no order with any number, comes first.
        return max(figures, key=lambda each: (math.isnan(each["error"]), each["error"] / each["allowed"]))


@dataclass(frozen=True)
class ProxyLaunch:
    """A small call of proxy_relevancy; the second of two samples is shorter than the other."""

    columns: int
    width: int
    targets: int
    dtype: str
    norm: str = "rms"
    activation: str = "sigmoid"

    def arguments(self, batch: int = 2) -> tuple[Any, ...]:
        """Make hidden, query and offset on the CPU, for scores of a few units."""
        import torch

        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(batch, self.columns, self.width, generator=generator) + 1
        query = torch.randn(batch, self.targets, self.width, generator=generator) * (3 / self.width**0.5)
        offset = torch.randn(batch, self.targets, generator=generator)
        return hidden.to(getattr(torch, self.dtype)), query, offset

    def compare(self, operator: str, backend: str, device: str) -> dict[str, float]:
        """Take the largest absolute error against the twin in float64 on the same states; 1e-5 is allowed.

        Padding holds NaN.
        """
        import torch

        from lvlm_fastxai import ops
        from lvlm_fastxai.reference import proxy_relevancy as dense

        arguments = self.arguments()
        lengths = torch.tensor([self.columns, self.columns - 6], dtype=torch.int32)
        arguments[0][1, -6:] = math.nan
        norm, softmax = self.norm == "layer", self.activation == "softmax"
        truth = dense(*(tensor.double() for tensor in arguments), lengths, 1e-6, norm, softmax)
        moved = [tensor.to(device) for tensor in (*arguments, lengths)]
        options: dict[str, Any] = {"norm": self.norm, "activation": self.activation, "backend": backend}
        found = ops.proxy_relevancy(*moved[:3], lengths=moved[3], **options)
        # NaN, which is in no order with any number, must not be lost among the others.
        errors = [(result.cpu() - expected).abs().max() for result, expected in zip(found, truth, strict=True)]
        every = torch.stack(errors)
        return {"error": every.max().item() if every.isfinite().all() else math.nan, "allowed": 1e-5}


PROXY_LAUNCHES = {
    "bfloat16, width 4096": ProxyLaunch(150, 4096, 1, "bfloat16"),
    "bfloat16, width 4104, 37 targets, centred, softmax": ProxyLaunch(150, 4104, 37, "bfloat16", "layer", "softmax"),
    "float16, width 77, centred": ProxyLaunch(1100, 77, 1, "float16", "layer"),
    "float32, width 2056, 3 targets": ProxyLaunch(33, 2056, 3, "float32"),
    "float32, width 77, softmax": ProxyLaunch(33, 77, 2, "float32", activation="softmax"),
}
ATTENTION_LAUNCHES = {
    # More keys than one tile has, and not a multiple of it.
    "bfloat16, width 128": AttentionLaunch(Case(2, 2, 150, 128, "bfloat16")),
    "bfloat16, width 64, grouped, 2 targets": AttentionLaunch(Case(3, 1, 150, 64, "bfloat16", targets=2)),
    "float16, width 80, window": AttentionLaunch(Case(2, 1, 150, 80, "float16"), window=40),
    "float32, width 64": AttentionLaunch(Case(2, 2, 97, 64)),
    "bfloat16, width 128, 9 of 150 rows": AttentionLaunch(Case(2, 2, 150, 128, "bfloat16", rows=9)),
}
# By operator; one that is not here takes attention's tensors.
LAUNCHES: dict[str, Mapping[str, Launch]] = {"proxy_relevancy": PROXY_LAUNCHES}


def launches(operator: str) -> Mapping[str, Launch]:
    """Name what an operator is launched with."""
    return LAUNCHES.get(operator, ATTENTION_LAUNCHES)


def attention(query: Any, key: Any, value: Any, ranges: Any) -> tuple[Any, Any]:
    """Compute logsumexp (1, H, Sq), and output (1, H, Sq, d) in the dtype of `query`, in float32."""
    import torch

    group = query.shape[1] // key.shape[1]
    keys, values = (tensor.float().repeat_interleave(group, 1) for tensor in (key, value))
    position = torch.arange(key.shape[2])
    visible = (position >= ranges[..., :1]) & (position < ranges[..., 1:])
    scores = (query.float() @ keys.mT * query.shape[-1] ** -0.5).masked_fill(~visible[:, None], -math.inf)
    logsumexp = scores.logsumexp(-1)
    return logsumexp, ((scores - logsumexp[..., None]).exp() @ values).to(query.dtype)


def as_tuple(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)


def relative_error(result: Any, truth: Any) -> float:
    return ((result.double() - truth).abs().sum() / truth.abs().sum()).item()


def usable(operator: str, device: str) -> list[str]:
    """List the backends with kernels that serve tensors on the device."""
    import torch

    from lvlm_fastxai import ops
    from lvlm_fastxai.errors import BackendUnavailableError

    found = []
    for backend in ops.backends(operator):
        try:
            ops.chosen_backend(operator, torch.device(device), torch.bfloat16, backend)
        except BackendUnavailableError as error:
            print(error)
            continue
        if backend != "reference":
            found.append(backend)
    return found


def launch_all(device: str) -> tuple[dict[str, Any], bool]:
    """Compare every operator, backend and launch; returns errors beside what is allowed, and whether all are good."""
    from lvlm_fastxai import ops

    results: dict[str, Any] = {}
    good = True
    for operator in ops.operators():
        results[operator] = {}
        for backend in usable(operator, device):
            results[operator][backend] = found = {}
            for name, launch in launches(operator).items():
                try:
                    found[name] = launch.compare(operator, backend, device)
                    right = found[name]["error"] <= found[name]["allowed"]
                    verdict = f"{found[name]['error']:.2e} {'ok' if right else 'WRONG'}"
                except Exception as error:  # of one backend's compiler, say; the others have their turn
                    found[name] = {"failed": f"{type(error).__name__}: {error}"[:500]}
                    right, verdict = False, f"FAILED {found[name]['failed']}"
                good = good and right
                print(f"{operator} {backend} {name}: {verdict}", flush=True)
    return results, good


def profile(operator: str, backend: str, name: str, device: str, rehearse: bool) -> None:
    """Make one call after another that compiles, between the marks that a profiler looks for."""
    import torch

    tensors, options = ops_cases.build(cases(rehearse)[name], device)
    if operator == "attention_backward_relevancy":
        taken_by_library = (tensors[name] for name in ("query", "key", "value", "grad_output"))
        tensors["output"], _ = flash_backward(*taken_by_library, options["key_ranges"])
    call = backends_of(operator, ops_cases.arguments_of(operator, tensors), options)[backend]
    if isinstance(call, str):
        raise RuntimeError(call)
    marks: tuple[Callable[[], Any], Callable[[], Any]] = (lambda: None, lambda: None)
    if device == "cuda":
        marks = torch.cuda.profiler.start, torch.cuda.profiler.stop
    call()
    timing.seconds(partial(between, call, marks), device)


def between(call: Callable[[], Any], marks: tuple[Callable[[], Any], Callable[[], Any]]) -> None:
    marks[0]()
    call()
    marks[1]()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, with --profile")
    parser.add_argument("--profile", metavar="CASE", help="a case of gpu-op instead of the small shapes")
    parser.add_argument("--operator", default="relevancy_product")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--out", type=Path, help="results file (JSON)")


def main(args: argparse.Namespace) -> int:
    if args.profile:
        profile(args.operator, args.backend, args.profile, args.device, args.rehearse)
        return 0
    found, good = launch_all(args.device)
    if not any(found.values()):
        print(f"no operator has kernels for {args.device}")
    if args.out:
        results.write_results(args.out, machine.describe(), found)
    return 0 if good and any(found.values()) else 1
