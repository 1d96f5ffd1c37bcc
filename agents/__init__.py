"""Training scheduling policies with PPO from Stable-Baselines3."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlsched.agents.config import PRESETS, TrainConfig
    from rlsched.agents.evaluation import Evaluation, evaluate
    from rlsched.agents.ppo import train

__all__ = ["PRESETS", "Evaluation", "TrainConfig", "evaluate", "train"]

_HOMES = {
    "PRESETS": "config",
    "TrainConfig": "config",
    "Evaluation": "evaluation",
    "evaluate": "evaluation",
    "train": "ppo",
}


def __getattr__(name: str) -> Any:
    # Lazy: the configuration alone must not need Stable-Baselines3.
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
