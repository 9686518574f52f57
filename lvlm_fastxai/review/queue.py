"""The queue of answers that a person has to look at: one SQLite file that is only ever added to.

Several processes may add and decide at once; what `append` or `decide` has returned from is on the disk, also after
the process or the machine is killed. Items and decisions are never changed or removed: a second thought is a further
decision, and the latest one counts.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import ArgumentError
from .policy import Decision, Policy

__all__ = ["STATES", "VERDICTS", "Applied", "Queue", "Record", "Shown", "StaleDecisionError", "apply", "picture_digest"]

VERDICTS = ("confirm", "correct", "reject", "reopen")
"""What a person can decide; "reopen" takes the decision before it back."""

STATES = ("open", "confirm", "correct", "reject")
"""Of an item: its latest verdict, or "open" without one or after "reopen"."""

WHATEVER = -1

_APPLICATION_ID = 0x6C76_6671  # "lvfq", so that no other program's database is taken for a queue
_VERSION = 1
_BUSY_SECONDS = 30.0

_APPEND_ONLY = "".join(
    f"""
CREATE TRIGGER {table}_{action.lower()} BEFORE {action} ON {table}
BEGIN SELECT RAISE(ABORT, 'the queue is append-only'); END;"""
    for table in ("pictures", "items", "decisions")
    for action in ("UPDATE", "DELETE")
) + "".join(
    # REPLACE removes the old row without asking the triggers above.
    f"""
CREATE TRIGGER {table}_replace BEFORE INSERT ON {table}
WHEN EXISTS (SELECT 1 FROM {table} WHERE {clash})
BEGIN SELECT RAISE(ABORT, 'the queue is append-only'); END;"""
    for table, clash in (
        ("pictures", "digest = NEW.digest"),
        ("items", "id = NEW.id OR digest = NEW.digest"),
        ("decisions", "id = NEW.id"),
    )
)

_TABLES = f"""
CREATE TABLE pictures (
    digest TEXT PRIMARY KEY,
    width INTEGER NOT NULL,
    height INTEGER NOT NULL,
    png BLOB NOT NULL
);
CREATE TABLE items (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    digest TEXT NOT NULL UNIQUE,
    created TEXT NOT NULL,
    picture TEXT NOT NULL REFERENCES pictures (digest),
    question TEXT NOT NULL,
    answer TEXT NOT NULL,
    map BLOB,
    map_height INTEGER,
    map_width INTEGER,
    region TEXT,
    entropy REAL,
    probability REAL,
    score REAL,
    reason TEXT NOT NULL,
    model_name TEXT NOT NULL,
    model_fingerprint TEXT NOT NULL,
    head_fingerprint TEXT NOT NULL,
    sample_id TEXT NOT NULL,
    extra TEXT NOT NULL
);
CREATE TABLE decisions (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    item INTEGER NOT NULL REFERENCES items (id),
    verdict TEXT NOT NULL CHECK (verdict IN {VERDICTS}),
    answer TEXT,
    note TEXT NOT NULL,
    reviewer TEXT NOT NULL,
    created TEXT NOT NULL,
    CHECK ((verdict = 'correct') = (answer IS NOT NULL))
);
CREATE INDEX decisions_of_item ON decisions (item, id);
CREATE VIEW shown AS
SELECT items.*, pictures.width, pictures.height,
    CASE WHEN latest.verdict IS NULL OR latest.verdict = 'reopen' THEN 'open' ELSE latest.verdict END AS state,
    latest.id AS decision, latest.answer AS corrected, latest.note, latest.reviewer, latest.created AS decided
FROM items JOIN pictures ON pictures.digest = items.picture
LEFT JOIN decisions AS latest ON latest.id = (SELECT max(id) FROM decisions WHERE item = items.id);
{_APPEND_ONLY}
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_VERSION};
"""


class StaleDecisionError(ArgumentError):
    """Somebody else has decided about the item since it was looked at."""


@dataclass(frozen=True)
class Record:
    """One answer, as it enters the queue.

    Attributes:
        picture: what the question is about; kept without loss.
        question, answer: the answer is the model's.
        entropy, probability: the policy's features; None where nobody measured them.
        image_map: (h, w) relevancy, any positive scale; None without one.
        region: (left, top, right, bottom) in pixels of the picture that the map covers; None: all of it.
        model_name, model_fingerprint, head_fingerprint: whose answer and map.
        sample_id: in the source it comes from.
        extra: anything that JSON can hold.
    """

    picture: Image.Image
    question: str
    answer: str
    entropy: float | None = None
    probability: float | None = None
    image_map: NDArray[np.float32] | None = None
    region: tuple[float, float, float, float] | None = None
    model_name: str = ""
    model_fingerprint: str = ""
    head_fingerprint: str = ""
    sample_id: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Shown:
    """An item with its latest decision. Pictures and maps are read apart (`Queue.picture`, `Queue.image_map`).

    Attributes:
        id, created, question, answer, entropy, probability, score, reason: of the item; times are UTC, ISO 8601.
        picture: digest of its picture; items with the same picture share it.
        width, height: of the picture.
        region: as in `Record`.
        has_map: whether there is a map.
        model_name, model_fingerprint, head_fingerprint, sample_id, extra: as in `Record`.
        state: one of `STATES`.
        decision: number of the latest decision; None without one.
        corrected, note, reviewer, decided: of that decision; `corrected` is None unless the state is "correct".
    """

    id: int
    created: str
    question: str
    answer: str
    entropy: float | None
    probability: float | None
    score: float | None
    reason: str
    picture: str
    width: int
    height: int
    region: tuple[float, float, float, float] | None
    has_map: bool
    model_name: str
    model_fingerprint: str
    head_fingerprint: str
    sample_id: str
    extra: Mapping[str, Any]
    state: str
    decision: int | None
    corrected: str | None
    note: str | None
    reviewer: str | None
    decided: str | None


@dataclass(frozen=True)
class Applied:
    """A decision, the item's number if it went to the queue, and whether it is new there."""

    decision: Decision
    item: int | None = None
    new: bool = False


def apply(policy: Policy, queue: Queue, record: Record) -> Applied:
    """Decide about an answer, and queue it if a person has to look at it.

    Raises:
        ModelMismatchError: the policy was fitted on another model or map head.
        ArgumentError: the record cannot be kept.
    """
    policy.check(record.model_fingerprint, record.head_fingerprint)
    decision = policy.decide(record.entropy, record.probability)
    if decision.accepted:
        return Applied(decision)
    return Applied(decision, *queue.append(record, decision))


class Queue:
    """An open queue; usable from several threads, and a context manager.

    Args:
        path: of the SQLite file.
        create: make it where there is none; else that is an error.

    Raises:
        ArgumentError: the file is no queue, is one of a newer version, or cannot be opened.
    """

    def __init__(self, path: str | Path, *, create: bool = True) -> None:
        self.path = Path(path)
        if not create and not self.path.is_file():
            raise ArgumentError(f"queue: there is no file '{path}'")
        self._lock = threading.Lock()
        try:
            self._database = sqlite3.connect(
                self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
        except sqlite3.Error as error:
            raise ArgumentError(f"queue: cannot open '{path}': {error}") from error
        self._database.row_factory = sqlite3.Row
        # SQLite's own lower() knows ASCII only.
        self._database.create_function("casefold", 1, lambda text: (text or "").casefold(), deterministic=True)
        try:
            self._prepare()
        except BaseException:
            self._database.close()
            raise

    def append(self, record: Record, decision: Decision | None = None) -> tuple[int, bool]:
        """Add an answer; once it returns, the item is on the disk.

        The same answer of the same model to the same sample is the same item, so that a run can be repeated.

        Args:
            record: the answer.
            decision: why it is here; None for answers that no policy has judged.

        Returns:
            Number of the item, and whether it was added now.

        Raises:
            ArgumentError: the record cannot be kept, or the file cannot be written.
        """
        for name in ("question", "answer", "model_name", "model_fingerprint", "head_fingerprint", "sample_id"):
            _check_text(name, getattr(record, name))
        picture = record.picture.convert("RGB")
        of_picture = picture_digest(picture)
        key = [of_picture, record.question, record.sample_id, record.model_fingerprint, record.answer]
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        image_map = None
        if record.image_map is not None:
            image_map = np.ascontiguousarray(record.image_map, dtype="<f4")
            if image_map.ndim != 2 or image_map.size == 0 or not np.isfinite(image_map).all():
                raise ArgumentError(f"image_map: expected (h, w) finite numbers, got shape {image_map.shape}")
        if record.region is not None:
            left, top, right, bottom = record.region
            most = 4 * max(picture.size)
            if not (-most <= left < right <= most and -most <= top < bottom <= most):
                raise ArgumentError(f"region: expected left < right and top < bottom, in pixels, got {record.region}")
        try:
            extra = json.dumps(dict(record.extra), ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"extra: expected what JSON can hold: {error}") from error
        row: dict[str, Any] = {
            "digest": digest,
            "created": _now(),
            "picture": of_picture,
            "question": record.question,
            "answer": record.answer,
            "map": None if image_map is None else image_map.tobytes(),
            "map_height": None if image_map is None else image_map.shape[0],
            "map_width": None if image_map is None else image_map.shape[1],
            "region": None if record.region is None else json.dumps([float(edge) for edge in record.region]),
            "entropy": _number(record.entropy),
            "probability": _number(record.probability),
            "score": None if decision is None else _number(decision.score),
            "reason": "" if decision is None else decision.reason,
            "model_name": record.model_name,
            "model_fingerprint": record.model_fingerprint,
            "head_fingerprint": record.head_fingerprint,
            "sample_id": record.sample_id,
            "extra": extra,
        }
        # Encoded outside the transaction, so that other writers do not wait for it.
        png = _png(picture)
        with self._writing() as database:
            found = database.execute("SELECT id FROM items WHERE digest = ?", (digest,)).fetchone()
            if found is not None:
                return int(found["id"]), False
            if database.execute("SELECT 1 FROM pictures WHERE digest = ?", (of_picture,)).fetchone() is None:
                database.execute("INSERT INTO pictures VALUES (?, ?, ?, ?)", (of_picture, *picture.size, png))
            names, places = ", ".join(row), ", ".join("?" * len(row))
            added = database.execute(f"INSERT INTO items ({names}) VALUES ({places})", list(row.values()))
            return int(added.lastrowid or 0), True

    def decide(
        self,
        item: int,
        verdict: str,
        *,
        answer: str | None = None,
        note: str = "",
        reviewer: str = "",
        seen: int | None = WHATEVER,
    ) -> int:
        """Add a decision; once it returns, it is on the disk.

        Args:
            item: its number.
            verdict: one of `VERDICTS`.
            answer: the right one, with "correct" only.
            note, reviewer: as given.
            seen: the item's latest decision (None: none) as the reviewer saw it; refused if there is a newer one.
                WHATEVER: not asked.

        Returns:
            Number of the decision.

        Raises:
            StaleDecisionError: there is a newer decision than `seen`.
            ArgumentError: no such item, or a verdict and answer that do not go together.
        """
        if verdict not in VERDICTS:
            raise ArgumentError(f"verdict: expected one of {', '.join(VERDICTS)}, got {verdict!r}")
        if (verdict == "correct") != (answer is not None):
            raise ArgumentError("answer: a corrected answer goes with the verdict 'correct', and with no other")
        for name, text in (("answer", answer or ""), ("note", note), ("reviewer", reviewer)):
            _check_text(name, text)
        with self._writing() as database:
            found = database.execute("SELECT answer, state, decision FROM shown WHERE id = ?", (item,)).fetchone()
            if found is None:
                raise ArgumentError(f"item: there is no item {item}")
            if seen != WHATEVER and seen != found["decision"]:
                raise StaleDecisionError(f"item {item}: somebody else has decided about it meanwhile: {found['state']}")
            if verdict == "reopen" and found["state"] == "open":
                raise ArgumentError(f"item {item}: there is no decision to take back")
            if answer is not None:
                if not answer.strip():
                    raise ArgumentError("answer: expected the right answer, got an empty one")
                if _plain(answer) == _plain(found["answer"]):
                    raise ArgumentError("answer: this is the model's own answer; confirm it instead")
            row = (item, verdict, answer and answer.strip(), note, reviewer, _now())
            added = database.execute(
                "INSERT INTO decisions (item, verdict, answer, note, reviewer, created) VALUES (?, ?, ?, ?, ?, ?)", row
            )
            return int(added.lastrowid or 0)

    def items(
        self,
        *,
        state: str | None = None,
        search: str = "",
        order: str = "oldest",
        limit: int | None = None,
        number: int | None = None,
    ) -> list[Shown]:
        """Items with their latest decisions.

        Args:
            state: one of `STATES`; None for all.
            search: text that question, answer or corrected answer must hold, case aside.
            order: "oldest", "newest" or "doubtful" (lowest score first, unscored ones before).
            limit: at most so many.
            number: only the item of this number.
        """
        if state is not None and state not in STATES:
            raise ArgumentError(f"state: expected one of {', '.join(STATES)}, got {state!r}")
        orders = {"oldest": "id", "newest": "id DESC", "doubtful": "score, id"}
        if order not in orders:
            raise ArgumentError(f"order: expected one of {', '.join(orders)}, got {order!r}")
        query = "SELECT * FROM shown WHERE (:state IS NULL OR state = :state) AND (:number IS NULL OR id = :number)"
        if search:
            texts = ("question", "answer", "corrected")
            query += f" AND ({' OR '.join(f'instr(casefold({text}), :search)' for text in texts)})"
        query += f" ORDER BY {orders[order]} LIMIT :limit"
        values = {
            "state": state,
            "number": number,
            "search": search.casefold(),
            "limit": -1 if limit is None else limit,
        }
        return [_shown(row) for row in self._read(query, values)]

    def item(self, number: int) -> Shown | None:
        """One item; None if there is none of this number."""
        return next(iter(self.items(number=number)), None)

    def counts(self) -> dict[str, int]:
        """Number of items by state, every one of `STATES`."""
        found = {row["state"]: row["n"] for row in self._read("SELECT state, count(*) AS n FROM shown GROUP BY state")}
        return {state: found.get(state, 0) for state in STATES}

    def version(self) -> tuple[int, int]:
        """Numbers of the newest item and of the newest decision: they grow whenever something is added."""
        query = "SELECT (SELECT ifnull(max(id), 0) FROM items) AS i, (SELECT ifnull(max(id), 0) FROM decisions) AS d"
        (row,) = self._read(query)
        return int(row["i"]), int(row["d"])

    def picture(self, number: int) -> bytes | None:
        """PNG of an item's picture; None if there is no such item."""
        query = "SELECT png FROM items JOIN pictures ON pictures.digest = items.picture WHERE id = ?"
        rows = self._read(query, (number,))
        return bytes(rows[0]["png"]) if rows else None

    def image_map(self, number: int) -> NDArray[np.float32] | None:
        """(h, w) map of an item; None if it has none, or there is no such item."""
        rows = self._read("SELECT map, map_height AS h, map_width AS w FROM items WHERE id = ?", (number,))
        if not rows or rows[0]["map"] is None:
            return None
        return np.frombuffer(rows[0]["map"], dtype="<f4").reshape(rows[0]["h"], rows[0]["w"]).astype(np.float32)

    def export(self, path: str | Path) -> int:
        """Write every decided item as a line of JSON, and its picture as PNG in the folder ``<stem>-images`` beside it.

        A line holds "id", "image" (relative path), "question", "answer" (confirmed or corrected; absent where
        rejected), "model_answer", "right", "entropy", "probability", "score", "verdict", "note", "reviewer", "created"
        (of the decision), "group" (answers about one picture share it), "model", "model_fingerprint",
        "head_fingerprint" and "sample". `calibrate` and the sources of `lvlm_fastxai.fastrm` read it.

        Returns:
            Number of lines.

        Raises:
            ArgumentError: a file cannot be written.
        """
        path = Path(path)
        folder = path.with_name(f"{path.stem}-images")
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        lines = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for shown in self.items():
                if shown.state == "open":
                    continue
                file = folder / f"{shown.picture[:32]}.png"  # named by content: what is there is what would be written
                if not file.is_file():
                    temporary = file.with_suffix(f".{os.getpid()}.part")
                    temporary.write_bytes(self.picture(shown.id) or b"")
                    temporary.replace(file)
                lines.append(json.dumps(_line(shown, f"{folder.name}/{file.name}"), ensure_ascii=False) + "\n")
            part.write_text("".join(lines), encoding="utf-8")
            part.replace(path)
        except OSError as error:
            raise ArgumentError(f"export: cannot write '{path}': {error.strerror or error}") from error
        return len(lines)

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def __enter__(self) -> Queue:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _prepare(self) -> None:
        """Set the connection up, and the file if it is new."""
        until = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                # Changing the journal's mode does not wait for other connections by itself.
                self._database.execute("PRAGMA journal_mode = WAL")
                break
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > until:
                    raise ArgumentError(f"queue: cannot open '{self.path}': {error}") from error
                time.sleep(0.01)
            except sqlite3.DatabaseError as error:
                raise ArgumentError(f"queue: '{self.path}' is no queue: {error}") from error
        self._database.execute("PRAGMA synchronous = FULL")
        self._database.execute("PRAGMA foreign_keys = ON")
        with self._writing() as database:
            (application,), (version,) = (
                tuple(database.execute(f"PRAGMA {name}").fetchone()) for name in ("application_id", "user_version")
            )
            (tables,) = tuple(database.execute("SELECT count(*) FROM sqlite_master").fetchone())
            if application == 0 and tables == 0:
                for statement in _statements(_TABLES):
                    database.execute(statement)
            elif application != _APPLICATION_ID:
                raise ArgumentError(f"queue: '{self.path}' is a database of another program")
            elif version != _VERSION:
                raise ArgumentError(
                    f"queue: '{self.path}' has version {version} of the queue's tables, this program knows {_VERSION}"
                )

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction that sees and excludes all other writers."""
        with self._lock:
            try:
                self._database.execute("BEGIN IMMEDIATE")
                try:
                    yield self._database
                except BaseException:
                    self._database.execute("ROLLBACK")
                    raise
                self._database.execute("COMMIT")
            except (sqlite3.Error, OverflowError) as error:
                raise ArgumentError(f"queue: cannot write '{self.path}': {error}") from error

    def _read(self, query: str, values: Any = ()) -> list[sqlite3.Row]:
        with self._lock:
            try:
                return self._database.execute(query, values).fetchall()
            except (sqlite3.Error, OverflowError) as error:
                raise ArgumentError(f"queue: cannot read '{self.path}': {error}") from error


def picture_digest(picture: Image.Image) -> str:
    """SHA-256 over a picture's size and RGB pixels: the same for every file format that keeps them."""
    pixels = picture.convert("RGB")
    return hashlib.sha256(b"%d %d " % pixels.size + pixels.tobytes()).hexdigest()


def _statements(script: str) -> Iterator[str]:
    """One after the other: `executescript` would commit the transaction that it runs in."""
    statement = ""
    for line in script.splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _shown(row: sqlite3.Row) -> Shown:
    names = set(Shown.__dataclass_fields__) - {"region", "has_map", "extra"}
    return Shown(
        **{name: row[name] for name in names},
        region=None if row["region"] is None else tuple(json.loads(row["region"])),
        has_map=row["map"] is not None,
        extra=json.loads(row["extra"]),
    )


def _line(shown: Shown, image: str) -> dict[str, Any]:
    right_answer = {"confirm": shown.answer, "correct": shown.corrected}.get(shown.state)
    return {
        "id": str(shown.id),
        "image": image,
        "question": shown.question,
        **({} if right_answer is None else {"answer": right_answer}),
        "model_answer": shown.answer,
        "right": shown.state == "confirm",
        "entropy": shown.entropy,
        "probability": shown.probability,
        "score": shown.score,
        "verdict": shown.state,
        "note": shown.note,
        "reviewer": shown.reviewer,
        "created": shown.decided,
        "group": shown.picture,
        "model": shown.model_name,
        "model_fingerprint": shown.model_fingerprint,
        "head_fingerprint": shown.head_fingerprint,
        "sample": shown.sample_id,
    }


def _png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def _plain(text: str) -> str:
    """White space and case aside, as answers are compared."""
    return " ".join(text.split()).casefold()


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ArgumentError(f"{name}: expected text, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(f"{name}: expected text, got half of a surrogate pair at {error.start}") from error


def _number(value: float | None) -> float | None:
    """SQLite's NULL stands for no number; it would store NaN as that anyway."""
    return None if value is None or not np.isfinite(value) else float(value)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
