"""The steps of `gpu`, one after the other, and the time that each gets."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..common import machine
from . import op
from .plot import plot
from .run import Failure, OutOfTime, Run, Skip, environment, tail

TOTAL_SECONDS = 525.0
BUILD = machine.ROOT / "build" / "gpu"
# Acceptance shape of relevancy_product, which ncu is pointed at.
PROFILED = "llava-1.5-7b-8192-1"
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats")
# A benchmark stops by itself this long before it would be stopped: its imports, and the case that is under way.
GRACE_SECONDS = 20.0


def build(run: Run, seconds: float) -> None:
    """Build the extension, in place, for this GPU alone, by CMake itself: setup.py wants setuptools from 2025."""
    import lvlm_fastxai

    cmake = run.tool("cmake")
    run.tool("nvcc")
    if importlib.util.find_spec("pybind11") is None:
        raise Skip("no pybind11 beside this Python; the Triton kernels need no build")
    architecture = os.environ.get("LVLM_FASTXAI_CUDA_ARCHS") or str(run.head["device"]["compute_capability"])
    until = time.monotonic() + seconds
    for arguments in build_commands(cmake, architecture, lvlm_fastxai.__version__, BUILD, machine.ROOT):
        code, output = run.command(arguments, until - time.monotonic())
        if code != 0:
            raise Failure(tail(output))


def build_commands(cmake: str, architecture: str, version: str, folder: Path, prefix: Path) -> list[list[str]]:
    """List the commands that configure, compile and install."""
    ninja = ["-G", "Ninja"] if shutil.which("ninja", path=environment()["PATH"]) else []
    switches = {
        "CMAKE_BUILD_TYPE": "Release",
        "Python3_EXECUTABLE": sys.executable,
        "FASTXAI_VERSION": version,
        "FASTXAI_CUDA": "ON",
        "FASTXAI_CUDA_ARCHITECTURES": architecture,
    }
    return [
        [cmake, "-S", str(machine.ROOT), "-B", str(folder), *ninja, *(f"-D{k}={v}" for k, v in switches.items())],
        [cmake, "--build", str(folder), "--parallel", str(os.cpu_count())],
        [cmake, "--install", str(folder), "--prefix", str(prefix), "--strip"],
    ]


def info(run: Run, seconds: float) -> None:
    """Say what can run here, with the reasons for what cannot; on a GPU some kernels must."""
    code, output = run.command([sys.executable, "-m", "lvlm_fastxai.info", "--json"], seconds)
    if code != 0:
        raise Failure(tail(output))
    run.results["info"] = found = json.loads(output[output.index("{") :])
    if run.device == "cuda":
        for operator, backends in found["operators"].items():
            if backends["cuda"] is not None and backends["triton"] is not None:
                raise Failure(f"{operator}: cuda: {backends['cuda']}; triton: {backends['triton']}")


def smoke(run: Run, seconds: float) -> None:
    """Run every operator, backend and kind of kernel once, against the twin."""
    run.suite("smoke", ["gpu-launch"], seconds)


def tests(run: Run, seconds: float) -> None:
    """Run the tests that are marked `gpu`."""
    if importlib.util.find_spec("pytest") is None:
        raise Skip("no pytest beside this Python")
    arguments = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None:
        arguments += ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]
    try:
        code, output = run.command(arguments, seconds, OMP_NUM_THREADS="2")
    finally:
        run.results["tests"] = verdicts((run.out / "gpu.log").read_text(errors="replace"))
    if code != 0 or not run.results["tests"].get("passed"):
        raise Failure(tail(output))


def verdicts(output: str) -> dict[str, Any]:
    """Count the tests by pytest's verdict, also of a run that was stopped, and name those that failed."""
    output = output[output.rindex("test session starts") :] if "test session starts" in output else ""
    # With xdist the verdict stands before the test's name, otherwise behind it.
    found = re.findall(
        r"^\[gw\d+\] \[ *\d+%\] ([A-Z]+) (tests/\S.*)$|^(tests/\S.*?) ([A-Z]+)(?: \(.*\))? +\[ *\d+%\]$", output, re.M
    )
    counts: dict[str, Any] = {"failures": []}
    for before, named_behind, named_before, behind in found:
        verdict = (before or behind).lower()
        counts[verdict] = counts.get(verdict, 0) + 1
        if verdict in ("failed", "error"):
            counts["failures"].append((named_behind or named_before).strip())
    return counts


def operators(run: Run, seconds: float) -> None:
    """Measure the operators."""
    run.suite("op", ["gpu-op", "--seconds", str(max(1.0, seconds - GRACE_SECONDS))], seconds)


def proxy(run: Run, seconds: float) -> None:
    """Measure proxy_relevancy and live maps."""
    run.suite("proxy", ["gpu-proxy", "--seconds", str(max(1.0, seconds - GRACE_SECONDS))], seconds)


def end_to_end(run: Run, seconds: float) -> None:
    """Measure whole explanations."""
    rounds = ["--rounds", "1"] if run.rehearse else []
    run.suite("end-to-end", ["gpu-end-to-end", *rounds, "--seconds", str(max(1.0, seconds - GRACE_SECONDS))], seconds)


def memcheck(run: Run, seconds: float) -> None:
    """Look for reads and writes out of bounds; torch's cache of freed memory, which would hide them, is off."""
    sanitize(run, "memcheck", seconds)


def racecheck(run: Run, seconds: float) -> None:
    """Look for shared memory that is read and written without a barrier in between."""
    sanitize(run, "racecheck", seconds)


def sanitize(run: Run, name: str, seconds: float) -> None:
    """Run the small shapes under one of compute-sanitizer's tools."""
    sanitizer = run.tool("compute-sanitizer")
    arguments = [sanitizer, "--tool", name, "--error-exitcode", "9", "--print-limit", "20"]
    driver = [sys.executable, "-m", "benchmarks", "gpu-launch", "--device", run.device]
    code, output = run.command([*arguments, *driver], seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
    run.results[name] = {"summary": summaries}
    if code != 0 or not summaries:
        raise Failure(tail(output))


def ncu(run: Run, seconds: float) -> None:
    """Ask ncu what bounds the better kernel of relevancy_product."""
    profiler = run.tool("ncu")
    case = next(iter(op.cases(rehearse=True))) if run.rehearse else PROFILED
    figures = run.results.get("op", {}).get("cases", {}).get(case, {}).get("relevancy_product", {})
    reasons = run.results.get("info", {}).get("operators", {}).get("relevancy_product", {})
    usable = [name for name, reason in reasons.items() if reason is None]
    backend = op.best(figures)[0] or next(iter(usable), "cuda")
    # The clocks stay as they are: the card may be shared, and the other figures were taken at its own clocks.
    arguments = [profiler, "--profile-from-start", "off", "--clock-control", "none", "--csv", "--page", "details"]
    for section in SECTIONS:
        arguments += ["--section", section]
    rehearse = ["--rehearse"] if run.rehearse else []
    driver = [sys.executable, "-m", "benchmarks", "gpu-launch", "--device", run.device, *rehearse]
    code, output = run.command([*arguments, *driver, "--profile", case, "--backend", backend], seconds)
    run.results["ncu"] = {"case": case, "backend": backend, "kernels": metrics(output)}
    if code != 0 or not run.results["ncu"]["kernels"]:
        raise Failure(tail(output))


def metrics(output: str) -> dict[str, dict[str, str]]:
    """Read ncu's CSV: kernel → metric → value with its unit."""
    lines = [line for line in output.splitlines() if line.startswith('"')]
    found: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines):
        if row.get("Metric Name"):
            kernel = found.setdefault(f"{row['ID']} {row['Kernel Name'][:100]}", {})
            kernel[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return found


@dataclass(frozen=True)
class Step:
    """Something that is done in at most ``limit`` seconds, if there are ``least`` seconds for it."""

    name: str
    least: float
    limit: float
    work: Callable[[Run, float], None]
    needs_gpu: bool = False


STEPS = (
    Step("build", 40, 150, build, needs_gpu=True),
    Step("info", 5, 30, info),
    Step("smoke", 15, 75, smoke),
    Step("tests", 45, 130, tests, needs_gpu=True),
    Step("op", 45, 110, operators),
    Step("proxy", 30, 60, proxy),
    Step("end-to-end", 60, 140, end_to_end),
    Step("memcheck", 35, 60, memcheck, needs_gpu=True),
    Step("racecheck", 35, 60, racecheck, needs_gpu=True),
    Step("ncu", 25, 45, ncu, needs_gpu=True),
    Step("plot", 3, 15, plot),
)


def stretched(steps: Sequence[Step], seconds: float) -> list[Step]:
    """Stretch the steps' limits where there are so few of them that time would be left over."""
    factor = max(1.0, seconds / sum(step.limit for step in steps))
    return [replace(step, limit=factor * step.limit) for step in steps]


def allowance(remaining: float, step: Step, later: Sequence[Step]) -> float:
    """Return the seconds that a step may take while each later one still gets its least; 0 if that is too little."""
    left = min(step.limit, remaining - sum(other.least for other in later))
    return left if left >= step.least else 0.0


def perform(run: Run, step: Step, seconds: float) -> dict[str, Any]:
    """Run a step; returns its outcome."""
    started = time.monotonic()
    outcome: dict[str, Any] = {"outcome": "passed"}
    try:
        if step.needs_gpu and run.device != "cuda":
            raise Skip("no GPU")
        if seconds <= 0:
            raise Skip("no time left")
        step.work(run, seconds)
    except Skip as reason:
        outcome = {"outcome": "skipped", "reason": str(reason)}
    except OutOfTime as reason:
        outcome = {"outcome": "timed out", "reason": str(reason)}
    except Exception as error:
        outcome = {"outcome": "failed", "reason": f"{type(error).__name__}: {error}"}
    return {**outcome, "seconds": round(time.monotonic() - started, 1), "allowed_seconds": round(seconds, 1)}
