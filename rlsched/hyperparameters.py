"""The learning rates and momenta of an optimizer's parameter groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rlsched import control, distributed

ADAPTIVE = {"RMSprop", "Adagrad", "Adadelta", "Adafactor", "Rprop"}  # beside all optimizers with `betas`
# Optimizers whose `momentum` averages gradients, or weights; torch's others sum gradients.
AVERAGING = {"Muon", "SGDScheduleFree", "SGDScheduleFreeReference"}
BUFFERS = ("exp_avg", "momentum_buffer")  # where torch's optimizers keep their momentum


class Hyperparameters:
    """What the parameter groups of an optimizer began with, and what a decision makes of it.

    The momentum control is given as the distance of its state from where it began: a group whose momentum differs from
    the first one's keeps its distance to it.

    Args:
        optimizer: its present learning rates and momenta are the base values.
        lr_bounds: lowest and highest learning rate.
        follow_scheduler: whether a torch scheduler's learning rates take the place of the fallback schedule.
    """

    def __init__(self, optimizer: Optimizer, *, lr_bounds: tuple[float, float], follow_scheduler: bool) -> None:
        self.optimizer = optimizer
        self.lr_bounds = lr_bounds
        self.follow_scheduler = follow_scheduler
        self.base_lrs: list[float] = []
        self.base_momenta: list[float] = []  # NaN where a group has none
        self.momenta: list[float] = []  # of each group, as decided
        self._factors: list[float] = []  # on the fallback lr of each group, as decided
        self._lrs: list[Any] = []  # of each group: as it was set last, or as a scheduler that is followed wants it
        self.adopt_groups()

    def adopt_groups(self) -> bool:
        """Take over the groups that are new, and say whether there were any."""
        new = self.optimizer.param_groups[len(self.base_lrs) :]
        for group in new:
            # A torch scheduler that came first may have begun a warm-up at 0.
            self.base_lrs.append(float(group.get("initial_lr", group["lr"])))
            self.base_momenta.append(_momentum_of(group))
        return bool(new)

    @property
    def first_momentum(self) -> float:
        """Base momentum of the first group, 0 if it has none."""
        return 0.0 if math.isnan(self.base_momenta[0]) else self.base_momenta[0]

    @property
    def is_adaptive(self) -> bool:
        """Whether updates are divided by a second moment of the gradients."""
        return "betas" in self.optimizer.param_groups[0] or self._is_one_of(ADAPTIVE)

    @property
    def sums_gradients(self) -> bool:
        """Whether momentum is a sum of gradients, and not their average."""
        return "betas" not in self.optimizer.param_groups[0] and not self._is_one_of(AVERAGING)

    def momentum(self, group: int, moved: float) -> float:
        base = self.base_momenta[group]
        if moved == 0 or math.isnan(base) or base == 0:
            return base
        return control.momentum_of(-math.log10(1 - base) + moved)

    def decide(self, log_factor: float, moved: float) -> None:
        """Work out what holds until the next decision, from the log of the lr factor and the momentum control."""
        self.momenta = [self.momentum(i, moved) for i in range(len(self.base_lrs))]
        self._factors = [math.exp(log_factor) for _ in self.base_lrs]
        if self.sums_gradients:  # the size of an update does not depend on momentum then
            for i, (momentum, base) in enumerate(zip(self.momenta, self.base_momenta, strict=True)):
                self._factors[i] *= (1 - momentum) / (1 - base) if base > 0 else 1

    def lr(self, fallback: float) -> float:
        """Learning rate of the first group, as decided, where its fallback is `fallback`."""
        return float(self._bounded(fallback * self._factors[0]))

    def write(self, schedule: float, *, with_momentum: bool) -> bool:
        """Write what was decided to the groups, where the fallback schedule's factor on the base lr is `schedule`.

        Returns:
            Whether somebody else has changed a learning rate in vain.
        """
        groups = self.optimizer.param_groups
        overridden = not self.follow_scheduler and self._has_changed(schedule)
        if self.follow_scheduler:
            self._lrs = [g["lr"].clone() if isinstance(g["lr"], Tensor) else g["lr"] for g in groups]
        for i, group in enumerate(groups):
            lr = self._lrs[i] if self.follow_scheduler else self.base_lrs[i] * schedule
            _set_lr(group, self._bounded(lr * self._factors[i]))
            if with_momentum and "betas" in group:
                group["betas"] = (self.momenta[i], *group["betas"][1:])
            elif with_momentum and "momentum" in group:
                group["momentum"] = self.momenta[i]
        return overridden

    def after_step(self) -> None:
        """Give a scheduler that is followed its learning rates back: some go on from what they find."""
        if self.follow_scheduler:
            for group, lr in zip(self.optimizer.param_groups, self._lrs, strict=True):
                _set_lr(group, lr)
        self._lrs = [group["lr"] for group in self.optimizer.param_groups]

    def in_use(self) -> tuple[float, float]:
        """Learning rate at the base momentum, and momentum, of the first group as they are."""
        group = self.optimizer.param_groups[0]
        lr, momentum = float(group["lr"]), _momentum_of(group)
        momentum = 0.0 if math.isnan(momentum) else momentum
        return lr * (1 - self.first_momentum) / (1 - momentum) if self.sums_gradients else lr, momentum

    def rescale_buffers(self, old: float, new: float) -> None:
        """Keep the average of the gradients when the momentum control moves from `old` to `new`.

        With b ← βb + g and the update ηb, the average of gradients is m = (1 − β) b. The learning rate carries the
        factor 1 − β, so a change of β leaves m as it is if b is multiplied by (1 − β_old) / (1 − β_new).
        """
        if old == new or not self.sums_gradients:
            return
        for i, group in enumerate(self.optimizer.param_groups):
            if self.base_momenta[i] > 0:
                factor = (1 - self.momentum(i, old)) / (1 - self.momentum(i, new))
                states = (self.optimizer.state[p] for p in group["params"] if p in self.optimizer.state)
                buffers = [s["momentum_buffer"] for s in states if s.get("momentum_buffer") is not None]
                if buffers:
                    torch._foreach_mul_([distributed.local(buffer) for buffer in buffers], factor)

    def buffers(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """Where the optimizer keeps the momentum of each parameter."""
        states = [self.optimizer.state.get(p, {}) for p in parameters]
        found = [next((s[key] for key in BUFFERS if s.get(key) is not None), None) for s in states]
        return [b if b is not None and b.shape == p.shape else None for b, p in zip(found, parameters, strict=True)]

    def state_dict(self) -> dict[str, list[float]]:
        return {"base_lrs": list(self.base_lrs), "base_momenta": list(self.base_momenta)}

    def load_state_dict(self, state_dict: dict[str, list[float]]) -> None:
        self.base_lrs, self.base_momenta = state_dict["base_lrs"], state_dict["base_momenta"]
        self._lrs = []

    def _bounded(self, lr: Any) -> Any:
        low, high = self.lr_bounds
        return lr.clamp(low, high) if isinstance(lr, Tensor) else min(max(lr, low), high)

    def _has_changed(self, schedule: float) -> bool:
        """Whether a learning rate is neither what it was set to, nor what a resumed run finds."""
        for group, ours, base in zip(self.optimizer.param_groups, self._lrs, self.base_lrs, strict=False):
            lr = group["lr"]
            if not isinstance(lr, Tensor) and not any(math.isclose(lr, x) for x in (ours, base, base * schedule)):
                return True
        return False

    def _is_one_of(self, names: set[str]) -> bool:
        return any(kind.__name__ in names for kind in type(self.optimizer).__mro__)


def _momentum_of(group: dict[str, Any]) -> float:
    betas = group.get("betas")
    return float(betas[0] if betas else group.get("momentum", math.nan))


def _set_lr(group: dict[str, Any], lr: Any) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr
