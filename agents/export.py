"""From a Stable-Baselines3 model to a policy file."""

from __future__ import annotations

from typing import Any

import torch
from stable_baselines3 import PPO

from rlsched.policy import SchedulePolicy

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
    return SchedulePolicy([(m.weight, m.bias) for m in linear], activation=_ACTIVATION_NAMES[between.pop()], info=info)
