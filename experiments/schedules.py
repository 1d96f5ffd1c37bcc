"""The schedules that others use, over a whole run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from rlsched.base_schedule import BASE_SCHEDULES

Schedule = Callable[[Optimizer, int], LRScheduler]  # of an optimizer and the number of steps, taken at each of them


def _named(name: str) -> Schedule:
    """One of the base schedules, which is at its knots what torch's own are."""
    schedule = BASE_SCHEDULES[name]
    return lambda optimizer, steps: LambdaLR(optimizer, lambda step: float(schedule.factor(step, steps)))


def _one_cycle(optimizer: Optimizer, steps: int) -> LRScheduler:
    group = optimizer.param_groups[0]
    return OneCycleLR(optimizer, group["lr"], total_steps=steps + 1, cycle_momentum=_has_momentum(group))


def _has_momentum(group: Mapping[str, object]) -> bool:
    return "betas" in group or bool(group.get("momentum"))


def warm_up_cosine(optimizer: Optimizer, steps: int, warm_up: int) -> LRScheduler:
    """As nanoGPT: linear warm-up over `warm_up` steps, then cosine to a tenth."""

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / (warm_up + 1)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))

    return LambdaLR(optimizer, factor)


def quarter_on_plateau(optimizer: Optimizer) -> ReduceLROnPlateau:
    """As pytorch/examples, word_language_model: a quarter after each validation that brings no new best."""
    return ReduceLROnPlateau(optimizer, factor=0.25, patience=0, threshold=0.0)


SCHEDULES: Mapping[str, Schedule] = {
    "constant": lambda optimizer, steps: LambdaLR(optimizer, lambda _: 1.0),
    "linear": lambda optimizer, steps: LambdaLR(optimizer, lambda step: 1 - step / steps),
    "cosine": lambda optimizer, steps: CosineAnnealingLR(optimizer, steps),
    "warm-up-linear": _named("warm-up-linear"),
    "wsd": _named("warm-up-stable-decay"),
    "one-cycle": _one_cycle,
}
