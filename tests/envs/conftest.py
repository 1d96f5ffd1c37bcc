"""Inner tasks that train in milliseconds."""

import numpy as np
import pytest

from rlsched.envs import SetupDistribution
from rlsched.envs.mixtures import classifier
from rlsched.envs.sources import TeacherStudent

# Learning rates at which training is stable: at its edge, rounding errors grow until two runs have nothing in common.
STABLE = {"decisions": (4, 7), "sgd_lr": (1e-4, 3e-3), "adaptive_lr": (1e-4, 3e-3)}


@pytest.fixture
def make_task():
    """A tiny inner task; options of its set-up go by their names. It can be pickled for a worker process."""

    def make(hidden=(8,), **setup):
        source = TeacherStudent(inputs=6, classes=3, points=(32, 64), validation_points=16)
        return classifier(source, hidden, batch_size=8, interval=4, setup=SetupDistribution(**{**STABLE, **setup}))

    return make


@pytest.fixture
def play():
    """Plays random actions, the same for each run whatever the number of runs; returns everything that came back."""

    def play(env, *, seed, steps, runs=None):
        runs = range(env.num_envs) if runs is None else runs
        shape = (steps, *env.single_action_space.shape)
        drawn = np.stack([np.random.default_rng(run).uniform(-1, 1, shape) for run in runs], 1)
        observations, infos = env.reset(seed=seed)
        history = [(observations, np.zeros(len(runs)), np.zeros(len(runs), bool), infos)]
        for actions in drawn.astype(np.float32):
            observations, rewards, terminated, truncated, infos = env.step(actions)
            assert not truncated.any()
            history.append((observations, rewards, terminated, infos))
        return history

    return play
