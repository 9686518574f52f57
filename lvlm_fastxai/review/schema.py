"""The tables of a queue's file: how they are made, recognised, and brought from older versions to this one.

A queue is one SQLite file with a rollback journal, so that the file alone holds whatever has been acknowledged. The
first version kept a write-ahead log beside it; opening such a queue folds the log into the file.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import ArgumentError

__all__ = ["BUSY_SECONDS", "VERDICTS", "check_file", "prepare"]

VERDICTS = ("confirm", "correct", "reject", "reopen")
"""What a person can decide; "reopen" takes the decision before it back."""

BUSY_SECONDS = 30.0
"""How long to wait for other processes."""

APPLICATION_ID = 0x6C76_6671  # "lvfq", so that no other program's database is taken for a queue
VERSION = 2

_ITEMS = """
CREATE TABLE {name} (
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
    features TEXT NOT NULL,
    score REAL,
    reason TEXT NOT NULL,
    model_name TEXT NOT NULL,
    model_fingerprint TEXT NOT NULL,
    head_fingerprint TEXT NOT NULL,
    sample_id TEXT NOT NULL,
    extra TEXT NOT NULL
);"""

_TABLES = f"""
CREATE TABLE pictures (
    digest TEXT PRIMARY KEY,
    width INTEGER NOT NULL,
    height INTEGER NOT NULL,
    png BLOB NOT NULL
);
{_ITEMS.format(name="items")}
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
"""

_VIEW = """
CREATE VIEW shown AS
SELECT items.*, pictures.width, pictures.height,
    CASE WHEN latest.verdict IS NULL OR latest.verdict = 'reopen' THEN 'open' ELSE latest.verdict END AS state,
    latest.id AS decision, latest.answer AS corrected, latest.note, latest.reviewer, latest.created AS decided
FROM items JOIN pictures ON pictures.digest = items.picture
LEFT JOIN decisions AS latest ON latest.id = (SELECT max(id) FROM decisions WHERE item = items.id);
"""

_CLASHES = {
    "pictures": "digest = NEW.digest",
    "items": "id = NEW.id OR digest = NEW.digest",
    "decisions": "id = NEW.id",
}


def _append_only(table: str) -> str:
    """Return triggers that refuse every change of a table but additions."""
    refuse = "BEGIN SELECT RAISE(ABORT, 'the queue is append-only'); END;"
    # REPLACE removes the old row without asking the other two triggers.
    clash = f"SELECT 1 FROM {table} WHERE {_CLASHES[table]}"
    return f"""
CREATE TRIGGER {table}_update BEFORE UPDATE ON {table}
{refuse}
CREATE TRIGGER {table}_delete BEFORE DELETE ON {table}
{refuse}
CREATE TRIGGER {table}_replace BEFORE INSERT ON {table}
WHEN EXISTS ({clash})
{refuse}
"""


_NEW = f"""
{_TABLES}
{_VIEW}
{"".join(map(_append_only, _CLASHES))}
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {VERSION};
"""

# The first version knew two features, each with a column of its own.
_COLUMNS = """
id, digest, created, picture, question, answer, map, map_height, map_width, region, {features}, score, reason,
model_name, model_fingerprint, head_fingerprint, sample_id, extra"""
_FROM_FIRST = f"""
DROP VIEW shown;
{_ITEMS.format(name="items_2")}
INSERT INTO items_2 ({_COLUMNS.format(features="features")})
SELECT {_COLUMNS.format(features="two_features(entropy, probability)")} FROM items ORDER BY id;
DROP TABLE items;
ALTER TABLE items_2 RENAME TO items;
{_VIEW}
{_append_only("items")}
PRAGMA user_version = 2;
"""
_MIGRATIONS = {1: _FROM_FIRST}
"""Version → the statements that make the next one of it."""


def check_file(path: Path) -> None:
    """Refuse a file that is not a queue of a version that this program knows. The file is only read.

    Raises:
        ArgumentError: it cannot be opened, is not a database, or is another program's or a newer program's.
    """
    try:
        # Opened by SQLite even so: a plain open and close in this process would drop the locks of other connections.
        database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
    except sqlite3.Error as error:
        raise ArgumentError(f"queue: cannot open '{path}': {error}") from error
    try:
        # Without it SQLite refuses a file that another process is just making longer.
        database.execute("PRAGMA writable_schema = ON")
        application, version = (_pragma(database, name) for name in ("application_id", "user_version"))
        tables = 0 if application else _count_tables(database)
    except sqlite3.OperationalError as error:
        raise ArgumentError(f"queue: cannot open '{path}': {error}") from error
    except sqlite3.DatabaseError as error:
        raise ArgumentError(f"queue: '{path}' is no queue: {error}") from error
    finally:
        database.close()
    if application == 0:
        # A process of the first version that was killed early has left everything in the log.
        log = Path(f"{os.path.realpath(path)}-wal")
        if log.is_file() and log.stat().st_size:
            if not _is_log_of_queue(log):
                raise _another_programs(path)
        elif tables:
            raise _another_programs(path)
        return
    _check_version(path, application, version)


def prepare(database: sqlite3.Connection, path: Path) -> None:
    """Set a connection up; make the tables of an empty file, and bring those of an older version to this one.

    Either happens in one transaction: a process that is killed meanwhile leaves what was there before.

    Args:
        database: without a transaction under way, in SQLite's autocommit mode.
        path: of its file, which `check_file` has passed; for messages.

    Raises:
        ArgumentError: the file is not a queue, or other processes use it in the first version's way.
        sqlite3.Error: it cannot be read or written.
    """
    _use_rollback_journal(database, path)
    # EXTRA: the journal's removal, which is what commits, is on the disk before COMMIT returns.
    database.execute("PRAGMA synchronous = EXTRA")
    database.execute("BEGIN IMMEDIATE")
    try:
        application, version = (_pragma(database, name) for name in ("application_id", "user_version"))
        if application == 0 and _count_tables(database) == 0:
            _execute_all(database, _NEW)
        else:
            _check_version(path, application, version)
        if application and version < VERSION:
            _migrate(database, version)
        database.execute("COMMIT")
    except BaseException:
        database.execute("ROLLBACK")
        raise
    # Not before: a table that others refer to is replaced when an old queue is brought to this version.
    database.execute("PRAGMA foreign_keys = ON")
    # The file changes when a transaction commits and not before, however large it is.
    database.execute("PRAGMA cache_spill = OFF")


def _use_rollback_journal(database: sqlite3.Connection, path: Path) -> None:
    until = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            # Leaving a write-ahead log does not wait for other connections by itself.
            if database.execute("PRAGMA journal_mode = DELETE").fetchone()[0] == "delete":
                return
            reason = "its write-ahead log cannot be left"
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise
            reason = "an older version of this program has it open; end that first"
        if time.monotonic() > until:
            raise ArgumentError(f"queue: cannot open '{path}': {reason}")
        time.sleep(0.01)


def _migrate(database: sqlite3.Connection, version: int) -> None:
    database.create_function("two_features", 2, _two_features, deterministic=True)
    for number in range(version, VERSION):
        _execute_all(database, _MIGRATIONS[number])
    if database.execute("PRAGMA foreign_key_check").fetchone() is not None:
        raise ArgumentError("queue: its tables are damaged: an item or a decision refers to what is not there")


def _two_features(entropy: float | None, probability: float | None) -> str:
    """Return the first version's columns as JSON, with all of their digits."""
    values = {"entropy": entropy, "probability": probability}
    return json.dumps({name: value for name, value in values.items() if value is not None})


def _check_version(path: Path, application: int, version: int) -> None:
    if application != APPLICATION_ID:
        raise _another_programs(path)
    if not 1 <= version <= VERSION:
        raise ArgumentError(
            f"queue: '{path}' has version {version} of the queue's tables, this program knows 1 to {VERSION}"
        )


def _another_programs(path: Path) -> ArgumentError:
    return ArgumentError(f"queue: '{path}' is a database of another program")


def _is_log_of_queue(path: Path) -> bool:
    """Whether a write-ahead log holds a first page of a queue (sqlite.org/fileformat2.html, sections 1.3 and 4)."""
    with path.open("rb") as file:
        header = file.read(32)
        size = int.from_bytes(header[8:12], "big")
        if not 512 <= size <= 65536:
            return False
        while len(frame := file.read(24 + size)) == 24 + size:
            current = frame[8:16] == header[16:24]  # else it is left over from before the last checkpoint
            page, application = (int.from_bytes(frame[at : at + 4], "big") for at in (0, 24 + 68))
            if current and page == 1 and application == APPLICATION_ID:
                return True
    return False


def _pragma(database: sqlite3.Connection, name: str) -> int:
    return int(database.execute(f"PRAGMA {name}").fetchone()[0])


def _count_tables(database: sqlite3.Connection) -> int:
    return int(database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])


def _execute_all(database: sqlite3.Connection, script: str) -> None:
    for statement in _statements(script):
        database.execute(statement)


def _statements(script: str) -> Iterator[str]:
    """Yield one after the other: `executescript` would commit the transaction that it runs in."""
    statement = ""
    for line in script.splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
