"""Files that are there whole or not at all: nothing of the user's is touched before the new is complete.

`write_whole` and `writing` replace one file, `writing_folder` replaces files that belong together, `lock_folder` keeps
other processes out meanwhile, and `check_writable` finds out early that a folder cannot take a result. All of them
raise `ArgumentError` with one line that says what to do. Scratch files have random names and are created exclusively,
so a link that somebody has laid in their way is never followed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import socket
import stat
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from .errors import ArgumentError, printable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "check_writable",
    "finish_folder",
    "lock_folder",
    "remove_scratch",
    "write_error",
    "write_whole",
    "writing",
    "writing_folder",
]

_PREFIX = ".lvlm-fastxai-"
_PART = ".part"  # not complete: of no use once its process is gone
_WHOLE = ".whole"  # a folder of complete files that are on their way to their places
_LOCK = ".lvlm-fastxai.lock"
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


def write_whole(path: str | Path, data: bytes, *, mode: int | None = None, argument: str | None = None) -> None:
    """Replace a file by these bytes, or leave it as it was, whenever the machine stops.

    Args:
        path: of the file. A symbolic link is replaced, not followed; a pipe or a device is written as it is.
        data: all of it.
        mode: permissions, such as 0o600; by default those of the file that is replaced, or the usual ones.
        argument: name that the message of an error begins with.

    Raises:
        ArgumentError: the file cannot be written; what was there is untouched.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_whole(Path(folder) / "policy.json", b"{}")
        ...     (Path(folder) / "policy.json").read_bytes()
        b'{}'
    """
    with writing(path, mode=mode, argument=argument) as file:
        file.write(data)


@contextlib.contextmanager
def writing(path: str | Path, *, mode: int | None = None, argument: str | None = None) -> Iterator[IO[bytes]]:
    """Open a file for writing that takes its name only when the block ends without an error.

    Args:
        path: of the file. A symbolic link is replaced, not followed; a pipe or a device is written as it is.
        mode: permissions, such as 0o600; by default those of the file that is replaced, or the usual ones.
        argument: name that the message of an error begins with.

    Raises:
        ArgumentError: the file cannot be written; what was there is untouched.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with writing(Path(folder) / "records.jsonl") as file:
        ...         for line in (b"1", b"2"):
        ...             _ = file.write(line + b"\\n")
        ...     (Path(folder) / "records.jsonl").read_bytes()
        b'1\\n2\\n'
    """
    path = Path(path)
    with _told(path, argument):
        if _is_stream(path):
            with path.open("wb") as stream:
                yield stream
            return
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        scratch = _scratch_name(path.parent)
        created = _create(scratch, mode, path)
        try:
            with created as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, path)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


@contextlib.contextmanager
def writing_folder(folder: str | Path, *, remove: Iterable[str] = (), argument: str | None = None) -> Iterator[Path]:
    """Yield an empty scratch folder whose files replace those of ``folder`` together, when the block ends well.

    Until every file is complete and on the disk, ``folder`` stays as it was. Files of other names stay. A process that
    is killed while the files take their places leaves the rest to `finish_folder`, which readers of such a set call.

    Args:
        folder: created where it is missing. The scratch folder may hold folders too.
        remove: names of files in ``folder`` that an earlier run wrote and that would be stale; they may be absent.
        argument: name that the message of an error begins with.

    Raises:
        ArgumentError: the files cannot be written; what was there is untouched.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     head = Path(parent) / "head"
        ...     with writing_folder(head) as scratch:
        ...         _ = (scratch / "weights").write_bytes(b"...")
        ...         _ = (scratch / "config").write_bytes(b"...")
        ...     sorted(path.name for path in head.iterdir())
        ['config', 'weights']
    """
    folder = Path(folder)
    with _told(folder, argument):
        folder.mkdir(parents=True, exist_ok=True)
        finish_folder(folder)
        scratch = _scratch_name(folder)
        scratch.mkdir()
        try:
            yield scratch
            for path in sorted(scratch.rglob("*")):
                place = folder / path.relative_to(scratch)
                if place.is_dir() != path.is_dir() and place.exists():
                    raise FileExistsError(errno.EEXIST, f"'{printable(place.name)}' is in the way")
                _sync_folder(path) if path.is_dir() else _sync_file(path)
            _sync_folder(scratch)
            whole = scratch.with_suffix(_WHOLE)
            os.replace(scratch, whole)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        _move_out(whole, folder)
        for name in remove:
            (folder / name).unlink(missing_ok=True)
        _sync_folder(folder)


def finish_folder(folder: str | Path) -> None:
    """Move the files to their places that a killed process had completed with `writing_folder`.

    Raises:
        ArgumentError: there are such files, and the folder cannot be written.
    """
    folder = Path(folder)
    for whole in folder.glob(f"{_PREFIX}*{_WHOLE}"):
        with _told(folder, None):
            _move_out(whole, folder)


def remove_scratch(folder: str | Path) -> None:
    """Remove incomplete files that killed processes have left in a folder; call it under `lock_folder`."""
    for path in Path(folder).glob(f"{_PREFIX}*{_PART}"):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def check_writable(folder: str | Path, *, argument: str | None = None) -> None:
    """Create a folder where it is missing, and prove that a file can be written in it; the proof leaves nothing behind.

    Raises:
        ArgumentError: the folder cannot be created or written, or its disk is full.

    Example:
        >>> check_writable("/dev/null/out")
        Traceback (most recent call last):
        ...
        lvlm_fastxai.errors.ArgumentError: cannot write '/dev/null/out': Not a directory
    """
    folder = Path(folder)
    with _told(folder, argument):
        folder.mkdir(parents=True, exist_ok=True)
        scratch = _scratch_name(folder)
        created = _create(scratch)
        try:
            with created as file:
                file.write(bytes(4096))  # an empty file can be made on a full disk
        finally:
            scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def lock_folder(folder: str | Path, *, argument: str | None = None) -> Iterator[None]:
    """Keep every other `lock_folder` of this folder out, in this process or another, until the block ends.

    The operating system holds the lock: it ends with the process, however that ends. File systems that know no locks
    are told of by a warning.

    Args:
        folder: created where it is missing.
        argument: name that the message of an error begins with.

    Raises:
        ArgumentError: another holds the lock, and who it is; or the folder cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, lock_folder(folder):
        ...     with lock_folder(folder):
        ...         pass
        Traceback (most recent call last):
        ...
        lvlm_fastxai.errors.ArgumentError: '/...' is in use by process ...
    """
    folder = Path(folder)
    path = folder / _LOCK
    with _told(folder, argument):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _take_lock(path, argument)
    try:
        yield
    finally:
        # Before the lock is let go: who opens the file from now on makes a new one, who has it open looks again.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def write_error(path: str | Path, error: OSError, argument: str | None = None) -> ArgumentError:
    """Make the error to raise when a file cannot be written: one line that names the file and the reason.

    Example:
        >>> write_error("head.json", OSError(errno.ENOSPC, "No space left on device"), "--out")
        ArgumentError("--out: cannot write 'head.json': disk full; make room, or name a place on another disk")
    """
    reason = {
        errno.ENOSPC: "disk full; make room, or name a place on another disk",
        errno.EDQUOT: "disk full, your quota is used up; make room, or name a place on another disk",
        errno.EFBIG: "disk full, or a larger file than is allowed here (see `ulimit -f`)",
        errno.EROFS: "read-only file system; name another place",
    }.get(error.errno or 0, error.strerror or str(error))
    return ArgumentError(f"{_begin(argument)}cannot write '{printable(path)}': {reason}")


@contextlib.contextmanager
def _told(path: Path, argument: str | None) -> Iterator[None]:
    """Tell of errors as `write_error` does, but for those of files that a caller's block reads beside."""
    try:
        yield
    except OSError as error:
        name = error.filename
        if isinstance(name, str | bytes):
            name = os.fsdecode(name)
            if _PREFIX not in name and _LOCK not in name and not path.is_relative_to(name):
                raise
        raise write_error(path, error, argument) from error


def _begin(argument: str | None) -> str:
    return f"{argument}: " if argument else ""


def _scratch_name(folder: Path) -> Path:
    return folder / f"{_PREFIX}{secrets.token_hex(8)}{_PART}"


def _create(scratch: Path, mode: int | None = None, successor_of: Path | None = None) -> IO[bytes]:
    """Open a new file; with the permissions ``mode``, or else those of the regular file that it will replace."""
    if mode is None and successor_of is not None:
        with contextlib.suppress(FileNotFoundError):
            before = os.lstat(successor_of).st_mode
            mode = stat.S_IMODE(before) if stat.S_ISREG(before) else None
    descriptor = os.open(scratch, _CREATE, 0o666 if mode is None else mode)
    if mode is not None and hasattr(os, "fchmod"):
        os.fchmod(descriptor, mode)  # open() takes the umask off
    return os.fdopen(descriptor, "wb")


def _is_stream(path: Path) -> bool:
    """Whether the path names a pipe or a device, which cannot be replaced; /dev/stdout is one wherever it leads."""
    with contextlib.suppress(OSError):
        if stat.S_IFMT(path.stat().st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
            return True
        return os.path.realpath(path.parent) == "/dev" or os.path.realpath(path.parent).startswith("/proc/")
    return False


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder safe too, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _move_out(whole: Path, folder: Path) -> None:
    """Move what lies in ``whole`` into ``folder``, file by file, and remove what is left of ``whole``."""
    for path in sorted(whole.rglob("*")):
        place = folder / path.relative_to(whole)
        if path.is_dir():
            place.mkdir(exist_ok=True)
        else:
            os.replace(path, place)
    shutil.rmtree(whole)


def _take_lock(path: Path, argument: str | None) -> int:
    """Open and lock a file; returns its descriptor."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    while True:
        descriptor = os.open(path, flags, 0o666)
        try:
            if fcntl is None:
                return descriptor
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 1000).decode("utf-8", "replace").strip() or "another process"
            os.close(descriptor)
            raise ArgumentError(
                f"{_begin(argument)}'{printable(path.parent)}' is in use by {printable(holder)}; "
                "wait for its end, or name another folder"
            ) from None
        except OSError as error:
            warnings.warn(
                f"'{path.parent}' cannot be locked ({error.strerror}); let one process write there", stacklevel=4
            )
            return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        # The holder before may have removed the file between our open and our lock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:3]]) if sys.argv else "python"
    held = f"process {os.getpid()} on {socket.gethostname()} ({command}, since {time.strftime('%Y-%m-%d %H:%M:%S')})"
    os.ftruncate(descriptor, 0)
    os.write(descriptor, held.encode("utf-8", "replace"))
    return descriptor
