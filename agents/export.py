"""From a Stable-Baselines3 model to a policy file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from stable_baselines3 import PPO

from rlsched.policy import SchedulePolicy

CHECKPOINT = "checkpoint.zip"  # in the folder of a training run
DOMAIN = "observed_domain"  # attribute of a model, where the observations lie that it was evaluated on
_ACTIVATION_NAMES: dict[type[torch.nn.Module], str] = {torch.nn.Tanh: "tanh", torch.nn.ReLU: "relu"}


def export(model: PPO, *, info: dict[str, Any] | None = None) -> SchedulePolicy:
    """The deterministic policy of a PPO model: the mean of its actions, clipped to [-1, 1].

    Raises:
        ValueError: the actor is not a chain of linear layers with tanh or ReLU between them.
    """
    actor = model.policy
    layers = [*actor.mlp_extractor.policy_net, actor.action_net]
    linear = [m for m in layers if isinstance(m, torch.nn.Linear)]
    between = {type(m) for m in layers} - {torch.nn.Linear}
    if len(between) != 1 or not between <= _ACTIVATION_NAMES.keys():
        raise ValueError(f"model: cannot export an actor with the layers {[type(m).__name__ for m in layers]}")
    weights = [(m.weight.detach().clone(), m.bias.detach().clone()) for m in linear]  # training may go on
    domain = getattr(model, DOMAIN, None)  # of its last evaluation
    return SchedulePolicy(weights, activation=_ACTIVATION_NAMES[between.pop()], domain=domain, info=info)


def load_checkpoint(source: str | Path) -> SchedulePolicy:
    """The policy of a checkpoint, or of the checkpoint in the folder of a training run. Reads pickles.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is not a Stable-Baselines3 PPO model, or not one of a scheduling policy.
    """
    path = Path(source)
    path = path / CHECKPOINT if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {str(path)!r}")
    try:
        model = PPO.load(path, device="cpu", custom_objects={"learning_rate": 0.0, "lr_schedule": None})
    except Exception as error:  # a damaged pickle raises whatever it likes
        raise ValueError(f"{path} cannot be read as a Stable-Baselines3 PPO model: {error}") from error
    return export(model, info={"training": {"decisions_done": model.num_timesteps}})
