"""Training scheduling policies with Stable-Baselines3."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlsched.agents.config import PRESETS, TrainConfig
    from rlsched.agents.evaluation import Evaluation, environment_options, evaluate
    from rlsched.agents.exporting import export
    from rlsched.agents.ppo import train
    from rlsched.agents.vec_env import VectorEnvAdapter

__all__ = [
    "PRESETS",
    "Evaluation",
    "TrainConfig",
    "VectorEnvAdapter",
    "environment_options",
    "evaluate",
    "export",
    "train",
]

_HOMES = {
    "PRESETS": "config",
    "TrainConfig": "config",
    "Evaluation": "evaluation",
    "VectorEnvAdapter": "vec_env",
    "environment_options": "evaluation",
    "evaluate": "evaluation",
    "export": "exporting",
    "train": "ppo",
}


def __getattr__(name: str) -> Any:
    # Lazy: the configuration alone must not need Stable-Baselines3.
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
