"""Sources of token sequences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from rlsched.envs.draws import check_at_least, check_ranges, log_uniform
from rlsched.envs.sources import Array, Generated


@dataclass(frozen=True)
class _Sequences(Generated):
    """What the sources of token sequences share: they are inputs and targets in one, (points, length).

    Args:
        tokens: size of the vocabulary.
        length: tokens in a sequence.
    """

    points: tuple[int, int] = (512, 2048)
    validation_points: int = 64
    tokens: int = 12
    length: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(2, self, "tokens", "length")


@dataclass(frozen=True)
class Markov(_Sequences):
    """Sequences of a random Markov chain.

    Args:
        concentration: of the Dirichlet distribution of its transitions, log-uniform: the lower, the more predictable.
    """

    concentration: tuple[float, float] = (0.03, 0.3)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "concentration")

    def _draw(self, rng: Generator, count: int) -> tuple[Array, Array]:
        concentration = log_uniform(rng, *self.concentration)
        cumulative = rng.dirichlet(np.full(self.tokens, concentration), self.tokens).cumsum(-1)
        cumulative[:, -1] = 1  # in spite of rounding
        sequences = np.empty((count, self.length), np.int64)
        sequences[:, 0] = rng.integers(self.tokens, size=count)
        for i in range(1, self.length):
            reached = cumulative[sequences[:, i - 1]] > rng.random((count, 1))
            sequences[:, i] = reached.argmax(-1)
        return sequences, sequences


@dataclass(frozen=True)
class Copying(_Sequences):
    """Sequences in which every token is that of `lag` positions before, renamed by a random permutation, or chance.

    Args:
        lag: uniform.
        noise: probability of chance, log-uniform.
    """

    lag: tuple[int, int] = (1, 4)
    noise: tuple[float, float] = (0.02, 0.2)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "lag", "noise")
        if self.lag[1] >= self.length:
            raise ValueError(f"lag must be below length ({self.length}), got {self.lag}")

    def _draw(self, rng: Generator, count: int) -> tuple[Array, Array]:
        lag = int(rng.integers(self.lag[0], self.lag[1] + 1))
        renamed = rng.permutation(self.tokens)
        sequences = rng.integers(self.tokens, size=(count, self.length))
        chance = rng.random((count, self.length)) < log_uniform(rng, *self.noise)
        for i in range(lag, self.length):
            sequences[:, i] = np.where(chance[:, i], sequences[:, i], renamed[sequences[:, i - lag]])
        return sequences, sequences
