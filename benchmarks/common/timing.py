"""Time calls: one call, the median of some, or several that take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

Name = TypeVar("Name")

# Written between two timed calls on a GPU: more than the 50 to 60 MB of L2 cache of today's largest ones.
FLUSH_BYTES = 128 * 2**20


def seconds(work: Callable[[], object], device: str) -> float:
    """Measure the wall seconds of one call."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(
    calls: Mapping[Name, Callable[[], object]], rounds: int, device: str = "cpu", *, warm_up: bool = True
) -> dict[Name, list[float]]:
    """Time every call once a round, one after the other: ratios within a round do not see the machine's pace drift.

    Args:
        warm_up: run every call once before the first round; that run fills caches and thread pools.

    Returns:
        Seconds of each call, one for each round.
    """
    for call in calls.values() if warm_up else ():
        call()
    taken: dict[Name, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            taken[name].append(seconds(call, device))
    return taken


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Divide round by round."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Take the median over the rounds of the ratio within a round.

    >>> median_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0])
    2.0
    """
    return statistics.median(ratios(numerators, denominators))


def median_seconds(work: Callable[[], object], device: str, budget: float = 0.5, rounds: int = 15) -> float:
    """Take the median seconds of a call over at least three rounds, at most ``rounds``, in about ``budget`` seconds.

    On a GPU this is the time on the device alone, between two events, with a cold L2 cache. A pause before the first
    event gives the host time to queue all kernels of the call.
    """
    import torch

    work()  # compiles, loads modules, fills the allocator
    once = seconds(work, device)
    rounds = max(3, min(rounds, int(budget / max(once, 1e-9))))
    if device != "cuda":
        return statistics.median(seconds(work, device) for _ in range(rounds))
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def prepare() -> None:
        flush.zero_()
        torch.cuda._sleep(int(min(once, 0.02) * 2e9))  # in cycles; a second has fewer than two billion

    return statistics.median(event_seconds(work, rounds, prepare))


def event_seconds(work: Callable[[], object], rounds: int, prepare: Callable[[], object] = lambda: None) -> list[float]:
    """Measure a call's seconds on the GPU, between two events, once a round; ``prepare`` runs before the first."""
    import torch

    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in events:
        prepare()
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]
