"""What methods are compared on."""

from __future__ import annotations

from typing import NamedTuple


class Cell(NamedTuple):
    """A task, an optimizer and the length of a run, in inner steps."""

    task: str
    optimizer: str
    steps: int

    def __str__(self) -> str:
        return f"{self.task}, {self.optimizer}, {self.steps} steps"
