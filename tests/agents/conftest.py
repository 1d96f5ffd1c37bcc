"""A mixture so small that PPO trains on it in seconds."""

import pytest

from rlsched.agents import TrainConfig
from rlsched.envs import MIXTURES, SetupDistribution
from rlsched.envs.mixtures import classifier
from rlsched.envs.sources import TeacherStudent


@pytest.fixture
def tiny(monkeypatch):
    """The inner tasks of the mixture that is called "tiny" while the test runs."""
    source = TeacherStudent(inputs=6, classes=3, points=(32, 64), validation_points=16)
    setup = SetupDistribution(decisions=(6, 9), sgd_lr=(1e-4, 1e-1), adaptive_lr=(1e-4, 1e-2))
    tasks = tuple(classifier(source, hidden, batch_size=8, interval=4, setup=setup) for hidden in ((8,), (5,)))
    monkeypatch.setitem(MIXTURES, "tiny", tasks)
    return tasks


@pytest.fixture
def make_config(tiny, tmp_path):
    """A configuration of three updates, in a folder of its own."""

    def make(**options):
        defaults = {
            "run_dir": str(tmp_path / "run"),
            "tasks": "tiny",
            "timesteps": 3 * 32,
            "num_envs": 4,
            "processes": 1,
            "n_steps": 8,
            "batch_size": 16,
            "n_epochs": 1,
            "hidden": (8,),
            "eval_every": 2,
            "eval_episodes": 3,
        }
        return TrainConfig(**{**defaults, **options})

    return make
