"""What a figure must be read with: the machine, the versions, the commit, and how memory and time were taken."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent

OUT_OF_MEMORY = "out of memory"

# Written between two timed calls on a GPU: more than the 50 to 60 MB of L2 of today's largest ones.
FLUSH_BYTES = 128 * 2**20

# glibc raises its mmap threshold when a large block is freed, after which freed memory stays in the process and the
# peak of one step hides in the leftovers of the last. A fixed threshold gives every tensor back at once.
MEMORY_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def write_results(path: Path, head: dict[str, Any], results: dict[str, Any]) -> None:
    """A results file: what it must be read with, then the figures. Whoever kills the process keeps the last one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"machine": head, "results": results}, indent=1) + "\n")
    part.replace(path)


def describe() -> dict[str, Any]:
    """Machine, versions and commit, for the head of a results file."""
    import torch
    import transformers

    def git(*args: str) -> str:
        try:
            return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        except FileNotFoundError:  # a copy of the checkout, on a machine without git
            return ""

    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else ""),
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def peak_extra_bytes(work: Callable[[], object], device: str) -> int:
    """Peak memory that ``work`` adds: resident memory of this process (Linux), or the allocator's count on a GPU."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to the present size
    before = _status_bytes("VmRSS")
    work()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def in_fresh_process(module: str, *arguments: str) -> int | str:
    """The number that ``python -m MODULE --worker ARGUMENTS`` prints, or ``OUT_OF_MEMORY``."""
    command = [sys.executable, "-m", module, "--worker", *arguments]
    environment = {**os.environ, **MEMORY_ENVIRONMENT}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return int(done.stdout.split()[-1])
    if _speaks_of_memory(done.stderr + done.stdout):
        return OUT_OF_MEMORY
    raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")


def _speaks_of_memory(text: str) -> bool:
    return "can't allocate memory" in text or "out of memory" in text.lower() or "MemoryError" in text


def attempt(work: Callable[[], T], device: str) -> T | str:
    """What ``work`` returns, or ``OUT_OF_MEMORY`` with everything given back that it held."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not _speaks_of_memory(f"{type(error).__name__}: {error}"):
            raise
    free(device)  # outside the handler: the exception holds the frames, and they hold the tensors
    return OUT_OF_MEMORY


def free(device: str) -> None:
    """Give back what nobody uses."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def limit_memory(fraction: float = 0.8) -> None:
    """Let an allocation beyond ``fraction`` of the memory now free fail, instead of waking the kernel's OOM killer."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            limit = _status_bytes("VmSize") + int(int(line.split()[1]) * 1024 * fraction)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def seconds(work: Callable[[], object], device: str) -> float:
    """Wall seconds of one call."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def median_seconds(work: Callable[[], object], device: str, budget: float = 0.5, rounds: int = 15) -> float:
    """Median seconds of a call: at least three rounds, at most ``rounds``, about ``budget`` seconds of them.

    On a GPU the time on the device alone, between two events, with a cold L2: a pause ahead of the first event gives
    the host the time that it takes to queue the call's kernels.
    """
    import torch

    work()  # compiles, loads modules, fills the allocator
    once = seconds(work, device)
    rounds = max(3, min(rounds, int(budget / max(once, 1e-9))))
    if device != "cuda":
        return statistics.median(seconds(work, device) for _ in range(rounds))
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in events:
        flush.zero_()
        torch.cuda._sleep(int(min(once, 0.02) * 2e9))  # in cycles, of which there are less than two billion a second
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3
