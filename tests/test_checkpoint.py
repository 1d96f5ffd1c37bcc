"""torch.distributed.checkpoint's helpers save and resume a schedule; two ranks do so in test_distributed."""

import copy

import pytest
import torch
from helpers import assert_same_weights, lively_policy, loss_at, network, train
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from rlsched import ScheduledOptimizer, attach

OPTIONS = {"total_steps": 21, "decisions": 5}
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1),  # without any state of its own
    "SGD, momentum": lambda p: torch.optim.SGD(p, 0.1, 0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "AdamW, tensor lr": lambda p: torch.optim.AdamW(p, torch.tensor(0.01)),
}
WAYS = {
    "tree": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True, cpu_offload=True),
}
FACES = [ScheduledOptimizer, attach]
KINDS = [(kind, way) for kind in OPTIMIZERS for way in WAYS if (kind, way) != ("SGD", "full")]  # which torch refuses


def driven(face, make, **options):
    """A model, the optimizer to step and the controller, for either face."""
    model = network()
    inner = make(model.parameters())
    driver = face(inner, policy=lively_policy(), **OPTIONS, **options)
    return (model, inner, driver) if face is attach else (model, driver, driver.controller)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("kind, way", KINDS)
@pytest.mark.parametrize("face", FACES)
def test_run_from_a_checkpoint_goes_on_bit_equal(kind, way, face, tmp_path):
    """The helpers keep what they know, so that a schedule saved elsewhere would start anew with old weights."""
    make, way = OPTIMIZERS[kind], WAYS[way]
    model, optimizer, controller = driven(face, make)

    def state(model, optimizer, controller):
        weights, state = get_state_dict(model, optimizer, options=way)
        return {"model": weights, "optimizer": state, **({"schedule": controller} if face is attach else {})}

    before = train(model, optimizer, range(9))
    save(state(model, optimizer, controller), checkpoint_id=tmp_path, no_dist=True)
    expected = before + train(model, optimizer, range(9, 21))
    again = driven(face, make)
    loaded = state(*again)
    load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(*again[:2], model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"], options=way)
    assert before + train(*again[:2], range(9, 21)) == expected
    assert_same_weights(again[0], model)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_optimizer_alone_is_set_without_a_template(way):
    """A state in memory, or of torch.save, is set without the fresh optimizer having been asked for its own."""
    model, optimizer, _ = driven(ScheduledOptimizer, OPTIMIZERS["AdamW"])
    train(model, optimizer, range(9))
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=way))
    again, fresh, _ = driven(ScheduledOptimizer, OPTIMIZERS["AdamW"])
    again.load_state_dict(model.state_dict())
    set_optimizer_state_dict(again, fresh, state, options=way)
    assert train(again, fresh, range(9, 21)) == train(model, optimizer, range(9, 21))
    assert_same_weights(again, model)


@pytest.mark.parametrize("steps", [0, 9])
@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_step_that_creates_state_is_no_inner_step(make, face, steps):
    """The helpers make a step with a learning rate of 0 and zeros for gradients. As an inner step it would be the
    probe, or one of a window, and would move the weights at the learning rate of the schedule.
    """
    model, optimizer, controller = driven(face, make)
    train(model, optimizer, range(steps))
    controller.observe(0.5)  # of a step that a GradScaler skipped
    optimizer.zero_grad()
    before, weights = controller.state_dict(), copy.deepcopy(model)
    get_optimizer_state_dict(model, optimizer)
    assert controller.state_dict() == before
    assert_same_weights(model, weights)
    assert bool(optimizer.state) == (make is not OPTIMIZERS["SGD"])


def test_real_step_at_a_learning_rate_of_zero_counts():
    """The first step of a warm-up would be taken for one of the helpers', and the schedule would be late by a step."""
    model, optimizer, controller = driven(ScheduledOptimizer, OPTIMIZERS["AdamW"], follow_scheduler=True)
    optimizer.param_groups[0]["lr"] = 0.0
    loss_at(model, 0).backward()
    optimizer.observe(0.5)
    optimizer.step()
    assert controller.step_count == 1
