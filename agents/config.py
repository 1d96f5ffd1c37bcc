"""Configuration of a training run."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from rlsched.actors import ACTIVATIONS, ACTORS
from rlsched.base_schedule import BASE_SCHEDULES
from rlsched.control import CONTROL_NAMES, CONTROLS
from rlsched.envs.mixtures import mixture
from rlsched.envs.scheduling import REWARDS, some_names
from rlsched.envs.training import usable_device
from rlsched.signals import OBSERVATION_NAMES, OBSERVATIONS


def option(default: Any, meaning: str) -> Any:
    """A field with its documentation, which the command line shows."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class TrainConfig:
    """How a scheduling policy is trained. By default it sees and moves all that there is."""

    run_dir: str = option("runs/policy", "checkpoint, TensorBoard log and policy file; a run found there is resumed")
    tasks: str = option("mlp", "mixture of inner tasks: a key of rlsched.envs.MIXTURES, or your own as module:NAME")
    reward: str = option("validation", f"loss whose drop is the reward: {', '.join(REWARDS)}")
    timesteps: int = option(1_500_000, "experience to train on: decisions, over all inner runs")
    observations: tuple[str, ...] = option(OBSERVATION_NAMES, "what the policy sees: names of docs/spec.md")
    controls: tuple[str, ...] = option(CONTROL_NAMES, f"what it moves, of {', '.join(CONTROL_NAMES)}")
    base_schedule: str = option("linear", f"what it modulates: {', '.join(BASE_SCHEDULES)}")
    num_envs: int = option(512, "inner training runs at once")
    processes: int = option(min(2, os.cpu_count() or 1), "worker processes that train them, one thread each")
    compile: bool = option(False, "torch.compile the inner steps: twice as fast, needs a C compiler")
    device: str = option("cpu", "where the inner networks are trained: cpu, cuda, ...")
    seed: int = option(0, "of weights, episodes and actions")

    n_steps: int = option(32, "timesteps of each inner run between two updates of PPO")
    batch_size: int = option(2048, "timesteps in a mini-batch of PPO")
    n_epochs: int = option(4, "passes over the timesteps in an update")
    learning_rate: float = option(7e-4, "of Adam at the start; falls linearly")
    final_learning_rate: float = option(1e-4, "of Adam at the end")
    gae_lambda: float = option(0.97, "decay of advantages in generalised advantage estimation")
    target_kl: float = option(0.03, "an update stops when the policy has moved 1.5 times as far")
    log_std_init: float = option(-0.7, "initial log standard deviation of the actions")
    actor: str = option("perceptron", f"kind of network that decides: {', '.join(ACTORS)}")
    hidden: tuple[int, ...] = option((64, 64), "widths of the actor's layers, and of the critic's")
    activation: str = option("tanh", "between the layers: tanh or relu")

    eval_every: int = option(60, "updates between evaluations against the base schedule")
    eval_episodes: int = option(128, "episodes of an evaluation, the same each time")
    eval_seed: int = option(1_000_000, "of these episodes")

    def __post_init__(self) -> None:
        anything = {"run_dir", "tasks", "reward", "activation", "hidden", "compile", "device", "seed", "eval_seed"}
        anything |= {"log_std_init", "observations", "controls", "base_schedule", "actor"}
        for name in {f.name for f in fields(self)} - anything:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        mixture(self.tasks)
        if self.reward not in REWARDS:
            raise ValueError(f"reward must be one of {REWARDS}, got {self.reward!r}")
        usable_device(self.device)
        some_names("observations", self.observations, OBSERVATIONS)
        some_names("controls", self.controls, CONTROLS)
        for name, known in (
            ("base_schedule", BASE_SCHEDULES),
            ("actor", ACTORS),
            ("activation", ACTIVATIONS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {list(known)}, got {getattr(self, name)!r}")
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"hidden must hold at least one positive width, got {self.hidden}")
        rollout = self.num_envs * self.n_steps
        if self.batch_size > rollout:
            raise ValueError(f"batch_size must be at most num_envs × n_steps = {rollout}, got {self.batch_size}")
        if self.timesteps < rollout:
            raise ValueError(f"timesteps must be at least num_envs × n_steps = {rollout}, got {self.timesteps}")
        if self.processes > self.num_envs:
            raise ValueError(f"processes must be at most num_envs = {self.num_envs}, got {self.processes}")

    def hyperparameters(self) -> dict[str, Any]:
        """The fields that decide what is learned, in types that JSON and TensorBoard can hold."""
        values = asdict(self)
        del values["run_dir"], values["processes"], values["compile"], values["device"]
        return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "demo": {"tasks": "small", "num_envs": 256, "n_steps": 64, "timesteps": 400_000, "eval_every": 8},
}
