"""Features of answers as lines of JSON: written by `review run --records` and `review export`, read by `calibrate`."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import say
from ..errors import ArgumentError, printable
from ..files import write_error
from .features import FEATURES, listed_values, parse_features
from .policy import Identity

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..fastrm.answers import LiveAnswer
    from .answers import Answers
    from .live import Live

__all__ = ["Labelled", "RecordsFile", "read_labelled", "record_line"]

DECIDED = ("confirm", "correct", "reject")


def record_line(answer: LiveAnswer, picture: Image, identity: Identity) -> dict[str, Any]:
    """Return what is kept of an answer without its picture and map."""
    from .items import picture_digest

    return {
        "id": answer.sample.id,
        "group": picture_digest(picture),
        "question": answer.sample.question,
        "answer": answer.answer,
        "reference": answer.sample.answer,
        "kind": answer.sample.kind,
        "right": answer.right,
        "features": {name: float(value) for name, value in answer.features.items()},
        "model": identity.model_name,
        "model_fingerprint": identity.model_fingerprint,
        "head_fingerprint": identity.head_fingerprint,
    }


class RecordsFile:
    """A file of lines that takes its name when the run is complete; a context manager.

    Until then the lines are in ``<name>.part`` beside it, which stays where a run fails, is interrupted or killed. An
    earlier file of the name is untouched until it is replaced.

    Args:
        path: of the file, which may be there.
        argument: name that the message of an error begins with.

    Raises:
        ArgumentError: the name is a link's, a folder's or a device's, the lines of an earlier run are in the way, or
            the file cannot be made.
    """

    def __init__(self, path: Path, argument: str = "--records") -> None:
        self._path, self._argument = path, argument
        self.part = path.with_name(f"{path.name}.part")
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise ArgumentError(f"{argument}: '{path}' is a link, a folder or a device; name a file")
        try:
            # Made anew: neither a file nor a link that is there already is written to.
            descriptor = os.open(self.part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        except FileExistsError:
            raise ArgumentError(
                f"{argument}: '{self.part}' holds the answers of a run that did not end; move or delete it first"
            ) from None
        except OSError as error:
            raise self._error(error) from error
        self._file = os.fdopen(descriptor, "wb", buffering=0)
        self._count = self._whole = 0

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line.

        Raises:
            ArgumentError: the disk is full, or cannot be written.
        """
        # A lone surrogate becomes the escape that JSON has for it.
        rest = (json.dumps(line, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
        size = len(rest)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise self._error(error) from error
        self._count, self._whole = self._count + 1, self._whole + size

    def __enter__(self) -> RecordsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        with self._file:
            if kind is not None:
                with contextlib.suppress(OSError):
                    self._file.truncate(self._whole)  # a line that did not fit
            else:
                self._finish()
                return
        if self._count:
            say(f"note: the {self._count} answers until here are in {printable(self.part)}")
        else:
            self.part.unlink(missing_ok=True)

    def _finish(self) -> None:
        try:
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self.part, self._path)
        except OSError as error:
            raise self._error(error) from error

    def _error(self, error: OSError) -> ArgumentError:
        return write_error(self._path, error, self._argument)


@dataclass
class Labelled:
    """Answers of several inputs, of one model and head.

    Attributes:
        identity: whose answers.
        sources: names of the inputs.
        rows: of each answer its features, whether it is right, and its picture.
        notes: what a reader must know, in sentences.
    """

    identity: Identity = field(default_factory=Identity)
    sources: list[str] = field(default_factory=list)
    rows: list[tuple[dict[str, float], bool, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the features that every answer has."""
        return tuple(name for name in FEATURES if all(name in row[0] for row in self.rows))

    def answers(self) -> Answers:
        """Return them as arrays."""
        from .answers import Answers

        features = {name: [row[0][name] for row in self.rows] for name in self.features}
        return Answers.of(features, [row[1] for row in self.rows], [row[2] for row in self.rows])


def read_labelled(specs: Sequence[str], live: Live, features: str | Sequence[str] | None = None) -> Labelled:
    """Collect answers whose rightness is known, from records or answered now.

    Args:
        specs: inputs: a JSONL file of records, or a source that `open_source` opens.
        live: answers the questions of sources.
        features: that an answer needs to be taken; None: all that some answer of every input has.

    Raises:
        ArgumentError: an input cannot be read or makes no sense, the answers are of several models, or there are none.
    """
    inputs = [_read_input(spec, live) for spec in specs]
    found = Labelled(sources=[name for name, _ in inputs])
    names = ", ".join(found.sources)
    if features is None:
        known = [set().union(*(line.features for line in lines)) for _, lines in inputs]
        wanted = tuple(name for name in FEATURES if all(name in of_input for of_input in known))
    else:
        wanted = parse_features(features)
    identities: dict[Identity, str] = {}
    taken = []
    for name, lines in inputs:
        for line in lines:
            if line.right is not None and wanted and set(wanted) <= line.features.keys():
                taken.append(line)
                identities.setdefault(line.identity, name)
    if not taken:
        raise ArgumentError(f"{names}: no answer has {', '.join(wanted or FEATURES)} and a known 'right'")
    if len({(identity.model_fingerprint, identity.head_fingerprint) for identity in identities}) > 1:
        raise ArgumentError(
            f"{', '.join(identities.values())}: answers of several models or map heads; give one's only"
        )
    found.identity = next(iter(identities))
    found.rows = [(line.features, bool(line.right), line.group) for line in taken]
    if left_out := sum(len(lines) for _, lines in inputs) - len(taken):
        found.notes.append(f"{left_out} answers of {names} left out: no label, or no {' or no '.join(wanted)}")
    # An export holds what a policy sent to review: its accepted answers are missing.
    if chosen := sum(line.chosen for line in taken):
        found.notes.append(
            f"{chosen} of {len(taken)} answers are in the queue because a policy sent them there: figures "
            "and promise hold for such answers, not for all; to label a fair set, `review run` without --policy"
        )
    return found


@dataclass(frozen=True)
class _Line:
    """One answer of an input. `chosen`: a policy had sent it to review."""

    features: dict[str, float]
    right: bool | None
    group: str
    identity: Identity
    chosen: bool


def _read_input(spec: str, live: Live) -> tuple[str, list[_Line]]:
    """Return the name of an input and its answers."""
    path = Path(spec)
    records: Iterator[Mapping[str, Any]]
    if _holds_records(path):
        name, records = path.name, _lines(path)
    else:
        from ..prompting.sources import open_source

        source = open_source(spec)
        name, identity = source.spec, live.identity()
        records = (record_line(answer, answer.sample.picture(), identity) for answer in live.answers(source))
    return name, [_checked(record, name, number) for number, record in enumerate(records, 1)]


def _holds_records(path: Path) -> bool:
    """Whether a file holds records rather than questions."""
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    first = next(_lines(path), None)
    if first is None:
        raise ArgumentError(f"'{path}' is empty")
    return "right" in first and ("features" in first or bool(listed_values(first)))


def _checked(record: Mapping[str, Any], name: str, number: int) -> _Line:
    right, values = record.get("right"), listed_values(record)
    features = {feature: values[feature] for feature in FEATURES if values.get(feature) is not None}
    if not all(map(_is_share, features.values())) or not (right is None or isinstance(right, bool)):
        raise ArgumentError(f"{name}, answer {number}: expected {', '.join(FEATURES)} in 0 … 1, right a bool")
    group = record.get("group") or record.get("image")
    return _Line(
        {feature: float(value) for feature, value in features.items()},
        right,
        str(group) if group else f"{name} {number}",
        Identity(*(str(record.get(key) or "") for key in ("model", "model_fingerprint", "head_fingerprint"))),
        record.get("verdict") in DECIDED and record.get("score") is not None,
    )


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ArgumentError(f"'{path}', line {number}: expected a JSON object")
                yield record
    except RecursionError:
        raise ArgumentError(f"cannot read '{path}', line {number}: it is nested too deeply") from None
    except (OSError, ValueError) as error:
        if isinstance(error, ArgumentError):
            raise
        at = f", line {number}" if isinstance(error, json.JSONDecodeError) else ""
        reason = getattr(error, "strerror", None) or str(error)
        raise ArgumentError(f"cannot read '{path}'{at}: {reason}") from error


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
