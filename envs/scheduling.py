"""The Gymnasium environments in which a policy learns to schedule."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import indent
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from rlsched import control, signals
from rlsched.control import CONTROLS
from rlsched.envs.mixtures import mixture
from rlsched.envs.tasks import InnerTask
from rlsched.envs.training import InnerTraining, sum_to_average
from rlsched.signals import OBSERVATIONS
from rlsched.spec import control_table, observation_table

WORST_RISE = 2.0  # e-folds: the most that an episode's return can fall below zero

OBSERVATION_SPACE = Box(
    np.array([o.low for o in OBSERVATIONS], np.float32), np.array([o.high for o in OBSERVATIONS], np.float32)
)
ACTION_SPACE = Box(-1.0, 1.0, (len(CONTROLS),), np.float32)

Array = NDArray[Any]


class SchedulingVectorEnv(VectorEnv[Array, Array, Array]):
    """N inner training runs, each with a schedule of its own, trained at once.

    ## Observation space
    {observations}

    ## Action space
    `Box(-1, 1, ({controls_count},))`. The zero action leaves the schedule on its course.

    {controls}

    ## Reward
    The drop in the logarithm of the validation loss over the window. The rewards of an episode sum to
    log(first loss / last loss); the sum never falls below −2, however badly the run went.

    ## Episode
    Starts with one inner step far below the base learning rate, whose measurements are the first observation (see
    `rlsched.control.safe_start`). Each step of the environment is a window of inner training. The episode ends:
    1. Termination: the run has had all its inner steps. (Not a truncation: nothing is to be gained after it.)
    2. Termination: the training or validation loss or a weight is not finite. The return is then −2.

    ## Info
    `lr`, `momentum` (of torch's optimizer), `clip` (multiple of the average gradient norm), `train_loss` (mean of the
    window, without the loss scale), `validation_loss`, `inner_steps`, `total_steps`, `adaptive`: arrays of shape
    (num_envs,). Where an episode ended, `final_obs` and `final_info` hold its last observation and info, and the
    observation is already the first of the next episode (`AutoresetMode.SAME_STEP`).

    Args:
        num_envs: number of inner training runs.
        tasks: the name of a mixture (see `rlsched.envs.MIXTURES`) or the inner tasks of one; run i has the task
            i modulo their number.
        safe_start: whether the learning rate is checked by a first, small step. Without it, the zero policy
            is the fallback schedule exactly.
        compile: compile the inner steps with `torch.compile`, which needs a C compiler.
        autoreset: whether an ended run is followed by a new episode in the same step. Without it, a run that ended
            means nothing until `reset`.

    `reset(seed=s)` seeds run i with s + i and determines everything that follows, whatever `num_envs` is.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(
        self,
        num_envs: int = 1,
        tasks: str | Sequence[InnerTask] = "mlp",
        *,
        safe_start: bool = True,
        compile: bool = False,
        autoreset: bool = True,
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = OBSERVATION_SPACE, ACTION_SPACE
        self.observation_space = batch_space(OBSERVATION_SPACE, num_envs)
        self.action_space = batch_space(ACTION_SPACE, num_envs)
        self._safe_start, self._autoreset = safe_start, autoreset
        if not autoreset:
            self.metadata = {**self.metadata, "autoreset_mode": AutoresetMode.DISABLED}

        family = mixture(tasks)
        self._groups = [
            _Group(InnerTraining(task, len(range(i, num_envs, len(family))), compile=compile), i, len(family))
            for i, task in enumerate(family[:num_envs])
        ]
        self._rngs: list[Generator] = [np.random.default_rng() for _ in range(num_envs)]

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        for i, s in enumerate(seeds_of(seed, self.num_envs)):
            if s is not None:
                self._rngs[i] = np.random.default_rng(s)
        for group in self._groups:
            group.begin(list(range(group.training.size)), self._rngs, self._safe_start)
        return self._gather("observation"), self._infos()

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        actions = checked_actions(actions, self.num_envs)
        if all(bool(group.done.all()) for group in self._groups):
            raise ResetNeeded("step() was called without a running episode: call reset() first")
        for group in self._groups:
            group.step(torch.from_numpy(actions[group.index]), self._rngs)
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
        result = np.empty((self.num_envs, *parts[0].shape[1:]), dtype=parts[0].numpy().dtype)
        for group, part in zip(self._groups, parts, strict=True):
            result[group.index] = part.numpy()
        return result

    def _infos(self) -> dict[str, Any]:
        infos: dict[str, Any] = {}
        for group in self._groups:
            for key, values in group.info().items():
                infos.setdefault(key, np.empty(self.num_envs, np.float32))[group.index] = values.numpy()
        return infos


SchedulingVectorEnv.__doc__ = (SchedulingVectorEnv.__doc__ or "").format(
    observations=indent(observation_table(OBSERVATIONS), "    ").lstrip(),
    controls=indent(control_table(CONTROLS), "    ").lstrip(),
    controls_count=len(CONTROLS),
)


class SchedulingEnv(gymnasium.Env[Array, Array]):
    """One inner training run: a `SchedulingVectorEnv` of one, with its arguments and its documentation.

    Its network is of the mixture's first task. To meet the others, make several: `gymnasium.make_vec`.
    """

    metadata: dict[str, Any] = {"render_modes": []}

    def __init__(
        self, tasks: str | Sequence[InnerTask] = "mlp", *, safe_start: bool = True, compile: bool = False
    ) -> None:
        self._batch = SchedulingVectorEnv(1, tasks, safe_start=safe_start, compile=compile, autoreset=False)
        self.observation_space, self.action_space = OBSERVATION_SPACE, ACTION_SPACE

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        super().reset(seed=seed)
        observations, infos = self._batch.reset(seed=seed)
        return observations[0], _single(infos)

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        observations, rewards, terminated, truncated, infos = self._batch.step(np.asarray(action)[None])
        return observations[0], float(rewards[0]), bool(terminated[0]), bool(truncated[0]), _single(infos)


class _Group:
    """The runs that share an inner task: environments `first`, `first + stride`, and so on."""

    def __init__(self, training: InnerTraining, first: int, stride: int) -> None:
        self.training = training
        self.index = slice(first, None, stride)
        n = training.size
        self.observation = torch.zeros(n, len(OBSERVATIONS))
        self.reward = torch.zeros(n)
        self.done = torch.ones(n, dtype=torch.bool)
        self.base = control.initial_state(torch.zeros(n))  # control state that means the fallback schedule
        self.state = self.base.clone()
        self.history = signals.start((n,))
        self.first_loss = torch.ones(n)  # validation loss when the episode began
        self.validation_loss = torch.ones(n)
        self.train_loss = torch.ones(n)
        self.drop = torch.zeros(n)  # sum of the episode's rewards
        self.lr_factor = torch.ones(n)  # of the fallback schedule, when the last window began

    def begin(self, slots: list[int], rngs: list[Generator], safe_start: bool) -> None:
        """Start new episodes: draw them, take the first inner step, observe it."""
        training = self.training
        own = rngs[self.index]
        chosen = [own[slot] for slot in slots]
        training.begin(slots, chosen)
        base = control.initial_state(training.settings.momentum[slots])
        self.first_loss[slots] = training.validation_loss(slots)
        moments = training.first_step(slots, chosen, base, control.PROBE if safe_start else 1.0)
        state = base
        if safe_start:
            growth = sum_to_average(training.settings)[slots]
            state = control.safe_start(base, moments.predicted_decrease[:, -1], moments.update_ratio[:, -1], growth)
        run, steps = training.run(slots), training.networks.steps[slots]
        fresh = signals.start((len(slots),))
        observation, history = signals.observe(moments, run, fresh, steps, state)

        self.observation[slots], self.base[slots], self.state[slots] = observation, base, state
        for tensor, value in zip(self.history, history, strict=True):
            tensor[slots] = value
        self.validation_loss[slots] = self.train_loss[slots] = self.first_loss[slots]
        self.drop[slots], self.reward[slots], self.done[slots] = 0.0, 0.0, False
        self.lr_factor[slots] = 1.0

    def step(self, actions: Tensor, rngs: list[Generator]) -> None:
        """One decision and the window of inner training that follows it."""
        training = self.training
        run = training.run(slice(None))
        # A network without momentum has none to control.
        actions[:, control.MOMENTUM] *= training.settings.momentum > 0
        steps = training.networks.steps
        self.lr_factor = control.fallback_schedule(steps, run.total_steps)
        self.state = control.move(self.state, actions, steps / run.total_steps, self.base)
        moments = training.window(rngs[self.index], self.state)
        steps = training.networks.steps
        self.observation, self.history = signals.observe(moments, run, self.history, steps, self.state)
        self.train_loss = moments.loss.mean(-1) / training.settings.loss_scale
        self.validation_loss = training.validation_loss(slice(None))

        finite = self.validation_loss.isfinite() & moments.grad_norm.isfinite().all(-1)
        finite &= training.networks.params.isfinite().all(-1)
        drop = (self.first_loss / self.validation_loss.clamp(min=1e-12)).log().clamp(min=-WORST_RISE)
        drop = torch.where(finite, drop, -WORST_RISE)
        self.reward = drop - self.drop
        self.drop = drop
        self.done = ~finite | (steps >= run.total_steps)

    def info(self) -> dict[str, Tensor]:
        settings = self.training.settings
        lr = settings.lr * self.lr_factor * self.state[:, control.LR].exp()
        momentum = control.momentum_of(self.state[:, control.MOMENTUM])
        return {
            "lr": torch.where(settings.adaptive > 0, lr, lr * (1 - momentum) / (1 - settings.momentum)),
            "momentum": momentum,
            "clip": control.clip_multiple(self.state[:, control.CLIP]),
            "train_loss": self.train_loss,
            "validation_loss": self.validation_loss,
            "inner_steps": self.training.networks.steps,
            "total_steps": settings.total_steps,
            "adaptive": settings.adaptive,
        }


def checked_actions(actions: Array, num_envs: int) -> Array:
    """A copy of the actions as float32.

    Raises:
        ValueError: they have another shape than (num_envs, controls), or are not finite.
    """
    actions, shape = np.array(actions, np.float32), (num_envs, len(CONTROLS))
    if actions.shape != shape:
        raise ValueError(f"actions must have the shape {shape}, got {actions.shape}")
    if not np.isfinite(actions).all():
        raise ValueError(f"actions must be finite, got {actions[~np.isfinite(actions).all(-1)][0]}")
    return actions


def seeds_of(seed: int | Sequence[int | None] | None, num_envs: int) -> list[int | None]:
    """One seed per environment: counted up from an int, or as they are given."""
    if seed is None:
        return [None] * num_envs
    if isinstance(seed, (int, np.integer)):
        return [int(seed) + i for i in range(num_envs)]
    if len(seed) != num_envs:
        raise ValueError(f"seed must be an int or {num_envs} seeds, got {len(seed)}")
    return list(seed)


def _single(infos: dict[str, Any]) -> dict[str, Any]:
    return {key: float(values[0]) for key, values in infos.items()}
