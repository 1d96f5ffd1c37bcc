"""Data that every machine has: the text of Python's own reference, the digits of scikit-learn, and drawn sequences."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from rlsched.experiments import text

PART = 10  # every tenth image validates
NOISE = 0.5  # standard deviation, of the range of a pixel
VALIDATION_COPIES = 5  # of each image, with other noise


@cache
def words(vocabulary: int = 1000) -> tuple[Tensor, Tensor]:
    """Words and signs as numbers below `vocabulary`, rarer ones being `text.UNKNOWN`: to train on, and to validate."""
    return text.words(*text.reference(), vocabulary)


@cache
def characters() -> tuple[Tensor, Tensor, int]:
    """Characters as numbers: to train on, and to validate; and how many there are."""
    return text.characters(*text.reference())


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (n, 1, 8, 8) in [0, 1] and their labels: to train on, and to validate."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images, labels = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16, torch.tensor(bunch.target)
    validates = torch.arange(len(labels)) % PART == 0
    return images[~validates], labels[~validates], images[validates], labels[validates]


def noisy(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Images that cannot all be told apart, so that no loss comes near zero, where a tenth of it is nothing."""
    return images + NOISE * torch.randn(images.shape, generator=generator)


@cache
def noisy_validation_digits() -> tuple[Tensor, Tensor]:
    """Images (n, 1, 8, 8) and their labels."""
    _, _, images, labels = digits()
    copies = images.repeat(VALIDATION_COPIES, 1, 1, 1)
    return noisy(copies, torch.Generator().manual_seed(0)), labels.repeat(VALIDATION_COPIES)


def sequences(
    number: int, length: int, symbols: int, wrong: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Sequences (number, length) and the same sorted, where any symbol stands instead of a part `wrong` of them."""
    inputs = torch.randint(symbols, (number, length), generator=generator)
    others = torch.randint(symbols, (number, length), generator=generator)
    is_wrong = torch.rand(number, length, generator=generator) < wrong
    return inputs, torch.where(is_wrong, others, inputs.sort(-1).values)
