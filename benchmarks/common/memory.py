"""Measure peak memory, in this process or in a fresh one; running out of memory is a result as well."""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from .machine import ROOT

T = TypeVar("T")

OUT_OF_MEMORY = "out of memory"

# glibc raises its mmap threshold when a large block is freed. Freed memory then stays in the process, and the peak of
# one step hides in the leftovers of the last. A fixed threshold gives every tensor back at once.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak_extra_bytes(work: Callable[[], object], device: str) -> int:
    """Measure the most memory that ``work`` adds to what is in use before it, in bytes.

    On a CPU this is the resident memory of this process (Linux), on a GPU the allocator's count.
    """
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


def second_call_bytes(work: Callable[[], object], device: str = "cpu") -> int:
    """Measure the peak memory of a second call: what libraries and thread pools keep for good is not part of it."""
    work()
    return peak_extra_bytes(work, device)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def in_fresh_process(measure: Callable[..., int], *arguments: Any) -> int | str:
    """Call ``measure``, a function of a module, in a process of its own (see :mod:`benchmarks.common.worker`).

    Args:
        arguments: values that JSON can hold.

    Returns:
        What it returns, or :data:`OUT_OF_MEMORY`.

    Raises:
        RuntimeError: it failed for another reason.
    """
    named = [f"{measure.__module__}:{measure.__name__}", json.dumps(arguments)]
    command = [sys.executable, "-m", "benchmarks.common.worker", *named]
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return int(done.stdout.split()[-1])
    if _speaks_of_memory(done.stderr + done.stdout):
        return OUT_OF_MEMORY
    raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")


def _speaks_of_memory(text: str) -> bool:
    return "can't allocate memory" in text or "out of memory" in text.lower() or "MemoryError" in text


def attempt(work: Callable[[], T], device: str) -> T | str:
    """Return what ``work`` returns, or :data:`OUT_OF_MEMORY` after everything that it held has been freed."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not _speaks_of_memory(f"{type(error).__name__}: {error}"):
            raise
    free(device)  # outside the handler: the exception holds the frames, and they hold the tensors
    return OUT_OF_MEMORY


def free(device: str) -> None:
    """Free what nobody uses."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def limit_memory(fraction: float = 0.8) -> None:
    """Let an allocation fail beyond ``fraction`` of the memory free now, before the kernel's OOM killer wakes."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            limit = _status_bytes("VmSize") + int(int(line.split()[1]) * 1024 * fraction)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
