"""Figures of a run: smoothed over steps, printed, and logged for TensorBoard."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..console import say


class Smoothed:
    """Moving averages of figures, by name; each begins with its first value.

    Args:
        keep: share of the old average that a new value leaves.

    Example:
        >>> figures = Smoothed(0.5)
        >>> figures.add({"loss": 4.0}); figures.add({"loss": 2.0})
        >>> figures.line()
        'loss 3.000'
    """

    def __init__(self, keep: float) -> None:
        self._keep = keep
        self.values: dict[str, float] = {}

    def add(self, figures: Mapping[str, float]) -> None:
        """Take the figures of one step into the averages."""
        for name, value in figures.items():
            self.values[name] = self._keep * self.values.get(name, value) + (1 - self._keep) * value

    def line(self) -> str:
        """All of them in one line."""
        return " ".join(f"{name} {value:.3f}" for name, value in self.values.items())


class MetricsLog:
    """A line per epoch on stderr, and TensorBoard's files where TensorBoard is installed. A context manager.

    Args:
        folder: of TensorBoard's files.
        shown: False for the processes that others speak for; these write nothing.
        extra: the package's extra that brings TensorBoard, named where it is not installed.
    """

    def __init__(self, folder: Path, *, shown: bool, extra: str) -> None:
        self._shown = shown
        self._writer: Any = None
        if not shown:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            say(f"no TensorBoard logs: pip install 'lvlm_fastxai[{extra}]'")
            return
        self._writer = SummaryWriter(str(folder))

    def write(self, epoch: int, figures: Mapping[str, float]) -> None:
        """Log the figures of an epoch."""
        if not self._shown:
            return
        from tqdm import tqdm

        line = f"epoch {epoch}: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
        tqdm.write(line, file=sys.stderr)
        for name, value in figures.items():
            if self._writer is not None:
                self._writer.add_scalar(name, value, epoch)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._writer is not None:
            self._writer.close()
