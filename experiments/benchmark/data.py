"""The data sets of the benchmark, each with one fixed split. A data set is in one suite only."""

from __future__ import annotations

import unicodedata
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import avg_pool2d

from rlsched.envs import bundled
from rlsched.envs.data import load_mnist
from rlsched.envs.sources import Points, standardised
from rlsched.experiments import text
from rlsched.experiments.points import SPLIT_SEED, split

VALIDATION, PIECES = 500, 100  # points, and pieces of text, to validate: they are read at fifty evaluations of a run

# --- Development ------------------------------------------------------------------------------------------------------

SIDE, REGION = 8, 24  # pixels of a patch, and of the region in a photograph that it shows
BANDS = 4  # of a photograph, from top to bottom
STRIPS, EDGE = 5, 0.75  # of a photograph, from left to right; the part of each that trains
PATCHES = (4000, 400)  # to train on, and to validate


@cache
def patches() -> Points:
    """Patches (n, 3, 8, 8) of scikit-learn's two photographs, and which of the eight bands of both they are from.

    No pixel both trains and validates.
    """
    from sklearn.datasets import load_sample_images

    generator = torch.Generator().manual_seed(SPLIT_SEED)
    photographs = torch.tensor(np.stack(load_sample_images().images)).permute(0, 3, 1, 2) / 255
    photographs = (photographs - photographs.mean()) / photographs.std()
    height, width = photographs.shape[-2] // BANDS, photographs.shape[-1] // STRIPS
    edge = round(EDGE * width)
    parts = []
    for count, first, last in zip(PATCHES, (0, edge), (edge, width), strict=True):
        highest = (len(photographs), BANDS, STRIPS, height - REGION, last - first - REGION)
        places = torch.stack([torch.randint(most, (count,), generator=generator) for most in highest], -1)
        cut = []
        for photograph, band, strip, y, x in places.tolist():
            top, left = band * height + y, strip * width + first + x
            cut.append(photographs[photograph, :, top : top + REGION, left : left + REGION])
        parts += [avg_pool2d(torch.stack(cut), REGION // SIDE), places[:, 0] * BANDS + places[:, 1]]
    return Points(*parts)


def patches_to_code() -> Points:
    """Grey patches (n, 64), inputs and targets in one."""
    inputs, validation = (each.mean(1).flatten(1) for each in (patches().inputs, patches().validation_inputs))
    return Points(inputs, inputs, validation, validation)


def patches_with_noise(deviation: float = 0.5) -> Points:
    """Patches (n, 3, 8, 8) with noise, and without."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    clean = patches().inputs, patches().validation_inputs
    inputs, validation = (each + deviation * torch.randn(each.shape, generator=generator) for each in clean)
    return Points(inputs, clean[0], validation, clean[1])


def patches_to_continue(rows: int = 6) -> Points:
    """The first rows of grey patches, and those below them: (n, 48) and (n, 16)."""
    inputs, _, validation, _ = patches_to_code()
    at = rows * SIDE
    return Points(inputs[:, :at], inputs[:, at:], validation[:, :at], validation[:, at:])


def breast_cancer() -> Points:
    """569 standardised points (30,) of two classes."""
    data = bundled("breast_cancer")
    return split(data.inputs, data.targets, 114)


def wine() -> Points:
    """178 standardised points (13,) of three classes."""
    data = bundled("wine")
    return split(data.inputs, data.targets, 45)


def topics_by_character(length: int = 24) -> Points:
    """Pieces (n, length) of Python's reference as characters below `TOPIC_CHARACTERS`, and each one's next."""
    training, validation, _ = text.characters(*text.reference())
    return _pieces(training, validation, length)


def topics_by_word(length: int = 20) -> Points:
    """Pieces (n, length) of Python's reference as words below `WORDS`, and each one's next."""
    return _pieces(*text.words(*text.reference(), WORDS), length)


TOPIC_CHARACTERS, WORDS = 128, 500  # symbols: ASCII, and the most frequent words with one for all others

# --- Plateaus ---------------------------------------------------------------------------------------------------------


def waves(points: int = 4000) -> Points:
    """Three numbers in [−1, 1], and two standardised products of their waves."""
    x = 2 * torch.rand(points, 3, generator=torch.Generator().manual_seed(SPLIT_SEED)) - 1
    y = torch.stack([(4 * x[:, 0]).sin() * x[:, 1], (3 * x[:, 1] + 2 * x[:, 2]).cos() * x[:, 0]], 1)
    return split(x, (y - y.mean(0)) / y.std(0), VALIDATION)


@cache
def shapes(points: int = 5000, length: int = 48) -> Points:
    """Noisy waves (1, 48) of any phase, of eight shapes."""
    rng = np.random.default_rng(SPLIT_SEED)
    labels, t = rng.integers(0, 8, points), np.linspace(0, 1, length)
    turns = rng.uniform(2, 4, (points, 1)) * t + rng.uniform(0, 1, (points, 1))
    phase, sine = turns % 1, np.sin(2 * np.pi * turns)
    chirp = np.sin(2 * np.pi * (turns + 1.5 * t**2))
    saw = 2 * phase - 1
    kinds = np.stack([sine, np.sign(saw), saw, -saw, 2 * np.abs(saw) - 1, chirp, sine**3, sine * np.sin(2 * np.pi * t)])
    signals = kinds[labels, np.arange(points)] * rng.uniform(0.5, 1.5, (points, 1))
    signals += 0.35 * rng.standard_normal(signals.shape) + rng.uniform(-0.5, 0.5, (points, 1)) * t
    inputs = _single((signals - signals.mean()) / signals.std())[:, None]
    return split(inputs, torch.from_numpy(labels), VALIDATION)


# --- Test -------------------------------------------------------------------------------------------------------------


@cache
def mnist(folder: Path) -> Points:
    """The 10,000 digits (1, 28, 28) of MNIST's test files, in `folder`.

    Raises:
        FileNotFoundError: the folder lacks them.
    """
    try:
        images, labels = load_mnist(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--data: {error}") from error
    return split(images.view(-1, 1, 28, 28), labels, VALIDATION)


LENGTH = 40  # of a sequence of MNIST-1D
_TEMPLATES = """
5 6 6.5 6.75 7 7 7 7 6.75 6.5 6 5
5 3 3 3.4 3.8 4.2 4.6 5 5.4 5.8 5 5
5 6 6.5 6.5 6 5.25 4.75 4 3.5 3.5 4 5
5 6 6.5 6.5 6 5 5 6 6.5 6.5 6 5
5 4.4 3.8 3.2 2.6 2.6 5 5 5 5 5 5
5 3 3 3 3 5 6 6.5 6.5 6 4.5 5
5 4 3.5 3.25 3 3 3 3 3.25 3.5 4 5
5 7 7 6.6 6.2 5.8 5.4 5 4.6 4.2 5 5
5 4 3.5 3.5 4 5 5 4 3.5 3.5 4 5
5 4 3.5 3.5 4 5 5 5 5 4.7 4.3 5
"""


@cache
def mnist_1d(points: int = 5000) -> Points:
    """Digits as sequences (40,), by the construction of Greydanus 2020, "Scaling Down Deep Learning".

    A template of twelve points is padded, stretched, scaled, shifted, put on smooth noise, and sheared.
    """
    from scipy.ndimage import gaussian_filter1d

    rng = np.random.default_rng(SPLIT_SEED)
    templates = np.array([line.split() for line in _TEMPLATES.split("\n") if line], float)
    templates = (templates - templates.mean(1, keepdims=True)) / templates.std(1, keepdims=True)
    templates = (templates - templates[:, :1]) / 6
    labels = rng.permutation(np.arange(points) % 10)
    inputs = np.empty((points, LENGTH), np.float32)
    for i, label in enumerate(labels):
        signal = np.pad(
            templates[label] + 1e-8, (0, int(rng.integers(36, 61)))
        )  # 1e-8 tells the digit from the padding
        signal = _resampled(signal, 72) * (1 + 0.4 * (rng.random() - 0.5))
        signal = np.roll(signal, rng.integers(48))
        signal = np.where(signal != 0, signal, gaussian_filter1d(0.25 * rng.standard_normal(72), 2))
        signal += 0.02 * rng.standard_normal(72)
        signal -= 0.75 * (rng.random() - 0.5) * np.linspace(-0.5, 0.5, 72)
        inputs[i] = _resampled(signal, LENGTH)
    return split(torch.from_numpy((inputs - inputs.mean()) / inputs.std()), torch.from_numpy(labels), VALIDATION)


def mnist_1d_sequences() -> Points:
    """The same as sequences of numbers (n, 1, 40)."""
    data = mnist_1d()
    return data._replace(inputs=data.inputs[:, None], validation_inputs=data.validation_inputs[:, None])


def mnist_1d_to_code() -> Points:
    """The same without labels: (n, 40), inputs and targets in one."""
    data = mnist_1d()
    return Points(data.inputs, data.inputs, data.validation_inputs, data.validation_inputs)


def few_mnist_1d(points: int = 400) -> Points:
    """The first of them: fewer than a network has weights."""
    data = mnist_1d()
    return data._replace(inputs=data.inputs[:points], targets=data.targets[:points])


def docstrings_by_character(length: int = 32) -> Points:
    """Pieces (n, length) of the standard library's docstrings as bytes of ASCII, and each one's next."""
    training, validation = (torch.tensor(list(each.encode())) for each in text.docstrings())
    return _pieces(training, validation, length)


def docstrings_by_word(length: int = 24) -> Points:
    """Pieces (n, length) of the standard library's docstrings as words below `DOCSTRING_WORDS`, and each one's next."""
    return _pieces(*text.words(*text.docstrings(), DOCSTRING_WORDS), length)


ASCII, DOCSTRING_WORDS = 128, 800
LETTERS = " ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-"  # of names of characters
CONTEXT = 8  # of them, from which the next one is told
END = len(LETTERS)  # what stands before a name and behind it


@cache
def character_names(last: int = 0x2FFF) -> Points:
    """Contexts (n, 8) in the names of Unicode's characters, as numbers up to `END`, and what follows."""
    names = [name for code in range(last) if (name := unicodedata.name(chr(code), ""))]
    validates = (
        torch.randperm(len(names), generator=torch.Generator().manual_seed(SPLIT_SEED)).argsort() < len(names) // 10
    )
    contexts: dict[bool, list[list[int]]] = {False: [], True: []}
    for name, validating in zip(names, validates.tolist(), strict=True):
        letters = [END] * CONTEXT + [LETTERS.index(letter) for letter in name] + [END]
        contexts[validating] += (letters[i : i + CONTEXT + 1] for i in range(len(name) + 1))
    training, validation = torch.tensor(contexts[False]), torch.tensor(contexts[True])
    validation = validation[:: len(validation) // (4 * VALIDATION)]
    return Points(training[:, :-1], training[:, -1], validation[:, :-1], validation[:, -1])


def friedman() -> Points:
    """Points (10,) and the standardised function of five of them of Friedman 1991, with noise, (1,)."""
    from sklearn.datasets import make_friedman1

    inputs, targets = make_friedman1(3000, noise=1.0, random_state=SPLIT_SEED)
    return split(_single(2 * inputs - 1), _single(standardised(targets[:, None])), VALIDATION)


def pendulum(points: int = 4000, seconds: float = 3.0, steps: int = 300) -> Points:
    """Sine and cosine of a pendulum's angle, its speed, and its damping, (4,); angle and speed after a time, (2,)."""
    rng = np.random.default_rng(SPLIT_SEED)
    angle, speed = rng.uniform(-2.5, 2.5, points), rng.uniform(-2, 2, points)
    damping = rng.uniform(0, 0.5, points)
    inputs = np.stack([np.sin(angle), np.cos(angle), speed, damping], -1)
    dt = seconds / steps
    for _ in range(steps):  # leapfrog, with the damping of the mean speed
        angle = angle + dt / 2 * speed
        speed = (speed * (1 - dt / 2 * damping) - dt * np.sin(angle)) / (1 + dt / 2 * damping)
        angle = angle + dt / 2 * speed
    return split(_single(inputs), _single(standardised(np.stack([angle, speed], -1))), VALIDATION)


def _single(x: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(x.astype(np.float32))


def _resampled(signal: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    """At `length` places from the first to the last."""
    return np.interp(np.linspace(0, 1, length), np.linspace(0, 1, len(signal)), signal)


def _pieces(training: Tensor, validation: Tensor, length: int) -> Points:
    """Pieces that follow on each other, and the same a token later; from all over what validates."""
    parts = []
    for tokens in (training, validation):
        size = (len(tokens) - 1) // length * length
        parts += [tokens[:size].view(-1, length), tokens[1 : size + 1].view(-1, length)]
    every = max(1, len(parts[2]) // PIECES)
    return Points(parts[0], parts[1], parts[2][::every][:PIECES], parts[3][::every][:PIECES])
