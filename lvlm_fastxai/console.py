"""Share what several commands need: options that name a model, progress bars, and lines on stderr.

Importing this module loads neither torch nor numpy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import printable

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_model_arguments(parser: Any, *, model: str = "checkpoint folder (default: the shipped LVLM)") -> None:
    """Declare ``--model``, ``--device``, ``--dtype`` and ``--trust-remote-code``, which `load_checkpoint` takes.

    Args:
        parser: a parser of argparse, or a group of one.
        model: the help of ``--model``.
    """
    parser.add_argument("--model", type=Path, metavar="DIR", help=model)
    device = "cpu, cuda, cuda:1, …; with several processes 'cuda', each takes its own (default: %(default)s)"
    parser.add_argument("--device", type=_device, default="cpu", metavar="DEVICE", help=device)
    dtype = "weights and computation (default: as stored in the checkpoint)"
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help=dtype)
    code = "run Python code that lies in the checkpoint's folder, which can do all that you can (default: refuse)"
    parser.add_argument("--trust-remote-code", action="store_true", help=code)


def _device(text: str) -> str:
    """Refuse the meta device, which holds no numbers. Torch checks all other names."""
    if text.partition(":")[0] == "meta":
        raise argparse.ArgumentTypeError("'meta' computes nothing; give cpu, cuda or cuda:1")
    return text


def number_or(word: str) -> Callable[[str], float | str]:
    """Make a type for argparse that takes a number or this word.

    Example:
        >>> number_or("auto")("auto"), number_or("auto")("0.5")
        ('auto', 0.5)
    """

    def parse(text: str) -> float | str:
        try:
            return text if text == word else float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected '{word}' or a number, got {text!r}") from None

    return parse


def say(message: str) -> None:
    """Print a message on stderr, since stdout belongs to the result."""
    print(printable(message, keep="\t\n"), file=sys.stderr)


class Bars:
    """Show a progress bar on stderr for each stage, with rate and remaining time: ``bars(stage, done, total)``.

    Work that was done before a stage began does not count for its rate. Use it as a context manager.

    Args:
        unit: the name of what is counted.
        shown: whether this process shows bars. Of several processes only one should.
        leave: whether a stage's bar stays when the stage is over.
        anywhere: whether to draw bars in a file too, such as the log of a job that runs for days.
        announce: whether to print a line for each stage when stderr is not a terminal.
    """

    def __init__(
        self,
        *,
        unit: str = "it",
        shown: bool = True,
        leave: bool = True,
        anywhere: bool = False,
        announce: bool = False,
    ) -> None:
        self._unit, self._shown, self._leave, self._announce = unit, shown, leave, announce
        self._disable = False if anywhere else None  # None: tqdm looks for a terminal itself
        self._stage = ""
        self._bar: Any = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if not self._shown:
            return
        if self._bar is None or stage != self._stage:
            from tqdm import tqdm

            self.__exit__()
            if self._announce and not sys.stderr.isatty():
                say(f"{stage}: {total}")
            self._stage = stage
            self._bar = tqdm(
                total=total,
                initial=done,
                desc=stage,
                unit=self._unit,
                file=sys.stderr,
                disable=self._disable,
                leave=self._leave,
            )
        self._bar.update(done - self._bar.n)

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
