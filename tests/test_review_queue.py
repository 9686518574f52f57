"""The queue: append-only, idempotent, shared by processes, whole after a kill, and its export."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lvlm_fastxai.errors import ArgumentError, ModelMismatchError
from lvlm_fastxai.review import Decision, Policy, Queue, Record, apply
from lvlm_fastxai.review.items import picture_digest
from lvlm_fastxai.review.queue import StaleDecisionError

REVIEW = Decision("review", 0.25, "The map is widely spread.")


def make(number: int = 0, **changes: Any) -> Record:
    pixels = np.random.default_rng(number % 3).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    record = Record(
        picture=Image.fromarray(pixels),
        question=f"what is it, {number}?",
        answer=f"a thing {number}",
        features={"entropy": 0.75, "probability": 0.5},
        image_map=np.arange(6, dtype=np.float32).reshape(2, 3),
        region=(0.0, -2.0, 16.0, 14.0),
        model_name="a model",
        model_fingerprint="0123",
        head_fingerprint="4567",
        sample_id=str(number),
        extra={"kind": "shape"},
    )
    return replace(record, **changes)


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    with Queue(tmp_path / "queue.sqlite") as opened:
        yield opened


def test_an_item_comes_back_as_it_was(queue):
    record = make(1)
    number, new = queue.append(record, REVIEW)
    assert new
    shown = queue.item(number)
    for name in ("question", "answer", "features", "region", "model_name", "model_fingerprint"):
        assert getattr(shown, name) == getattr(record, name)
    assert (shown.head_fingerprint, shown.sample_id, shown.extra) == ("4567", "1", {"kind": "shape"})
    assert (shown.score, shown.reason, shown.state, shown.decision) == (0.25, REVIEW.reason, "open", None)
    assert (shown.width, shown.height, shown.has_map) == (16, 12, True)
    assert shown.created.endswith("Z") and abs(np.datetime64(shown.created[:-1]) - np.datetime64("now")) < 10_000_000
    np.testing.assert_array_equal(queue.image_map(number), record.image_map)
    path = queue.path.with_name("picture.png")
    path.write_bytes(queue.picture(number))
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.tobytes() == record.picture.tobytes()


def test_an_item_may_lack_everything_but_the_answer(queue):
    record = Record(make().picture.convert("L"), "what?", "that", {"entropy": float("nan"), "probability": None})
    shown = queue.item(queue.append(record)[0])
    assert (shown.features, shown.score, shown.region, shown.reason) == ({}, None, None, "")
    assert not shown.has_map and queue.image_map(shown.id) is None


def test_a_rerun_adds_nothing(queue):
    first = [queue.append(make(number), REVIEW)[0] for number in range(5)]
    again = [queue.append(make(number, features={}), REVIEW) for number in range(5)]
    assert again == [(number, False) for number in first]
    for changes in ({"answer": "other"}, {"model_fingerprint": "89"}, {"sample_id": "x"}, {"question": "who?"}):
        assert queue.append(make(0, **changes))[1]
    assert queue.append(make(0, picture=make(1).picture))[1]
    # Five pictures' worth of items, three pictures.
    with sqlite3.connect(queue.path) as database:
        assert database.execute("SELECT count(*) FROM pictures").fetchone() == (3,)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE items SET answer = 'x'",
        "UPDATE decisions SET verdict = 'confirm'",
        "UPDATE pictures SET width = 1",
        "DELETE FROM items",
        "DELETE FROM decisions",
        "DELETE FROM pictures",
        "REPLACE INTO decisions SELECT id, item, 'reject', NULL, note, reviewer, created FROM decisions",
        "REPLACE INTO pictures SELECT digest, 1, 1, png FROM pictures",
        "INSERT OR REPLACE INTO items SELECT * FROM items",
    ],
)
def test_nothing_can_be_changed_or_removed(queue, statement):
    queue.decide(queue.append(make())[0], "correct", answer="this")
    before = queue.items()
    database = sqlite3.connect(queue.path)
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        database.execute(statement)
    database.close()
    assert queue.items() == before


@pytest.mark.parametrize(
    "row",
    [
        "(99, 'confirm', NULL, '', '', '')",  # no such item
        "(1, 'perhaps', NULL, '', '', '')",
        "(1, 'confirm', 'x', '', '', '')",
        "(1, 'correct', NULL, '', '', '')",
    ],
)
def test_the_tables_refuse_decisions_that_make_no_sense(queue, row):
    queue.append(make())
    database = sqlite3.connect(queue.path)
    database.execute("PRAGMA foreign_keys = ON")
    with pytest.raises(sqlite3.IntegrityError):
        database.execute(f"INSERT INTO decisions (item, verdict, answer, note, reviewer, created) VALUES {row}")
    database.close()


def test_the_latest_decision_counts(queue):
    number = queue.append(make())[0]
    first = queue.decide(number, "confirm", reviewer="Ann", note="sure")
    shown = queue.item(number)
    assert (shown.state, shown.decision, shown.reviewer, shown.note) == ("confirm", first, "Ann", "sure")
    queue.decide(number, "correct", answer=" a star ", reviewer="Bo")
    shown = queue.item(number)
    assert (shown.state, shown.corrected, shown.reviewer) == ("correct", "a star", "Bo")
    queue.decide(number, "reject")
    assert queue.item(number).state == "reject" and queue.item(number).corrected is None
    queue.decide(number, "reopen")
    assert queue.item(number).state == "open"
    with sqlite3.connect(queue.path) as database:
        found = database.execute("SELECT verdict FROM decisions ORDER BY id").fetchall()
    assert found == [("confirm",), ("correct",), ("reject",), ("reopen",)]


@pytest.mark.parametrize(
    ("verdict", "answer", "message"),
    [
        ("maybe", None, "confirm, correct, reject, reopen"),
        ("correct", None, "goes with the verdict 'correct'"),
        ("confirm", "x", "goes with the verdict 'correct'"),
        ("correct", " \n", "empty"),
        ("correct", " A  THING 0 ", "own answer; confirm it"),
        ("reopen", None, "no decision to take back"),
    ],
)
def test_decisions_that_make_no_sense(queue, verdict, answer, message):
    number = queue.append(make())[0]
    with pytest.raises(ArgumentError, match=message):
        queue.decide(number, verdict, answer=answer)
    assert queue.item(number).decision is None and queue.version() == (number, 0)


def test_items_that_are_not_there(queue):
    assert queue.item(1) is None and queue.picture(1) is None and queue.image_map(1) is None
    for number in (1, -5, 2**70):
        with pytest.raises(ArgumentError):
            queue.decide(number, "confirm")


def test_a_decision_about_what_has_changed_is_refused(queue):
    number = queue.append(make())[0]
    first = queue.decide(number, "confirm", seen=None, reviewer="Ann")
    with pytest.raises(StaleDecisionError, match="somebody else has decided about it meanwhile: confirm"):
        queue.decide(number, "reject", seen=None, reviewer="Bo")
    queue.decide(number, "reject", seen=first, reviewer="Bo")
    assert queue.item(number).reviewer == "Bo"


def test_filters_counts_and_order(queue):
    for number, score in enumerate((0.5, 0.1, 0.9, None)):
        decision = None if score is None else Decision("review", score, "")
        queue.append(make(number, answer=("Ämter", "red", "red star", "blue")[number]), decision)
    queue.decide(1, "confirm")
    queue.decide(2, "correct", answer="green")
    queue.decide(3, "reject")
    assert queue.counts() == {"open": 1, "confirm": 1, "correct": 1, "reject": 1}
    assert [shown.id for shown in queue.items(state="open")] == [4]
    assert [shown.id for shown in queue.items(search="RED")] == [2, 3]
    assert [shown.id for shown in queue.items(search="GREEN")] == [2]
    assert [shown.id for shown in queue.items(search="äm")] == [shown.id for shown in queue.items(search="ÄM")] == [1]
    assert queue.items(search="%") == [] and queue.items(search="' OR 1 --") == []
    assert [shown.id for shown in queue.items(order="newest", limit=2)] == [4, 3]
    assert [shown.id for shown in queue.items(order="doubtful")] == [4, 2, 1, 3]
    assert queue.version() == (4, 3)
    for wrong in ({"state": "closed"}, {"order": "random"}):
        with pytest.raises(ArgumentError, match="expected one of"):
            queue.items(**wrong)


@pytest.mark.parametrize(
    "changes",
    [
        {"question": None},
        {"answer": 5},
        {"question": "half \ud83d"},
        {"image_map": np.zeros(4, np.float32)},
        {"image_map": np.full((2, 2), np.nan, np.float32)},
        {"region": (4.0, 0.0, 4.0, 4.0)},
        {"region": (0.0, 0.0, 1e9, 4.0)},
        {"region": (0.0, float("nan"), 4.0, 4.0)},
        {"extra": {"a": object()}},
        {"extra": {"a": float("nan")}},
    ],
)
def test_records_that_cannot_be_kept(queue, changes):
    with pytest.raises(ArgumentError, match=next(iter(changes))):
        queue.append(make(**changes))
    assert queue.items() == []


def test_files_that_are_no_queue(tmp_path):
    (tmp_path / "text").write_text("this is no database, and long enough for its header " * 3)
    with pytest.raises(ArgumentError, match="is no queue"):
        Queue(tmp_path / "text")
    with sqlite3.connect(tmp_path / "other") as database:
        database.execute("CREATE TABLE things (id)")
    with pytest.raises(ArgumentError, match="another program"):
        Queue(tmp_path / "other")
    Queue(tmp_path / "newer").close()
    with sqlite3.connect(tmp_path / "newer") as database:
        database.execute("PRAGMA user_version = 9")
    with pytest.raises(ArgumentError, match="version 9"):
        Queue(tmp_path / "newer")
    with pytest.raises(ArgumentError, match="there is no file"):
        Queue(tmp_path / "none", create=False)
    assert not (tmp_path / "none").exists()
    for path in (tmp_path, tmp_path / "no" / "folder"):
        with pytest.raises(ArgumentError, match="cannot open"):
            Queue(path)


def test_the_journal_is_written_through(queue):
    assert queue._database.execute("PRAGMA journal_mode").fetchone()[0] == "delete"
    assert queue._database.execute("PRAGMA synchronous").fetchone()[0] == 3  # EXTRA


def test_threads_share_a_queue(queue):
    def work(start: int) -> None:
        for number in range(start, start + 20):
            queue.decide(queue.append(make(number))[0], "confirm")

    threads = [threading.Thread(target=work, args=(start,)) for start in (0, 10, 20, 30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(shown.sample_id for shown in queue.items()) == sorted(map(str, range(50)))


WRITER = """
import sys
import numpy as np
from PIL import Image
from lvlm_fastxai.review import Queue, Record

path, start, stop, step, barrier = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]
print("ready", flush=True)
sys.stdin.readline()
with Queue(path) as queue:
    for number in range(start, stop, step):
        picture = Image.fromarray(np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8))
        item, new = queue.append(Record(picture, f"question {number}", barrier, sample_id=str(number)))
        queue.decide(item, "confirm", reviewer=barrier)
        print(number, item, int(new), flush=True)
"""


def writer(path: Path, start: int, stop: int, step: int, answer: str = "answer") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(start), str(stop), str(step), answer],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def go(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()


def check_whole(path: Path) -> None:
    database = sqlite3.connect(path)
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert database.execute("PRAGMA foreign_key_check").fetchall() == []
    database.close()


def test_two_processes_write_at_once(tmp_path):
    """They make the file together, and two thirds of their items are the same."""
    path = tmp_path / "queue.sqlite"
    processes = [writer(path, 0, 60, 1), writer(path, 20, 80, 1)]
    go(*processes)
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    lines = [tuple(map(int, line.split())) for output in outputs for line in output.splitlines()]
    assert len(lines) == 120 and sum(new for *_, new in lines) == 80
    check_whole(path)
    with Queue(path, create=False) as queue:
        items = queue.items()
        assert {(int(shown.sample_id), shown.id) for shown in items} == {line[:2] for line in lines}
        assert len(items) == 80 and queue.version()[1] == 120


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_writer_loses_nothing_that_was_acknowledged(tmp_path):
    """Killed at five moments, while another process writes on."""
    path = tmp_path / "queue.sqlite"
    steady = writer(path, 0, 400, 1, "steady")
    acknowledged, start = [], 1000
    go(steady)
    for delay in (0.0, 0.013, 0.05, 0.11, 0.17):
        victim = writer(path, start, start + 100_000, 1, "victim")
        go(victim)
        assert victim.stdout is not None
        first = victim.stdout.readline()
        time.sleep(delay)
        victim.send_signal(signal.SIGKILL)
        rest = victim.stdout.read()
        assert victim.wait(timeout=60) == -signal.SIGKILL
        # The last line may be cut.
        whole = (first + rest).rpartition("\n")[0].splitlines()
        acknowledged += [(line.split()[0], int(line.split()[1])) for line in whole]
        start += 100_000
    output = steady.communicate(timeout=60)[0]
    assert steady.returncode == 0 and len(output.splitlines()) == 400
    check_whole(path)
    acknowledged += [(line.split()[0], int(line.split()[1])) for line in output.splitlines()]
    with Queue(path, create=False) as queue:
        found = {(shown.sample_id, shown.id): shown for shown in queue.items()}
        assert set(acknowledged) <= set(found) and len(acknowledged) >= 405
        assert all(found[key].state == "confirm" and queue.picture(key[1]) for key in acknowledged)
        # At most the item in flight of each victim is there without its acknowledgement.
        assert len(found) - len(acknowledged) <= 5
        assert queue.append(make())[1]


def policy(**changes: Any) -> Policy:
    fitted = Policy(("entropy",), (0.5,), (0.1,), (-1.0,), 0.0, 0.5, 0.95, 0.05)
    return replace(fitted, model_fingerprint="0123", head_fingerprint="4567", **changes)


def test_a_policy_accepts_or_queues(queue):
    passed = apply(policy(), queue, make(features={"entropy": 0.4}))
    assert passed.decision.accepted and (passed.item, passed.new) == (None, False) and queue.items() == []
    held = apply(policy(), queue, make(features={"entropy": 0.6}))
    assert held.new and held.item is not None
    shown = queue.item(held.item)
    assert (shown.score, shown.reason) == (held.decision.score, held.decision.reason)
    assert not apply(policy(), queue, make(features={"entropy": 0.6})).new
    with pytest.raises(ModelMismatchError, match="map head"):
        apply(policy(), queue, make(features={"entropy": 0.6}, head_fingerprint="other"))


def export(queue: Queue, path: Path) -> list[dict[str, Any]]:
    count = queue.export(path)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == count
    return lines


def test_export(queue, tmp_path):
    for number in range(5):
        queue.append(make(number), REVIEW)
    queue.decide(1, "confirm", reviewer="Ann", note="clear")
    queue.decide(2, "correct", answer="a ★")
    queue.decide(3, "reject")
    queue.decide(4, "confirm")
    queue.decide(4, "reopen")
    path = tmp_path / "out" / "labels.jsonl"
    confirmed, corrected, rejected = export(queue, path)
    assert (confirmed["answer"], confirmed["right"], confirmed["verdict"]) == ("a thing 0", True, "confirm")
    assert (confirmed["reviewer"], confirmed["note"]) == ("Ann", "clear")
    assert (corrected["answer"], corrected["model_answer"], corrected["right"]) == ("a ★", "a thing 1", False)
    assert "answer" not in rejected and rejected["right"] is False and rejected["verdict"] == "reject"
    assert [line["id"] for line in (confirmed, corrected, rejected)] == ["1", "2", "3"]
    assert (confirmed["features"], confirmed["score"]) == ({"entropy": 0.75, "probability": 0.5}, 0.25)
    assert (confirmed["model_fingerprint"], confirmed["head_fingerprint"]) == ("0123", "4567")
    for number, line in enumerate((confirmed, corrected, rejected)):
        with Image.open(path.parent / line["image"]) as picture:
            assert picture.tobytes() == make(number).picture.tobytes()
            assert line["group"] == picture_digest(picture)
    # A second export replaces the first; nothing else is left behind.
    queue.decide(5, "reject")
    assert len(export(queue, path)) == 4
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["labels-images", "labels.jsonl"]
    assert len(list((path.parent / "labels-images").iterdir())) == 3


def test_export_where_nothing_can_be_written(queue, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="cannot write"):
        queue.export(tmp_path / "file" / "out.jsonl")


def test_an_export_is_a_source(queue, tmp_path):
    sources = pytest.importorskip("lvlm_fastxai.prompting.sources")
    queue.append(make(0), REVIEW)
    queue.append(make(1), REVIEW)
    queue.decide(1, "correct", answer="a star")
    queue.decide(2, "reject")
    queue.export(tmp_path / "labels.jsonl")
    first, second = sources.open_source(str(tmp_path / "labels.jsonl"))
    assert (first.question, first.answer, second.answer) == ("what is it, 0?", "a star", None)
    assert first.picture().tobytes() == make(0).picture.tobytes()
