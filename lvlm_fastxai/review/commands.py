"""``lvlm-fastxai review run | serve | list | export | backup``: options, and what they do.

Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import argparse
import json
import os
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, printable
from .calibrate_command import add_calibrate_arguments, run_calibrate
from .live import Live, add_live_arguments

if TYPE_CHECKING:
    from ..fastrm.answers import LiveAnswer
    from .policy import Identity, Policy
    from .queue import Queue
    from .records import RecordsFile

__all__ = ["add_arguments", "add_calibrate_arguments", "run", "run_calibrate"]

PORT = 8765
SERVICE_TOKEN = "LVLM_FASTXAI_REVIEW_TOKEN"
STATES = ("open", "confirm", "correct", "reject")


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
    records_help = "write the features of every answer as JSONL, which `calibrate` reads; FILE.part until all are there"
    answer.add_argument("--records", type=Path, metavar="FILE", help=records_help)
    answer.add_argument("--json", action="store_true", help="print the counts as JSON")
    add_live_arguments(answer)

    serve = command("serve", "show a queue as a local web page, whose address holds a secret", _serve)
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

    backup = command("backup", "copy a queue into one file, also while it is in use", _backup)
    backup.add_argument("queue", type=Path, metavar="QUEUE")
    backup.add_argument("out", type=Path, metavar="OUT", help="file to write; an earlier copy is replaced")


def run(args: argparse.Namespace) -> int:
    """Run one of the commands of ``lvlm-fastxai review``.

    Returns:
        0.

    Raises:
        FastXAIError: with what to do.
    """
    return int(args.review(args))


def _run_source(args: argparse.Namespace) -> int:
    """Answer a source's questions; everything that is given is opened and checked before anything is written."""
    from ..prompting.sources import open_source
    from .policy import Policy
    from .queue import Queue
    from .records import RecordsFile

    if args.queue is None and args.records is None:
        raise ArgumentError("review run: name a --queue, or --records FILE, or both")
    if args.policy is not None and args.queue is None:
        raise ArgumentError("review run: --policy decides what goes to the --queue; name one")
    policy = None if args.policy is None else Policy.load(args.policy)
    live = Live(args)
    source = open_source(args.source)
    identity = live.identity()
    if policy is not None:
        policy.check(identity.model_fingerprint, identity.head_fingerprint)
    with ExitStack() as opened:
        records = None if args.records is None else opened.enter_context(RecordsFile(args.records))
        queue = None if args.queue is None else opened.enter_context(Queue(args.queue))
        run = _Run(identity, source.spec, policy, queue, records)
        for answer in live.answers(source):
            run.take(answer)
    if args.json:
        print(json.dumps(run.counts))
        return 0
    print(f"{run.counts['answers']} answers of {printable(source.spec)}")
    if queue is not None:
        judged = "{accepted} accepted, {review} to review ({new} new)".format(**run.counts)
        print(f"  {judged} in {printable(args.queue)}")
    if records is not None:
        print(f"  features: {printable(args.records)}")
    return 0


class _Run:
    """Takes the answers of one run: a line of records of each, and to the queue those that are not accepted."""

    def __init__(
        self, identity: Identity, spec: str, policy: Policy | None, queue: Queue | None, records: RecordsFile | None
    ) -> None:
        self._identity, self._spec, self._policy, self._queue, self._records = identity, spec, policy, queue, records
        self.counts = {"answers": 0, "accepted": 0, "review": 0, "new": 0}

    def take(self, answer: LiveAnswer) -> None:
        from .records import record_line

        picture = answer.sample.picture()
        line = record_line(answer, picture, self._identity) | {"source": self._spec}
        decision = None if self._policy is None else self._policy.decide(answer.features)
        accepted = decision is not None and decision.accepted
        self.counts["answers"] += 1
        self.counts["accepted"] += accepted
        if self._queue is not None and not accepted:
            from .items import Record

            record = Record(
                picture=picture,
                question=answer.sample.question,
                answer=answer.answer,
                features=answer.features,
                image_map=answer.image_map,
                region=answer.region,
                **asdict(self._identity),
                sample_id=answer.sample.id,
                extra={key: line[key] for key in ("source", "reference", "kind")},
            )
            self.counts["review"] += 1
            self.counts["new"] += self._queue.append(record, decision)[1]
        if self._records is not None:
            self._records.write(line | ({} if decision is None else asdict(decision)))


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
        print(json.dumps({"counts": counts, "items": [asdict(item) for item in items]}))
        return 0
    for item in items:
        corrected = f" → {item.corrected}" if item.corrected is not None else ""
        by = f" ({item.reviewer})" if item.reviewer else ""
        score = "     –" if item.score is None else f"{item.score:6.1%}"
        text = printable(" ".join(f"{item.question} — {item.answer}{corrected}{by}".split()))
        print(f"{item.id:6d}  {item.state:<8}{score}  {text}")
    print(", ".join(f"{count} {state}" for state, count in counts.items()))
    return 0


def _export(args: argparse.Namespace) -> int:
    from .queue import Queue

    with Queue(args.queue, create=False) as queue:
        count, still = queue.export(args.out), queue.counts()["open"]
    print(f"{count} decisions written to {printable(args.out)}; {still} items are open")
    return 0


def _backup(args: argparse.Namespace) -> int:
    from .export import backup

    print(f"{backup(args.queue, args.out)} items copied to {printable(args.out)}")
    return 0
