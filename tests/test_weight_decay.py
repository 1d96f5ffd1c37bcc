"""Weight decay under control: a factor on what the user gave."""

import math

import pytest
import torch
from helpers import always, assert_same_weights, loss_at, network, train

from rlsched import ScheduledOptimizer, control
from rlsched.control import CONTROLS

STEPS = 40
OPTIMIZERS = {
    "AdamW, decoupled": lambda groups: torch.optim.AdamW(groups, 0.01),
    "Adam, L2": lambda groups: torch.optim.Adam(groups, 0.01),
    "SGD, L2": lambda groups: torch.optim.SGD(groups, 0.1, 0.9),
}


def groups(model, decays=(0.1, 0.02)):
    """A parameter group for each layer."""
    return [
        {"params": layer.parameters(), "weight_decay": d} for layer, d in zip((model[0], model[2]), decays, strict=True)
    ]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_decided_weight_decay_is_what_the_optimizer_does(make):
    """A weight decay that is logged and not done, or done twice over the learning rate, is another regularisation."""
    model, plain = network(), network()
    optimizer = ScheduledOptimizer(
        make(groups(model)), total_steps=STEPS, decisions=8, policy=always(weight_decay=-0.5), on_divergence=None
    )
    reference, factors = make(groups(plain)), []
    for step in range(STEPS):
        train(model, optimizer, [step])
        factors.append(optimizer.param_groups[0]["weight_decay"] / 0.1)
        for group, base in zip(reference.param_groups, (0.1, 0.02), strict=True):
            group["lr"] = make(groups(network())).param_groups[0]["lr"] * (1 - step / STEPS)
            group["weight_decay"] = base * factors[-1]
        reference.zero_grad()
        loss_at(plain, step).backward()
        reference.step()
    assert_same_weights(model, plain)
    # Decisions before the inner steps 1, 6, 11, …; the first two lie in the first fifth of the run.
    entry = CONTROLS["weight_decay"]
    moved = [0.0] + [-0.5 * entry.early_step] * 5 + [-1.0 * entry.early_step] * 5
    assert factors[:11] == pytest.approx([math.exp(c) for c in moved])
    assert factors[11] == pytest.approx(math.exp(moved[-1] - 0.5 * entry.step))


def test_groups_keep_their_ratio():
    """Biases and norms that are decayed less would be decayed like the rest."""
    model = network()
    optimizer = ScheduledOptimizer(
        OPTIMIZERS["AdamW, decoupled"](groups(model)), total_steps=STEPS, policy=always(weight_decay=1.0)
    )
    train(model, optimizer, range(STEPS))
    one, other = (group["weight_decay"] for group in optimizer.param_groups)
    assert one / other == pytest.approx(5)
    assert one == pytest.approx(0.1 * math.exp(CONTROLS["weight_decay"].high))


@pytest.mark.parametrize("decays", [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1)])
def test_zero_stays_zero(decays):
    """A network that is not to be decayed would shrink."""
    model = network()
    optimizer = ScheduledOptimizer(
        OPTIMIZERS["AdamW, decoupled"](groups(model, decays)), total_steps=STEPS, policy=always(weight_decay=1.0)
    )
    train(model, optimizer, range(STEPS))
    for group, base in zip(optimizer.param_groups, decays, strict=True):
        assert (group["weight_decay"] == 0) == (base == 0)


def test_it_is_left_alone_unless_it_is_under_control():
    """A weight decay that the user schedules in the loop would be overwritten."""
    model = network()
    policy = always(lr=0.1, weight_decay=1.0)
    optimizer = ScheduledOptimizer(
        OPTIMIZERS["SGD, L2"](groups(model)), total_steps=STEPS, policy=policy, controls=["lr"]
    )
    train(model, optimizer, range(10))
    optimizer.param_groups[0]["weight_decay"] = 0.3
    train(model, optimizer, range(10, STEPS))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.02]


def test_a_network_without_has_none_to_control():
    """Its state would drift while nothing comes of it, and the policy would see a control that is none."""
    assert not CONTROLS["weight_decay"].can_move(0.0)
    base = torch.tensor([0.0, 0.1])
    values = {"lr": torch.ones(2)}
    CONTROLS["weight_decay"].decide(values, base, torch.tensor([1.0, 1.0]), 0.0)
    torch.testing.assert_close(values["weight_decay"], base * math.e)
    assert "weight_decay" in control.decided({name: 0.1 for name in CONTROLS}, dict.fromkeys(CONTROLS, 0.0), False)
