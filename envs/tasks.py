"""Inner tasks: a network, its data and its loss, drawn anew for every episode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor, nn

ACTIVATIONS: Mapping[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


class Episode(NamedTuple):
    """What one episode trains: initial weights, data and a factor on the loss."""

    params: Tensor  # (parameters,), in the order of the network's `parameters()`
    inputs: Tensor  # (points, *input shape)
    targets: Tensor  # (points,)
    validation_inputs: Tensor  # (validation points, *input shape)
    validation_targets: Tensor  # (validation points,)
    loss_scale: float


class TrainingSetup(NamedTuple):
    """How one episode trains, in the terms of torch.optim."""

    decisions: int
    adaptive: bool  # AdamW, else SGD
    lr: float
    momentum: float  # `momentum` of SGD, the first beta of AdamW
    weight_decay: float
    loss_reported: bool  # whether the policy sees the loss


@dataclass(frozen=True)
class SetupDistribution:
    """Distribution of training set-ups. Ranges are log-uniform."""

    decisions: tuple[int, int] = (30, 140)
    adaptive: float = 0.5  # probability of AdamW
    sgd_lr: tuple[float, float] = (1e-5, 2.0)  # over the loss scale, at a momentum of 0.9
    adaptive_lr: tuple[float, float] = (3e-5, 0.3)
    weight_decay: tuple[float, float] = (1e-5, 1e-2)  # in half of the episodes, else 0
    no_momentum: float = 0.05  # probability that SGD runs without momentum
    other_momentum: float = 0.3  # probability of a momentum between 0.5 and 0.98 in place of 0.9
    no_loss: float = 0.05  # probability that the policy is not told the loss

    def __post_init__(self) -> None:
        for name in ("decisions", "sgd_lr", "adaptive_lr", "weight_decay"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be a range (low, high) with 0 < low <= high, got {(low, high)}")
        for name in ("adaptive", "no_momentum", "other_momentum", "no_loss"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability in [0, 1], got {getattr(self, name)}")

    def draw(self, rng: Generator, loss_scale: float) -> TrainingSetup:
        decisions = round(log_uniform(rng, *self.decisions))
        adaptive = bool(rng.random() < self.adaptive)
        momentum = 0.9
        if rng.random() < self.other_momentum:
            momentum = 1 - log_uniform(rng, 0.02, 0.5)
        if adaptive:
            lr = log_uniform(rng, *self.adaptive_lr)
        else:
            if rng.random() < self.no_momentum:
                momentum = 0.0
            # Momentum multiplies the step of torch's SGD by 1 / (1 - momentum).
            lr = log_uniform(rng, *self.sgd_lr) / loss_scale * (1 - momentum) / 0.1
        decay = log_uniform(rng, *self.weight_decay) if rng.random() < 0.5 else 0.0
        loss_reported = bool(rng.random() >= self.no_loss)
        return TrainingSetup(decisions, adaptive, lr, momentum, decay, loss_reported)


class InnerTask(Protocol):
    """A family of inner tasks that share one architecture, and so can be trained as one stack."""

    batch_size: int
    interval: int  # inner steps in a window
    setup: SetupDistribution

    @property
    def max_points(self) -> int:
        """The most training points that an episode may have."""

    def network(self) -> nn.Module:
        """The architecture. Its weights are ignored: those of an episode come from `episode`."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of one network's outputs on a batch, 0-d."""

    def episode(self, rng: Generator) -> Episode:
        """Draw weights and data; the same `rng` state gives the same episode."""


@dataclass(frozen=True)
class _Classification:
    """What the classification tasks with a multi-layer perceptron share."""

    hidden: tuple[int, ...] = (32, 32)
    activation: str = "relu"
    batch_size: int = 32
    interval: int = 10
    gain: tuple[float, float] = (0.3, 2.0)  # factor on the He initialisation, log-uniform
    loss_scale: tuple[float, float] = (0.1, 10.0)  # factor on the loss, log-uniform
    setup: SetupDistribution = field(default_factory=SetupDistribution)

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {self.activation!r}")
        for name in ("batch_size", "interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)

    def _mlp(self, inputs: int, classes: int) -> nn.Module:
        widths = [inputs, *self.hidden]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), ACTIVATIONS[self.activation]()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], classes))

    def _initial_weights(self, rng: Generator, network: nn.Module) -> Tensor:
        gain = log_uniform(rng, *self.gain)
        return torch.cat([he_normal(rng, p.shape, gain).flatten() for p in network.parameters()])


@dataclass(frozen=True)
class TeacherStudent(_Classification):
    """Labels from a random one-hidden-layer teacher on normal inputs with a power-law spectrum, some of them wrong."""

    inputs: int = 24
    classes: int = 8
    points: tuple[int, int] = (512, 4096)  # training points, log-uniform
    validation_points: int = 128
    spectrum: tuple[float, float] = (0.0, 1.5)  # exponent of the inputs' standard deviations, uniform
    input_scale: tuple[float, float] = (0.3, 3.0)  # log-uniform
    teacher_gain: tuple[float, float] = (1.0, 4.0)  # log-uniform
    teacher_width: int = 16
    label_noise: float = 0.15  # the most, uniform from 0, in half of the episodes; else none

    @property
    def max_points(self) -> int:
        return self.points[1]

    def network(self) -> nn.Module:
        return _cached_mlp(self)

    def episode(self, rng: Generator) -> Episode:
        points = round(log_uniform(rng, *self.points))
        spectrum = np.arange(1, self.inputs + 1, dtype=np.float32) ** -rng.uniform(*self.spectrum)
        rng.shuffle(spectrum)
        spectrum *= np.float32(log_uniform(rng, *self.input_scale) / np.sqrt(np.mean(spectrum**2)))
        inputs = spectrum * rng.standard_normal((points + self.validation_points, self.inputs), dtype=np.float32)
        targets = self._labels(rng, inputs / np.sqrt(np.mean(spectrum**2)))
        x, y = torch.from_numpy(inputs), torch.from_numpy(targets)
        return Episode(
            self._initial_weights(rng, self.network()),
            x[:points],
            y[:points],
            x[points:],
            y[points:],
            log_uniform(rng, *self.loss_scale),
        )

    def _labels(self, rng: Generator, inputs: np.ndarray) -> np.ndarray:
        gain = log_uniform(rng, *self.teacher_gain)
        first = rng.standard_normal((self.inputs, self.teacher_width), dtype=np.float32) / np.sqrt(self.inputs)
        second = rng.standard_normal((self.teacher_width, self.classes), dtype=np.float32)
        labels = (np.tanh(gain * inputs @ first) @ second).argmax(-1)
        if rng.random() < 0.5:
            wrong = rng.random(len(labels)) < rng.uniform(0, self.label_noise)
            labels = np.where(wrong, rng.integers(self.classes, size=len(labels)), labels)
        return labels


@dataclass(frozen=True)
class Digits(_Classification):
    """scikit-learn's 1,797 handwritten digits, 8 × 8, in [0, 1]; a fifth of them, drawn anew, validates."""

    @property
    def max_points(self) -> int:
        return len(_digits()[1]) - self._validation_points

    @property
    def _validation_points(self) -> int:
        return len(_digits()[1]) // 5

    def network(self) -> nn.Module:
        return _cached_mlp(self)

    def episode(self, rng: Generator) -> Episode:
        x, y = _digits()
        order = torch.from_numpy(rng.permutation(len(y)))
        train, validation = order[self._validation_points :], order[: self._validation_points]
        weights = self._initial_weights(rng, self.network())
        return Episode(weights, x[train], y[train], x[validation], y[validation], log_uniform(rng, *self.loss_scale))


@lru_cache(maxsize=64)
def _cached_mlp(task: TeacherStudent | Digits) -> nn.Module:
    if isinstance(task, Digits):
        return task._mlp(64, 10)
    return task._mlp(task.inputs, task.classes)


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.from_numpy(data.data / 16).float(), torch.from_numpy(data.target).long()


def log_uniform(rng: Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def he_normal(rng: Generator, shape: torch.Size, gain: float) -> Tensor:
    """Normal weights of variance 2 · gain² / fan-in for a weight; zeros for a bias."""
    if len(shape) < 2:
        return torch.zeros(shape)
    scale = np.float32(gain * np.sqrt(2 / np.prod(shape[1:])))
    return torch.from_numpy(scale * rng.standard_normal(tuple(shape), dtype=np.float32))
