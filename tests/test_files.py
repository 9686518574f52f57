"""Files that are there whole or not at all: full disks, links in the way, processes that are killed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lvlm_fastxai.errors import ArgumentError
from lvlm_fastxai.files import (
    check_writable,
    finish_folder,
    lock_folder,
    remove_scratch,
    write_whole,
    writing,
    writing_folder,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def killed(program: str, *arguments: object) -> None:
    """Run a program that says when it has come so far, and kill it there as `kill -9` does."""
    with subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"now\n"
        process.kill()


NOW = "import sys, time; from pathlib import Path; from lvlm_fastxai.files import *\n"
WAIT = "print('now', flush=True); time.sleep(60)"


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_whole(path, b"old")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new" and names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_that_is_full_leaves_the_old_file(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, step, full_disk)
    with pytest.raises(ArgumentError, match=r"^--out: cannot write '.*a\.json': disk full; make room") as caught:
        write_whole(path, b"new", argument="--out")
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.json"]


def test_a_real_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    """A limit on the size of files makes write() itself fail, as a full disk does."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    program = NOW + (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: write_whole(sys.argv[1], bytes(1_000_000))\n"
        "except ValueError as error: print(error)"
    )
    done = run(program, path)
    assert "cannot write" in done.stdout and "disk full" in done.stdout, done.stderr
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.bin"]


def test_a_block_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "rec.jsonl"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), writing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    with pytest.raises(FileNotFoundError), writing(path):  # of a file that the block reads, not of ours
        (tmp_path / "typo").read_bytes()
    assert path.read_bytes() == b"old" and names(tmp_path) == ["rec.jsonl"]


def test_a_killed_process_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    killed(NOW + f"with writing(sys.argv[1]) as file:\n file.write(b'half'); file.flush(); {WAIT}", path)
    assert path.read_bytes() == b"old" and len(names(tmp_path)) == 2
    remove_scratch(tmp_path)
    assert names(tmp_path) == ["a.bin"]


def test_links_in_the_way_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    folder = tmp_path / "out"
    folder.mkdir()
    monkeypatch.setattr("secrets.token_hex", lambda size: "known")  # as if the name could be guessed
    (folder / ".lvlm-fastxai-known.part").symlink_to(victim)
    for write in (lambda: write_whole(folder / "a", b"new"), lambda: check_writable(folder)):
        with pytest.raises(ArgumentError, match="File exists"):
            write()
    monkeypatch.undo()
    (folder / "a").symlink_to(victim)
    write_whole(folder / "a", b"new")
    assert victim.read_bytes() == b"mine" and not (folder / "a").is_symlink()
    (folder / ".lvlm-fastxai.lock").symlink_to(victim)
    with pytest.raises(ArgumentError, match="cannot write"), lock_folder(folder):
        pass
    assert victim.read_bytes() == b"mine"


def test_permissions(tmp_path: Path) -> None:
    path = tmp_path / "queue"
    write_whole(path, b"", mode=0o600)
    assert path.stat().st_mode & 0o777 == 0o600
    write_whole(path, b"new")
    assert path.stat().st_mode & 0o777 == 0o600, "what was private stays so"
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "usual", b"")
        write_whole(tmp_path / "asked", b"", mode=0o666)
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("usual", "asked")] == [0o640, 0o666]


def test_devices_and_pipes_are_written_as_they_are(tmp_path: Path) -> None:
    write_whole("/dev/null", b"gone")
    assert Path("/dev/null").is_char_device()
    done = run(NOW + "write_whole('/dev/stdout', b'through')")
    assert done.stdout == "through"
    with (tmp_path / "log").open("w") as log:
        subprocess.run([sys.executable, "-c", NOW + "write_whole('/dev/stdout', b'through')"], stdout=log, check=True)
    assert (tmp_path / "log").read_text() == "through" and Path("/dev/stdout").is_symlink()


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("missing/a", "No such file"),
        ("file/a", "Not a directory"),
        ("folder", "Is a directory"),
        ("caf\udce9/a", "xe9"),
    ],
)
def test_a_place_that_cannot_be_written_is_one_line(path: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArgumentError, match=reason) as caught:
        write_whole(tmp_path / path, b"")
    assert str(caught.value).isprintable()
    assert names(tmp_path) == ["file", "folder"]


def test_files_that_belong_together_are_replaced_together(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    for run_number in (b"1", b"2"):
        with writing_folder(folder, remove=["tokens/1.png", "never.png"]) as scratch:
            (scratch / "tokens").mkdir()
            for name in ("weights", "config", "tokens/0.png"):
                (scratch / name).write_bytes(run_number)
            if run_number == b"1":
                (scratch / "tokens" / "2.png").write_bytes(b"stays")
        if run_number == b"1":
            (folder / "tokens" / "1.png").write_bytes(b"an earlier run's")
            (folder / "tokens" / "cat.png").write_bytes(b"the user's")
    assert names(folder) == ["config", "tokens", "weights"]
    assert names(folder / "tokens") == ["0.png", "2.png", "cat.png"]
    assert [(folder / name).read_bytes() for name in ("config", "weights")] == [b"2", b"2"]


def whole_fails(scratch: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(scratch / "weights"))


def in_the_way(scratch: Path) -> None:
    (scratch / "tokens").write_bytes(b"a file where a folder is")


@pytest.mark.parametrize("fails", [whole_fails, in_the_way])
def test_a_folder_stays_whole_when_the_new_one_fails(fails: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"old")
    (tmp_path / "tokens").mkdir()
    with pytest.raises(ArgumentError, match="cannot write"), writing_folder(tmp_path) as scratch:
        (scratch / "weights").write_bytes(b"new")
        fails(scratch)
    assert (tmp_path / "weights").read_bytes() == b"old" and names(tmp_path) == ["tokens", "weights"]


def test_a_folder_on_a_full_disk_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(ArgumentError, match="disk full"), writing_folder(tmp_path) as scratch:
        (scratch / "weights").write_bytes(b"new")
    assert (tmp_path / "weights").read_bytes() == b"old" and names(tmp_path) == ["weights"]


@pytest.mark.parametrize(("calls", "result"), [(0, b"old"), (1, b"new"), (2, b"new"), (3, b"new")])
def test_a_process_killed_between_two_files_leaves_one_run_s(calls: int, result: bytes, tmp_path: Path) -> None:
    """Killed at each rename: before the set is whole the old one stays, afterwards the rest follows."""
    for name in ("config", "weights"):
        (tmp_path / name).write_bytes(b"old")
    killed(
        NOW
        + "import os; rename, left = os.replace, [int(sys.argv[2])]\n"
        + f"def replace(*paths):\n if not left[0]: {WAIT}\n left[0] -= 1; rename(*paths)\n"
        + "os.replace = replace\n"
        + "with writing_folder(sys.argv[1]) as scratch:\n"
        + " for name in ('config', 'weights'): (scratch / name).write_bytes(b'new')\n"
        + WAIT,
        tmp_path,
        calls,
    )
    finish_folder(tmp_path)
    assert [(tmp_path / name).read_bytes() for name in ("config", "weights")] == [result, result]
    remove_scratch(tmp_path)
    assert names(tmp_path) == ["config", "weights"]


def test_a_locked_folder_names_who_holds_it(tmp_path: Path) -> None:
    program = NOW + f"with lock_folder(sys.argv[1]): {WAIT}"
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"now\n"
        expected = rf"^--out: '{tmp_path}' is in use by process {process.pid} on .*; wait for its end"
        with pytest.raises(ArgumentError, match=expected) as caught, lock_folder(tmp_path, argument="--out"):
            pass
        assert "\n" not in str(caught.value)
        process.send_signal(signal.SIGKILL)
    with lock_folder(tmp_path):  # the kernel let it go
        assert names(tmp_path) == [".lvlm-fastxai.lock"]
    assert names(tmp_path) == []


def test_of_many_processes_one_at_a_time_holds_the_lock(tmp_path: Path) -> None:
    """Each holder removes the lock's file, so that another may have opened a file that is gone: no two get in."""
    program = NOW + (
        "import os; folder, until, held = Path(sys.argv[1]), float(sys.argv[2]), 0\n"
        "while time.time() < until:\n"
        " try:\n"
        "  with lock_folder(folder):\n"
        "   (folder / 'inside').mkdir(); held += 1; (folder / 'inside').rmdir()\n"
        " except ValueError: pass\n"
        "print(held)"
    )
    until = time.time() + 2.5
    command = [sys.executable, "-c", program, str(tmp_path), str(until)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    ended = [(process.communicate(timeout=60), process.returncode) for process in processes]
    assert [code for _, code in ended] == [0, 0, 0], ended
    assert sum(int(out) for (out, _), _ in ended) > 50


def test_the_proof_that_a_folder_can_be_written_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "folder")
    assert names(tmp_path / "new" / "folder") == []
    program = NOW + (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "try: check_writable(sys.argv[1], argument='--out')\n"
        "except ValueError as error: print(error)"
    )
    done = run(program, tmp_path)
    assert done.stdout.startswith("--out: cannot write") and "disk full" in done.stdout, done.stderr
    assert names(tmp_path) == ["new"]
