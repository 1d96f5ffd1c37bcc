"""A small problem to train on and a policy that keeps every control moving, for the tests of the wrapper."""

import zlib

import torch
from torch import nn

from rlsched import ScheduledOptimizer, SchedulePolicy, attach
from rlsched.actors import Perceptron
from rlsched.control import CONTROL_NAMES
from rlsched.envs.sharding import Inline, Lost, Shard
from rlsched.moments import Moments
from rlsched.signals import OBSERVATION_NAMES

# Whatever the precision of a network, rlsched measures and decides in single precision. Sums over a network's weights
# in another order differ by some tens of epsilons at most, and learning rates and weights then by about as much: under
# the policies here, and after so few steps, what is measured a millionth off makes them a millionth off.
SINGLE = 64 * torch.finfo(torch.float32).eps


def perceptron(layers, observations=OBSERVATION_NAMES, controls=CONTROL_NAMES, activation="tanh", **options):
    """The policy of these (weight, bias) of each layer."""
    hidden = [len(bias) for _, bias in layers[:-1]]
    actor = Perceptron(len(observations), len(controls), hidden, activation)
    pairs = [(f"layers.{i}", layer) for i, layer in enumerate(layers)]
    actor.load_state_dict({f"{name}.{what}": x for name, (w, b) in pairs for what, x in (("weight", w), ("bias", b))})
    return SchedulePolicy(actor, observations, controls, **options)


def lively_policy(seed=124, observations=OBSERVATION_NAMES, controls=CONTROL_NAMES, **options):
    """A policy of random weights; under the default ones every control moves, and none runs into its bounds at once.

    The weights of an observation or a control are drawn by its name, so that they are the same beside other ones.
    """

    def drawn(name, size):
        generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
        return torch.randn(size, generator=generator, dtype=torch.float32)

    seen, hidden = torch.stack([drawn(name, 8) for name in observations], -1), drawn("hidden", 8)
    moved = torch.stack([drawn(f"control {name}", 9) for name in controls])
    layers = [(seen / 20**0.5, 0.5 * hidden), (moved[:, :8] / 8**0.5, 0.5 * moved[:, 8])]
    return perceptron(layers, observations, controls, **options)


def always(safe_start=False, **actions):
    """The policy that takes the same action at every decision."""
    bias = torch.tensor([actions.get(name, 0.0) for name in CONTROL_NAMES])
    return perceptron([(torch.zeros(len(bias), len(OBSERVATION_NAMES)), bias)], safe_start=safe_start)


def departures(controller):
    """How far the state of each control is from where it began, by name."""
    state = controller.state
    return {name: state.control[name] - state.base[name] for name in CONTROL_NAMES}


def run_of(window, i):
    """The window of run i of a batch, as it is of a run alone: a tuple of floats for each of the moments."""
    return Moments(*(tuple(series[i].tolist()) for series in window))


FACES = [ScheduledOptimizer, attach]


def driven(face, inner, **options):
    """The optimizer to step and the controller, for either face."""
    driver = face(inner, **{"policy": lively_policy(), **options})
    return (inner, driver) if face is attach else (driver, driver.controller)


def network():
    """A classifier whose initial weights are the same at every call."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def loss_at(model, step, dtype=None, device="cpu"):
    """The loss of the mini-batch that belongs to `step`, of the default precision if no other is given."""
    generator = torch.Generator().manual_seed(1000 + step)
    inputs = torch.randn(16, 6, generator=generator, dtype=dtype).to(device)
    return nn.functional.cross_entropy(model(inputs), inputs[:, :3].argmax(-1))


def train(model, optimizer, steps):
    """Train for `steps`, and return the (lr, momentum) of each step's parameter groups."""
    hyperparameters = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_at(model, step)
        loss.backward()
        optimizer.step(loss=loss)
        groups = optimizer.param_groups
        hyperparameters.append([(float(g["lr"]), g.get("betas", [g.get("momentum")])[0]) for g in groups])
    return hyperparameters


def assert_same_weights(one, other):
    """Every weight of two models is the same, to the last bit."""
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def assert_finite_weights(model):
    """Every weight is a finite number."""
    for name, p in model.named_parameters():
        assert p.isfinite().all(), name


class Losing(Inline):
    """A transport that loses a shard as it is asked for something, and has it again when it is begun anew."""

    victim, method = 1, "step"
    times, after = 0, 0  # how often, and after how many times that it goes well

    def __init__(self, makes):
        super().__init__(makes)
        self.makes = makes

    def ask(self, requests):
        answers = super().ask(requests)
        asked = requests[self.victim]
        if self.times and asked and asked[0] == self.method:
            if self.after:
                self.after -= 1
            else:
                self.times -= 1
                self._shards[self.victim] = Shard(self.makes[self.victim])
                answers[self.victim] = Lost("out of memory")
        return answers
