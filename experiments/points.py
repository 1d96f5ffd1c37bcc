"""One data set for all runs of a study: its split, and the order in which a run meets it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rlsched.envs.sources import Points

SPLIT_SEED = 0  # one split into training and validation points for all runs


def split(inputs: Tensor, targets: Tensor, validation_points: int) -> Points:
    """Training and validation points: always the same ones."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(SPLIT_SEED))
    validation, training = order[:validation_points], order[validation_points:]
    return Points(inputs[training], targets[training], inputs[validation], targets[validation])


def batches(points: Points, size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` mini-batches, epoch after epoch in a new order, which depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(len(points.targets), generator=generator)
        rows, order = order[:size], order[size:]
        yield points.inputs[rows], points.targets[rows]
