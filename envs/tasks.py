"""Inner tasks: a network, its data and its loss, drawn anew for every episode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[Any]

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
        _check_ranges(self, "decisions", "sgd_lr", "adaptive_lr", "weight_decay")
        _check_probabilities(self, "adaptive", "no_momentum", "other_momentum", "no_loss")

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

    @property
    def batch_size(self) -> int:
        """Points in a mini-batch."""

    @property
    def interval(self) -> int:
        """Inner steps in a window."""

    @property
    def setup(self) -> SetupDistribution:
        """How the episodes train."""

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
        _check_counts(self, "batch_size", "interval")
        _check_ranges(self, "gain", "loss_scale")
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden must hold widths of at least 1, got {self.hidden}")

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)

    def _initial_weights(self, rng: Generator, network: nn.Module) -> Tensor:
        gain = log_uniform(rng, *self.gain)
        return torch.cat([he_normal(rng, p.shape, gain).flatten() for p in network.parameters()])


@dataclass(frozen=True)
class _Generated(_Classification):
    """What the tasks on generated inputs share."""

    inputs: int = 24
    classes: int = 8
    # Training points, log-uniform. Enough that a small network does not learn them by heart in one run: tasks that
    # overfit teach a policy to stop early, and then it stops early everywhere.
    points: tuple[int, int] = (1024, 8192)
    validation_points: int = 128
    spectrum: tuple[float, float] = (0.0, 1.5)  # exponent of the inputs' standard deviations, uniform
    input_scale: tuple[float, float] = (0.3, 3.0)  # log-uniform
    positive: float = 0.4  # probability that inputs are cut at zero: sparse and of a mean that is not, like pixels
    label_noise: float = 0.1  # the most, uniform from 0, in a quarter of the episodes; else none

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_counts(self, "inputs", "classes", "validation_points")
        _check_ranges(self, "points", "input_scale")
        _check_probabilities(self, "positive", "label_noise")

    @property
    def max_points(self) -> int:
        return self.points[1]

    def network(self) -> nn.Module:
        return _mlp(self.inputs, self.hidden, self.classes, self.activation)

    def episode(self, rng: Generator) -> Episode:
        points = round(log_uniform(rng, *self.points))
        spectrum = np.arange(1, self.inputs + 1, dtype=np.float32) ** np.float32(-rng.uniform(*self.spectrum))
        rng.shuffle(spectrum)
        spectrum /= np.sqrt(np.mean(spectrum**2))
        floor = rng.uniform(-0.5, 0.5) if rng.random() < self.positive else None
        inputs, targets = self._draw(rng, points + self.validation_points, spectrum, floor)
        if rng.random() < 0.25:
            wrong = rng.random(len(targets)) < rng.uniform(0, self.label_noise)
            targets = np.where(wrong, rng.integers(self.classes, size=len(targets)), targets)
        x = torch.from_numpy(inputs) * log_uniform(rng, *self.input_scale)
        y = torch.from_numpy(targets)
        weights = self._initial_weights(rng, self.network())
        return Episode(weights, x[:points], y[:points], x[points:], y[points:], log_uniform(rng, *self.loss_scale))

    def _draw(self, rng: Generator, count: int, spectrum: Array, floor: float | None) -> tuple[Array, Array]:
        """Inputs (count, inputs) of about unit scale, above `floor` and from there if it is given; labels (count,)."""
        raise TypeError("a task on generated inputs says how they are drawn")


@dataclass(frozen=True)
class TeacherStudent(_Generated):
    """Labels from a random one-hidden-layer teacher on normal inputs with a power-law spectrum: hard to learn."""

    teacher_gain: tuple[float, float] = (1.0, 4.0)  # log-uniform
    teacher_width: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_counts(self, "teacher_width")
        _check_ranges(self, "teacher_gain")

    def _draw(self, rng: Generator, count: int, spectrum: Array, floor: float | None) -> tuple[Array, Array]:
        inputs = _above(floor, spectrum * rng.standard_normal((count, self.inputs), dtype=np.float32))
        gain = np.float32(log_uniform(rng, *self.teacher_gain))
        first = gain * rng.standard_normal((self.inputs, self.teacher_width), dtype=np.float32) / np.sqrt(self.inputs)
        second = rng.standard_normal((self.teacher_width, self.classes), dtype=np.float32)
        return inputs, (np.tanh(inputs @ first.astype(np.float32)) @ second).argmax(-1)


@dataclass(frozen=True)
class Prototypes(_Generated):
    """Each class is a few random points, and inputs are noisy copies of them: images of digits are like that."""

    prototypes: tuple[int, int] = (1, 6)  # of a class, uniform
    separation: tuple[float, float] = (2.0, 7.0)  # half the distance of two prototypes over the noise; log-uniform

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_ranges(self, "prototypes", "separation")

    def _draw(self, rng: Generator, count: int, spectrum: Array, floor: float | None) -> tuple[Array, Array]:
        prototypes = int(rng.integers(self.prototypes[0], self.prototypes[1] + 1))
        # Two normal points in d dimensions are √(2d) apart.
        noise = np.float32(np.sqrt(self.inputs / 2) / log_uniform(rng, *self.separation))
        centres = rng.standard_normal((self.classes * prototypes, self.inputs), dtype=np.float32)
        which = rng.integers(len(centres), size=count)
        inputs = centres[which] + noise * rng.standard_normal((count, self.inputs), dtype=np.float32)
        return _above(floor, spectrum * inputs / np.sqrt(1 + noise**2)), which % self.classes


def _above(floor: float | None, inputs: Array) -> Array:
    return inputs if floor is None else np.maximum(inputs, floor) - floor


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
        return _mlp(64, self.hidden, 10, self.activation)

    def episode(self, rng: Generator) -> Episode:
        x, y = _digits()
        order = torch.from_numpy(rng.permutation(len(y)))
        train, validation = order[self._validation_points :], order[: self._validation_points]
        weights = self._initial_weights(rng, self.network())
        return Episode(weights, x[train], y[train], x[validation], y[validation], log_uniform(rng, *self.loss_scale))


@lru_cache(maxsize=64)
def _mlp(inputs: int, hidden: tuple[int, ...], classes: int, activation: str) -> nn.Module:
    """A perceptron; its weights are never used, so one serves all."""
    widths = [inputs, *hidden]
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.from_numpy(data.data / 16).float(), torch.from_numpy(data.target).long()


def _check_counts(config: object, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")


def _check_ranges(config: object, *names: str) -> None:
    for name in names:
        low, high = getattr(config, name)
        if not 0 < low <= high:
            raise ValueError(f"{name} must be a range (low, high) with 0 < low <= high, got {(low, high)}")


def _check_probabilities(config: object, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} is a probability in [0, 1], got {getattr(config, name)}")


def log_uniform(rng: Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def he_normal(rng: Generator, shape: torch.Size, gain: float) -> Tensor:
    """Normal weights of variance 2 · gain² / fan-in for a weight; zeros for a bias."""
    if len(shape) < 2:
        return torch.zeros(shape)
    scale = np.float32(gain * np.sqrt(2 / np.prod(shape[1:])))
    return torch.from_numpy(scale * rng.standard_normal(tuple(shape), dtype=np.float32))
