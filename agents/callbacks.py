"""What happens beside the updates of a training: checkpoints, evaluation, the log, the progress bar."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

from rlsched.agents.config import TrainConfig
from rlsched.agents.evaluation import Evaluation, environment_options, evaluate, references, scores
from rlsched.agents.exporting import AVERAGE, DOMAIN, actor_weights, export
from rlsched.agents.tensorboard import (
    ACTIONS,
    OBSERVATIONS,
    ROLLOUT_FAMILY,
    ROLLOUT_OPTIMIZER,
    SPEED,
    TrainingLog,
    means,
)
from rlsched.domain import Domain
from rlsched.envs.scheduling import SchedulingVectorEnv
from rlsched.envs.sharding import ShardedVectorEnv
from rlsched.files import write
from rlsched.policy import SchedulePolicy

HISTOGRAMS = 25  # of each action and observation in a training, at most: the log would be made of them

AnyVectorEnv = SchedulingVectorEnv | ShardedVectorEnv
Listener = Callable[[int, dict[str, float]], object]


class _Callback(BaseCallback):
    """What has nothing to do at each step."""

    model: PPO

    def _on_step(self) -> bool:
        return True


class ClonesCallback(_Callback):
    """Takes off each advantage the mean over its set of clones, which are at the same decision of the same run.

    What is common to them is the luck of the draw. (The critic still learns of whole returns, from which a rollout that
    ends within a run is continued; rewards that were centred would leave it nothing to tell one clone from another.)
    """

    def __init__(self, clones: int) -> None:
        super().__init__()
        self.clones = clones

    def _on_rollout_end(self) -> None:
        if self.clones > 1:
            advantages = self.model.rollout_buffer.advantages  # (n_steps, num_envs)
            sets = advantages.reshape(len(advantages), -1, self.clones)
            sets -= sets.mean(-1, keepdims=True)


class AveragingCallback(_Callback):
    """Keeps the running average of the actor over the updates, which is what is exported.

    Where the step size of PPO leaves an actor that wanders about, its average is better than the last one.
    """

    def __init__(self, half_life: float) -> None:
        super().__init__()
        self.half_life = half_life

    def _on_training_start(self) -> None:
        self.updates = self.model._n_updates

    def _on_rollout_start(self) -> None:
        average, updates = getattr(self.model, AVERAGE, None), self.model._n_updates
        if self.half_life == 0 or (average is not None and updates == self.updates):
            return
        self.updates = updates
        now = actor_weights(self.model)
        weight = 1 - 0.5 ** (1 / self.half_life)
        averaged = {name: old.lerp(now[name], weight) for name, old in (average or now).items()}
        setattr(self.model, AVERAGE, averaged)

    _on_training_end = _on_rollout_start


class CheckpointCallback(_Callback):
    """Saves the model after every update, in one move: a kill leaves the last whole checkpoint."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def _on_rollout_start(self) -> None:
        self.save()

    def _on_training_end(self) -> None:
        self.save()

    def save(self) -> None:
        content = io.BytesIO()
        self.model.save(content)
        write(self.path, content.getvalue())


class EvaluationCallback(_Callback):
    """Plays the same episodes every few updates and logs them beside the base schedule's.

    Args:
        config: of the training.
        make: makes a vector environment of its tasks, from the number of runs and options of `SchedulingVectorEnv`.
        log: where the scores go.
        bar: the progress bar, which says what is being done.
        listener: is told of each evaluation: the timesteps before it, and its `scores`.
    """

    def __init__(
        self,
        config: TrainConfig,
        make: Callable[..., AnyVectorEnv],
        log: TrainingLog,
        bar: Any,
        listener: Listener | None = None,
    ) -> None:
        super().__init__()
        self.config, self.make, self.log, self.bar, self.listener = config, make, log, bar, listener
        self.updates = 0
        self.seconds = 0.0  # that evaluations took
        self.env: AnyVectorEnv | None = None
        self.zero: Evaluation | None = None
        self.tuned: NDArray[np.float64] | None = None  # returns of the base schedule from the best base learning rate
        self.latest: Evaluation | None = None

    def _on_rollout_start(self) -> None:
        if self.updates % self.config.eval_every == 0:
            start = time.perf_counter()
            self.explore()
            self.record()
            self.seconds += time.perf_counter() - start
        self.updates += 1

    def explore(self) -> None:
        """Play the model's policy as it is trained, and find its domain, which must have no say in where that lies."""
        setattr(self.model, DOMAIN, None)
        latest = self.play(export(self.model))
        setattr(self.model, DOMAIN, Domain.of(torch.from_numpy(latest.observations)))

    def play(self, policy: SchedulePolicy) -> Evaluation:
        config = self.config
        self.bar.set_description("evaluating")
        if self.env is None:
            episodes: dict[str, int] = {"episodes": config.eval_episodes, "seed": config.eval_seed}
            self.zero, self.tuned = references(config.base_schedule, self.make, **episodes)
            options = {**environment_options(policy), "trust": config.trust}
            self.env = self.make(config.eval_episodes, **options)
        self.latest = evaluate(policy, seed=config.eval_seed, env=self.env)
        self.bar.set_description("training")
        return self.latest

    def record(self) -> None:
        """Log the latest evaluation, and tell of it."""
        assert self.latest is not None and self.zero is not None and self.tuned is not None
        self.log.evaluation(self.latest, self.zero, self.tuned, self.model.num_timesteps)
        if self.listener is not None:
            self.listener(self.model.num_timesteps, self.scores())

    def close(self) -> None:
        if self.env is not None:
            self.env.close()

    def scores(self) -> dict[str, float]:
        assert self.latest is not None and self.zero is not None and self.tuned is not None
        return scores(self.latest, self.zero, self.tuned)

    def finish(self) -> SchedulePolicy:
        """Evaluate the final policy with its domain, log it, and give it its scores."""
        self.explore()
        policy = export(self.model)
        self.play(policy)
        self.record()
        done = self.model.num_timesteps
        self.logger.dump(done)  # of the last update
        self.log.finish()
        policy.info = {
            "training": {**self.config.hyperparameters(), "timesteps_done": done},
            "evaluation": {name: round(value, 4) for name, value in self.scores().items()},
        }
        return policy


class LogCallback(_Callback):
    """Logs the episodes that are trained on, what was seen and done in them, and the speed of it all.

    It has to come after the evaluation, whose time is not counted.

    Args:
        config: of the training.
        log: where it all goes.
        evaluation: says how long it took.
    """

    def __init__(self, config: TrainConfig, log: TrainingLog, evaluation: EvaluationCallback) -> None:
        super().__init__()
        self.config, self.log, self.evaluation = config, log, evaluation
        self.rollout = config.num_envs * config.n_steps
        updates = math.ceil(config.timesteps / self.rollout)
        self.every = math.ceil(updates / HISTOGRAMS)
        self.started: float | None = None

    def _on_training_start(self) -> None:
        self.log.begin(self.model.num_timesteps)

    def _on_rollout_start(self) -> None:
        self.logger.dump(self.model.num_timesteps)  # of the update that was
        now = time.perf_counter() - self.evaluation.seconds
        if self.started is not None:
            self.log.scalars({SPEED: self.rollout / (now - self.started)}, self.model.num_timesteps)
        self.started = now
        # Of the episodes that have ended since.
        self.returns: list[float] = []
        self.families: list[str] = []
        self.optimizers: list[str] = []

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                self.returns.append(info["episode"]["r"])
                self.families.append(str(info["family"]))
                self.optimizers.append(str(info["optimizer"]))
        return True

    def _on_rollout_end(self) -> None:
        step, returns = self.model.num_timesteps, np.array(self.returns)
        self.log.scalars(means(ROLLOUT_FAMILY, returns, self.families), step)
        self.log.scalars(means(ROLLOUT_OPTIMIZER, returns, self.optimizers), step)
        if step // self.rollout % self.every == 0:
            buffer = self.model.rollout_buffer  # the critic's own columns come after the observations
            actions = buffer.actions.clip(-1, 1)  # (n_steps, num_envs, controls), as the environment took them
            for tags, names, values in (
                (ACTIONS, self.config.controls, actions),
                (OBSERVATIONS, self.config.observations, buffer.observations),
            ):
                self.log.histograms(tags, {name: values[..., i] for i, name in enumerate(names)}, step)


class ProgressCallback(BaseCallback):
    """Moves the progress bar, and shows the returns of training and evaluation beside it."""

    def __init__(self, bar: Any, evaluation: EvaluationCallback) -> None:
        super().__init__()
        self.bar, self.evaluation = bar, evaluation

    def _on_step(self) -> bool:
        self.bar.update(self.training_env.num_envs)
        return True

    def _on_rollout_start(self) -> None:
        finished = [episode["r"] for episode in self.model.ep_info_buffer or ()]
        shown = {"return": f"{np.mean(finished):.2f}"} if finished else {}
        if self.evaluation.latest is not None and self.evaluation.zero is not None:
            shown["evaluated"] = f"{self.evaluation.latest.mean_return:.2f}"
            shown["base schedule"] = f"{self.evaluation.zero.mean_return:.2f}"
        self.bar.set_postfix(shown)
