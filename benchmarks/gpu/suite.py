"""What the suites on a GPU share: their arguments, a limit of time, and figures that are kept as they come in."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..common import machine, memory, results


def add_arguments(parser: argparse.ArgumentParser, cases: Iterable[str] | None = None) -> None:
    """Add the arguments that every suite takes.

    Args:
        cases: what --case may name; None where it may be any name.
    """
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes")
    parser.add_argument("--case", action="append", choices=cases, help="repeatable; default all")
    parser.add_argument("--seconds", type=float, default=3600.0, help="nothing is begun after this time")
    parser.add_argument("--out", type=Path, help="results file (JSON), rewritten after every case")


class Suite:
    """One run of a suite: the cases that it still has to measure, and the figures of the others.

    Args:
        args: as :func:`add_arguments` has them.
        names: of all cases, the most wanted first.
    """

    def __init__(self, args: argparse.Namespace, names: Iterable[str]) -> None:
        self.until = time.monotonic() + args.seconds
        self.out: Path | None = args.out
        self.head = machine.describe()
        self.left_out = list(names)
        self.results: dict[str, Any] = {"cases": {}, "left_out": self.left_out}

    def has_time(self) -> bool:
        """Say whether another case may be begun."""
        return time.monotonic() <= self.until

    def add(self, name: str, case: Any, figures: dict[str, Any]) -> None:
        """Keep a case's figures and write all of them."""
        self.left_out.remove(name)
        self.results["cases"][name] = {"case": asdict(case), **figures}
        self.write()

    def write(self) -> None:
        """Write all figures, if there is a file for them."""
        if self.out:
            results.write_results(self.out, self.head, self.results)

    def finish(self, failed: Iterable[str] = ()) -> int:
        """Say what went wrong and what was left out; returns the exit code."""
        failed = list(failed)
        for text in failed:
            print(f"FAILED {text}")
        print(f"left out for lack of time: {len(self.left_out)} {' '.join(self.left_out)}")
        return 1 if failed else 0


def figures_or_reason(work: Callable[[], dict[str, Any]], device: str) -> dict[str, Any]:
    """Return the figures that ``work`` takes; running out of memory, or failing, is a figure as well.

    Raises:
        Exception: a CUDA error, after which the process has lost its device.
    """
    try:
        found = memory.attempt(work, device)
    except Exception as error:
        if "CUDA error" in str(error):
            raise
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    return {"seconds": found} if isinstance(found, str) else found
