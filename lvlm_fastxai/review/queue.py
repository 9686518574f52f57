"""The queue of answers that a person has to look at: one SQLite file that is only ever added to.

Several processes may add and decide at once. What `append` or `decide` has returned from is on the disk and in that
one file, also after the process or the machine is killed. Items and decisions are never changed or removed: a second
thought is a further decision, and the latest one counts.
"""

from __future__ import annotations

import io
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import ArgumentError
from .connection import connect, create_private, make_private
from .items import STATES, Record, Shown, State, check_text, now, row_of, shown_row
from .policy import Decision, Policy
from .schema import VERDICTS, check_file, prepare

__all__ = ["Applied", "Queue", "QueueLostError", "StaleDecisionError", "apply"]

Verdict = Literal["confirm", "correct", "reject", "reopen"]
Order = Literal["oldest", "newest", "doubtful"]
_ORDERS = {"oldest": "id", "newest": "id DESC", "doubtful": "score, id"}

WHATEVER = -1

# One at a time: a file that is opened and closed to create it drops the locks of a connection made meanwhile.
_OPENING = threading.Lock()


class StaleDecisionError(ArgumentError):
    """Somebody else has decided about the item since it was looked at."""


class QueueLostError(ArgumentError):
    """The file of an open queue has been deleted, moved or replaced."""


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
    decision = policy.decide(record.features)
    if decision.accepted:
        return Applied(decision)
    return Applied(decision, *queue.append(record, decision))


class Queue:
    """An open queue; usable from several threads, and a context manager.

    Args:
        path: of the SQLite file. It is readable and writable by its owner alone.
        create: make it where there is none; else that is an error.

    Raises:
        ArgumentError: the file is not a queue, is one of a newer version, or cannot be opened.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, Queue(Path(folder) / "queue.db") as queue:
        ...     number, new = queue.append(Record(Image.new("RGB", (8, 8)), "what is it?", "a square"))
        ...     decision = queue.decide(number, "confirm")
        ...     queue.item(number).state
        'confirm'
    """

    def __init__(self, path: str | Path, *, create: bool = True) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        try:
            with _OPENING:
                self._open(create)
        except (OSError, sqlite3.Error) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ArgumentError(f"queue: cannot open '{path}': {reason}") from error

    def _open(self, create: bool) -> None:
        if create:
            create_private(self.path)
        elif not self.path.is_file():
            raise ArgumentError(f"queue: there is no file '{self.path}'")
        check_file(self.path)
        self._file = _identity(self.path)
        make_private(self.path)
        self._database = connect(self.path)
        try:
            self._database.row_factory = sqlite3.Row
            # SQLite's own lower() knows ASCII only.
            self._database.create_function("casefold", 1, lambda text: (text or "").casefold(), deterministic=True)
            prepare(self._database, self.path)
            self._check_file()
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
        row = row_of(record, decision)
        # Encoded outside the transaction, so that other writers do not wait for it.
        picture = record.picture.convert("RGB")
        png = _png(picture)
        with self._writing() as database:
            found = database.execute("SELECT id FROM items WHERE digest = ?", (row["digest"],)).fetchone()
            if found is not None:
                return int(found["id"]), False
            if database.execute("SELECT 1 FROM pictures WHERE digest = ?", (row["picture"],)).fetchone() is None:
                database.execute("INSERT INTO pictures VALUES (?, ?, ?, ?)", (row["picture"], *picture.size, png))
            return _insert(database, "items", row), True

    def decide(
        self,
        item: int,
        verdict: Verdict,
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
            check_text(name, text)
        with self._writing() as database:
            found = database.execute("SELECT answer, state, decision FROM shown WHERE id = ?", (item,)).fetchone()
            if found is None:
                raise ArgumentError(f"item: there is no item {item}")
            if seen != WHATEVER and seen != found["decision"]:
                raise StaleDecisionError(f"item {item}: somebody else has decided about it meanwhile: {found['state']}")
            if verdict == "reopen" and found["state"] == "open":
                raise ArgumentError(f"item {item}: there is no decision to take back")
            if answer is not None:
                _check_correction(answer, found["answer"])
            row = {"item": item, "verdict": verdict, "answer": answer and answer.strip()}
            return _insert(database, "decisions", row | {"note": note, "reviewer": reviewer, "created": now()})

    def items(
        self,
        *,
        state: State | None = None,
        search: str = "",
        order: Order = "oldest",
        limit: int | None = None,
        number: int | None = None,
    ) -> list[Shown]:
        """Return items with their latest decisions.

        Args:
            state: one of `STATES`; None for all.
            search: text that question, answer or corrected answer must hold, case aside.
            order: "oldest", "newest" or "doubtful" (lowest score first, unscored ones before).
            limit: at most so many.
            number: only the item of this number.
        """
        if state is not None and state not in STATES:
            raise ArgumentError(f"state: expected one of {', '.join(STATES)}, got {state!r}")
        if order not in _ORDERS:
            raise ArgumentError(f"order: expected one of {', '.join(_ORDERS)}, got {order!r}")
        query = "SELECT * FROM shown WHERE (:state IS NULL OR state = :state) AND (:number IS NULL OR id = :number)"
        if search:
            texts = ("question", "answer", "corrected")
            query += f" AND ({' OR '.join(f'instr(casefold({text}), :search)' for text in texts)})"
        query += f" ORDER BY {_ORDERS[order]} LIMIT :limit"
        values = {
            "state": state,
            "number": number,
            "search": check_text("search", search).casefold(),
            "limit": -1 if limit is None else limit,
        }
        return [shown_row(row) for row in self._read(query, values)]

    def item(self, number: int) -> Shown | None:
        """Return one item; None if there is none of this number."""
        return next(iter(self.items(number=number)), None)

    def counts(self) -> dict[str, int]:
        """Return the number of items by state, every one of `STATES`."""
        found = {row["state"]: row["n"] for row in self._read("SELECT state, count(*) AS n FROM shown GROUP BY state")}
        return {state: found.get(state, 0) for state in STATES}

    def version(self) -> tuple[int, int]:
        """Return the numbers of the newest item and of the newest decision: they grow whenever something is added."""
        query = "SELECT (SELECT ifnull(max(id), 0) FROM items) AS i, (SELECT ifnull(max(id), 0) FROM decisions) AS d"
        (row,) = self._read(query)
        return int(row["i"]), int(row["d"])

    def picture(self, number: int) -> bytes | None:
        """Return an item's picture as PNG; None if there is no such item."""
        query = "SELECT png FROM items JOIN pictures ON pictures.digest = items.picture WHERE id = ?"
        rows = self._read(query, (number,))
        return bytes(rows[0]["png"]) if rows else None

    def image_map(self, number: int) -> NDArray[np.float32] | None:
        """Return the (h, w) map of an item; None if it has none, or there is no such item."""
        rows = self._read("SELECT map, map_height AS h, map_width AS w FROM items WHERE id = ?", (number,))
        if not rows or rows[0]["map"] is None:
            return None
        return np.frombuffer(rows[0]["map"], dtype="<f4").reshape(rows[0]["h"], rows[0]["w"]).astype(np.float32)

    def export(self, path: str | Path) -> int:
        """Write every decided item as a line of JSON with its picture beside it; see `export.write_export`."""
        from .export import write_export

        return write_export(self, Path(path))

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()

    def __enter__(self) -> Queue:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_file(self) -> None:
        """Refuse to go on with a file that nobody else can see any more."""
        try:
            same = _identity(self.path) == self._file
        except OSError:
            same = False
        if not same:
            raise QueueLostError(
                f"queue: '{self.path}' has been deleted, moved or replaced since it was opened; what is decided now "
                "would be lost. Put the file back where it was, or start again with the one that is there"
            )

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Open one transaction that sees and excludes all other writers."""
        with self._lock:
            try:
                self._database.execute("BEGIN IMMEDIATE")
                try:
                    self._check_file()
                    yield self._database
                    self._database.execute("COMMIT")
                except BaseException:
                    if self._database.in_transaction:
                        self._database.execute("ROLLBACK")
                    raise
            except (sqlite3.Error, OverflowError) as error:
                self._check_file()
                raise ArgumentError(f"queue: cannot write '{self.path}': {error}") from error
            # Deleted while it was written: the caller must not take that for done.
            self._check_file()

    def _read(self, query: str, values: Any = ()) -> list[sqlite3.Row]:
        with self._lock:
            self._check_file()
            try:
                return self._database.execute(query, values).fetchall()
            except (sqlite3.Error, OverflowError) as error:
                raise ArgumentError(f"queue: cannot read '{self.path}': {error}") from error


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _insert(database: sqlite3.Connection, table: str, row: dict[str, Any]) -> int:
    names, places = ", ".join(row), ", ".join("?" * len(row))
    added = database.execute(f"INSERT INTO {table} ({names}) VALUES ({places})", list(row.values()))
    return int(added.lastrowid or 0)


def _check_correction(answer: str, of_model: str) -> None:
    if not answer.strip():
        raise ArgumentError("answer: expected the right answer, got an empty one")
    if _plain(answer) == _plain(of_model):
        raise ArgumentError("answer: this is the model's own answer; confirm it instead")


def _png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def _plain(text: str) -> str:
    """Return a text as answers are compared: white space and case aside."""
    return " ".join(text.split()).casefold()
