"""The tasks of the benchmark: development tasks and plateaus, to choose between policies, and test tasks, which choose
nothing.

A family, a data set or an architecture of the test tasks is in no other suite, and none that policies train on is here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from rlsched.envs.sources import Points
from rlsched.experiments.benchmark import data
from rlsched.experiments.benchmark.bases import (
    ADADELTA,
    ADAM,
    ADAMW,
    ADAMW_GPT,
    MUON,
    PLAIN_UNCLIPPED,
    RMSPROP,
    SGD_DECAY,
    SGD_MOMENTUM,
    Base,
    plain,
)
from rlsched.experiments.cell import Cell
from rlsched.experiments.networks import (
    GPT,
    VAE,
    RecurrentLanguageModel,
    ResNet,
    TransformerLanguageModel,
    perceptron,
)

# --- What is asked ----------------------------------------------------------------------------------------------------


class Objective(NamedTuple):
    """What is asked of a network.

    Args:
        loss: of its outputs and the targets, a mean over the points.
        chance: the lowest loss on the targets of an answer that is the same for all points.
        accuracy: of its outputs and the targets, a fraction.
    """

    loss: Callable[[Any, Tensor], Tensor]
    chance: Callable[[Tensor], float]
    accuracy: Callable[[Any, Tensor], float] | None = None


def _logits(outputs: Any) -> Tensor:
    """Of a model that may return its hidden state beside them, (n, symbols)."""
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    return logits.flatten(0, -2)


def _class_loss(outputs: Any, targets: Tensor) -> Tensor:
    return cross_entropy(_logits(outputs), targets.flatten())


def _class_accuracy(outputs: Any, targets: Tensor) -> float:
    return float((_logits(outputs).argmax(-1) == targets.flatten()).float().mean())


def _entropy(targets: Tensor) -> float:
    frequency = targets.flatten().bincount() / targets.numel()
    return float(torch.special.entr(frequency).sum())


def _variance(targets: Tensor) -> float:
    return float(targets.var(0, correction=0).mean())


CODE_NOISE = 0.3  # standard deviation that a decoder leaves


def _code_loss(outputs: tuple[Tensor, Tensor, Tensor], targets: Tensor) -> Tensor:
    """The evidence lower bound of a Gaussian decoder, with its sign changed and without its constant."""
    decoded, mean, log_variance = outputs
    divergence = -(1 + log_variance - mean**2 - log_variance.exp()).sum(-1) / 2
    return ((decoded - targets).square().sum(-1) / (2 * CODE_NOISE**2) + divergence).mean()


CLASSES = Objective(_class_loss, _entropy, _class_accuracy)  # of points, or of each place in sequences
NUMBERS = Objective(mse_loss, _variance)
CODES = Objective(_code_loss, lambda targets: _variance(targets) * targets[0].numel() / (2 * CODE_NOISE**2))

# --- Tasks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A network, its data, what is asked of it, and how it is trained.

    Args:
        network: makes one; its weights are drawn by torch's own generator.
        data: of the folder with the user's data files.
        objective: what is asked.
        bases: base optimizers by their names.
        steps: the horizons.
        batch: points in a mini-batch.
        needs_folder: whether there are data in the user's folder alone.
    """

    network: Callable[[], nn.Module]
    data: Callable[[Path | None], Points]
    objective: Objective
    bases: Mapping[str, Base]
    steps: tuple[int, ...]
    batch: int = 32
    needs_folder: bool = False


def _of(source: Callable[[], Points]) -> Callable[[Path | None], Points]:
    return lambda _: source()


def _mnist(folder: Path | None) -> Points:
    if folder is None:
        raise ValueError("it needs --data FOLDER, with MNIST's original files (t10k-*-ubyte, gzipped or not)")
    return data.mnist(folder)


def _flat(*widths: int, **options: Any) -> nn.Module:
    return nn.Sequential(nn.Flatten(), perceptron(*widths, **options))


def _no_affine_norm(width: int) -> nn.Module:
    """Layer norm without weights of its own: Muon takes matrices alone."""
    return nn.LayerNorm(width, elementwise_affine=False)


def _convolutions() -> nn.Module:
    """Pools twice; 8 × 8 images in colour."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 12), (12, 24)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(96, 8))


def _denoiser() -> nn.Module:
    """Convolutions that keep the size of an image."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(16, 3, 3, padding=1),
    )


def _lenet() -> nn.Module:
    """As in pytorch/examples, mnist, smaller, and pooled twice; 28 × 28 images."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 8), (8, 16)):
        layers += [nn.Conv2d(inputs, outputs, 3), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Dropout(0.25), nn.Flatten(), nn.Linear(400, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 10)]
    return nn.Sequential(*layers)


def _convolutions_1d() -> nn.Module:
    """As in Greydanus 2020: strides, sequences of 40 numbers."""
    layers: list[nn.Module] = []
    for inputs, outputs, kernel in ((1, 25, 5), (25, 25, 3), (25, 25, 3)):
        layers += [nn.Conv1d(inputs, outputs, kernel, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(125, 10))


def _convolutions_of_shapes() -> nn.Module:
    """Strides, without normalisation; sequences of 48 numbers."""
    layers: list[nn.Module] = []
    for inputs, outputs, kernel in ((1, 24, 5), (24, 24, 3), (24, 24, 3)):
        layers += [nn.Conv1d(inputs, outputs, kernel, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(144, 8))


def _next_letter(width: int = 100, embedding: int = 10) -> nn.Module:
    """As in makemore (Bengio et al. 2003): letters embedded side by side, one layer of tanh."""
    letters = data.END + 1
    embed = nn.Sequential(nn.Embedding(letters, embedding), nn.Flatten())
    return nn.Sequential(embed, perceptron(data.CONTEXT * embedding, width, letters, activation=nn.Tanh))


QUICK, LONG, LONGER = (200, 800), (500, 2000), (1000, 5000)

DEVELOPMENT: Mapping[str, Task] = {
    "patches-perceptron": Task(
        partial(_flat, 192, 64, 32, 8, activation=nn.SiLU),
        _of(data.patches),
        CLASSES,
        {"sgd": SGD_MOMENTUM, "adadelta": ADADELTA},
        QUICK,
    ),
    "patches-layer-norm": Task(
        partial(_flat, 192, 48, 8, activation=nn.SiLU, norm=_no_affine_norm, bias=False),
        _of(data.patches),
        CLASSES,
        {"adamw": ADAMW, "muon": MUON},
        QUICK,
    ),
    "patches-cnn": Task(_convolutions, _of(data.patches), CLASSES, {"rmsprop": RMSPROP}, QUICK, 16),
    "patches-resnet": Task(
        partial(ResNet, (8, 16), channels=3, classes=8), _of(data.patches), CLASSES, {"sgd": SGD_DECAY}, QUICK, 16
    ),
    "patches-denoise": Task(_denoiser, _of(data.patches_with_noise), NUMBERS, {"adam": ADAM}, QUICK, 16),
    "patches-vae": Task(partial(VAE, 64, 6), _of(data.patches_to_code), CODES, {"adam": ADAM}, QUICK),
    "patches-continue": Task(
        partial(perceptron, 48, 48, 48, 48, 16, activation=nn.ELU),
        _of(data.patches_to_continue),
        NUMBERS,
        {"sgd": SGD_MOMENTUM},
        QUICK,
    ),
    "topics-words-lstm": Task(
        partial(RecurrentLanguageModel, data.WORDS, 32),
        _of(data.topics_by_word),
        CLASSES,
        {"plain": plain(20.0)},
        QUICK,
        20,
    ),
    "topics-characters-gru": Task(
        partial(RecurrentLanguageModel, data.TOPIC_CHARACTERS, 48, cell=nn.GRU, layers=1, rate=0.0),
        _of(data.topics_by_character),
        CLASSES,
        {"adamw": ADAMW},
        QUICK,
        16,
    ),
    "topics-characters-gpt": Task(
        partial(GPT, data.TOPIC_CHARACTERS, 24, width=32, depth=2, heads=2),
        _of(data.topics_by_character),
        CLASSES,
        {"adamw": ADAMW_GPT, "plain": plain(2.0)},
        QUICK,
        16,
    ),
    "cancer-by-heart": Task(
        partial(perceptron, 30, 96, 96, 2), _of(data.breast_cancer), CLASSES, {"sgd": SGD_MOMENTUM}, QUICK, 16
    ),
    "wine-by-heart": Task(
        partial(perceptron, 13, 128, 3, activation=nn.LeakyReLU), _of(data.wine), CLASSES, {"adam": ADAM}, QUICK, 16
    ),
}

TEST: Mapping[str, Task] = {
    "mnist-perceptron": Task(
        partial(_flat, 784, 128, 10, activation=nn.GELU),
        _mnist,
        CLASSES,
        {"sgd": SGD_MOMENTUM, "adam": ADAM},
        LONG,
        64,
        needs_folder=True,
    ),
    "mnist-cnn": Task(_lenet, _mnist, CLASSES, {"adadelta": ADADELTA, "rmsprop": RMSPROP}, LONG, needs_folder=True),
    "mnist-1d-perceptron": Task(
        partial(perceptron, 40, 64, 64, 10, bias=False),
        _of(data.mnist_1d),
        CLASSES,
        {"adamw": ADAMW, "muon": MUON},
        LONG,
        64,
    ),
    "mnist-1d-cnn": Task(
        _convolutions_1d, _of(data.mnist_1d_sequences), CLASSES, {"sgd": SGD_MOMENTUM, "adadelta": ADADELTA}, LONG, 64
    ),
    "mnist-1d-resnet": Task(
        partial(ResNet, (12, 24, 48), channels=1, classes=10, dimensions=1),
        _of(data.mnist_1d_sequences),
        CLASSES,
        {"sgd": SGD_DECAY, "adamw": ADAMW},
        LONG,
    ),
    "mnist-1d-autoencoder": Task(
        partial(perceptron, 40, 64, 8, 64, 40, activation=nn.Softplus, norm=nn.LayerNorm),
        _of(data.mnist_1d_to_code),
        NUMBERS,
        {"adam": ADAM},
        LONG,
    ),
    "mnist-1d-by-heart": Task(
        partial(perceptron, 40, 256, 256, 10, activation=nn.Tanh),
        _of(data.few_mnist_1d),
        CLASSES,
        {"sgd": SGD_MOMENTUM, "adam": ADAM},
        LONG,
        16,
    ),
    "docstrings-words-lstm": Task(
        partial(RecurrentLanguageModel, data.DOCSTRING_WORDS, 48, layers=1),
        _of(data.docstrings_by_word),
        CLASSES,
        {"plain": plain(20.0), "adam": ADAM},
        LONG,
        20,
    ),
    "docstrings-characters-gru": Task(
        partial(RecurrentLanguageModel, data.ASCII, 40, cell=nn.GRU, layers=2, rate=0.1),
        _of(data.docstrings_by_character),
        CLASSES,
        {"plain": plain(10.0), "rmsprop": RMSPROP},
        LONG,
        16,
    ),
    "docstrings-words-transformer": Task(
        partial(TransformerLanguageModel, data.DOCSTRING_WORDS, 40),
        _of(data.docstrings_by_word),
        CLASSES,
        {"plain": plain(2.5), "adamw": ADAMW_GPT},
        LONG,
        16,
    ),
    "names-makemore": Task(
        _next_letter, _of(data.character_names), CLASSES, {"plain": plain(1.0, clip=None), "adamw": ADAMW}, LONGER
    ),
    "friedman": Task(
        partial(perceptron, 10, 64, 64, 1, activation=nn.Softplus),
        _of(data.friedman),
        NUMBERS,
        {"sgd": SGD_MOMENTUM},
        LONGER,
    ),
    "pendulum": Task(
        partial(perceptron, 4, 48, 48, 2, activation=nn.Tanh, bias=False),
        _of(data.pendulum),
        NUMBERS,
        {"muon": MUON, "rmsprop": RMSPROP},
        LONGER,
    ),
}

# Networks that learn next to nothing at first, and then much at once: who raises the learning rate until they do may
# blow them up, and who takes it for too high may hold it down for good.
PLATEAUS: Mapping[str, Task] = {
    "waves-perceptron": Task(
        partial(perceptron, 3, 48, 48, 2, activation=nn.Tanh, bias=False),
        _of(data.waves),
        NUMBERS,
        {"muon": MUON, "rmsprop": RMSPROP, "adam": ADAM, "sgd": SGD_MOMENTUM},
        (1000,),
    ),
    "shapes-cnn": Task(
        _convolutions_of_shapes,
        _of(data.shapes),
        CLASSES,
        {"sgd": SGD_MOMENTUM, "plain": PLAIN_UNCLIPPED, "adadelta": ADADELTA},
        LONG,
        64,
    ),
    "patches-deep": Task(
        partial(_flat, 192, 48, 48, 48, 48, 48, 8),
        _of(data.patches),
        CLASSES,
        {"sgd": SGD_MOMENTUM, "plain": PLAIN_UNCLIPPED, "adam": ADAM},
        (400, 1600),
    ),
}

SUITES: Mapping[str, Mapping[str, Task]] = {"development": DEVELOPMENT, "plateaus": PLATEAUS, "test": TEST}
TASKS: Mapping[str, Task] = {**DEVELOPMENT, **PLATEAUS, **TEST}


def cells(name: str) -> list[Cell]:
    """Those of a task."""
    task = TASKS[name]
    return [Cell(name, optimizer, steps) for optimizer in task.bases for steps in task.steps]


def learns(loss: float, chance: float) -> bool:
    """Whether a final loss is below that of one answer to all."""
    return math.isfinite(loss) and loss < chance
