"""The hyperparameters of an optimizer's parameter groups: what the user gave, and what a decision makes of it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rlsched import distributed, schedule
from rlsched.control import CONTROLS, LR, base_values, growth
from rlsched.half_precision import LARGEST, has_half_precision
from rlsched.number import Number, clamp, on_host
from rlsched.schedule import ScheduleState
from rlsched.signals import Run
from rlsched.traits import traits_of

SUM = "momentum_buffer"  # where torch's optimizers keep their sum of gradients
BUFFERS = ("exp_avg", SUM)  # where they keep their momentum
DRIVER = "_rlsched_groups"  # attribute of an optimizer: whose hyperparameters its groups hold


class ParameterGroups:
    """The groups of an optimizer under a schedule: under one state, with which each keeps its distance to the first
    one, or each under its own.

    Args:
        optimizer: its present hyperparameters are the base values. If another schedule drives it, that gives it back
            first.
        lr_bounds: lowest and highest learning rate.
        follow_scheduler: whether a torch scheduler's learning rates take the place of the base schedule.
        watches: whether it only looks, at whatever the user does.

    Raises:
        ValueError: a group has no learning rate, or a momentum of 1 or more that it does not only watch.
    """

    def __init__(
        self, optimizer: Optimizer, *, lr_bounds: tuple[float, float], follow_scheduler: bool, watches: bool = False
    ) -> None:
        if not all(LR.name in group for group in optimizer.param_groups):
            raise ValueError(
                f"optimizer: {type(optimizer).__name__} has parameter groups without 'lr', so there is no learning "
                "rate to schedule"
            )
        if DRIVER in vars(optimizer):
            vars(optimizer)[DRIVER].give_back()
        self.optimizer = optimizer
        self.lr_bounds = lr_bounds
        if has_half_precision([p for group in optimizer.param_groups for p in group["params"]]):
            self.lr_bounds = min(lr_bounds[0], LARGEST), min(lr_bounds[1], LARGEST)
        self.follow_scheduler = follow_scheduler
        self.watches = watches
        self.traits = traits_of(optimizer)
        self.bases: list[dict[str, float]] = []  # of each group, by control
        self.decided: list[dict[str, float]] = []  # the same, as decided; of the lr the factor on the base schedule
        self.clip = math.inf  # as decided: what the strictest of the groups has, as one norm is clipped for all
        self.driven: frozenset[str] = frozenset()  # hyperparameters that the schedule sets, and nobody else
        self._lrs: list[Any] = []  # of each group: as it was set last, or as a scheduler that is followed wants it
        self._is_over = False
        self.adopt()

    def adopt(self) -> bool:
        """Take over the groups that are new, and say whether there were any."""
        new = self.optimizer.param_groups[len(self.bases) :]
        bases = [base_values(_without_dimensions(group)) for group in new]
        for i, base in enumerate(bases, len(self.bases)):
            if base["momentum"] >= 1 and not self.watches:
                raise ValueError(
                    f"optimizer: parameter group {i} has a momentum of {base['momentum']:g}; it must be "
                    "below 1 for gradients to have an average"
                )
        self.bases += bases
        return bool(new)

    @property
    def names(self) -> list[str]:
        """Of each group its "name", if all are different; a group without one goes by its number."""
        names = [str(group.get("name", i)) for i, group in enumerate(self.optimizer.param_groups)]
        return names if len(set(names)) == len(names) else [str(i) for i in range(len(names))]

    def decide(self, run: Run, states: Sequence[ScheduleState]) -> None:
        """Work out what holds in the window that begins, under one state or one for each group."""
        factors = [{**base, LR.name: 1.0} for base in self.bases]
        self.decided = [schedule.hyperparameters(run, *each) for each in zip(cycle(states), factors, strict=False)]
        self.clip = min(values["clip"] for values in self.decided)

    def lr(self, i: int, base: float) -> float:
        """Learning rate of group i, as decided, where that of its base schedule is `base`."""
        return float(self._bounded(base * self.decided[i][LR.name]))

    def _bounded(self, lr: Number) -> Number:
        """The learning rate within its bounds; the lowest in place of one that is not finite."""
        low, high = self.lr_bounds
        if isinstance(lr, Tensor):
            return torch.where(lr.isfinite(), lr, low).clamp(low, high)
        return clamp(lr, low, high) if math.isfinite(lr) else low

    def equivalent_lr(self, i: int, state: ScheduleState, decay: float) -> float:
        """Learning rate of group i as it would be at the base momentum.

        Where momentum sums gradients (SGD, RMSprop) and has moved, the learning rate itself makes up for that, to leave
        the size of updates as it is; this one tells how bold the schedule is.
        """
        return self.lr_of_base_schedule(i, decay) * math.exp(schedule.moved(state)[LR.name])

    def lr_of_base_schedule(self, i: int, decay: float) -> float:
        """Learning rate of group i without a policy."""
        return float(self.optimizer.param_groups[i]["lr"]) if self.follow_scheduler else self.bases[i][LR.name] * decay

    def write(self, decay: float, controls: Collection[str], usual_decay: float) -> bool:
        """Write what was decided to the groups: the learning rate, and what else is under `controls`.

        Args:
            decay: the base schedule's factor on the base learning rate.
            controls: names of controls.
            usual_decay: the same of a run of this length without a probe. A scheduler that a framework makes by itself
                may set that.

        Returns:
            Whether somebody else has changed a learning rate in vain.

        Raises:
            RuntimeError: the optimizer was given back.
        """
        if self._is_over:
            raise RuntimeError("this schedule has given its optimizer back, or another one drives it now")
        setattr(self.optimizer, DRIVER, self)
        groups = self.optimizer.param_groups
        overridden = not self.follow_scheduler and self._has_changed(usual_decay)
        if self.follow_scheduler:
            self._lrs = [g["lr"].clone().reshape(()) if isinstance(g["lr"], Tensor) else g["lr"] for g in groups]
        for i, (group, values) in enumerate(zip(groups, self.decided, strict=True)):
            lr = self._lrs[i] if self.follow_scheduler else self.bases[i][LR.name] * decay
            LR.write(group, self._bounded(lr * values[LR.name]))
            for name in controls:
                if name != LR.name:
                    CONTROLS[name].write(group, values[name])
        return overridden

    def after_step(self) -> None:
        """Give a scheduler that is followed its learning rates back: some go on from what they find."""
        groups = self.optimizer.param_groups
        if self.follow_scheduler:
            for group, lr in zip(groups, self._lrs, strict=True):
                LR.write(group, lr)
        self._lrs = [group["lr"] for group in groups]

    def in_use(self, i: int, base_lr: float, written: Collection[str]) -> dict[str, float]:
        """The hyperparameters of group i from a decision on, by control; NaN of what it does not have.

        Args:
            i: the group's number.
            base_lr: learning rate of its base schedule.
            written: controls whose values are set in the groups.
        """
        group, values = self.optimizer.param_groups[i], self.decided[i]
        own = {**base_values(_without_dimensions(group)), LR.name: float(group["lr"])}
        if self.watches:
            return own
        return {**own, **{name: values[name] for name in written}, LR.name: self.lr(i, base_lr), "clip": self.clip}

    def law(self, i: int, momentum: float) -> float:
        """By which a learning rate at this momentum is multiplied, to be that of the same updates at the base one."""
        base, sums = self.bases[i]["momentum"], self.traits.sums_gradients
        is_known = 0 < base < 1 and momentum < 1
        return float(growth(momentum, sums) / growth(base, sums)) if is_known else 1.0

    def states_in_use(self, i: int, state: ScheduleState, decay: float) -> dict[str, float]:
        """The control states that the hyperparameters in use amount to, in group i, beside a schedule."""
        group, base = self.optimizer.param_groups[i], self.bases[i]
        used = base_values(_without_dimensions(group))
        movable = [name for name, control in CONTROLS.items() if control.can_move(base[name])]
        states = {**state.base, **{name: CONTROLS[name].state(base[name], used[name]) for name in movable}}
        lr = float(group["lr"]) * self.law(i, used["momentum"])
        return {**states, LR.name: LR.state(base[LR.name] * decay, lr)}

    def rescale_buffers(self, run: Run, old: Sequence[ScheduleState], new: Sequence[ScheduleState]) -> None:
        """Keep the average of the gradients where momentum moves: buffers hold `growth` times as much."""
        if not self.traits.sums_gradients:
            return
        for group, base, *states in zip(self.optimizer.param_groups, self.bases, cycle(old), cycle(new), strict=False):
            before, after = (state.control["momentum"] for state in states)
            if base["momentum"] > 0 and before != after:
                one, other = (schedule.hyperparameters(run, s, base)["momentum"] for s in states)
                self._scale_buffers(group, growth(other, 1) / growth(one, 1))

    def momentum_buffers(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """Where the optimizer keeps the momentum of each parameter."""
        states: list[Mapping[str, Any]] = [self.optimizer.state.get(p, {}) for p in parameters]
        found = [next((s[key] for key in BUFFERS if s.get(key) is not None), None) for s in states]
        return [b if b is not None and b.shape == p.shape else None for b, p in zip(found, parameters, strict=True)]

    def would_only_create_state(self, grads: Sequence[Tensor]) -> bool:
        """Whether this is the step of torch.distributed.checkpoint that makes an optimizer create its state."""
        if self.optimizer.state:
            return False
        lrs = [group["lr"] for group in self.optimizer.param_groups]
        known = all(not isinstance(lr, Tensor) or on_host(lr) for lr in lrs)
        return known and not any(lrs) and bool(grads) and not any(grad.any() for grad in grads)

    # --- What the user gave -----------------------------------------------------------------------------------------

    def give_back(self) -> None:
        """End the schedule: the groups hold what the user gave again, and momentum buffers what belongs to that."""
        for i, (base, group) in enumerate(zip(self.bases, self.optimizer.param_groups, strict=False)):
            group.update(self._as_given(base, group))
            self._scale_buffers(group, self.growth_of_buffers(i))
        self.let_go()

    def let_go(self) -> None:
        """End the schedule, and leave the groups as they are."""
        self._is_over = True
        vars(self.optimizer).pop(DRIVER, None)

    def given(self, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Groups of the optimizer's state_dict, with what the user gave in place of what was decided."""
        live = self.optimizer.param_groups
        bases = [next((b for b, mine in zip(self.bases, live, strict=False) if mine is each), None) for each in live]
        return [
            dict(group) if base is None else self._as_given(base, group)
            for base, group in zip(bases, groups, strict=True)
        ]

    def growth_of_buffers(self, i: int) -> float:
        """How many times what the momentum buffers of group i hold they would hold at its base momentum."""
        base, now = self.bases[i]["momentum"], self.decided[i]["momentum"]
        driven = "momentum" in self.driven and self.traits.sums_gradients
        return growth(base, 1) / growth(now, 1) if driven and base > 0 else 1.0

    def load(self, bases: list[dict[str, float]]) -> None:
        """Take over the base values of a run that goes on."""
        self.bases, self._lrs = [dict(base) for base in bases], []

    def edited(
        self, bases: Sequence[Mapping[str, float]], groups: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, float]]:
        """Base values of a run, as they are in the groups of a state_dict: somebody may have changed them there.

        Args:
            bases: the values that the run had.
            groups: with what the user gave, as `given` has them.

        Raises:
            ValueError: a value is not what it can be.
        """
        edited = [dict(base) for base in bases]
        for i, (base, group) in enumerate(zip(edited, groups, strict=False)):
            for name in self.driven:
                if math.isnan(base[name]):  # the group has nothing of the kind
                    continue
                control = CONTROLS[name]
                try:
                    there = control.base(_without_dimensions({**group, "initial_lr": group[LR.name]}))
                    valid = control.is_valid(there)
                except (LookupError, TypeError):
                    valid = False
                if not valid:
                    raise ValueError(
                        f"state_dict: {name} of parameter group {i} must be {control.allowed}, got {dict(group)}"
                    )
                if not math.isclose(control.origin(there), control.origin(base[name])):
                    raise ValueError(
                        f"state_dict: {name} of parameter group {i} was changed from {base[name]:g} to {there:g}, "
                        "which is not possible in the midst of a schedule"
                    )
                base[name] = there
        return edited

    def _as_given(self, base: Mapping[str, float], group: Mapping[str, Any]) -> dict[str, Any]:
        given = dict(group)
        for name in self.driven:
            CONTROLS[name].write(given, base[name])
        if LR.name in self.driven and "initial_lr" in given:
            lr = given[LR.name]
            given["initial_lr"] = lr.clone() if isinstance(lr, Tensor) else lr
        return given

    def _scale_buffers(self, group: Mapping[str, Any], factor: float) -> None:
        states = (self.optimizer.state[p] for p in group["params"] if p in self.optimizer.state)
        buffers = [distributed.local(s[SUM]) for s in states if s.get(SUM) is not None]
        if buffers and factor != 1:
            torch._foreach_mul_(buffers, factor)

    def _has_changed(self, decay: float) -> bool:
        """Whether a learning rate is neither what it was set to, nor what a resumed run finds."""
        for group, ours, base in zip(self.optimizer.param_groups, self._lrs, self.bases, strict=False):
            lr = group["lr"]
            known = (ours, base[LR.name], base[LR.name] * decay)
            if not isinstance(lr, Tensor) and lr != ours and not any(math.isclose(lr, x) for x in known):
                return True
        return False


def _without_dimensions(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group in which tensors of one number, which torch takes for hyperparameters, are 0-d."""
    plain = dict(group)
    for name, value in group.items():
        if isinstance(value, Tensor) and value.numel() == 1:
            plain[name] = value.reshape(())
        elif name == "betas" and isinstance(value, Sequence):
            plain[name] = tuple(beta.reshape(()) if isinstance(beta, Tensor) else beta for beta in value)
    return plain
