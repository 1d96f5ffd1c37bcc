"""Results on disk: JSON lines, each with where it comes from. What is there need not be done again."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

import rlsched
from rlsched.files import append, end_last_line, make_folder, whole_lines

Row = dict[str, Any]
Key = TypeVar("Key", bound=Hashable)

CPUINFO = Path("/proc/cpuinfo")  # of Linux


class Journal(Generic[Key]):
    """The results of a study, to be added to: each is in the file as soon as it was added.

    One process at a time may add to a file: see `rlsched.files.locked`.

    Args:
        path: the file; it and its folder are made where they are missing.
        key: says what a row is the result of, and raises KeyError or TypeError if it is none of this study.

    Raises:
        ValueError: a line of the file is no result.
        OSError: the folder cannot be made, or nothing can be written there.
    """

    def __init__(self, path: Path, key: Callable[[Row], Key]) -> None:
        make_folder(path.parent)
        path.touch()  # a folder that nothing can be written to is better known before the first run
        self.path = path
        self.rows = read(path, key)
        self._key = key
        self._provenance = provenance()
        end_last_line(path)

    def __contains__(self, key: object) -> bool:
        return key in self.rows

    def add(self, row: Row) -> None:
        """Write a row down, with where it comes from.

        Raises:
            OSError: it cannot be written; the file is as it was.
        """
        row = {**row, "provenance": self._provenance}
        key = self._key(row)
        append(self.path, json.dumps(row).encode() + b"\n")
        self.rows[key] = row


def read(path: Path, key: Callable[[Row], Key]) -> dict[Key, Row]:
    """The results in a file of JSON lines; of several for the same key, the last one.

    Raises:
        ValueError: a line is no result. One that was cut off as it was written is left out, with a warning.
    """
    rows = {}
    for number, line in whole_lines(path):
        try:
            row = json.loads(line)
            rows[key(row)] = row
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}, is not a result ({error!r}); delete the line and run again"
            ) from None
    return rows


def provenance() -> dict[str, str]:
    """Where a result comes from: versions, commit and machine."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "rlsched": rlsched.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": git.stdout.strip(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "processor": _processor(),
    }


def _processor() -> str:
    found = re.search(r"model name\s*: (.*)", CPUINFO.read_text()) if CPUINFO.exists() else None
    return found[1] if found else platform.processor()
