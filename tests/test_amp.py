"""Mixed precision: with a GradScaler and without, through the wrapper and through hooks."""

import math

import pytest
import torch
from helpers import FACES, assert_finite_weights, assert_same_weights, driven, lively_policy, loss_at, network
from torch import nn

from rlsched import ScheduledOptimizer
from rlsched.parameter_sample import moments_of

STEPS = 40
BAD = (0, 3, 11, 12, 30)  # before these steps comes a batch whose gradients overflow


def by_keyword(optimizer, controller, scaler, loss):
    """scaler.step(optimizer, loss=loss)."""
    scaler.step(optimizer, loss=loss)


def by_observe(optimizer, controller, scaler, loss):
    """observe, then the usual loop."""
    controller.observe(loss)
    scaler.step(optimizer)


def after_unscale(optimizer, controller, scaler, loss):
    """unscale_ and a clipping of the user's own, as torch documents it."""
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1e3)
    scaler.step(optimizer, loss=loss)


@pytest.mark.parametrize("report", [by_keyword, by_observe, after_unscale])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("face", FACES)
def test_scaled_run_is_the_unscaled_one(face, fused, report):
    """Statistics of scaled gradients would move with the scale; a skipped step that counts would end the schedule
    early, or be taken for divergence.

    The scale is a power of two, so that scaled training is bit-equal to training without a scaler.
    """

    def run(scaled):
        model = network()
        inner = torch.optim.AdamW(model.parameters(), 0.01, fused=fused)
        optimizer, controller = driven(face, inner, total_steps=STEPS, decisions=10)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=scaled)
        lrs = []
        for step in range(STEPS):
            if scaled and step in BAD:
                optimizer.zero_grad()
                loss = loss_at(model, step) * math.inf
                scaler.scale(loss).backward()
                report(optimizer, controller, scaler, loss)
                scaler.update()
                if report is by_observe:
                    assert controller.step_count == step
            optimizer.zero_grad()
            loss = loss_at(model, step)
            scaler.scale(loss).backward()
            report(optimizer, controller, scaler, loss)
            scaler.update()
            lrs.append(inner.param_groups[0]["lr"])
        assert controller.step_count == STEPS
        return model, lrs, controller.state.control

    (model, lrs, state), (plain, expected, plain_state) = run(True), run(False)
    assert lrs == expected
    assert state == plain_state
    assert_same_weights(model, plain)


@pytest.mark.parametrize("face", FACES)
def test_bfloat16_autocast_trains(face):
    """The most common kind of mixed precision gives losses in bfloat16, of which a mean over a window is useless."""
    model = network()
    inner = torch.optim.AdamW(model.parameters(), 0.01)
    optimizer, controller = driven(face, inner, total_steps=STEPS, decisions=2)
    losses = []
    for step in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_at(model, step)
        loss.backward()
        optimizer.step(loss=loss)
        losses.append(loss.item())
    assert controller.meter.records.dtype == torch.float32
    assert moments_of(controller.meter.records[:19]).loss == pytest.approx(losses[1:], rel=1e-6)
    assert_finite_weights(model)


@pytest.mark.parametrize("size", [30.0, 1000.0])
def test_norm_of_half_precision_gradients_does_not_overflow(size):
    """In float16 the norm is infinite from 65,504 on: the step would be lost, and the learning rate cut."""
    weights = nn.Parameter(torch.zeros(10_000, dtype=torch.float16))
    optimizer = ScheduledOptimizer(torch.optim.SGD([weights], 1e-3), total_steps=9, policy=lively_policy())
    weights.grad = torch.full_like(weights, size)
    optimizer.step(loss=1.0)
    window = moments_of(optimizer.controller.meter.records[:1])
    assert window.grad_norm == pytest.approx([100 * size], rel=1e-3)
    assert weights.abs().min() > 0


def test_loss_of_a_skipped_step_does_not_cut_the_learning_rate():
    """An overflow, which mixed precision meets as a matter of course, would be answered as a divergence."""
    model = network()
    optimizer = ScheduledOptimizer(torch.optim.SGD(model.parameters(), 0.1), total_steps=9, policy=lively_policy())
    optimizer.observe(math.inf)  # and then a GradScaler skips the step
    optimizer.observe(0.75)
    loss_at(model, 0).backward()
    optimizer.step()
    assert moments_of(optimizer.controller.meter.records[:1]).loss == (0.75,)
