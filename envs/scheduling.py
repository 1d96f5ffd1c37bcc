"""The Gymnasium environments in which a policy learns to schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from textwrap import indent
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import logger
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.random import Generator, SeedSequence

from rlsched.base_schedule import BaseSchedule, named_base_schedule
from rlsched.control import CONTROL_NAMES, CONTROLS, control_table
from rlsched.envs.arguments import (
    autoreset_mode_of,
    check_begun,
    check_sets,
    checked_actions,
    reset_mask,
    seeds_of,
    some_names,
    warn_of_left_out,
)
from rlsched.envs.groups import REWARDS, Array, Group, Interface
from rlsched.envs.mixtures import mixture
from rlsched.envs.rendering import FPS, NO_MODE, RENDER_MODES, Frame, Renderer
from rlsched.envs.tasks import InnerTask
from rlsched.envs.training import InnerTraining
from rlsched.signals import OBSERVATION_NAMES, OBSERVATIONS, observation_table


class SchedulingVectorEnv(VectorEnv[Array, Array, Array]):
    """N inner training runs, each with a schedule of its own, trained at once.

    ## Observation space
    {observations}

    Validation losses are told as they are measured, in those episodes whose set-up tells them.

    ## Action space
    `Box(-1, 1, ({controls_count},))`. The zero action leaves the schedule on its course: the base schedule.

    {controls}

    ## Rewards
    The drop in the logarithm of the loss over the window. The rewards of an episode sum to log(first loss / last loss);
    the sum never falls below −2, however badly the run went, nor rises above 20, even where the loss underflows. The
    loss is the one that `reward` names: "validation", measured every `validation_interval` windows of the task; "best",
    the lowest of these so far, which is what a user has who keeps the best checkpoint; or "training", the mean of the
    window's mini-batches. Rewards are divided by the task's `reward_scale`.

    ## Starting state
    New weights, data, optimizer, base learning rate and length, drawn from the task's `setup`, and one inner step far
    below the base learning rate, whose measurements are the first observation (see `rlsched.schedule.probe`). Each step
    of the environment is a window of inner training.

    ## Episode end
    1. Termination: the run has had all its inner steps. (Not a truncation: nothing is to be gained after it.)
    2. Termination: the training or validation loss or a weight is not finite. The return is then −2.
    3. Termination: the task's `patience` is at its end: so many validations have brought no new best loss.

    Clones end together: one that is over waits for the others, without a reward. What follows is `autoreset_mode`'s.

    ## Info
    Of each control by its name what it came to, in the terms of torch's optimizer: `lr` at the start of the window,
    `momentum`, `clip` (multiple of the average gradient norm); `train_loss` (mean of the window, without the loss
    scale), `validation_loss` (the last measured), `best_validation_loss` and `best_inner_steps`, where it was measured,
    `since_best` (validations since then), `inner_steps`, `total_steps`, `adaptive`, `diverged` (1 where the episode
    ended in the second way), `return` (of the episode so far, not scaled); `family`, the name of the inner task, as in
    `rlsched.envs.FAMILIES` if it is one of these, else "task" and its number in the mixture, unless it has a name of
    its own; and `optimizer`, as torch.optim calls it: arrays of shape (num_envs,), float32 or objects.

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
        autoreset_mode: what follows the end of an episode, by Gymnasium's names. "SameStep": the observation and the
            infos are already the first of the next episode, and `final_obs` and `final_info` hold the last of the old
            one. "NextStep": the next step begins an episode, whatever its action, and has no reward. "Disabled": the
            run waits for `reset(options={{"reset_mask": mask}})`, which begins the runs of a mask (num_envs,) anew and
            leaves the others as they are; a step before that is refused.
        render_mode: what `render` gives, for each run: the schedule and the loss of the episode so far, as an image
            (480, 640, 3) with "rgb_array", as text with "ansi". Needs matplotlib.
        clones: so many runs in a row are a set, whose episodes are the same in all but the actions: what differs is
            what these made of it, without the luck of the draw. `num_envs` is a multiple of it; it is set i that has
            the task i modulo their number.
        sweep: quantiles, of the range that the base learning rate is drawn from, that the clones of a set have: one for
            each of them. So that one can see which would have been the best.

    `reset(seed=s)` seeds run i with s + i (with clones, set i) and determines everything that follows, whatever
    `num_envs` is; but the masks of dropout, which are drawn for all runs of a task at once, are others where their
    number is another.

    ## Version history
    * v0: the first. It may change until rlsched 1.0, as the changelog says.
    """

    metadata: dict[str, Any] = {
        "render_modes": RENDER_MODES,
        "render_fps": FPS,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

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
        autoreset_mode: str | AutoresetMode = AutoresetMode.SAME_STEP,
        render_mode: str | None = None,
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
        interface = Interface(
            some_names("observations", observations, OBSERVATIONS),
            some_names("controls", controls, CONTROLS),
            named_base_schedule(base_schedule),
        )
        self.single_observation_space = interface.observation_space()
        self.single_action_space = interface.action_space()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._safe_start, self._autoreset = safe_start, autoreset_mode_of(autoreset_mode)
        self.metadata = {
            **self.metadata,
            **interface._asdict(),
            "base_schedule": interface.base_schedule.name,
            "safe_start": safe_start,
            "autoreset_mode": self._autoreset,
        }
        self.render_mode = render_mode
        self._renderer = None if render_mode is None else Renderer(render_mode, num_envs)

        family = mixture(tasks)
        self._groups = []
        members = np.arange(num_envs).reshape(-1, clones)
        warn_of_left_out(family, len(members))
        reach = math.log(trust or math.inf)
        for i, task in enumerate(family[: len(members)]):
            index = members[i :: len(family)].ravel()
            training = InnerTraining(task, len(index), compile=compile, device=device)
            self._groups.append(Group(training, index, clones, sweep, reward, interface, reach))
        self._clones = clones
        self._waiting = np.ones(num_envs, bool)  # for a reset
        self._rngs = [rng for seed in SeedSequence().spawn(len(members)) for rng in _equal_generators(seed, clones)]

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        chosen = reset_mask(options, self.num_envs, self._clones)
        for i, s in enumerate(seeds_of(seed, self.num_envs, self._clones)):
            if s is not None and chosen[i * self._clones]:
                self._rngs[i * self._clones : (i + 1) * self._clones] = _equal_generators(s, self._clones)
        self._begin(chosen)
        self._waiting &= ~chosen
        infos = self._infos()
        if self._renderer is not None:
            self._renderer.record(infos, chosen, chosen)
        return self._gather("observation"), infos

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        actions = checked_actions(actions, self.action_space.shape)
        check_begun("step", self._waiting)
        begun = self._gather("done")  # of a run that ended and does not wait, the next episode begins now
        for group in self._groups:
            if not begun[group.index].all():
                group.step(torch.from_numpy(actions[group.index]))
        self._begin(begun)
        rewards, done = self._gather("reward"), self._gather("done")
        infos = self._infos()
        if self._autoreset is AutoresetMode.DISABLED:
            self._waiting = done.copy()
        if self._autoreset is AutoresetMode.SAME_STEP and done.any():
            final_obs = np.full(self.num_envs, None, dtype=object)
            observations = self._gather("observation")
            for i in np.flatnonzero(done):
                final_obs[i] = observations[i]
            final_info = {**infos, **{f"_{key}": done.copy() for key in infos}}
            begun = done
            self._begin(begun)
            infos = self._infos()
            infos |= {"final_obs": final_obs, "_final_obs": done.copy()}
            infos |= {"final_info": final_info, "_final_info": done.copy()}
        if self._renderer is not None:
            self._renderer.record(infos, begun)
        return self._gather("observation"), rewards, done, np.zeros(self.num_envs, bool), infos

    def render(self) -> tuple[Frame, ...] | None:
        """A frame of each run, see `render_mode`; None, with a warning, without one."""
        if self._renderer is None:
            logger.warn(NO_MODE)
            return None
        check_begun("render", self._renderer.empty)
        return self._renderer.frames()

    def _begin(self, runs: Array) -> None:
        """Start new episodes of the runs of this mask."""
        for group in self._groups:
            slots = np.flatnonzero(runs[group.index]).tolist()
            if slots:
                group.begin(slots, self._rngs, self._safe_start)

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
                infos.setdefault(key, np.empty(self.num_envs, values.dtype))[group.index] = values
        return infos


SchedulingVectorEnv.__doc__ = (SchedulingVectorEnv.__doc__ or "").format(
    observations=indent(observation_table(OBSERVATIONS.values()), "    ").lstrip(),
    controls=indent(control_table(CONTROLS.values()), "    ").lstrip(),
    controls_count=len(CONTROLS),
)


class SchedulingEnv(gymnasium.Env[Array, Array]):
    """One inner training run: a `SchedulingVectorEnv` of one, with its arguments and its documentation.

    Where there are several tasks, each episode draws one of them. It has no `autoreset_mode`.
    """

    metadata: dict[str, Any] = {"render_modes": RENDER_MODES, "render_fps": FPS}

    def __init__(
        self,
        tasks: str | InnerTask | Sequence[InnerTask] = "mlp",
        *,
        render_mode: str | None = None,
        **options: Any,
    ) -> None:
        self._tasks = mixture(tasks)
        self.render_mode = render_mode
        self._options = options
        self._batches: dict[int, SchedulingVectorEnv] = {}  # by the number of the task, as they are met
        self._batch = self._batch_of(0)
        self.observation_space = self._batch.single_observation_space
        self.action_space = self._batch.single_action_space
        self.metadata = {key: value for key, value in self._batch.metadata.items() if key != "autoreset_mode"}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        super().reset(seed=seed)
        self._batch = self._batch_of(int(self.np_random.integers(len(self._tasks))))
        observations, infos = self._batch.reset(seed=int(self.np_random.integers(2**31)) if seed is None else seed)
        return observations[0], _single(infos)

    def _batch_of(self, number: int) -> SchedulingVectorEnv:
        if number not in self._batches:
            self._batches[number] = SchedulingVectorEnv(
                1,
                [self._tasks[number]],
                autoreset_mode=AutoresetMode.DISABLED,
                render_mode=self.render_mode,
                **self._options,
            )
        return self._batches[number]

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        observations, rewards, terminated, truncated, infos = self._batch.step(np.asarray(action)[None])
        return observations[0], float(rewards[0]), bool(terminated[0]), bool(truncated[0]), _single(infos)

    def render(self) -> Frame | None:
        """The episode so far, see `render_mode`; None, with a warning, without one."""
        frames = self._batch.render()
        return None if frames is None else frames[0]


def _equal_generators(seed: int | SeedSequence, number: int) -> list[Generator]:
    """Of clones, which draw the same."""
    return [np.random.default_rng(seed) for _ in range(number)]


def _single(infos: dict[str, Any]) -> dict[str, Any]:
    return {key: values[0] if values.dtype == object else float(values[0]) for key, values in infos.items()}
