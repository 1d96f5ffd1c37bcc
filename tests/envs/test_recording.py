"""A recording does what its function does, at every call."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import grad, vmap

from rlsched.envs import InnerTask, SchedulingVectorEnv, recording
from rlsched.envs.draws import seeded
from rlsched.envs.networks import Recurrent
from rlsched.envs.recording import Recorded
from rlsched.envs.sequences import Markov
from rlsched.envs.tasks import next_token_loss


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Record at the second call, so that the first shows what was to be recorded."""
    monkeypatch.setattr(recording, "CALLS", 1)


class Counted:
    """A function that knows how often it was run."""

    def __init__(self, function):
        self.function, self.runs = function, 0

    def __call__(self, *arguments):
        self.runs += 1
        return self.function(*arguments)


def test_recording_is_the_function_to_the_bit():
    """A run would depend on when its steps were recorded, and one that is resumed would be another run."""

    def step(weights, options, inputs, factor):
        weights["average"].lerp_(inputs.mean(0), 0.5)
        dropped = nn.functional.dropout(inputs, 0.5)
        loss = lambda w, x: factor * (x @ w - options[0]).square().mean()  # noqa: E731
        return {"gradient": vmap(grad(loss), (0, None), randomness="different")(weights["w"], dropped)}, dropped

    def run(function):
        weights = {"w": torch.arange(6.0).view(2, 3), "average": torch.zeros(3)}
        with seeded(3):
            seen = []
            for i in range(4):
                results, dropped = function(weights, (torch.tensor(i / 3), "name"), torch.full((5, 3), 1.0 + i), 2)
                weights["w"] = weights["w"] - 0.1 * results["gradient"]
                seen += [weights["w"], weights["average"].clone(), dropped, torch.rand(())]
        return seen

    counted = Counted(step)
    expected, recorded = run(step), run(Recorded(counted))
    assert counted.runs == 2, "one call, and the recording"
    for one, other in zip(recorded, expected, strict=True):
        assert torch.equal(one, other)


def test_each_shape_and_setting_has_its_recording():
    """The sizes of one stack, and whether it measures, would be those of the next."""
    counted = Counted(lambda x, twice: x.sum() * (2 if twice else x.shape[0]))
    function = Recorded(counted)
    for _ in range(3):
        for length, twice in ((3, True), (3, False), (4, True), (4, False)):
            assert function(torch.ones(length), twice) == length * (2 if twice else length)
    assert counted.runs == 8


@pytest.mark.parametrize("draw", [random.random, np.random.random])
def test_random_numbers_from_elsewhere_are_drawn_anew(draw):
    """The numbers of the recording would come again at every step: a network that drops the same layer for ever."""
    function = Recorded(lambda x: x * draw())
    assert len({float(function(torch.ones(()))) for _ in range(6)}) == 6


def test_what_cannot_be_recorded_is_called_and_named():
    """A network that decides by the numbers that it sees must not be held to its first decision."""
    function = Recorded(lambda x: -x if x.sum().item() < 0 else x)
    function(torch.ones(2))
    with pytest.warns(UserWarning, match=r"^inner steps cannot be recorded, which is slower. The reason: \w"):
        assert torch.equal(function(torch.ones(2)), torch.ones(2))
    assert torch.equal(function(-torch.ones(2)), torch.ones(2))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap over an LSTM
def test_what_cannot_be_replayed_is_not_recorded():
    """Operations that torch records and cannot call, an LSTM's, would end a training in its midst."""
    network = partial(Recurrent, 8, 4, cell="lstm")
    task = InnerTask(network, Markov(tokens=8, length=6), next_token_loss, batch_size=4, interval=3)
    env = SchedulingVectorEnv(1, [task])
    env.reset(seed=0)
    with pytest.warns(UserWarning, match="inner steps cannot be recorded, which is slower. The reason: "):
        for _ in range(3):
            _, rewards, *_ = env.step(np.zeros(env.action_space.shape, np.float32))
    assert np.isfinite(rewards).all()
