"""Configuration of a training run."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from rlsched.envs.mixtures import mixture
from rlsched.envs.scheduling import REWARDS
from rlsched.envs.training import usable_device
from rlsched.policy import ACTIVATIONS


def option(default: Any, meaning: str) -> Any:
    """A field with its documentation, which the command line shows."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class TrainConfig:
    """How a scheduling policy is trained. The defaults are those of the shipped policy."""

    run_dir: str = option("runs/policy", "checkpoint, TensorBoard log and policy file; a run found there is resumed")
    tasks: str = option("mlp", "mixture of inner tasks: a key of rlsched.envs.MIXTURES, or your own as module:NAME")
    reward: str = option("validation", f"loss whose drop is the reward: {', '.join(REWARDS)}")
    decisions: int = option(1_500_000, "decisions to train on, over all inner runs")
    num_envs: int = option(512, "inner training runs at once")
    processes: int = option(min(2, os.cpu_count() or 1), "worker processes that train them, one thread each")
    compile: bool = option(False, "torch.compile the inner steps: twice as fast, needs a C compiler")
    device: str = option("cpu", "where the inner networks are trained: cpu, cuda, ...")
    seed: int = option(0, "of weights, episodes and actions")

    n_steps: int = option(32, "decisions of each inner run between two updates of PPO")
    batch_size: int = option(2048, "decisions in a mini-batch of PPO")
    n_epochs: int = option(4, "passes over the decisions in an update")
    learning_rate: float = option(7e-4, "of Adam at the start; falls linearly")
    final_learning_rate: float = option(1e-4, "of Adam at the end")
    gae_lambda: float = option(0.97, "decay of advantages in generalised advantage estimation")
    target_kl: float = option(0.03, "an update stops when the policy has moved 1.5 times as far")
    log_std_init: float = option(-0.7, "initial log standard deviation of the actions")
    hidden: tuple[int, ...] = option((64, 64), "widths of the actor's layers, and of the critic's")
    activation: str = option("tanh", "between the layers: tanh or relu")

    eval_every: int = option(60, "updates between evaluations against the fallback schedule")
    eval_episodes: int = option(128, "episodes of an evaluation, the same each time")
    eval_seed: int = option(1_000_000, "of these episodes")

    def __post_init__(self) -> None:
        anything = {"run_dir", "tasks", "reward", "activation", "hidden", "compile", "device", "seed", "eval_seed"}
        anything |= {"log_std_init"}
        for name in {f.name for f in fields(self)} - anything:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        mixture(self.tasks)
        if self.reward not in REWARDS:
            raise ValueError(f"reward must be one of {REWARDS}, got {self.reward!r}")
        usable_device(self.device)
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {self.activation!r}")
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"hidden must hold at least one positive width, got {self.hidden}")
        rollout = self.num_envs * self.n_steps
        if self.batch_size > rollout:
            raise ValueError(f"batch_size must be at most num_envs × n_steps = {rollout}, got {self.batch_size}")
        if self.decisions < rollout:
            raise ValueError(f"decisions must be at least num_envs × n_steps = {rollout}, got {self.decisions}")
        if self.processes > self.num_envs:
            raise ValueError(f"processes must be at most num_envs = {self.num_envs}, got {self.processes}")

    def hyperparameters(self) -> dict[str, Any]:
        """The fields that decide what is learned, in types that JSON and TensorBoard can hold."""
        values = asdict(self)
        del values["run_dir"], values["processes"], values["compile"], values["device"]
        return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "demo": {"tasks": "small", "num_envs": 256, "n_steps": 64, "decisions": 400_000, "eval_every": 8},
}
