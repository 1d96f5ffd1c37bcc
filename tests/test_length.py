"""How long a run is: extended, shortened, of unknown length, finished, counted in epochs."""

import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import FACES, always, assert_same_weights, lively_policy, network, perceptron, train
from test_resume import saved_and_loaded
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR
from torch.utils.data import DataLoader, IterableDataset

from rlsched import FrozenSchedule, ScheduledOptimizer, SchedulePolicy, attach, steps_of
from rlsched.base_schedule import BASE_SCHEDULES
from rlsched.length import Length
from rlsched.signals import Run

pytestmark = pytest.mark.filterwarnings("ignore:rlsched. the run moved momentum")  # where it is replayed

EACH_FACE = pytest.mark.parametrize("face", FACES)
EACH_BASE = pytest.mark.parametrize("base", BASE_SCHEDULES)


def started(total_steps, policy=None, face=ScheduledOptimizer, make=None, **options):
    """A model, what steps its weights, and what knows the length of the run."""
    model = network()
    inner = (make or (lambda p: torch.optim.AdamW(p, 0.01)))(model.parameters())
    policy = lively_policy() if policy is None else policy
    driver = face(inner, total_steps=total_steps, policy=policy, **{"decisions": 8, **options})
    return model, inner if face is attach else driver, driver


def lrs_of(model, optimizer, steps):
    """The learning rate of the first group in each of these steps."""
    return [groups[0][0] for groups in train(model, optimizer, steps)]


def still(base="linear"):
    """The policy that stands still on a base schedule."""
    return SchedulePolicy.zero(base)


class Clock(SchedulePolicy):
    """Stands still, and remembers what it saw of the clock."""

    names = ("progress", "decisions", "decisions_left")

    def __init__(self):
        actor = perceptron([(torch.zeros(1, 3), torch.zeros(1))], self.names, ("lr",)).actor
        super().__init__(actor, self.names, ("lr",))
        self.seen = []

    def act(self, observation, memory=None):
        self.seen.append(observation.tolist())
        return super().act(observation, memory)


# --- A base schedule that goes on -----------------------------------------------------------------------------------


@EACH_BASE
@pytest.mark.parametrize("progress", [0.0, 0.03, 0.05, 0.3, 0.85, 0.99])
@pytest.mark.parametrize("new", [0.0, 0.001, 0.2, 0.6, 0.999])
def test_rest_is_the_schedule_at_another_pace(base, progress, new):
    """A learning rate that jumps throws back what has settled; one that ends elsewhere has not annealed."""
    schedule = BASE_SCHEDULES[base]
    rest = schedule.rest(progress, new)
    for left in (0.0, 0.1, 0.5, 0.77, 1.0):
        expected = schedule.factor(progress + left * (1 - progress), 1.0)
        assert rest.factor(new + left * (1 - new), 1.0) == pytest.approx(expected, abs=1e-9)
    assert rest.factor(new, 1.0) == schedule.factor(progress, 1.0), "to the bit"
    assert rest.factor(new / 2, 1.0) == schedule.factor(progress, 1.0)
    assert max(factor for _, factor in rest.knots) <= 1
    fractions = [fraction for fraction, _ in rest.knots]
    assert fractions[0] == 0 and fractions[-1] == 1 and fractions == sorted(set(fractions))


@EACH_BASE
def test_nothing_is_left_after_the_end(base):
    """A division by what is left would be one by zero."""
    schedule = BASE_SCHEDULES[base]
    for rest in (schedule.rest(0.5, 1.0), schedule.rest(1.0, 0.5)):
        assert {factor for _, factor in rest.knots} in ({schedule.factor(0.5, 1.0)}, {schedule.factor(1.0, 1.0)})


# --- Extending ------------------------------------------------------------------------------------------------------


@EACH_FACE
def test_extended_decay_goes_on_in_a_straight_line(face):
    """The learning rate would jump up at once, or the rest of the run train at a learning rate of zero."""
    model, optimizer, driver = started(40, still(), face)
    before = lrs_of(model, optimizer, range(30))
    driver.extend(90)
    after = lrs_of(model, optimizer, range(30, 90))
    assert before == [0.01 * (1 - n / 40) for n in range(30)]
    assert after == pytest.approx([0.01 * 0.25 * (90 - n) / 60 for n in range(30, 90)], rel=1e-9)


@pytest.mark.parametrize("step", [0, 1, 5, 13, 39])
@pytest.mark.parametrize("total", [40, 45, 300])
@EACH_BASE
def test_learning_rate_goes_on_where_it_is(base, total, step):
    """What was decided for a learning rate would hold for another one."""
    model, optimizer, driver = started(40, lively_policy(base_schedule=base))
    lrs_of(model, optimizer, range(step))
    controller = driver.controller
    before = controller.groups.lr(0, controller.groups.lr_of_base_schedule(0, controller._decay()))
    states = dict(controller.state.control)
    driver.extend(total)
    assert controller.groups.lr(0, controller.groups.lr_of_base_schedule(0, controller._decay())) == before
    assert controller.state.control == states and controller.total_steps == total
    lrs = lrs_of(model, optimizer, range(step, total))
    assert all(math.isfinite(lr) and lr > 0 for lr in lrs)
    if base != "constant":
        assert controller._decay() < controller.length.base_schedule.factor(total // 2, total)


def test_warm_up_does_not_overshoot():
    """A factor that makes up for a warm-up would be ten times the learning rate after it."""
    model, optimizer, driver = started(100, still("warm-up-linear"))
    lrs_of(model, optimizer, range(2))
    driver.extend(1000)
    lrs = lrs_of(model, optimizer, range(2, 1000))
    assert max(lrs) == pytest.approx(0.01, rel=0.01)
    assert lrs[0] == pytest.approx(0.01 * BASE_SCHEDULES["warm-up-linear"].factor(2, 100))


def test_run_that_is_extended_before_it_begins_is_one_of_that_length():
    """A framework that knows the length late would get another schedule."""
    one, other = started(40), started(90)
    one[2].extend(90)
    assert train(*one[:2], range(90)) == train(*other[:2], range(90))
    assert_same_weights(one[0], other[0])
    assert one[2].freeze() == other[2].freeze()


def test_policy_sees_the_new_length_and_decides_as_often():
    """A policy that believes the run at its end would not raise what it could; windows of old would be many more."""
    policy = Clock()
    model, optimizer, driver = started(80, policy, decisions=8)  # windows of 10
    lrs_of(model, optimizer, range(45))
    driver.extend(400)  # windows of 50
    lrs_of(model, optimizer, range(45, 400))
    starts = [window.start for window in driver.controller.windows]
    assert starts == [0, 1, 11, 21, 31, 41, 45, 51, 101, 151, 201, 251, 301, 351]
    progress = [seen[0] for seen in policy.seen]
    assert progress == pytest.approx([n / 80 for n in (1, 11, 21, 31, 41)] + [n / 400 for n in range(51, 400, 50)])
    assert [seen[1] for seen in policy.seen] == pytest.approx([math.log(8) - 4] * len(policy.seen), abs=1e-6)
    assert driver.controller.state.window_end == 400


@pytest.mark.parametrize("overrun", [0, 1, 7, 30])
def test_run_that_has_ended_decides_again(overrun):
    """A run that is extended late would go on without a policy for ever: its decision would never be due."""
    model, optimizer, driver = started(20, lively_policy(), decisions=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, optimizer, range(20 + overrun))
    decided = len(driver.controller.windows)
    driver.extend(150)  # windows of 30
    lrs = lrs_of(model, optimizer, range(20 + overrun, 150))
    assert len(driver.controller.windows) > decided + 3
    frozen = driver.freeze()
    assert [0.01 * frozen(n) for n in range(20 + overrun, 150)] == pytest.approx(lrs, rel=1e-9)


def test_run_can_be_shortened():
    """When time runs out, a run that is cut off has not annealed."""
    model, optimizer, driver = started(100, still())
    lrs_of(model, optimizer, range(40))
    driver.finish(10)
    assert driver.controller.total_steps == 50
    assert lrs_of(model, optimizer, range(40, 50)) == pytest.approx([0.006 * (10 - n) / 10 for n in range(10)])
    assert driver.freeze().total_steps == 50


def test_run_can_end_where_it_is():
    """A run that is stopped early, and frozen as what it was, would be refused, or have a step too many."""
    model, optimizer, driver = started(100, lively_policy())
    lrs = lrs_of(model, optimizer, range(43))
    driver.extend(43)
    frozen = driver.freeze()
    assert frozen.total_steps == 43
    assert [0.01 * frozen(n) for n in range(43)] == pytest.approx(lrs, rel=1e-12)


def test_less_than_what_is_done_is_refused():
    """A run would be past its end before it has begun to anneal, and nobody would know."""
    model, optimizer, driver = started(40)
    lrs_of(model, optimizer, range(30))
    with pytest.raises(ValueError, match="total_steps must be at least the 30 steps that are done, got 29"):
        driver.extend(29)
    assert driver.controller.total_steps == 40
    for wrong in (0, -1, 2.5, None, True, "90"):
        with pytest.raises(ValueError, match="total_steps must be a positive int"):
            driver.extend(wrong)
        with pytest.raises(
            ValueError, match="steps must be a positive int, the number of optimizer steps that are left"
        ):
            driver.finish(wrong)


def test_shadow_and_followed_schedulers_are_extended_too():
    """The proposals, or the policy's share, would be those of a run that is over."""
    model, optimizer, driver = started(40, lively_policy(), shadow=True)
    lrs_of(model, optimizer, range(30))
    driver.extend(90)
    assert set(lrs_of(model, optimizer, range(30, 90))) == {0.01}
    assert driver.controller.windows[-1].start > 70
    model, optimizer, driver = started(40, always(lr=0.1), follow_scheduler=True)
    scheduler = ExponentialLR(optimizer, 0.99)
    for step in range(90):
        if step == 30:
            driver.extend(90)
        train(model, optimizer, [step])
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.99**step)
        scheduler.step()
    assert driver.controller.windows[-1].start > 70


# --- Frozen, and resumed --------------------------------------------------------------------------------------------


LENGTHS = {  # what is done with the length of a run, after so many steps
    "extended": (60, {25: ("extend", 100)}, 100),
    "extended twice": (60, {25: ("extend", 100), 77: ("extend", 150)}, 150),
    "extended in the probe": (60, {1: ("extend", 100)}, 100),
    "shortened": (100, {25: ("finish", 30)}, 55),
    "unknown": (None, {70: ("finish", 40)}, 110),
    "unknown, extended, shortened": (None, {30: ("extend", 90), 50: ("extend", 130), 100: ("finish", 10)}, 110),
}


def through(changes, model, optimizer, driver, steps):
    """The learning rates of these steps of a run whose length changes."""
    lrs = []
    for step in steps:
        if step in changes:
            name, number = changes[step]
            getattr(driver, name)(number)
        lrs += lrs_of(model, optimizer, [step])
    return lrs


@EACH_BASE
@pytest.mark.parametrize("total, changes, end", LENGTHS.values(), ids=LENGTHS)
def test_frozen_run_is_the_run(total, changes, end, base, tmp_path):
    """A replay would follow the base schedule of a length that the run never had."""
    run = started(total, lively_policy(base_schedule=base), decisions=7)
    lrs = through(changes, *run, range(end))
    frozen = FrozenSchedule.load(run[2].freeze().save(tmp_path / "schedule.json"))
    assert frozen.total_steps == end
    assert [0.01 * frozen(n) for n in range(end)] == pytest.approx(lrs, rel=1e-9)


@pytest.mark.parametrize("stop", [0, 1, 24, 25, 26, 40, 69, 71, 90])
@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("total, changes, end", LENGTHS.values(), ids=LENGTHS)
def test_run_goes_on_bit_equal(total, changes, end, face, stop):
    """A job that is preempted after its length was changed would train another network than one that is not."""
    stop = min(stop, end)
    run = started(total, lively_policy(), face, patience=3, averaging=True)
    through(changes, *run, range(stop))
    states = saved_and_loaded([part.state_dict() for part in run])
    length = (run[2] if face is attach else run[2].controller).total_steps  # a script that knows where it was
    again = started(length, lively_policy(), face, patience=3, averaging=True)
    for part, state in zip(again, states, strict=True):
        part.load_state_dict(state)
    expected = through(changes, *run, range(stop, end))
    assert through(changes, *again, range(stop, end)) == expected
    assert_same_weights(again[0], run[0])
    with again[2].averaged(again[0]), run[2].averaged(run[0]):
        assert_same_weights(again[0], run[0])
    assert again[2].freeze() == run[2].freeze()


def test_resuming_with_more_steps_extends():
    """A run that is to go on for longer, the commonest reason to resume, would be refused."""
    one, other = started(40), started(40)
    train(*one[:2], range(30))
    train(*other[:2], range(30))
    state = saved_and_loaded([part.state_dict() for part in other[:2]])
    longer = started(90)
    for part, saved in zip(longer[:2], state, strict=True):
        part.load_state_dict(saved)
    one[2].extend(90)
    assert train(*longer[:2], range(30, 90)) == train(*one[:2], range(30, 90))
    assert_same_weights(longer[0], one[0])


def test_run_of_known_length_keeps_it_where_none_is_given():
    """A script with total_steps=None that has finished its run, and is preempted, would begin it anew."""
    run = started(None, lively_policy())
    train(*run[:2], range(30))
    run[2].finish(20)
    train(*run[:2], range(30, 40))
    again = started(None, lively_policy())
    for part, saved in zip(again[:2], saved_and_loaded([part.state_dict() for part in run[:2]]), strict=True):
        part.load_state_dict(saved)
    assert again[2].controller.total_steps == 50
    assert train(*again[:2], range(40, 50)) == train(*run[:2], range(40, 50))


# --- Unknown length -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decisions", [1, 8, 100])
def test_run_of_unknown_length_is_always_in_its_first_half(decisions):
    """A run that believes itself at its end would anneal, and then train on for nothing."""
    length, lengths = Length(None, decisions, BASE_SCHEDULES["linear"]), []
    for step in range(20_000):
        run = length.measured(Run(0, 0, 1, 1), step)
        assert step < run.total_steps / 2
        assert run.interval == math.ceil(run.total_steps / decisions) and run.interval >= 10
        lengths.append(run.total_steps)
    assert lengths[0] == 10 * decisions
    assert all(b in (a, 2 * a) for a, b in pairwise(sorted(set(lengths))))
    assert lengths[-1] <= max(10 * decisions, 4 * 20_000)


@EACH_FACE
@EACH_BASE
def test_unknown_length_is_constant_and_then_decays(face, base):
    """Whoever does not know when a run ends would get a schedule for some other run."""
    model, optimizer, driver = started(None, still(base), face)
    assert set(lrs_of(model, optimizer, range(150))) == {0.01}
    driver.finish(50)
    after = lrs_of(model, optimizer, range(150, 200))
    constant = base == "constant"
    assert after == pytest.approx([0.01 if constant else 0.01 * (50 - n) / 50 for n in range(50)], rel=1e-9)


def test_windows_of_an_unknown_length_grow_with_it():
    """Decisions would be as many as steps, or the record of a window as long as the run."""
    policy = Clock()
    model, optimizer, driver = started(None, policy, decisions=8)
    controller = driver.controller
    train(model, optimizer, range(400))
    lengths = [b.start - a.start for a, b in pairwise(controller.windows[1:])]
    assert lengths == sorted(lengths) and lengths[0] == 10 and lengths[-1] == 80
    assert len(controller.meter.records) == controller.run.interval
    assert all(0 <= seen[0] < 0.5 for seen in policy.seen)
    assert [seen[1] for seen in policy.seen] == pytest.approx([math.log(8) - 4] * len(policy.seen), abs=1e-6)


def test_run_without_an_end_is_not_frozen():
    """A schedule that ends somewhere would be made up."""
    model, optimizer, driver = started(None)
    train(model, optimizer, range(30))
    with pytest.raises(ValueError, match="total_steps=None: what has no end cannot be frozen; finish"):
        driver.freeze()
    assert "step 30 of unknown" in repr(driver.controller)
    driver.finish(5)
    train(model, optimizer, range(30, 35))
    assert driver.freeze().total_steps == 35


# --- A step too many ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total, allowed", [(20, 1), (199, 1), (250, 2)])
def test_a_step_too_many_is_no_alarm_and_many_are(total, allowed):
    """Loops that count from zero to the last step, and that one too, would warn every time; others never."""
    model, optimizer, _ = started(total, still())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lrs = lrs_of(model, optimizer, range(total + allowed))
    assert lrs[total - 1 :] == [lrs[-1]] * (1 + allowed)
    with pytest.warns(UserWarning, match=f"training goes on after total_steps={total}.*extend") as caught:
        train(model, optimizer, range(total + allowed, total + 10))
    assert len(caught) == 1


# --- In epochs ------------------------------------------------------------------------------------------------------


def test_steps_are_those_of_a_loop():
    """The last batches of an epoch, which make a step of their own, would be forgotten: the run ends too late."""
    loader = DataLoader(torch.arange(100), batch_size=8)
    assert steps_of(loader, 3) == 3 * 13
    for accumulate in (1, 2, 5, 13, 20):
        steps = 0
        for _ in range(3):
            for i, _ in enumerate(loader, 1):
                steps += i % accumulate == 0 or i == len(loader)
        assert steps_of(loader, 3, accumulate) == steps
    assert steps_of(loader, np.int64(3)) == 39


class Stream(IterableDataset):
    """Without a length."""

    def __iter__(self):
        return iter(range(3))


def test_epochs_that_cannot_be_counted_are_named():
    """An error from inside of a loader says nothing of what to do."""
    with pytest.raises(TypeError, match=r"loader has no length .*total_steps=None"):
        steps_of(DataLoader(Stream()), 3)
    for name, arguments in (("epochs", (0,)), ("epochs", (1.5,)), ("accumulate", (1, 0))):
        with pytest.raises(ValueError, match=f"{name} must be a positive int"):
            steps_of([1, 2], *arguments)


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8, torch.tensor])
def test_integers_of_any_kind_are_accepted(integer):
    """What comes of NumPy's arithmetic is an int to everybody but Python."""
    model, optimizer, driver = started(integer(20), decisions=integer(5), patience=integer(2))
    train(model, optimizer, range(20))
    assert driver.controller.total_steps == 20 and type(driver.controller.total_steps) is int
    assert driver.freeze().total_steps == 20


def test_replayed_run_that_was_extended(tmp_path):
    """`LambdaLR` would follow another schedule than the one that was good."""
    model, optimizer, driver = started(40, lively_policy())
    lrs = lrs_of(model, optimizer, range(30))
    driver.extend(70)
    lrs += lrs_of(model, optimizer, range(30, 70))
    plain = torch.optim.AdamW(network().parameters(), 0.01)
    scheduler, replayed = LambdaLR(plain, driver.freeze()), []
    for _ in range(70):
        replayed.append(plain.param_groups[0]["lr"])
        plain.step()
        scheduler.step()
    assert replayed == pytest.approx(lrs, rel=1e-9)
