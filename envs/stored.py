"""Data that the user has, which all networks share: they hold row numbers and no copies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sized
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from rlsched.envs.draws import check_ranges, log_uniform
from rlsched.envs.sources import Array, Points, standardised

# Modules of Python whose source code is a text that every machine has.
SOURCE_MODULES = tuple(
    ["argparse", "ast", "configparser", "dataclasses", "datetime", "doctest", "inspect", "pathlib", "typing"]
)
# Points in each of scikit-learn's bundled data sets.
BUNDLED: Mapping[str, int] = {"breast_cancer": 569, "diabetes": 442, "digits": 1797, "iris": 150, "wine": 178}


class Stored:
    """Data that the user has. A part of them, drawn anew for every episode, validates.

    Args:
        inputs: (points, *input shape), a tensor or an array.
        targets: (points, *target shape).
        points: range of the number of training points in an episode, log-uniform; all by default.
        validation_points: number of validation points; by default a fifth, and at most 1,024.
    """

    def __init__(
        self,
        inputs: Tensor | Array,
        targets: Tensor | Array,
        *,
        points: tuple[int, int] | None = None,
        validation_points: int | None = None,
    ) -> None:
        x, y = self._tensors = _single_precision(inputs), _single_precision(targets)
        if len(y) != len(x):
            raise ValueError(f"inputs and targets must be of equal length, got {len(x)} and {len(y)}")
        self._split(len(x), points, validation_points)

    @classmethod
    def of(cls, data: Dataset[Any] | tuple[Any, Any], **options: Any) -> Stored:
        """From a pair (inputs, targets), or from a map-style `Dataset` of such pairs.

        Raises:
            TypeError: it is neither.
            ValueError: the lengths differ.
        """
        if isinstance(data, Dataset):
            if not isinstance(data, Sized):
                raise TypeError(f"data must have a length, got the {type(data).__name__} without one")
            data = default_collate([data[i] for i in range(len(data))])
        if not isinstance(data, tuple | list) or len(data) != 2:
            raise TypeError(f"data must be a pair (inputs, targets) or a Dataset of pairs, got {type(data).__name__}")
        return cls(*data, **options)

    @property
    def inputs(self) -> Tensor:
        return self._load()[0]

    @property
    def targets(self) -> Tensor:
        return self._load()[1]

    @property
    def max_points(self) -> int:
        return self.points[1]

    def rows(self, rng: Generator) -> tuple[Tensor, Tensor]:
        """Row numbers of an episode's training points and of its validation points, without overlap."""
        order = torch.from_numpy(rng.permutation(self.count))
        points = round(log_uniform(rng, *self.points))
        validation, rest = order[: self.validation_points], order[self.validation_points :]
        return rest[:points], validation

    def draw(self, rng: Generator) -> Points:
        train, validation = self.rows(rng)
        return Points(self.inputs[train], self.targets[train], self.inputs[validation], self.targets[validation])

    def _load(self) -> tuple[Tensor, Tensor]:
        return self._tensors

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.count} points)"

    def _split(self, count: int, points: tuple[int, int] | None, validation_points: int | None) -> None:
        """Settle how many of `count` points train and validate."""
        if count < 2:
            raise ValueError(f"inputs must hold at least 2 points, one to train and one to validate, got {count}")
        self.count = count
        self.validation_points = min(1024, max(1, count // 5)) if validation_points is None else validation_points
        if not 1 <= self.validation_points < count:
            raise ValueError(f"validation_points must be between 1 and {count - 1}, got {self.validation_points}")
        rest = count - self.validation_points
        self.points = (rest, rest) if points is None else points
        check_ranges(self, "points")
        if self.points[1] > rest:
            raise ValueError(f"points must be at most {rest}, what validation leaves, got {self.points}")


class Bundled(Stored):
    """One of scikit-learn's bundled data sets, which is read when it is first used; see `bundled`."""

    def __init__(self, name: str, points: tuple[int, int] | None, validation_points: int | None) -> None:
        if name not in BUNDLED:
            raise ValueError(f"name must be one of {', '.join(BUNDLED)}, got {name!r}")
        self.name = name
        self._split(BUNDLED[name], points, validation_points)

    def __repr__(self) -> str:
        return f"bundled({self.name!r}, points={self.points})"

    def _load(self) -> tuple[Tensor, Tensor]:
        return _read(self.name)


def bundled(name: str, *, points: tuple[int, int] | None = None, validation_points: int | None = None) -> Stored:
    """One of scikit-learn's bundled data sets, by its name in `BUNDLED`; the rest as in `Stored`.

    "digits" are 8 × 8 images with pixels in [0, 1]; the other inputs are standardised, and so are the targets of
    "diabetes", (points, 1), the one regression. The rest are labels.
    """
    return Bundled(name, points, validation_points)


class SourceCode(Stored):
    """Source code of `SOURCE_MODULES`, of the Python that runs, for language models of characters.

    Points are `count` pieces of it, (length,) int64, at equal distances; they are their own targets. Characters are
    numbers from 0, the most frequent first; the last one stands for all that are rarer. It is read when it is first
    used.

    Args:
        length: characters in a point.
        symbols: how many there are.
        count: number of points.
        points, validation_points: as in `Stored`.
    """

    def __init__(
        self,
        length: int = 16,
        symbols: int = 64,
        count: int = 8192,
        *,
        points: tuple[int, int] | None = None,
        validation_points: int | None = None,
    ) -> None:
        if length < 2 or symbols < 2:
            raise ValueError(f"length and symbols must be at least 2, got {length} and {symbols}")
        self.length, self.tokens = length, symbols
        self._split(count, points, validation_points)

    def __repr__(self) -> str:
        return f"SourceCode(length={self.length}, symbols={self.tokens})"

    def _load(self) -> tuple[Tensor, Tensor]:
        pieces = _read_source_code(self.length, self.tokens, self.count)
        return pieces, pieces


@lru_cache
def _read_source_code(length: int, symbols: int, count: int) -> Tensor:
    """
    Raises:
        FileNotFoundError: this Python has come without its source code.
    """
    sources = [spec.origin for spec in map(find_spec, SOURCE_MODULES) if spec is not None and spec.has_location]
    text = "".join(Path(str(origin)).read_text(encoding="utf-8") for origin in sources)
    frequent = [character for character, _ in Counter(text).most_common(symbols - 1)]
    numbers = {character: i for i, character in enumerate(frequent)}
    tokens = torch.tensor([numbers.get(character, symbols - 1) for character in text])
    starts = torch.linspace(0, len(tokens) - length, count).long()
    return tokens[starts[:, None] + torch.arange(length)].contiguous()


@lru_cache
def _read(name: str) -> tuple[Tensor, Tensor]:
    import sklearn.datasets

    data = getattr(sklearn.datasets, f"load_{name}")()
    if len(data.data) != BUNDLED[name]:
        raise ValueError(f"scikit-learn's {name} should have {BUNDLED[name]} points, it has {len(data.data)}")
    inputs = data.data / 16 if name == "digits" else standardised(data.data)
    targets = standardised(data.target[:, None]) if name == "diabetes" else data.target.astype(np.int64)
    return torch.from_numpy(inputs.astype(np.float32)), torch.from_numpy(targets)


def _single_precision(x: Tensor | Array) -> Tensor:
    """NumPy's usual float64 would clash with the weights' float32; other types stay."""
    x = torch.as_tensor(x)
    return x.float() if x.dtype == torch.float64 else x
