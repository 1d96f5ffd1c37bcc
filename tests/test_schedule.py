"""The schedule core: what a run is at a moment, and what happens to it, for one run and for many."""

import math

import pytest
import torch
from helpers import run_of

from rlsched import control, moments, schedule
from rlsched.base_schedule import BASE_SCHEDULES
from rlsched.control import CONTROL_NAMES, CONTROLS, LR
from rlsched.moments import Moments
from rlsched.schedule import PROBE, ScheduleState
from rlsched.signals import OBSERVATION_NAMES, Run
from rlsched.summary import summarise

RUN = Run(total_steps=20, interval=5, adaptive=1, sums_gradients=1)
BASE = dict.fromkeys(CONTROL_NAMES, math.nan) | {"lr": 0.1, "momentum": 0.9}
LINEAR = BASE_SCHEDULES["linear"]


def of(i, value):
    """What is run i's part of something of N runs, as floats: a tensor, or any dict or tuple of tensors."""
    if isinstance(value, torch.Tensor):
        return value[i].item() if value[i].ndim == 0 else value[i]
    if isinstance(value, dict):
        return {key: of(i, part) for key, part in value.items()}
    return value if value is None or isinstance(value, float) else type(value)(*(of(i, part) for part in value))


def assert_same(together, alone, i):
    """Run i of N runs in tensors is the same as the run in floats; what is not known is so in both."""
    names = (
        zip(together._fields, together, alone, strict=True) if isinstance(together, tuple) else [("", together, alone)]
    )
    for name, value, expected in names:
        if expected is None:
            assert value is None
        elif isinstance(expected, dict):
            assert of(i, value) == pytest.approx(expected, rel=1e-3, abs=1e-5, nan_ok=True), name
        else:
            assert of(i, value) == pytest.approx(expected, rel=1e-3, abs=1e-5, nan_ok=True), name


# --- The life of a run ----------------------------------------------------------------------------------------------


def test_run_of_total_steps_has_windows_of_an_interval_and_a_first_one_of_one_step():
    """A decision that comes a step late would move every later one, and what a resumed run finds."""
    state = schedule.begin(RUN, BASE, probing=False)
    due = []
    for step in range(RUN.total_steps):
        if schedule.is_decision_due(RUN, state):
            due.append(step)
            state = schedule.open_window(RUN, state, RUN.interval)
        state = state._replace(step=state.step + 1)
    assert due == [1, 6, 11, 16]
    assert state.window_end == RUN.total_steps and not schedule.is_decision_due(RUN, state)


@pytest.mark.parametrize("total, decisions, interval", [(1, 100, 1), (99, 100, 1), (100, 100, 1), (101, 100, 2)])
def test_decision_interval_gives_at_most_so_many_decisions(total, decisions, interval):
    """A short run would have windows of no steps."""
    assert schedule.decision_interval(total, decisions) == interval


def test_run_begins_at_the_base_values():
    """A run would begin with another learning rate, momentum or clipping than the user's."""
    state = schedule.begin(RUN, BASE, probing=False, memory="blank")
    held = schedule.values(RUN, state, BASE, LINEAR, 0)
    assert (held["lr"], held["momentum"], held["clip"]) == (0.1, 0.9, control.OUTLIER)
    assert state.memory == "blank"
    assert all(value == 0 for value in schedule.moved(state).values())


def test_probe_is_a_thousandth_of_the_learning_rate_whatever_the_base_schedule():
    """A probe at the full learning rate would do the harm that it is to prevent; one at zero would tell nothing."""
    state = schedule.begin(RUN, BASE, probing=True)
    for step in (0, 1, 19):
        assert schedule.values(RUN, state, BASE, LINEAR, step)["lr"] == 0.1 * PROBE
    lower = state._replace(lr_offset=-7.0)
    assert schedule.values(RUN, lower, BASE, LINEAR, 0)["lr"] == pytest.approx(0.1 * PROBE**2)
    started = schedule.start(lower, -2.0)
    assert schedule.values(RUN, started, BASE, LINEAR, 10)["lr"] == pytest.approx(0.1 * math.exp(-9) / 2)


def test_controls_that_are_not_moved_stand_still():
    """A user whose momentum and clipping are not to be scheduled would find them changed."""
    before = schedule.begin(RUN, BASE, probing=False)
    after = schedule.move(RUN, before, {"lr": 1.0}, "memory")
    assert after.control == {**before.control, "lr": CONTROLS["lr"].early_step}
    assert after.memory == "memory"
    assert before.control["lr"] == 0, "a state that changes in place changes in every snapshot"


def test_learning_rate_after_the_end_stays_where_it_ended():
    """A run that is extended would train at a learning rate of zero, or below."""
    state = schedule.begin(RUN, BASE, probing=False)
    assert schedule.decay(RUN, state, LINEAR, 35) == schedule.decay(RUN, state, LINEAR, 19) == LINEAR.factor(19, 20)


def test_values_of_many_steps_are_those_of_each():
    """A window that is trained in one go would have the learning rate of its first step throughout."""
    base = {name: torch.full((2,), value) for name, value in BASE.items()}
    run = Run(*(torch.full((2,), float(x)) for x in RUN))
    state = schedule.begin(run, base, probing=torch.tensor([1.0, 0.0]))
    steps = torch.arange(3.0).unsqueeze(-1)
    lrs = schedule.values(run, state, base, LINEAR, steps)["lr"]
    expected = [[0.1 * PROBE, 0.1 * (1 - n / 20)] for n in range(3)]
    torch.testing.assert_close(lrs, torch.tensor(expected))


SPECIAL = [math.nan, math.inf, -math.inf, 0.0, 1e-30, 1e30, 1.0]


def extreme_window(runs, steps, generator):
    """Moments of any numbers that floating point can hold, and some that it cannot."""
    special = torch.tensor(SPECIAL, dtype=torch.float64)

    def draw():
        tame = torch.randn(runs, steps, generator=generator, dtype=torch.float64).exp()
        wild = special[torch.randint(len(special), (runs, steps), generator=generator)]
        return torch.where(torch.rand(runs, steps, generator=generator) < 0.8, tame, wild)

    return Moments(*(draw() for _ in Moments._fields))


@pytest.mark.parametrize("base_schedule", BASE_SCHEDULES.values(), ids=BASE_SCHEDULES)
@pytest.mark.parametrize("probing", [True, False])
def test_runs_of_a_batch_are_each_run_alone(probing, base_schedule):
    """A policy is trained on batches of runs, in tensors, and used on one run, in floats.

    A formula that treats the two differently anywhere in a run's life, a NaN included, would make it worthless there.
    """
    runs, generator = 24, torch.Generator().manual_seed(0)
    momentum = torch.tensor([math.nan, 0.0, 0.05, 0.5, 0.9, 0.999]).repeat(4)
    base = {name: torch.full((runs,), math.nan) for name in CONTROLS}
    base |= {"lr": torch.rand(runs, generator=generator), "momentum": momentum}
    sums, adaptive = torch.arange(runs) % 2 * 1.0, torch.where(torch.arange(runs) % 3 == 0, 1.0, -1.0)
    interval = 1.0 + torch.arange(runs) % 4
    run = Run(1 + 6 * interval, interval, adaptive, sums)
    state = schedule.begin(run, base, probing=probing)
    ones, bases = [of(i, run) for i in range(runs)], [of(i, base) for i in range(runs)]
    states = [schedule.begin(ones[i], bases[i], probing=probing) for i in range(runs)]

    def compare():
        held, factor = schedule.hyperparameters(run, state, base), schedule.decay(run, state, base_schedule, state.step)
        values = schedule.values(run, state, base, base_schedule, state.step)
        due = schedule.is_decision_due(run, state)
        for i in range(runs):
            alone = ones[i], states[i]
            step = states[i].step
            assert_same(state, states[i], i)
            assert_same(schedule.moved(state), schedule.moved(states[i]), i)
            assert_same(held, schedule.hyperparameters(*alone, bases[i]), i)
            assert_same(factor, schedule.decay(*alone, base_schedule, step), i)
            assert_same(values, schedule.values(*alone, bases[i], base_schedule, step), i)
            assert bool(due[i]) == schedule.is_decision_due(*alone)

    for decision in range(6):
        length = interval if decision else torch.ones(runs)
        compare()
        state = state._replace(step=state.step + length)
        states = [s._replace(step=s.step + length[i].item()) for i, s in enumerate(states)]
        compare()
        window = extreme_window(runs, 9, generator)
        windows = [run_of(window, i) for i in range(runs)]
        if probing and decision == 0:
            offset = schedule.probe(run, state, window)
            state = schedule.start(state, offset)
            for i in range(runs):
                alone = schedule.probe(ones[i], states[i], windows[i])
                assert offset[i].item() == pytest.approx(alone, rel=1e-3, abs=1e-5)
                states[i] = schedule.start(states[i], alone)
            compare()
        observation, state = schedule.observe(run, state, summarise(window), OBSERVATION_NAMES)
        actions = {name: 1.5 * torch.randn(runs, generator=generator) for name in CONTROLS}
        for i in range(runs):
            seen, states[i] = schedule.observe(ones[i], states[i], summarise(windows[i]), OBSERVATION_NAMES)
            torch.testing.assert_close(seen, observation[i].float(), rtol=1e-3, atol=1e-4)
            states[i] = schedule.move(ones[i], states[i], of(i, actions), None)
        state = schedule.move(run, state, actions, None)
        compare()
        state = schedule.open_window(run, state, interval)
        states = [schedule.open_window(ones[i], states[i], ones[i].interval) for i in range(runs)]
    assert isinstance(state, ScheduleState) and all(isinstance(x, float) for x in states[0].control.values())


# --- Safe start -----------------------------------------------------------------------------------------------------


def safe(decrease, ratio, growth=1.0, part=1.0):
    """The learning rate's control after a probe with such moments; the rest of the state stays."""
    offset = schedule.safe_offset(decrease, ratio, growth)
    together = schedule.safe_offset(*(torch.tensor([x, x], dtype=torch.float64) for x in (decrease, ratio, growth)))
    assert together.tolist() == pytest.approx([offset] * 2), "of runs in tensors another than of one in floats"
    before = schedule.begin(RUN, BASE, probing=part)
    after = schedule.start(before, offset)
    assert after.control == {**before.control, "lr": after.control["lr"]} and not after.probing
    return after.control["lr"]


def test_safe_start_goes_down_to_the_limit_that_the_probe_foretells():
    """A step at the full base learning rate would take away more than the whole loss, and the run would diverge.

    The probe is a step at PROBE times the base learning rate. If it foretells a decrease of d of the loss, a step
    at exp(c) times the base learning rate foretells d · exp(c) / PROBE, which is MAX_DECREASE for the c below.
    """
    for d in (1e-3, 1e-2, 0.1):
        assert safe(d, 0.0) == pytest.approx(max(-7, math.log(schedule.MAX_DECREASE * PROBE / d)), rel=1e-5)
    for u in (1e-3, 1e-2):
        for d in (math.nan, 0.01 * PROBE):
            expected = math.log(schedule.MAX_UPDATE * PROBE / u)
            assert safe(d, u) == pytest.approx(expected, rel=1e-5)
            assert safe(d, u / 10, growth=10.0) == pytest.approx(expected, rel=1e-5)


def test_safe_start_takes_the_part_of_it_that_the_policy_was_trained_to_start_at():
    """A start that is higher than those that a policy knows does what it has never had to mend."""
    for d in (1e-3, 1e-2):
        assert safe(d, 0.0, part=0.3) == pytest.approx(safe(d, 0.0) + math.log(0.3))
    assert safe(0.1 * PROBE, 0.0, part=0.3) == pytest.approx(math.log(0.9))  # thrice the base would have been allowed
    assert safe(0.01 * PROBE, 0.0, part=0.3) == 0
    state = schedule.start(schedule.begin(RUN, BASE, probing=0.3), -1.0)
    assert state.ceiling == -1.0, "what was allowed, a decision may reach"


def test_safe_start_leaves_a_harmless_learning_rate():
    """Every run would begin slowly; and weights that begin at zero say nothing about the size of an update."""
    assert safe(0.1 * PROBE, 0.001 * PROBE) == 0
    assert safe(0.1 * PROBE, 1.0) == 0
    assert safe(-1.0, 0.001 * PROBE) == 0  # uphill: maximizing
    assert safe(math.nan, 0.01 * PROBE) == 0
    assert safe(math.nan, 1e-4 / moments.TINY) == 0


def test_safe_start_does_not_take_an_explosion_for_weights_that_began_at_zero():
    """Weight decay times a learning rate of millions throws weights away without any gradient."""
    for decrease in (math.nan, 0.0, 1e3 * PROBE):
        assert safe(decrease, 10.0) == LR.low
    assert safe(0.1 * PROBE, 1e6) == LR.low, "a loss that is huge lets any step look small"


@pytest.mark.parametrize("decrease, ratio", [(math.nan, math.nan), (math.nan, math.inf), (1e30, 1.0), (math.inf, 0.0)])
def test_safe_start_is_lowest_where_the_probe_blew_up(decrease, ratio):
    """A probe that is not finite would make the control state NaN, and every learning rate after it."""
    assert safe(decrease, ratio) == LR.low


@pytest.mark.parametrize("sums_gradients", [0, 1])
def test_probe_reads_its_last_step_and_foresees_momentum(sums_gradients):
    """The first update of SGD is a tenth of what it will be with all of its momentum, 0.9; that of Adam is not.

    Of a window of two steps, the last is one of lr along the gradient: ‖Δθ‖ / ‖θ‖ is 1e-3, ⟨g, Δθ⟩ / loss 1e-6.
    """
    steps = {name: [math.nan, 0.0] for name in Moments._fields}
    squares = {"loss": 1.0, "grad_norm": 1e-3, "grad_square": 1e-6, "weights_square": 1.0, "update_square": 1e-6}
    steps |= {name: [math.nan, value] for name, value in (squares | {"grad_update": 1e-6}).items()}
    window = Moments(*map(tuple, steps.values()))
    run = RUN._replace(sums_gradients=sums_gradients)
    offset = schedule.probe(run, schedule.begin(run, BASE, probing=True), window)
    growth = 10 if sums_gradients else 1
    assert offset == pytest.approx(math.log(schedule.MAX_UPDATE * PROBE / (growth * 1e-3)))
