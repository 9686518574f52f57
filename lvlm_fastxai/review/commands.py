"""``lvlm-fastxai calibrate`` and ``lvlm-fastxai review run | serve | list | export``: options, and what they do.

Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import add_model_arguments, printable, say
from ..errors import ArgumentError

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..fastrm.answers import LiveAnswer
    from .calibration import Answers, Calibration

__all__ = ["add_arguments", "add_calibrate_arguments", "run", "run_calibrate"]

PORT = 8765
SERVICE_TOKEN = "LVLM_FASTXAI_REVIEW_TOKEN"
FEATURES = ("entropy", "probability", "both")
STATES = ("open", "confirm", "correct", "reject")


def add_calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``lvlm-fastxai calibrate``."""
    add = parser.add_argument
    add(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="labelled answers: JSONL of `review run --records` or `review export`; or a source with reference "
        "answers, which is answered now: JSONL, a folder of `datasets`, or scenes:SPLIT?count=N",
    )
    add("--target", type=float, default=0.95, metavar="P", help="share of accepted answers to be right (default: 0.95)")
    delta_help = "chance that the chosen threshold misses the target (default: %(default)s)"
    add("--delta", type=float, default=0.05, metavar="D", help=delta_help)
    add("--features", choices=FEATURES, default="both", help="what the policy decides by (default: %(default)s)")
    held_help = "further inputs, of other pictures, that the finished policy is checked on; may be repeated"
    add("--held-out", action="append", default=[], metavar="INPUT", help=held_help)
    add("--out", type=Path, default=Path("policy.json"), metavar="FILE", help="policy to write (default: %(default)s)")
    plot_help = "risk–coverage plot to write (default: risk-coverage.png beside the policy, with matplotlib)"
    add("--plot", type=Path, metavar="FILE", help=plot_help)
    add("--seed", type=int, default=0, metavar="N", help="of the split into two parts (default: %(default)s)")
    add("--json", action="store_true", help="print the figures as JSON")
    _add_model(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the commands and options of ``lvlm-fastxai review``."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, summary: str, work: Any) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
        made.set_defaults(review=work)
        return made

    answer = command("run", "answer the questions of a source; accept each answer or queue it", _run_source)
    answer.add_argument("source", metavar="SOURCE", help="JSONL, a folder of `datasets`, or scenes:SPLIT?count=N")
    policy_help = "what `calibrate` wrote; without one every answer is queued"
    answer.add_argument("--policy", type=Path, metavar="FILE", help=policy_help)
    answer.add_argument("--queue", type=Path, metavar="FILE", help="SQLite file, made if there is none")
    records_help = "write the features of every answer as JSONL, which `calibrate` reads"
    answer.add_argument("--records", type=Path, metavar="FILE", help=records_help)
    answer.add_argument("--json", action="store_true", help="print the counts as JSON")
    _add_model(answer)

    serve = command("serve", "show a queue as a local web page", _serve)
    serve.add_argument("queue", type=Path, metavar="QUEUE", help="SQLite file, made if there is none")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine)")
    serve.add_argument("--port", type=int, default=PORT, help="0 for any that is free (default: %(default)s)")
    name_help = "a further host name by which browsers reach the page; may be repeated"
    serve.add_argument("--name", action="append", default=[], help=name_help)
    serve.epilog = f"Other services may POST /items with the bearer token in the environment variable {SERVICE_TOKEN}."

    listed = command("list", "list the items of a queue", _list)
    listed.add_argument("queue", type=Path, metavar="QUEUE")
    listed.add_argument("--state", choices=STATES, help="only these (default: all)")
    listed.add_argument("--search", default="", metavar="TEXT", help="only with this in question or answer")
    listed.add_argument("--limit", type=int, metavar="N", help="at most so many")
    listed.add_argument("--json", action="store_true", help="print as JSON")

    export = command("export", "write the decisions as JSONL, with the pictures beside it", _export)
    export.add_argument("queue", type=Path, metavar="QUEUE")
    export.add_argument("out", type=Path, metavar="OUT", help="JSONL file to write")


def run(args: argparse.Namespace) -> int:
    """Run one of the commands of ``lvlm-fastxai review``; 0, or FastXAIError with what to do."""
    return int(args.review(args))


def run_calibrate(args: argparse.Namespace) -> int:
    """Fit a policy, check it, write it and its plot, and print its figures; 0, or FastXAIError with what to do."""
    from .calibration import calibrate, draw

    for name in ("out", "plot"):
        path = getattr(args, name)
        if path is not None and not path.parent.is_dir():
            raise ArgumentError(f"--{name}: there is no folder '{path.parent}'")
    live = _Live(args)
    labelled = _labelled(args.inputs, live)
    held = _labelled(args.held_out, live) if args.held_out else None
    if held is not None:
        if held.identity != labelled.identity:
            raise ArgumentError("--held-out: its answers are of another model or map head than the inputs'")
        shared = len(set(labelled.groups) & set(held.groups))
        if shared:
            raise ArgumentError(f"--held-out: {shared} of its pictures are among the inputs'; a check needs others")
    calibration = calibrate(
        labelled.entropy,
        labelled.probability,
        labelled.right,
        labelled.groups,
        target=args.target,
        delta=args.delta,
        features=args.features,
        held_out=None if held is None else held.answers(),
        seed=args.seed,
        model_name=labelled.identity.model_name,
        model_fingerprint=labelled.identity.model_fingerprint,
        head_fingerprint=labelled.identity.head_fingerprint,
        source=", ".join(labelled.sources),
    )
    calibration.policy.save(args.out)
    plot = args.plot or args.out.with_name("risk-coverage.png")
    try:
        draw(calibration, plot)
        written = f"{args.out}, {plot}"
    except ArgumentError as error:
        if args.plot is not None:
            raise
        written = f"{args.out} ({error})"
    notes = [*calibration.notes, *labelled.notes, *(() if held is None else held.notes)]
    if args.json:
        print(json.dumps({**calibration.report, "policy": asdict(calibration.policy), "notes": notes}))
    else:
        print(_report(calibration))
    for note in notes:
        say(f"note: {note}")
    say(f"written: {written}")
    return 0


@dataclass(frozen=True)
class _Identity:
    """Whose answers."""

    model_name: str
    model_fingerprint: str
    head_fingerprint: str


@dataclass
class _Labelled:
    """Answers of several inputs, of one model and head."""

    identity: _Identity
    sources: list[str]
    notes: list[str]
    entropy: list[float]
    probability: list[float]
    right: list[bool]
    groups: list[str]

    def answers(self) -> Answers:
        from .calibration import Answers

        return Answers.of(self.entropy, self.probability, self.right, self.groups)


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model, where answers are generated now")
    add = group.add_argument
    add_model_arguments(group)
    add("--head", default="shipped", metavar="DIR", help="FastRM head of that model (default: the shipped one)")
    add("--batch", type=int, default=16, metavar="N", help="questions answered at once (default: %(default)s)")
    add("--max-new-tokens", type=int, default=32, metavar="N", help="longest answer (default: %(default)s)")


class _Live:
    """Model and head, loaded when the first source has to be answered."""

    def __init__(self, args: argparse.Namespace) -> None:
        for name in ("batch", "max_new_tokens"):
            if getattr(args, name) < 1:
                raise ArgumentError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
        self._args = args
        self._loaded: Any = None
        self.identity = _Identity("", "", "")

    def load(self) -> _Identity:
        if self._loaded is None:
            from ..fastrm.head import FastRM
            from ..models.checkpoint import load_checkpoint
            from ..models.fingerprint import fingerprint, model_name

            args = self._args
            head = FastRM.from_pretrained(args.head)
            model, processor, _ = load_checkpoint(args.model, args.device, args.dtype)
            head.check_model(model)
            self._loaded = model, processor, head
            self.identity = _Identity(model_name(model), fingerprint(model), head.fingerprint)
        return self.identity

    def answers(self, spec: str) -> tuple[str, Iterator[LiveAnswer]]:
        """Name of a source, and its questions answered one after the other, with a progress bar on stderr."""
        from ..prompting.sources import open_source

        source = open_source(spec)
        self.load()
        return source.spec, self._answers(source)

    def _answers(self, source: Sequence[Any]) -> Iterator[LiveAnswer]:
        from tqdm import tqdm

        from ..fastrm.answers import live_answers

        args = self._args
        model, processor, head = self._loaded
        with tqdm(total=len(source), unit="answer", file=sys.stderr, disable=None) as bar:
            options = {"batch": args.batch, "max_new_tokens": args.max_new_tokens}
            for answer in live_answers(model, processor, head, source, **options):
                yield answer
                bar.update()


def _labelled(specs: Sequence[str], live: _Live) -> _Labelled:
    """Answers whose rightness is known, from records or answered now."""
    found = _Labelled(_Identity("", "", ""), [], [], [], [], [], [])
    identities: dict[_Identity, str] = {}
    left_out = chosen_before = 0
    for spec in specs:
        records = _records(spec)
        if records is None:
            name, answers = live.answers(spec)
            records = (_record(answer, answer.sample.picture(), live.identity) for answer in answers)
        else:
            name = Path(spec).name
        found.sources.append(name)
        for number, record in enumerate(records, 1):
            entropy, probability = record.get("entropy"), record.get("probability")
            if entropy is None or probability is None or record.get("right") is None:
                left_out += 1
                continue
            if not (_is_share(entropy) and _is_share(probability)) or not isinstance(record["right"], bool):
                raise ArgumentError(f"{name}, answer {number}: expected entropy and probability in 0 … 1, right a bool")
            names = (str(record.get(key) or "") for key in ("model", "model_fingerprint", "head_fingerprint"))
            identities.setdefault(_Identity(*names), name)
            found.entropy.append(float(entropy))
            found.probability.append(float(probability))
            found.right.append(record["right"])
            group = record.get("group") or record.get("image")
            found.groups.append(str(group) if group else f"{name} {number}")
            # An export holds what a policy sent to review: its accepted answers are missing.
            chosen_before += record.get("verdict") in STATES[1:] and record.get("score") is not None
    if not found.right:
        raise ArgumentError(f"{', '.join(found.sources)}: no answer has entropy, probability and a known 'right'")
    fingerprints = {(identity.model_fingerprint, identity.head_fingerprint) for identity in identities}
    if len(fingerprints) > 1:
        raise ArgumentError(
            f"{', '.join(identities.values())}: answers of several models or map heads; give one's only"
        )
    found.identity = next(iter(identities))
    if left_out:
        found.notes.append(f"{left_out} answers of {', '.join(found.sources)} left out: no label, or no features")
    if chosen_before:
        found.notes.append(
            f"{chosen_before} of {len(found.right)} answers are in the queue because a policy sent them there: figures "
            "and promise hold for such answers, not for all; to label a fair set, `review run` without --policy"
        )
    return found


def _records(spec: str) -> Iterator[dict[str, Any]] | None:
    """Lines of a JSONL file of labelled features; None if `spec` is something else."""
    path = Path(spec)
    if path.suffix != ".jsonl" or not path.is_file():
        return None
    lines = _lines(path)
    first = next(lines, None)
    if first is None:
        raise ArgumentError(f"'{spec}' is empty")
    if not {"entropy", "probability", "right"} <= first.keys():
        return None
    return _lines(path)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ArgumentError(f"'{path}', line {number}: expected a JSON object")
                yield record
    except (OSError, ValueError) as error:
        if isinstance(error, ArgumentError):
            raise
        at = f", line {number}" if isinstance(error, json.JSONDecodeError) else ""
        reason = getattr(error, "strerror", None) or str(error)
        raise ArgumentError(f"cannot read '{path}'{at}: {reason}") from error


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _record(answer: LiveAnswer, picture: Image, identity: _Identity) -> dict[str, Any]:
    """What is kept of an answer without its picture and map."""
    from .queue import picture_digest

    return {
        "id": answer.sample.id,
        "group": picture_digest(picture),
        "question": answer.sample.question,
        "answer": answer.answer,
        "reference": answer.sample.answer,
        "kind": answer.sample.kind,
        "right": answer.right,
        "entropy": float(answer.entropy),
        "probability": float(answer.probability),
        "model": identity.model_name,
        "model_fingerprint": identity.model_fingerprint,
        "head_fingerprint": identity.head_fingerprint,
    }


def _run_source(args: argparse.Namespace) -> int:
    from .policy import Policy
    from .queue import Queue, Record

    if args.queue is None and args.records is None:
        raise ArgumentError("review run: name a --queue, or --records FILE, or both")
    if args.policy is not None and args.queue is None:
        raise ArgumentError("review run: --policy decides what goes to the --queue; name one")
    policy = None if args.policy is None else Policy.load(args.policy)
    live = _Live(args)
    identity = live.load()
    if policy is not None:
        policy.check(identity.model_fingerprint, identity.head_fingerprint)
    try:
        records = nullcontext(None) if args.records is None else args.records.open("w", encoding="utf-8")
    except OSError as error:
        raise ArgumentError(f"--records: cannot write '{args.records}': {error.strerror or error}") from error
    counts = {"answers": 0, "accepted": 0, "review": 0, "new": 0}
    with nullcontext(None) if args.queue is None else Queue(args.queue) as queue, records as file:
        spec, answers = live.answers(args.source)
        for answer in answers:
            picture = answer.sample.picture()
            line = _record(answer, picture, identity) | {"source": spec}
            decision = None if policy is None else policy.decide(answer.entropy, answer.probability)
            accepted = decision is not None and decision.accepted
            counts["answers"] += 1
            counts["accepted"] += accepted
            if queue is not None and not accepted:
                record = Record(
                    picture=picture,
                    question=answer.sample.question,
                    answer=answer.answer,
                    entropy=answer.entropy,
                    probability=answer.probability,
                    image_map=answer.image_map,
                    region=answer.region,
                    **asdict(identity),
                    sample_id=answer.sample.id,
                    extra={key: line[key] for key in ("source", "reference", "kind")},
                )
                counts["review"] += 1
                counts["new"] += queue.append(record, decision)[1]
            if file is not None:
                judged = {} if decision is None else asdict(decision)
                file.write(json.dumps(line | judged, ensure_ascii=False) + "\n")
                file.flush()
    if args.json:
        print(json.dumps(counts))
    else:
        print(f"{counts['answers']} answers of {spec}")
        if queue is not None:
            print(
                f"  {counts['accepted']} accepted, {counts['review']} to review ({counts['new']} new) in {args.queue}"
            )
        if args.records is not None:
            print(f"  features: {args.records}")
    return 0


def _serve(args: argparse.Namespace) -> int:
    from .server import serve

    if not 0 <= args.port <= 65535:
        raise ArgumentError(f"--port: expected 0 to 65535, got {args.port}")
    serve(args.queue, args.host, args.port, names=args.name, service_token=os.environ.get(SERVICE_TOKEN, ""))
    return 0


def _list(args: argparse.Namespace) -> int:
    from .queue import Queue

    with Queue(args.queue, create=False) as queue:
        items, counts = queue.items(state=args.state, search=args.search, limit=args.limit), queue.counts()
    if args.json:
        print(json.dumps({"counts": counts, "items": [asdict(item) for item in items]}, ensure_ascii=False))
        return 0
    for item in items:
        corrected = f" → {item.corrected}" if item.corrected is not None else ""
        by = f" ({item.reviewer})" if item.reviewer else ""
        score = "     –" if item.score is None else f"{item.score:6.1%}"
        text = " ".join(f"{item.question} — {item.answer}{corrected}{by}".split())
        print(printable(f"{item.id:6d}  {item.state:<8}{score}  {text}"))
    print(", ".join(f"{count} {state}" for state, count in counts.items()))
    return 0


def _export(args: argparse.Namespace) -> int:
    from .queue import Queue

    with Queue(args.queue, create=False) as queue:
        count, still = queue.export(args.out), queue.counts()["open"]
    print(f"{count} decisions written to {args.out}; {still} items are open")
    return 0


def _report(calibration: Calibration) -> str:
    """The figures as a table in plain text."""
    report = calibration.report
    parts = {"threshold part": report["threshold_part"]}
    if "held_out" in report:
        parts["held out"] = report["held_out"]
    lines = [
        f"{report['answers']} answers about {report['groups']} pictures: {report['fit']['answers']} to fit the model, "
        f"{report['threshold_part']['answers']} to choose the threshold"
    ]
    for name, part in parts.items():
        lines += ["", f"{name}: {part['answers']} answers about {part['groups']} pictures, {part['right']:.1%} right"]
        lines.append("  finds wrong answers   AUROC  95 % interval    AURC")
        for features, figures in part["figures"].items():
            lines.append(f"  {features:<20}{_figures(figures)}")
        lines.append("  " + _accepted(part))
        if name == "held out" and part["precision"] is not None:
            interval = f"{part['precision_low']:.1%} … {part['precision_high']:.1%}"
            verdict = "reaches" if part["kept"] else "stays below"
            lines.append(f"  its 95 % interval {interval} {verdict} the target {report['target']:.1%}")
    return "\n".join(lines)


def _figures(figures: Mapping[str, Any]) -> str:
    if figures["auroc"] is None:
        return f"      –                   {figures['aurc']:.4f}"
    low, high = figures["auroc_low"], figures["auroc_high"]
    interval = "" if low is None else f"{low:.3f} … {high:.3f}"
    return f"  {figures['auroc']:.3f}  {interval:<15}  {figures['aurc']:.4f}"


def _accepted(part: Mapping[str, Any]) -> str:
    if part["precision"] is None:
        return f"the policy accepts none of {part['answers']}"
    return (
        f"the policy accepts {part['accepted']} ({part['coverage']:.1%}), {part['precision']:.1%} of them right "
        f"(bound {part['precision_bound']:.1%})"
    )
