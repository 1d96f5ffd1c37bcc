"""A small problem to train on and a policy that keeps every control moving, for the tests of the wrapper."""

from itertools import pairwise

import torch
from torch import nn

from rlsched import ScheduledOptimizer, SchedulePolicy, attach
from rlsched.control import CONTROL_NAMES, CONTROLS
from rlsched.signals import OBSERVATIONS


def lively_policy(seed=11, safe_start=True):
    """A policy of random weights; under the default ones every control moves, and none runs into its bounds at once."""
    generator = torch.Generator().manual_seed(seed)
    widths = [len(OBSERVATIONS), 8, len(CONTROLS)]
    layers = [
        (torch.randn(n, m, generator=generator) / m**0.5, 0.5 * torch.randn(n, generator=generator))
        for m, n in pairwise(widths)
    ]
    return SchedulePolicy(layers, safe_start=safe_start)


def always(**actions):
    """The policy that takes the same action at every decision."""
    bias = torch.tensor([actions.get(name, 0.0) for name in CONTROL_NAMES])
    return SchedulePolicy([(torch.zeros(len(bias), len(OBSERVATIONS)), bias)], safe_start=False)


FACES = [ScheduledOptimizer, attach]


def driven(face, inner, **options):
    """The optimizer to step and the controller, for either face."""
    driver = face(inner, **{"policy": lively_policy(), **options})
    return (inner, driver) if face is attach else (driver, driver.controller)


def network():
    """A classifier whose initial weights are the same at every call."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def loss_at(model, step):
    """The loss of the mini-batch that belongs to `step`."""
    generator = torch.Generator().manual_seed(1000 + step)
    inputs = torch.randn(16, 6, generator=generator)
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
