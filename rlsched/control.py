"""From actions to hyperparameters. Every control is an entry in `CONTROLS`.

A control has a state, which the policy moves. The policy never sets a hyperparameter outright: it moves it away from
what the user gave. A parameter group is a mapping from names to values: one of a torch optimizer, or one of N networks
in training, whose values are tensors (*batch,). The functions here serve both.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from rlsched.number import Number, clamp, exp, log, where

EARLY = 0.2  # fraction of a run in which a decision may take the early step
MIN_MOMENTUM, MAX_MOMENTUM = 0.1, 0.99
OUTLIER = 100.0  # a gradient norm is clipped to so many times its running average, whatever the control says


class Seen(NamedTuple):
    """How a policy sees the state of a control: (state − shift) / scale, within [low, high]."""

    shift: float
    scale: float
    low: float
    high: float

    def __str__(self) -> str:
        return (f", − {self.shift:g}" if self.shift else "") + (f", / {self.scale:g}" if self.scale != 1 else "")


@dataclass(frozen=True)
class Control(ABC):
    """One entry of the action vector, in [−1, 1], and the state that it moves.

    A decision adds `step * action` to the state (`early_step` in the first fifth of a run), which stays within
    [low, high]. An action of zero leaves the state as it is.
    """

    name: str  # of the control, and of what it sets in `decided`
    meaning: str
    low: float
    high: float
    step: float
    early_step: float
    seen: Seen

    def base(self, group: Mapping[str, Any]) -> Number:
        """What the user gave a parameter group; NaN where it has nothing of the kind."""
        return _plain(group.get(self.name, math.nan))

    def origin(self, base: Number) -> Number:
        """The state that means `base`."""
        return 0.0

    def state(self, base: float, value: float) -> float:
        """The state that means `value` in a parameter group of this base; the origin, where that cannot be told."""
        return self.origin(base)

    def can_move(self, base: Number) -> Number:
        """Whether there is anything to control."""
        return True

    @abstractmethod
    def decide(self, values: dict[str, Number], base: Number, moved: Number, sums_gradients: Number) -> None:
        """Set in `values`, which begin as the base values, what a state means that is `moved` from its origin.

        With 0 it is the base, to the bit. `sums_gradients`: see `growth`.
        """

    def write(self, group: dict[str, Any], value: float) -> None:
        """Set the hyperparameter in a parameter group of a torch optimizer, where it has it."""
        if self.name in group:
            group[self.name] = value

    allowed: ClassVar[str] = "finite and not negative"  # what the hyperparameter can be

    def is_valid(self, value: float) -> bool:
        """Whether it can be this."""
        return 0 <= value < math.inf


def _plain(value: Number) -> Number:
    """A hyperparameter of one run as a float, where torch has it as a tensor."""
    return float(value) if isinstance(value, Tensor) and value.ndim == 0 else value


class _Factor(Control):
    """A factor on what the user gave; its state is the logarithm of it."""

    def state(self, base: float, value: float) -> float:
        if base <= 0:
            return self.origin(base)
        return clamp(math.log(value / base), self.low, self.high) if value > 0 else self.low

    def decide(self, values: dict[str, Number], base: Number, moved: Number, sums_gradients: Number) -> None:
        values[self.name] = values.get(self.name, base) * exp(moved)


class _LearningRate(_Factor):
    def base(self, group: Mapping[str, Any]) -> Number:
        # A torch scheduler that came first may have begun a warm-up at 0.
        return _plain(group.get("initial_lr", group["lr"]))

    def write(self, group: dict[str, Any], value: float) -> None:
        if isinstance(group["lr"], Tensor):
            # Anew, since others may have it too: another optimizer, LBFGS's state.
            group["lr"] = group["lr"].clone().fill_(value)
        else:
            super().write(group, value)


class _Momentum(Control):
    """Moves momentum without a change of the size of updates: lr · `growth` stays what it is."""

    def base(self, group: Mapping[str, Any]) -> Number:
        value = group["betas"][0] if group.get("betas") else group.get("momentum")
        return math.nan if value is None else _plain(value)

    def origin(self, base: Number) -> Number:
        return where(self.can_move(base), -log(1 - base) / math.log(10), 0.0)

    def state(self, base: float, value: float) -> float:
        return self.origin(value)

    def can_move(self, base: Number) -> Number:
        return (base > 0) & (base < 1)

    def decide(self, values: dict[str, Number], base: Number, moved: Number, sums_gradients: Number) -> None:
        can_move = self.can_move(base)
        start = where(can_move, base, 0.0)
        momentum = where(can_move, start + (1 - start) * (1 - 10**-moved), 0.0)
        law = growth(start, sums_gradients) / growth(momentum, sums_gradients)
        values["lr"] = values["lr"] * where(can_move, law, 1.0)
        values["momentum"] = where(can_move, momentum, base)

    def write(self, group: dict[str, Any], value: float) -> None:
        if group.get("betas"):
            beta, *others = group["betas"]
            group["betas"] = (torch.full_like(beta, value) if isinstance(beta, Tensor) else value, *others)
        else:
            super().write(group, value)

    allowed = "in [0, 1)"

    def is_valid(self, value: float) -> bool:
        return 0 <= value < 1


class _Clip(Control):
    def origin(self, base: Number) -> Number:
        return self.high

    def decide(self, values: dict[str, Number], base: Number, moved: Number, sums_gradients: Number) -> None:
        values["clip"] = where(moved < 0, exp(moved + (self.high - 0.7)), OUTLIER)

    allowed = "finite and positive"

    def is_valid(self, value: float) -> bool:
        return 0 < value < math.inf


class _WeightDecay(_Factor):
    def can_move(self, base: Number) -> Number:
        return base > 0


CONTROLS: Mapping[str, Control] = {
    control.name: control
    for control in (
        _LearningRate(
            "lr",
            "log of the factor on the learning rate of the base schedule",
            low=-7.0,
            high=9.0,  # Adam's usual 0.001 is 30 times too low for small networks, and a user's may be 100 times lower
            step=0.25,
            early_step=0.7,
            seen=Seen(0.0, 5.0, -1.4, 1.8),
        ),
        _Momentum(
            "momentum",
            "−log10(1 − momentum): 1 is a momentum of 0.9, 2 of 0.99",
            low=-math.log10(1 - MIN_MOMENTUM),
            high=-math.log10(1 - MAX_MOMENTUM),
            step=0.3,
            early_step=0.3,
            seen=Seen(1.0, 1.0, -1.0, 2.0),
        ),
        _Clip(
            "clip",
            "the gradient norm is clipped to exp(clip − 0.7) times its running average; at the maximum to "
            f"{OUTLIER:g} times, which is no more than a guard against outliers",
            low=0.0,
            high=3.0,
            step=0.5,
            early_step=0.5,
            seen=Seen(0.0, 2.0, 0.0, 1.5),
        ),
        _WeightDecay(
            "weight_decay",
            "log of the factor on the group's own weight decay, decoupled or L2; 0 stays 0",
            low=-4.0,
            high=4.0,
            step=0.3,
            early_step=0.7,
            seen=Seen(0.0, 4.0, -1.0, 1.0),
        ),
    )
}
CONTROL_NAMES = tuple(CONTROLS)
LR = CONTROLS["lr"]  # what a probe, a divergence and the bounds of a run act on


def growth(momentum: Number, sums_gradients: Number) -> Number:
    """How many times the average gradient a momentum buffer holds: 1 / (1 − momentum) where it sums gradients, else 1.

    With b ← βb + g the average of gradients is m = (1 − β) b, and the update of SGD, lr · b, is lr / (1 − β) times it.
    So lr / (1 − β) is the learning rate that counts: a change of β that leaves it alone changes the direction of
    updates, and not their size.

    Args:
        momentum: β in [0, 1).
        sums_gradients: whether the buffer is b (SGD, RMSprop; 1 or True) or m itself (Adam; 0 or False).
    """
    return 1 / (1 - sums_gradients * momentum)


def base_values(group: Mapping[str, Any]) -> dict[str, Number]:
    """What the user gave a parameter group, by control."""
    return {name: control.base(group) for name, control in CONTROLS.items()}


def decided(base: Mapping[str, Number], moved: Mapping[str, Number], sums_gradients: Number) -> dict[str, Number]:
    """The hyperparameters of a parameter group, before the base schedule.

    Args:
        base: its `base_values`. What else is in it stays as it is.
        moved: how far each control's state is from its origin.
        sums_gradients: see `growth`.
    """
    values = dict(base)
    for name, control in CONTROLS.items():
        control.decide(values, base[name], moved[name], sums_gradients)
    return values


def step_size(control: Control, progress: Number) -> Number:
    """How far an action of 1 moves a control, where the fraction `progress` of the run is done."""
    return where(progress < EARLY, control.early_step, control.step)


def moved_by(control: Control, state: Number, action: Number, progress: Number, origin: Number) -> Number:
    """A control's state after a decision.

    Args:
        control: the control.
        state: before the decision.
        action: in [−1, 1]; values beyond count as the bound.
        progress: fraction of the run that is done.
        origin: the state that means the base value. Where it lies outside the control's range, the range is widened
            to it, so that standing still is always possible.
    """
    moved = state + step_size(control, progress) * clamp(action, -1.0, 1.0)
    return clamp(moved, clamp(origin, high=control.low), clamp(origin, low=control.high))


def control_table(controls: Iterable[Control]) -> str:
    """The controls as a Markdown table, for documentation."""
    rows = [
        f"| {i} | `{c.name}` | {c.low:g} | {c.high:g} | ±{c.early_step:g}, later ±{c.step:g} | {c.meaning} |"
        for i, c in enumerate(controls)
    ]
    return "\n".join(
        ["| # | control | min | max | a decision moves it by | meaning |", "|--:|---|--:|--:|---|---|", *rows]
    )
