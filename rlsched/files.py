"""Files that are there whole or not at all, and folders that a process has for itself."""

from __future__ import annotations

import errno
import json
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK = ".lock"  # the file in a folder that is locked, with who has it; it stays
UNLOCKABLE = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}  # of file systems that have no locks
FAR = 1 << 30  # Windows locks bytes, and nobody may read those: one that no holder's name reaches


def write(path: str | Path, content: bytes) -> Path:
    """Write a file in one move, so that it is the old one or the new one whatever happens. Returns the path.

    Its folder is made if need be.

    Raises:
        OSError: it cannot be written; `filename` is `path`.
    """
    path = Path(path)
    make_folder(path.parent)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with _about(path):
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # or a power cut leaves the new name on an empty file
            partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink()
    return path


def append(path: Path, content: bytes) -> None:
    """Write to the end of a file: all of it, or nothing if the disk is full.

    Raises:
        OSError: it cannot be written; `filename` is `path`.
    """
    with _about(path), path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            while content:
                content = content[file.write(content) :]  # as much as there is room for
        except OSError:
            file.truncate(size)
            raise


def end_last_line(path: Path) -> None:
    """Cut off what a kill in mid-write has left of a file of JSON lines, so that the next one begins a line.

    It is made where there is none.

    Raises:
        OSError: it cannot be written.
    """
    path.touch()
    content = path.read_bytes()
    start = content.rfind(b"\n") + 1
    if start == len(content):
        return
    with path.open("ab") as file:
        if _is_json(content[start:]):
            file.write(b"\n")
        else:
            file.truncate(start)


def whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file of JSON lines, with their numbers.

    A last one that was cut off as it was written is left out, with a warning.
    """
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith((b"\n", b"\r")) and not _is_json(line):
            warnings.warn(f"{path}, line {number}, was cut off as it was written: it is left out", stacklevel=4)
            return
        yield number, line


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, where there is none.

    Raises:
        OSError: it cannot be made; NotADirectoryError, because a file is in the way.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(errno.ENOTDIR, "must be a folder, and a file is in the way", str(path)) from None


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Have a folder for oneself; it is made if need be.

    The system takes the lock back when the process ends, however it ends: no lock outlives its holder. An error of the
    disk that names no file, as those of TensorBoard, is told of the folder.

    Raises:
        BlockingIOError: somebody has it; the message says who.
        OSError: nothing can be written there.
    """
    folder = Path(folder)
    make_folder(folder)
    with (folder / LOCK).open("a+b", buffering=0) as file:
        try:
            _lock(file.fileno())
        except OSError as error:
            if error.errno not in UNLOCKABLE:
                file.seek(0)
                holder = file.read(200).decode(errors="replace") or "another process"
                raise BlockingIOError(errno.EAGAIN, f"in use by {holder}", str(folder)) from None
            warnings.warn(f"{folder} is on a file system without locks: nothing else may write there", stacklevel=3)
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}".encode())
            yield
        except OSError as error:
            if error.errno is None or error.filename is not None:
                raise
            raise OSError(error.errno, error.strerror, str(folder)) from error
        finally:
            with suppress(OSError):
                file.truncate(0)


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """What goes wrong inside is told of this path."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _lock(descriptor: int) -> None:
    """Lock an open file until it is closed, or raise OSError at once."""
    if sys.platform == "win32":
        os.lseek(descriptor, FAR, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
