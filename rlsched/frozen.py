"""The schedule of a run as plain numbers, for runs without a policy."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlsched.base_schedule import BaseSchedule, named_base_schedule
from rlsched.control import CONTROLS, LR, decided
from rlsched.files import write
from rlsched.notices import warn

VERSION = 2  # of the file, raised whenever a field changes its meaning


class Window(NamedTuple):
    """What held in a run from one decision to the next."""

    start: int  # its first inner step
    probing: bool
    moved: dict[str, float]  # how far each control was from its origin
    control: dict[str, float]  # state of each control
    total_steps: int  # in the run, as far as was known
    knots: tuple[tuple[float, float], ...]  # of the base schedule over them


@dataclass(frozen=True)
class FrozenSchedule:
    """Learning rate, momentum and clipping of a run, as functions of the inner step; see `Controller.freeze`.

    Called with an inner step it gives the factor on the base learning rate, so that it is what `LambdaLR` asks for::

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)

    whose `state_dict()` then holds it as plain numbers. A window is the inner steps from one decision to the next. The
    factor is linear in the step between its knots, and the other controls are the same at all of them.

    Attributes:
        total_steps: inner steps in the run. After them the learning rate stays where it ended.
        base_schedule: name of the base schedule, which is in `lr_factors`.
        base_lrs: learning rate of each parameter group that the run began with.
        steps: the knots, which are the first and the last inner step of each window, and between them those where the
            base schedule bends; rising, from 0 on.
        lr_factors: factor on the base learning rate at each knot. It is the one at the base momentum: where momentum
            sums gradients (SGD, RMSprop) and moves as well, the learning rate takes another
            (1 − momentum) / (1 − base momentum).
        values: of every other control by its name, what the first parameter group had at each knot: "momentum" in
            [0, 1); "clip", the multiple of its running average that the gradient norm is clipped to; and so on. 0 where
            the group has nothing of the kind.
    """

    total_steps: int
    base_schedule: str
    base_lrs: tuple[float, ...]
    steps: tuple[int, ...]
    lr_factors: tuple[float, ...]
    values: Mapping[str, tuple[float, ...]]

    def __post_init__(self) -> None:
        named_base_schedule(self.base_schedule)
        knots = len(self.steps)
        if not knots or self.steps[0] != 0 or any(a >= b for a, b in pairwise(self.steps)):
            raise ValueError(f"steps must rise from 0 on, got {_shown(self.steps)}")
        if self.steps[-1] != self.total_steps - 1:
            raise ValueError(
                f"steps must end at total_steps − 1 = {self.total_steps - 1}, the last inner step, got {self.steps[-1]}"
            )
        unknown = sorted(self.values.keys() - CONTROLS.keys())
        if unknown:
            raise ValueError(f"values must be of some of the controls {list(CONTROLS)}, got {unknown}")
        for name, control, values in (
            ("lr_factors", LR, self.lr_factors),
            *((f"values[{name!r}]", CONTROLS[name], values) for name, values in self.values.items()),
        ):
            if len(values) != knots:
                raise ValueError(f"{name} must have a value for each of the {knots} steps, got {len(values)}")
            wrong = [value for value in values if not control.is_valid(value)]
            if wrong:
                raise ValueError(f"{name} must be {control.allowed}, got {_shown(wrong)}")

    @classmethod
    def of(
        cls, windows: Sequence[Window], bases: Sequence[Mapping[str, float]], schedule: BaseSchedule
    ) -> FrozenSchedule:
        """The schedule of a run of `windows`, the first of which starts at 0, with groups of these base values.

        The run is as long as its last window knows it. `schedule` has the name of the base schedule.
        """
        total_steps = windows[-1].total_steps
        windows = [window for window in windows if window.start < total_steps]
        starts = [window.start for window in windows]
        ends = [start - 1 for start in (*starts[1:], total_steps)]
        steps: list[int] = []
        lr_factors: list[float] = []
        values: dict[str, list[float]] = {name: [] for name in CONTROLS if name != LR.name}
        for window, end in zip(windows, ends, strict=True):
            held = decided({**bases[0], LR.name: 1.0}, window.moved, 0)  # 0: without what makes up for momentum
            base, last = replace(schedule, knots=window.knots), window.total_steps - 1  # after it the factor stays
            bends = base.steps_of_knots(window.total_steps) | {last}
            for step in sorted({window.start, end} | {step for step in bends if window.start < step < end}):
                decay = 1.0 if window.probing else base.factor(min(step, last), window.total_steps)
                steps.append(step)
                lr_factors.append(decay * held[LR.name])
                for name, row in values.items():
                    row.append(0.0 if math.isnan(held[name]) else held[name])
        lrs = tuple(base[LR.name] for base in bases)
        knots = tuple(steps), tuple(lr_factors), {name: tuple(row) for name, row in values.items()}
        return cls(total_steps, schedule.name, lrs, *knots)

    def __call__(self, step: int) -> float:
        """Factor on the base learning rate at inner step `step`, counted from 0.

        Warns once if the run moved momentum, which a replay of the learning rate alone does not.
        """
        momenta = self.values.get("momentum", ())
        if len(set(momenta)) > 1 and "warned" not in self.__dict__:
            object.__setattr__(self, "warned", True)
            warn(
                f"the run moved momentum, between {min(momenta):.3g} and {max(momenta):.3g}, and "
                "the learning rate alone is not its schedule: set values['momentum'] as well, or train with controls "
                "that leave it alone"
            )
        return float(np.interp(step, self.steps, self.lr_factors))

    def save(self, path: str | Path) -> Path:
        """Write the schedule as JSON, in one move; its folder is made if need be. Returns the path."""
        text = json.dumps({"version": VERSION, **asdict(self)}, allow_nan=False) + "\n"
        return write(path, text.encode())

    @classmethod
    def load(cls, path: str | Path) -> FrozenSchedule:
        """Read a schedule that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, of another version, or holds no schedule.
        """
        try:
            values: Any = json.loads(Path(path).read_text())
            if not isinstance(values, dict) or values.pop("version", None) != VERSION:
                raise ValueError(f"it is not of version {VERSION}, which this rlsched reads")
            for name, value in values.items():
                if isinstance(value, list):
                    values[name] = tuple(value)
                elif isinstance(value, dict):
                    values[name] = {key: tuple(row) for key, row in value.items()}
            return cls(**values)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} holds no schedule: {error}") from error


def _shown(values: Sequence[Any]) -> str:
    """The beginning of a long sequence."""
    return f"[{', '.join(map(repr, values[:4]))}{', …' if len(values) > 4 else ''}]"
