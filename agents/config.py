"""Configuration of a training run."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields
from typing import Any

from rlsched.envs.mixtures import mixture
from rlsched.policy import ACTIVATIONS


@dataclass(frozen=True)
class TrainConfig:
    """How a scheduling policy is trained. The defaults are those of the shipped policy."""

    run_dir: str = "runs/policy"  # checkpoint, TensorBoard log and policy file; a run found there is resumed
    tasks: str = "mlp"  # mixture of inner tasks, a key of `rlsched.envs.MIXTURES`
    decisions: int = 4_000_000  # decisions to train on, over all environments
    num_envs: int = 512  # inner training runs at once
    processes: int = min(2, os.cpu_count() or 1)  # that train them
    compile: bool = False  # compile the inner steps with torch.compile (needs a C compiler)
    seed: int = 0

    # PPO, in the words of Stable-Baselines3.
    n_steps: int = 32  # decisions of each environment between two updates
    batch_size: int = 2048
    n_epochs: int = 4
    learning_rate: float = 7e-4  # falls linearly
    final_learning_rate: float = 1e-4
    gae_lambda: float = 0.97
    target_kl: float = 0.03
    log_std_init: float = -0.7
    hidden: tuple[int, ...] = (64, 64)  # widths of the actor's layers, and of the critic's
    activation: str = "tanh"

    # Evaluation against the fallback schedule, on episodes that are the same each time.
    eval_every: int = 30  # updates
    eval_episodes: int = 128
    eval_seed: int = 1_000_000

    def __post_init__(self) -> None:
        anything = {"run_dir", "tasks", "activation", "hidden", "compile", "seed", "eval_seed", "log_std_init"}
        for name in {field.name for field in fields(self)} - anything:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        mixture(self.tasks)
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
        del values["run_dir"], values["processes"]
        return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "demo": {"tasks": "small", "num_envs": 256, "n_steps": 64, "decisions": 700_000, "eval_every": 6},
}
