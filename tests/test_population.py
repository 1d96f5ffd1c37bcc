"""Many runs under one policy, held against each of them alone."""

import copy

import pytest
import torch
from helpers import always, assert_same_weights, lively_policy, loss_at, network, train
from torch import nn

import rlsched
from rlsched import DivergenceError, Population, ScheduledOptimizer, attach, attach_all
from rlsched.actors import Recurrent
from rlsched.policy import SchedulePolicy
from rlsched.signals import OBSERVATION_NAMES

LENGTHS = [12, 20, 20, 33]


def recurrent_policy():
    """One that remembers."""
    actor = Recurrent(len(OBSERVATION_NAMES), 2, (8,))
    generator = torch.Generator().manual_seed(3)
    actor.load_state_dict({k: 0.3 * torch.randn(v.shape, generator=generator) for k, v in actor.state_dict().items()})
    return SchedulePolicy(actor, OBSERVATION_NAMES, ("lr", "momentum"))


class Counting:
    """A policy that counts what it is asked."""

    def __init__(self, policy):
        self._policy, self.batches = policy, []

    def __getattr__(self, name):
        return getattr(self._policy, name)

    def act(self, observation, memory=None):
        self.batches.append(1 if observation.dim() == 1 else len(observation))
        return self._policy.act(observation, memory)


def runs(kinds):
    """A network and an optimizer of each kind, other weights in each."""
    models = []
    for i in range(len(kinds)):
        model = network()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + 0.1 * i)
        models.append(model)
    return models, [make(list(model.parameters())) for make, model in zip(kinds, models, strict=True)]


def sgd(parameters):
    """Which sums gradients."""
    return torch.optim.SGD(parameters, 0.1, 0.9)


def adam(parameters):
    """Which is adaptive."""
    return torch.optim.Adam(parameters, 0.01)


def by_layer(parameters):
    """In two groups."""
    return torch.optim.SGD([{"params": parameters[:2]}, {"params": parameters[2:]}], 0.1, 0.9)


def losses_of(models, step):
    """The losses of all networks, and their gradients."""
    losses = []
    for model in models:
        model.zero_grad()
        losses.append(loss_at(model, step))
        losses[-1].backward()
    return losses


@pytest.mark.parametrize("make", [lively_policy, recurrent_policy], ids=["perceptron", "recurrent"])
def test_population_is_its_runs_alone(make):
    """A sweep would compare runs that have felt each other.

    Of other optimizers, lengths and options, with groups or without: to the rounding of a product of matrices.
    """
    policy, kinds = Counting(make()), [sgd, adam, by_layer, sgd]
    (models, optimizers), (single, alone) = runs(kinds), runs(kinds)
    options = [{}, {"averaging": True}, {"per_group": True}, {"controls": ("lr",)}]
    given = [{"total_steps": n, "decisions": 6, **own} for n, own in zip(LENGTHS, options, strict=True)]
    population = Population(attach(o, policy=policy, **own) for o, own in zip(optimizers, given, strict=True))
    for step in range(max(LENGTHS)):
        losses = losses_of(models, step)
        population.step([loss if step < n else None for loss, n in zip(losses, LENGTHS, strict=True)])
    assert [c.step_count for c in population.controllers] == LENGTHS
    assert max(policy.batches) == 5
    for i, (model, optimizer, own) in enumerate(zip(single, alone, given, strict=True)):
        scheduled = ScheduledOptimizer(optimizer, policy=make(), **own)
        train(model, scheduled, range(LENGTHS[i]))
        theirs, mine = scheduled.controller, population[i]
        assert len(theirs.windows) == len(mine.windows) > 5
        assert mine.interventions == theirs.interventions
        for p, q in zip(model.parameters(), models[i].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_run_that_steps_by_itself_decides_alone():
    """A loop that steps one optimizer outside would step it without a schedule, or prepare it twice."""
    (models, optimizers), (single, alone) = runs([sgd, sgd]), runs([sgd, sgd])
    population = attach_all(optimizers, total_steps=20, decisions=5, policy=lively_policy())
    for step in range(20):
        losses = losses_of(models, step)
        if step % 3:
            population.step(losses)
        else:
            for optimizer, controller, loss in zip(optimizers, population.controllers, losses, strict=True):
                controller.observe(loss)
                optimizer.step()
    for i in range(2):
        train(single[i], ScheduledOptimizer(alone[i], total_steps=20, decisions=5, policy=lively_policy()), range(20))
        for p, q in zip(single[i].parameters(), models[i].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_run_goes_on_by_its_own_state():
    """A population that was saved could only be resumed as a whole, or not to the bit."""
    (models, optimizers), policy = runs([sgd, adam]), lively_policy()
    population = attach_all(optimizers, total_steps=20, decisions=5, policy=policy)
    for step in range(9):
        population.step(losses_of(models, step))
    states = [(o.state_dict(), c.state_dict()) for o, c in zip(optimizers, population.controllers, strict=True)]
    saved = copy.deepcopy(states)
    weights = [{k: v.clone() for k, v in model.state_dict().items()} for model in models]
    for step in range(9, 20):
        population.step(losses_of(models, step))
    again, others = runs([sgd, adam])
    resumed = attach_all(others, total_steps=20, decisions=5, policy=policy)
    for i, (of_optimizer, of_controller) in enumerate(saved):
        again[i].load_state_dict(weights[i])
        others[i].load_state_dict(of_optimizer)
        resumed[i].load_state_dict(of_controller)
    for step in range(9, 20):
        resumed.step(losses_of(again, step))
    for model, other in zip(models, again, strict=True):
        assert_same_weights(model, other)


def test_run_that_diverges_takes_nobody_along():
    """One wild member of a sweep would roll back all, or end it."""
    (models, optimizers), wild = runs([sgd, sgd]), always(lr=0.0)
    controllers = [
        attach(optimizers[0], total_steps=20, decisions=5, policy=wild, on_divergence="raise"),
        attach(optimizers[1], total_steps=20, decisions=5, policy=wild),
    ]
    population = Population(controllers)
    raised = 0
    for step in range(20):
        losses = losses_of(models, step)
        if step >= 8:
            losses[0] = losses[0] * torch.nan
        try:
            population.step(losses)
        except DivergenceError:
            raised += 1
            assert controllers[1].step_count == step + 1
            break
    assert raised == 1 and not controllers[1].interventions
    expected = network()
    with torch.no_grad():
        for p in expected.parameters():
            p.mul_(1.1)
    train(
        expected,
        ScheduledOptimizer(sgd(expected.parameters()), total_steps=20, decisions=5, policy=wild),
        range(step + 1),
    )
    assert_same_weights(expected, models[1])


def test_what_is_no_population_is_refused(tmp_path):
    """Half of a sweep would be left with hooks, or under another policy than is thought."""
    _, (one, other) = runs([sgd, sgd])
    first = attach(one, total_steps=10)
    with pytest.raises(ValueError, match=r"^controllers must be at least one, and each of them once, got 0"):
        Population([])
    with pytest.raises(ValueError, match=r"^controllers must be at least one, and each of them once, got 2"):
        Population([first, first])
    second = attach(other, total_steps=10, policy=lively_policy())
    with pytest.raises(ValueError, match=r"^controllers must have the same policy, they have sha256="):
        Population([first, second])
    with pytest.raises(ValueError, match=r"^losses must be one for each of the 1 runs, got 2"):
        Population([first]).step([1.0, 2.0])
    second.detach()
    with pytest.raises(ValueError, match=r"is driven by rlsched.attach already"):
        attach_all([other, one], total_steps=10)
    attach(other, total_steps=10).detach()
    with pytest.raises(ValueError, match=r"^model is of one run"):
        attach_all([other], total_steps=10, model=nn.Linear(1, 1))
    assert rlsched.attach_all is attach_all
