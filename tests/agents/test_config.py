"""A configuration says what is wrong with it before hours are spent on it."""

import json

import pytest

from rlsched.agents import PRESETS, TrainConfig


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
    ],
)
def test_wrong_field_is_named(options, field):
    """A wrong number would surface an hour later, or never."""
    with pytest.raises(ValueError, match=rf"^{field} must "):
        TrainConfig(**options)


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
