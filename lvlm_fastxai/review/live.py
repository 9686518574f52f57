"""Model and head of a command that answers a source's questions now, loaded when the first has to be answered."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..console import add_model_arguments
from ..errors import ArgumentError

if TYPE_CHECKING:
    from ..fastrm.answers import LiveAnswer
    from .policy import Identity

__all__ = ["Live", "add_live_arguments"]


def add_live_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that `Live` reads."""
    group = parser.add_argument_group("model, where answers are generated now")
    add = group.add_argument
    add_model_arguments(group)
    add("--head", default="shipped", metavar="DIR", help="FastRM head of that model (default: the shipped one)")
    add("--batch", type=int, default=16, metavar="N", help="questions answered at once (default: %(default)s)")
    add("--max-new-tokens", type=int, default=32, metavar="N", help="longest answer (default: %(default)s)")


class Live:
    """Answers questions with a head attached.

    Args:
        args: parsed options of `add_live_arguments`.

    Raises:
        ArgumentError: an option makes no sense.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        for name in ("batch", "max_new_tokens"):
            if getattr(args, name) < 1:
                raise ArgumentError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
        self._args = args
        self._loaded: Any = None

    def identity(self) -> Identity:
        """Load model and head, once, and say whose answers these are.

        Raises:
            FastXAIError: one of them cannot be loaded, or they do not belong together.
        """
        if self._loaded is None:
            from ..fastrm.head import FastRM
            from ..models.checkpoint import load_checkpoint
            from ..models.fingerprint import fingerprint, model_name
            from .policy import Identity

            args = self._args
            head = FastRM.from_pretrained(args.head)
            model, processor, _ = load_checkpoint(
                args.model, args.device, args.dtype, trust_remote_code=args.trust_remote_code
            )
            head.check_model(model)
            self._identity = Identity(model_name(model), fingerprint(model), head.fingerprint)
            self._loaded = model, processor, head
        return self._identity

    def answers(self, source: Sequence[Any]) -> Iterator[LiveAnswer]:
        """Answer a source's questions one after the other, with a progress bar on stderr."""
        from tqdm import tqdm

        from ..fastrm.answers import live_answers

        self.identity()
        model, processor, head = self._loaded
        options = {"batch": self._args.batch, "max_new_tokens": self._args.max_new_tokens}
        with tqdm(total=len(source), unit="answer", file=sys.stderr, disable=None) as bar:
            for answer in live_answers(model, processor, head, source, **options):
                yield answer
                bar.update()
