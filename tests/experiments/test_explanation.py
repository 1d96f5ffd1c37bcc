"""`rlsched explain`: what it writes and prints."""

import csv
import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from helpers import lively_policy, network, train
from matplotlib.figure import Figure
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlsched import ScheduledOptimizer
from rlsched.cli import main
from rlsched.decisions import NAME
from rlsched.envs import SetupDistribution
from rlsched.envs.mixtures import classifier
from rlsched.envs.sources import TeacherStudent

pytest.importorskip("captum")
from rlsched.experiments.explain.explanation import Explanation

SOURCE = TeacherStudent(inputs=6, classes=3, points=(32, 64), validation_points=16)
TASK = classifier(SOURCE, (8,), batch_size=8, interval=4, setup=SetupDistribution(decisions=(6, 9)))
SEEN, CONTROLS = ("progress", "grad_cosine", "lr"), ("lr",)
TABLES = ("decisions.csv", "attributions.csv", "importance.csv", "responses.csv")
PLAYED = ["--tasks", f"{__name__}:TASK", "--episodes", "3", "--seed", "7"]


@pytest.fixture
def policy(tmp_path):
    """The file of a policy."""
    return str(lively_policy(observations=SEEN, controls=CONTROLS).save(tmp_path / "policy.safetensors"))


@pytest.fixture
def run(policy, tmp_path):
    """The folder of a run under it."""
    pytest.importorskip("tensorboard")
    model = network()
    inner = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    optimizer = ScheduledOptimizer(inner, total_steps=21, decisions=5, policy=policy, log_dir=tmp_path / "run")
    train(model, optimizer, range(21))
    return tmp_path / "run"


def rows(path):
    """The rows of a table, by the names of their columns."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_episodes_are_explained(policy, tmp_path, capsys):
    """Tables that do not agree with each other, a picture without a picture, or a page that leads nowhere."""
    out = tmp_path / "out"
    assert main(["explain", policy, *PLAYED, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) < 40, "more than a screen"
    data, (decisions, attributions, importance, responses) = (
        json.loads((out / "explanation.json").read_text()),
        (rows(out / name) for name in TABLES),
    )
    assert data["decisions"] == len(decisions) == len(attributions) >= 3 * 6 and data["runs"] == 3
    for row in attributions:
        total = sum(float(row[name]) for name in SEEN)
        assert total == pytest.approx(float(row["action"]) - float(row["at_typical"]), abs=1e-4)
        assert float(row["applied"]) == pytest.approx(np.clip(float(row["action"]), -1, 1), abs=1e-5)
    sizes = {name: np.mean([abs(float(row[name])) for row in attributions]) for name in SEEN}
    assert data["controls"]["lr"]["importance"] == pytest.approx(sizes, rel=1e-3)
    assert {row["observation"]: float(row["all"]) for row in importance} == pytest.approx(sizes, rel=1e-3)
    assert {row["observation"] for row in responses} == set(SEEN)
    page = (out / "explanation.md").read_text()
    pictures = re.findall(r"\]\((.*?)\)", page)
    assert pictures == ["importance.png", "decisions-1.png", "response-lr.png", "fidelity.png"]
    for name in pictures:
        assert imread(out / name)[..., :3].std() > 0.05, "an empty picture"
    rules = data["controls"]["lr"]["rules"]
    assert rules.keys() == {"tree", "linear"}
    for found in rules.values():
        assert f"{found['r2']:.2f}" in page and all(line in page for line in found["lines"])
    assert re.search(r"R² \S+ and \d+% equal signs on runs held out", printed)


def test_run_is_explained_in_tensorboard(policy, run, tmp_path, monkeypatch, capsys):
    """Who looks at a run in TensorBoard would not see why it was led so; twice explained, they would see it twice."""
    monkeypatch.setattr(Explanation, "figures", lambda self: iter([("importance", Figure((1, 1)))]))
    other = run.parent / "other"
    shutil.copytree(run, other)
    out = ["--out", str(tmp_path / "out")]
    for arguments, folder in (
        (["--run", str(run)], run),
        (["--run", str(run)], run),
        (["--run", str(run), str(other)], run.parent),
        ([*PLAYED, "--tensorboard", str(tmp_path / "board")], tmp_path / "board"),
    ):
        assert main(["explain", policy, *arguments, *out]) == 0
        assert str(folder / "explanation") in capsys.readouterr().out
        (file,) = (folder / "explanation").iterdir()
        log = EventAccumulator(str(file)).Reload()
        assert log.Tags()["images"] == ["rlsched_explanation/01 importance"]
        (text,) = log.Tags()["tensors"]
        assert "Why the policy decided so" in log.Tensors(text)[0].tensor_proto.string_val[0].decode()


def test_run_is_explained(policy, run, tmp_path, monkeypatch, capsys):
    """A user's own run is the one that is asked about. Rules of one run cannot be held against another, and say so."""
    monkeypatch.setattr(Explanation, "figures", lambda self: iter(()))  # drawn in the test above, and slow
    assert main(["explain", policy, "--run", str(run), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert f"4 of {run}" in printed and "There are no rules" in printed
    table = rows(tmp_path / "out" / "decisions.csv")
    assert [int(row["step"]) for row in table] == [1, 6, 11, 16] and table[0]["course"] == str(run)
    assert "There are no rules" in (tmp_path / "out" / "explanation.md").read_text()


def test_wrong_input_is_one_clear_line(policy, run, tmp_path, monkeypatch, capsys):
    """A traceback from three layers down says nothing of the argument that was wrong."""
    monkeypatch.chdir(tmp_path)
    other = str(lively_policy(seed=2).save("other.safetensors"))
    for name, content in (
        ("empty", None),
        ("foreign", "a,b\n"),
        ("later", '{"rlsched_decisions": 99, "policy": "x"}\n'),
    ):
        (tmp_path / name).mkdir()
        if content:
            (tmp_path / name / NAME).write_text(content)
    (tmp_path / "file").touch()
    for arguments, message in (
        (["nothing.safetensors"], "policy: there is no file 'nothing.safetensors'"),
        ([policy, "--run", "nowhere"], "nowhere: there is no such folder"),
        ([policy, "--run", "empty"], f"empty has no {NAME}: it must be the log_dir of a scheduled run"),
        ([policy, "--run", "foreign"], f"{NAME}, line 1, is no decision of a scheduled run: it is not JSON"),
        ([policy, "--run", "later"], f"{NAME} is of version 99 of this file"),
        ([other, "--run", "run"], "run is a run of another policy, sha256="),
        ([policy, "--run", "run", "--episodes", "3"], "--episodes is of episodes to be played, and --run of runs"),
        ([policy, "--tasks", "imagenet"], "tasks must be one of"),
        ([policy, "--episodes", "0"], "--episodes must be a whole number, at least 1, got 0"),
        ([policy, "--seed", "-1"], "--seed must be a whole number, between 0 and 4294967295, got -1"),
        ([policy, "--run", "run", "--out", "file"], "file: must be a folder, and a file is in the way"),
    ):
        assert main(["explain", *arguments]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("rlsched explain: error: ") and message in line


def test_missing_captum_is_named_with_its_extra(policy, run, monkeypatch, capsys):
    """`rlsched[train]` does not bring it."""
    for name in (
        "captum",
        "captum.attr",
        "rlsched.agents.explain.attribution",
        "rlsched.experiments.explain.explanation",
    ):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "captum", None)
    assert main(["explain", policy, "--run", str(run)]) == 1
    assert capsys.readouterr().err == "rlsched explain needs captum: pip install 'rlsched[analysis]'\n"
