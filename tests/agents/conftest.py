"""A mixture so small that PPO trains on it in seconds."""

import io
from contextlib import redirect_stderr
from types import SimpleNamespace

import pytest
import torch

from rlsched.agents import TrainConfig, train
from rlsched.envs import MIXTURES, SetupDistribution
from rlsched.envs.mixtures import classifier
from rlsched.envs.sources import TeacherStudent

SOURCE = TeacherStudent(inputs=6, classes=3, points=(32, 64), validation_points=16)
SETUP = SetupDistribution(decisions=(6, 9), sgd_lr=(1e-4, 1e-1), adaptive_lr=(1e-4, 1e-2))
TINY = tuple(classifier(SOURCE, hidden, batch_size=8, interval=4, setup=SETUP) for hidden in ((8,), (5,)))
# Three updates.
OPTIONS = {
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


@pytest.fixture
def tiny(monkeypatch):
    """The inner tasks of the mixture that is called "tiny" while the test runs."""
    monkeypatch.setitem(MIXTURES, "tiny", TINY)
    return TINY


@pytest.fixture
def make_config(tiny, tmp_path):
    """A configuration of three updates, in a folder of its own."""
    return lambda **options: TrainConfig(**{"run_dir": str(tmp_path / "run"), **OPTIONS, **options})


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A training that is done, for tests that only look at what it left: `config`, `policy`, and what was `shown`."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(io.StringIO()) as shown:
        patch.setitem(MIXTURES, "tiny", TINY)
        config = TrainConfig(run_dir=str(tmp_path_factory.mktemp("trained") / "run"), **OPTIONS)
        return SimpleNamespace(config=config, policy=train(config), shown=shown.getvalue())
