"""Weights in float16, which end above 65,504, and whose squares do above 256 and below 0.0003."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rlsched import distributed

LARGEST = torch.finfo(torch.float16).max  # lr in a step of weights in float16


def has_half_precision(parameters: Sequence[Tensor]) -> bool:
    return any(p.dtype is torch.float16 for p in parameters)


class HalfPrecision:
    """Keeps weights in float16 finite, at the price of a copy of them in each step.

    Optimizers compute in the precision of the weights. There a small gradient has the square 0, and the eps of Adam is
    0 as well, so that a finite gradient moves a weight by 0/0. A weight that a step leaves not finite stays as it was.
    """

    def __init__(self) -> None:
        self._before: list[tuple[Tensor, Tensor]] = []  # each weight and what it was

    def before_step(self, parameters: Sequence[Tensor]) -> None:
        halves = [p for p in parameters if p.dtype is torch.float16 and p.grad is not None]
        self._before = [(p, distributed.local(p.detach()).clone()) for p in halves]

    def after_step(self, optimizer: Optimizer) -> None:
        for p, before in self._before:
            weight = distributed.local(p.detach())
            weight.copy_(torch.where(weight.isfinite(), weight, before))
            state: Any = optimizer.state.get(p, {})
            for value in state.values():
                if isinstance(value, Tensor) and value.dtype is torch.float16:
                    distributed.local(value).nan_to_num_(0.0)  # what is infinite becomes as large as can be
        self._before = []
