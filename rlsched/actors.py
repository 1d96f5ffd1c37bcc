"""The networks that decide: from observations, and what they remember, to actions. Every actor is an entry in `ACTORS`.

An actor is a module that a policy file can hold. It also says which algorithm trains it, and where in that algorithm's
model its weights are; the algorithms themselves are `rlsched.agents`' business.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

MOST_LAYERS, MOST_WEIGHTS = 64, 10**7  # of an actor: a policy file that says more is none
ACTIVATIONS: Mapping[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}
Memory = Any  # what an actor carries from one decision to the next: a tensor (*batch, size), or None


class Actor(nn.Module, ABC):
    """Actions for observations. Its weights are zeros until they come from a file or from training.

    Args:
        inputs: number of observations.
        outputs: number of controls.
        hidden: widths of the layers between, at most `MOST_LAYERS`; with at most `MOST_WEIGHTS` weights between them.
        activation: "tanh" or "relu", between the layers.

    Raises:
        ValueError: a number, a width or the activation is not what it can be.
    """

    name: ClassVar[str]
    learner: ClassVar[tuple[str, str]]  # module and class of the algorithm of Stable-Baselines3 that trains it
    policy: ClassVar[str]  # that algorithm's name for its kind of policy

    def __init__(self, inputs: int, outputs: int, hidden: Sequence[int] = (64, 64), activation: str = "tanh") -> None:
        super().__init__()
        if not (inputs >= 1 and outputs >= 1):
            raise ValueError(f"inputs and outputs must be at least 1, got {inputs} and {outputs}")
        if activation not in list(ACTIVATIONS):
            raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
        self.inputs, self.outputs, self.activation = inputs, outputs, activation
        self.hidden = checked_widths(hidden, inputs, outputs)

    def begin(self, batch: tuple[int, ...] = ()) -> Memory:
        """What it remembers at the start of runs of shape `batch`."""
        return None

    @abstractmethod
    def forward(self, observation: Tensor, memory: Memory = None) -> tuple[Tensor, Memory]:
        """Actions (*batch, outputs), not clipped, and the new memory, for observations (*batch, inputs)."""

    @classmethod
    def policy_options(cls, hidden: Sequence[int], activation: str) -> dict[str, Any]:
        """The `policy_kwargs` of the learner's model, with a critic of the same widths.

        Raises:
            TypeError: no algorithm trains such an actor; this is so unless a kind of actor says otherwise.
        """
        raise TypeError(f"no algorithm trains a {cls.name}")

    @classmethod
    def trained(cls, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The actor's own state, from the state of the learner's policy.

        Raises:
            ValueError: it is not the state of such a policy.
            TypeError: no algorithm trains such an actor.
        """
        raise TypeError(f"no algorithm trains a {cls.name}")


class Perceptron(Actor):
    """Linear layers with an activation between them; it remembers nothing."""

    name = "perceptron"
    learner = ("stable_baselines3", "PPO")
    policy = "MlpPolicy"

    def __init__(self, inputs: int, outputs: int, hidden: Sequence[int] = (64, 64), activation: str = "tanh") -> None:
        super().__init__(inputs, outputs, hidden, activation)
        self.layers = nn.ModuleList(blank(nn.Linear, n, m) for n, m in pairwise((inputs, *self.hidden, outputs)))
        self._between = getattr(torch, activation)

    def forward(self, observation: Tensor, memory: Memory = None) -> tuple[Tensor, Memory]:
        x = observation
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, nn.Linear)  # called as a function: a module's call costs as much again
            x = functional.linear(x if i == 0 else self._between(x), layer.weight, layer.bias)
        return x, None

    @classmethod
    def policy_options(cls, hidden: Sequence[int], activation: str) -> dict[str, Any]:
        widths = list(hidden)
        return {"net_arch": {"pi": widths, "vf": widths}, "activation_fn": ACTIVATIONS[activation]}

    @classmethod
    def trained(cls, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return chain(weights, r"mlp_extractor\.policy_net\.(\d+)\.(weight|bias)", "layers")


class Recurrent(Actor):
    """An LSTM over the decisions of a run, and linear layers with an activation between them behind it.

    Its memory is the LSTM's: hidden state and cell, (*batch, 2 × `UNITS`).
    """

    name = "recurrent"
    learner = ("sb3_contrib", "RecurrentPPO")
    policy = "MlpLstmPolicy"

    UNITS = 64  # of the LSTM

    def __init__(self, inputs: int, outputs: int, hidden: Sequence[int] = (64, 64), activation: str = "tanh") -> None:
        super().__init__(inputs, outputs, hidden, activation)
        self.cell = blank(nn.LSTMCell, inputs, self.UNITS)
        self.behind = Perceptron(self.UNITS, outputs, hidden, activation)

    def begin(self, batch: tuple[int, ...] = ()) -> Memory:
        return torch.zeros(*batch, 2 * self.UNITS, dtype=torch.float32, device="cpu")

    def forward(self, observation: Tensor, memory: Memory = None) -> tuple[Tensor, Memory]:
        memory = self.begin(observation.shape[:-1]) if memory is None else memory
        hidden, cell = self.cell(observation, memory.chunk(2, -1))
        return self.behind(hidden)[0], torch.cat([hidden, cell], -1)

    @classmethod
    def policy_options(cls, hidden: Sequence[int], activation: str) -> dict[str, Any]:
        return {**Perceptron.policy_options(hidden, activation), "lstm_hidden_size": cls.UNITS}

    @classmethod
    def trained(cls, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = [f"{kind}_{source}" for kind in ("weight", "bias") for source in ("ih", "hh")]
        if any(f"lstm_actor.{name}_l0" not in weights for name in names):
            raise ValueError("model: it has no lstm_actor, so it is no recurrent policy of sb3-contrib")
        cell = {f"cell.{name}": weights[f"lstm_actor.{name}_l0"] for name in names}
        return cell | {f"behind.{key}": tensor for key, tensor in Perceptron.trained(weights).items()}


def checked_widths(hidden: Sequence[int], inputs: int = 1, outputs: int = 1) -> tuple[int, ...]:
    """The widths of an actor's layers as a tuple.

    Raises:
        ValueError: they are not positive ints, or more of them, or larger, than an actor may have.
    """
    few = isinstance(hidden, Sequence) and not isinstance(hidden, str) and len(hidden) <= MOST_LAYERS
    if not few or not all(isinstance(n, Integral) and not isinstance(n, bool) and n > 0 for n in hidden):
        raise ValueError(f"hidden must hold positive widths, at most {MOST_LAYERS}, got {_shown(hidden)}")
    widths = tuple(map(int, hidden))
    if sum(n * m for n, m in pairwise((inputs, *widths, outputs))) > MOST_WEIGHTS:
        raise ValueError(f"hidden must come to at most {MOST_WEIGHTS:,} weights, got {_shown(hidden)}")
    return widths


def _shown(hidden: Any) -> str:
    """As it was given, but for the most of a very long list."""
    return text if len(text := repr(hidden)) < 200 else f"{text[:200]} …"


def blank(kind: type[nn.Module], *args: Any, **options: Any) -> nn.Module:
    """A module with zeros for weights. It draws none: who loads a policy has use for their random numbers."""
    module = nn.utils.skip_init(kind, *args, **options, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    return module


def chain(weights: Mapping[str, Tensor], hidden: str, name: str) -> dict[str, Tensor]:
    """The linear layers of Stable-Baselines3's actor as a list of modules `name`.

    Args:
        weights: the state of the policy.
        hidden: pattern of the hidden layers' keys, with the number of the layer and "weight" or "bias".
        name: of the list.
    """
    found = [match for match in map(re.compile(hidden).fullmatch, weights) if match]
    numbers = sorted({int(match[1]) for match in found})
    layers = {f"{name}.{numbers.index(int(match[1]))}.{match[2]}": weights[match[0]] for match in found}
    for what in ("weight", "bias"):
        if f"action_net.{what}" not in weights:
            raise ValueError("model: it has no action_net, so it is no actor-critic policy of Stable-Baselines3")
        layers[f"{name}.{len(numbers)}.{what}"] = weights[f"action_net.{what}"]
    return layers


ACTORS: Mapping[str, type[Actor]] = {kind.name: kind for kind in (Perceptron, Recurrent)}


def actor(name: str, *args: Any, **options: Any) -> Actor:
    """A new actor of this kind.

    Raises:
        ValueError: there is none of this name, or an option is out of its range.
    """
    if name not in list(ACTORS):  # of the list, where a name from a file may be of any type
        raise ValueError(f"actor must be one of {list(ACTORS)}, got {name!r}")
    return ACTORS[name](*args, **options)
