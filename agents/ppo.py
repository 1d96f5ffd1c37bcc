"""Training: PPO from Stable-Baselines3 on the scheduling environment, checkpointed, evaluated and logged."""

from __future__ import annotations

import io
import json
import math
import sys
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import trim_mean
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Figure, HParam, Logger, TensorBoardOutputFormat
from tqdm import tqdm

from rlsched.actors import ACTORS
from rlsched.agents.config import TrainConfig
from rlsched.agents.critic import Privileged, PrivilegedCriticPolicy
from rlsched.agents.evaluation import Evaluation, environment_options, evaluate, tuned
from rlsched.agents.exporting import (
    AVERAGE,
    CHECKPOINT,
    DOMAIN,
    INTERFACE,
    actor_weights,
    export,
    interface_of,
    learner,
)
from rlsched.agents.figures import episode_paths
from rlsched.agents.vec_env import VectorEnvAdapter
from rlsched.domain import Domain
from rlsched.envs.arguments import warn_of_left_out
from rlsched.envs.mixtures import mixture, names
from rlsched.envs.scheduling import SchedulingVectorEnv
from rlsched.envs.sharding import ShardedVectorEnv, check_main_guard
from rlsched.files import locked, write
from rlsched.policy import SchedulePolicy

CONFIG, POLICY = "config.json", "policy.safetensors"
LAYOUT = {
    "training": {
        "return": ["Multiline", ["eval/return", "eval/return_of_zero_policy", "rollout/ep_rew_mean"]],
        "gain over the base schedule": ["Multiline", ["eval/gain", "eval/median_gain"]],
    }
}


def train(config: TrainConfig | None = None) -> SchedulePolicy:
    """Train a scheduling policy, or go on where an interrupted training in `config.run_dir` stopped.

    The folder gets `config.json`, `checkpoint.zip` (after every update; a Stable-Baselines3 model), TensorBoard event
    files, and at the end `policy.safetensors`; each is whole whenever the training is killed. It is this training's
    alone as long as that goes on, and nothing is written to it before all that can be checked has been. A finished run
    is loaded, and nothing is trained, unless `config.timesteps` is now more than it had: then it is trained further.

    Raises:
        ValueError: `run_dir` holds a run with other hyperparameters, or a file that cannot be read; the tasks cannot
            be trained on.
        OSError: `run_dir` is in use by another process, or cannot be written to; a worker process died.
        RuntimeError: this is the script that the worker processes import, and nothing keeps them from training.
    """
    config = config or TrainConfig()
    if config.processes > 1:
        check_main_guard()
    run_dir = Path(config.run_dir)
    _check_hyperparameters(run_dir, config)
    policy = _finished(run_dir, config)
    if policy is not None:
        return policy
    for i, task in enumerate(mixture(config.tasks)):
        task.check(f"{config.tasks}[{i}]")

    with ExitStack() as stack:
        stack.enter_context(locked(run_dir))
        _check_hyperparameters(run_dir, config)  # which another process may have written by now
        seen = {name: getattr(config, name) for name in ("observations", "controls", "base_schedule", "safe_start")}
        options = {"reward": config.reward, "trust": config.trust, "compile": config.compile, **seen}
        tasks = mixture(config.tasks)
        warn_of_left_out(tasks, config.num_envs // config.clones)
        privileged = Privileged(config.num_envs, config.clones, len(tasks)) if config.privileged_critic else None
        env = VectorEnvAdapter(_vector_env(config, config.num_envs, clones=config.clones, **options), privileged)
        stack.callback(env.close)
        checkpoint = run_dir / CHECKPOINT
        model = _resume(checkpoint, env, config) if checkpoint.exists() else _new_model(env, config)
        write(run_dir / CONFIG, f"{json.dumps(config.hyperparameters(), indent=2)}\n".encode())
        model.set_logger(_tensorboard(run_dir))
        stack.callback(model.logger.close)
        bar = stack.enter_context(_progress_bar(config, model.num_timesteps))
        evaluation = _EvaluationCallback(config, bar)
        stack.callback(evaluation.close)
        checkpoints = _CheckpointCallback(checkpoint)
        callbacks: list[BaseCallback] = [
            _ClonesCallback(config.clones),
            _AveragingCallback(config.averaging),
            checkpoints,
            evaluation,
            _ProgressCallback(bar, evaluation),
        ]
        remaining = max(0, config.timesteps - model.num_timesteps)
        model.learn(remaining, callback=callbacks, reset_num_timesteps=False, log_interval=1)
        policy = evaluation.finish()
        checkpoints.save()  # with the domain of the policy
        policy.save(run_dir / POLICY)
    return policy


def _check_hyperparameters(run_dir: Path, config: TrainConfig) -> None:
    """A run that is there differs at most in having fewer timesteps; one that never began binds nobody."""
    path = run_dir / CONFIG
    if not path.exists() or not any((run_dir / name).exists() for name in (CHECKPOINT, POLICY)):
        return
    try:
        there = json.loads(path.read_bytes())
        if not isinstance(there, dict) or not isinstance(there.get("timesteps"), int):
            raise ValueError("it holds no hyperparameters")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"run_dir: {path} cannot be read: {error}. Delete it to go on with its checkpoint as you say now, "
            "or choose another run_dir"
        ) from error
    hyperparameters = config.hyperparameters()
    if there["timesteps"] < config.timesteps:
        there["timesteps"] = config.timesteps
    differing = [
        f"{key} (there {there.get(key)!r}, now {hyperparameters.get(key)!r})"
        for key in sorted(there.keys() | hyperparameters.keys())
        if there.get(key) != hyperparameters.get(key)
    ]
    if differing:
        raise ValueError(
            f"run_dir: {str(run_dir)!r} holds a run with other hyperparameters: {', '.join(differing)}. "
            "Choose another run_dir, or delete that one"
        )


def _finished(run_dir: Path, config: TrainConfig) -> SchedulePolicy | None:
    """The policy of a training that has had as many timesteps."""
    if not (run_dir / POLICY).exists():
        return None
    policy = SchedulePolicy.load(run_dir / POLICY)
    training = policy.info.get("training")
    done = training.get("timesteps_done") if isinstance(training, dict) else None
    is_evaluated = isinstance(policy.info.get("evaluation"), dict)  # an export of a checkpoint is not
    return policy if is_evaluated and isinstance(done, int) and done >= config.timesteps else None


def _vector_env(config: TrainConfig, num_envs: int, **options: Any) -> SchedulingVectorEnv | ShardedVectorEnv:
    options["device"] = config.device
    sets = num_envs // options.get("clones", 1)
    tasks = mixture(config.tasks)[:sets]
    if config.processes == 1:
        return SchedulingVectorEnv(num_envs, tasks, **options)
    return ShardedVectorEnv(num_envs, tasks, processes=min(config.processes, sets), **options)


def _new_model(env: VectorEnvAdapter, config: TrainConfig) -> PPO:
    kind = ACTORS[config.actor]
    policy_options = {**kind.policy_options(config.hidden, config.activation), "log_std_init": config.log_std_init}
    if config.privileged_critic:
        policy_options["seen"] = len(config.observations)
    model = learner(config.actor)(
        PrivilegedCriticPolicy if config.privileged_critic else kind.policy,
        env,
        learning_rate=_learning_rate(config),
        n_steps=config.n_steps,
        batch_size=config.batch_size,
        n_epochs=config.n_epochs,
        gamma=1.0,  # the return is then the final loss, not a sum biased towards early drops
        gae_lambda=config.gae_lambda,
        ent_coef=0.0,
        target_kl=config.target_kl,
        policy_kwargs=policy_options,
        seed=config.seed,
        device="cpu",
    )
    setattr(model, INTERFACE, interface_of(config))
    return model


def _resume(checkpoint: Path, env: VectorEnvAdapter, config: TrainConfig) -> PPO:
    try:
        options: dict[str, Any] = {"device": "cpu", "custom_objects": {"learning_rate": _learning_rate(config)}}
        model = learner(config.actor).load(checkpoint, env=env, **options)
    except Exception as error:  # a damaged pickle raises whatever it likes
        raise ValueError(f"run_dir: {checkpoint} cannot be read: {error}. Delete it to start over") from error
    # New episodes, not those that the interrupted run began with.
    seed = config.seed + model.num_timesteps
    torch.manual_seed(seed)
    env.seed(seed)
    return model


def _learning_rate(config: TrainConfig) -> Any:
    start, end = config.learning_rate, config.final_learning_rate
    return lambda remaining: end + (start - end) * remaining


def _tensorboard(run_dir: Path) -> Logger:
    """A logger to event files in `run_dir`, with the policy and the base schedule in one chart (Custom Scalars)."""
    output = TensorBoardOutputFormat(str(run_dir))
    output.writer.add_custom_scalars(LAYOUT)
    return Logger(str(run_dir), [output])


def _progress_bar(config: TrainConfig, done: int) -> Any:
    rollout = config.num_envs * config.n_steps
    return tqdm(
        total=rollout * math.ceil(config.timesteps / rollout),
        initial=done,
        unit=" timesteps",
        unit_scale=True,
        desc="training",
        file=sys.stderr,
        mininterval=1.0,
    )


class _Callback(BaseCallback):
    """What has nothing to do at each step."""

    model: PPO

    def _on_step(self) -> bool:
        return True


class _ClonesCallback(_Callback):
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


class _AveragingCallback(_Callback):
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


class _CheckpointCallback(_Callback):
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


class _EvaluationCallback(_Callback):
    """Plays the same episodes every few updates and logs them beside the base schedule's."""

    def __init__(self, config: TrainConfig, bar: Any) -> None:
        super().__init__()
        self.config, self.bar = config, bar
        self.updates = 0
        self.env: SchedulingVectorEnv | ShardedVectorEnv | None = None
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
            with closing(_vector_env(config, config.eval_episodes, **environment_options(zero))) as env:
                self.zero = evaluate(zero, seed=config.eval_seed, env=env)
            self.tuned = tuned(zero, partial(_vector_env, config), **episodes)
            options = {**environment_options(policy), "trust": config.trust}
            self.env = _vector_env(config, config.eval_episodes, **options)
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


class _ProgressCallback(BaseCallback):
    """Moves the progress bar, and shows the returns of training and evaluation beside it."""

    def __init__(self, bar: Any, evaluation: _EvaluationCallback) -> None:
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
