"""The critic is told what the actor is not, and the actor is not told."""

import math

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO

from rlsched.agents import TrainConfig, train
from rlsched.agents.critic import Privileged, PrivilegedCriticPolicy
from rlsched.agents.exporting import CHECKPOINT, load_checkpoint
from rlsched.agents.vec_env import VectorEnvAdapter
from rlsched.envs import SchedulingVectorEnv
from rlsched.envs.mixtures import names

INFOS = {
    "return": np.array([1.0, -2.0, 0.0, 20.0], np.float32),
    "validation_loss": np.array([2.0, math.inf, math.nan, 0.0], np.float32),
    "best_validation_loss": np.array([1.0, 1.0, math.nan, 0.0], np.float32),
    "lr": np.array([1.0, math.exp(-5), 0.0, 1.0], np.float32),
    "family": np.array(["one", "one", "other", "other"], object),
}


def test_critic_is_told_numbers_whatever_became_of_the_run():
    """One NaN in a rollout would make all weights of actor and critic NaN."""
    privileged = Privileged(["one", "other", "third"])
    told = privileged.of(INFOS)
    assert told.shape == (4, privileged.size) and told.dtype == np.float32
    expected = [
        [0.5, math.log(2), 0, 1, 0, 0],
        [-1, 5, -1, 1, 0, 0],
        [0, 0, -5, 0, 1, 0],
        [5, 0, 0, 0, 1, 0],
    ]
    np.testing.assert_allclose(told, expected, rtol=1e-6)


def test_adapter_tells_of_the_run_that_goes_on_and_of_the_one_that_has_ended(tiny):
    """The value of a run's last state would be that of the next run's first."""
    runs = 4
    plain = SchedulingVectorEnv(runs, tiny, clones=2)
    privileged = Privileged(names(tiny))
    env = VectorEnvAdapter(SchedulingVectorEnv(runs, tiny, clones=2), privileged)
    seen = plain.single_observation_space.shape[0]
    env.seed(3)
    observations, (expected, infos) = env.reset(), plain.reset(seed=[3, 4, 5, 6])
    ended = 0
    for _ in range(12):
        assert env.observation_space.shape == observations[0].shape == (seen + privileged.size,)
        np.testing.assert_array_equal(observations[:, :seen], expected)
        np.testing.assert_array_equal(observations[:, seen:], privileged.of(infos))
        actions = np.zeros(plain.action_space.shape, np.float32)
        observations, _, done, listed = env.step(actions)
        expected, *_, infos = plain.step(actions)
        for run in np.flatnonzero(done):
            last = np.concatenate([infos["final_obs"][run], privileged.of(infos["final_info"])[run]])
            np.testing.assert_array_equal(listed[run]["terminal_observation"], last)
            ended += 1
    assert ended


@pytest.fixture
def run(make_config):
    """The configuration of a training with such a critic, and its policy."""
    config = make_config(privileged_critic=True, clones=2)
    return config, train(config)


def test_actor_does_not_see_what_the_critic_is_told(run):
    """A policy that had seen it would be another one in use, where nobody can tell it."""
    config, policy = run
    model = PPO.load(f"{config.run_dir}/{CHECKPOINT}")
    assert isinstance(model.policy, PrivilegedCriticPolicy)
    seen = len(config.observations)
    observations = torch.rand(16, *model.observation_space.shape)
    others = torch.cat([observations[:, :seen], 1 + observations[:, seen:]], 1)
    values, _, _ = model.policy.evaluate_actions(observations, torch.zeros(16, len(config.controls)))
    other_values, _, _ = model.policy.evaluate_actions(others, torch.zeros(16, len(config.controls)))
    assert (values - other_values).abs().min() > 1e-4
    actions, other_actions = (model.predict(each.numpy(), deterministic=True)[0] for each in (observations, others))
    np.testing.assert_array_equal(actions, other_actions)
    exported = load_checkpoint(config.run_dir)
    assert exported.digest == policy.digest
    expected = policy.actor(observations[:, :seen])[0].clamp(-1, 1)
    np.testing.assert_allclose(actions, expected, atol=1e-6)


def test_interrupted_training_with_such_a_critic_goes_on(run):
    """Hours of training would be lost."""
    config, policy = run
    longer = TrainConfig(**{**vars(config), "timesteps": config.timesteps + 32})
    further = train(longer)
    assert further.info["training"]["timesteps_done"] == longer.timesteps
    assert further.digest != policy.digest


def test_memory_goes_with_a_critic_that_sees_what_it_sees(make_config):
    """What an LSTM saw in training alone would be in what it remembers."""
    with pytest.raises(ValueError, match=r"^actor must be 'perceptron' for a privileged_critic, got 'recurrent'"):
        make_config(privileged_critic=True, actor="recurrent")
