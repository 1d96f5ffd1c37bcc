"""attach(): the same schedule through hooks, on an optimizer that stays the user's own."""

import copy
import pickle

import pytest
import torch
from helpers import FACES, assert_same_weights, driven, lively_policy, loss_at, network, train

from rlsched import ScheduledOptimizer, SchedulePolicy, attach

STEPS = 40
OPTIONS = {"total_steps": STEPS, "policy": lively_policy()}
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, 0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01),
}


def by_keyword(controller, optimizer, closure):
    """optimizer.step(loss=loss), which a plain optimizer does not know."""
    optimizer.step(loss=closure())


def by_observe(controller, optimizer, closure):
    """observe, then the step of any framework."""
    controller.observe(closure())
    optimizer.step()


def by_closure(controller, optimizer, closure):
    """optimizer.step(closure)."""
    assert optimizer.step(closure).requires_grad


def by_closure_keyword(controller, optimizer, closure):
    """optimizer.step(closure=closure), as Lightning calls it."""
    assert optimizer.step(closure=closure).requires_grad


@pytest.mark.parametrize("report", [by_keyword, by_observe, by_closure, by_closure_keyword])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_attached_run_is_the_wrapped_run(make, report):
    """The two faces would train different networks; or a closure would be evaluated twice."""
    wrapped, attached = network(), network()
    train(wrapped, ScheduledOptimizer(make(wrapped.parameters()), **OPTIONS), range(STEPS))
    optimizer = make(attached.parameters())
    controller = attach(optimizer, **OPTIONS)
    evaluated = []
    for step in range(STEPS):

        def closure(step=step):
            evaluated.append(step)
            optimizer.zero_grad()
            loss = loss_at(attached, step)
            loss.backward()
            return loss

        report(controller, optimizer, closure)
    assert evaluated == list(range(STEPS))
    assert_same_weights(attached, wrapped)


@pytest.mark.parametrize("lr, step", [(0.01, 31), (1e6, None)], ids=["rolled back", "probed again"])
@pytest.mark.parametrize("report", [by_keyword, by_closure])
def test_weights_that_were_taken_back_are_not_stepped_from(report, lr, step):
    """A closure that is evaluated again at the snapshot would make a step that is neither measured nor clipped."""

    def run(attached):
        model, evaluated = network(), []
        options = {"total_steps": 100, "decisions": 20, "policy": lively_policy(), "on_divergence": "rollback"}
        optimizer, controller = driven(
            attach if attached else ScheduledOptimizer, torch.optim.AdamW(model.parameters(), lr), **options
        )
        for now in range(60):
            if now == step:
                with torch.no_grad():
                    model[0].weight.add_(1000)
                    model[2].weight.mul_(1000)

            def closure(now=now):
                evaluated.append(now)
                optimizer.zero_grad()
                loss = loss_at(model, now)
                loss.backward()
                return loss

            (report if attached else by_keyword)(controller, optimizer, closure)
        assert evaluated == list(range(60))
        assert any("rolled back" in message or "undone" in message for _, message in controller.interventions)
        return model

    assert_same_weights(run(True), run(False))


def test_optimizer_stays_the_users_own():
    """Checkpoints and frameworks that know the optimizer's class and state would break."""
    model, plain = network(), network()
    optimizer, other = (torch.optim.AdamW(m.parameters(), 0.01) for m in (model, plain))
    attach(optimizer, **OPTIONS)
    train(model, optimizer, range(3))
    for step in range(3):
        loss_at(plain, step).backward()
        other.step()
    assert type(optimizer) is torch.optim.AdamW
    ours, theirs = optimizer.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert ours["param_groups"][0].keys() == theirs["param_groups"][0].keys()
    assert ours["state"][0].keys() == theirs["state"][0].keys()


def test_detached_optimizer_is_plain_again():
    """A schedule that cannot be taken off would follow the optimizer into its next use."""
    model, plain = network(), network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    controller = attach(optimizer, **OPTIONS)
    train(model, optimizer, range(10))
    controller.detach()
    plain.load_state_dict(model.state_dict())
    other = torch.optim.SGD(plain.parameters(), 0.1, 0.9)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch would share the buffers
    for step in range(10, 15):
        for m, o in ((model, optimizer), (plain, other)):
            o.zero_grad()
            loss_at(m, step).backward()
            o.step()
    assert_same_weights(model, plain)
    assert controller.step_count == 10


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copy_of_an_attached_optimizer_is_plain(duplicate):
    """A copy, for a trial on the side, would use up the schedule of the original."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    controller = attach(optimizer, **OPTIONS)
    for step in range(3):
        loss_at(model, step).backward()
        optimizer.step(loss=1.0)
    other, copied = duplicate((model, optimizer))
    assert_same_weights(other, model)
    copied.param_groups[0]["lr"] = 0.5
    loss_at(other, 3).backward()
    copied.step()
    assert copied.param_groups[0]["lr"] == 0.5
    assert controller.step_count == 3


def test_detached_fused_optimizer_scales_by_itself_again():
    """A GradScaler would unscale for it ever after, in a pass over all gradients that it does not need."""
    optimizer = torch.optim.AdamW(network().parameters(), fused=True)
    controller = attach(optimizer, **OPTIONS)
    assert not optimizer._step_supports_amp_scaling
    controller.detach()
    assert optimizer._step_supports_amp_scaling


@pytest.mark.parametrize("face", [ScheduledOptimizer, attach])
def test_lbfgs_takes_the_steps_that_it_takes_alone(face):
    """A closure that is evaluated once would leave LBFGS without its line search; once too often, would cost time."""

    def run(schedule):
        model, evaluated = network(), []
        inner = torch.optim.LBFGS(model.parameters(), 0.5, max_iter=4)
        options = {"total_steps": 6, "policy": SchedulePolicy.zero()}
        optimizer = ScheduledOptimizer(inner, **options) if schedule and face is ScheduledOptimizer else inner
        if schedule and face is attach:
            attach(inner, **options)
        for step in range(6):

            def closure(step=step):
                evaluated.append(step)
                optimizer.zero_grad()
                loss = loss_at(model, step)
                loss.backward()
                return loss

            if not schedule:
                inner.param_groups[0]["lr"] = 0.5 * (1 - step / 6)
            optimizer.step(closure)
        return model, evaluated

    (model, evaluated), (plain, expected) = run(True), run(False)
    assert evaluated == expected
    assert_same_weights(model, plain)


@pytest.mark.parametrize("face", FACES)
def test_optimizer_is_driven_once(face):
    """Two controllers would take each other's learning rate for the user's."""
    model = network()
    inner = torch.optim.SGD(model.parameters(), 0.1)
    controller = attach(inner, total_steps=9)
    with pytest.raises(ValueError, match=r"driven by rlsched.attach already: call detach\(\)"):
        face(inner, total_steps=9)
    controller.detach()
    face(inner, total_steps=9)


@pytest.mark.parametrize("face", FACES)
def test_learning_rate_of_zero_is_named(face):
    """A factor on nothing is nothing: the run would do all its steps, and train nothing."""
    with pytest.raises(ValueError, match="the learning rate is 0 in every parameter group"):
        face(torch.optim.SGD(network().parameters(), 0.0), total_steps=9)
