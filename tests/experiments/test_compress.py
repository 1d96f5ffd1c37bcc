"""`rlsched compress`: what it makes is what it says."""

import json
import re

import numpy as np
import pytest
import torch
from helpers import always, lively_policy

from rlsched import SchedulePolicy
from rlsched.agents.explain.decisions import Decisions
from rlsched.cli import main
from rlsched.envs import SetupDistribution
from rlsched.envs.mixtures import classifier
from rlsched.envs.sources import TeacherStudent
from rlsched.onnx_policy import load_policy

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from rlsched.experiments.compress import compression, smaller
from rlsched.experiments.compress.compression import FILES
from rlsched.experiments.compress.smaller import KEPT, UNITS, Tree, pruned, student, tree

SOURCE = TeacherStudent(inputs=6, classes=3, points=(32, 64), validation_points=16)
TASK = classifier(SOURCE, (8,), batch_size=8, interval=4, setup=SetupDistribution(decisions=(6, 9)))
PLAYED = ["--tasks", f"{__name__}:TASK", "--episodes", "4", "--rounds", "1"]


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Teach in a quarter of the time."""
    monkeypatch.setattr(smaller, "STEPS", 700)


def decisions_of(policy, n=600):
    """What a policy decides on drawn observations."""
    seen = 0.5 * torch.randn(n, len(policy.observations), generator=torch.Generator().manual_seed(1))
    rows = np.zeros(n, int)
    return Decisions(("drawn",), rows, rows, rows, rows, seen, None, policy.actor(seen)[0], torch.ones(n))


def error(policy, actor, decisions):
    """Mean difference of the actions as they are applied."""
    return float((actor(decisions.observations)[0].clamp(-1, 1) - decisions.actions.clamp(-1, 1)).abs().mean())


def test_all_are_made_measured_and_taken_by_a_wrapper(tmp_path, capsys, monkeypatch):
    """A table of policies that nobody can use, or that were never played, would be worth nothing."""
    policy, out = lively_policy(), tmp_path / "out"
    path = str(policy.save(tmp_path / "mine.safetensors"))
    assert main(["compress", path, *PLAYED, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    data = json.loads((out / "compression.json").read_text())
    rows = {row["name"]: row for row in data["rows"]}
    assert rows.keys() == {*FILES, "base schedule"} and (out / "table.md").read_text().strip() in printed
    loaded = {kind: load_policy(out / file) for kind, file in FILES.items()}
    for kind, file in FILES.items():
        assert rows[kind]["size"] == (out / file).stat().st_size
        assert loaded[kind].controls == policy.controls and loaded[kind].base_schedule == policy.base_schedule
        assert min(rows[kind]["microseconds"]) > 0
    assert loaded["policy"].digest == loaded["onnx"].digest == policy.digest
    assert len({each.digest for each in loaded.values()}) == len(FILES) - 1
    assert rows["onnx"]["lost"] == pytest.approx(0, abs=1e-3)
    assert loaded["student"].actor.hidden == (UNITS,)
    seen = torch.randn(50, len(policy.observations))
    off = (loaded["int8"].act(seen)[0] - policy.act(seen)[0]).abs().max()
    assert 0 < off < 0.05

    def again(*_, **__):
        raise AssertionError("it was there")

    monkeypatch.setattr(compression, "evaluate", again)
    monkeypatch.setattr(compression, "onnx_model", again)
    assert main(["compress", path, *PLAYED, "--out", str(out)]) == 0
    assert re.sub(r"\d+ \|", "", capsys.readouterr().out).count("±") == printed.count("±")


def test_unit_that_does_nothing_is_pruned_without_a_trace():
    """Pruning would take what decides, and leave what does not."""
    policy = lively_policy()
    first, last = policy.actor.layers
    idle = torch.arange(len(first.bias)) % 2 == 0
    with torch.no_grad():
        first.weight[idle] = 0.0  # they give a constant, which belongs into the bias
        last.weight[:, idle] = 2.0
    decisions = decisions_of(policy)
    made = pruned(policy, decisions, 0) if KEPT == 0.5 else pytest.fail("the test is for one half")
    assert made.hidden == (len(first.bias) // 2,)
    assert error(policy, made, decisions) < 0.02


def test_every_layer_is_pruned_to_its_half():
    """The layer behind takes fewer inputs than before, and is pruned in its turn."""
    policy = SchedulePolicy.load("default")
    decisions = decisions_of(policy)
    made = pruned(policy, decisions, 0)
    assert made.hidden == tuple((units + 1) // 2 for units in policy.actor.hidden)
    assert error(policy, made, decisions) < 0.1


@pytest.mark.parametrize("learn, most", [(student, 0.1), (tree, 0.25)])
def test_imitation_comes_close(learn, most):
    """A student that was not taught has an actor too, and a table would show its numbers."""
    policy = lively_policy()
    decisions = decisions_of(policy)
    made = learn(policy, decisions, 0)
    standing = float(decisions.actions.clamp(-1, 1).abs().mean())
    assert error(policy, made, decisions) < most < standing
    again = learn(policy, decisions, 0)
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in made.state_dict().items())


def test_tree_goes_down_as_the_one_that_was_fitted():
    """Tables that lead elsewhere than the tree would decide for it."""
    policy = lively_policy()
    decisions = decisions_of(policy)
    fitted = smaller.DecisionTreeRegressor(max_leaf_nodes=20, random_state=0)
    fitted.fit(decisions.observations.numpy(), decisions.actions.numpy())
    expected = torch.from_numpy(fitted.predict(decisions.observations.numpy())).float()
    torch.testing.assert_close(Tree(fitted.tree_)(decisions.observations)[0], expected)


def test_beyond_the_bounds_an_action_need_only_be_beyond():
    """A student would spend its few units on what clipping takes away."""
    policy = always(lr=5.0)
    decisions = decisions_of(policy)
    made = student(policy, decisions, 0)
    answers = made(decisions.observations)[0]
    assert answers.clamp(-1, 1).sub(decisions.actions.clamp(-1, 1)).abs().max() < 0.2
    assert answers.max() < 3, "it went on towards 5"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--episodes", "0"], "--episodes must be a whole number, at least 1, got 0"),
        (["--rounds", "-1"], "--rounds must be 0 or more, got -1"),
        (["--tasks", "nothing"], "tasks must be one of"),
    ],
)
def test_wrong_options_are_one_line(options, message, tmp_path, capsys):
    """A slip of the pen would cost a traceback, or minutes."""
    assert main(["compress", "default", *options, "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1
