"""The comparison of schedules."""

import json
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import lively_policy
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from torch import nn
from torch.nn import functional

from rlsched import SchedulePolicy
from rlsched.control import CONTROL_NAMES, CONTROLS, EARLY, moved_by
from rlsched.envs import FAMILIES, InnerTask
from rlsched.experiments.compare import run as compare_run
from rlsched.experiments.compare.analysis import (
    CURVES,
    FINAL,
    FIRST,
    LOG_LOSS,
    WORST,
    Cell,
    Contender,
    Results,
    counted,
    report,
    table,
    tensorboard,
)
from rlsched.experiments.compare.run import (
    EACH,
    OPTIMIZERS,
    POLICY,
    REPLAY,
    RUNS,
    SMALLEST_LOSS,
    TENSORBOARD,
    Plan,
    Trial,
    compare,
    key,
    perform,
)
from rlsched.experiments.compare.tasks import digits, mnist, named
from rlsched.experiments.journal import read
from rlsched.experiments.replay import Replay
from rlsched.experiments.table import PLOT, TABLE
from rlsched.policy import Policy

DOCS = Path(__file__).parents[2] / "docs" / "results"
DIGITS = digits()
POINTS = torch.linspace(-1, 1, 60).view(20, 3), torch.arange(20) % 4
MINE = InnerTask(partial(nn.Linear, 3, 4), POINTS, batch_size=4)
SEVERAL = [MINE, FAMILIES["attention"]]
NUMBER = 5
PLAN = Plan(optimizers=("sgd",), steps=(8,), seeds=2, policy_factors=(1.0, 10.0), sweep=(0.1, 1.0))
ZERO = SchedulePolicy.zero()
CONSTANT = Contender("constant")
LED_BY = ("learned", "replay-of-its-mean")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zero_policy_does_the_work_of_the_linear_schedule(optimizer):
    """Unequal work, weights or data between the learned schedule and the others would make the comparison a lie."""
    learned = perform(Trial("digits", optimizer, 12, "policy", 1.0, 3), DIGITS, ZERO)
    linear = perform(Trial("digits", optimizer, 12, "linear", 1.0, 3), DIGITS, ZERO)
    assert learned["curve"] == linear["curve"]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rates_follow_their_formula(schedule):
    """A baseline whose schedule is off by one step or one factor is a straw man."""
    curve = perform(Trial("digits", "adam", 10, schedule, 2.0, 0), DIGITS, ZERO)["curve"]
    formula = {
        "constant": lambda t: 1.0,
        "linear": lambda t: 1 - t,
        "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    }[schedule]
    assert [row[3] for row in curve] == pytest.approx([2e-3 * formula(n / 10) for n in range(10)], rel=1e-4)


def test_baselines_learn():
    """A baseline that stays near chance where it should not is a bug in the benchmark."""
    result = perform(Trial("digits", "sgd", 150, "cosine", 1.0, 0), DIGITS, ZERO)
    assert result["accuracy"] > 0.8
    assert result["log_loss"] < math.log(math.log(10)) - 1


def test_interrupted_comparison_goes_on(tmp_path, monkeypatch):
    """An hour of finished runs must survive Ctrl-C, and no run may be counted twice."""
    performed = []

    def interrupted(trial, *args):
        performed.append(trial)
        if len(performed) == 5:
            raise KeyboardInterrupt
        return perform(trial, *args)

    monkeypatch.setattr(compare_run, "perform", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(PLAN, ZERO, tmp_path)
    assert len((tmp_path / RUNS).read_text().splitlines()) == 4
    with (tmp_path / RUNS).open("a") as file:
        file.write('{"run": {"task": "dig')  # as if the kill had come while a line was written
    with pytest.warns(UserWarning, match="line 5, was cut off"):
        compare(PLAN, ZERO, tmp_path)
    performed.clear()
    compare(PLAN, ZERO, tmp_path)
    rows = [json.loads(line)["run"] for line in (tmp_path / RUNS).read_text().splitlines()]
    assert [Trial(**row) for row in rows] == list(PLAN.trials())
    assert performed == []
    text = report(tmp_path)
    assert "learned, lr × 10" in text
    assert "best of 2" in text
    assert "replay of its mean, lr × 10" in text
    assert (tmp_path / TABLE).read_text().strip() == text
    assert (tmp_path / PLOT).stat().st_size > 10_000


def test_another_policy_is_a_row_of_its_own(tmp_path):
    """The results of one policy would be shown as another's; or the older one's, which took an hour, be gone."""
    plan = Plan(optimizers=("sgd",), steps=(6,), seeds=2, policy_factors=(1.0, 10.0), sweep=(1.0,))
    other = lively_policy()
    compare(plan, ZERO, tmp_path, "zero")
    alone = report(tmp_path)
    assert "**learned, lr × 1**" in alone
    baselines = [line for line in alone.splitlines() if "best of" in line]
    compare(plan, other, tmp_path, "runs/mine/policy.safetensors")
    compare(plan, lively_policy(3), tmp_path, log_runs=True)
    text, results, setting = report(tmp_path), Results(tmp_path), Cell("digits", "sgd", 6)
    assert [line for line in text.splitlines() if "best of" in line] == baselines
    labels = [
        f"zero, {ZERO.digest[:8]}",
        f"runs/mine/policy.safetensors, {other.digest[:8]}",
        lively_policy(3).digest[:8],
    ]
    rows = [line.split(" | ")[0] for line in text.splitlines()]
    assert rows[2:8] == [f"| **learned ({label}), lr × {factor}**" for label in labels for factor in (1, 10)]
    assert rows[8:14] == [f"| replay of its mean ({label}), lr × {factor}" for label in labels for factor in (1, 10)]
    for policy in (ZERO, other):
        for schedule in (POLICY, REPLAY):
            rows = results.runs[setting][Contender(schedule, policy.digest)][1.0]
            assert [(row["policy"], row["run"]["seed"]) for row in rows] == [(policy.digest, 0), (policy.digest, 1)]
    assert len({results.color(contender) for contender in results.runs[setting]}) == 3 * 2 + 3
    led = [re.sub("[^a-z0-9.]+", "-", label) for label in labels]
    shown = {f"{what}-{label}-lr-x{factor}" for what in LED_BY for label in led for factor in (1, 10)}
    assert logged(tmp_path / TENSORBOARD) == shown | {"constant-tuned", "linear-tuned", "cosine-tuned"}
    third = lively_policy(3).digest[:8]
    each = {f"digits-sgd-6/{schedule}-{third}-x{factor}" for schedule in (POLICY, REPLAY) for factor in (1, 10)}
    assert logged(tmp_path / EACH) == each


def logged(folder):
    """The runs that TensorBoard finds in a folder."""
    return {str(path.parent.relative_to(folder)) for path in folder.rglob("events.out.tfevents.*")}


def test_log_has_a_run_for_each_schedule(tmp_path):
    """Forty runs, one for each training run, are a heap of lines that nobody compares."""
    results = Results(DOCS / "mnist")
    results.runs = dict(list(results.runs.items())[:2])  # more are no other, and take their time
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "events.out.tfevents.1").touch()
    tensorboard(results, tmp_path)
    led = {f"{what}-lr-x{factor}" for what in LED_BY for factor in (0.1, 1, 10)}
    assert logged(tmp_path) == {*led, "constant-tuned", "linear-tuned", "cosine-tuned"}
    for name, contender, factor in (("cosine-tuned", Contender("cosine"), None), ("learned-lr-x0.1", None, 0.1)):
        log = EventAccumulator(str(tmp_path / name))
        log.Reload()
        data = {
            tag: plugin_data_pb2.HParamsPluginData.FromString(content)
            for tag, content in log.PluginTagToContent("hparams").items()
        }
        metrics = [info.name.tag for info in data["_hparams_/experiment"].experiment.metric_infos]
        assert metrics == [f"{setting}/{FINAL}" for setting in results.runs]
        for setting, tag in zip(results.runs, metrics, strict=True):
            one = contender or results.led(POLICY)[0]
            at = results.best(setting, one) if factor is None else factor
            (final,) = log.Scalars(tag)
            assert final.step == setting.steps
            assert final.value == pytest.approx(results.log_loss(setting, one, at), rel=1e-5)
            rows = results.runs[setting][one][at]
            losses = log.Scalars(f"{setting}/{LOG_LOSS}")
            assert [event.step for event in losses] == [row[0] for row in rows[0]["curve"]]
            mean = np.mean([math.log(row["curve"][-1][1]) for row in rows])
            assert losses[-1].value == pytest.approx(mean, rel=1e-4)
            for tag, column in CURVES.items():
                curve = [event.value for event in log.Scalars(f"{setting}/{tag}")]
                assert curve == pytest.approx([row[column] for row in rows[0]["curve"]], rel=1e-5)


def test_diverged_run_counts_as_the_untrained_network(tmp_path):
    """A NaN would win every comparison, or poison every mean; and what is bad for one task is good for another."""
    plan = Plan(("digits", "two-heads"), ("sgd",), (30,), seeds=1, policy_factors=(1.0,), sweep=(1e6,))
    compare(plan, ZERO, tmp_path)
    results = Results(tmp_path)
    for task in plan.inner_tasks:
        (row,) = results.runs[Cell(task, "sgd", 30)][CONSTANT][1e6]
        assert not row["log_loss"] <= row[FIRST]
        assert results.log_loss(Cell(task, "sgd", 30), CONSTANT, 1e6) == row[FIRST]
    assert results.log_loss(Cell("digits", "sgd", 30), CONSTANT, 1e6) == pytest.approx(math.log(math.log(10)), 0.1)
    assert "a run that diverged, or ended above the loss of its untrained network, counts as that." in table(results)


@pytest.mark.parametrize(
    ("row", "log_loss"),
    [
        ({"log_loss": 0.7, FIRST: 2.0}, 0.7),
        ({"log_loss": 3.0, FIRST: 2.0}, 2.0),
        ({"log_loss": math.nan, FIRST: 2.0}, 2.0),
        ({"log_loss": 0.7}, 0.7),
        ({"log_loss": math.nan}, WORST),
    ],
)
def test_run_counts_as_its_loss_or_as_the_worst(row, log_loss):
    """A run of an older version must count as it did, and a diverged one of a regression as more than chance."""
    assert counted(row) == log_loss


def test_published_table_is_made_of_the_published_runs():
    """Hours of runs of an older version could no longer be read, or would say something else than they did."""
    assert table(Results(DOCS / "mnist")) == (DOCS / "mnist" / TABLE).read_text().strip()


def states(row):
    """A run's control path as rows of numbers: the inner step, and each control's state."""
    return [[step, *(state[name] for name in CONTROL_NAMES)] for step, state in row["control_path"]]


@pytest.mark.parametrize(("optimizer", "factor"), [("sgd", 100.0), ("adam", 0.1)])
def test_replay_of_a_runs_own_path_is_the_run(optimizer, factor):
    """A replay that left out the probe, momentum or clipping would lose to the policy, and adapting seem to win."""
    trial = Trial("digits", optimizer, 16, POLICY, factor, 3)
    learned = perform(trial, DIGITS, lively_policy())
    replayed = perform(replace(trial, schedule=REPLAY), DIGITS, lively_policy(), paths=[learned["control_path"]])
    np.testing.assert_allclose(states(replayed), states(learned), rtol=1e-4)
    for column in (1, 3, 4):  # validation loss, learning rate, momentum
        np.testing.assert_allclose(*(np.array(r["curve"])[:, column] for r in (replayed, learned)), rtol=1e-3)


def test_replay_follows_the_mean_of_the_other_seeds(tmp_path):
    """A replay that had seen its own run, or but one of the others, would be no open-loop schedule of the policy."""
    plan = Plan(optimizers=("sgd",), steps=(20,), seeds=3, policy_factors=(1.0,), sweep=(1.0,))
    policy = lively_policy()
    compare(plan, policy, tmp_path)
    runs = Results(tmp_path).runs[Cell("digits", "sgd", 20)]
    led = [runs[Contender(schedule, policy.digest)][1.0] for schedule in (POLICY, REPLAY)]
    learned, replays = (np.array([states(row) for row in rows]) for rows in led)
    assert [row["run"]["seed"] for row in led[1]] == [0, 1, 2]
    assert np.ptp(learned[:, -1, 1 + CONTROL_NAMES.index("lr")]) > 0.1, "paths that are all the same prove nothing"
    for seed in range(3):
        mean = np.delete(learned, seed, axis=0).mean(0)
        # The first decisions make up for a safe start of its own.
        np.testing.assert_allclose(replays[seed][3:], mean[3:], atol=1e-3)


PATHS = [
    [(1, {"lr": 0.5, "momentum": 1.0, "clip": 2.0}), (21, {"lr": -1.5, "momentum": 1.3, "clip": 1.0})],
    [(1, {"lr": 0.7, "momentum": 1.2, "clip": 1.0}), (31, {"lr": -0.5, "momentum": 1.1, "clip": 0.5})],
]


@pytest.mark.parametrize("controls", [("lr", "momentum", "clip"), ("clip", "lr")])
def test_replay_leads_back_to_the_mean_path(controls):
    """A run that its own safe start set off would be compared with a schedule that nobody chose."""
    total_steps, interval = 41, 4
    replayed = Replay(lively_policy(controls=controls), PATHS, total_steps)
    assert replayed.controls == controls
    state = {"lr": -3.0, "momentum": 1.9, "clip": 3.0}
    at = {name: [] for name in controls}
    for step in range(1, total_steps, interval):
        seen = {name: (state[name] - CONTROLS[name].seen.shift) / CONTROLS[name].seen.scale for name in controls}
        values = {"progress": step / total_steps, **seen}
        actions, _ = replayed.act(torch.tensor([values[name] for name in replayed.observations]))
        for name, action in zip(controls, actions.tolist(), strict=True):
            c = CONTROLS[name]
            target = np.mean([np.interp(step, *zip(*((s, x[name]) for s, x in path), strict=True)) for path in PATHS])
            before, most = state[name], c.early_step if step / total_steps < EARLY else c.step
            state[name] = moved_by(c, before, action, step / total_steps, c.low)
            # All the way, or as far as an action leads.
            assert state[name] == pytest.approx(before + np.clip(target - before, -most, most), abs=1e-5)
            at[name].append(abs(state[name] - target) < 1e-5)
    assert all(not reached[0] and reached[-1] for reached in at.values())


def test_replay_is_a_policy_of_its_own():
    """With its policy's digest, a replay's results would be the policy's, and one run go on with the other's state."""
    policies = lively_policy(), lively_policy(12)
    replays = [
        *(Replay(policy, PATHS, 41) for policy in policies),
        Replay(policies[0], PATHS, 42),
        Replay(policies[0], PATHS[:1], 41),
        Replay(policies[0], [PATHS[0], [(step, {**state, "lr": 0.0}) for step, state in PATHS[1]]], 41),
    ]
    assert all(isinstance(led, Policy) for led in replays)
    assert len({led.digest for led in (*replays, *policies)}) == len(replays) + len(policies)
    as_read = json.loads(json.dumps(PATHS))  # from the results of an interrupted comparison
    assert Replay(policies[0], as_read, 41).digest == replays[0].digest
    with pytest.raises(ValueError, match="paths must hold at least one control path"):
        Replay(policies[0], [], 41)


def test_single_seed_has_no_replay():
    """The mean of no runs is NaN, and so would be the learning rate."""
    plan = Plan(seeds=1)
    assert REPLAY not in {trial.schedule for trial in plan.trials()}


def test_results_without_paths_are_kept_and_not_replayed(tmp_path):
    """Hours of results of an older version would be lost, or replays follow the mean of some of the seeds."""
    plan = Plan(optimizers=("sgd",), steps=(6,), seeds=2, policy_factors=(1.0,), sweep=(1.0,))
    compare(plan, ZERO, tmp_path)
    file = tmp_path / RUNS
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    old = [row for row in rows if row["run"]["schedule"] != REPLAY]
    del old[0]["control_path"]
    file.write_text("".join(json.dumps(row) + "\n" for row in old))
    before = file.read_text()
    with pytest.warns(UserWarning, match="runs of an older rlsched"):
        compare(plan, ZERO, tmp_path)
    assert file.read_text() == before
    assert "replay" not in report(tmp_path)


@pytest.mark.parametrize("paths", [[], [[(0, dict.fromkeys(CONTROL_NAMES, 0.0))]]], ids=["none", "one"])
def test_paths_are_for_replays(paths):
    """A replay of nothing would be a run of the policy, or NaN, under another name; and no other schedule has any."""
    schedule = POLICY if paths else REPLAY
    with pytest.raises(ValueError, match="paths"):
        perform(Trial("digits", "sgd", 5, schedule, 1.0, 0), DIGITS, ZERO, paths=paths)


def test_digits_run_is_the_plain_loop_that_its_description_says():
    """Results of years would not go together if split, weights, order or loss changed; the table says what they are."""
    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    x, y, validation_x, validation_y = x[order[360:]], y[order[360:]], x[order[:360]], y[order[:360]]
    torch.manual_seed(7)
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    first_loss = functional.cross_entropy(network(validation_x), validation_y).item()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.03, momentum=0.9)
    generator = torch.Generator().manual_seed(7)
    epochs = torch.cat([torch.randperm(1437, generator=generator)[: 1437 // 32 * 32] for _ in range(2)])
    for rows in epochs.view(-1, 32)[:50]:
        optimizer.zero_grad()
        functional.cross_entropy(network(x[rows]), y[rows]).backward()
        optimizer.step()
    outputs = network(validation_x)
    result = perform(Trial("digits", "sgd", 50, "constant", 0.3, 7), DIGITS, ZERO)
    assert result["log_loss"] == pytest.approx(math.log(functional.cross_entropy(outputs, validation_y).item()), 1e-6)
    assert result["first_log_loss"] == pytest.approx(math.log(first_loss), 1e-6)
    assert result["accuracy"] == pytest.approx((outputs.argmax(-1) == validation_y).float().mean().item())


@pytest.mark.parametrize(
    ("tasks", "names"),
    [
        ("digits", ["digits"]),
        (["conv", "digits"], ["conv", "digits"]),
        ({"mine": MINE, "yours": DIGITS}, ["mine", "yours"]),
        ([f"{__name__}:MINE"], [f"{__name__}:MINE"]),
        ([f"{__name__}:SEVERAL", "mlp"], [f"{__name__}:SEVERAL[0]", f"{__name__}:SEVERAL[1]", "mlp"]),
    ],
)
def test_tasks_are_known_by_the_names_they_were_given(tasks, names):
    """Results that are kept under another name would be made again, or mixed up with those of another task."""
    plan = Plan(tasks)
    assert list(plan.inner_tasks) == names
    assert list(dict.fromkeys(trial.task for trial in plan.trials())) == names


def test_any_inner_task_is_compared_on(tmp_path):
    """A comparison on the author's tasks says nothing of the user's own, whose losses and outputs are of any kind."""
    tasks = {"mine": MINE, **named(["attention", "two-heads", "quadratic"])}
    plan = Plan(tasks, ("sgd",), (8,), seeds=2, policy_factors=(1.0,), sweep=(0.1, 1.0))
    compare(plan, ZERO, tmp_path)
    rows = read(tmp_path / RUNS, key)
    assert {trial for trial, _ in rows} == set(plan.trials())
    for (trial, _), row in rows.items():
        assert row["first_log_loss"] != row["log_loss"]
        assert (row["accuracy"] is None) == (trial.task != "mine")
        assert {type(accuracy) for _, _, accuracy, _, _ in row["curve"]} == {type(row["accuracy"])}
    text = report(tmp_path)
    assert all(f"{task}, sgd, 8 steps" in text for task in tasks)


class Modes(nn.Module):
    """Notes in which mode it was called; its loss is its number in training, and twice that in validation."""

    def __init__(self):
        super().__init__()
        self.number, self.calls = nn.Parameter(torch.tensor(1.0)), []

    def forward(self, x):
        self.calls.append((len(x), self.training))
        return self.number * (1.0 if self.training else 2.0)


def test_network_trains_in_training_mode_and_validates_in_the_other():
    """Dropout would blur the validation loss, and batch norm train on the validation points, or not at all."""
    network = Modes()
    task = InnerTask(lambda: network, (torch.zeros(30, 1), torch.zeros(30)), lambda outputs, _: outputs, batch_size=5)
    result = perform(Trial("modes", "sgd", 3, "constant", 1.0, 0), task, ZERO)
    assert network.calls == [(6, False), *[(5, True), (6, False)] * 3]
    assert result["first_log_loss"] == pytest.approx(math.log(2))


def test_perfect_network_has_a_logarithm():
    """A cross-entropy of 0, in float32 not rare, would end a comparison of hours with a math domain error."""
    task = InnerTask(
        partial(nn.Linear, 1, 1), (torch.ones(10, 1), torch.ones(10)), lambda outputs, _: 0 * outputs.sum()
    )
    result = perform(Trial("zero", "sgd", 2, "constant", 1.0, 0), task, ZERO)
    assert result["log_loss"] == math.log(SMALLEST_LOSS)


@pytest.mark.parametrize("size", [64, (4, 16)])
def test_batch_is_the_largest_of_the_task_and_of_its_points(size):
    """A task with few points would end in an empty batch, whose mean is NaN; one with a range in noise of any size."""
    trial = Trial("mine", "sgd", 4, "constant", 1.0, 0)
    given, whole = (perform(trial, replace(MINE, batch_size=batch_size), ZERO) for batch_size in (size, 16))
    assert given["curve"] == whole["curve"]


def test_what_was_interrupted_does_not_keep_the_rest_from_the_table(tmp_path, monkeypatch):
    """Half of a comparison in the same folder would end the report of a whole one with a traceback."""

    def interrupted(trial, *args):
        if trial.schedule != POLICY:
            raise KeyboardInterrupt
        return perform(trial, *args)

    with monkeypatch.context() as patch:
        patch.setattr(compare_run, "perform", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare(replace(PLAN, tasks={"mine": MINE}), ZERO, tmp_path)
    compare(replace(PLAN, seeds=1), ZERO, tmp_path)
    rows = [line.split(" | ") for line in report(tmp_path).splitlines()]
    assert rows[0][2:] == ["mine, sgd, 8 steps", "digits, sgd, 8 steps |"]
    (cosine,) = (row for row in rows if row[0] == "| cosine, best of 2")
    assert cosine[2] == "–" and cosine[3] != "– |"


def test_same_trial_is_done_once(tmp_path):
    """A name or a factor that is given twice would count twice in a mean."""
    plan = Plan(("digits", "digits"), ("sgd", "sgd"), (4,), seeds=1, policy_factors=(1.0, 1.0), sweep=(1.0, 1.00001))
    compare(plan, ZERO, tmp_path)
    assert len((tmp_path / RUNS).read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tasks", ("imagenet",), "tasks must be some of .*'digits', 'mnist', 'quadratic'.*, got 'imagenet'"),
        ("tasks", (), r"tasks must be some of .*, got \(\)"),
        ("tasks", MINE, "tasks must be .*{'mine': task}, got InnerTask"),
        ("tasks", (MINE,), "tasks must be .*{'mine': task}, got InnerTask"),
        ("tasks", {"mine": nn.Linear(2, 2)}, "tasks must map names to .* InnerTask, got {'mine': Linear"),
        ("tasks", (f"{__name__}:NUMBER",), "NUMBER': tasks must be an InnerTask or a sequence of them, got 5"),
        ("tasks", (f"{__name__}:NOTHING",), "tasks=.*NOTHING' cannot be imported"),
        ("tasks", ("mnist",), "mnist needs --data FOLDER"),
        ("optimizers", (), r"optimizers must be .*some of \['adam', 'adamw', 'sgd'\], got \(\)"),
        ("optimizers", "sgd", "optimizers must be a sequence .* got 'sgd'"),
        ("optimizers", ("lion",), r"optimizers must be .*, got \('lion',\)"),
        ("steps", (0,), r"steps must be .* at least 1, got \(0,\)"),
        ("steps", (1.5,), "steps must be .*whole"),
        ("steps", 400, "steps must be a sequence .*, got 400"),
        ("seeds", 0, "seeds must be .* at least 1, got 0"),
        ("seeds", 1.5, "seeds must be .*, got 1.5"),
        ("policy_factors", (math.nan,), "policy_factors must be .*finite"),
        ("policy_factors", ("1",), "policy_factors must be .*numbers"),
        ("sweep", (-1.0,), r"sweep must be .* at least 0.0001, got \(-1.0,\)"),
        ("sweep", (1e-5,), "sweep must be .* at least 0.0001"),
    ],
)
def test_plan_names_the_wrong_field(field, value, message):
    """A typing mistake should not cost more than a second."""
    with pytest.raises(ValueError, match=message):
        Plan(**{field: value})


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (InnerTask(partial(nn.Linear, 2, 4), POINTS), "'bad' fails on its own data, RuntimeError: .*shapes"),
        (InnerTask(lambda: 5, POINTS), "'bad' fails on its own data, TypeError: .*nn.Module"),
        (replace(MINE, loss=lambda outputs, _: outputs), "'bad' fails on its own data"),
        (replace(MINE, loss=lambda outputs, _: -(outputs**2).mean()), "'bad' must be positive and finite .*, it is -"),
        (
            replace(MINE, loss=lambda outputs, _: outputs.square().sum() / 0),
            "'bad' must be positive and finite .*, it is inf",
        ),
    ],
    ids=["shapes", "no module", "no number", "negative", "infinite"],
)
def test_task_that_cannot_be_compared_on_is_named_before_the_first_run(task, message, tmp_path):
    """The mistake in the last of ten tasks would show after an hour."""
    with pytest.raises(ValueError, match=message):
        compare(Plan({"digits": DIGITS, "bad": task}), ZERO, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_loss_that_becomes_negative_is_no_divergence():
    """It has no logarithm; the best run of all would count as the worst."""
    sinking = InnerTask(Modes, (torch.zeros(30, 1), torch.zeros(30)), lambda outputs, _: outputs, batch_size=5)
    with pytest.raises(ValueError, match=r"loss of task 'sinking' must not be negative .* became -"):
        perform(Trial("sinking", "sgd", 20, "constant", 10.0, 0), sinking, ZERO)


def test_missing_files_are_named(tmp_path):
    """Which of the options was wrong should be seen at once."""
    with pytest.raises(FileNotFoundError, match=r"--data: .* has neither"):
        mnist(tmp_path)
