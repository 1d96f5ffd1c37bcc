"""Shadow mode: what the policy would do, beside a training that it does not touch."""

import math

import pytest
import torch
from helpers import always, assert_same_weights, lively_policy, loss_at, network, train
from torch.optim.lr_scheduler import CosineAnnealingLR

from rlsched import ScheduledOptimizer, attach
from rlsched.control import CONTROL_NAMES, LR

STEPS, DECISIONS = 40, 8
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, 0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01),
    "Adam with a tensor for its lr": lambda p: torch.optim.Adam(p, torch.tensor(0.01)),
}


def run(make, shadow=None, poison=None, **more):
    """Train with a cosine schedule, clipping and momentum of the user's own; `shadow` puts rlsched beside it."""
    model = network()
    inner = optimizer = make(model.parameters())
    controller = None
    if shadow is not None:
        options = {"total_steps": STEPS, "decisions": DECISIONS, "policy": lively_policy(), "shadow": True, **more}
        optimizer = shadow(inner, **options)
        controller = optimizer if shadow is attach else optimizer.controller
        optimizer = inner if shadow is attach else optimizer
    scheduler = CosineAnnealingLR(inner, STEPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_at(model, step) * (poison if step == 17 and poison is not None else 1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step(**({"loss": loss} if shadow is not None else {}))
        scheduler.step()
    return model, inner, controller


@pytest.mark.parametrize("face", [ScheduledOptimizer, attach])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_shadowed_run_is_bit_equal_to_the_users_own(make, face):
    """Nobody would let an observer into a run of weeks that changes it."""
    model, inner, controller = run(make, face)
    plain, alone, _ = run(make)
    assert_same_weights(model, plain)
    assert inner.param_groups[0]["lr"] == alone.param_groups[0]["lr"]
    assert controller.step_count == STEPS and list(controller.proposal) == list(CONTROL_NAMES)


@pytest.mark.parametrize("on_divergence", ["cut", "rollback", "raise", None])
def test_not_even_a_nan_is_taken_out(on_divergence):
    """A NaN that ends the run alone ends it in the shadow too; but it is on record."""
    model, _, controller = run(OPTIMIZERS["AdamW"], ScheduledOptimizer, poison=math.nan, on_divergence=on_divergence)
    assert model[0].weight.isnan().all()
    assert any("finite" in message for _, message in controller.interventions)


@pytest.mark.parametrize("make, sums", [(OPTIMIZERS["SGD"], True), (OPTIMIZERS["AdamW"], False)])
def test_proposals_are_relative_to_what_is_in_use(make, sums):
    """Proposals that piled up, never acted upon, would soon be absurd."""
    model = network()
    policy = always(lr=-1, momentum=0.5)
    optimizer = ScheduledOptimizer(
        make(model.parameters()), total_steps=STEPS, decisions=DECISIONS, policy=policy, shadow=True
    )
    (group,) = optimizer.param_groups
    for step in range(STEPS - 5):
        group["lr"] = 0.003 + 0.001 * step
        optimizer.zero_grad()
        loss = loss_at(model, step)
        loss.backward()
        optimizer.step(loss=loss)
        if step % 5 == 1:
            proposal = optimizer.controller.proposal
            early = step / STEPS < 0.2
            moved = LR.early_step if early else LR.step
            momentum = 1 - 0.1 * 10**-0.15  # −log10(1 − momentum) moved by half of 0.3, from 0.9
            assert proposal["momentum"] == pytest.approx(momentum)
            factor = (1 - momentum) / 0.1 if sums else 1
            assert proposal["lr"] == pytest.approx(group["lr"] * math.exp(-moved) * factor, rel=1e-4)


def test_shadow_is_resumed():
    """Curves of a shadow that begins anew with each restart would tell nothing."""
    model = network()
    options = {"total_steps": STEPS, "decisions": DECISIONS, "policy": lively_policy(), "shadow": True}
    whole = ScheduledOptimizer(OPTIMIZERS["SGD"](model.parameters()), **options)
    train(model, whole, range(13))
    resumed = ScheduledOptimizer(OPTIMIZERS["SGD"](model.parameters()), **options)
    resumed.load_state_dict(whole.state_dict())
    train(model, resumed, range(13, 20))
    other = network()
    unbroken = ScheduledOptimizer(OPTIMIZERS["SGD"](other.parameters()), **options)
    train(other, unbroken, range(20))
    assert resumed.controller.proposal == unbroken.controller.proposal


def test_following_a_scheduler_in_the_shadow_is_refused():
    """Nothing is set in the shadow, so an option that says how to set it cannot be meant."""
    with pytest.raises(ValueError, match="follow_scheduler"):
        attach(OPTIMIZERS["SGD"](network().parameters()), total_steps=9, shadow=True, follow_scheduler=True)


@pytest.mark.parametrize("lr, momentum", [(0.0, 0.9), (0.1, 1.0), (0.0, 0.0)])
def test_shadow_never_ends_a_run(lr, momentum):
    """Who only looks must not stop a run, whatever the user does in it."""
    model = network()
    inner = torch.optim.SGD(model.parameters(), lr, momentum)
    optimizer = ScheduledOptimizer(inner, total_steps=30, shadow=True, policy=lively_policy())
    train(model, optimizer, range(10))
    inner.param_groups[0].update(lr=0.0, momentum=1.0)
    train(model, optimizer, range(10, 30))
