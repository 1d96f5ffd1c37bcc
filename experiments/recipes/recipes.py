"""The recipes: what is trained, and how, as people's scripts have it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.optim import SGD, Adadelta, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, ReduceLROnPlateau, StepLR

from rlsched.experiments.networks import (
    CNN,
    GPT,
    VAE,
    RecurrentLanguageModel,
    ResNet,
    Sorter,
    TransformerLanguageModel,
)
from rlsched.experiments.recipes import data
from rlsched.experiments.schedules import quarter_on_plateau, warm_up_cosine


class Problem(Protocol):
    """A network and what it learns from. What is drawn comes from torch's own generator."""

    @property
    def model(self) -> nn.Module: ...

    def losses(self) -> Iterator[Tensor]:
        """The loss that is backpropagated, of one mini-batch after the other, without end."""

    def validation_loss(self) -> float:
        """Mean over what validates. Takes nothing from torch's own generator."""


@dataclass(frozen=True)
class Recipe:
    """A training script.

    Args:
        title: what it is, in a few words.
        problem: the network and its data.
        optimizer: of the network and a base learning rate.
        lr: the base learning rate.
        steps: optimizer steps, as the script counts them.
        schedule: the script's scheduler; None keeps the learning rate.
        epoch: steps from one step of the scheduler to the next.
        clip: for `clip_grad_norm_`.
        accumulate: mini-batches in a step, by whose number the loss of each is divided.
        takes_one_more: whether the loop takes one step more than it says, as nanoGPT's does.
    """

    title: str
    problem: Callable[[], Problem]
    optimizer: Callable[[nn.Module, float], Optimizer]
    lr: float
    steps: int
    schedule: Callable[[Optimizer], LRScheduler | ReduceLROnPlateau] | None = None
    epoch: int = 1
    clip: float | None = None
    accumulate: int = 1
    takes_one_more: bool = False


# --- What is trained --------------------------------------------------------------------------------------------------


class Words:
    """Language models of words, in truncated sequences that follow on each other, as pytorch/examples has them."""

    BATCH, LENGTH = 20, 35

    def __init__(self, network: Callable[[int], nn.Module], vocabulary: int = 1000) -> None:
        self.model = network(vocabulary)
        self.training, self.validation = (self._columns(tokens) for tokens in data.words(vocabulary))

    def losses(self) -> Iterator[Tensor]:
        while True:
            yield from self._losses(self.training)

    @torch.no_grad()
    def validation_loss(self) -> float:
        self.model.eval()
        losses = list(self._losses(self.validation))
        self.model.train()
        return float(torch.stack(losses).mean())

    def _losses(self, tokens: Tensor) -> Iterator[Tensor]:
        hidden = None
        for inputs, targets in self._chunks(tokens):
            logits, hidden = self.model(inputs, hidden)
            hidden = hidden and tuple(each.detach() for each in hidden)
            yield cross_entropy(logits.flatten(0, 1), targets.flatten())

    def _columns(self, tokens: Tensor) -> Tensor:
        length = len(tokens) // self.BATCH
        return tokens[: length * self.BATCH].view(self.BATCH, length)

    def _chunks(self, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, tokens.shape[1] - self.LENGTH, self.LENGTH):
            yield tokens[:, start : start + self.LENGTH], tokens[:, start + 1 : start + self.LENGTH + 1]


class Characters:
    """A language model of characters, in sequences from anywhere, as nanoGPT has them."""

    BATCH, LENGTH, VALIDATION = 8, 64, 64

    def __init__(self) -> None:
        self.training, self.validation, symbols = data.characters()
        self.model = GPT(symbols, self.LENGTH)

    def losses(self) -> Iterator[Tensor]:
        while True:
            yield self._loss(self.training, torch.randint(len(self.training) - self.LENGTH, (self.BATCH,)))

    @torch.no_grad()
    def validation_loss(self) -> float:
        starts = torch.linspace(0, len(self.validation) - self.LENGTH - 1, self.VALIDATION).long()
        return float(self._loss(self.validation, starts))

    def _loss(self, tokens: Tensor, starts: Tensor) -> Tensor:
        chunks = tokens[starts[:, None] + torch.arange(self.LENGTH + 1)]
        return cross_entropy(self.model(chunks[:, :-1]).flatten(0, 1), chunks[:, 1:].flatten())


class Digits:
    """Noisy digits, told apart."""

    def __init__(self, network: Callable[[], nn.Module], batch: int) -> None:
        self.model, self.batch = network(), batch

    def losses(self) -> Iterator[Tensor]:
        images, labels, _, _ = data.digits()
        for rows in _rows(len(labels), self.batch):
            yield cross_entropy(self.model(data.noisy(images[rows])), labels[rows])

    @torch.no_grad()
    def validation_loss(self) -> float:
        images, labels = data.noisy_validation_digits()
        self.model.eval()
        loss = cross_entropy(self.model(images), labels)
        self.model.train()
        return float(loss)


class DigitsByCode:
    """Digits, encoded and decoded. The loss is a sum over the mini-batch, as in pytorch/examples, and validation's a
    mean."""

    BATCH = 128

    def __init__(self) -> None:
        self.model = VAE()

    def losses(self) -> Iterator[Tensor]:
        images, *_ = data.digits()
        for rows in _rows(len(images), self.BATCH):
            yield self._loss(images[rows])

    @torch.no_grad()
    def validation_loss(self) -> float:
        _, _, images, labels = data.digits()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return float(self._loss(images)) / len(labels)

    def _loss(self, images: Tensor) -> Tensor:
        images = images.flatten(1)
        decoded, mean, log_variance = self.model(images)
        divergence = -(1 + log_variance - mean**2 - log_variance.exp()).sum() / 2
        return binary_cross_entropy_with_logits(decoded, images, reduction="sum") + divergence


class Sorting:
    """Sequences to sort. A tenth of the answers is wrong, so that no loss comes near zero."""

    BATCH, LENGTH, SYMBOLS, WRONG, VALIDATION = 32, 10, 10, 0.1, 500

    def __init__(self) -> None:
        self.model = Sorter(self.SYMBOLS, self.LENGTH)

    def losses(self) -> Iterator[Tensor]:
        while True:
            yield self._loss(self.BATCH)

    @torch.no_grad()
    def validation_loss(self) -> float:
        self.model.eval()
        loss = self._loss(self.VALIDATION, torch.Generator().manual_seed(0))
        self.model.train()
        return float(loss)

    def _loss(self, number: int, generator: torch.Generator | None = None) -> Tensor:
        inputs, targets = data.sequences(number, self.LENGTH, self.SYMBOLS, self.WRONG, generator)
        return cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())


def _rows(number: int, batch: int) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(number)[: number - number % batch].split(batch)


# --- How it is trained ------------------------------------------------------------------------------------------------


def _sgd(momentum: float = 0.0, weight_decay: float = 0.0) -> Callable[[nn.Module, float], Optimizer]:
    return lambda model, lr: SGD(model.parameters(), lr, momentum, weight_decay=weight_decay)


def _adamw_on_matrices(model: nn.Module, lr: float) -> Optimizer:
    """Weight decay on matrices only, as nanoGPT has it."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr, betas=(0.9, 0.95))


WORDS_EPOCH = 120  # steps
RECIPES = {
    "lstm-clipped": Recipe(
        "LSTM of words, clipped",
        lambda: Words(RecurrentLanguageModel),
        _sgd(),
        lr=20.0,
        steps=10 * WORDS_EPOCH,
        schedule=quarter_on_plateau,
        epoch=WORDS_EPOCH,
        clip=0.25,
    ),
    "lstm": Recipe(
        "LSTM of words",
        lambda: Words(RecurrentLanguageModel),
        _sgd(),
        lr=4.0,
        steps=10 * WORDS_EPOCH,
        schedule=quarter_on_plateau,
        epoch=WORDS_EPOCH,
    ),
    "transformer-clipped": Recipe(
        "transformer of words, clipped",
        lambda: Words(TransformerLanguageModel),
        _sgd(),
        lr=2.5,
        steps=10 * WORDS_EPOCH,
        schedule=quarter_on_plateau,
        epoch=WORDS_EPOCH,
        clip=0.25,
    ),
    "transformer": Recipe(
        "transformer of words",
        lambda: Words(TransformerLanguageModel),
        _sgd(),
        lr=0.5,
        steps=10 * WORDS_EPOCH,
        schedule=quarter_on_plateau,
        epoch=WORDS_EPOCH,
    ),
    "cnn": Recipe(
        "CNN of digits",
        lambda: Digits(CNN, batch=32),
        lambda model, lr: Adadelta(model.parameters(), lr),
        lr=1.0,
        steps=14 * 100,
        schedule=lambda optimizer: StepLR(optimizer, 1, 0.7),
        epoch=100,
    ),
    "vae": Recipe("VAE of digits", DigitsByCode, lambda model, lr: Adam(model.parameters(), lr), lr=1e-3, steps=1000),
    "gpt": Recipe(
        "GPT of characters, accumulated",
        Characters,
        _adamw_on_matrices,
        lr=3e-3,
        steps=500,
        schedule=lambda optimizer: warm_up_cosine(optimizer, 500, warm_up=25),
        clip=1.0,
        accumulate=4,
        takes_one_more=True,
    ),
    "resnet": Recipe(
        "ResNet of digits",
        lambda: Digits(ResNet, batch=128),
        _sgd(momentum=0.9, weight_decay=5e-4),
        lr=0.1,
        steps=40 * 12,
        schedule=lambda optimizer: CosineAnnealingLR(optimizer, 40),
        epoch=12,
    ),
    "sorting": Recipe("transformer that sorts", Sorting, _sgd(momentum=0.9), lr=0.1, steps=1000),
}
