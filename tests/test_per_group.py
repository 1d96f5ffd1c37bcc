"""Control of each parameter group by itself: measured, decided and kept by the group, in one run with one loss."""

import copy
import io
import math

import pytest
import torch
from helpers import FACES, always, assert_same_weights, driven, lively_policy, loss_at, network, perceptron, train
from torch import nn

from rlsched import ScheduledOptimizer, SchedulePolicy, attach, gradients, hyperparameters, meter
from rlsched.actors import Recurrent
from rlsched.control import CONTROL_NAMES, LR
from rlsched.figures import FIGURES
from rlsched.moments import Moments
from rlsched.signals import OBSERVATION_NAMES
from rlsched.summary import summarise, whole

STEPS = 21  # windows of 5: decisions before the inner steps 1, 6, 11 and 16
OPTIONS = {"total_steps": STEPS, "decisions": 5, "per_group": True}
OPTIMIZERS = {
    "SGD": lambda groups: torch.optim.SGD(groups, 0.1, 0.9, weight_decay=0.01),
    "AdamW": lambda groups: torch.optim.AdamW(groups, 0.01),
}
EACH = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def groups_of(model, **second):
    """The two layers of `network()`."""
    return [{"params": model[0].parameters()}, {"params": model[2].parameters(), **second}]


def recurrent_policy():
    """A policy that remembers, and keeps every control moving."""
    actor = Recurrent(len(OBSERVATION_NAMES), len(CONTROL_NAMES), (8,))
    generator = torch.Generator().manual_seed(5)
    for p in actor.parameters():
        p.data.copy_(0.4 * torch.randn(p.shape, generator=generator))
    return SchedulePolicy(actor, OBSERVATION_NAMES, CONTROL_NAMES)


class Watched:
    """A policy, and what it was shown."""

    def __init__(self, policy):
        self.policy, self.shown = policy, []

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def act(self, observation, memory=None):
        self.shown.append(observation)
        return self.policy.act(observation, memory)


class Halves(nn.Module):
    """Two regressions side by side on the same data, from the same weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.one = nn.Linear(6, 4)
        self.other = copy.deepcopy(self.one)

    def loss(self, step, share=1.0):
        inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        one, other = (((half(inputs) - inputs[:, :4]) ** 2).mean() for half in (self.one, self.other))
        return one + share * other

    def groups(self, **second):
        return [{"params": self.one.parameters()}, {"params": self.other.parameters(), **second}]


def run_halves(optimizer, model, steps=STEPS, share=1.0):
    """Train, and return each step's learning rates."""
    lrs = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model.loss(step, share)
        loss.backward()
        optimizer.step(loss=loss)
        lrs.append([group["lr"] for group in optimizer.param_groups])
    return lrs


# --- Reductions -----------------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("face", FACES)
def test_one_group_is_decided_as_without(face, make):
    """To turn the option on for an optimizer of one group would give another run."""
    runs = []
    for options in (OPTIONS, {**OPTIONS, "per_group": False}):
        model = network()
        optimizer, _ = driven(face, make(model.parameters()), **options)
        runs.append((model, train(model, optimizer, range(STEPS))))
    assert runs[0][1] == runs[1][1]
    assert_same_weights(runs[0][0], runs[1][0])


@EACH
def test_halves_that_are_alike_move_alike(make):
    """Which group comes first would decide how the others train."""
    model = Halves()
    optimizer = ScheduledOptimizer(make(model.groups()), policy=lively_policy(), **OPTIONS)
    lrs = run_halves(optimizer, model)
    assert all(one == pytest.approx(other, rel=1e-5) for one, other in lrs)
    one, other = (state.control for state in optimizer.controller.states)
    assert one == pytest.approx(other, rel=1e-5) and one["lr"] != 0


@EACH
def test_policy_that_stands_still_is_the_base_schedule(make):
    """A user who turns the policy off would have another training than by hand."""
    model, by_hand = network(), network()
    optimizer = ScheduledOptimizer(make(groups_of(model, lr=0.03)), policy=SchedulePolicy.zero(), **OPTIONS)
    plain = make(groups_of(by_hand, lr=0.03))
    scheduler = torch.optim.lr_scheduler.LambdaLR(plain, lambda step: 1 - min(step, STEPS - 1) / STEPS)
    train(model, optimizer, range(STEPS))
    for step in range(STEPS):
        plain.zero_grad()
        loss_at(by_hand, step).backward()
        plain.step()
        scheduler.step()
    assert_same_weights(model, by_hand)


def test_group_is_seen_as_an_optimizer_of_its_own_would_be():
    """What is measured of one group would be that of the others: a large embedding would speak for a small head."""
    still = perceptron([(torch.zeros(4, len(OBSERVATION_NAMES)), torch.zeros(4))], safe_start=False)
    parted, model = Watched(still), network()
    optimizer = ScheduledOptimizer(
        torch.optim.SGD(groups_of(model, lr=0.03, momentum=0.5), 0.1, 0.9), policy=parted, **OPTIONS
    )
    train(model, optimizer, range(STEPS))
    assert [tuple(shown.shape) for shown in parted.shown] == [(2, len(OBSERVATION_NAMES))] * 4
    alone, model = [Watched(still), Watched(still)], network()
    one, other = groups_of(model, lr=0.03, momentum=0.5)
    options = {**OPTIONS, "per_group": False}
    pair = [
        ScheduledOptimizer(torch.optim.SGD([group], 0.1, 0.9), policy=policy, **options)
        for group, policy in zip((one, other), alone, strict=True)
    ]
    for step in range(STEPS):
        model.zero_grad()
        loss = loss_at(model, step)
        loss.backward()
        for each in pair:
            each.step(loss=loss)
    for i in range(2):
        seen = torch.stack([shown[i] for shown in parted.shown])
        torch.testing.assert_close(seen, torch.stack(alone[i].shown), rtol=1e-4, atol=1e-5)


@EACH
def test_both_faces_are_the_same_run(make):
    """The callbacks, which attach, would train otherwise than the wrapper."""
    runs = []
    for face in FACES:
        model = network()
        optimizer, _ = driven(face, make(groups_of(model, lr=0.03)), **OPTIONS)
        runs.append((model, train(model, optimizer, range(STEPS))))
    assert runs[0][1] == runs[1][1]
    assert_same_weights(runs[0][0], runs[1][0])


def test_whole_of_several_parts():
    """The guard, and the probe, would judge a run by its first group."""
    one = Moments(*[(2.0, 3.0)] * len(Moments._fields))
    window = summarise(one)
    assert whole([window]) is window
    both = whole([window, window._replace(grad_norm=math.nan)])
    assert both.grad_norm == pytest.approx(window.grad_norm)
    both = whole([window, window])
    assert both.grad_norm == pytest.approx(window.grad_norm + math.log(2) / 2)
    assert both.predicted_decrease == pytest.approx(window.predicted_decrease + math.log(2))
    assert (both.loss, both.loss_std) == (window.loss, window.loss_std) and math.isnan(both.update_ratio)


# --- Each by itself -------------------------------------------------------------------------------------------------


def test_group_whose_updates_are_large_moves_alone():
    """One group that is too fast would slow all the others down: what the option is there to avoid."""
    first = torch.zeros(1, 1), torch.tensor([0.0])
    first[0][0, 0], first[1][0] = 1.0, -1.0  # relu(log ratio + 2) / 3: updates above 0.14 of the weights
    wary = perceptron(
        [first, (torch.tensor([[-1.0]]), torch.zeros(1))], ("update_ratio",), ("lr",), "relu", safe_start=False
    )
    model = Halves()
    inner = torch.optim.SGD(model.groups(lr=4.0), 0.02)
    optimizer = ScheduledOptimizer(inner, policy=wary, on_divergence=None, **OPTIONS)
    run_halves(optimizer, model)
    slow, fast = (state.control["lr"] for state in optimizer.controller.states)
    assert slow == 0 and fast < -0.3
    assert optimizer.controller.proposals[0]["lr"] == pytest.approx(0.02 * (1 - 16 / STEPS))


@EACH
def test_groups_keep_their_base_values(make):
    """A head that was given ten times the learning rate would get that of the embeddings."""
    model = network()
    second = {"lr": 0.005, "weight_decay": 0.0, **({"momentum": 0.5} if make is OPTIMIZERS["SGD"] else {})}
    optimizer = ScheduledOptimizer(
        make(groups_of(model, **second)), policy=always(lr=0.5, momentum=0.3, weight_decay=0.5), **OPTIONS
    )
    train(model, optimizer, range(STEPS))
    one, other = optimizer.controller.groups.bases
    assert other["lr"] == 0.005 and other["weight_decay"] == 0 < one["weight_decay"]
    assert [group["weight_decay"] > 0 for group in optimizer.param_groups] == [True, False]
    moved = [state.control["lr"] for state in optimizer.controller.states]
    assert moved[0] == moved[1] > 0
    assert "weight_decay" in optimizer.controller._moving
    assert optimizer.controller.states[1].control["weight_decay"] == 0, "there is nothing to move"


def test_momentum_buffers_follow_their_own_group():
    """A buffer that is scaled as another group's would step too far by as much."""
    model, policy = Halves(), lively_policy()
    optimizer = ScheduledOptimizer(torch.optim.SGD(model.groups(momentum=0.5), 0.01, 0.9), policy=policy, **OPTIONS)
    run_halves(optimizer, model)
    groups = optimizer.controller.groups
    one, other = (group["momentum"] for group in optimizer.param_groups)
    assert one != other
    growths = [groups.growth_of_buffers(i) for i in range(2)]
    assert growths == pytest.approx([(1 - one) / 0.1, (1 - other) / 0.5])
    before = [optimizer.state[half.weight]["momentum_buffer"].clone() for half in (model.one, model.other)]
    inner = optimizer.detach()
    for half, buffer, growth in zip((model.one, model.other), before, growths, strict=True):
        torch.testing.assert_close(inner.state[half.weight]["momentum_buffer"], buffer * growth)
    assert [group["momentum"] for group in inner.param_groups] == [0.9, 0.5]


def test_group_without_gradients_stands_still():
    """Layers that are frozen for a while would come back at a learning rate that nobody has looked at."""
    model = network()
    optimizer = ScheduledOptimizer(torch.optim.AdamW(groups_of(model), 0.01), policy=always(lr=1.0), **OPTIONS)
    model[0].requires_grad_(False)
    train(model, optimizer, range(11))
    still, moves = (state.control["lr"] for state in optimizer.controller.states)
    assert still == 0 < moves
    model[0].requires_grad_(True)
    train(model, optimizer, range(11, STEPS))
    assert 0 < optimizer.controller.states[0].control["lr"] < optimizer.controller.states[1].control["lr"]


@pytest.mark.parametrize("make_policy", [lively_policy, recurrent_policy])
def test_group_that_comes_later_has_a_state_of_its_own(make_policy):
    """Gradual unfreezing would end at the first group that is added."""
    model = network()
    optimizer = ScheduledOptimizer(torch.optim.AdamW(model[0].parameters(), 0.01), policy=make_policy(), **OPTIONS)
    train(model, optimizer, range(8))
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.03})
    train(model, optimizer, range(8, 9))
    one, other = optimizer.controller.states
    assert one.control["lr"] == other.control["lr"] != 0
    assert other.history["slow_loss"] == one.history["slow_loss"] and math.isnan(other.history["first_norm"])
    train(model, optimizer, range(9, STEPS))
    one, other = optimizer.controller.states
    assert one.control["lr"] != other.control["lr"] and other.history["first_norm"] == other.history["first_norm"]


# --- The run as a whole ---------------------------------------------------------------------------------------------


def test_divergence_is_answered_in_all_groups():
    """The loss does not tell which group has wrecked it."""
    model = Halves()
    options = {**OPTIONS, "policy": always(), "on_divergence": "cut"}
    optimizer = ScheduledOptimizer(torch.optim.SGD(model.groups(lr=0.002), 0.01), **options)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model.loss(step)
        loss.backward()
        optimizer.step(loss=loss if step < 8 else loss * math.nan)
    states = optimizer.controller.states
    assert len({state.control["lr"] for state in states}) == 1 and states[0].control["lr"] < -math.log(9)
    assert all(state.bound < LR.high for state in states)


def test_bound_on_updates_holds_in_its_group_and_says_in_which():
    """A group that overshoots would take the others down with it, and nobody knew which it was."""
    model = Halves()
    groups = model.groups(lr=40.0, name="fast")
    options = {**OPTIONS, "policy": always(), "on_divergence": None, "max_update_ratio": 0.5}
    optimizer = ScheduledOptimizer(torch.optim.SGD(groups, 0.01), **options)
    run_halves(optimizer, model, 7, share=1e-1)
    slow, fast = (state.control["lr"] for state in optimizer.controller.states)
    assert slow == 0 > fast
    assert any("group fast: updates have" in message for _, message in optimizer.controller.interventions)


def test_probe_starts_each_group_as_high_as_its_weights_allow():
    """A learning rate that only one group cannot bear would be taken from all."""
    model = Halves()
    policy = always(safe_start=True)
    optimizer = ScheduledOptimizer(torch.optim.AdamW(model.groups(lr=1.0), 1e-3), policy=policy, **OPTIONS)
    run_halves(optimizer, model, 2, share=1e-9)
    calm, bold = (state.control["lr"] for state in optimizer.controller.states)
    assert calm == 0 > bold
    assert any("scaled by 1, 0." in message for _, message in optimizer.controller.interventions)
    model = Halves()
    optimizer = ScheduledOptimizer(torch.optim.AdamW(model.groups(lr=1e9), 1e-3), policy=policy, **OPTIONS)
    run_halves(optimizer, model, 6, share=1e-9)
    assert any("undone" in message for _, message in optimizer.controller.interventions)
    assert optimizer.controller.states[1].lr_offset < 0
    first = optimizer.controller.state
    assert first.lr_offset == first.control["lr"] == 0, "what is undone is another group's doing"


def test_rollback_takes_all_groups_back():
    """Weights would go back, and what the policy remembers of a group would not."""
    model = Halves()
    options = {**OPTIONS, "policy": recurrent_policy(), "decisions": 20}
    optimizer = ScheduledOptimizer(torch.optim.SGD(model.groups(), 0.01), **options)
    run_halves(optimizer, model, 6)
    controller = optimizer.controller
    then, weights = [state.memory for state in controller.guard.snapshot.schedule], model.one.weight.clone()
    states = controller.guard.roll_back(controller.states)
    assert all(torch.equal(state.memory, memory) for state, memory in zip(states, then, strict=True))
    assert not torch.equal(model.one.weight, weights)


def test_strictest_group_clips():
    """Gradients are clipped by one norm; a group that asks for less of it must not be passed over."""
    model = network()
    optimizer = ScheduledOptimizer(torch.optim.AdamW(groups_of(model), 0.01), policy=lively_policy(), **OPTIONS)
    train(model, optimizer, range(STEPS))
    groups = optimizer.controller.groups
    clips = [values["clip"] for values in groups.decided]
    assert clips[0] != clips[1] and groups.clip == min(clips)


@pytest.mark.parametrize("make", [OPTIMIZERS["AdamW"]], ids=["AdamW"])
def test_an_accelerator_measures_the_same(make, monkeypatch):
    """Where numbers wait on the device, groups are measured by other lines."""
    runs = []
    for on_host in (True, False):
        if not on_host:
            for module in (meter, gradients, hyperparameters):
                monkeypatch.setattr(module, "on_host", lambda _: False)
        model = network()
        optimizer = ScheduledOptimizer(make(groups_of(model, lr=0.03)), policy=lively_policy(), **OPTIONS)
        runs.append(torch.tensor(train(model, optimizer, range(STEPS))))
    torch.testing.assert_close(*runs, rtol=1e-3, atol=1e-6)


# --- State ----------------------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("make_policy", [lively_policy, recurrent_policy])
@pytest.mark.parametrize("stop", [1, 4, 6, 13])
def test_run_goes_on_bit_equal(make, make_policy, stop):
    """A resumed run would be another one."""

    def begun():
        model = network()
        return model, ScheduledOptimizer(make(groups_of(model, lr=0.03)), policy=make_policy(), **OPTIONS)

    unbroken, optimizer = begun()
    expected = train(unbroken, optimizer, range(STEPS))
    model, optimizer = begun()
    train(model, optimizer, range(stop))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    model, optimizer = begun()
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    assert train(model, optimizer, range(stop, STEPS)) == expected[stop:]
    assert_same_weights(model, unbroken)


@pytest.mark.parametrize("stop", [9, 10, 12])
def test_run_with_a_group_that_came_later_goes_on_bit_equal(stop):
    """Records and samples of two groups have other shapes than those of one."""

    def begun(stop):
        model = network()
        inner = torch.optim.AdamW(model[0].parameters(), 0.01)
        optimizer = ScheduledOptimizer(inner, policy=lively_policy(), **{**OPTIONS, "total_steps": 60})
        for step in range(stop):
            if step == 9:
                optimizer.add_param_group({"params": model[2].parameters()})
            train(model, optimizer, [step])
        return model, optimizer

    unbroken, optimizer = begun(14)
    train(unbroken, optimizer, range(14, 40))
    model, optimizer = begun(stop)
    if stop == 9:
        optimizer.add_param_group({"params": model[2].parameters()})
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model = network()
    inner = torch.optim.AdamW(model[0].parameters(), 0.01)
    inner.add_param_group({"params": model[2].parameters()})
    optimizer = ScheduledOptimizer(inner, policy=lively_policy(), **{**OPTIONS, "total_steps": 60})
    model.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    train(model, optimizer, range(stop, 40))
    assert_same_weights(model, unbroken)


def test_state_of_other_groups_is_refused():
    """It would load, and decide for groups that are no more, or by one state for all."""
    two, one = attach(torch.optim.SGD(groups_of(network()), 0.1), **OPTIONS), network()
    other = attach(torch.optim.SGD(one.parameters(), 0.1), **OPTIONS)
    with pytest.raises(ValueError, match="those of 1 parameter groups"):
        other.load_state_dict(two.state_dict())
    together = attach(torch.optim.SGD(groups_of(network()), 0.1), **{**OPTIONS, "per_group": False})
    with pytest.raises(ValueError, match="per_group=True, this one has False"):
        together.load_state_dict(two.state_dict())


# --- What a user sees, and what is refused --------------------------------------------------------------------------


def test_each_group_has_its_figures():
    """Nobody could see which group does what."""
    model, told = network(), []
    inner = torch.optim.AdamW(groups_of(model, name="head"), 0.01)
    optimizer = ScheduledOptimizer(inner, policy=lively_policy(), **OPTIONS)
    optimizer.controller.log.listeners.append(lambda step, figures: told.append(figures))
    train(model, optimizer, range(STEPS))
    for name in ("rlsched/lr", "rlsched/update_ratio", "rlsched_seen/update_ratio", "rlsched_policy/proposed_momentum"):
        assert {f"{name}/0", f"{name}/head"} <= told[-1].keys() and name not in told[-1]
    assert [told[-1][f"rlsched/lr/{group}"] for group in (0, "head")] == [
        p["lr"] for p in optimizer.controller.proposals
    ]
    assert {name for name in told[-1] if name.count("/") == 1} == {n for n, figure in FIGURES.items() if figure.of_run}
    lrs = "/".join(f"{proposal['lr']:.4g}" for proposal in optimizer.controller.proposals)
    assert f"lr={lrs}" in repr(optimizer)


def test_shadow_looks_at_each_group_and_touches_none():
    """A trial of the option would change the training that it is compared with."""
    model, plain = network(), network()
    inner = torch.optim.AdamW(groups_of(model, lr=0.03), 0.01)
    optimizer = ScheduledOptimizer(inner, policy=lively_policy(), shadow=True, **OPTIONS)
    train(model, optimizer, range(STEPS))
    by_hand = torch.optim.AdamW(groups_of(plain, lr=0.03), 0.01)
    for step in range(STEPS):
        by_hand.zero_grad()
        loss_at(plain, step).backward()
        by_hand.step()
    assert_same_weights(model, plain)
    one, other = optimizer.controller.proposals
    assert one["lr"] / 0.01 != pytest.approx(other["lr"] / 0.03)


def test_scheduler_is_followed_in_each_group():
    """A warm-up of one's own would be lost in all groups but the first."""
    model = network()
    inner = torch.optim.AdamW(groups_of(model, lr=0.03), 0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(inner, [lambda step: 0.5, lambda step: 0.25])
    optimizer = ScheduledOptimizer(inner, policy=always(lr=0.5), follow_scheduler=True, **OPTIONS)
    for step in range(STEPS):
        train(model, optimizer, [step])
        scheduler.step()
    one, other = (proposal["lr"] for proposal in optimizer.controller.proposals)
    factor = math.exp(optimizer.controller.state.control["lr"])
    assert (one, other) == pytest.approx((0.005 * factor, 0.0075 * factor)) and factor > 1


def test_what_cannot_be_is_refused(monkeypatch):
    """It would fail in the midst of a run, or give one group's schedule for that of all."""
    model = network()
    it = attach(torch.optim.SGD(groups_of(model), 0.1), **OPTIONS)
    with pytest.raises(ValueError, match="per_group=True: the learning rate was each group's own"):
        it.freeze()
    with pytest.raises(ValueError, match="parameter group 1 has no parameters"):
        attach(torch.optim.SGD([{"params": network().parameters()}, {"params": []}], 0.1), **OPTIONS)
    with pytest.raises(TypeError, match="per_group must be True or False, got 1"):
        attach(torch.optim.SGD(network().parameters(), 0.1), **{**OPTIONS, "per_group": 1})
    forgetful = Watched(lively_policy())
    forgetful.begin = dict
    with pytest.raises(ValueError, match="has to remember a tensor, or None; it remembers dict"):
        attach(torch.optim.SGD(groups_of(network()), 0.1), **{**OPTIONS, "policy": forgetful})
    monkeypatch.setattr(meter.Meter, "is_sharded", True)
    with pytest.raises(ValueError, match="per_group=True: parameters that fully_shard has sharded"):
        attach(torch.optim.SGD(groups_of(network()), 0.1), **OPTIONS)
