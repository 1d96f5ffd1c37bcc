"""Files that are whole or not there, and folders that a process has for itself."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from rlsched import FrozenSchedule, SchedulePolicy, files
from rlsched.files import LOCK, append, locked, write

ROOM = 64  # bytes


@contextmanager
def little_room():
    """Nobody can write more than the first `ROOM` bytes of a file: as on a full disk, some of a write fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- Files ----------------------------------------------------------------------------------------------------------


def test_file_is_the_old_one_or_the_new_one(tmp_path):
    """Half a checkpoint over the last whole one is a training lost."""
    path = write(tmp_path / "new" / "folder" / "file", b"old")
    assert path.read_bytes() == b"old"
    with little_room(), pytest.raises(OSError, match=r"File too large: '.*new/folder/file'$") as error:
        write(path, bytes(2 * ROOM))
    assert error.value.filename == str(path)
    assert path.read_bytes() == b"old"
    write(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["file"], "what was left half-done would never be found"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failure_at_any_point_leaves_the_old_file(call, tmp_path, monkeypatch):
    """A disk may say only in the end that it is full."""
    path = write(tmp_path / "file", b"old")

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os if call == "fsync" else Path, call, fail)
    with pytest.raises(OSError, match=r"No space left on device: '.*file'$"):
        write(path, b"new")
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_interrupt_leaves_the_old_file(tmp_path, monkeypatch):
    """Ctrl-C comes when it comes."""
    path = write(tmp_path / "file", b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write(path, b"new")
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_all_is_appended_or_nothing(tmp_path):
    """Half a line at the end would be taken for a result, or run into the next one."""
    path = write(tmp_path / "file", b"line\n")
    with little_room(), pytest.raises(OSError, match=r"File too large: '.*file'$"):
        append(path, bytes(2 * ROOM))
    assert path.read_bytes() == b"line\n"
    append(path, b"another\n")
    assert path.read_bytes() == b"line\nanother\n"


@pytest.mark.parametrize("inside", ["file", "file/deeper/file"])
def test_file_in_place_of_a_folder_is_named(inside, tmp_path):
    """A traceback from the depths hides which of the paths was wrong."""
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"must be a folder, and a file is in the way: '.*file"):
        write(tmp_path / inside / "new", b"")
    with (
        pytest.raises(NotADirectoryError, match=r"must be a folder, and a file is in the way: '.*file"),
        locked(tmp_path / inside),
    ):
        pass


def test_what_users_keep_is_written_in_one_move(tmp_path, monkeypatch):
    """A policy or a schedule that broke off would be found out when it is needed."""
    frozen = FrozenSchedule(3, "linear", (0.1,), (0, 2), (1.0, 0.5), {})
    policy = SchedulePolicy.zero()
    paths = policy.save(tmp_path / "a" / "p.safetensors"), frozen.save(tmp_path / "b" / "s.json")
    before = [path.read_bytes() for path in paths]
    with little_room():
        for save, path in zip((policy.save, frozen.save), paths, strict=True):
            with pytest.raises(OSError, match="File too large"):
                save(path)
    assert [path.read_bytes() for path in paths] == before
    assert json.loads(before[1])["total_steps"] == 3


# --- Folders --------------------------------------------------------------------------------------------------------

HOLD = """
import sys
from rlsched.files import locked
with locked(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has the lock of the folder `run`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def test_folder_is_one_processs_and_is_free_when_that_is_gone(holder, tmp_path):
    """Two trainings in one folder write each other's checkpoints; and a lock that outlives a kill keeps all out."""
    folder = tmp_path / "run"
    for _ in range(2):
        with pytest.raises(BlockingIOError, match=rf"in use by process {holder.pid} on \S+: '.*run'$"), locked(folder):
            pass
    with locked(tmp_path / "another"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (folder / LOCK).read_text().startswith(f"process {holder.pid} on "), "killed without a chance to tidy up"
    with locked(folder):
        assert (folder / LOCK).read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(BlockingIOError, match=f"in use by process {os.getpid()}"), locked(folder):
            pass
    with locked(folder):
        pass
    assert (folder / LOCK).read_text() == ""


def test_stopped_holder_is_still_the_holder(holder, tmp_path):
    """Who took over from a process that sleeps would meet it when it wakes up."""
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(BlockingIOError, match=f"in use by process {holder.pid}"), locked(tmp_path / "run"):
        pass
    holder.send_signal(signal.SIGCONT)
    holder.communicate()
    with locked(tmp_path / "run"):
        pass


def test_lock_is_given_back_after_an_error(tmp_path):
    """In a notebook, a training that failed would keep its folder until the kernel is restarted."""
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    with locked(tmp_path):
        pass


def test_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    """On a cluster's disk that knows no locks nothing would run at all."""

    def fail(_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files, "_lock", fail)
    with pytest.warns(UserWarning, match="is on a file system without locks"), locked(tmp_path):
        pass


def test_error_that_names_no_file_is_told_of_the_folder(tmp_path):
    """Which of the disks is full?"""
    no_space = errno.ENOSPC, os.strerror(errno.ENOSPC)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}'"), locked(tmp_path):
        raise OSError(*no_space)
    with pytest.raises(OSError, match=r"No space left on device: 'elsewhere'"), locked(tmp_path):
        raise OSError(*no_space, "elsewhere")
    with pytest.raises(ChildProcessError, match=r"^a worker died$"), locked(tmp_path):
        raise ChildProcessError("a worker died")
