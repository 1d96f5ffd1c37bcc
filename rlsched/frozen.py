"""The schedule of a run as plain numbers, for runs without a policy."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlsched import control

VERSION = 1  # of the file, raised whenever a field changes its meaning


class Window(NamedTuple):
    """What a run did from one decision to the next."""

    start: int  # its first inner step
    lr_factor: float  # on the fallback learning rate, without what makes up for a change of momentum
    momentum: float
    clip_multiple: float


@dataclass(frozen=True)
class FrozenSchedule:
    """Learning rate, momentum and clipping of a run, as functions of the inner step; see `Controller.freeze`.

    Called with an inner step it gives the factor on the base learning rate, so that it is what `LambdaLR` asks for::

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)

    whose `state_dict()` then holds it as plain numbers. A window is the inner steps from one decision to the next. The
    factor is linear in the step between its two knots, and momentum and the clip multiple are the same at both.

    Attributes:
        total_steps: inner steps in the run. After them the learning rate stays where it ended.
        base_lrs: learning rate of each parameter group that the run began with.
        steps: the knots, which are the first and the last inner step of each window; rising, from 0 on.
        lr_factors: factor on the base learning rate at each knot. It is the one at the base momentum: where momentum
            sums gradients (SGD, RMSprop) and moves as well, the learning rate takes another
            (1 − momentum) / (1 − base momentum).
        momenta: momentum of the first parameter group at each knot, in [0, 1); 0 where it has none.
        clip_multiples: the gradient norm is clipped to this times its running average, at each knot.
    """

    total_steps: int
    base_lrs: tuple[float, ...]
    steps: tuple[int, ...]
    lr_factors: tuple[float, ...]
    momenta: tuple[float, ...]
    clip_multiples: tuple[float, ...]

    def __post_init__(self) -> None:
        knots = len(self.steps)
        if not knots or self.steps[0] != 0 or any(a >= b for a, b in pairwise(self.steps)):
            raise ValueError(f"steps must rise from 0 on, got {_shown(self.steps)}")
        if self.steps[-1] != self.total_steps - 1:
            raise ValueError(
                f"steps must end at total_steps − 1 = {self.total_steps - 1}, the last inner step, got {self.steps[-1]}"
            )
        for name, allowed, holds in (
            ("lr_factors", "finite and not negative", lambda value: 0 <= value < math.inf),
            ("momenta", "in [0, 1)", lambda value: 0 <= value < 1),
            ("clip_multiples", "finite and positive", lambda value: 0 < value < math.inf),
        ):
            values = getattr(self, name)
            if len(values) != knots:
                raise ValueError(f"{name} must have a value for each of the {knots} steps, got {len(values)}")
            if not all(map(holds, values)):
                raise ValueError(f"{name} must be {allowed}, got {_shown([v for v in values if not holds(v)])}")

    @classmethod
    def of(cls, windows: Sequence[Window], total_steps: int, base_lrs: Sequence[float]) -> FrozenSchedule:
        """The schedule of a run of `windows`, the first of which starts at 0."""
        starts = [window.start for window in windows]
        ends = [start - 1 for start in (*starts[1:], total_steps)]
        knots = [
            (step, window.lr_factor * control.fallback_schedule(step, total_steps), *window[2:])
            for window, end in zip(windows, ends, strict=True)
            for step in dict.fromkeys((window.start, end))
        ]
        return cls(total_steps, tuple(base_lrs), *zip(*knots, strict=True))

    def __call__(self, step: int) -> float:
        """Factor on the base learning rate at inner step `step`, counted from 0."""
        return float(np.interp(step, self.steps, self.lr_factors))

    def save(self, path: str | Path) -> Path:
        """Write the schedule as JSON; its folder is made if need be. Returns the path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"version": VERSION, **asdict(self)}, allow_nan=False) + "\n")
        return path

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
            return cls(**values)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} holds no schedule: {error}") from error


def _shown(values: Sequence[Any]) -> str:
    """The beginning of a long sequence."""
    return f"[{', '.join(map(repr, values[:4]))}{', …' if len(values) > 4 else ''}]"
