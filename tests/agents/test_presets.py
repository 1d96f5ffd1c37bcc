"""Presets by name, and in files."""

import re

import pytest

from rlsched.actors import Perceptron
from rlsched.agents.commands.train import _configs
from rlsched.agents.config import COMMITTEES, PRESETS, TrainConfig
from rlsched.agents.presets import preset, write_preset
from rlsched.cli import _parser, main
from rlsched.policy import SchedulePolicy


def test_what_was_written_is_what_is_trained(tmp_path):
    """A best configuration that loses a setting on its way to a file is another one, and nobody would notice."""
    there = TrainConfig(hidden=(8, 5), learning_rate=1e-5, averaging=3, tasks="small", privileged_critic=True)
    path = write_preset(tmp_path / "mine.toml", ["found"], {"all": there.hyperparameters()})
    (config,) = _configs(_parser().parse_args(["train", "--preset", str(path), "--seed", "7"]))
    assert config.hyperparameters() == {**there.hyperparameters(), "seed": 7}
    assert config.run_dir == "runs/mine"


@pytest.mark.parametrize("name", PRESETS)
def test_name_is_a_preset_as_before(name):
    """A file beside it of the same name must not take its place, nor its settings be changed by who asks for them."""
    settings = preset(name)
    settings["seed"] = 1
    assert preset(name) == PRESETS[name]


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rat = 1", r"mine.toml: 'learning_rat' is no setting of a training: did you mean learning_rate\?"),
        ("zzz = 1", "mine.toml: 'zzz' is no setting of a training: there are run_dir, tasks, "),
        ("learning_rate = ", "mine.toml is no TOML file: "),
        ("learning_rate = { low = 1, high = 2 }", "mine.toml: learning_rate must be a value, got {'low': 1"),
        ("hidden = 5", "mine.toml: hidden must be a list, got 5"),
        ("hidden = [3.5]", "hidden must"),
        ("learning_rate = [3]", "learning_rate must be positive and finite, got "),
        ("observations = [1]", "observations"),
    ],
)
def test_file_that_is_none_is_told_in_a_line(text, message, tmp_path):
    """A misspelt setting would be left at its default for hours of training."""
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        _configs(_parser().parse_args(["train", "--preset", str(path)]))


def test_preset_that_is_not_there_says_what_there_is():
    """A file that was to be read, and a name that was misspelt, look alike."""
    with pytest.raises(ValueError, match=re.escape("--preset must be one of ['broad', 'default', 'demo'], or a .toml")):
        preset("best")
    with pytest.raises(FileNotFoundError):
        preset("best.toml")


@pytest.mark.parametrize("name", COMMITTEES)
def test_committee_is_trained_by_one_command(name, monkeypatch, tmp_path, capsys):
    """Whoever trains the shipped policy again would have to know what it is made of; or would get one of its parts."""
    trained = []

    def train(config):
        trained.append(config)
        actor = Perceptron(len(config.observations), len(config.controls), config.hidden)
        policy = SchedulePolicy(actor, config.observations, config.controls)
        policy.info["evaluation"] = dict.fromkeys(("return", "return_of_zero_policy", "regret", "share_better"), 0.5)
        return policy

    monkeypatch.setattr("rlsched.agents.train", train)
    run_dir = tmp_path / "mine"
    assert main(["train", "--preset", name, "--run-dir", str(run_dir), "--seed", "7"]) == 0
    assert [config.run_dir for config in trained] == [str(run_dir / each) for each in COMMITTEES[name].members]
    for config, settings in zip(trained, COMMITTEES[name].members.values(), strict=True):
        assert config.seed == 7 and {key: getattr(config, key) for key in settings} == settings
    assert f"committee   {run_dir / 'policy.safetensors'}" in capsys.readouterr().out
    made = SchedulePolicy.load(run_dir / "policy.safetensors")
    assert len(made.info["committee"]) == len(trained)
    assert {**made.info, **COMMITTEES[name].corrections} == made.info
