"""The policies that ship."""

import math
from dataclasses import replace

import pytest

from rlsched import SchedulePolicy
from rlsched.agents.config import COMMITTEES, TrainConfig
from rlsched.committee import CORRECTIONS
from rlsched.experiments.compare.run import Trial, perform
from rlsched.experiments.compare.tasks import digits
from rlsched.policy import available


def test_default_policy_ships():
    """`policy="default"` is what every user gets who says nothing."""
    assert "default" in available()
    assert SchedulePolicy.load("default").safe_start


@pytest.mark.parametrize("name", available())
def test_shipped_policy_says_how_it_was_trained_and_scored(name):
    """A policy of unknown origin cannot be reproduced, judged or trusted."""
    info = SchedulePolicy.load(name).info
    for trained in info.get("committee", [info]):
        assert trained["training"]["timesteps_done"] > 0
        assert trained["evaluation"]["return"] > trained["evaluation"]["return_of_zero_policy"]


def test_default_policy_is_the_committee_that_a_command_trains_again():
    """The one policy that everybody has would be one that nobody can make again."""
    policy, (members, corrections) = SchedulePolicy.load("default"), COMMITTEES["shipped"]
    assert {name: policy.info.get(name) for name in CORRECTIONS} == corrections
    for made, settings in zip(policy.info["committee"], members.values(), strict=True):
        asked = TrainConfig(**settings)
        for name in ("tasks", "num_envs", "timesteps", "hidden", "batch_size", "n_epochs", "seed", "learning_rate"):
            there = made["training"][name]
            assert (tuple(there) if isinstance(there, list) else there) == getattr(asked, name), name


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("lr_factor", [0.1, 10.0])
def test_default_policy_repairs_a_wrong_learning_rate(optimizer, lr_factor):
    """The promise of the package: a base learning rate that is wrong by ten costs little, where linear decay fails."""
    trial = Trial("digits", optimizer, 300, "policy", lr_factor, seed=0)
    learned = perform(trial, digits(), SchedulePolicy.load("default"))
    chance = math.log(math.log(10))
    assert learned["log_loss"] < chance - 1.5
    if (optimizer, lr_factor) != ("adam", 10.0):  # there ten times the usual default is a good rate for so short a run
        linear = perform(replace(trial, schedule="linear"), digits(), SchedulePolicy.zero())
        assert learned["log_loss"] < linear["log_loss"] - 0.5
