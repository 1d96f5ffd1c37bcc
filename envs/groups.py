"""Inner training runs that share an inner task, and their episodes: the schedule core, driven for N networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.spaces import Box
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from rlsched import schedule
from rlsched.base_schedule import BaseSchedule
from rlsched.control import CONTROLS, LR, base_values
from rlsched.envs.optimizers import OPTIMIZERS
from rlsched.envs.pools import Slots
from rlsched.envs.training import ALL, InnerTraining
from rlsched.moments import Moments
from rlsched.schedule import ScheduleState
from rlsched.signals import OBSERVATIONS
from rlsched.summary import summarise
from rlsched.validation import Validation, unseen, validated

REWARDS = ("validation", "best", "training")  # the losses whose drop can be the reward
# e-folds: an episode's return lies between −WORST_RISE and BEST_FALL. The families of tasks gain up to 17. Beyond 20,
# from 2 to 4·10⁻⁹, a cross-entropy is the rounding of single precision: what counts there is how far it underflows.
WORST_RISE, BEST_FALL = 2.0, 20.0

_OPTIMIZERS = np.array(list(OPTIMIZERS), object)  # their names, by their numbers

Array = NDArray[Any]


class Interface(NamedTuple):
    """What is seen and moved, and what is modulated."""

    observations: tuple[str, ...]
    controls: tuple[str, ...]
    base_schedule: BaseSchedule

    def observation_space(self) -> Box:
        entries = [OBSERVATIONS[name] for name in self.observations]
        return Box(np.array([o.low for o in entries], np.float32), np.array([o.high for o in entries], np.float32))

    def action_space(self) -> Box:
        return Box(-1.0, 1.0, (len(self.controls),), np.float32)


class Group:
    """The runs that share an inner task: the environments of these numbers, in sets of clones."""

    def __init__(
        self,
        training: InnerTraining,
        index: Array,
        clones: int,
        sweep: Sequence[float] | None,
        reward: str,
        interface: Interface,
        reach: float,
    ) -> None:
        self.training = training
        self.index = index
        self._clones, self._sweep = clones, sweep
        self._rewarded = reward
        self._interface = interface
        n, device = training.size, training.device

        def zeros() -> Tensor:
            return torch.zeros(n, device=device)

        self.observation = torch.zeros(n, len(interface.observations), device=device)
        self.reward = zeros()
        self.done = torch.ones(n, dtype=torch.bool, device=device)
        self.over = self.done.clone()  # those that are done, or wait for their clones
        self.finite = self.done.clone()  # whether the losses and weights are
        self._reach = torch.full((n,), reach, device=device)
        self.run = training.run()._replace(reach=self._reach)
        self.base = _base(training)
        self.state = schedule.begin(self.run, self.base, probing=False)
        self.held = schedule.hyperparameters(self.run, self.state, self.base)  # since the last decision
        self.first_loss = zeros()  # of the kind that is rewarded
        self.train_loss = zeros()
        self.validation = unseen(zeros())
        self.windows = zeros()  # done in the episode
        self.drop = zeros()  # the episode's return so far

    def begin(self, slots: list[int], rngs: list[Generator], safe_start: float) -> None:
        """Start new episodes: draw them, take the first inner step, observe it."""
        training, interface = self.training, self._interface
        quantiles = None if self._sweep is None else [self._sweep[slot % self._clones] for slot in slots]
        training.begin(slots, [rngs[self.index[slot]] for slot in slots], quantiles)
        self.run, self.base = training.run()._replace(reach=self._reach), _base(training)
        run, base = training.run(slots)._replace(reach=self._reach[slots]), _base(training, slots)
        state = schedule.begin(run, base, probing=safe_start)
        validation = validated(unseen(0.0 * state.step), training.validation_loss(slots), state.step)
        values = schedule.values(run, state, base, interface.base_schedule, state.step.unsqueeze(0))
        moments = training.first_step(slots, values, state.step)
        state = state._replace(step=state.step + 1)
        train_loss = moments.loss[:, -1] / training.settings.loss_scale[slots]
        seen = self._as_reported(moments, slots)
        if safe_start > 0:
            state = schedule.start(state, schedule.probe(run, state, seen))
        told = self._as_told(validation, slots)
        observation, state = schedule.observe(run, state, summarise(seen), interface.observations, told)
        held = schedule.values(run, state, base, interface.base_schedule, 0 * state.step)

        self.observation[slots] = observation
        self.state, self.held = _with_rows(self.state, slots, state), _with_rows(self.held, slots, held)
        self.train_loss = _with_rows(self.train_loss, slots, train_loss)
        self.validation = _with_rows(self.validation, slots, validation)
        self.first_loss[slots] = train_loss if self._rewarded == "training" else validation.loss
        for counted in (self.windows, self.drop, self.reward):
            counted[slots] = 0.0
        self.done[slots], self.over[slots], self.finite[slots] = False, False, True

    def step(self, actions: Tensor) -> None:
        """One decision and the window of inner training that follows it."""
        training, base, interface = self.training, self.base, self._interface
        if training.task.setup.other_length > 0:
            training.tell_length(self.windows)
            self.run = training.run()._replace(reach=self._reach)
        run = self.run
        moves = zip(interface.controls, actions.to(training.device).unbind(-1), strict=True)
        state = schedule.move(run, self.state, {n: a * CONTROLS[n].can_move(base[n]) for n, a in moves})
        state = schedule.open_window(run, state, run.interval)
        steps = torch.arange(training.task.interval, device=training.device).unsqueeze(-1)
        values = schedule.values(run, state, base, interface.base_schedule, state.step + steps)
        moments = training.window(values, state.step)
        self.held = {**values, LR.name: values[LR.name][0]}
        state = state._replace(step=state.step + training.task.interval)
        self.train_loss = moments.loss.mean(-1) / training.settings.loss_scale
        self.windows += 1
        ended = state.step >= run.total_steps
        self._validate(state.step, ended)
        window, told = summarise(self._as_reported(moments)), self._as_told(self.validation)
        self.observation, self.state = schedule.observe(run, state, window, interface.observations, told)

        finite = self.validation.loss.isfinite() & training.networks.params.abs().amax(-1).isfinite()
        finite &= moments.loss.isfinite().all(-1) & moments.grad_norm.isfinite().all(-1)
        losses = {"validation": self.validation.loss, "best": self.validation.best, "training": self.train_loss}
        drop = (self.first_loss / losses[self._rewarded].clamp(min=0)).log().clamp(-WORST_RISE, BEST_FALL)
        drop = torch.where(finite & drop.isfinite(), drop, -WORST_RISE)
        drop = torch.where(self.over, self.drop, drop)
        self.reward = (drop - self.drop) / training.task.reward_scale
        self.drop = drop
        self.finite &= finite | self.over
        self.over = self.over | ~finite | ended
        if training.task.patience is not None:
            self.over |= self.validation.since_best >= training.task.patience
        self.done = self.over
        if self._clones > 1:
            together = self.over.unflatten(0, (-1, self._clones)).all(1)
            self.done = together.repeat_interleave(self._clones)

    def _validate(self, step: Tensor, ended: Tensor) -> None:
        """Measure the validation loss of the networks whose turn it is, after so many inner steps."""
        training, before = self.training, self.validation
        due = ended | (self.windows % training.task.validation_interval == 0)
        if due.all():
            self.validation = validated(before, training.validation_loss(), step)
        elif due.any():
            slots = due.nonzero()[:, 0].tolist()
            rows = Validation(*(known[slots] for known in before))
            self.validation = _with_rows(before, slots, validated(rows, training.validation_loss(slots), step[slots]))

    def info(self) -> dict[str, Array]:
        """What is told of the runs beside their observations, each (runs,)."""
        told = {
            **{name: self.held[name] for name in CONTROLS},
            "train_loss": self.train_loss,
            "validation_loss": self.validation.loss,
            "best_validation_loss": self.validation.best,
            "best_inner_steps": self.validation.best_step,
            "since_best": self.validation.since_best,
            "inner_steps": self.state.step,
            "total_steps": self.run.total_steps,
            "adaptive": self.run.adaptive,
            "diverged": ~self.finite,
            "return": self.drop,
        }
        infos: dict[str, Array] = {key: values.cpu().numpy().astype(np.float32) for key, values in told.items()}
        infos["family"] = np.full(len(self.index), self.training.task.name, object)
        infos["optimizer"] = _OPTIMIZERS[self.training.settings.optimizer.cpu().numpy()]
        return infos

    def _as_reported(self, moments: Moments, slots: Slots = ALL) -> Moments:
        """What the policy gets to see, where it is not told the loss."""
        told = self.training.settings.loss_reported[slots].unsqueeze(-1) > 0
        return moments._replace(loss=torch.where(told, moments.loss, torch.nan))

    def _as_told(self, validation: Validation, slots: Slots = ALL) -> Validation:
        """What the policy gets to see of the validation losses: with the factor on the loss, or nothing."""
        settings = self.training.settings
        told, scale = settings.validation_reported[slots] > 0, settings.loss_scale[slots]
        scaled = validation._replace(loss=scale * validation.loss, best=scale * validation.best)
        return Validation(*(torch.where(told, known, torch.nan) for known in scaled))


def _base(training: InnerTraining, slots: Slots = ALL) -> dict[str, Any]:
    """The hyperparameters that the episodes in `slots` have without a policy, those of no control included."""
    group = training.group(slots)
    return {**group, **base_values(group)}


def _with_rows(value: Any, slots: list[int], rows: Any) -> Any:
    """A tensor, or a dictionary or named tuple of them, with other rows at `slots`; what was there stays as it is."""
    if isinstance(value, ScheduleState | Validation):
        return type(value)(*(_with_rows(v, slots, r) for v, r in zip(value, rows, strict=True)))
    if isinstance(value, dict):
        return {name: _with_rows(v, slots, rows[name]) for name, v in value.items()}
    if value is None:
        return None
    value = value.clone()
    value[slots] = rows
    return value
