"""The command line ``lvlm-fastxai``: a table of commands, each of which lives beside what it runs.

Nothing heavy is imported before it is needed, so ``--help`` answers at once. Bad input ends with exit code 2 and one
line on stderr that says what to do, an interruption with 130.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..console import say
from ..errors import ArgumentError, FastXAIError, one_line, printable

__all__ = ["COMMANDS", "Command", "main"]

BAD_INPUT, INTERRUPTED = 2, 130


@dataclass(frozen=True)
class Command:
    """One command of the command line.

    Attributes:
        name: the word that users type.
        summary: one line, without a full stop.
        example: a command that works.
        module: where it lives; imported when it is asked for.
        add: name of the function there that declares its options on a parser.
        run: name of the function there that runs it on what was parsed, and gives the exit code.
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
        "lvlm-fastxai explain photo.png 'what is left of the tree?' --model llava-1.5-7b-hf --memory lean --out report",
        "lvlm_fastxai.cli.explain",
        add="add_explain_arguments",
        run="run_explain",
    ),
    Command(
        "estimate",
        "say what an explanation will cost in time and memory, before anything is run",
        "lvlm-fastxai estimate photo.png 'what is left of the tree?' --model llava-1.5-7b-hf",
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
        0, or 2 for bad input, or 130 when interrupted; the reason is on stderr, in one line.

    Example:
        >>> main(["info", "--json", "--loud"])
        2
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # OpenMP's waiting threads spin by default, which slows a small model tenfold when other programs share the cores.
    # Read when torch is first imported; a user's own setting stays.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for names that are not UTF-8
    try:
        args = _parser(arguments).parse_args(arguments)
        code = int(args.run(args) or 0)
        sys.stdout.flush()
        return code
    except FastXAIError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("lvlm-fastxai: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has closed it (`| head`); Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(one_line(error))


def _fail(message: str) -> int:
    say("lvlm-fastxai: error: " + printable(" ".join(message.split())))
    return BAD_INPUT


class _Parser(argparse.ArgumentParser):
    """Errors in one line; the usage is a `--help` away."""

    def error(self, message: str) -> Any:
        raise ArgumentError(f"{message} (see `{self.prog} --help`)")


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lvlm-fastxai",
        description="Why did the model say that? Exact relevancy maps of large vision-language models.",
        epilog="example: lvlm-fastxai explain photo.png 'what is left of the tree?' --out report",
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
