"""The data of a stack of networks, in one pair of tensors of which every network knows its own rows."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from numpy.random import Generator
from torch import Tensor

from rlsched.envs.sources import Points, Source
from rlsched.envs.stored import Stored

Slots = slice | list[int]  # some of the networks


class Pool(ABC):
    """The data of N networks.

    Args:
        inputs: (rows, *input shape).
        targets: (rows, *target shape); the very same tensor where inputs are their own targets.
    """

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self._inputs, self._targets = inputs, targets
        self._batch_inputs, self._batch_targets = inputs[:0].clone(), targets[:0].clone()

    @abstractmethod
    def put(self, slot: int, rng: Generator) -> int:
        """Draw the data of an episode; returns its number of training points."""

    @abstractmethod
    def index(self, slots: Slots, rows: Tensor) -> Tensor:
        """Where in the pool the training points `rows` (steps, slots, batch) of these networks are, of that shape."""

    @abstractmethod
    def validation(self, slots: Slots) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (slots, validation points, *shape), until the next `batch` or `validation`."""

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets at `index` (slots, batch), until the next `batch` or `validation`.

        Their memory is used again: to fill fresh pages at every step costs several times as much as to copy the points.
        """
        flat, alike = index.flatten(), self._targets is self._inputs
        if len(flat) > len(self._batch_inputs):
            self._batch_inputs = _zeros(len(flat), self._inputs)
            self._batch_targets = self._batch_inputs if alike else _zeros(len(flat), self._targets)
        inputs, targets = self._batch_inputs[: len(flat)], self._batch_targets[: len(flat)]
        torch.index_select(self._inputs, 0, flat, out=inputs)
        if not alike:
            torch.index_select(self._targets, 0, flat, out=targets)
        return inputs.unflatten(0, index.shape), targets.unflatten(0, index.shape)

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)]


class OwnPool(Pool):
    """Generated data, which belong to one network: each has room for the most points that there may be."""

    def __init__(self, source: Source, size: int, like: Points, device: torch.device) -> None:
        alike = like.targets is like.inputs
        self._source, self._most = source, source.max_points
        inputs = _zeros(size * self._most, like.inputs, device)
        super().__init__(inputs, inputs if alike else _zeros(size * self._most, like.targets, device))
        self._validation_inputs = _zeros(size, like.validation_inputs[None], device)
        self._validation_targets = (
            self._validation_inputs if alike else _zeros(size, like.validation_targets[None], device)
        )

    def put(self, slot: int, rng: Generator) -> int:
        drawn = self._source.draw(rng)
        start, points = slot * self._most, len(drawn.inputs)
        if len(drawn.targets) != points:
            raise ValueError(f"data: the source drew {points} inputs and {len(drawn.targets)} targets")
        if points > self._most:
            raise ValueError(f"max_points of the data is {self._most}, but an episode has {points} points")
        self._inputs[start : start + points] = drawn.inputs
        self._validation_inputs[slot] = drawn.validation_inputs
        if self._targets is not self._inputs:
            self._targets[start : start + points] = drawn.targets
            self._validation_targets[slot] = drawn.validation_targets
        return points

    def index(self, slots: Slots, rows: Tensor) -> Tensor:
        networks = torch.arange(len(self._inputs) // self._most, device=rows.device)[slots]
        return rows + (networks * self._most)[:, None]

    def validation(self, slots: Slots) -> tuple[Tensor, Tensor]:
        return self._validation_inputs[slots], self._validation_targets[slots]


class SharedPool(Pool):
    """Stored data, which all networks share: each has the numbers of its rows."""

    def __init__(self, source: Stored, size: int, device: torch.device) -> None:
        inputs = source.inputs.to(device)
        super().__init__(inputs, inputs if source.targets is source.inputs else source.targets.to(device))
        self._source = source
        self._rows = torch.zeros(size, source.max_points, dtype=torch.int32, device=device)
        self._validation_rows = torch.zeros(size, source.validation_points, dtype=torch.int32, device=device)

    def put(self, slot: int, rng: Generator) -> int:
        train, validation = self._source.rows(rng)
        self._rows[slot, : len(train)] = train
        self._validation_rows[slot] = validation
        return len(train)

    def index(self, slots: Slots, rows: Tensor) -> Tensor:
        return self._rows[slots].expand(len(rows), -1, -1).gather(2, rows).long()

    def validation(self, slots: Slots) -> tuple[Tensor, Tensor]:
        return self.batch(self._validation_rows[slots].long())


def pool_of(source: Source, size: int, like: Points, device: torch.device) -> Pool:
    """A pool for `size` networks with data from `source`, of the shapes and types of `like`."""
    return SharedPool(source, size, device) if isinstance(source, Stored) else OwnPool(source, size, like, device)


def _zeros(rows: int, like: Tensor, device: torch.device | None = None) -> Tensor:
    return torch.zeros(rows, *like.shape[1:], dtype=like.dtype, device=device or like.device)
