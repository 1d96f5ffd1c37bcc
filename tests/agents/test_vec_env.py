"""Stable-Baselines3 sees the vector environment as its own kind."""

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from helpers import Losing

from rlsched.agents.vec_env import VectorEnvAdapter
from rlsched.envs import SchedulingVectorEnv
from rlsched.envs.sharding import ShardedVectorEnv


def test_episode_ends_are_told_as_stable_baselines_expects(tiny):
    """A missing terminal observation or a false truncation makes PPO add a value that is not there."""
    runs = 4
    env, plain = VectorEnvAdapter(SchedulingVectorEnv(runs, tiny)), SchedulingVectorEnv(runs, tiny)
    env.seed(7)
    np.testing.assert_array_equal(env.reset(), plain.reset(seed=7)[0])
    returns, lengths, episodes = np.zeros(runs), np.zeros(runs, int), 0
    for step in range(20):
        actions = np.random.default_rng(step).uniform(-1, 1, plain.action_space.shape).astype(np.float32)
        observations, rewards, done, infos = env.step(actions)
        expected, expected_rewards, ended, _, raw = plain.step(actions)
        np.testing.assert_array_equal(observations, expected)
        np.testing.assert_array_equal(rewards, expected_rewards)
        np.testing.assert_array_equal(done, ended)
        returns += rewards
        lengths += 1
        for run, info in enumerate(infos):
            if not done[run]:
                assert info == {}
                continue
            episodes += 1
            np.testing.assert_array_equal(info["terminal_observation"], raw["final_obs"][run])
            assert info["TimeLimit.truncated"] is False
            assert info["episode"] == {"r": pytest.approx(returns[run]), "l": lengths[run]}
            assert info["validation_loss"] == raw["final_info"]["validation_loss"][run]
            returns[run], lengths[run] = 0, 0
    assert episodes >= 2 * runs


def test_episode_that_was_cut_short_is_continued_by_its_value_and_counts_as_none(tiny):
    """PPO would learn that a worker's death is the end of a run, and its returns would be told as those of episodes."""
    env = VectorEnvAdapter(ShardedVectorEnv(4, tiny, transport=Losing))
    seen = env.reset()
    env.env._transport.times = 1
    _, rewards, done, infos = env.step(np.zeros((4, *env.action_space.shape), np.float32))
    assert done.tolist() == [False, True] * 2
    for run in (1, 3):
        assert rewards[run] == 0 and infos[run]["TimeLimit.truncated"] is True and "episode" not in infos[run]
        np.testing.assert_array_equal(infos[run]["terminal_observation"], seen[run])


def test_seeds_hold_for_one_reset(tiny):
    """Resetting twice to the same seeds would train on the same episodes twice."""
    env = VectorEnvAdapter(SchedulingVectorEnv(2, tiny))
    env.seed(7)
    first, second = env.reset(), env.reset()
    assert not np.allclose(first, second)
    env.seed(7)
    np.testing.assert_array_equal(env.reset(), first)


def test_attributes_are_those_of_the_environment(tiny):
    """Stable-Baselines3 asks for render_mode of each environment when it wraps one."""
    env = VectorEnvAdapter(SchedulingVectorEnv(3, tiny))
    assert env.get_attr("render_mode") == [None] * 3
    assert env.get_attr("num_envs", indices=[0, 1]) == [3, 3]
    assert env.env_is_wrapped(gymnasium.Wrapper) == [False] * 3
    with pytest.raises(AttributeError, match="speed"):
        env.set_attr("speed", 1)
    with pytest.raises(AttributeError, match="speed"):
        env.env_method("speed")


def test_other_ways_to_reset_are_refused(tiny):
    """An environment that resets in the next step gives observations that belong to no episode."""
    with pytest.raises(ValueError, match="SAME_STEP"):
        VectorEnvAdapter(SchedulingVectorEnv(2, tiny, autoreset_mode="Disabled"))
    sync = gymnasium.vector.SyncVectorEnv(
        [lambda: gymnasium.make("CartPole-v1")], autoreset_mode=AutoresetMode.NEXT_STEP
    )
    with pytest.raises(ValueError, match="NEXT_STEP"):
        VectorEnvAdapter(sync)
