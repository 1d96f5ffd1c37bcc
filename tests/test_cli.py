"""The `rlsched` command."""

import sys

import pytest
import torch
from matplotlib.figure import Figure

import rlsched
from rlsched import SchedulePolicy
from rlsched.cli import main
from rlsched.envs import SetupDistribution
from rlsched.envs.mixtures import classifier
from rlsched.envs.sources import TeacherStudent

SOURCE = TeacherStudent(inputs=6, classes=3, points=(32, 64), validation_points=16)
TASK = classifier(SOURCE, (8,), batch_size=8, interval=4, setup=SetupDistribution(decisions=(6, 9)))
SIZES = {"num-envs": 8, "n-steps": 4, "batch-size": 16, "timesteps": 64, "processes": 1, "eval-episodes": 4}
TINY = ["--tasks", f"{__name__}:TASK", *(word for name, value in SIZES.items() for word in (f"--{name}", str(value)))]

MODULE = """
from functools import partial
import torch
from torch import nn
from rlsched.envs import InnerTask, SetupDistribution

POINTS = torch.linspace(-1, 1, 60).view(20, 3), torch.arange(20) % 4
MINE = InnerTask(partial(nn.Linear, 3, 4), POINTS, batch_size=4, interval=4, setup=SetupDistribution(decisions=(3, 5)))
"""


def test_train_compare_export_work_on_each_others_output(tmp_path, capsys):
    """The three verbs are one path for a newcomer: what one writes the next must read."""
    run_dir, out = tmp_path / "run", tmp_path / "compare"
    assert main(["train", "--run-dir", str(run_dir), *TINY]) == 0
    printed = capsys.readouterr().out
    policy_file = run_dir / "policy.safetensors"
    assert str(policy_file) in printed
    exported = tmp_path / "exported.safetensors"
    assert main(["export", str(run_dir), "--out", str(exported)]) == 0
    assert SchedulePolicy.load(exported).digest == SchedulePolicy.load(policy_file).digest
    arguments = [
        "--policy",
        str(policy_file),
        "--steps",
        "5",
        "--seeds",
        "1",
        "--optimizers",
        "adam",
        "--out",
        str(out),
    ]
    assert main(["compare", *arguments]) == 0
    assert torch.get_num_threads() == 1, "the user had chosen it: two on a busy machine can be ten times slower"
    printed = capsys.readouterr().out
    assert "digits, adam, 5 steps" in printed
    for name in ("table.md", "plot.png", "runs.jsonl", "tensorboard"):
        assert str(out / name) in printed
        assert (out / name).exists()


def test_tasks_in_a_module_of_this_folder(tmp_path, monkeypatch, capsys):
    """The installed command, unlike `python -m`, does not look there by itself; a user's own tasks lie nowhere else."""
    (tmp_path / "my_tasks_here.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    monkeypatch.delitem(sys.modules, "my_tasks_here", raising=False)
    monkeypatch.setattr("rlsched.agents.ppo.episode_paths", lambda policy, zero: Figure((1, 1)))  # takes seconds
    sizes = [word for word in TINY if word not in TINY[:2]]
    options = ["--observations", "progress", "loss_trend", "--controls", "lr", "clip", "--hidden", "4"]
    assert main(["train", "--run-dir", "run", "--tasks", "my_tasks_here:MINE", *sizes, *options]) == 0
    policy = SchedulePolicy.load("run/policy.safetensors")
    assert (policy.observations, policy.controls) == (("progress", "loss_trend"), ("lr", "clip"))
    compared = ["--tasks", "my_tasks_here:MINE", "--steps", "4", "--seeds", "1", "--optimizers", "sgd", "--out", "out"]
    assert main(["compare", "--policy", "run/policy.safetensors", *compared]) == 0
    assert "my_tasks_here:MINE, sgd, 4 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--preset", "huge"], "preset"),
        (["train", "--tasks", "imagenet"], "tasks"),
        (["train", "--timesteps", "0"], "timesteps"),
        (["train", "--reward", "loss"], "reward"),
        (["train", "--device", "nowhere"], "device"),
        (["train", "--observations", "progress", "mood"], "observations"),
        (["train", "--controls", "mood"], "controls"),
        (["train", "--base-schedule", "mood"], "base_schedule"),
        (["train", "--actor", "mood"], "actor"),
        (["compare", "--policy", "nothing.safetensors"], "nothing.safetensors"),
        (["compare", "--policy", "nobody"], "nobody"),
        (["compare", "--tasks", "imagenet"], "tasks"),
        (["compare", "--tasks", "mnist"], "--data"),
        (["compare", "--tasks", "mnist", "--data", "nowhere"], "nowhere"),
        (["export", "nowhere", "--out", "x.safetensors"], "nowhere"),
    ],
)
def test_wrong_input_is_one_clear_line(arguments, message, tmp_path, monkeypatch, capsys):
    """A traceback hides which argument was wrong."""
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"rlsched {arguments[0]}: error: ")
    assert message in error


@pytest.mark.parametrize("verb", ["train", "compare", "export"])
def test_help_has_examples(verb, capsys):
    """Somebody who asks for help wants a line to copy."""
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "examples:" in printed
    assert f"rlsched {verb}" in printed


def test_interrupt_is_no_traceback(monkeypatch, capsys):
    """Ctrl-C during a long training should say how to go on."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("rlsched.cli._train", interrupt)
    assert main(["train"]) == 130
    assert "same command" in capsys.readouterr().err


def test_version(capsys):
    """Bug reports need it."""
    with pytest.raises(SystemExit):
        main(["--version"])
    assert rlsched.__version__ in capsys.readouterr().out
