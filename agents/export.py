"""From a Stable-Baselines3 model to a policy file."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from stable_baselines3 import PPO
from torch import Tensor

from rlsched.actors import ACTORS
from rlsched.agents.config import TrainConfig
from rlsched.policy import SchedulePolicy

CHECKPOINT = "checkpoint.zip"  # in the folder of a training run
# Attributes of a model, which its checkpoint keeps.
DOMAIN = "observed_domain"  # where the observations lie that it was evaluated on
INTERFACE = "policy_interface"  # what its policy sees and moves, and what kind of network decides
# What of its configuration a model has to know, to be exported.
INTERFACE_FIELDS = ("observations", "controls", "base_schedule", "safe_start", "actor", "hidden", "activation")
AVERAGE = "average_actor"  # running average of the actor's weights, or None


def interface_of(config: TrainConfig) -> dict[str, Any]:
    """What a model has to know of its configuration."""
    return {name: getattr(config, name) for name in INTERFACE_FIELDS}


def learner(actor: str) -> type[PPO]:
    """The algorithm that trains this kind of actor."""
    module, name = ACTORS[actor].learner
    found: type[PPO] = getattr(import_module(module), name)
    return found


def actor_weights(model: PPO) -> dict[str, Tensor]:
    """Copies of the weights of a model's actor, by their names in a policy file."""
    kind = ACTORS[getattr(model, INTERFACE)["actor"]]
    return kind.trained({name: tensor.detach().clone() for name, tensor in model.policy.state_dict().items()})


def export(model: PPO, *, info: dict[str, Any] | None = None) -> SchedulePolicy:
    """The deterministic policy of a model: the mean of its actions, clipped to [−1, 1], of its averaged actor if any.

    Raises:
        ValueError: the model is not one that `rlsched train` made.
    """
    interface: Mapping[str, Any] | None = getattr(model, INTERFACE, None)
    if interface is None or not interface.keys() >= set(INTERFACE_FIELDS):
        raise ValueError("model: it does not say what it observes and moves, so it is not one that rlsched trained")
    kind = ACTORS[interface["actor"]]
    actor = kind(
        len(interface["observations"]), len(interface["controls"]), interface["hidden"], interface["activation"]
    )
    weights = getattr(model, AVERAGE, None) or actor_weights(model)
    try:
        actor.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"model: its network is not the {kind.name} that it says it is: {error}") from error
    return SchedulePolicy(
        actor,
        interface["observations"],
        interface["controls"],
        domain=getattr(model, DOMAIN, None),  # of its last evaluation
        base_schedule=interface["base_schedule"],
        safe_start=interface["safe_start"],
        info=info,
    )


def load_checkpoint(source: str | Path) -> SchedulePolicy:
    """The policy of a checkpoint, or of the checkpoint in the folder of a training run. Reads pickles.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is not a Stable-Baselines3 model, or not one of a scheduling policy.
    """
    path = Path(source)
    path = path / CHECKPOINT if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {str(path)!r}")
    model: PPO | None = None
    reasons = []
    for kind in dict.fromkeys(map(learner, ACTORS)):
        try:
            model = kind.load(path, device="cpu", custom_objects={"learning_rate": 0.0, "lr_schedule": None})
            break
        except Exception as error:  # a damaged pickle raises whatever it likes, and another algorithm's model too
            reasons.append(str(error))
    if model is None:
        raise ValueError(f"{path} cannot be read as a Stable-Baselines3 model: {reasons[0]}")
    return export(model, info={"training": {"timesteps_done": model.num_timesteps}})
