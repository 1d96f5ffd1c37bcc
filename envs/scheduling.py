"""The Gymnasium environments in which a policy learns to schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from textwrap import indent
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.random import Generator, SeedSequence
from numpy.typing import NDArray
from torch import Tensor

from rlsched import schedule
from rlsched.base_schedule import BaseSchedule, named_base_schedule
from rlsched.control import CONTROL_NAMES, CONTROLS, LR, base_values, control_table
from rlsched.envs.mixtures import mixture
from rlsched.envs.pools import Slots
from rlsched.envs.tasks import InnerTask
from rlsched.envs.training import ALL, InnerTraining
from rlsched.moments import Moments
from rlsched.policy import checked_names
from rlsched.schedule import ScheduleState
from rlsched.signals import OBSERVATION_NAMES, OBSERVATIONS, observation_table
from rlsched.summary import summarise
from rlsched.validation import Validation, unseen, validated

REWARDS = ("validation", "best", "training")
# e-folds: an episode's return lies between −WORST_RISE and BEST_FALL. The families of tasks gain up to 17. Beyond 20,
# from 2 to 4·10⁻⁹, a cross-entropy is the rounding of single precision: what counts there is how far it underflows.
WORST_RISE, BEST_FALL = 2.0, 20.0

Array = NDArray[Any]


class SchedulingVectorEnv(VectorEnv[Array, Array, Array]):
    """N inner training runs, each with a schedule of its own, trained at once.

    ## Observation space
    {observations}

    Validation losses are told as they are measured, in those episodes whose set-up tells them.

    ## Action space
    `Box(-1, 1, ({controls_count},))`. The zero action leaves the schedule on its course: the base schedule.

    {controls}

    ## Reward
    The drop in the logarithm of the loss over the window. The rewards of an episode sum to log(first loss / last loss);
    the sum never falls below −2, however badly the run went, nor rises above 20, even where the loss underflows. The
    loss is the one that `reward` names: "validation", measured every `validation_interval` windows of the task; "best",
    the lowest of these so far, which is what a user has who keeps the best checkpoint; or "training", the mean of the
    window's mini-batches. Rewards are divided by the task's `reward_scale`.

    ## Episode
    Starts with one inner step far below the base learning rate, whose measurements are the first observation (see
    `rlsched.schedule.probe`). Each step of the environment is a window of inner training. The episode ends:
    1. Termination: the run has had all its inner steps. (Not a truncation: nothing is to be gained after it.)
    2. Termination: the training or validation loss or a weight is not finite. The return is then −2.
    3. Termination: the task's `patience` is at its end: so many validations have brought no new best loss.
    Clones end together: one that is over waits for the others, without a reward.

    ## Info
    Of each control by its name what it came to, in the terms of torch's optimizer: `lr` at the start of the window,
    `momentum`, `clip` (multiple of the average gradient norm); `train_loss` (mean of the window, without the loss
    scale), `validation_loss` (the last measured), `best_validation_loss` and `best_inner_steps`, where it was measured,
    `since_best` (validations since then), `inner_steps`, `total_steps`, `adaptive`, `diverged` (1 where the episode
    ended in the second way), `return` (of the episode so far, not scaled): arrays of shape (num_envs,). Where an
    episode ended, `final_obs` and `final_info` hold its last observation and info, and the observation is already the
    first of the next episode (`AutoresetMode.SAME_STEP`).

    Args:
        num_envs: number of inner training runs.
        tasks: the inner tasks; or a mixture of them, by its name in `rlsched.envs.MIXTURES`, or by the module and name
            of one's own, "module:NAME". Run i has the task i modulo their number.
        reward: "validation", "best" or "training", see above.
        observations: names of what is observed, of `rlsched.signals.OBSERVATIONS`, in that order; by default all.
        controls: names of what an action moves, of `rlsched.control.CONTROLS`, in that order; by default all. The
            others stand still.
        base_schedule: what the policy modulates, a name in `rlsched.base_schedule.BASE_SCHEDULES`.
        safe_start: the part of what a first, small step shows to be safe that the learning rate starts at, if not below
            it. Without one, with 0 or False, the zero action gives the base schedule exactly.
        trust: an action moves the learning rate at most by this factor from that of the base schedule, either way; as
            far as the control reaches by default.
        compile: compile the inner steps with `torch.compile`, which needs a C compiler.
        device: where the networks are trained; what comes and goes are NumPy arrays all the same.
        autoreset: whether an ended run is followed by a new episode in the same step. Without it, a run that ended
            means nothing until `reset`.
        clones: so many runs in a row are a set, whose episodes are the same in all but the actions: what differs is
            what these made of it, without the luck of the draw. `num_envs` is a multiple of it; it is set i that has
            the task i modulo their number.
        sweep: quantiles, of the range that the base learning rate is drawn from, that the clones of a set have: one for
            each of them. So that one can see which would have been the best.

    `reset(seed=s)` seeds run i with s + i (with clones, set i) and determines everything that follows, whatever
    `num_envs` is; but the masks of dropout, which are drawn for all runs of a task at once, are others where their
    number is another.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(
        self,
        num_envs: int = 1,
        tasks: str | InnerTask | Sequence[InnerTask] = "mlp",
        *,
        reward: str = "validation",
        observations: Sequence[str] = OBSERVATION_NAMES,
        controls: Sequence[str] = CONTROL_NAMES,
        base_schedule: str | BaseSchedule = "linear",
        safe_start: float = 1.0,
        trust: float | None = None,
        compile: bool = False,
        device: str | torch.device = "cpu",
        autoreset: bool = True,
        clones: int = 1,
        sweep: Sequence[float] | None = None,
    ) -> None:
        check_sets(num_envs, clones)
        if not 0 <= safe_start <= 1:
            raise ValueError(f"safe_start must be between 0 and 1, got {safe_start!r}")
        if sweep is not None and (len(sweep) != clones or not all(0 <= quantile <= 1 for quantile in sweep)):
            raise ValueError(f"sweep must hold {clones} quantiles in [0, 1], one for each clone, got {sweep!r}")
        if reward not in REWARDS:
            raise ValueError(f"reward must be one of {REWARDS}, got {reward!r}")
        if trust is not None and not trust > 1:
            raise ValueError(f"trust must be a number above 1, or None, got {trust!r}")
        self.num_envs = num_envs
        interface = _Interface(
            some_names("observations", observations, OBSERVATIONS),
            some_names("controls", controls, CONTROLS),
            named_base_schedule(base_schedule),
        )
        self.single_observation_space = interface.observation_space()
        self.single_action_space = interface.action_space()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._safe_start, self._autoreset = safe_start, autoreset
        self.metadata = {**self.metadata, **interface._asdict(), "base_schedule": interface.base_schedule.name}
        if not autoreset:
            self.metadata["autoreset_mode"] = AutoresetMode.DISABLED

        family = mixture(tasks)
        self._groups = []
        members = np.arange(num_envs).reshape(-1, clones)
        reach = math.log(trust or math.inf)
        for i, task in enumerate(family[: len(members)]):
            index = members[i :: len(family)].ravel()
            training = InnerTraining(task, len(index), compile=compile, device=device)
            self._groups.append(_Group(training, index, clones, sweep, reward, interface, reach))
        self._clones = clones
        self._rngs = [rng for seed in SeedSequence().spawn(len(members)) for rng in _equal_generators(seed, clones)]

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        for i, s in enumerate(seeds_of(seed, self.num_envs, self._clones)):
            if s is not None:
                self._rngs[i * self._clones : (i + 1) * self._clones] = _equal_generators(s, self._clones)
        for group in self._groups:
            group.begin(list(range(group.training.size)), self._rngs, self._safe_start)
        return self._gather("observation"), self._infos()

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        actions = checked_actions(actions, self.action_space.shape)
        if all(bool(group.done.all()) for group in self._groups):
            raise ResetNeeded("step() was called without a running episode: call reset() first")
        for group in self._groups:
            group.step(torch.from_numpy(actions[group.index]))
        rewards, done = self._gather("reward"), self._gather("done")
        infos = self._infos()
        if self._autoreset and done.any():
            final_obs = np.full(self.num_envs, None, dtype=object)
            observations = self._gather("observation")
            for i in np.flatnonzero(done):
                final_obs[i] = observations[i]
            final_info = {**infos, **{f"_{key}": done.copy() for key in infos}}
            for group in self._groups:
                ended = np.flatnonzero(done[group.index]).tolist()
                if ended:
                    group.begin(ended, self._rngs, self._safe_start)
            infos = self._infos()
            infos |= {"final_obs": final_obs, "_final_obs": done.copy()}
            infos |= {"final_info": final_info, "_final_info": done.copy()}
        return self._gather("observation"), rewards, done, np.zeros(self.num_envs, bool), infos

    def _gather(self, what: str) -> Array:
        """One of the groups' tensors, in the order of the environments."""
        parts = [getattr(group, what) for group in self._groups]
        result = np.empty((self.num_envs, *parts[0].shape[1:]), dtype=parts[0].cpu().numpy().dtype)
        for group, part in zip(self._groups, parts, strict=True):
            result[group.index] = part.cpu().numpy()
        return result

    def _infos(self) -> dict[str, Any]:
        infos: dict[str, Any] = {}
        for group in self._groups:
            for key, values in group.info().items():
                infos.setdefault(key, np.empty(self.num_envs, np.float32))[group.index] = values.cpu().numpy()
        return infos


SchedulingVectorEnv.__doc__ = (SchedulingVectorEnv.__doc__ or "").format(
    observations=indent(observation_table(OBSERVATIONS.values()), "    ").lstrip(),
    controls=indent(control_table(CONTROLS.values()), "    ").lstrip(),
    controls_count=len(CONTROLS),
)


class SchedulingEnv(gymnasium.Env[Array, Array]):
    """One inner training run: a `SchedulingVectorEnv` of one, with its arguments and its documentation.

    Where there are several tasks, each episode draws one of them.
    """

    metadata: dict[str, Any] = {"render_modes": []}

    def __init__(self, tasks: str | InnerTask | Sequence[InnerTask] = "mlp", **options: Any) -> None:
        self._tasks, self._options = mixture(tasks), options
        self._batches: dict[int, SchedulingVectorEnv] = {}  # by the number of the task, as they are met
        self._batch = self._batch_of(0)
        self.observation_space = self._batch.single_observation_space
        self.action_space = self._batch.single_action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        super().reset(seed=seed)
        self._batch = self._batch_of(int(self.np_random.integers(len(self._tasks))))
        observations, infos = self._batch.reset(seed=int(self.np_random.integers(2**31)) if seed is None else seed)
        return observations[0], _single(infos)

    def _batch_of(self, number: int) -> SchedulingVectorEnv:
        if number not in self._batches:
            self._batches[number] = SchedulingVectorEnv(1, [self._tasks[number]], **self._options, autoreset=False)
        return self._batches[number]

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        observations, rewards, terminated, truncated, infos = self._batch.step(np.asarray(action)[None])
        return observations[0], float(rewards[0]), bool(terminated[0]), bool(truncated[0]), _single(infos)


class _Interface(NamedTuple):
    """What is seen and moved, and what is modulated."""

    observations: tuple[str, ...]
    controls: tuple[str, ...]
    base_schedule: BaseSchedule

    def observation_space(self) -> Box:
        entries = [OBSERVATIONS[name] for name in self.observations]
        return Box(np.array([o.low for o in entries], np.float32), np.array([o.high for o in entries], np.float32))

    def action_space(self) -> Box:
        return Box(-1.0, 1.0, (len(self.controls),), np.float32)


class _Group:
    """The runs that share an inner task: the environments of these numbers, in sets of clones."""

    def __init__(
        self,
        training: InnerTraining,
        index: Array,
        clones: int,
        sweep: Sequence[float] | None,
        reward: str,
        interface: _Interface,
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

    def info(self) -> dict[str, Tensor]:
        return {
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


def some_names(argument: str, names: Sequence[str], known: Mapping[str, Any]) -> tuple[str, ...]:
    """The names as a tuple.

    Raises:
        ValueError: as `rlsched.policy.checked_names` does, or because there are none: nothing is learned from that.
    """
    if not names:
        raise ValueError(f"{argument} must be at least one of {tuple(known)}, got {names!r}")
    return checked_names(argument, names, known)


def checked_actions(actions: Array, shape: tuple[int, ...] | None) -> Array:
    """A copy of the actions as float32.

    Raises:
        ValueError: they have another shape than `shape`, (num_envs, controls), or are not finite.
    """
    actions = np.array(actions, np.float32)
    if actions.shape != shape:
        raise ValueError(f"actions must have the shape {shape}, got {actions.shape}")
    if not np.isfinite(actions).all():
        raise ValueError(f"actions must be finite, got {actions[~np.isfinite(actions).all(-1)][0]}")
    return actions


def check_sets(num_envs: int, clones: int) -> None:
    """
    Raises:
        ValueError: so many environments are no sets of so many clones.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, got {num_envs}")
    if clones < 1 or num_envs % clones:
        raise ValueError(f"clones must be at least 1 and divide num_envs ({num_envs}), got {clones}")


def seeds_of(seed: int | Sequence[int | None] | None, num_envs: int, clones: int = 1) -> list[int | None]:
    """One seed per set of clones: counted up from an int, or those of the first clones where each has one.

    Raises:
        ValueError: one is negative, or they are not as many as the environments.
    """
    sets = num_envs // clones
    if seed is None:
        return [None] * sets
    if isinstance(seed, (int, np.integer)):
        seed = [int(seed) + i for i in range(sets)]
    elif len(seed) != num_envs:
        raise ValueError(f"seed must be an int or {num_envs} seeds, got {len(seed)}")
    else:
        seed = seed[::clones]
    negative = [s for s in seed if s is not None and s < 0]
    if negative:
        raise ValueError(f"seed must be non-negative, got {negative[0]}")
    return list(seed)


def _equal_generators(seed: int | SeedSequence, number: int) -> list[Generator]:
    """Of clones, which draw the same."""
    return [np.random.default_rng(seed) for _ in range(number)]


def _single(infos: dict[str, Any]) -> dict[str, Any]:
    return {key: float(values[0]) for key, values in infos.items()}
