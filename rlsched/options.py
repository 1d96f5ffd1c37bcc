"""The options of a schedule, which both faces of a controller and the callbacks of all frameworks take."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from rlsched.control import CONTROL_NAMES, CONTROLS
from rlsched.number import checked_count
from rlsched.policy import Policy, SchedulePolicy, checked_names
from rlsched.safety import ON_DIVERGENCE

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
    lr_bounds: tuple[float, float]
    max_update_ratio: float
    shadow: bool
    log_dir: str | Path | None
    writer: SummaryWriter | None
    patience: int | None
    keep_best: bool
    averaging: bool


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
    on_divergence: str | None = "cut"
    lr_bounds: tuple[float, float] = (0.0, math.inf)
    max_update_ratio: float = 3.0
    shadow: bool = False
    log_dir: str | Path | None = None
    writer: SummaryWriter | None = None
    patience: int | None = None
    keep_best: bool = False
    averaging: bool = False

    def __post_init__(self) -> None:
        bounds = self.lr_bounds
        counts = {"decisions": "decisions in a run"}
        if self.total_steps is not None:
            counts["total_steps"] = "optimizer steps, or None"
        if self.patience is not None:
            counts["patience"] = "validations, or None"
        for name, of in counts.items():
            object.__setattr__(self, name, checked_count(name, getattr(self, name), of))
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive or None, got {self.max_grad_norm!r}")
        if self.on_divergence not in ON_DIVERGENCE:
            raise ValueError(f"on_divergence must be one of {ON_DIVERGENCE}, got {self.on_divergence!r}")
        if not (len(bounds) == 2 and 0 <= bounds[0] <= bounds[1]):
            raise ValueError(f"lr_bounds must be (lowest, highest) with 0 <= lowest <= highest, got {bounds!r}")
        if not self.max_update_ratio > 0:
            raise ValueError(f"max_update_ratio must be positive, got {self.max_update_ratio!r}")
        if self.shadow and self.follow_scheduler:
            raise ValueError("follow_scheduler: in shadow mode nothing is set, and so nothing can follow")
        chosen = checked_names("controls", self.controls, CONTROLS)
        object.__setattr__(self, "controls", tuple(name for name in CONTROL_NAMES if name in chosen))
        if not isinstance(self.policy, str | Path | Policy):
            raise TypeError(
                "policy must be the name of a shipped policy, the path of a policy file, or a policy object "
                f"(rlsched.policy.Policy), got {type(self.policy).__name__}"
            )

    def loaded_policy(self) -> Policy:
        """The policy itself."""
        return SchedulePolicy.load(self.policy) if isinstance(self.policy, str | Path) else self.policy


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
