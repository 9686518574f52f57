"""What the commands share: options that name a model, progress bars, and lines on stderr. Loads nothing heavy."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_model_arguments(parser: Any, *, model: str = "checkpoint folder (default: the shipped LVLM)") -> None:
    """Declare ``--model``, ``--device``, ``--dtype`` and ``--trust-remote-code``, what `load_checkpoint` takes.

    Args:
        parser: argparse's, or a group of one.
        model: help of ``--model``.
    """
    parser.add_argument("--model", type=Path, metavar="DIR", help=model)
    device = "cpu, cuda, cuda:1, …; with several processes 'cuda', each takes its own (default: %(default)s)"
    parser.add_argument("--device", type=_device, default="cpu", metavar="DEVICE", help=device)
    dtype = "weights and computation (default: as stored in the checkpoint)"
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help=dtype)
    code = "run Python code that lies in the checkpoint's folder, which can do all that you can (default: refuse)"
    parser.add_argument("--trust-remote-code", action="store_true", help=code)


def _device(text: str) -> str:
    """Refuse the device that holds no numbers; what others there are, torch knows."""
    if text.partition(":")[0] == "meta":
        raise argparse.ArgumentTypeError("'meta' computes nothing; give cpu, cuda or cuda:1")
    return text


def number_or(word: str) -> Callable[[str], float | str]:
    """A type for argparse: a number, or this word."""

    def parse(text: str) -> float | str:
        try:
            return text if text == word else float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected '{word}' or a number, got {text!r}") from None

    return parse


# What moves a terminal's cursor or colours, reorders its text, or cannot be encoded: control characters but tab and
# newline, marks of direction, halves of surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Spell out what a terminal would obey instead of showing it.

    Args:
        text: from outside: a question, an answer, a file's name.

    Example:
        >>> printable("a \x1b[31mred\x1b[0m circle")
        'a \\x1b[31mred\\x1b[0m circle'
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def say(message: str) -> None:
    """Print a line on stderr: stdout belongs to the result."""
    print(printable(message), file=sys.stderr)


class Bars:
    """A progress bar on stderr for each stage, with rate and remaining time: ``bars(stage, done, total)``.

    What is done when a stage begins does not count for its rate. A context manager.

    Args:
        unit: of what is counted.
        shown: False for the processes that others speak for.
        leave: whether a stage's bar stays when it is over.
        anywhere: also where stderr is no terminal, such as the log of a job that runs for days.
        announce: a line per stage where stderr is no terminal.
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
