"""Actors: what they compute, and what they remember."""

import copy

import pytest
import torch
from helpers import assert_same_weights, loss_at, network, train
from torch import nn

from rlsched import ScheduledOptimizer, SchedulePolicy
from rlsched.actors import ACTORS, Perceptron, Recurrent, actor

SEEN, MOVED = ("progress", "loss_vs_first", "grad_cosine", "lr"), ("lr", "momentum")
EACH = pytest.mark.parametrize("kind", ACTORS.values(), ids=ACTORS)


def drawn(kind, seed=0, **options):
    """An actor of random weights."""
    made = kind(len(SEEN), len(MOVED), (5, 3), **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return made


def observations(decisions, batch=()):
    """What a run, or a batch of runs, sees at each decision."""
    return torch.randn(decisions, *batch, len(SEEN), generator=torch.Generator().manual_seed(1))


def played(policy, seen):
    """The actions for a sequence of observations."""
    memory, actions = policy.begin(seen.shape[1:-1]), []
    for observation in seen:
        action, memory = policy.act(observation, memory)
        actions.append(action)
    return torch.stack(actions)


@pytest.mark.parametrize("activation, layer", [("tanh", nn.Tanh), ("relu", nn.ReLU)])
def test_perceptron_is_a_chain_of_layers(activation, layer):
    """An activation too many, or one too few, is another policy than the one that was trained."""
    made = drawn(Perceptron, activation=activation)
    one, two, three = made.layers
    expected = nn.Sequential(one, layer(), two, layer(), three)
    for observation in observations(5):
        torch.testing.assert_close(made(observation)[0], expected(observation))


def test_recurrent_actor_is_an_lstm_with_a_perceptron_behind_it():
    """Gates in another order, or a state that is lost between decisions, would make noise of what was learned."""
    made = drawn(Recurrent)
    lstm = nn.LSTM(len(SEEN), Recurrent.UNITS)
    with torch.no_grad():
        for name, p in made.cell.named_parameters():
            getattr(lstm, f"{name}_l0").copy_(p)
    seen = observations(7, (3,))
    hidden, _ = lstm(seen)
    policy = SchedulePolicy(made, SEEN, MOVED)
    torch.testing.assert_close(played(policy, seen), made.behind(hidden)[0].clamp(-1, 1))


@EACH
def test_batch_of_runs_is_each_run_alone(kind):
    """A policy is trained on batches and used on one run; a memory that runs share would belong to none of them."""
    policy, seen = SchedulePolicy(drawn(kind), SEEN, MOVED), observations(6, (4,))
    together = played(policy, seen)
    for run in range(4):
        torch.testing.assert_close(played(policy, seen[:, run]), together[:, run])


@EACH
def test_file_gives_the_same_actor(kind, tmp_path):
    """A policy that decides otherwise once it was saved was never evaluated."""
    policy = SchedulePolicy(drawn(kind), SEEN, MOVED)
    loaded = SchedulePolicy.load(policy.save(tmp_path / "policy.safetensors"))
    assert torch.equal(played(loaded, observations(6)), played(policy, observations(6)))
    assert loaded.digest == policy.digest != SchedulePolicy(drawn(kind, seed=1), SEEN, MOVED).digest


@EACH
@pytest.mark.parametrize("stop", [0, 1, 9])
def test_run_goes_on_with_what_the_actor_remembers(kind, stop):
    """A job that is preempted would go on under an actor that has forgotten the run."""
    options = {"total_steps": 21, "decisions": 5, "policy": SchedulePolicy(drawn(kind), SEEN, MOVED)}
    model = network()
    whole = ScheduledOptimizer(torch.optim.SGD(model.parameters(), 0.1, 0.9), **options)
    before = train(model, whole, range(stop))
    resumed = network()
    resumed.load_state_dict(model.state_dict())
    again = ScheduledOptimizer(torch.optim.SGD(resumed.parameters(), 0.1, 0.9), **options)
    again.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert train(resumed, again, range(stop, 21)) == train(model, whole, range(stop, 21))
    assert_same_weights(resumed, model)
    assert len(before) == stop and loss_at(model, 0).isfinite()


@pytest.mark.parametrize("options, message", [
    ({"hidden": (0,)}, r"hidden must hold positive widths, at most 64, got \(0,\)"),
    ({"hidden": (2.5,)}, r"hidden must .*, got \(2.5,\)"),
    ({"hidden": (True,)}, r"hidden must .*, got \(True,\)"),
    ({"hidden": "64"}, r"hidden must .*, got '64'"),
    ({"hidden": 64}, r"hidden must .*, got 64"),
    ({"hidden": (1,) * 99}, r"hidden must .* at most 64, got \(1, 1, .* …"),
    ({"hidden": (10**12,)}, r"hidden must come to at most 10,000,000 weights, got \(1000000000000,\)"),
    ({"activation": "gelu"}, r"activation must be one of \['relu', 'tanh'\], got 'gelu'"),
    ({"activation": ["tanh"]}, r"activation must be one of \['relu', 'tanh'\], got \['tanh'\]"),
])  # fmt: skip
@EACH
def test_wrong_argument_is_named(kind, options, message):
    """A slip would show as a policy that does not train."""
    with pytest.raises(ValueError, match=message):
        kind(3, 2, **options)


def test_unknown_actor_is_refused():
    """A misspelt actor would be the default one."""
    with pytest.raises(ValueError, match=r"actor must be one of \['perceptron'.*got 'lstm'"):
        actor("lstm", 3, 2)
