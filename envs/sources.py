"""Where the data of inner tasks come from: a source is a distribution of data sets.

Generated data are drawn anew for every episode and belong to one network; here are vectors, images and noise, in
`sequences` the rest. Data that the user has are in `stored`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from rlsched.envs.draws import check_at_least, check_probabilities, check_ranges, log_uniform

Array = NDArray[Any]


class Points(NamedTuple):
    """The data of one episode. Where the targets are the very tensor of the inputs, they take no memory."""

    inputs: Tensor  # (points, *input shape)
    targets: Tensor  # (points, *target shape)
    validation_inputs: Tensor  # (validation points, *input shape)
    validation_targets: Tensor  # (validation points, *target shape)


class Source(Protocol):
    """A distribution of data sets."""

    @property
    def max_points(self) -> int:
        """The most training points that an episode may have."""

    def draw(self, rng: Generator) -> Points:
        """Draw a data set; the same `rng` state gives the same one."""


# --- Generated data -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Generated:
    """What the sources of generated data share: a training set of a drawn size.

    Args:
        points: range of the number of training points, log-uniform. With too few a network learns them by heart in one
            run, and tasks that overfit teach a policy to stop early everywhere.
        validation_points: number of validation points.
    """

    points: tuple[int, int] = (1024, 8192)
    validation_points: int = 128

    def __post_init__(self) -> None:
        check_at_least(1, self, "validation_points")
        check_ranges(self, "points")

    @property
    def max_points(self) -> int:
        return self.points[1]

    def draw(self, rng: Generator) -> Points:
        points = round(log_uniform(rng, *self.points))
        inputs, targets = self._draw(rng, points + self.validation_points)
        x, y = torch.from_numpy(inputs), torch.from_numpy(targets)
        train, validation = x[:points], x[points:]
        if targets is inputs:
            return Points(train, train, validation, validation)
        return Points(train, y[:points], validation, y[points:])

    def _draw(self, rng: Generator, count: int) -> tuple[Array, Array]:
        """Inputs (count, *input shape) and targets (count, *target shape)."""
        raise TypeError(f"{type(self).__name__} does not say how its points are drawn")


@dataclass(frozen=True)
class Labelled(Generated):
    """What the sources of generated data with labels share.

    Args:
        classes: number of classes.
        label_noise: the largest share of wrong labels; uniform from 0 in a quarter of the episodes, else none.
    """

    classes: int = 8
    label_noise: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(2, self, "classes")
        check_probabilities(self, "label_noise")

    def _noisy(self, rng: Generator, labels: Array) -> Array:
        if rng.random() >= 0.25:
            return labels
        wrong = rng.random(len(labels)) < rng.uniform(0, self.label_noise)
        return np.where(wrong, rng.integers(self.classes, size=len(labels)), labels)


@dataclass(frozen=True)
class _Vectors(Generated):
    """Input vectors of a power-law spectrum.

    Args:
        inputs: their dimension.
        spectrum: exponent of their standard deviations, uniform.
        input_scale: their root mean square, log-uniform.
        positive: probability that they are cut at zero: sparse and of a mean that is not, like pixels.
    """

    inputs: int = 24
    spectrum: tuple[float, float] = (0.0, 1.5)
    input_scale: tuple[float, float] = (0.3, 3.0)
    positive: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, self, "inputs")
        check_ranges(self, "input_scale")
        check_probabilities(self, "positive")

    def _draw(self, rng: Generator, count: int) -> tuple[Array, Array]:
        spectrum = np.arange(1, self.inputs + 1, dtype=np.float32) ** np.float32(-rng.uniform(*self.spectrum))
        rng.shuffle(spectrum)
        spectrum /= np.sqrt(np.mean(spectrum**2))
        floor = np.float32(rng.uniform(-0.5, 0.5)) if rng.random() < self.positive else None
        inputs, targets = self._unit_vectors(rng, count, spectrum, floor)
        scaled = inputs * np.float32(log_uniform(rng, *self.input_scale))
        return scaled, scaled if targets is inputs else targets

    def _unit_vectors(
        self, rng: Generator, count: int, spectrum: Array, floor: np.float32 | None
    ) -> tuple[Array, Array]:
        """Inputs (count, inputs) of about unit scale, cut at `floor` if it is given, and targets."""
        raise TypeError(f"{type(self).__name__} does not say how its vectors are drawn")


@dataclass(frozen=True)
class TeacherStudent(_Vectors, Labelled):
    """Labels from a random one-hidden-layer teacher on normal inputs with a power-law spectrum: hard to learn.

    Args:
        teacher_gain: size of the teacher's first weights, log-uniform: the larger, the less linear.
        teacher_width: its hidden units.
    """

    teacher_gain: tuple[float, float] = (1.0, 4.0)
    teacher_width: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, self, "teacher_width")
        check_ranges(self, "teacher_gain")

    def _unit_vectors(
        self, rng: Generator, count: int, spectrum: Array, floor: np.float32 | None
    ) -> tuple[Array, Array]:
        inputs, outputs = _teach(self, rng, count, spectrum, floor, self.classes)
        return inputs, self._noisy(rng, outputs.argmax(-1))


@dataclass(frozen=True)
class TeacherRegression(_Vectors):
    """Standardised outputs of a random one-hidden-layer teacher, with noise: targets (points, outputs).

    Args:
        teacher_gain, teacher_width: as in `TeacherStudent`.
        outputs: number of outputs.
        noise: standard deviation of the targets' noise, log-uniform: the square of it is the loss that stays.
    """

    teacher_gain: tuple[float, float] = (0.5, 2.0)
    teacher_width: int = 16
    outputs: int = 1
    noise: tuple[float, float] = (0.03, 0.3)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, self, "teacher_width", "outputs")
        check_ranges(self, "teacher_gain", "noise")

    def _unit_vectors(
        self, rng: Generator, count: int, spectrum: Array, floor: np.float32 | None
    ) -> tuple[Array, Array]:
        inputs, outputs = _teach(self, rng, count, spectrum, floor, self.outputs)
        noise = np.float32(log_uniform(rng, *self.noise))
        return inputs, standardised(outputs) + noise * rng.standard_normal(outputs.shape, dtype=np.float32)


@dataclass(frozen=True)
class TeacherMultitask(TeacherStudent):
    """A label and a number from one teacher: targets (points, 2), for a network with two heads."""

    def _unit_vectors(
        self, rng: Generator, count: int, spectrum: Array, floor: np.float32 | None
    ) -> tuple[Array, Array]:
        inputs, outputs = _teach(self, rng, count, spectrum, floor, self.classes + 1)
        labels = self._noisy(rng, outputs[:, :-1].argmax(-1))
        return inputs, np.column_stack([labels, standardised(outputs[:, -1])]).astype(np.float32)


@dataclass(frozen=True)
class Prototypes(_Vectors, Labelled):
    """Each class is a few random points, and inputs are noisy copies of them: images of digits are like that.

    Args:
        prototypes: points of a class, uniform.
        separation: half the distance of two of them over the noise, log-uniform.
    """

    prototypes: tuple[int, int] = (1, 6)
    separation: tuple[float, float] = (2.0, 7.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "prototypes", "separation")

    def _unit_vectors(
        self, rng: Generator, count: int, spectrum: Array, floor: np.float32 | None
    ) -> tuple[Array, Array]:
        prototypes = int(rng.integers(self.prototypes[0], self.prototypes[1] + 1))
        # Two normal points in d dimensions are √(2d) apart.
        noise = np.float32(np.sqrt(self.inputs / 2) / log_uniform(rng, *self.separation))
        centres = rng.standard_normal((self.classes * prototypes, self.inputs), dtype=np.float32)
        which = rng.integers(len(centres), size=count)
        inputs = centres[which] + noise * rng.standard_normal((count, self.inputs), dtype=np.float32)
        return _above(floor, spectrum * inputs / np.sqrt(1 + noise**2)), self._noisy(rng, which % self.classes)


@dataclass(frozen=True)
class Reconstruction(Prototypes):
    """Noisy copies of random points, which are their own targets: for autoencoders."""

    def _unit_vectors(
        self, rng: Generator, count: int, spectrum: Array, floor: np.float32 | None
    ) -> tuple[Array, Array]:
        inputs, _ = super()._unit_vectors(rng, count, spectrum, floor)
        return inputs, inputs


@dataclass(frozen=True)
class Images(Labelled):
    """Images (points, channels, size, size): each class is a few smooth pictures, shifted by up to a pixel, with noise.

    Args:
        channels, size: shape of the images.
        pictures: of a class, uniform.
        noise: its standard deviation over that of the pictures, log-uniform.
        input_scale: root mean square of the pixels, log-uniform.
    """

    points: tuple[int, int] = (512, 2048)
    channels: int = 1
    size: int = 8
    pictures: tuple[int, int] = (1, 4)
    noise: tuple[float, float] = (0.2, 1.0)
    input_scale: tuple[float, float] = (0.3, 3.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, self, "channels")
        check_at_least(4, self, "size")
        check_ranges(self, "pictures", "noise", "input_scale")

    def _draw(self, rng: Generator, count: int) -> tuple[Array, Array]:
        pictures = self.classes * int(rng.integers(self.pictures[0], self.pictures[1] + 1))
        coarse = rng.standard_normal((pictures, self.channels, self.size // 2, self.size // 2), dtype=np.float32)
        smooth = torch.nn.functional.interpolate(torch.from_numpy(coarse), size=(self.size, self.size), mode="bilinear")
        templates = standardised(smooth.numpy().ravel()).reshape(smooth.shape)
        shifts = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        shifted = np.stack([np.roll(templates, shift, (-2, -1)) for shift in shifts], 1)
        which = rng.integers(pictures, size=count)
        images = shifted[which, rng.integers(len(shifts), size=count)]
        noise = np.float32(log_uniform(rng, *self.noise))
        images += noise * rng.standard_normal(images.shape, dtype=np.float32)
        images *= np.float32(log_uniform(rng, *self.input_scale)) / np.sqrt(1 + noise**2)
        return images, self._noisy(rng, which % self.classes)


@dataclass(frozen=True)
class Noise(Generated):
    """Normal noise (points, dimension) without targets, for `networks.NoisyQuadratic`.

    Args:
        dimension: of the quadratic.
        noise: its standard deviation, log-uniform.
    """

    dimension: int = 32
    noise: tuple[float, float] = (0.01, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, self, "dimension")
        check_ranges(self, "noise")

    def _draw(self, rng: Generator, count: int) -> tuple[Array, Array]:
        noise = rng.standard_normal((count, self.dimension), dtype=np.float32)
        noise *= np.float32(log_uniform(rng, *self.noise))
        return noise, noise


def standardised(x: Array) -> Array:
    """x (points, *shape) in single precision, with mean 0 and standard deviation 1 over the points."""
    return ((x - x.mean(0)) / x.std(0)).astype(np.float32)


def _teach(
    source: TeacherStudent | TeacherRegression,
    rng: Generator,
    count: int,
    spectrum: Array,
    floor: np.float32 | None,
    outputs: int,
) -> tuple[Array, Array]:
    """Inputs, and the teacher's outputs for them."""
    inputs = _above(floor, spectrum * rng.standard_normal((count, source.inputs), dtype=np.float32))
    gain = np.float32(log_uniform(rng, *source.teacher_gain) / np.sqrt(source.inputs))
    first = gain * rng.standard_normal((source.inputs, source.teacher_width), dtype=np.float32)
    second = rng.standard_normal((source.teacher_width, outputs), dtype=np.float32)
    return inputs, np.tanh(inputs @ first) @ second


def _above(floor: np.float32 | None, inputs: Array) -> Array:
    return inputs if floor is None else np.maximum(inputs, floor) - floor
