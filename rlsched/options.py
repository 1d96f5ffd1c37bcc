"""The options of a schedule, which both faces of a controller and the callbacks of all frameworks take."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from torch.nn import Module

from rlsched.control import CONTROL_NAMES, CONTROLS
from rlsched.number import checked_count
from rlsched.onnx_policy import load_policy
from rlsched.policy import Policy, checked_names
from rlsched.safety import ON_DIVERGENCE, ROLLBACK
from rlsched.snapshots import FULL, SNAPSHOTS
from rlsched.tensorboard import NEEDED

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter
    from typing_extensions import Required

T = TypeVar("T")


class CallbackOptions(TypedDict, total=False):
    """The arguments of `rlsched.attach` by their types; a callback knows `total_steps` from its trainer."""

    total_steps: int | None
    policy: str | Path | Policy
    controls: Sequence[str]
    decisions: int
    max_grad_norm: float | None
    follow_scheduler: bool
    on_divergence: str | None
    undo_overfitting: bool
    snapshots: str
    model: Module | None
    trust: float | None
    lr_bounds: tuple[float, float]
    max_update_ratio: float
    shadow: bool
    log_dir: str | Path | None
    writer: SummaryWriter | None
    patience: int | None
    keep_best: bool
    averaging: bool
    per_group: bool


class Options(CallbackOptions, total=False):
    """The arguments of `rlsched.attach` by their types."""

    total_steps: Required[int | None]  # type: ignore[misc] # which is required here


@dataclass(frozen=True)
class ScheduleOptions:
    """The arguments of `rlsched.ScheduledOptimizer`, which documents them, with their defaults.

    Raises:
        TypeError, ValueError: one of them is not what it can be.
    """

    total_steps: int | None
    policy: str | Path | Policy = "default"
    controls: Sequence[str] = CONTROL_NAMES
    decisions: int = 100
    max_grad_norm: float | None = None
    follow_scheduler: bool = False
    on_divergence: str | None = ROLLBACK
    undo_overfitting: bool = True
    snapshots: str = FULL
    model: Module | None = None
    trust: float | None = None
    lr_bounds: tuple[float, float] = (0.0, math.inf)
    max_update_ratio: float = 3.0
    shadow: bool = False
    log_dir: str | Path | None = None
    writer: SummaryWriter | None = None
    patience: int | None = None
    keep_best: bool = False
    averaging: bool = False
    per_group: bool = False

    def __post_init__(self) -> None:
        counts = {"decisions": "decisions in a run"}
        if self.total_steps is not None:
            counts["total_steps"] = "optimizer steps, or None"
        if self.patience is not None:
            counts["patience"] = "validations, or None"
        for name, of in counts.items():
            object.__setattr__(self, name, checked_count(name, getattr(self, name), of))
        object.__setattr__(self, "lr_bounds", _bounds(self.lr_bounds))
        for name, at_least in (("max_grad_norm", 0), ("trust", 1)):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and value > at_least):
                raise ValueError(f"{name} must be a number above {at_least}, or None, got {value!r}")
        if not (_is_number(self.max_update_ratio) and self.max_update_ratio > 0):
            raise ValueError(f"max_update_ratio must be a positive number, got {self.max_update_ratio!r}")
        for name, allowed in (("on_divergence", ON_DIVERGENCE), ("snapshots", SNAPSHOTS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.model is not None and not isinstance(self.model, Module):
            raise TypeError(f"model must be a torch.nn.Module or None, got {type(self.model).__name__}")
        if self.writer is not None and not all(hasattr(self.writer, name) for name in NEEDED):
            raise TypeError(f"writer must be a SummaryWriter, with {NEEDED}, got {type(self.writer).__name__}")
        if self.shadow and self.follow_scheduler:
            raise ValueError("follow_scheduler: in shadow mode nothing is set, and so nothing can follow")
        for name in ("per_group", "undo_overfitting"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        chosen = checked_names("controls", self.controls, CONTROLS)
        object.__setattr__(self, "controls", tuple(name for name in CONTROL_NAMES if name in chosen))
        if not isinstance(self.policy, str | Path | Policy):
            raise TypeError(
                "policy must be the name of a shipped policy, the path of a policy file, the address of a server, or a "
                f"policy object (rlsched.policy.Policy), got {type(self.policy).__name__}"
            )

    def loaded_policy(self) -> Policy:
        """The policy itself."""
        return load_policy(self.policy) if isinstance(self.policy, str | Path) else self.policy


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _bounds(value: Any) -> tuple[float, float]:
    numbers = tuple(value) if isinstance(value, Sequence) else ()
    if not (len(numbers) == 2 and all(map(_is_number, numbers)) and 0 <= numbers[0] <= numbers[1]):
        raise ValueError(f"lr_bounds must be (lowest, highest) with 0 <= lowest <= highest, got {value!r}")
    return float(numbers[0]), float(numbers[1])


def shows_options(required: bool = True) -> Callable[[T], T]:
    """Spell the options out in the signature of a function that passes them on; mypy has them from `Options`.

    Args:
        required: whether `total_steps` has to be given.
    """

    def decorate(function: Any) -> Any:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        spelt = []
        for field, parameter in zip(
            fields(ScheduleOptions), inspect.signature(ScheduleOptions).parameters.values(), strict=True
        ):
            parameter = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=field.type)
            if field.name == "total_steps" and not required:
                parameter = parameter.replace(default=None, annotation="int | None")
            spelt.append(parameter)
        function.__signature__ = signature.replace(parameters=[*own, *spelt])
        return function

    return decorate
