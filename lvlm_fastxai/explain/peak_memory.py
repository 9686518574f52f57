"""How much memory a piece of work needs at its peak."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch

_STATISTICS = Path("/proc/self/statm")
_INTERVAL = 0.002


class Peak:
    """The most bytes that were in use at once, beyond those at the start; None where that cannot be read."""

    bytes: int | None = None


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the work of a ``with`` block; the `Peak` it gives is filled in at its end.

    Args:
        device: where the work allocates: CUDA's own counter, or the process's resident memory for the CPU.

    Example:
        >>> with peak_memory(torch.device("cpu")) as peak:
        ...     _ = torch.zeros(1000)
        >>> peak.bytes is None or peak.bytes >= 0
        True
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    if device.type != "cpu" or not _STATISTICS.exists():
        yield peak
        return
    # Resident memory, sampled: the only reading on a CPU that needs no allocator of our own and resets no counter that
    # others may be using. Heap that is free already would hide the first megabytes, so it is handed back before.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    watch = _Watch()
    try:
        threading.Thread(target=_poll, args=(weakref.ref(watch),), name="peak-memory", daemon=True).start()
        yield peak
    finally:
        watch.stopped = True
    peak.bytes = watch.read() - watch.before


class _Watch:
    """Resident memory of the process, read again and again."""

    def __init__(self) -> None:
        self.stopped = False
        self._page = os.sysconf("SC_PAGE_SIZE")
        self._most = 0
        self.before = self.read()

    def read(self) -> int:
        """The most that any reading has found."""
        self._most = max(self._most, int(_STATISTICS.read_text().split()[1]) * self._page)
        return self._most


def _poll(watch: weakref.ref[_Watch]) -> None:
    """Read until the watch is stopped. The thread keeps no watch alive: one that an interrupt left behind ends it."""
    while (found := watch()) is not None and not found.stopped:
        found.read()
        del found
        time.sleep(_INTERVAL)
