"""The tasks to compare schedules on: two that the shipped policy has not trained on, and any other inner task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from numpy.random import Generator
from torch import Tensor

from rlsched.envs import FAMILIES, InnerTask, bundled
from rlsched.envs.data import load_mnist
from rlsched.envs.mixtures import mixture
from rlsched.envs.sources import Points
from rlsched.experiments.networks import perceptron
from rlsched.experiments.points import split


class FixedSplit:
    """A source of stored data of which the same points validate whatever is drawn.

    Args:
        inputs: (points, *input shape).
        targets: (points, *target shape).
        validation_points: number of validation points.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, validation_points: int) -> None:
        self.points = split(inputs, targets, validation_points)

    @property
    def max_points(self) -> int:
        return len(self.points.inputs)

    def draw(self, rng: Generator) -> Points:
        return self.points


def digits(_: Path | None = None) -> InnerTask:
    """scikit-learn's 1,797 digits, 8 × 8; a perceptron 64-64-64-10."""
    data = bundled("digits")
    return InnerTask(partial(perceptron, 64, 64, 64, 10), FixedSplit(data.inputs, data.targets, 360), batch_size=32)


def mnist(folder: Path | None) -> InnerTask:
    """10,000 MNIST digits, 28 × 28; a perceptron 784-128-128-10.

    Args:
        folder: holds MNIST's original test files.
    """
    if folder is None:
        raise ValueError("task mnist needs --data FOLDER, with MNIST's original files (t10k-*-ubyte, gzipped or not)")
    try:
        images, labels = load_mnist(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--data: {error}") from error
    return InnerTask(partial(perceptron, 784, 128, 128, 10), FixedSplit(images, labels, 2000), batch_size=64)


TASKS: Mapping[str, Callable[[Path | None], InnerTask]] = {"digits": digits, "mnist": mnist}


def named(tasks: Sequence[str] | Mapping[str, InnerTask], folder: Path | None = None) -> dict[str, InnerTask]:
    """The inner tasks to compare on, by their names.

    Args:
        tasks: inner tasks by names of your own; or names: keys of `TASKS`, of `rlsched.envs.FAMILIES`, or
            "module:NAME" of an inner task or a sequence of them, which are then numbered.
        folder: of the data files, for tasks that need them.

    Raises:
        ValueError: a name is not known, or what it stands for is no inner task.
        FileNotFoundError: the folder lacks a file.
    """
    allowed = f"{[*TASKS, *FAMILIES]}, 'module:NAME', or inner tasks with names: {{'mine': task}}"
    if isinstance(tasks, Mapping):
        wrong = {name: task for name, task in tasks.items() if not isinstance(task, InnerTask)}
        if wrong or not tasks:
            raise ValueError(f"tasks must map names to at least one InnerTask, got {wrong or 'none'}")
        return dict(tasks)
    if isinstance(tasks, InnerTask) or not tasks:
        raise ValueError(f"tasks must be some of {allowed}, got {tasks!r}")
    found: dict[str, InnerTask] = {}
    for name in [tasks] if isinstance(tasks, str) else tasks:
        if not isinstance(name, str) or (":" not in name and name not in TASKS and name not in FAMILIES):
            raise ValueError(f"tasks must be some of {allowed}, got {name!r}")
        if ":" in name:
            found |= _imported(name)
        else:
            found[name] = TASKS[name](folder) if name in TASKS else FAMILIES[name]
    return found


def _imported(name: str) -> dict[str, InnerTask]:
    tasks = mixture(name)
    return {name: tasks[0]} if len(tasks) == 1 else {f"{name}[{i}]": task for i, task in enumerate(tasks)}
