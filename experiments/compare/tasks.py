"""The training runs to compare schedules on. None of them is a task that policies are trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlsched.envs.data import load_mnist

SPLIT_SEED = 0  # one split into training and validation points for all runs


class Data(NamedTuple):
    """Inputs (points, features) and labels (points,), for training and for validation."""

    inputs: Tensor
    labels: Tensor
    validation_inputs: Tensor
    validation_labels: Tensor


@dataclass(frozen=True)
class Task:
    """A classification task for a multi-layer perceptron."""

    name: str
    meaning: str
    widths: tuple[int, ...]
    batch_size: int
    load: Callable[[Path | None], tuple[Tensor, Tensor]]  # from the folder that --data names
    validation_points: int

    def data(self, folder: Path | None) -> Data:
        return _split(self, folder)

    def network(self) -> nn.Module:
        """The network, with torch's own initialisation."""
        layers: list[nn.Module] = []
        for fan_in, fan_out in zip(self.widths[:-2], self.widths[1:-1], strict=True):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(self.widths[-2], self.widths[-1]))


@lru_cache(maxsize=4)
def _split(task: Task, folder: Path | None) -> Data:
    inputs, labels = task.load(folder)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    validation, training = order[: task.validation_points], order[task.validation_points :]
    return Data(inputs[training], labels[training], inputs[validation], labels[validation])


def _digits(_: Path | None) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.from_numpy(data.data / 16).float(), torch.from_numpy(data.target).long()


def _mnist(folder: Path | None) -> tuple[Tensor, Tensor]:
    if folder is None:
        raise ValueError("task mnist needs --data FOLDER, with MNIST's original files (t10k-*-ubyte, gzipped or not)")
    return load_mnist(folder)


TASKS = {
    task.name: task
    for task in (
        Task("digits", "scikit-learn's 1,797 digits, 8 × 8; MLP 64-64-64-10", (64, 64, 64, 10), 32, _digits, 360),
        Task("mnist", "8,000 MNIST digits, 28 × 28; MLP 784-128-128-10", (784, 128, 128, 10), 64, _mnist, 2000),
    )
}
