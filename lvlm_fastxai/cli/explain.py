"""Read the options of ``lvlm-fastxai explain`` and ``lvlm-fastxai estimate``, and run them.

Importing this module loads neither torch nor numpy.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ..choices import BackendName, Memory
from ..console import add_model_arguments, number_or
from ..errors import ArgumentError, printable
from ..methods import registry

if TYPE_CHECKING:
    from ..explain.explainer import Explainer
    from ..explain.explanation import Explanation
    from ..review.policy import Policy

__all__ = ["add_estimate_arguments", "add_explain_arguments", "run_estimate", "run_explain"]

MEMORY_MODES = get_args(Memory)
DEFAULT_OUT = "lvlm-fastxai-report"
OPTIONS = [option for traits in registry.METHODS.values() for option in traits.options]


def add_explain_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``lvlm-fastxai explain``."""
    _add_question(parser)
    add = parser.add_argument
    add("--out", metavar="DIR", default=DEFAULT_OUT, help="folder to write (default: %(default)s)")
    add("--json", action="store_true", help="print the explanation as JSON on stdout")
    decide = parser.add_argument_group("a decision on the answer").add_argument
    policy_help = "file that `calibrate` wrote: accept the answer or have a person look (default: no decision)"
    decide("--policy", type=Path, metavar="FILE", help=policy_help)
    queue_help = "where answers that the policy does not accept wait for `review serve` (default: none)"
    decide("--queue", type=Path, metavar="FILE", help=queue_help)


def add_estimate_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``lvlm-fastxai estimate``."""
    _add_question(parser)
    parser.add_argument("--json", action="store_true", help="print the estimate as JSON on stdout")


def _add_question(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("image", metavar="IMAGE", help="picture file (PNG, JPEG, WebP, …)")
    add("question", metavar="QUESTION", help="the question, in quotes")
    add_model_arguments(parser, model="folder of a transformers checkpoint (default: the small model that is shipped)")
    default, *_ = registry.METHODS
    meanings = "; ".join(f"{traits.name}: {traits.summary}" for traits in registry.METHODS.values())
    add("--method", choices=registry.names(), default=default, help=f"{meanings} (default: %(default)s)")
    memory_help = (
        "fast: keep activations; lean: recompute layer by layer; min: keep layer inputs off the device as well "
        "(default: %(default)s)"
    )
    add("--memory", choices=MEMORY_MODES, default=MEMORY_MODES[0], help=memory_help)
    tolerance_help = (
        "share of gradient and relevancy that may be left out at each layer, 0 to below 1; 'auto': as much as the "
        "rounding of a bfloat16 model hides, nothing in other dtypes (default: %(default)s, exact)"
    )
    add("--row-tolerance", type=number_or("auto"), default=0.0, metavar="E", help=tolerance_help)
    length_help = "longest answer, in tokens (default: %(default)s)"
    add("--max-new-tokens", type=int, default=64, metavar="N", help=length_help)
    tokens_help = (
        "which tokens of the answer to explain: all, those of content words, or the K most probable of these "
        "(default: %(default)s)"
    )
    add("--tokens", default="all", metavar="all|content|top:K", help=tokens_help)
    head_help = (
        "FastRM head of the model, for methods that need one and for the maps' entropies; 'shipped': the shipped "
        "model's (default: none, or the shipped one where it is needed and fits)"
    )
    add("--head", metavar="DIR", help=head_help)
    for traits in registry.METHODS.values():
        if traits.options:
            _add_method_options(parser.add_argument_group(f"options of --method {traits.name}"), traits)
    backend_help = "kernel to use (default: the first that works here)"
    add("--backend", choices=get_args(BackendName), help=backend_help)


def _add_method_options(group: Any, traits: registry.MethodTraits) -> None:
    for option in traits.options:
        kind: Any = str
        if option.number:
            kind = float if option.word is None else number_or(option.word)
        choices = option.choices or None
        group.add_argument(option.flag, type=kind, choices=choices, metavar=option.metavar, help=option.help)


def run_explain(args: argparse.Namespace) -> int:
    """Answer, explain, decide where a policy is given, and write the report."""
    from ..explain.explanation import prepare_directory

    folder = prepare_directory(args.out)
    _check_question(args)
    policy = _policy(args)
    with _stages() as progress, _backend(args.backend):
        explainer = _explainer(args)
        if policy is not None:
            from ..models.fingerprint import fingerprint

            assert explainer.head is not None
            policy.check(fingerprint(explainer.model), explainer.head.fingerprint)
        explanation = explainer(args.image, args.question, max_new_tokens=args.max_new_tokens, progress=progress)
    explanation.command = "lvlm-fastxai " + shlex.join(_own_arguments(args))
    queued = None if policy is None else _decide(args, policy, explanation)
    paths = explanation.save(folder)
    if args.json:
        print(json.dumps({**explanation.to_dict(), "files": {name: str(path) for name, path in paths.items()}}))
        return 0
    _tell(args, explanation, queued)
    print(f"report: {printable(paths['report'])}")
    return 0


def _tell(args: argparse.Namespace, explanation: Explanation, queued: int | None) -> None:
    """Print the answer and what was found; nothing that a model says may steer the terminal."""
    print(printable(explanation.answer, keep="\t\n"))
    seconds = explanation.seconds
    print(
        f"confidence {explanation.confidence:.1%} · answered in {seconds['generate']:.2f} s, "
        f"explained in {seconds['explain']:.2f} s ({explanation.method}, backend {explanation.backend})"
    )
    if explanation.decision is not None:
        where = "" if queued is None else f" (item {queued} of {printable(args.queue)})"
        print(f"{explanation.decision['verdict']}{where}: {explanation.decision['reason']}")
    if explanation.untouched:
        explained, left = len(explanation.tokens), len(explanation.untouched)
        print(
            f"{explained} of {explained + left} tokens explained; the others hold {explanation.untouched_share:.1%} of "
            "the answer's probability mass"
        )
    if explanation.share_of_rows < 1:
        print(
            f"pruned: {explanation.share_of_rows:.1%} of the rows visited, estimated error of a token's relevancy at "
            f"most {explanation.estimated_error:.1%}"
        )
    for note in explanation.notes:
        print(printable(f"note: {note}"))


def _policy(args: argparse.Namespace) -> Policy | None:
    """Load the file that ``--policy`` names. Raise ArgumentError if it cannot be applied."""
    if args.policy is None:
        if args.queue is not None:
            raise ArgumentError("--queue: a policy decides what goes there; give --policy, which `calibrate` writes")
        return None
    if args.tokens != "all":
        raise ArgumentError("--policy: it was fitted on all tokens of an answer; leave --tokens out")
    if _head(args) is None:
        raise ArgumentError("--policy: give --head the folder of the head that it was fitted with")
    from ..review.policy import Policy

    return Policy.load(args.policy)


def _decide(args: argparse.Namespace, policy: Policy, explanation: Explanation) -> int | None:
    """Let the policy decide on the answer. Return the number of its item in the queue, or None if it is not there."""
    from dataclasses import asdict

    features = {"entropy": explanation.entropy, "probability": explanation.confidence}
    if args.queue is None:
        explanation.decision = asdict(policy.decide(features))
        return None
    from ..review import Queue, Record, apply

    image = explanation.images[0]
    record = Record(
        picture=image.picture,
        question=explanation.question,
        answer=explanation.answer,
        features=features,
        image_map=explanation.image_map,
        region=image.region,
        model_name=explanation.model_name,
        model_fingerprint=policy.model_fingerprint,
        head_fingerprint=policy.head_fingerprint,
        sample_id=printable(args.image),  # a queue keeps text, and a file's name may not be UTF-8
        extra={"method": explanation.method},
    )
    with Queue(args.queue) as queue:
        applied = apply(policy, queue, record)
    explanation.decision = asdict(applied.decision)
    return applied.item


def run_estimate(args: argparse.Namespace) -> int:
    """Print what an explanation would cost."""
    _check_question(args)
    with _backend(args.backend):
        estimate = _explainer(args).estimate(args.image, args.question, max_new_tokens=args.max_new_tokens)
    if args.json:
        print(json.dumps(estimate.to_dict()))
        return 0
    print(
        f"at most about {estimate.seconds:.3g} s and {estimate.bytes / 2**20:.3g} MiB beyond the model, "
        f"for {estimate.sequence_length} positions, {args.max_new_tokens} of them answer"
    )
    for name, seconds in estimate.parts.items():
        print(f"  {name:<9}{seconds:.3g} s")
    return 0


def _check_question(args: argparse.Namespace) -> None:
    """Refuse what can be seen to be wrong before a model is loaded."""
    if not args.question.strip():
        raise ArgumentError("question: expected some text, got an empty question")
    if args.max_new_tokens < 1:
        raise ArgumentError(f"--max-new-tokens: expected at least 1, got {args.max_new_tokens}")
    from ..explain.relevancy_rows import check_row_tolerance
    from ..explain.token_choice import check_tokens
    from ..prompting.pictures import load_picture

    load_picture(args.image)
    check_row_tolerance(args.row_tolerance)
    check_tokens(args.tokens)
    _options(args)
    if registry.find(args.method).needs_head and _head(args) is None:
        raise ArgumentError(f"--method {args.method}: give --head the folder of a head that was trained for this model")


def _options(args: argparse.Namespace) -> Any:
    """Make the method's options from the flags that were given. Return None if there were none."""
    traits = registry.find(args.method)
    given = {option.name: getattr(args, option.name) for option in OPTIONS if getattr(args, option.name) is not None}
    for owner in registry.METHODS.values():
        foreign = [option.flag for option in owner.options if option.name in given and owner is not traits]
        if foreign:
            raise ArgumentError(f"{', '.join(foreign)}: an option of --method {owner.name}, not of {traits.name}")
    kind = traits.load_options_type()
    return kind(**given) if kind is not None and given else None


def _head(args: argparse.Namespace) -> str | None:
    """Name the head's folder. The shipped model has a head of its own, used when one is needed."""
    wanted = registry.find(args.method).needs_head or getattr(args, "policy", None) is not None
    return args.head or ("shipped" if wanted and args.model is None else None)


def _own_arguments(args: argparse.Namespace) -> list[str]:
    """Write the command again from what was parsed, without the options that were left at their defaults."""
    words = ["explain", args.image, args.question]
    defaults = {
        "method": registry.names()[0],
        "memory": MEMORY_MODES[0],
        "row_tolerance": 0.0,
        "max_new_tokens": 64,
        "tokens": "all",
        "device": "cpu",
        "dtype": "auto",
    }
    names = (
        "model",
        "method",
        "head",
        *(option.name for option in OPTIONS),
        "tokens",
        "memory",
        "row_tolerance",
        "max_new_tokens",
    )
    for name in (*names, "backend", "device", "dtype", "policy", "queue", "out"):
        value = getattr(args, name)
        if value is not None and value != defaults.get(name):
            words += ["--" + name.replace("_", "-"), str(value)]
    return words


@contextmanager
def _backend(name: BackendName | None) -> Iterator[None]:
    if name is None:
        yield
        return
    from .. import ops

    reason = ops.backends("relevancy_product").get(name, "it is not part of this build")
    if reason is not None:
        from ..errors import BackendUnavailableError

        raise BackendUnavailableError(
            f"--backend: '{name}' cannot be used here: {reason}; `lvlm-fastxai info` lists all"
        )
    with ops.use_backend(name):
        yield


def _explainer(args: argparse.Namespace) -> Explainer:
    from ..explain.explainer import Explainer
    from ..fastrm.head import FastRM
    from ..models.checkpoint import load_checkpoint

    folder = _head(args)
    head = None if folder is None else FastRM.from_pretrained(folder)
    model, processor, _ = load_checkpoint(args.model, args.device, args.dtype, trust_remote_code=args.trust_remote_code)
    return Explainer(
        model,
        processor,
        method=args.method,
        memory=args.memory,
        row_tolerance=args.row_tolerance,
        options=_options(args),
        tokens=args.tokens,
        head=head,
    )


@contextmanager
def _stages() -> Iterator[Any]:
    """Show a progress bar for the stages of an explanation, if stderr is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=1, desc="load", leave=False, bar_format="{desc:<10}{bar}| {n_fmt}/{total_fmt} [{elapsed}]") as bar:

        def progress(stage: str, done: int, total: int) -> None:
            bar.set_description(stage, refresh=False)
            bar.total, bar.n = total, done
            bar.refresh()

        yield progress
