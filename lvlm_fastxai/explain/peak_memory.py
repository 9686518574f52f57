"""How much memory a piece of work needs at its peak."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
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
    watcher = _Watcher()
    try:
        watcher.start()
        yield peak
    finally:
        watcher.stop()
    peak.bytes = watcher.most - watcher.before


class _Watcher(threading.Thread):
    """Reads the resident memory again and again until it is stopped, or until whoever started it has gone."""

    def __init__(self) -> None:
        super().__init__(name="peak-memory", daemon=True)
        self._stopped = threading.Event()
        self._owner = threading.current_thread()
        self._page = os.sysconf("SC_PAGE_SIZE")
        self.before = self.most = self._resident()

    def _resident(self) -> int:
        return int(_STATISTICS.read_text().split()[1]) * self._page

    def run(self) -> None:
        while not self._stopped.wait(_INTERVAL) and self._owner.is_alive():
            self.most = max(self.most, self._resident())

    def stop(self) -> None:
        """End the thread; nothing but a flag, so that no interruption can come between."""
        self._stopped.set()
        self.most = max(self.most, self._resident())
