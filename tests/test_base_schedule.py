"""What a schedule does while the policy stands still: against its formula, and where it has to arrive exactly."""

import math
from itertools import pairwise

import pytest
import torch
from helpers import lively_policy, loss_at, network, train

from rlsched import ScheduledOptimizer, SchedulePolicy
from rlsched.base_schedule import BASE_SCHEDULES, BaseSchedule, named_base_schedule

# One more than there are, which bends at any step, and begins at zero.
BENT = BaseSchedule("bent", "for tests", ((0.0, 0.0), (0.137, 1.0), (0.71, 0.9), (1.0, 0.05)))
SCHEDULES = {**BASE_SCHEDULES, BENT.name: BENT}
EACH = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
TOTALS = [1, 2, 7, 60, 250]


@pytest.fixture(autouse=True)
def _one_more(monkeypatch):
    """The schedule above is among those that there are."""
    monkeypatch.setitem(BASE_SCHEDULES, BENT.name, BENT)


def of_knots(schedule, progress):
    """The factor as the knots tell it."""
    for (start, left), (end, right) in pairwise(schedule.knots):
        if start <= progress <= end:
            return left + (right - left) * (progress - start) / (end - start)


def test_linear_decay_to_zero_is_linear():
    """Its last step must still train, and its first be at the base learning rate."""
    assert [BASE_SCHEDULES["linear"].factor(n, 4) for n in range(4)] == [1, 0.75, 0.5, 0.25]
    for total in TOTALS:
        assert [BASE_SCHEDULES["linear"].factor(n, total) for n in range(total)] == [
            1 - n / total for n in range(total)
        ]


@EACH
def test_entry_keeps_what_knots_promise(schedule):
    """A highest factor other than 1 would train at another learning rate than the user's, by the choice of a shape."""
    fractions = [fraction for fraction, _ in schedule.knots]
    assert fractions[0] == 0 and fractions[-1] == 1 and fractions == sorted(set(fractions))
    assert max(factor for _, factor in schedule.knots) == 1
    assert min(factor for _, factor in schedule.knots) >= 0
    assert SCHEDULES[schedule.name] is schedule and schedule.meaning


@EACH
@pytest.mark.parametrize("total", TOTALS)
def test_factor_is_that_of_the_knots(schedule, total):
    """A warm-up that ends a step late, or a decay that begins early, would be another schedule than the one named."""
    factors = [schedule.factor(n, total) for n in range(total)]
    assert factors == pytest.approx([of_knots(schedule, n / total) for n in range(total)], rel=1e-12, abs=1e-15)
    steps, totals = torch.arange(total, dtype=torch.float64), torch.full((total,), float(total), dtype=torch.float64)
    assert schedule.factor(steps, totals).tolist() == pytest.approx(factors, rel=1e-12, abs=1e-15)


@EACH
@pytest.mark.parametrize("total", TOTALS)
def test_factor_is_linear_between_the_steps_of_its_knots(schedule, total):
    """A frozen schedule is made of these steps: one that is missing would cut a corner."""
    steps = sorted(schedule.steps_of_knots(total) | {0, total - 1})
    assert steps[0] == 0 and steps[-1] == total - 1
    for left, right in pairwise(steps):
        a, b = schedule.factor(left, total), schedule.factor(right, total)
        for n in range(left, right):
            expected = a + (b - a) * (n - left) / (right - left)
            assert schedule.factor(n, total) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@EACH
@pytest.mark.parametrize("total", [1, 2, 40])
@pytest.mark.parametrize("decisions", [1, 8])
def test_policy_that_stands_still_gives_its_base_schedule_exactly(schedule, total, decisions):
    """Who chooses another base schedule would compare the policy with something a little different."""
    model, plain = network(), network()
    policy = SchedulePolicy.zero(schedule.name)
    inner = torch.optim.AdamW(model.parameters(), 0.01)
    optimizer = ScheduledOptimizer(inner, total_steps=total, decisions=decisions, policy=policy)
    lrs = [lr for ((lr, _),) in train(model, optimizer, range(total))]
    assert lrs == [0.01 * schedule.factor(n, total) for n in range(total)]
    alone = torch.optim.AdamW(plain.parameters(), 0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(alone, lambda n: schedule.factor(min(n, total - 1), total))
    for step in range(total):
        alone.zero_grad()
        loss_at(plain, step).backward()
        alone.step()
        scheduler.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.filterwarnings("ignore:rlsched. the run moved momentum")
@EACH
@pytest.mark.parametrize("make", [SchedulePolicy.zero, lively_policy], ids=["standing still", "on the move"])
@pytest.mark.parametrize("total, decisions", [(1, 5), (2, 5), (7, 5), (60, 20), (250, 7)])
def test_frozen_run_is_exact_at_every_step(schedule, make, total, decisions):
    """A replay that cuts a corner of the base schedule would train at learning rates that the run did not have."""
    model = network()
    inner = torch.optim.AdamW(model.parameters(), 0.1)  # of which the lr is not scaled along with momentum
    policy = make(base_schedule=schedule.name)
    optimizer = ScheduledOptimizer(inner, total_steps=total, decisions=decisions, policy=policy)
    lrs = [lr for ((lr, _),) in train(model, optimizer, range(total))]
    frozen = optimizer.freeze()
    assert frozen.base_schedule == schedule.name
    assert [0.1 * frozen(n) for n in range(total)] == pytest.approx(lrs, rel=1e-12, abs=1e-15)


@EACH
def test_policy_keeps_its_base_schedule_in_its_file(schedule, tmp_path):
    """A policy that was trained on one base schedule would decide upon another, and go by the same name."""
    policy = SchedulePolicy.zero(schedule.name)
    loaded = SchedulePolicy.load(policy.save(tmp_path / "policy.safetensors"))
    assert loaded.base_schedule is schedule
    others = {SchedulePolicy.zero(name).digest for name in SCHEDULES if name != schedule.name}
    assert loaded.digest == policy.digest and policy.digest not in others


def test_unknown_name_is_refused():
    """A misspelt warm-up would be none."""
    with pytest.raises(ValueError, match=r"base_schedule must be one of \['linear'.*got 'cosine'"):
        named_base_schedule("cosine")


def test_probe_comes_before_any_base_schedule():
    """A base schedule that begins at zero would make the probe a step of nothing, which tells nothing."""
    model = network()
    policy = SchedulePolicy.zero(BENT.name)
    policy.safe_start = True
    optimizer = ScheduledOptimizer(torch.optim.SGD(model.parameters(), 0.1), total_steps=40, policy=policy)
    (((first, _),), *rest) = train(model, optimizer, range(40))
    assert first == pytest.approx(0.1 * math.exp(-7))
    assert [lr for ((lr, _),) in rest] == pytest.approx([0.1 * BENT.factor(n, 40) for n in range(1, 40)])
    assert optimizer.freeze()(0) == pytest.approx(math.exp(-7))


def test_warm_up_rises_holds_and_decays():
    """A warm-up that is over at once, or a plateau that decays, is not what its name promises."""
    shapes = {name: [schedule.factor(n, 1000) for n in range(1000)] for name, schedule in BASE_SCHEDULES.items()}
    assert set(shapes["constant"]) == {1.0}
    for name in ("warm-up-linear", "warm-up-stable-decay"):
        assert [shapes[name][n] for n in (0, 25, 50)] == pytest.approx([0.01, 0.505, 1])
    assert shapes["warm-up-linear"][525] == pytest.approx(0.5)
    assert shapes["warm-up-stable-decay"][50:801] == pytest.approx([1.0] * 751)
    assert shapes["warm-up-stable-decay"][900] == pytest.approx(0.5)
    assert shapes["warm-up-stable-decay"][-1] == pytest.approx(shapes["warm-up-linear"][-1] * 4.75)
