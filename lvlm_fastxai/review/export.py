"""What leaves a queue: its decisions as labels, and a copy of the whole file."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ArgumentError
from ..files import check_writable, write_whole
from .connection import connect, create_private
from .items import exported
from .schema import check_file

if TYPE_CHECKING:
    from .queue import Queue

__all__ = ["backup", "write_export"]


def write_export(queue: Queue, path: Path) -> int:
    """Write every decided item as a line of JSON, and its picture as PNG in the folder ``<stem>-images`` beside it.

    A line holds "id", "image" (relative path), "question", "answer" (confirmed or corrected; absent where rejected),
    "model_answer", "right", "features" (name → value), "score", "verdict", "note", "reviewer", "created" (of the
    decision), "group" (answers about one picture share it), "model", "model_fingerprint", "head_fingerprint" and
    "sample". `calibrate` and the sources of `lvlm_fastxai.prompting` read it.

    Returns:
        Number of lines.

    Raises:
        ArgumentError: a file cannot be written.
    """
    folder = path.with_name(f"{path.stem}-images")
    lines = []
    check_writable(folder, argument="export")
    for shown in queue.items():
        if shown.state == "open":
            continue
        file = folder / f"{shown.picture[:32]}.png"  # named by content: what is there is what would be written
        if not file.is_file():
            write_whole(file, queue.picture(shown.id) or b"", argument="export")
        lines.append(json.dumps(exported(shown, f"{folder.name}/{file.name}"), ensure_ascii=False) + "\n")
    write_whole(path, "".join(lines).encode(errors="backslashreplace"), argument="export")
    return len(lines)


def backup(queue: str | Path, out: str | Path) -> int:
    """Copy a queue into one file, whole and consistent, while others may write to it.

    The copy takes its name when it is complete. It is readable by its owner alone, and of the version that the queue
    is: an old queue stays as it was.

    Args:
        queue: path of the queue.
        out: path of the copy; an earlier copy there is replaced.

    Returns:
        Number of items in the copy.

    Raises:
        ArgumentError: `queue` is not a queue, `out` is something else than one, or a file cannot be written.
    """
    queue, out = Path(queue), Path(out)
    if not queue.is_file():
        raise ArgumentError(f"queue: there is no file '{queue}'")
    check_file(queue)
    _check_target(queue, out)
    try:
        with _scratch(out) as scratch:
            with contextlib.closing(connect(queue)) as source, contextlib.closing(connect(scratch)) as copy:
                source.backup(copy)
                # A queue of the first version; its copy must be one file too.
                copy.execute("PRAGMA journal_mode = DELETE")
                copy.execute("PRAGMA synchronous = EXTRA")
                problem = copy.execute("PRAGMA quick_check(1)").fetchone()[0]
                if problem != "ok":
                    raise ArgumentError(f"queue: '{queue}' is damaged: {problem}")
                count = int(copy.execute("SELECT count(*) FROM items").fetchone()[0])
            _sync(scratch)
            os.replace(scratch, out)
            _sync(out.parent)
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ArgumentError(f"backup: cannot copy '{queue}' to '{out}': {reason}") from error
    return count


def _check_target(queue: Path, out: Path) -> None:
    """Refuse a place where a copy would replace something else than an earlier copy."""
    if out.is_symlink() or (out.exists() and not out.is_file()):
        raise ArgumentError(f"backup: '{out}' is a link, a folder or a device; name a file")
    if out.exists():
        if out.samefile(queue):
            raise ArgumentError(f"backup: '{out}' is the queue itself; name another file")
        try:
            check_file(out)
        except ArgumentError:
            raise ArgumentError(f"backup: '{out}' is there and is no queue; name another file") from None
    for suffix in ("-journal", "-wal"):
        beside = Path(f"{out}{suffix}")
        if beside.exists():
            raise ArgumentError(f"backup: '{beside}' belongs to a database that is in use; name another file")


@contextlib.contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """Make an empty private file beside `out`, and remove what is left of it."""
    path = out.with_name(f".{out.name}.{secrets.token_hex(8)}.part")
    create_private(path)
    try:
        yield path
    finally:
        for name in (path, Path(f"{path}-journal")):
            name.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Have a file or a folder on the disk."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
