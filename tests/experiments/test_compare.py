"""The comparison of schedules."""

import json
import math

import pytest
import torch

from rlsched import SchedulePolicy
from rlsched.experiments.compare import run as compare_run
from rlsched.experiments.compare.analysis import PLOT, TABLE, WORST, Results, Setting, report
from rlsched.experiments.compare.run import OPTIMIZERS, RUNS, Plan, Run, compare, perform

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
