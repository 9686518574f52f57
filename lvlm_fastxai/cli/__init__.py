"""Run the command line ``lvlm-fastxai``: a table of commands, each of which lives beside the code that it runs.

Nothing heavy is imported before it is needed, so ``--help`` answers at once. Bad input ends with exit code 2 and one
line on stderr that says what to do. An interruption ends with exit code 130.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..console import say
from ..errors import ArgumentError, FastXAIError, one_line, printable
from ..tiny import SAMPLE_IMAGE, SAMPLE_QUESTION

__all__ = ["COMMANDS", "Command", "main"]

BAD_INPUT, INTERRUPTED = 2, 130
# A picture that every installation has, so that the examples can be pasted.
SAMPLE = shlex.join([printable(SAMPLE_IMAGE), SAMPLE_QUESTION])


@dataclass(frozen=True)
class Command:
    """One command of the command line.

    Attributes:
        name: the word that users type.
        summary: one line, without a full stop.
        example: a command that works.
        module: dotted name of its module, which is imported when the command is chosen.
        add: name of the function there that declares its options on a parser.
        run: name of the function there that takes the parsed options and returns the exit code.
    """

    name: str
    summary: str
    example: str
    module: str
    add: str = "add_arguments"
    run: str = "run"

    def declare(self, parser: argparse.ArgumentParser) -> None:
        """Import the command and declare its options."""
        module = importlib.import_module(self.module)
        getattr(module, self.add)(parser)
        parser.set_defaults(run=getattr(module, self.run))


COMMANDS = (
    Command(
        "explain",
        "answer a question about an image and write a relevancy map for every token of the answer",
        f"lvlm-fastxai explain {SAMPLE} --out report",
        "lvlm_fastxai.cli.explain",
        add="add_explain_arguments",
        run="run_explain",
    ),
    Command(
        "estimate",
        "say what an explanation will cost in time and memory, before anything is run",
        f"lvlm-fastxai estimate {SAMPLE}",
        "lvlm_fastxai.cli.explain",
        add="add_estimate_arguments",
        run="run_estimate",
    ),
    Command(
        "info",
        "show versions, what was built, and which backends work here and why others do not",
        "lvlm-fastxai info",
        "lvlm_fastxai.info",
    ),
    Command(
        "evaluate",
        "measure how well the maps point at the evidence, on scenes whose evidence is known",
        "lvlm-fastxai evaluate --scenes 20 --methods chefer,raw_attention",
        "lvlm_fastxai.evaluate.commands",
    ),
    Command(
        "fastrm",
        "distil exact maps into a head that predicts them while the model talks: build-maps, train, evaluate",
        "lvlm-fastxai fastrm build-maps vqa.jsonl --model llava-1.5-7b-hf --out maps",
        "lvlm_fastxai.fastrm.commands",
    ),
    Command(
        "calibrate",
        "fit a policy on labelled answers: accept so many that a stated share of them is right",
        "lvlm-fastxai calibrate labelled.jsonl --target 0.95 --out policy.json",
        "lvlm_fastxai.review.commands",
        add="add_calibrate_arguments",
        run="run_calibrate",
    ),
    Command(
        "review",
        "answer questions under a policy, and show the others to a person: run, serve, list, export, backup",
        "lvlm-fastxai review serve queue.db",
        "lvlm_fastxai.review.commands",
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; those of the process by default.

    Returns:
        0; 2 for bad input; 130 when interrupted. The reason is on stderr, in one line.

    Example:
        >>> main(["info", "--json", "--loud"])
        2
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # OpenMP's waiting threads spin by default, which slows a small model tenfold when other programs share the cores.
    # Read when torch is first imported; a user's own setting stays.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _replace_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for names that are not UTF-8
    try:
        try:
            args = _parser(arguments).parse_args(arguments)
            return int(args.run(args) or 0)
        finally:
            sys.stdout.flush()  # also after --help, which leaves by SystemExit
    except FastXAIError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("lvlm-fastxai: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has closed it (`| head`)
        _drop_unwritable_output()
        return 0
    except OSError as error:
        _drop_unwritable_output()
        return _fail(one_line(error))


def _replace_closed_streams() -> None:
    """Open the null device for standard streams that were closed (`>&-`), so that no file takes their place."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))


def _drop_unwritable_output() -> None:
    """Send output that cannot be written to the null device. Python would fail on it again when it flushes at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str) -> int:
    say("lvlm-fastxai: error: " + printable(" ".join(message.split())))
    return BAD_INPUT


class _Parser(argparse.ArgumentParser):
    """Report errors in one line, without the usage, which ``--help`` shows."""

    def error(self, message: str) -> Any:
        raise ArgumentError(f"{message} (see `{self.prog} --help`)")


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lvlm-fastxai",
        description="Why did the model say that? Exact relevancy maps of large vision-language models.",
        epilog=f"example: {COMMANDS[0].example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    parsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    for command in COMMANDS:
        made = parsers.add_parser(
            command.name,
            help=command.summary,
            description=command.summary[0].upper() + command.summary[1:] + ".",
            epilog=f"example: {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if command.name == chosen:  # the others need not be imported
            command.declare(made)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *unused: Any) -> None:
        from .. import __version__

        print(f"lvlm-fastxai {__version__}")
        parser.exit()
