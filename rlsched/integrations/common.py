"""What the callbacks of all frameworks do alike."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch.optim import Optimizer

from rlsched.optimizer import Controller, ScheduledOptimizer, attach
from rlsched.options import ScheduleOptions


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse misspelt options at once, and not when training begins.

    Raises:
        TypeError: an option is not one of `rlsched.attach`.
    """
    known = [field.name for field in fields(ScheduleOptions)]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(f"ScheduleCallback got unknown options {unknown}; it takes {known}")


def controller_of(optimizer: Optimizer, total_steps: int, options: Mapping[str, Any]) -> Controller:
    """The controller of a `ScheduledOptimizer`; a new one that is attached to any other optimizer.

    Args:
        optimizer: the user's, freed of what the framework put around it.
        total_steps: the optimizer steps that the framework is going to take.
        options: what the user gave the callback, as for `attach`.

    Raises:
        ValueError: options are given both to the callback and to a `ScheduledOptimizer`.
    """
    if not isinstance(optimizer, ScheduledOptimizer):
        return attach(optimizer, **{"total_steps": total_steps, **options})
    if options:
        raise ValueError(f"the optimizer is a ScheduledOptimizer: it takes {', '.join(options)}, not the callback")
    if optimizer.controller.total_steps != total_steps:
        warn(f"total_steps={optimizer.controller.total_steps}, but training is going to take {total_steps} steps")
    return optimizer.controller


def warn(message: str) -> None:
    """Warn the user; no line of their own is to blame."""
    warnings.warn(f"rlsched: {message}", stacklevel=3)
