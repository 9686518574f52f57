"""The queue's one file: private, whole when copied, brought from older versions, and told from others' files."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from lvlm_fastxai.errors import ArgumentError
from lvlm_fastxai.review import Queue, Record, backup, schema
from lvlm_fastxai.review.queue import QueueLostError

OLD = Path(__file__).parent / "support" / "queue_version_1.sql"
"""A queue of the first version, dumped: four items and four decisions."""

posix = pytest.mark.skipif(os.name != "posix", reason="no permissions, no open files to delete")


def record(number: int = 0) -> Record:
    return Record(Image.new("RGB", (8, 6), (number, 0, 0)), f"what is {number}?", "a thing", {"entropy": 0.1 + 0.2})


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    with Queue(tmp_path / "queue.db") as opened:
        opened.append(record())
        yield opened


def make_old(path: Path, *, log: bool = False) -> Path:
    """A queue as the first version leaves it; with a log, as it leaves it when it is killed."""
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        if not log:
            database.executescript(OLD.read_text(encoding="utf-8"))
            database.execute("PRAGMA journal_mode = WAL")
            return path
    kept = path.with_name("running.db")
    with closing(sqlite3.connect(kept, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.executescript(OLD.read_text(encoding="utf-8"))
        for suffix in ("", "-wal"):
            shutil.copy(f"{kept}{suffix}", f"{path}{suffix}")
    return path


def rows(path: Path, table: str) -> list[dict[str, object]]:
    with closing(sqlite3.connect(path)) as database:
        database.row_factory = sqlite3.Row
        return [dict(row) for row in database.execute(f"SELECT * FROM {table} ORDER BY rowid")]


def listing(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_copy_of_the_one_file_holds_every_decision(queue, tmp_path):
    for number in range(1, 4):
        item, _ = queue.append(record(number))
        queue.decide(item, "confirm", reviewer="Ann")
        shutil.copy(queue.path, tmp_path / f"copy-{number}.db")
        with Queue(tmp_path / f"copy-{number}.db", create=False) as copy:
            assert copy.counts() == queue.counts() and copy.version() == (number + 1, number)
    assert not list(tmp_path.glob("queue.db-*"))


WRITER = """
import os, signal, sys
from PIL import Image
from lvlm_fastxai.review import Queue, Record
queue = Queue(sys.argv[1])
for number in range(100):
    item, _ = queue.append(Record(Image.new("RGB", (8, 6)), "what?", "that", sample_id=str(number)))
    print(item, queue.decide(item, "confirm"), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@posix
def test_the_one_file_of_a_killed_process_holds_every_decision(tmp_path):
    done = subprocess.run([sys.executable, "-c", WRITER, tmp_path / "queue.db"], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL and len(done.stdout.splitlines()) == 100
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "queue.db", tmp_path / "elsewhere" / "copy.db")
    with Queue(tmp_path / "elsewhere" / "copy.db", create=False) as copy:
        assert copy.counts()["confirm"] == 100


@pytest.mark.parametrize("log", [False, True])
def test_a_queue_of_the_first_version_is_brought_to_this_one(tmp_path, log):
    path = make_old(tmp_path / "queue.db", log=log)
    with closing(sqlite3.connect(":memory:")) as database:
        database.executescript(OLD.read_text(encoding="utf-8"))
        database.row_factory = sqlite3.Row
        before = {name: [dict(row) for row in database.execute(f"SELECT * FROM {name}")] for name in
                  ("items", "pictures", "decisions")}  # fmt: skip
    with Queue(path) as queue:
        assert [item.features for item in queue.items()] == [
            {"entropy": 0.1 + 0.2, "probability": 1 / 3},
            {"probability": 1 / 3},
            {},
            {"entropy": 0.1 + 0.2 + 3 / 7, "probability": 1 / 3},
        ]
        assert [item.state for item in queue.items()] == ["confirm", "correct", "open", "open"]
        assert queue.image_map(1).shape == (2, 3) and queue.image_map(3) is None
        assert queue.append(record())[0] == 5 and queue.decide(5, "confirm") == 5
    after = rows(path, "items")[:4]
    for old, new in zip(before.pop("items"), after, strict=True):
        assert {name: value for name, value in new.items() if name != "features"} == {
            name: value for name, value in old.items() if name not in ("entropy", "probability")
        }
    assert rows(path, "pictures")[:2] == before["pictures"] and rows(path, "decisions")[:4] == before["decisions"]
    assert not list(tmp_path.glob("queue.db-*"))
    # The tables, triggers and view are those of a new queue.
    Queue(tmp_path / "new.db").close()
    made = [
        {(row["type"], row["name"]): str(row["sql"]).replace('"', "") for row in rows(tmp_path / name, "sqlite_master")}
        for name in ("queue.db", "new.db")
    ]
    assert made[0] == made[1]
    with closing(sqlite3.connect(path)) as database, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        database.execute("UPDATE items SET features = '{}'")


KILLED = """
import os, signal, sys
from lvlm_fastxai.review import Queue, schema
calls = 0
def two_features(*values):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return "{}"
schema._two_features = two_features
Queue(sys.argv[1])
"""


@posix
def test_a_process_that_is_killed_while_it_brings_a_queue_over_loses_nothing(tmp_path):
    path = make_old(tmp_path / "queue.db")
    for call in (1, 3, 4):
        done = subprocess.run([sys.executable, "-c", KILLED, path, str(call)], capture_output=True)
        assert done.returncode == -signal.SIGKILL
    with Queue(path) as queue:
        assert queue.version() == (4, 4) and queue.item(1).features == {"entropy": 0.1 + 0.2, "probability": 1 / 3}


def test_an_older_program_that_has_the_queue_open_is_not_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(schema, "BUSY_SECONDS", 0.1)
    path = make_old(tmp_path / "queue.db")
    with closing(sqlite3.connect(path)) as old:
        assert old.execute("SELECT count(*) FROM items").fetchone() == (4,)
        with pytest.raises(ArgumentError, match="an older version of this program has it open; end that first"):
            Queue(path)
        assert old.execute("SELECT sum(probability) FROM items").fetchone() == (1.0,)
    Queue(path).close()


@pytest.mark.parametrize("kind", ["rollback", "log", "log in use", "only a log", "text", "newer"])
def test_files_of_others_are_only_read(tmp_path, kind):
    path = tmp_path / "theirs.db"
    database = sqlite3.connect(path, isolation_level=None)
    if kind == "text":
        path.write_text("this is no database, and long enough for its header " * 3)
    elif kind == "newer":
        database.executescript(f"CREATE TABLE x (y); PRAGMA application_id = {schema.APPLICATION_ID}")
        database.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
    else:
        if kind != "rollback":
            database.execute("PRAGMA journal_mode = WAL")
        if kind != "only a log":
            database.execute("CREATE TABLE things (id)")
            database.execute("INSERT INTO things VALUES (5)")
            if kind == "log in use":
                database.execute("PRAGMA wal_checkpoint")
        if kind in ("log in use", "only a log"):
            database.execute("CREATE TABLE more (id)")
    if kind in ("rollback", "log", "text", "newer"):
        database.close()
    before, permissions = listing(tmp_path), mode(path)
    for work in (Queue, lambda path: backup(path, tmp_path / "copy.db"), lambda path: Queue(path, create=False)):
        with pytest.raises(ArgumentError, match=r"another program|is no queue|version 3"):
            work(path)
        assert listing(tmp_path) == before and mode(path) == permissions
    database.close()


@posix
@pytest.mark.parametrize("change", ["deleted", "moved", "replaced"])
def test_a_file_that_is_gone_takes_no_more_decisions(queue, tmp_path, change):
    if change == "deleted":
        queue.path.unlink()
    else:
        queue.path.rename(tmp_path / "old.db")
    if change == "replaced":
        Queue(queue.path).close()
    for work in (lambda: queue.decide(1, "confirm"), lambda: queue.append(record(1)), queue.items, queue.version):
        with pytest.raises(QueueLostError, match="has been deleted, moved or replaced since it was opened"):
            work()
    if change == "moved":
        (tmp_path / "old.db").rename(queue.path)
        assert queue.decide(1, "confirm") == 1


@posix
def test_a_file_that_vanishes_while_it_is_written_is_told_of(queue):
    with pytest.raises(QueueLostError, match="would be lost"), queue._writing() as database:
        database.execute("INSERT INTO pictures VALUES ('x', 1, 1, x'00')")
        queue.path.unlink()


@posix
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_only_the_owner_may_read_a_queue_its_journal_and_its_copy(tmp_path, umask):
    before = os.umask(umask)
    try:
        with Queue(tmp_path / "queue.db") as queue:
            queue.append(record())
            assert mode(queue.path) == 0o600
            with closing(sqlite3.connect(queue.path, isolation_level=None)) as database:
                database.execute("BEGIN IMMEDIATE")
                database.execute("INSERT INTO pictures VALUES ('x', 1, 1, x'00')")
                assert mode(tmp_path / "queue.db-journal") == 0o600
                database.execute("ROLLBACK")
            backup(queue.path, tmp_path / "copy.db")
            assert mode(tmp_path / "copy.db") == 0o600
    finally:
        os.umask(before)


@posix
def test_a_queue_that_others_could_read_is_closed_to_them(tmp_path):
    path = make_old(tmp_path / "queue.db")
    path.chmod(0o644)
    Queue(path).close()
    assert mode(path) == 0o600


def test_backup_beside_an_open_queue(queue, tmp_path):
    queue.decide(1, "confirm")
    assert backup(queue.path, tmp_path / "copy.db") == 1
    queue.decide(1, "reopen")
    assert backup(queue.path, tmp_path / "copy.db") == 1  # replaces the earlier one
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["copy.db", "queue.db"]
    with Queue(tmp_path / "copy.db", create=False) as copy:
        assert copy.items() == queue.items() and copy.version() == queue.version()
        assert copy.picture(1) == queue.picture(1)


def test_backup_of_an_old_queue_leaves_it_old(tmp_path):
    path = make_old(tmp_path / "queue.db", log=True)
    assert backup(path, tmp_path / "copy.db") == 4
    for name in ("queue.db", "copy.db"):
        with closing(sqlite3.connect(tmp_path / name)) as database:
            assert database.execute("PRAGMA user_version").fetchone() == (1,)
            assert database.execute("SELECT count(*) FROM decisions").fetchone() == (4,)
    assert not (tmp_path / "copy.db-wal").exists()
    with Queue(tmp_path / "copy.db") as copy:
        assert copy.version() == (4, 4)


def test_backup_replaces_nothing_else(queue, tmp_path):
    (tmp_path / "photo.png").write_bytes(b"mine, and long enough to be told from a database" * 5)
    (tmp_path / "link.db").symlink_to(tmp_path / "photo.png")
    (tmp_path / "busy.db-journal").write_bytes(b"x")
    before = listing(tmp_path)
    for source, out, message in (
        ("queue.db", "photo.png", "is no queue; name another file"),
        ("queue.db", "queue.db", "is the queue itself"),
        ("queue.db", "link.db", "is a link"),
        ("queue.db", "busy.db", "in use"),
        ("queue.db", "none/copy.db", "No such file or directory"),
        ("none.db", "copy.db", "there is no file"),
        ("photo.png", "copy.db", "is no queue"),
    ):
        with pytest.raises(ArgumentError, match=message):
            backup(tmp_path / source, tmp_path / out)
        assert listing(tmp_path) == before


@posix
def test_a_full_disk_is_told_in_a_line_and_leaves_the_queue_whole(queue, tmp_path):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (queue.path.stat().st_size + 2000, hard))
    try:
        noise = Image.effect_noise((200, 200), 50).convert("RGB")
        with pytest.raises(ArgumentError, match=r"cannot write '.*queue\.db'"):
            queue.append(Record(noise, "what?", "that"))
        with pytest.raises(ArgumentError, match="cannot copy"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
            backup(queue.path, tmp_path / "copy.db")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["queue.db"]
    assert queue.append(record(2))[1] and queue.version() == (2, 0)
