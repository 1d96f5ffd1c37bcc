"""`rlsched report`: what it reads, what it shows, and what it says of what it cannot read."""

import json
import re
import shutil
import sys
from functools import partial

import numpy as np
import pytest
import torch
from helpers import lively_policy, network, train
from matplotlib.figure import Figure
from matplotlib.image import imread
from torch import nn
from torch.utils.tensorboard.writer import SummaryWriter

from rlsched import ScheduledOptimizer
from rlsched.agents import TrainConfig
from rlsched.agents.exporting import CHECKPOINT
from rlsched.agents.ppo import CONFIG
from rlsched.agents.tensorboard import BASE, LOG, REGRET, REGRET_OF, RETURN, TUNED, TrainingLog
from rlsched.cli import main
from rlsched.decisions import NAME
from rlsched.envs import InnerTask
from rlsched.experiments.compare import analysis
from rlsched.experiments.compare.run import RUNS, Plan, compare

pytest.importorskip("bokeh")
pytest.importorskip("captum")
from rlsched.experiments.explain.explanation import Explanation
from rlsched.experiments.report import page as page_module
from rlsched.experiments.report.blocks import DETAILED, Chart, Heat, Line, Panel, Section, Text, thinned
from rlsched.experiments.report.events import read_log
from rlsched.experiments.report.page import page
from rlsched.experiments.report.report import read, sections

STEPS, DECISIONS = 21, [1, 6, 11, 16]
SEEN, CONTROLS = ("progress", "grad_cosine", "lr"), ("lr", "momentum")
SIZES = {"num_envs": 4, "n_steps": 8, "batch_size": 16, "timesteps": 64, "eval_episodes": 4, "processes": 1}
POINTS = torch.linspace(-1, 1, 60).view(20, 3), torch.arange(20) % 4
EVIL = "</script><script>alert(1)</script><b>bold</b>"


@pytest.fixture(scope="module")
def policy_file(tmp_path_factory):
    """A policy that sees and moves little."""
    folder = tmp_path_factory.mktemp("policy")
    return str(lively_policy(observations=SEEN, controls=CONTROLS).save(folder / "mine.safetensors"))


@pytest.fixture(scope="module")
def kept(policy_file, tmp_path_factory):
    """Folders of runs of each kind; tests that change them take a copy, `runs`."""
    root = tmp_path_factory.mktemp("runs")
    for name, steps in (("whole", STEPS), ("stopped", 8)):
        model = network()
        inner = torch.optim.SGD(model.parameters(), 0.1, 0.9)
        optimizer = ScheduledOptimizer(inner, total_steps=STEPS, decisions=5, policy=policy_file, log_dir=root / name)
        train(model, optimizer, range(steps))
        optimizer.observe_validation(0.5)
        optimizer.controller.log.intervention(EVIL, 3)
        optimizer.controller.log.writer.close()
    a_training(root / "training")
    task = InnerTask(partial(nn.Linear, 3, 4), POINTS, batch_size=4)
    plan = Plan({"mine": task}, ("sgd",), (8,), 2, (1.0,), (0.1, 1.0))
    compare(plan, lively_policy(observations=SEEN, controls=CONTROLS), root / "compared", "mine")
    return root


@pytest.fixture
def runs(kept, tmp_path, monkeypatch):
    """A copy of the folders, as the working directory."""
    shutil.copytree(kept, tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "runs")
    return tmp_path / "runs"


def a_training(folder):
    """What a training leaves that has had half of its timesteps."""
    config = TrainConfig(run_dir=str(folder), **SIZES)
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config.hyperparameters()))
    log = TrainingLog(folder, config)
    log.begin(0)
    for step in (0, 32):
        for run, value in ((LOG, 1.0), (BASE, 0.5), (TUNED, 1.25)):
            log.scalars({RETURN: value + step / 32}, step, run)
        log.scalars({REGRET: 0.25, f"{REGRET_OF}/mlp": 0.3, f"{REGRET_OF}/conv": 0.2}, step)
    log.close()


def charts(parts):
    """The charts of sections, by their names."""
    return {block.name: block for part in parts for block in part.blocks if isinstance(block, Chart)}


def texts(parts):
    """All the text of sections."""
    return "\n".join(block.markdown for part in parts for block in part.blocks if isinstance(block, Text))


def line(chart, panel, label, dash="solid"):
    """A line of a chart."""
    lines = next(each.lines for each in chart.panels if each.label == panel)
    return next(each for each in lines if (each.label, each.dash) == (label, dash))


def events(folder):
    """The event file of a folder."""
    (path,) = folder.glob("events*")
    return path


# --- A run of a user --------------------------------------------------------------------------------------------------


def test_schedules_are_those_of_the_run(kept, policy_file):
    """A picture of another learning rate than the one that was used; a factor that is off by a step."""
    found = charts(sections([kept / "whole"], [policy_file]))
    recorded = [json.loads(row) for row in (kept / "whole" / NAME).read_text().splitlines()[1:]]
    lr = line(found["schedules"], "learning rate", "whole")
    assert lr.x.tolist() == DECISIONS
    assert lr.y == pytest.approx([row["proposed"]["lr"] for row in recorded], rel=1e-5)
    base = line(found["schedules"], "learning rate", "whole", "dotted")
    assert base.y == pytest.approx([0.1 * (1 - step / STEPS) for step in DECISIONS], rel=1e-5)
    assert line(found["loss"], "loss", "whole").y == pytest.approx([row["loss"] for row in recorded], rel=1e-5)
    assert line(found["loss"], "loss", "whole", "dotted").y.tolist() == [0.5]


def test_decisions_are_explained_where_the_policy_is_known(kept, policy_file):
    """Colors that do not add up to the action explain another one."""
    found = charts(sections([kept / "whole", kept / "stopped"], [policy_file]))
    for name, steps in (("whole", DECISIONS), ("stopped", DECISIONS[:2])):
        panels = found[f"decisions-{name}"].panels
        assert [type(panel) for panel in panels] == [Panel, Heat] * len(CONTROLS)
        for action, owed in zip(panels[::2], panels[1::2], strict=True):
            applied, before, typical = action.lines
            assert applied.x.tolist() == steps and applied.details.keys() == {before.label, typical.label, *SEEN}
            assert owed.values.sum(0) == pytest.approx(before.y - typical.y[0], abs=1e-3)
            assert applied.y == pytest.approx(before.y.clip(-1, 1), abs=1e-5)
            assert applied.details["progress"][:, 0] == pytest.approx(np.array(steps) / STEPS, rel=1e-5)
            place = owed.rows.index("progress")
            assert applied.details["progress"][:, 1] == pytest.approx(owed.values[place])


def test_unknown_policy_is_told_with_the_remedy(kept, monkeypatch):
    """A chart without its explanation looks as if there were none to be had; so it does without Captum."""
    parts = sections([kept / "whole"])
    (chart,) = (chart for name, chart in charts(parts).items() if name.startswith("decisions"))
    assert "`--policy FILE`" in chart.note
    (panel,) = chart.panels
    assert [each.label for each in panel.lines] == list(CONTROLS)
    assert panel.lines[0].details.keys() == set(SEEN)
    assert not any("why" in part.title.lower() for part in parts)


def test_missing_captum_leaves_a_report_without_explanations(kept, policy_file, monkeypatch):
    """The rest of the page needs nothing of it."""
    for name in ("rlsched.agents.explain.attribution", "rlsched.experiments.explain.explanation"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in ("captum", "captum.attr"):
        monkeypatch.setitem(sys.modules, name, None)
    found = charts(sections([kept / "whole"], [policy_file]))
    assert "pip install 'rlsched[analysis]'" in found["decisions-whole"].note


def test_run_without_a_file_of_decisions_is_shown_by_its_figures(runs, policy_file):
    """A callback's or a writer's log has no such file, and the same figures."""
    (runs / "whole" / NAME).unlink()
    there, without = (charts(sections([runs / name])) for name in ("stopped", "whole"))
    assert there.keys() - {"decisions-stopped"} == without.keys() - {"decisions-whole"}
    chart = without["decisions-whole"]
    assert chart.panels[0].lines[0].x.tolist() == DECISIONS and "log_dir=" in chart.note
    assert chart.panels[0].lines[0].details["progress"] == pytest.approx(np.array(DECISIONS) / STEPS, rel=1e-5)


def test_groups_of_a_run_are_told_apart(tmp_path):
    """The decisions of two groups, drawn as one zigzag, are those of neither."""
    model = network()
    inner = torch.optim.SGD([{"params": layer.parameters()} for layer in (model[0], model[2])], 0.1)
    policy = lively_policy(observations=SEEN, controls=CONTROLS)
    optimizer = ScheduledOptimizer(
        inner, total_steps=STEPS, decisions=5, policy=policy, log_dir=tmp_path / "run", per_group=True
    )
    train(model, optimizer, range(STEPS))
    optimizer.controller.log.writer.close()
    found = charts(sections([tmp_path / "run"]))
    lines = found["schedules"].panels[0].lines
    labels = {each.label for each in lines}
    assert labels == {f"run, {name}" for name in optimizer.controller.groups.names}
    assert len({each.color for each in lines}) == len(labels) == 2
    assert {name for name in found if name.startswith("decisions")} == {"decisions-run-0", "decisions-run-1"}


def test_resumed_run_has_each_step_once(tmp_path):
    """What was lost with a crash would be drawn beside what took its place, as a line that runs backwards."""
    for start, value in ((0, 1.0), (2, 5.0)):
        with SummaryWriter(str(tmp_path), filename_suffix=f".{start}") as writer:
            for step in range(start, start + 4):
                writer.add_scalar("loss", value, step)
    scalars = read_log(tmp_path).scalars["loss"]
    assert scalars.steps.tolist() == [0, 1, 2, 3, 4, 5] and scalars.values.tolist() == [1, 1, 5, 5, 5, 5]


# --- What is still being written --------------------------------------------------------------------------------------


def test_run_that_stopped_says_how_far_it_came(kept):
    """Half a run would be taken for a whole one."""
    assert not read(kept / "whole").notes
    (note,) = read(kept / "stopped").notes
    assert "at step 6 of 21" in note
    assert note in texts(sections([kept / "whole", kept / "stopped"]))


@pytest.mark.parametrize("lost", [1, 9, 30])
def test_log_that_was_cut_off_is_shown_as_far_as_it_goes(lost, runs):
    """Who looks while a run goes on, or after a kill, would see nothing of what is there."""
    path = events(runs / "whole")
    path.write_bytes(path.read_bytes()[:-lost])
    parts = sections([runs / "whole"])
    assert "is not whole" in texts(parts)
    assert line(charts(parts)["schedules"], "learning rate", "whole").x.tolist() == DECISIONS


def test_decision_that_was_cut_off_is_left_out_with_a_note(runs):
    """As above, in the other file."""
    path = runs / "whole" / NAME
    path.write_bytes(path.read_bytes()[:-20])
    parts = sections([runs / "whole"])
    assert "line 5, was cut off" in texts(parts)
    (chart,) = (chart for name, chart in charts(parts).items() if name.startswith("decisions"))
    assert chart.panels[0].lines[0].x.tolist() == DECISIONS[:-1]


def test_training_that_goes_on_says_so(kept):
    """Half a training would be taken for one that is done."""
    (note,) = read(kept / "training").notes
    assert "32 of 64 timesteps" in note


# --- A training, a comparison -----------------------------------------------------------------------------------------


def test_training_tells_its_story(kept):
    """A return means nothing without what it is to be compared with."""
    found = charts(sections([kept / "training"]))
    for dash, values in (("solid", [1, 2]), ("dotted", [0.5, 1.5]), ("dashed", [1.25, 2.25])):
        found_line = line(found["return"], "return, mean over the episodes", "training", dash)
        assert found_line.x.tolist() == [0, 32] and found_line.y == pytest.approx(values)
    by_family = {each.label: each.y[-1] for each in found["training-regret-by-family"].panels[0].lines}
    assert by_family == pytest.approx({"mlp": 0.3, "conv": 0.2})


def test_comparison_has_the_numbers_of_its_own_table(kept):
    """A second analysis would come to other numbers than `rlsched compare` prints."""
    parts = sections([kept / "compared"])
    results = analysis.Results(kept / "compared")
    assert analysis.table(results) in texts(parts)
    (setting,) = results.runs
    found = charts(parts)
    linear = line(found["compared-mine-sgd-8-steps-lr"], "final log validation loss, mean over the seeds", "linear")
    contender = analysis.Contender("linear")
    assert linear.y == pytest.approx([results.log_loss(setting, contender, factor) for factor in (0.1, 1.0)])
    labels = [each.label for each in found["compared-mine-sgd-8-steps"].panels[0].lines]
    assert "learned, lr × 1" in labels and any(label.startswith("linear, best, lr ×") for label in labels)


# --- The page ---------------------------------------------------------------------------------------------------------


def test_page_and_pictures_of_runs_of_every_kind(kept, policy_file, tmp_path, monkeypatch, capsys):
    """A part that is left out, a page that needs the network, an empty picture."""
    small = ("response-lr", Figure((1, 1)))  # the others are drawn in another test, and slow
    monkeypatch.setattr(Explanation, "figures", lambda self, courses: iter([small]))
    out, pictures = tmp_path / "out" / "page.html", tmp_path / "pictures"
    names = ("whole", "training", "compared")
    folders = [str(kept / name) for name in names]
    assert main(["report", *folders, "--policy", policy_file, "--out", str(out), "--png", str(pictures)]) == 0
    assert str(out) in capsys.readouterr().out
    content = out.read_text(encoding="utf-8")
    assert 1e6 < out.stat().st_size < 5e6
    titles = ("Overview", "Decisions of whole", "Why mine decides so", "Training training", "Comparison compared")
    for heading in titles:
        assert f">{heading}</h2>" in content
    assert not re.search(r"""<(script|link|img|iframe)[^>]*(src|href)=["']?(?!["']?data:)""", content)
    written = {path.stem for path in pictures.glob("*.png")}
    assert {"schedules", "decisions-whole", "return", "compared-mine-sgd-8-steps", "mine-response-lr"} <= written
    assert all(imread(pictures / f"{name}.png")[..., :3].std() > 0.01 for name in ("schedules", "decisions-whole"))


def test_text_of_a_run_is_no_markup():
    """A name or a message that holds HTML would run in the browser of whoever opens the page."""
    points = np.arange(3.0)
    lines = [Line(EVIL, points, points, details={EVIL: points}), Line("other", points, points)]
    heat = Heat(EVIL, np.arange(4.0), [EVIL], points.reshape(1, 3))
    content = page(EVIL, [Section(EVIL, [Chart("x", EVIL, [Panel(EVIL, lines), heat], EVIL, EVIL), Text(EVIL)])])
    assert b"alert(1)" in content and b"<script>alert(1)" not in content and b"</script><script>alert" not in content
    assert b"<b>bold</b>" not in content.replace(b"\\u003c", b"<")


def test_page_of_long_runs_stays_small(monkeypatch):
    """A million decisions make a page that no browser opens; what is left out has to be said."""
    monkeypatch.setattr(page_module, "LARGEST", 1_600_000)
    x = np.arange(10_000.0)
    lines = [Line(f"run {i}", x, np.sin(x), details={f"d{j}": x for j in range(20)}) for i in range(20)]
    content = page("long", [Section("long", [Chart("chart", "", [Panel("panel", lines)])])])
    assert len(content) < page_module.LARGEST
    (points,) = re.findall(rb"curves have about (\d+) points", content)
    assert 50 < int(points) < page_module.FINENESS[0][0], "as many as there is room for"


def test_page_that_cannot_be_small_is_refused(monkeypatch):
    """Rather than written, to be found too large by whoever gets it."""
    monkeypatch.setattr(page_module, "LARGEST", 1000)
    with pytest.raises(ValueError, match="report fewer runs at once"):
        page("title", [Section("section", [Text("x" * 2000)])])


def test_thinned_curve_keeps_its_spikes():
    """A loss that went through the roof for one window is what the curve is looked at for."""
    y = np.zeros(10_000)
    y[1234], y[7777] = 5, -3
    y[3:50] = np.nan
    thin = thinned(Panel("p", [Line("l", np.arange(10_000.0), y)]), 100).lines[0]
    assert len(thin.x) <= 102 and {thin.x[0], thin.x[-1]} == {0, 9999}
    assert (np.nanmin(thin.y), np.nanmax(thin.y)) == (-3, 5) and (np.diff(thin.x) > 0).all()
    heat = thinned(Heat("h", np.arange(1001.0), ["a"], np.arange(1000.0).reshape(1, -1)), 100)
    assert heat.values.shape == (1, 100 // DETAILED) and len(heat.edges) == 100 // DETAILED + 1
    assert heat.edges[:-1].tolist() == heat.values[0].tolist() and heat.edges[-1] == 1000


# --- What cannot be read ----------------------------------------------------------------------------------------------


def test_wrong_input_is_one_clear_line(runs, policy_file, capsys):
    """A traceback from inside of TensorBoard says nothing of the folder that was meant."""
    for name in ("empty", "foreign", "garbage", "old", "silent", "study", "later", "parent/inner", "lone"):
        (runs / name).mkdir(parents=True)
    with SummaryWriter(str(runs / "foreign")) as writer:
        writer.add_scalar("accuracy", 1, 1)
    (runs / "garbage" / "events.out.tfevents.1").write_bytes(b"no record at all, but some bytes")
    for name in ("old", "silent"):
        shutil.copy(runs / "training" / CONFIG, runs / name)
        (runs / name / CHECKPOINT).touch()
    shutil.copy(events(runs / "foreign"), runs / "old")
    (runs / "study" / RUNS).write_text('{"run": {"loop": 3}}\n')
    shutil.copytree(runs / "whole", runs / "later", dirs_exist_ok=True)
    (runs / "later" / NAME).write_text('{"rlsched_decisions": 99, "policy": "x"}\n')
    shutil.copytree(runs / "whole", runs / "parent" / "inner", dirs_exist_ok=True)
    shutil.copy(runs / "whole" / NAME, runs / "lone")
    shutil.copytree(runs / "training", runs / "broken")
    (runs / "broken" / CONFIG).write_text("{")
    shutil.copytree(runs / "compared", runs / "begun")
    (runs / "begun" / RUNS).write_text("")
    for arguments, message in (
        (["nowhere"], "nowhere: there is no such folder"),
        (["empty"], "empty is empty: it must be the folder of a training or a comparison, or the log_dir"),
        (["foreign"], "foreign is a log of something else than rlsched: it has accuracy"),
        (["garbage"], "garbage has no TensorBoard log that can be read"),
        (["old"], "old is a training of another version of rlsched"),
        (["silent"], "the training logged nothing yet"),
        (["broken"], "is no configuration of a training"),
        (["study"], "has runs of neither a comparison nor a benchmark"),
        (["begun"], "has no runs yet"),
        (["later"], f"{NAME} is of version 99 of this file"),
        (["parent"], "parent is no run, but there are runs below it: report parent/inner"),
        (["lone"], f"lone has {NAME}, but no TensorBoard log"),
        (["training/training"], "is the log of a training: give the folder above it"),
        (["whole", "--policy", "default"], "--policy default, sha256="),
        (["training", "--policy", policy_file], "decided in none of the runs"),
        (["whole", "--policy", "nobody"], "nobody"),
        (["whole", "--out", "page.pdf"], "--out must end in .html, got 'page.pdf'"),
        (["compared", "--out", "whole/decisions.jsonl/page.html"], "must be a folder, and a file is in the way"),
    ):
        assert main(["report", *arguments]) == 1, arguments
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith("rlsched report: error: ") and message in said
    assert not (runs / "runs").exists()


def test_missing_bokeh_is_named_with_its_extra(kept, monkeypatch, capsys):
    """`rlsched[train]` does not bring it."""
    monkeypatch.delitem(sys.modules, "bokeh.plotting", raising=False)
    monkeypatch.setitem(sys.modules, "bokeh", None)
    assert main(["report", str(kept / "whole")]) == 1
    assert capsys.readouterr().err == "rlsched report needs bokeh: pip install 'rlsched[analysis]'\n"
