"""Training: PPO from Stable-Baselines3 on the scheduling environment, checkpointed, evaluated and logged."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from tqdm import tqdm

from rlsched.actors import ACTORS
from rlsched.agents.callbacks import (
    AnyVectorEnv,
    AveragingCallback,
    CheckpointCallback,
    ClonesCallback,
    EvaluationCallback,
    Listener,
    LogCallback,
    ProgressCallback,
)
from rlsched.agents.config import TrainConfig, differences
from rlsched.agents.critic import Privileged, PrivilegedCriticPolicy
from rlsched.agents.exporting import CHECKPOINT, INTERFACE, interface_of, learner
from rlsched.agents.tensorboard import TrainingLog
from rlsched.agents.vec_env import VectorEnvAdapter
from rlsched.envs.arguments import warn_of_left_out
from rlsched.envs.mixtures import mixture, names
from rlsched.envs.scheduling import SchedulingVectorEnv
from rlsched.envs.sharding import Make, ShardedVectorEnv, Transport, Workers, check_main_guard
from rlsched.files import locked, write
from rlsched.policy import SchedulePolicy

CONFIG, POLICY = "config.json", "policy.safetensors"


def train(
    config: TrainConfig | None = None, *, on_evaluation: Listener | None = None, show: bool = True
) -> SchedulePolicy:
    """Train a scheduling policy, or go on where an interrupted training in `config.run_dir` stopped.

    The folder gets `config.json`, `checkpoint.zip` (after every update; a Stable-Baselines3 model), TensorBoard event
    files in `training`, and at the end `policy.safetensors`; each is whole whenever the training is killed. It is this
    training's alone as long as that goes on, and nothing is written to it before all that can be checked has been. A
    finished run is loaded, and nothing is trained, unless `config.timesteps` is now more than it had: then it goes on.

    Args:
        config: how to train.
        on_evaluation: is called after each evaluation, with the timesteps before it and its scores
            (`rlsched.agents.evaluation.scores`). What it raises ends the training as an interrupt does.
        show: a progress bar, and pictures of episodes in the log.

    Raises:
        ValueError: `run_dir` holds a run with other hyperparameters, or a file that cannot be read; the tasks cannot
            be trained on.
        OSError: `run_dir` is in use by another process, or cannot be written to; a worker process died; no Ray cluster
            answers.
        RuntimeError: this is the script that the worker processes import, and nothing keeps them from training.
    """
    config = config or TrainConfig()
    if config.processes > 1 and config.engine == "processes":
        check_main_guard()
    run_dir = Path(config.run_dir)
    _check_hyperparameters(run_dir, config)
    policy = _finished(run_dir, config)
    if policy is not None:
        return policy
    check_tasks(config)
    with ExitStack() as stack:
        stack.enter_context(locked(run_dir))
        _check_hyperparameters(run_dir, config)  # which another process may have written by now
        seen = {name: getattr(config, name) for name in ("observations", "controls", "base_schedule", "safe_start")}
        options = {"reward": config.reward, "trust": config.trust, "compile": config.compile, **seen}
        tasks = mixture(config.tasks)
        warn_of_left_out(tasks, config.num_envs // config.clones)
        privileged = Privileged(names(tasks)) if config.privileged_critic else None
        make = partial(_vector_env, config, stack.enter_context(_transport(config)))
        env = VectorEnvAdapter(make(config.num_envs, clones=config.clones, **options), privileged)
        stack.callback(env.close)
        checkpoint = run_dir / CHECKPOINT
        model = _resume(checkpoint, env, config) if checkpoint.exists() else _new_model(env, config)
        write(run_dir / CONFIG, f"{json.dumps(config.hyperparameters(), indent=2)}\n".encode())
        log = TrainingLog(run_dir, config, pictures=show)
        stack.callback(log.close)
        model.set_logger(log.logger)
        bar = stack.enter_context(_progress_bar(config, model.num_timesteps, show))
        evaluation = EvaluationCallback(config, make, log, bar, on_evaluation)
        stack.callback(evaluation.close)
        checkpoints = CheckpointCallback(checkpoint)
        callbacks: list[BaseCallback] = [
            ClonesCallback(config.clones),
            AveragingCallback(config.averaging),
            checkpoints,
            evaluation,
            LogCallback(config, log, evaluation),
            ProgressCallback(bar, evaluation),
        ]
        remaining = max(0, config.timesteps - model.num_timesteps)
        model.learn(remaining, callback=callbacks, reset_num_timesteps=False, log_interval=1)
        policy = evaluation.finish()
        checkpoints.save()  # with the domain of the policy
        policy.save(run_dir / POLICY)
    return policy


def check_tasks(config: TrainConfig) -> None:
    """
    Raises:
        ValueError: an inner task cannot be trained, on its own data.
    """
    for i, task in enumerate(mixture(config.tasks)):
        task.check(f"{config.tasks}[{i}]")


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
    if differing := differences(there, hyperparameters):
        raise ValueError(
            f"run_dir: {str(run_dir)!r} holds a run with other hyperparameters: {differing}. "
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


@contextmanager
def _transport(config: TrainConfig) -> Iterator[Callable[[Sequence[Make]], Transport] | None]:
    """To where the shards of all environments live; None if there are none, but environments in this process."""
    workers: Any
    if config.engine == "ray":
        from rlsched.envs.cluster import Workers as RayWorkers

        workers = RayWorkers(config.processes, address=config.address)
    elif config.processes > 1:
        workers = Workers(config.processes)
    else:
        yield None
        return
    with workers:
        yield workers.transport


def _vector_env(
    config: TrainConfig,
    transport: Callable[[Sequence[Make]], Transport] | None,
    num_envs: int,
    **options: Any,
) -> AnyVectorEnv:
    options["device"] = config.device
    sets = num_envs // options.get("clones", 1)
    tasks = mixture(config.tasks)[:sets]
    if transport is None:
        return SchedulingVectorEnv(num_envs, tasks, **options)
    return ShardedVectorEnv(num_envs, tasks, processes=min(config.processes, sets), transport=transport, **options)


def _new_model(env: VectorEnvAdapter, config: TrainConfig) -> PPO:
    kind = ACTORS[config.actor]
    coherent, log_std = config.exploration == "coherent", config.log_std_init
    if coherent:
        log_std -= math.log(config.hidden[-1]) / 2  # of each feature's part in the noise, where features are of size 1
    policy_options = {**kind.policy_options(config.hidden, config.activation), "log_std_init": log_std}
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
        use_sde=coherent,  # Raffin et al. (2021), "Smooth Exploration for Robotic Reinforcement Learning"
        policy_kwargs=policy_options,
        seed=config.seed,
        device="cpu",
    )
    setattr(model, INTERFACE, interface_of(config))
    if config.initial_policy:
        initial = SchedulePolicy.load(config.initial_policy).actor.state_dict()
        for name, tensor in kind.trained(model.policy.state_dict()).items():  # the model's own, and no copies
            tensor.copy_(initial[name])
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


def _progress_bar(config: TrainConfig, done: int, show: bool) -> Any:
    rollout = config.num_envs * config.n_steps
    return tqdm(
        total=rollout * math.ceil(config.timesteps / rollout),
        initial=done,
        unit=" timesteps",
        unit_scale=True,
        desc="training",
        file=sys.stderr,
        mininterval=1.0,
        disable=not show,
    )
