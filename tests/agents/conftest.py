"""Trainings on the tiny mixture."""

import io
from contextlib import redirect_stderr
from types import SimpleNamespace

import pytest
import torch
from tiny import OPTIONS, TINY

from rlsched.agents import TrainConfig, train
from rlsched.envs import MIXTURES


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
