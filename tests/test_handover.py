"""State goes from a schedule to a plain optimizer, from a plain one to a schedule, from one schedule to the next."""

import copy
import math

import pytest
import torch
from helpers import FACES, always, assert_same_weights, driven, lively_policy, loss_at, network, train
from torch import nn

from rlsched import ScheduledOptimizer, SchedulePolicy, attach
from rlsched.control import base_values
from rlsched.snapshots import SNAPSHOTS

OPTIONS = {"total_steps": 21, "decisions": 5, "policy": lively_policy()}
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "AdamW, tensors": lambda p: torch.optim.AdamW(p, torch.tensor(0.01), (torch.tensor(0.9), torch.tensor(0.99))),
    "groups": lambda p: torch.optim.SGD([{"params": q, "lr": 0.01 * (i + 1)} for i, q in enumerate(p)], momentum=0.8),
}
SUMS = ["SGD", "RMSprop", "groups"]
over_optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def user_values(optimizer):
    """What an optimizer's groups hold of all that a schedule moves."""
    return [{**base_values(group), "lr": float(group["lr"])} for group in optimizer.param_groups]


def same(one, other):
    """Whether two lists of values are equal, those that a group lacks included."""
    return str(one) == str(other)


def buffers(optimizer):
    """All momentum buffers, as one vector."""
    return torch.cat([state["momentum_buffer"].flatten() for state in optimizer.state.values()])


# --- To a plain optimizer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("initial_lr", [False, True])
@pytest.mark.parametrize("face", FACES)
@over_optimizers
def test_plain_optimizer_goes_on_with_what_the_user_gave(make, face, initial_lr):
    """Who takes the schedule off would train on with the learning rate and momentum that it had last."""
    model = network()
    inner = make(model.parameters())
    if initial_lr:
        torch.optim.lr_scheduler.LambdaLR(inner, lambda step: 1.0)
    expected = user_values(make(network().parameters()))
    optimizer, _ = driven(face, inner, **OPTIONS)
    train(model, optimizer, range(8))
    assert not same(user_values(inner), expected)
    plain = make(model.parameters())
    plain.load_state_dict(optimizer.state_dict())
    assert same(user_values(plain), expected)
    for group, before in zip(plain.param_groups, expected, strict=True):
        assert ("initial_lr" in group) == initial_lr
        assert float(group.get("initial_lr", before["lr"])) == before["lr"]
        assert isinstance(group["lr"], type(inner.param_groups[0]["lr"]))
    assert "rlsched" not in plain.param_groups[0]
    loss_at(model, 9).backward()
    plain.step()


@pytest.mark.parametrize("momentum", [-1.0, 1.0])
@pytest.mark.parametrize("kind", SUMS)
def test_sum_of_gradients_belongs_to_the_momentum_beside_it(kind, momentum):
    """A sum over ten times as many gradients would be taken for one of the user's momentum, and steps be as large."""
    model, inner = network(), None
    inner = OPTIMIZERS[kind](model.parameters())
    optimizer = ScheduledOptimizer(inner, total_steps=100, decisions=20, policy=always(momentum=momentum))
    base, before = inner.param_groups[0]["momentum"], user_values(inner)
    train(model, optimizer, range(31))
    factor = (1 - inner.param_groups[0]["momentum"]) / (1 - base)
    assert factor < 0.2 or factor > 1.5
    plain = OPTIMIZERS[kind](model.parameters())
    plain.load_state_dict(optimizer.state_dict())
    expected = buffers(inner) * factor
    ratio = (buffers(plain) / expected)[expected.abs() > 1e-9]
    assert ratio.max() / ratio.min() < 1.001
    assert 2**-0.51 < ratio.mean() < 2**0.51
    assert optimizer.detach() is inner  # which is exact
    torch.testing.assert_close(buffers(inner), expected)
    assert same(user_values(inner), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("momentum", [-1.0, 1.0])
def test_scaled_sum_of_gradients_is_unscaled_to_the_last_bit(momentum, dtype):
    """A run that goes on would not be bit-equal; and in half precision small numbers have no half."""

    def start():
        model = network().to(dtype)
        inner = torch.optim.SGD(model.parameters(), 0.1, 0.9)
        return model, ScheduledOptimizer(inner, total_steps=100, decisions=20, policy=always(momentum=momentum))

    def run(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            loss = 1e-3 * loss_at(model, step, dtype)
            loss.backward()
            optimizer.step(loss=loss)

    model, optimizer = start()
    run(model, optimizer, range(31))
    state = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    scaled = torch.cat([each["momentum_buffer"].flatten() for each in state[1]["state"].values()])
    assert scaled.equal(buffers(optimizer)) == (dtype == torch.float16 and momentum > 0)
    again, other = start()
    for _ in range(2):  # the state that was loaded is not changed by that
        again.load_state_dict(state[0])
        other.load_state_dict(state[1])
        assert buffers(other).equal(buffers(optimizer))
    if not scaled.equal(buffers(optimizer)):
        with pytest.raises(ValueError, match="goes with that of the optimizer beside it"):
            other.controller.load_state_dict(state[1])
    run(model, optimizer, range(31, 60))
    run(again, other, range(31, 60))
    assert_same_weights(again, model)


def test_what_a_schedule_does_not_set_is_saved_as_it_is():
    """A learning rate that a scheduler sets, and all that a shadow only looks at, are the user's own."""
    for options in ({"follow_scheduler": True}, {"shadow": True}):
        model = network()
        inner = torch.optim.SGD(model.parameters(), 0.1, 0.9)
        optimizer = ScheduledOptimizer(inner, **OPTIONS, **options)
        for step in range(8):
            inner.param_groups[0]["lr"] = 0.01 * (step + 1)
            train(model, optimizer, [step])
        state = optimizer.state_dict()
        assert state["param_groups"][0]["lr"] == inner.param_groups[0]["lr"] == 0.08
        assert state["param_groups"][0]["momentum"] == 0.9
        same_sum = state["state"][0]["momentum_buffer"].equal(inner.state[model[0].weight]["momentum_buffer"])
        assert same_sum or "shadow" not in options
        optimizer.detach()
        assert user_values(inner)[0] == pytest.approx(
            {**user_values(inner)[0], "lr": 0.08, "momentum": 0.9}, nan_ok=True
        )


# --- From a plain optimizer -----------------------------------------------------------------------------------------


def plain_run(make, steps):
    """A model, trained by hand, and its optimizer."""
    model = network()
    optimizer = make(model.parameters())
    for step in range(steps):
        optimizer.zero_grad()
        loss_at(model, step).backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("used", [False, True])
@over_optimizers
def test_schedule_begins_where_a_plain_run_stopped(make, used):
    """A run that was begun without rlsched would lose its buffers, or its learning rate."""
    model, plain = plain_run(make, 5)
    for group in plain.param_groups:
        group["lr"] = group["lr"] * 0.5
    state = copy.deepcopy([model.state_dict(), plain.state_dict()])
    expected = train(model, ScheduledOptimizer(plain, **OPTIONS), range(5, 26))
    again = network()
    optimizer = ScheduledOptimizer(make(again.parameters()), **OPTIONS)
    if used:
        train(again, optimizer, range(3, 14))
    again.load_state_dict(state[0])
    with pytest.warns(UserWarning, match="has no 'rlsched'.*one begins here.*step 0 of 21") as record:
        optimizer.load_state_dict(state[1])
    assert record[0].filename == __file__
    assert optimizer.controller.step_count == 0
    assert train(again, optimizer, range(5, 26)) == expected
    assert_same_weights(again, model)


def test_state_without_a_schedule_is_none_of_a_controller():
    """The schedule would silently begin anew in the middle of a run."""
    _, plain = plain_run(OPTIMIZERS["SGD"], 3)
    controller = attach(OPTIMIZERS["SGD"](network().parameters()), **OPTIONS)
    with pytest.raises(ValueError, match=r"no 'rlsched'.*not of a rlsched.Controller"):
        controller.load_state_dict(plain.state_dict())


def test_base_values_that_were_changed_in_a_checkpoint_hold():
    """Who goes on at half the learning rate changes it in the state; it would have no effect."""

    still = SchedulePolicy.zero()

    def run(change, policy=still):
        model = network()
        inner = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=0.01)
        optimizer = ScheduledOptimizer(inner, total_steps=40, policy=policy)
        train(model, optimizer, range(10))
        state = copy.deepcopy(optimizer.state_dict())
        state["param_groups"][0].update(change)
        optimizer.load_state_dict(state)
        return train(model, optimizer, range(10, 12)), inner.param_groups[0]["weight_decay"]

    (before, _), (after, decay) = run({}), run({"lr": 0.05, "weight_decay": 0.5})
    assert [lr for ((lr, _),) in after] == pytest.approx([0.5 * lr for ((lr, _),) in before])
    assert decay == 0.5
    for change, message in (
        ({"lr": -1.0}, "lr of .* finite and not negative"),
        ({"lr": None}, "lr"),
        ({"lr": math.nan}, "lr"),
    ):
        with pytest.raises(ValueError, match=message):
            run(change)
    with pytest.raises(ValueError, match=r"momentum of parameter group 0 was changed from 0\.9 to 0\.8"):
        run({"momentum": 0.8}, lively_policy())


# --- From one schedule to the next ----------------------------------------------------------------------------------


def detached(face, model, inner, optimizer, controller):
    """The schedule is ended by the user."""
    (controller if face is attach else optimizer).detach()


def overridden(face, model, inner, optimizer, controller):
    """Another one is put around the optimizer."""


def copied(face, model, inner, optimizer, controller):
    """The schedule is ended in a copy."""
    return copy.deepcopy((model, optimizer))[1].detach()


@pytest.mark.parametrize("way", [detached, overridden, copied])
@pytest.mark.parametrize("face", FACES)
@over_optimizers
def test_next_schedule_begins_at_what_the_user_gave(make, face, way):
    """The second half would begin at the learning rate that the first one ended with: at nothing."""
    if face is attach and way is not detached:
        return
    model = network()
    inner = make(model.parameters())
    expected = user_values(inner)
    optimizer, controller = driven(face, inner, **OPTIONS)
    train(model, optimizer, range(20))
    inner = way(face, model, inner, optimizer, controller) or inner
    for other in (ScheduledOptimizer, attach):
        _, following = driven(other, inner, **OPTIONS)
        found = [{**base, "clip": math.nan} for base in following.groups.bases]
        assert same(found, expected)
        following.detach()
    if way is not copied and face is ScheduledOptimizer:
        loss_at(model, 0).backward()
        with pytest.raises(RuntimeError, match="has given its optimizer back"):
            optimizer.step()


def test_detached_run_goes_on_as_a_plain_one():
    """An optimizer that still felt its schedule would be none to go on with."""
    model = network()
    optimizer = ScheduledOptimizer(torch.optim.AdamW(model.parameters(), 0.01), **OPTIONS)
    train(model, optimizer, range(9))
    again, inner = copy.deepcopy(model), optimizer.detach()
    plain = torch.optim.AdamW(again.parameters(), 0.01)
    plain.load_state_dict(copy.deepcopy(inner.state_dict()))
    for step in range(9, 15):
        for m, o in ((model, inner), (again, plain)):
            o.zero_grad()
            loss_at(m, step).backward()
            o.step()
    assert_same_weights(model, again)
    assert optimizer.controller.step_count == 9


# --- Snapshots ------------------------------------------------------------------------------------------------------


def run_at(lr, steps, state=None, face=ScheduledOptimizer, **options):
    """A run at a base learning rate, from its start or from a state on."""
    model = network()
    inner = torch.optim.AdamW(model.parameters(), lr)
    optimizer, controller = driven(face, inner, total_steps=100, decisions=20, **options)
    if state is not None:
        for part, saved in zip((model, optimizer, controller), state, strict=False):
            part.load_state_dict(saved)
    return (model, optimizer, controller), train(model, optimizer, steps)


def state_of(parts, face):
    """A copy of all that is to be saved."""
    return copy.deepcopy([part.state_dict() for part in parts[: 3 if face is attach else 2]])


@pytest.mark.parametrize("stop", range(1, 6))
@pytest.mark.parametrize("face", FACES)
def test_probe_is_undone_after_a_resume(face, stop):
    """Weights that a probe has spoilt would be gone on from, in a run that is stopped in the second after."""
    (model, *_), expected = run_at(1e9, range(10), face=face)
    parts, before = run_at(1e9, range(stop), face=face)
    state = state_of(parts, face)
    (again, _, controller), after = run_at(1e9, range(stop, 10), state, face)
    assert before + after == expected
    assert_same_weights(again, model)
    assert sum("undone" in message for _, message in controller.interventions) >= 2


def test_probe_is_undone_in_a_copy():
    """The same, of a copy."""
    (model, *_), expected = run_at(1e9, range(10))
    (one, optimizer, _), before = run_at(1e9, range(1))
    one, optimizer = copy.deepcopy((one, optimizer))
    assert before + train(one, optimizer, range(1, 10)) == expected
    assert_same_weights(one, model)


def test_snapshot_is_saved_only_where_it_may_be_needed():
    """Each checkpoint would be twice as large, for what one run of a thousand needs."""

    def size(controller):
        return len(controller.state_dict()["rlsched"])

    model = nn.Sequential(nn.Linear(6, 1000), nn.Linear(1000, 3))
    inner = torch.optim.AdamW(model.parameters(), 0.01)
    options = {"total_steps": 100, "decisions": 20, "on_divergence": "rollback"}
    optimizer = ScheduledOptimizer(inner, policy=lively_policy(), **options)
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert size(optimizer.controller) < weights
    train(model, optimizer, range(1))
    assert optimizer.controller.state.probing
    assert size(optimizer.controller) > weights
    train(model, optimizer, range(1, 31))
    assert optimizer.controller.guard.snapshot is not None
    assert size(optimizer.controller) < weights + 30_000  # the sample of the last gradient


def test_run_that_is_unwell_takes_its_snapshot_along():
    """A run that is stopped while it diverges would go on diverging, with nothing to go back to."""
    options = {"on_divergence": "rollback"}

    def spoil(model):
        with torch.no_grad():
            model[0].weight.add_(3.0)
            model[2].weight.mul_(30.0)

    def run(stop):
        parts, path = run_at(0.01, range(31), **options)
        spoil(parts[0])
        path += train(*parts[:2], range(31, 37))
        if stop:
            parts, more = run_at(0.01, range(37, 60), state_of(parts, ScheduledOptimizer), **options)
            return parts, path + more
        return parts, path + train(*parts[:2], range(37, 60))

    (parts, expected), (again, path) = run(False), run(True)
    assert any("rolled back" in message for _, message in parts[2].interventions)
    assert path == expected
    assert_same_weights(again[0], parts[0])


def test_run_that_is_well_takes_a_snapshot_when_it_goes_on():
    """It would have nothing to go back to until some windows later."""
    options = {"on_divergence": "rollback"}
    parts, _ = run_at(0.01, range(32), **options)
    again, _ = run_at(0.01, [32], state_of(parts, ScheduledOptimizer), **options)
    guard = again[2].guard
    assert guard.snapshot is not None
    for p, saved in guard.snapshot.tensors:
        assert p.shape == saved.shape
    assert int(guard.snapshot.schedule[0].step) == 32


@pytest.mark.parametrize("kind", SNAPSHOTS)
def test_snapshot_in_a_checkpoint_has_the_buffers_of_the_model(kind):
    """A run that goes back would have the weights of one moment, and batch norm's running averages of another."""

    def start():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        inner = torch.optim.SGD(model.parameters(), 0.1, 0.9)
        return model, ScheduledOptimizer(inner, **OPTIONS, model=model, snapshots=kind)

    model, optimizer = start()
    loss = model(torch.tensor([[1.0, 2.0], [3.0, 5.0]])).square().mean()
    loss.backward()
    optimizer.step(loss=loss)
    state = optimizer.state_dict()
    _, again = start()
    again.load_state_dict(state)
    saved, loaded = (each.controller.guard.snapshot for each in (optimizer, again))
    assert len(loaded.tensors) == 6 + 3
    for (_, one), (_, other) in zip(saved.tensors, loaded.tensors, strict=True):
        assert torch.equal(one, other)
    other = ScheduledOptimizer(torch.optim.SGD(network().parameters(), 0.1, 0.9), **OPTIONS)
    with pytest.raises(
        ValueError, match=r"snapshot\.tensors must be a list of 4, one for each parameter and each buffer"
    ):
        other.controller.load_state_dict({"rlsched": state["rlsched"]})
