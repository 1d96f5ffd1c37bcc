"""From a Stable-Baselines3 model to a policy file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn

from rlsched.actors import ACTIVATIONS, ACTORS, Actor, Perceptron, Recurrent, actor
from rlsched.agents.config import TrainConfig
from rlsched.base_schedule import named_base_schedule
from rlsched.control import CONTROLS
from rlsched.domain import Domain
from rlsched.envs.arguments import some_names
from rlsched.envs.groups import Interface
from rlsched.policy import SchedulePolicy
from rlsched.signals import OBSERVATIONS

CHECKPOINT = "checkpoint.zip"  # in the folder of a training run
# Attributes of a model that `rlsched train` made, which its checkpoint keeps.
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
    return _weights(model, getattr(model, INTERFACE)["actor"])


def _weights(model: BaseAlgorithm, actor: str) -> dict[str, Tensor]:
    return ACTORS[actor].trained({name: x.detach().clone() for name, x in model.policy.state_dict().items()})


def export(
    model: BaseAlgorithm,
    *,
    observations: Sequence[str] | None = None,
    controls: Sequence[str] | None = None,
    base_schedule: str | None = None,
    safe_start: float | None = None,
    domain: Domain | None = None,
    info: dict[str, Any] | None = None,
) -> SchedulePolicy:
    """The deterministic policy of a model: the mean of its actions, clipped to [−1, 1], of its averaged actor if any.

    Args:
        model: one that `rlsched train` made; or one of your own, on the scheduling environment, by PPO or A2C with
            "MlpPolicy" (or another algorithm with their policies), or by RecurrentPPO with "MlpLstmPolicy" and an LSTM
            of 64 units; with tanh or ReLU between the layers.
        observations, controls, base_schedule, safe_start: what its environment was made with, in that order; by default
            as the model says, or its environment, which a model that was loaded from a file may not have.
        domain: where the observations lie that the policy is to be trusted on, `Domain.of` some; by default those of
            the last evaluation by `rlsched train`, or everywhere.
        info: anything JSON can hold about how the policy was trained and how it scored.

    Raises:
        ValueError: neither the model nor an argument says what it sees and moves; that is not what its network takes
            and gives; or a policy file cannot hold what decides, as with SAC, whose actions are squashed.
    """
    given = {
        "observations": observations,
        "controls": controls,
        "base_schedule": base_schedule,
        "safe_start": safe_start,
    }
    own: Mapping[str, Any] | None = getattr(model, INTERFACE, None)
    interface = {**(_found(model) if own is None else own), **{name: x for name, x in given.items() if x is not None}}
    missing = [name for name in INTERFACE_FIELDS if name not in interface]
    if missing:
        raise ValueError(
            f"model: it does not say what it observes and moves, and has no environment that does: give {missing} to "
            "rlsched.agents.export, as its environment was made"
        )
    if own is None:
        _check_spaces(model, interface)
    decides = _actor(interface, getattr(model, AVERAGE, None) or _weights(model, interface["actor"]))
    if own is None:
        _check_decisions(model, decides)
    return SchedulePolicy(
        decides,
        interface["observations"],
        interface["controls"],
        domain=getattr(model, DOMAIN, None) if domain is None else domain,
        base_schedule=interface["base_schedule"],
        safe_start=interface["safe_start"],
        info=info,
    )


def _found(model: BaseAlgorithm) -> dict[str, Any]:
    """What can be known of the interface of a model of whatever algorithm: by its network, and by its environment."""
    policy = model.policy
    if not isinstance(policy, ActorCriticPolicy):
        raise ValueError(
            f"model: the actor of {type(model).__name__} cannot be exported. A policy file holds actors whose last "
            "layer gives the actions as they are: those of PPO and A2C with 'MlpPolicy', and of RecurrentPPO"
        )
    names = {kind: name for name, kind in ACTIVATIONS.items()}
    if policy.activation_fn not in names:
        raise ValueError(
            f"model: its activation_fn must be one of {[kind.__name__ for kind in names]} for a policy file, got "
            f"{policy.activation_fn.__name__}"
        )
    normalised = model.get_vec_normalize_env()
    if normalised is not None and normalised.norm_obs:
        raise ValueError(
            "model: its environment is in VecNormalize, whose statistics no policy file holds; use norm_obs=False, as "
            "the observations are within fixed bounds"
        )
    env = model.get_env()
    told = {} if env is None else env.get_attr("metadata")[0]
    return {
        **{name: told[name] for name in INTERFACE_FIELDS if name in told},
        "actor": (Recurrent if hasattr(policy, "lstm_actor") else Perceptron).name,
        "hidden": [m.out_features for m in policy.mlp_extractor.policy_net if isinstance(m, nn.Linear)],
        "activation": names[policy.activation_fn],
    }


def _actor(interface: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Actor:
    inputs, outputs = len(interface["observations"]), len(interface["controls"])
    built = actor(interface["actor"], inputs, outputs, interface["hidden"], interface["activation"])
    try:
        built.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"model: its network is no {built.name} from {inputs} observations through layers of "
            f"{list(interface['hidden'])} to {outputs} controls: {error}"
        ) from error
    return built


def _check_spaces(model: BaseAlgorithm, interface: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: the model does not see these observations and move these controls, or not as they are.
    """
    wanted = Interface(
        some_names("observations", interface["observations"], OBSERVATIONS),
        some_names("controls", interface["controls"], CONTROLS),
        named_base_schedule(interface["base_schedule"]),
    )
    spaces = {
        "observations": (model.observation_space, wanted.observation_space()),
        "controls": (model.action_space, wanted.action_space()),
    }
    for name, (there, space) in spaces.items():
        if there != space:
            raise ValueError(f"{name}: the model was trained on {there}, and that of these {name} is {space}")


def _check_decisions(model: BaseAlgorithm, decides: Actor) -> None:
    """
    Raises:
        ValueError: the actor does not decide what the model does, which has something that an actor has not.
    """
    space, rng, runs = model.observation_space, np.random.default_rng(0), 16
    assert isinstance(space, Box)
    state, memory = None, decides.begin((runs,))
    for step in range(3):
        observations = rng.uniform(space.low, space.high, (runs, *space.shape)).astype(np.float32)
        starts = np.full(runs, step == 0)
        expected, state = model.predict(observations, state, episode_start=starts, deterministic=True)
        with torch.no_grad():
            actions, memory = decides(torch.from_numpy(observations), memory)
        if not np.allclose(actions.clamp(-1, 1), expected, atol=1e-3):
            raise ValueError(
                f"model: it does not decide what a {decides.name} of its weights decides: it has something that no "
                "policy file holds, such as squashed actions or features of its own"
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
