"""From actions to hyperparameters, against closed forms."""

import math

import pytest
import torch

from rlsched import control, moments
from rlsched.control import CLIP, CONTROLS, LR, MOMENTUM
from rlsched.spec import control_table

BASE = control.initial_state(torch.tensor(0.9))


def settle(action, base=BASE, progress=0.5):
    """The control state after so many decisions that it moves no more."""
    state = base
    for _ in range(100):
        state = control.move(state, torch.tensor(action), torch.tensor(progress), base)
    return state


def test_initial_state_means_the_base_values():
    """A run would begin with another momentum or clipping than the user's."""
    assert BASE[LR] == 0
    assert control.momentum_of(BASE[MOMENTUM]).item() == pytest.approx(0.9)
    assert control.clip_multiple(BASE[CLIP]) == control.OUTLIER


@pytest.mark.parametrize("momentum", [0.0, 0.05, 0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("progress", [0.0, 0.1, 0.9])
def test_zero_action_stands_still(momentum, progress):
    """The fallback schedule, and a momentum beyond the control's range, would drift without a decision."""
    base = control.initial_state(torch.tensor(momentum))
    assert torch.equal(control.move(base, torch.zeros(3), torch.tensor(progress), base), base)


def test_range_is_widened_to_a_base_outside_of_it_and_no_further():
    """A user's momentum of 0.999 would jump to 0.99 at the first decision, or could not be reached again."""
    base = control.initial_state(torch.tensor(0.999))
    assert settle([0.0, 1.0, 0.0], base)[MOMENTUM] == base[MOMENTUM]
    assert control.momentum_of(settle([0.0, -1.0, 0.0], base)[MOMENTUM]).item() == pytest.approx(0.1)
    low = control.initial_state(torch.tensor(0.05))
    assert settle([0.0, -1.0, 0.0], low)[MOMENTUM] == low[MOMENTUM]
    assert control.momentum_of(settle([0.0, 1.0, 0.0], low)[MOMENTUM]).item() == pytest.approx(0.99)


@pytest.mark.parametrize("direction", [-1.0, 1.0])
def test_every_control_stops_at_its_bound(direction):
    """A policy that always pushes one way would take a hyperparameter out of all reason."""
    settled = settle([direction] * 3)
    bounds = [c.high if direction > 0 else c.low for c in CONTROLS]
    torch.testing.assert_close(settled, torch.tensor(bounds))


def test_steps_are_longer_in_the_first_fifth_of_a_run():
    """The search for the learning rate would never arrive, or its end would be noise."""
    start = torch.tensor([0.0, 1.0, 1.5])
    for progress, steps in ((0.0, [0.7, 0.3, 0.5]), (0.19, [0.7, 0.3, 0.5]), (0.2, [0.25, 0.3, 0.5])):
        moved = control.move(start, torch.tensor([1.0, -1.0, 0.5]), torch.tensor(progress), start)
        expected = start + torch.tensor([1.0, -1.0, 0.5]) * torch.tensor(steps)
        torch.testing.assert_close(moved, expected)


def test_actions_beyond_the_bounds_count_as_the_bound():
    """An unsquashed policy would move further in one decision than any trained one."""
    start = torch.zeros(3) + 1
    wild, bounded = torch.tensor([50.0, -3.0, 1.5]), torch.tensor([1.0, -1.0, 1.0])
    progress = torch.tensor(0.5)
    assert torch.equal(control.move(start, wild, progress, start), control.move(start, bounded, progress, start))


def test_networks_of_a_batch_move_each_on_their_own():
    """Runs that are trained side by side would share a clock or a bound."""
    base = control.initial_state(torch.tensor([0.0, 0.5, 0.9, 0.999]))
    state = base + torch.randn(4, 3)
    action, progress = torch.randn(4, 3), torch.tensor([0.0, 0.1, 0.3, 0.9])
    moved = control.move(state, action, progress, base)
    for i in range(4):
        assert torch.equal(moved[i], control.move(state[i], action[i], progress[i], base[i]))


def test_clipping_is_of_outliers_alone_at_the_maximum_only():
    """A fallback that clips would not be the fallback."""
    high = CONTROLS[CLIP].high
    multiples = control.clip_multiple(torch.tensor([0.0, 0.7, high - 0.5, high]))
    torch.testing.assert_close(multiples, torch.tensor([math.exp(-0.7), 1.0, math.exp(high - 1.2), control.OUTLIER]))


def test_fallback_schedule_is_linear_decay():
    """Its last step must still train, and its first be at the base learning rate."""
    assert [control.fallback_schedule(float(n), 4.0) for n in range(4)] == [1, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("total, decisions, interval", [(1, 100, 1), (99, 100, 1), (100, 100, 1), (101, 100, 2)])
def test_decision_interval_gives_at_most_so_many_decisions(total, decisions, interval):
    """A short run would have windows of no steps."""
    assert control.decision_interval(total, decisions) == interval


def safe(decrease, ratio, growth=1.0):
    """The learning rate's control after a probe with such moments; the rest of the state stays."""
    state = torch.tensor([0.0, 1.0, 3.0])
    offset = control.safe_offset(torch.tensor(decrease), torch.tensor(ratio), torch.tensor(growth))
    after = control.safe_start(state, offset)
    assert torch.equal(after[LR + 1 :], state[LR + 1 :])
    return after[LR].item()


def test_safe_start_goes_down_to_the_limit_that_the_probe_foretells():
    """A step at the full base learning rate would take away more than the whole loss, and the run would diverge.

    The probe is a step at PROBE times the base learning rate. If it foretells a decrease of d of the loss, a step
    at exp(c) times the base learning rate foretells d · exp(c) / PROBE, which is MAX_DECREASE for the c below.
    """
    for d in (1e-3, 1e-2, 0.1):
        assert safe(d, 0.0) == pytest.approx(max(-7, math.log(control.MAX_DECREASE * control.PROBE / d)), rel=1e-5)
    for u in (1e-3, 1e-2):
        for d in (math.nan, 0.01 * control.PROBE):
            expected = math.log(control.MAX_UPDATE * control.PROBE / u)
            assert safe(d, u) == pytest.approx(expected, rel=1e-5)
            assert safe(d, u / 10, growth=10.0) == pytest.approx(expected, rel=1e-5)


def test_safe_start_leaves_a_harmless_learning_rate():
    """Every run would begin slowly; and weights that begin at zero say nothing about the size of an update."""
    assert safe(0.1 * control.PROBE, 0.001 * control.PROBE) == 0
    assert safe(0.1 * control.PROBE, 1.0) == 0
    assert safe(-1.0, 0.001 * control.PROBE) == 0  # uphill: maximizing
    assert safe(math.nan, 0.01 * control.PROBE) == 0
    assert safe(math.nan, 1e-4 / moments.TINY) == 0


def test_safe_start_does_not_take_an_explosion_for_weights_that_began_at_zero():
    """Weight decay times a learning rate of millions throws weights away without any gradient."""
    for decrease in (math.nan, 0.0, 1e3 * control.PROBE):
        assert safe(decrease, 10.0) == CONTROLS[LR].low
    assert safe(0.1 * control.PROBE, 1e6) == CONTROLS[LR].low, "a loss that is huge lets any step look small"


@pytest.mark.parametrize("decrease, ratio", [(math.nan, math.nan), (math.nan, math.inf), (1e30, 1.0)])
def test_safe_start_is_lowest_where_the_probe_blew_up(decrease, ratio):
    """A probe that is not finite would make the control state NaN, and every learning rate after it."""
    assert safe(decrease, ratio) == CONTROLS[LR].low


def test_control_table_has_a_row_for_each():
    """The documentation would be of another version."""
    header, _, *rows = control_table(CONTROLS).splitlines()
    assert [row.split("`")[1] for row in rows] == list(control.CONTROL_NAMES)
    assert {row.count("|") for row in (header, *rows)} == {7}
