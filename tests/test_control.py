"""From actions to hyperparameters, against closed forms."""

import math

import pytest
import torch

from rlsched import control
from rlsched.control import CONTROL_NAMES, CONTROLS, control_table

BASE = dict.fromkeys(CONTROL_NAMES, math.nan) | {"lr": 0.1, "momentum": 0.9}  # what a user gave a parameter group
UNMOVED = dict.fromkeys(CONTROL_NAMES, 0.0)


def origin(**base):
    """The states that mean these base values."""
    base = {**BASE, **base}
    return {name: entry.origin(base[name]) for name, entry in CONTROLS.items()}


def values(states, sums_gradients=0, **base):
    """The hyperparameters that such states mean."""
    start, base = origin(**base), {**BASE, **base}
    return control.decided(base, {name: states[name] - start[name] for name in CONTROLS}, sums_gradients)


def settle(name, action, start, progress=0.5):
    """A control's state after so many decisions that it moves no more."""
    state = start
    for _ in range(100):
        state = control.moved_by(CONTROLS[name], state, action, progress, start)
    return state


def test_origin_means_the_base_values():
    """A run would begin with another momentum or clipping than the user's."""
    assert origin()["lr"] == 0
    assert origin()["momentum"] == pytest.approx(1)
    held = values(origin())
    assert (held["lr"], held["momentum"], held["clip"]) == (0.1, 0.9, control.OUTLIER)


@pytest.mark.parametrize("sums_gradients", [0, 1])
@pytest.mark.parametrize("momentum", [math.nan, 0.0, 0.05, 0.5, 0.9, 0.99, 0.999])
def test_control_that_does_not_move_is_the_base_to_the_bit(momentum, sums_gradients):
    """The zero policy would be a little off the base schedule, and every comparison with it a little wrong."""
    decided = control.decided({**BASE, "lr": 0.003, "momentum": momentum}, UNMOVED, sums_gradients)
    assert decided["lr"] == 0.003
    assert decided["momentum"] == momentum or math.isnan(momentum)


@pytest.mark.parametrize("momentum", [0.0, 0.05, 0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("progress", [0.0, 0.1, 0.9])
def test_zero_action_stands_still(momentum, progress):
    """The base schedule, and a momentum beyond the control's range, would drift without a decision."""
    for name, state in origin(momentum=momentum).items():
        assert control.moved_by(CONTROLS[name], state, 0.0, progress, state) == state


def test_range_is_widened_to_a_base_outside_of_it_and_no_further():
    """A user's momentum of 0.999 would jump to 0.99 at the first decision, or could not be reached again."""
    for momentum, outwards, end in ((0.999, 1.0, 0.1), (0.05, -1.0, 0.99)):
        start = origin(momentum=momentum)
        assert settle("momentum", outwards, start["momentum"]) == start["momentum"]
        settled = {**start, "momentum": settle("momentum", -outwards, start["momentum"])}
        assert values(settled, momentum=momentum)["momentum"] == pytest.approx(end)


@pytest.mark.parametrize("direction", [-1.0, 1.0])
@pytest.mark.parametrize("name", CONTROL_NAMES)
def test_every_control_stops_at_its_bound(name, direction):
    """A policy that always pushes one way would take a hyperparameter out of all reason."""
    bound = CONTROLS[name].high if direction > 0 else CONTROLS[name].low
    assert settle(name, direction, origin()[name]) == pytest.approx(bound)


@pytest.mark.parametrize("name", CONTROL_NAMES)
def test_steps_are_longer_in_the_first_fifth_of_a_run(name):
    """The search for the learning rate would never arrive, or its end would be noise."""
    entry = CONTROLS[name]
    start = (entry.low + entry.high) / 2
    for progress, step in ((0.0, entry.early_step), (0.19, entry.early_step), (0.2, entry.step), (0.9, entry.step)):
        for action in (-1.0, -0.5, 0.25):
            assert control.moved_by(entry, start, action, progress, start) == pytest.approx(start + action * step)
    assert (CONTROLS["lr"].early_step, CONTROLS["lr"].step) == (0.7, 0.25)


def test_actions_beyond_the_bounds_count_as_the_bound():
    """An unsquashed policy would move further in one decision than any trained one."""
    for wild, bounded in ((50.0, 1.0), (-3.0, -1.0)):
        for name, entry in CONTROLS.items():
            start = origin()[name] - 1
            assert control.moved_by(entry, start, wild, 0.5, start) == control.moved_by(
                entry, start, bounded, 0.5, start
            )


def test_lr_control_is_the_logarithm_of_a_factor():
    """The formula in the documentation is what a user checks a surprising learning rate against."""
    assert values({**origin(), "lr": -1.5})["lr"] == pytest.approx(0.1 * math.exp(-1.5))


@pytest.mark.parametrize("moved", [-0.7, 0.4, 1.0])
def test_size_of_updates_does_not_depend_on_momentum(moved):
    """Raising momentum from 0.9 to 0.99 would make steps ten times as large, and a run diverge.

    Where momentum sums gradients an update is lr / (1 − momentum) times their average, else lr times it.
    """
    states = {**origin(), "momentum": origin()["momentum"] + moved}
    momentum = 1 - 10 ** -(1 + moved)
    summed, averaged = values(states, sums_gradients=1), values(states, sums_gradients=0)
    assert summed["momentum"] == averaged["momentum"] == pytest.approx(momentum)
    assert summed["lr"] / (1 - momentum) == pytest.approx(0.1 / (1 - 0.9))
    assert averaged["lr"] == pytest.approx(0.1)


@pytest.mark.parametrize("base", [0.0, math.nan])
def test_momentum_that_is_not_there_cannot_be_moved(base):
    """SGD would start a momentum buffer in the middle of a run, and its steps would grow."""
    entry = CONTROLS["momentum"]
    assert not entry.can_move(base)
    moved = control.decided({**BASE, "momentum": base}, {**UNMOVED, "momentum": 0.3}, 1)
    assert moved["lr"] == 0.1
    assert moved["momentum"] == base or math.isnan(base)


def test_clipping_is_of_outliers_alone_at_the_maximum_only():
    """A base schedule that clips would not be the base schedule."""
    high = CONTROLS["clip"].high
    multiples = [values({**origin(), "clip": state})["clip"] for state in (0.0, 0.7, high - 0.5, high)]
    assert multiples == pytest.approx([math.exp(-0.7), 1.0, math.exp(high - 1.2), control.OUTLIER])


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, 0.1, 0.9), lambda p: torch.optim.AdamW(p, 0.1, (0.9, 0.999)),
    lambda p: torch.optim.AdamW(p, torch.tensor(0.1), (0.9, 0.999)), lambda p: torch.optim.Adagrad(p, 0.1),
])  # fmt: skip
def test_what_is_written_to_a_group_is_what_is_read_from_it(make):
    """A hyperparameter would be scheduled in one place, and the optimizer read another; or a key would be invented."""
    (group,) = make([torch.zeros(1, requires_grad=True)]).param_groups
    keys, second = set(group), group.get("betas", (None, None))[1]
    has_momentum = "betas" in group or "momentum" in group

    def read():
        base = control.base_values(group)
        return [base["lr"], base["momentum"], base["clip"]]

    assert read() == pytest.approx([0.1, 0.9 if has_momentum else math.nan, math.nan], nan_ok=True)
    for name, value in (("lr", 0.25), ("momentum", 0.5), ("clip", 3.0)):
        CONTROLS[name].write(group, value)
    assert read() == pytest.approx([0.25, 0.5 if has_momentum else math.nan, math.nan], nan_ok=True)
    assert set(group) == keys and group.get("betas", (None, None))[1] == second


def test_tensors_in_a_group_are_read_as_floats():
    """torch allows them for lr and betas; a run with a tensor in its state could not be frozen as JSON."""
    group = {"lr": torch.tensor(0.25), "betas": (torch.tensor(0.5), torch.tensor(0.999))}
    base = control.base_values(group)
    assert (base["lr"], base["momentum"]) == (0.25, 0.5)
    assert all(type(value) is float for value in base.values())


def test_warm_up_that_has_begun_does_not_hide_the_base_learning_rate():
    """A torch scheduler that came first may have set the learning rate to 0, of which every multiple is 0."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    assert control.base_values(optimizer.param_groups[0])["lr"] == 0.1


def test_values_that_a_hyperparameter_cannot_have_are_told():
    """A damaged file of a frozen schedule would train at a learning rate that nobody chose."""
    for name, good, bad in (
        ("lr", [0.0, 1e3], [-0.1, math.inf, math.nan]),
        ("momentum", [0.0, 0.999], [-0.1, 1.0, math.nan]),
        ("clip", [1e-3, 100.0], [0.0, -1.0, math.inf, math.nan]),
    ):
        assert [CONTROLS[name].is_valid(value) for value in good + bad] == [True] * len(good) + [False] * len(bad)


def test_runs_of_a_batch_are_each_run_alone():
    """Runs that are trained side by side would share a clock or a bound, or follow another law than a user's run."""
    runs = 40
    momentum = torch.tensor([math.nan, 0.0, 0.05, 0.5, 0.9, 0.99, 0.999]).repeat(6)[:runs]
    base = {name: torch.full((runs,), math.nan) for name in CONTROLS} | {"lr": torch.rand(runs), "momentum": momentum}
    sums, progress = torch.arange(runs) % 2, torch.rand(runs) / 2
    start = {name: entry.origin(base[name]) + torch.zeros(runs) for name, entry in CONTROLS.items()}
    states = {name: start[name] + torch.randn(runs) * torch.arange(runs).remainder(3) for name in CONTROLS}
    actions = {name: 1.5 * torch.randn(runs) for name in CONTROLS}
    after = {n: control.moved_by(CONTROLS[n], states[n], actions[n], progress, start[n]) for n in CONTROLS}
    together = control.decided(base, {name: after[name] - start[name] for name in CONTROLS}, sums)

    def of(i, numbers):
        return {name: float(values[i]) for name, values in numbers.items()}

    for i in range(runs):
        one, now, act = of(i, base), of(i, states), of(i, actions)
        first = {name: entry.origin(one[name]) for name, entry in CONTROLS.items()}
        moved = {n: control.moved_by(CONTROLS[n], now[n], act[n], float(progress[i]), first[n]) for n in CONTROLS}
        assert of(i, start) == pytest.approx(first, rel=1e-4, abs=1e-6)
        assert of(i, after) == pytest.approx(moved, rel=1e-4, abs=1e-5)
        alone = control.decided(one, {name: moved[name] - first[name] for name in CONTROLS}, int(sums[i]))
        assert of(i, together) == pytest.approx(alone, rel=1e-3, nan_ok=True)
        for name, entry in CONTROLS.items():
            can = torch.as_tensor(entry.can_move(base[name])).expand(runs)
            assert bool(can[i]) == entry.can_move(one[name])


def test_control_table_has_a_row_for_each():
    """The documentation would be of another version."""
    header, _, *rows = control_table(CONTROLS.values()).splitlines()
    assert [row.split("`")[1] for row in rows] == list(CONTROL_NAMES)
    assert len({row.count("|") for row in (header, *rows)}) == 1
