"""What the callbacks of all frameworks do alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from torch.nn import Module
from torch.optim import Optimizer

from rlsched.notices import warn
from rlsched.optimizer import Controller, ScheduledOptimizer, attach
from rlsched.options import ScheduleOptions

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

    from rlsched.tensorboard import Listener, RunLog


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse misspelt options at once, and not when training begins.

    Raises:
        TypeError: an option is not one of `rlsched.attach`.
    """
    known = [field.name for field in fields(ScheduleOptions)]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(f"ScheduleCallback got unknown options {unknown}; it takes {known}")


def controller_of(optimizer: Optimizer, model: Module, total_steps: int, options: Mapping[str, Any]) -> Controller:
    """The controller of a `ScheduledOptimizer`; a new one that is attached to any other optimizer.

    Args:
        optimizer: the user's, freed of what the framework put around it.
        model: whose weights it optimizes; its buffers are part of snapshots.
        total_steps: the optimizer steps that the framework is going to take.
        options: what the user gave the callback, as for `attach`.

    Raises:
        ValueError: options are given both to the callback and to a `ScheduledOptimizer`.
    """
    if not isinstance(optimizer, ScheduledOptimizer):
        return attach(optimizer, **{"total_steps": total_steps, "model": model, **options})
    if options:
        raise ValueError(f"the optimizer is a ScheduledOptimizer: it takes {', '.join(options)}, not the callback")
    if optimizer.controller.total_steps not in (None, total_steps):
        warn(f"total_steps={optimizer.controller.total_steps}, but training is going to take {total_steps} steps")
    return optimizer.controller


class Loggers:
    """A framework's loggers, which get the figures of each decision until they are closed.

    A TensorBoard writer among them is the run's own meanwhile, if that has none: it gets charts and messages as well.

    Args:
        log: of the run.
        tell: hands figures to the others.
        writer: of the framework's logger for TensorBoard, if it has one.

    Attributes:
        lent: the writer, if it is the run's own or has become that, and needs not be told.
    """

    def __init__(self, log: RunLog, tell: Listener, writer: SummaryWriter | None) -> None:
        self._log, self._tell = log, tell
        self._is_lent = writer is not None and log.writer is None
        if writer is not None and log.writer is None:
            log.write_to(writer)
        self.lent = writer if log.writer is writer else None
        log.listeners.append(tell)

    def close(self) -> None:
        self._log.listeners.remove(self._tell)
        if self._is_lent:
            self._log.close()
            self._log.writer = None


class Monitor:
    """Finds the validation loss among metrics, and says once if it is wanted and never there.

    Args:
        name: of the metric.
        default: its usual name; it is missed only if `patience` or `keep_best` go by it. Another name always is.
    """

    def __init__(self, name: str, default: str) -> None:
        self.name, self._is_default = name, name == default
        self._others: set[str] = set()  # metrics that were there in its stead
        self._is_found = False

    def found_in(self, metrics: Mapping[str, Any]) -> Any:
        """The validation loss; None if it is not there."""
        self._is_found |= self.name in metrics
        self._others |= set(metrics)
        return metrics.get(self.name)

    def warn_if_missed(self, options: ScheduleOptions) -> None:
        """Call after a validation."""
        is_wanted = not self._is_default or options.patience is not None or options.keep_best
        if self._others and not self._is_found and is_wanted:
            self._is_found = True
            warn(f"monitor={self.name!r} is not among the metrics {sorted(self._others)}: no validation loss is known")
