"""A configuration says what is wrong with it before hours are spent on it."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from rlsched.agents import PRESETS, TrainConfig
from rlsched.policy import SchedulePolicy


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"tasks": "nothing"}, "tasks"),
        ({"timesteps": 0}, "timesteps"),
        ({"timesteps": 1000}, "timesteps"),
        ({"num_envs": -1}, "num_envs"),
        ({"num_envs": 2, "processes": 3, "n_steps": 2048}, "processes"),
        ({"processes": 0}, "processes"),
        ({"n_steps": 0}, "n_steps"),
        ({"batch_size": 10**6}, "batch_size"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"final_learning_rate": math.inf}, "final_learning_rate"),
        ({"gae_lambda": 1.01}, "gae_lambda"),
        ({"gae_lambda": -0.01}, "gae_lambda"),
        ({"gae_lambda": math.nan}, "gae_lambda"),
        ({"log_std_init": 1e3}, "log_std_init"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"eval_seed": -1}, "eval_seed"),
        ({"batch_size": 1}, "batch_size"),
        ({"timesteps": 1e6}, "timesteps"),
        ({"timesteps": "many"}, "timesteps"),
        ({"n_epochs": True}, "n_epochs"),
        ({"compile": "yes"}, "compile"),
        ({"compile": 1}, "compile"),
        ({"learning_rate": "1e-3"}, "learning_rate"),
        ({"run_dir": 3}, "run_dir"),
        ({"tasks": None}, "tasks"),
        ({"tasks": "json:dumps"}, "tasks"),
        ({"reward": ["best"]}, "reward"),
        ({"hidden": 64}, "hidden"),
        ({"hidden": (64.0,)}, "hidden"),
        ({"hidden": (10**6, 10**6)}, "hidden"),
        ({"controls": 3}, "controls"),
        ({"target_kl": -1.0}, "target_kl"),
        ({"hidden": ()}, "hidden"),
        ({"hidden": (64, 0)}, "hidden"),
        ({"activation": "gelu"}, "activation"),
        ({"observations": ("progress", "mood")}, "observations"),
        ({"observations": ("progress", "progress")}, "observations"),
        ({"observations": "progress"}, "observations"),
        ({"observations": ()}, "observations"),
        ({"controls": ("lr", "mood")}, "controls"),
        ({"controls": ()}, "controls"),
        ({"base_schedule": "mood"}, "base_schedule"),
        ({"actor": "mood"}, "actor"),
        ({"reward": "loss"}, "reward"),
        ({"device": "nowhere"}, "device"),
        ({"device": "meta"}, "device"),
        ({"eval_episodes": 0}, "eval_episodes"),
        ({"clones": 0}, "clones"),
        ({"clones": 3}, "clones"),
        ({"num_envs": 8, "clones": 8, "n_steps": 2048, "processes": 2}, "processes"),
        ({"safe_start": 0.0}, "safe_start"),
        ({"safe_start": 1.5}, "safe_start"),
        ({"averaging": -1.0}, "averaging"),
        ({"exploration": "mood"}, "exploration"),
        ({"initial_policy": "nothing.safetensors"}, "initial_policy"),
        ({"initial_policy": "http://127.0.0.1:9"}, "initial_policy"),
        ({"initial_policy": "default", "hidden": (5,)}, "hidden"),
        ({"initial_policy": "default", "controls": ("lr",)}, "controls"),
    ],
)
def test_wrong_field_is_named(options, field):
    """A wrong number would surface an hour later, or never."""
    with pytest.raises(ValueError, match=rf"^('\S+': )?{field} must "):
        TrainConfig(**options)


def test_interface_is_that_of_the_initial_policy():
    """Whoever trains a policy further would have to type its twenty observations, and could leave out one."""
    policy = SchedulePolicy.load("default")
    config = TrainConfig(initial_policy="default", safe_start=0.5)
    assert (config.observations, config.controls) == (policy.observations, policy.controls)
    assert config.hidden == policy.actor.hidden != TrainConfig().hidden
    assert (config.safe_start, config.base_schedule) == (0.5, policy.base_schedule.name)


def test_numbers_and_paths_of_any_library_will_do():
    """A sweep counts in NumPy, and a folder is a path; JSON, to which both are written, knows neither."""
    config = TrainConfig(run_dir=Path("runs"), seed=np.int64(3), gae_lambda=np.float32(0.5), hidden=[np.int32(8)])
    assert (config.run_dir, config.seed, config.gae_lambda, config.hidden) == ("runs", 3, 0.5, (8,))
    assert json.loads(json.dumps(config.hyperparameters())) == config.hyperparameters()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid(preset):
    """A preset is what the README tells a newcomer to run first."""
    TrainConfig(**PRESETS[preset])


def test_hyperparameters_survive_json():
    """A run is resumed only if its configuration, read back, equals itself."""
    hyperparameters = TrainConfig(run_dir="somewhere", processes=1).hyperparameters()
    assert json.loads(json.dumps(hyperparameters)) == hyperparameters
    elsewhere = TrainConfig(run_dir="elsewhere", processes=2, device="cpu:0", compile=True)
    assert hyperparameters == elsewhere.hyperparameters()
    assert hyperparameters != TrainConfig(reward="training").hyperparameters()
    assert hyperparameters != TrainConfig(controls=("lr",)).hyperparameters()
