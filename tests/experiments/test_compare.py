"""The comparison of schedules."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import lively_policy

from rlsched import SchedulePolicy
from rlsched.experiments.compare import run as compare_run
from rlsched.experiments.compare.analysis import WORST, Results, Setting, report
from rlsched.experiments.compare.run import OPTIMIZERS, POLICY, REPLAY, RUNS, Plan, Run, compare, perform
from rlsched.experiments.records import PLOT, TABLE

PLAN = Plan(optimizers=("sgd",), steps=(8,), seeds=2, policy_factors=(1.0, 10.0), sweep=(0.1, 1.0))
ZERO = SchedulePolicy.zero()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zero_policy_does_the_work_of_the_linear_schedule(optimizer):
    """Unequal work, weights or data between the learned schedule and the others would make the comparison a lie."""
    learned = perform(Run("digits", optimizer, 12, "policy", 1.0, 3), ZERO)
    linear = perform(Run("digits", optimizer, 12, "linear", 1.0, 3), ZERO)
    assert learned["curve"] == linear["curve"]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rates_follow_their_formula(schedule):
    """A baseline whose schedule is off by one step or one factor is a straw man."""
    curve = perform(Run("digits", "adam", 10, schedule, 2.0, 0), ZERO)["curve"]
    formula = {
        "constant": lambda t: 1.0,
        "linear": lambda t: 1 - t,
        "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    }[schedule]
    assert [row[3] for row in curve] == pytest.approx([2e-3 * formula(n / 10) for n in range(10)], rel=1e-4)


def test_baselines_learn():
    """A baseline that stays near chance where it should not is a bug in the benchmark."""
    result = perform(Run("digits", "sgd", 150, "cosine", 1.0, 0), ZERO)
    assert result["accuracy"] > 0.8
    assert result["log_loss"] < math.log(math.log(10)) - 1


def test_interrupted_comparison_goes_on(tmp_path, monkeypatch):
    """An hour of finished runs must survive Ctrl-C, and no run may be counted twice."""
    performed = []

    def interrupted(run, *args):
        performed.append(run)
        if len(performed) == 5:
            raise KeyboardInterrupt
        return perform(run, *args)

    monkeypatch.setattr(compare_run, "perform", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(PLAN, ZERO, tmp_path)
    assert len((tmp_path / RUNS).read_text().splitlines()) == 4
    compare(PLAN, ZERO, tmp_path)
    rows = [json.loads(line)["run"] for line in (tmp_path / RUNS).read_text().splitlines()]
    assert [Run(**row) for row in rows] == list(PLAN.runs())
    text = report(tmp_path, ZERO.digest)
    assert "learned, lr × 10" in text
    assert "best of 2" in text
    assert "replay of its mean, lr × 10" in text
    assert (tmp_path / TABLE).read_text().strip() == text
    assert (tmp_path / PLOT).stat().st_size > 10_000


def test_another_policy_is_not_mistaken_for_this_one(tmp_path):
    """Results of an older policy in the same folder must not be shown as the new one's."""
    layer = torch.full((3, 20), 0.1), torch.zeros(3)
    plan = Plan(optimizers=("sgd",), steps=(6,), seeds=1, policy_factors=(1.0,), sweep=(1.0,))
    other = SchedulePolicy([layer])
    for policy in (ZERO, other):
        compare(plan, policy, tmp_path)
    setting = Setting("digits", "sgd", 6)
    for policy in (ZERO, other):
        (row,) = Results(tmp_path, policy.digest).runs[setting]["policy"][1.0]
        assert row["policy"] == policy.digest


def test_diverged_run_counts_as_the_worst(tmp_path):
    """A NaN would win every comparison, or poison every mean."""
    plan = Plan(optimizers=("sgd",), steps=(30,), seeds=1, policy_factors=(1.0,), sweep=(1e6,))
    compare(plan, ZERO, tmp_path)
    assert Results(tmp_path, ZERO.digest).log_loss(Setting("digits", "sgd", 30), "constant", 1e6) == WORST


@pytest.mark.parametrize(("optimizer", "factor"), [("sgd", 100.0), ("adam", 0.1)])
def test_replay_of_a_runs_own_path_is_the_run(optimizer, factor):
    """A replay that left out the probe, momentum or clipping would lose to the policy, and adapting seem to win."""
    run = Run("digits", optimizer, 16, POLICY, factor, 3)
    learned = perform(run, lively_policy())
    replayed = perform(replace(run, schedule=REPLAY), lively_policy(), None, None, [learned["control_path"]])
    np.testing.assert_allclose(replayed["control_path"], learned["control_path"], rtol=1e-4)
    for column in (1, 3, 4):  # validation loss, learning rate, momentum
        np.testing.assert_allclose(*(np.array(r["curve"])[:, column] for r in (replayed, learned)), rtol=1e-3)


def test_replay_follows_the_mean_of_the_other_seeds(tmp_path):
    """A replay that had seen its own run, or but one of the others, would be no open-loop schedule of the policy."""
    plan = Plan(optimizers=("sgd",), steps=(20,), seeds=3, policy_factors=(1.0,), sweep=(1.0,))
    policy = lively_policy()
    compare(plan, policy, tmp_path)
    runs = Results(tmp_path, policy.digest).runs[Setting("digits", "sgd", 20)]
    learned, replays = (np.array([row["control_path"] for row in runs[name][1.0]]) for name in (POLICY, REPLAY))
    assert [row["run"]["seed"] for row in runs[REPLAY][1.0]] == [0, 1, 2]
    assert np.ptp(learned[:, -1, 1]) > 0.1, "paths that are all the same prove nothing"
    for seed in range(3):
        mean = np.delete(learned, seed, axis=0).mean(0)
        # The first decisions make up for a safe start of its own.
        np.testing.assert_allclose(replays[seed][3:], mean[3:], atol=1e-3)


def test_single_seed_has_no_replay():
    """The mean of no runs is NaN, and so would be the learning rate."""
    plan = Plan(seeds=1)
    assert REPLAY not in {run.schedule for run in plan.runs()}


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
    assert "replay" not in report(tmp_path, ZERO.digest)


@pytest.mark.parametrize(
    ("field", "value"),
    [("tasks", ("imagenet",)), ("optimizers", ()), ("steps", (0,)), ("seeds", 0), ("sweep", (-1.0,))],
)
def test_plan_names_the_wrong_field(field, value):
    """A typing mistake should not cost more than a second."""
    with pytest.raises(ValueError, match=field):
        Plan(**{field: value})


def test_results_line_that_is_no_json_is_named(tmp_path):
    """A line cut by a full disk should be found by number, not by search."""
    (tmp_path / RUNS).write_text('{"run"')
    with pytest.raises(ValueError, match="line 1"):
        compare(PLAN, ZERO, tmp_path)
