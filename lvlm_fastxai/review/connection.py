"""Opens a queue's file, which its owner alone may read."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from .schema import BUSY_SECONDS

__all__ = ["PRIVATE", "connect", "create_private", "make_private"]

PRIVATE = 0o600
"""Of the file; SQLite gives its journals the same permissions."""


def create_private(path: Path) -> None:
    """Make an empty file that its owner alone can read, unless there is one.

    Raises:
        OSError: it cannot be made.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, PRIVATE)
    except FileExistsError:
        return
    try:
        if hasattr(os, "fchmod"):
            os.fchmod(descriptor, PRIVATE)  # a strict umask leaves the owner less
    finally:
        os.close(descriptor)


def make_private(path: Path) -> None:
    """Take the permissions of others from a file of this user's."""
    found = path.stat()
    if found.st_mode & 0o077 and hasattr(os, "geteuid") and found.st_uid == os.geteuid():
        os.chmod(path, PRIVATE)


def connect(path: Path) -> sqlite3.Connection:
    """Open an existing file without making one.

    Raises:
        sqlite3.Error: there is none, or it cannot be opened.
    """
    address = f"{path.absolute().as_uri()}?mode=rw"
    return sqlite3.connect(address, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
