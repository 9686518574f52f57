"""The command line ``lvlm-fastxai``.

Nothing heavy is imported before it is needed, so ``--help`` answers at once. Bad input ends with exit code 2 and one
line on stderr that says what to do, an interruption with 130.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import add_model_arguments, number_or, printable, say
from .errors import ArgumentError, FastXAIError

if TYPE_CHECKING:
    from .explain.explainer import Explainer
    from .explain.explanation import Explanation
    from .methods import GlimpseOptions
    from .ops import BackendName
    from .review.policy import Policy

METHODS = ("chefer", "lvlm_interpret", "glimpse", "raw_attention", "fastrm")
OPTIONS = ("propagation", "stats_domain", "head_temperature", "depth_rate", "layers")  # of --method glimpse
MEMORY_MODES = ("fast", "lean", "min")
BACKENDS = ("cuda", "triton", "cpu", "reference")
BAD_INPUT, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; those of the process by default.

    Returns:
        0, or 2 for bad input, or 130 when interrupted; the reason is on stderr, in one line.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # OpenMP's waiting threads spin by default, which slows a small model tenfold when other programs share the cores.
    # Read when torch is first imported; a user's own setting stays.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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


def _fail(message: str) -> int:
    say("lvlm-fastxai: error: " + " ".join(message.split()))
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
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, summary: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    explain = command(
        "explain",
        "answer a question about an image and write a relevancy map for every token of the answer",
        "lvlm-fastxai explain photo.png 'what is left of the tree?' --model llava-1.5-7b-hf --memory lean --out report",
    )
    _add_question(explain)
    explain.add_argument(
        "--out", metavar="DIR", default="lvlm-fastxai-report", help="folder to write (default: %(default)s)"
    )
    explain.add_argument("--json", action="store_true", help="print the explanation as JSON on stdout")
    decide = explain.add_argument_group("a decision on the answer")
    decide.add_argument(
        "--policy", type=Path, metavar="FILE", help="accept the answer or have a person look; from `calibrate`"
    )
    decide.add_argument(
        "--queue",
        type=Path,
        metavar="FILE",
        help="where answers that the policy does not accept wait for `review serve`",
    )
    explain.set_defaults(run=_explain)

    estimate = command(
        "estimate",
        "say what an explanation will cost in time and memory, before anything is run",
        "lvlm-fastxai estimate photo.png 'what is left of the tree?' --model llava-1.5-7b-hf",
    )
    _add_question(estimate)
    estimate.add_argument("--json", action="store_true", help="print the estimate as JSON on stdout")
    estimate.set_defaults(run=_estimate)

    info = command(
        "info", "show versions, what was built, and which backends work here and why others do not", "lvlm-fastxai info"
    )
    info.add_argument("--json", action="store_true", help="print as JSON")
    info.set_defaults(run=_info)

    evaluate = command(
        "evaluate",
        "measure how well the maps point at the evidence, on scenes whose evidence is known",
        "lvlm-fastxai evaluate --help",
    )
    fastrm = command(
        "fastrm",
        "distil exact maps into a head that predicts them while the model talks: build-maps, train, evaluate",
        "lvlm-fastxai fastrm build-maps vqa.jsonl --model llava-1.5-7b-hf --out maps",
    )
    calibrate = command(
        "calibrate",
        "fit a policy on labelled answers: accept so many that a stated share of them is right",
        "lvlm-fastxai calibrate labelled.jsonl --target 0.95 --out policy.json",
    )
    review = command(
        "review",
        "answer questions under a policy, and show the others to a person: run, serve, list, export, backup",
        "lvlm-fastxai review serve queue.db",
    )
    # Their options live beside their code, which need not be imported for the other commands.
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    if chosen == "evaluate":
        from . import evaluate as evaluation

        evaluation.add_arguments(evaluate)
        evaluate.set_defaults(run=evaluation.run)
    elif chosen == "fastrm":
        from .fastrm import commands as distillation

        distillation.add_arguments(fastrm)
        fastrm.set_defaults(run=distillation.run)
    elif chosen in ("calibrate", "review"):
        from .review import commands as reviewing

        reviewing.add_calibrate_arguments(calibrate)
        calibrate.set_defaults(run=reviewing.run_calibrate)
        reviewing.add_arguments(review)
        review.set_defaults(run=reviewing.run)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *unused: Any) -> None:
        from . import __version__

        print(f"lvlm-fastxai {__version__}")
        parser.exit()


def _add_question(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="picture file (PNG, JPEG, WebP, …)")
    parser.add_argument("question", metavar="QUESTION", help="the question, in quotes")
    add_model_arguments(parser, model="folder of a transformers checkpoint (default: the small model that is shipped)")
    parser.add_argument("--method", choices=METHODS, default=METHODS[0], help="default: %(default)s")
    parser.add_argument(
        "--memory",
        choices=MEMORY_MODES,
        default=MEMORY_MODES[0],
        help="fast: keep activations; lean: recompute layer by layer; min: keep layer inputs off the device as well "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--row-tolerance",
        type=number_or("auto"),
        default=0.0,
        metavar="E",
        help="share of gradient and relevancy that may be left out at each layer, 0 to below 1; 'auto': as much as the "
        "rounding of a bfloat16 model hides, nothing in other dtypes (default: %(default)s, exact)",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="longest answer, in tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens",
        default="all",
        metavar="all|content|top:K",
        help="which tokens of the answer to explain: all, those of content words, or the K most probable of these "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--head",
        metavar="DIR",
        help="FastRM head of the model, for --method fastrm and for the maps' entropies ('shipped': the shipped "
        "model's)",
    )
    glimpse = parser.add_argument_group("options of --method glimpse")
    glimpse.add_argument(
        "--propagation",
        choices=("literal", "identity"),
        help="literal: the product of 2I + αE, as the paper writes it (default); identity: of I + αE",
    )
    glimpse.add_argument(
        "--stats-domain",
        choices=("full", "causal"),
        help="columns over which attention gradients are summed for the weights of heads and layers: all of them "
        "(default, as published code does), or those that a row sees",
    )
    glimpse.add_argument(
        "--head-temperature", type=float, metavar="L", help="temperature of the weights of heads (default: 0.5)"
    )
    glimpse.add_argument(
        "--depth-rate",
        type=number_or("scaled"),
        metavar="L",
        help="how much upper layers count for more; 'scaled': 12.8 over the number of layers (default: 0.2)",
    )
    glimpse.add_argument(
        "--layers", metavar="all|top:F", help="take the share F of the layers only, from the top (default: all)"
    )
    parser.add_argument("--backend", choices=BACKENDS, help="kernel to use; default: the first that works here")


def _explain(args: argparse.Namespace) -> int:
    from .explain.explanation import prepare_directory

    folder = prepare_directory(args.out)
    _check_question(args)
    policy = _policy(args)
    with _stages() as progress, _backend(args.backend):
        explainer = _explainer(args)
        if policy is not None:
            from .models.fingerprint import fingerprint

            assert explainer.head is not None
            policy.check(fingerprint(explainer.model), explainer.head.fingerprint)
        explanation = explainer(args.image, args.question, max_new_tokens=args.max_new_tokens, progress=progress)
    explanation.command = "lvlm-fastxai " + shlex.join(_own_arguments(args))
    queued = None if policy is None else _decide(args, policy, explanation)
    paths = explanation.save(folder)
    if args.json:
        print(json.dumps({**explanation.to_dict(), "files": {name: str(path) for name, path in paths.items()}}))
        return 0
    print(printable(explanation.answer))
    seconds = explanation.seconds
    print(
        f"confidence {explanation.confidence:.1%} · answered in {seconds['generate']:.2f} s, "
        f"explained in {seconds['explain']:.2f} s ({explanation.method}, backend {explanation.backend})"
    )
    if explanation.decision is not None:
        where = "" if queued is None else f" (item {queued} of {args.queue})"
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
    print(f"report: {paths['report']}")
    return 0


def _policy(args: argparse.Namespace) -> Policy | None:
    """What `--policy` names; ArgumentError where it cannot be applied."""
    if args.policy is None:
        if args.queue is not None:
            raise ArgumentError("--queue: a policy decides what goes there; give --policy, which `calibrate` writes")
        return None
    if args.tokens != "all":
        raise ArgumentError("--policy: it was fitted on all tokens of an answer; leave --tokens out")
    if _head(args) is None:
        raise ArgumentError("--policy: give --head the folder of the head that it was fitted with")
    from .review.policy import Policy

    return Policy.load(args.policy)


def _decide(args: argparse.Namespace, policy: Policy, explanation: Explanation) -> int | None:
    """Have the policy decide on the answer; the number of its item in the queue, if it went there."""
    from dataclasses import asdict

    features = {"entropy": explanation.entropy, "probability": explanation.confidence}
    if args.queue is None:
        explanation.decision = asdict(policy.decide(features))
        return None
    from .review import Queue, Record, apply

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
        sample_id=str(args.image),
        extra={"method": explanation.method},
    )
    with Queue(args.queue) as queue:
        applied = apply(policy, queue, record)
    explanation.decision = asdict(applied.decision)
    return applied.item


def _estimate(args: argparse.Namespace) -> int:
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


def _info(args: argparse.Namespace) -> int:
    from . import info

    found = info.collect()
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        print(info.format_text(found))
    return 0


def _check_question(args: argparse.Namespace) -> None:
    """What can be seen to be wrong before a model is loaded."""
    if not args.question.strip():
        raise ArgumentError("question: expected some text, got an empty question")
    if args.max_new_tokens < 1:
        raise ArgumentError(f"--max-new-tokens: expected at least 1, got {args.max_new_tokens}")
    from .explain.relevancy_rows import check_row_tolerance
    from .explain.token_choice import check_tokens
    from .prompting.pictures import load_picture

    load_picture(args.image)
    check_row_tolerance(args.row_tolerance)
    check_tokens(args.tokens)
    _options(args)
    if args.method == "fastrm" and _head(args) is None:
        raise ArgumentError("--method fastrm: give --head the folder of a head that was trained for this model")


def _options(args: argparse.Namespace) -> GlimpseOptions | None:
    """Of the method, as far as any was given."""
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    if given and args.method != "glimpse":
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ArgumentError(f"{names}: an option of --method glimpse, not of {args.method}")
    if args.method != "glimpse":
        return None
    from .methods import GlimpseOptions

    return GlimpseOptions(**given)


def _head(args: argparse.Namespace) -> str | None:
    """The head's folder; the shipped model's own is at hand where one is needed."""
    wanted = args.method == "fastrm" or getattr(args, "policy", None) is not None
    return args.head or ("shipped" if wanted and args.model is None else None)


def _own_arguments(args: argparse.Namespace) -> list[str]:
    """The command again, from what was parsed: what was left at its default is left out."""
    words = ["explain", args.image, args.question]
    defaults = {
        "method": METHODS[0],
        "memory": MEMORY_MODES[0],
        "row_tolerance": 0.0,
        "max_new_tokens": 64,
        "tokens": "all",
        "device": "cpu",
        "dtype": "auto",
    }
    names = ("model", "method", "head", *OPTIONS, "tokens", "memory", "row_tolerance", "max_new_tokens")
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
    from . import ops

    reason = ops.backends("relevancy_product").get(name, "it is not part of this build")
    if reason is not None:
        from .errors import BackendUnavailableError

        raise BackendUnavailableError(
            f"--backend: '{name}' cannot be used here: {reason}; `lvlm-fastxai info` lists all"
        )
    with ops.use_backend(name):
        yield


def _explainer(args: argparse.Namespace) -> Explainer:
    from .explain.explainer import Explainer
    from .fastrm.head import FastRM
    from .models.checkpoint import load_checkpoint

    folder = _head(args)
    head = None if folder is None else FastRM.from_pretrained(folder)
    model, processor, _ = load_checkpoint(args.model, args.device, args.dtype)
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
    """A progress bar on stderr for the stages of an explanation, where stderr is a terminal."""
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


if __name__ == "__main__":
    sys.exit(main())
