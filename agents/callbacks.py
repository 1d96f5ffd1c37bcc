"""What happens beside the updates of a training: checkpoints, evaluation, the log, the progress bar."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import trim_mean
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Figure, HParam

from rlsched.agents.config import TrainConfig
from rlsched.agents.evaluation import Evaluation, environment_options, evaluate, tuned
from rlsched.agents.export import AVERAGE, DOMAIN, actor_weights, export
from rlsched.agents.figures import episode_paths
from rlsched.domain import Domain
from rlsched.envs.mixtures import mixture, names
from rlsched.envs.scheduling import SchedulingVectorEnv
from rlsched.envs.sharding import ShardedVectorEnv
from rlsched.files import write
from rlsched.policy import SchedulePolicy

AnyVectorEnv = SchedulingVectorEnv | ShardedVectorEnv


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
        bar: the progress bar, which says what is being done.
    """

    def __init__(self, config: TrainConfig, make: Callable[..., AnyVectorEnv], bar: Any) -> None:
        super().__init__()
        self.config, self.make, self.bar = config, make, bar
        self.updates = 0
        self.env: AnyVectorEnv | None = None
        self.zero: Evaluation | None = None
        self.tuned: NDArray[np.float64] | None = None  # returns of the base schedule from the best base learning rate
        self.latest: Evaluation | None = None

    def _on_rollout_start(self) -> None:
        if self.updates % self.config.eval_every == 0:
            self.explore()
            self.record()
            self.logger.dump(self.model.num_timesteps)
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
            zero = SchedulePolicy.zero(config.base_schedule)
            episodes: dict[str, int] = {"episodes": config.eval_episodes, "seed": config.eval_seed}
            with closing(self.make(config.eval_episodes, **environment_options(zero))) as env:
                self.zero = evaluate(zero, seed=config.eval_seed, env=env)
            self.tuned = tuned(zero, self.make, **episodes)
            options = {**environment_options(policy), "trust": config.trust}
            self.env = self.make(config.eval_episodes, **options)
        self.latest = evaluate(policy, seed=config.eval_seed, env=self.env)
        self.bar.set_description("training")
        return self.latest

    def record(self) -> None:
        """Log the latest evaluation."""
        assert self.latest is not None and self.zero is not None
        for name, value in self.scores().items():
            self.logger.record(f"eval/{name}", value)
        for name, regret in self.regrets().items():
            self.logger.record(f"regret/{name}", regret)
        self.logger.record(
            "eval/episodes", Figure(episode_paths(self.latest, self.zero), close=True), exclude=("stdout", "log")
        )

    def close(self) -> None:
        if self.env is not None:
            self.env.close()

    def scores(self) -> dict[str, float]:
        assert self.latest is not None and self.zero is not None and self.tuned is not None
        return {
            "return": self.latest.mean_return,
            "return_of_zero_policy": self.zero.mean_return,
            "gain": float((self.latest.returns - self.zero.returns).mean()),
            "median_gain": float(np.median(self.latest.returns - self.zero.returns)),
            "share_better": float((self.latest.returns > self.zero.returns).mean()),
            "diverged": float(self.latest.diverged.mean()),
            "regret": float(trim_mean(self.tuned - self.latest.returns, 0.25)),
        }

    def regrets(self) -> dict[str, float]:
        """By family: the mean return that is missing to the base schedule from the best of several learning rates."""
        assert self.latest is not None and self.tuned is not None
        regrets, families = self.tuned - self.latest.returns, mixture(self.config.tasks)
        played = names(families)[: len(regrets)]
        return {name: float(regrets[i :: len(families)].mean()) for i, name in enumerate(played)}

    def finish(self) -> SchedulePolicy:
        """Evaluate the final policy with its domain, log it with the hyperparameters, and give it its scores."""
        self.explore()
        policy = export(self.model)
        self.play(policy)
        self.record()
        scores = {name: round(value, 4) for name, value in self.scores().items()}
        hyperparameters = self.config.hyperparameters()
        flat = {key: str(v) if isinstance(v, list) else v for key, v in hyperparameters.items()}
        self.logger.record(
            "hparams", HParam(flat, {f"eval/{name}": value for name, value in scores.items()}), exclude=("stdout",)
        )
        done = self.model.num_timesteps
        self.logger.dump(done)
        policy.info = {"training": {**hyperparameters, "timesteps_done": done}, "evaluation": scores}
        return policy


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
