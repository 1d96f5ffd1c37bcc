"""Whatever losses and gradients a training throws at the wrapper, weights and hyperparameters stay sane."""

import math
import warnings

import pytest
import torch
from helpers import lively_policy
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from rlsched import DivergenceError, ScheduledOptimizer, SchedulePolicy
from rlsched.control import CONTROLS, LR

SPECIAL = [0.0, 1.0, -1.0, 1e-30, 1e30, -1e30, 1e-45, 3e38, math.inf, -math.inf, math.nan]
losses = st.one_of(st.none(), st.sampled_from(SPECIAL), st.floats(width=32))
scales = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32))
constant = st.builds(lambda loss, scale, n: [(loss, scale)] * n, losses, scales, st.integers(1, 12))
exploding = st.builds(
    lambda start, factor, n: [(start * factor**i, start * factor**i) for i in range(n)],
    st.floats(1e-3, 10),
    st.floats(1.5, 1e6),
    st.integers(1, 40),
)
sequences = st.lists(st.one_of(st.tuples(losses, scales).map(lambda x: [x]), constant, exploding), max_size=8)
OPTIMIZERS = {
    "SGD": lambda p, lr: torch.optim.SGD(p, lr),
    "SGD with momentum": lambda p, lr: torch.optim.SGD(p, lr, 0.9, nesterov=True),
    "AdamW": lambda p, lr: torch.optim.AdamW(p, lr),
    "Adam with amsgrad": lambda p, lr: torch.optim.Adam(p, lr, amsgrad=True),
    "RMSprop": lambda p, lr: torch.optim.RMSprop(p, lr, momentum=0.5),
    "Adagrad": lambda p, lr: torch.optim.Adagrad(p, lr),
    "NAdam": lambda p, lr: torch.optim.NAdam(p, lr),
    "Adadelta": lambda p, lr: torch.optim.Adadelta(p, lr),
}
POLICIES = [lively_policy(), lively_policy(5), SchedulePolicy.zero(), SchedulePolicy.load("default")]


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    sequence=sequences,
    make=st.sampled_from(list(OPTIMIZERS)),
    policy=st.sampled_from(POLICIES),
    lr=st.sampled_from([1e-30, 1e-3, 1.0, 1e3, 1e10]),
    total_steps=st.sampled_from([1, 7, 30, 300]),
    on_divergence=st.sampled_from(["cut", "rollback", "raise", None]),
    bounds=st.sampled_from([(0.0, math.inf), (1e-4, 1e-2)]),
    resume=st.booleans(),
    everywhere=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    per_group=st.booleans(),
    validations=st.lists(st.one_of(st.sampled_from(SPECIAL), st.floats(), st.floats(0.1, 10.0)), max_size=6),
)
@example(
    [[(1e90, 1.0)] * 9], "SGD", POLICIES[0], 1.0, 30, "cut", (0.0, math.inf), False, True, torch.float32, False, []
)
def test_weights_stay_finite_and_learning_rates_in_bounds(
    sequence, make, policy, lr, total_steps, on_divergence, bounds, resume, everywhere, dtype, per_group, validations
):
    """A wrapper that one bad number brings down, or lets through to the weights, is not left alone with a long run."""
    if policy is POLICIES[-2] or total_steps == 1:
        lr = min(lr, 1.0)  # a learning rate that is absurd by itself is found out by the probe, in the second step

    def scheduled():
        return ScheduledOptimizer(
            OPTIMIZERS[make]([{"params": layer.parameters()} for layer in model], lr),
            policy=policy,
            total_steps=total_steps,
            decisions=10,
            on_divergence=on_divergence,
            lr_bounds=bounds,
            per_group=per_group,
        )

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)
    optimizer = scheduled()
    steps = [step for part in sequence for step in part]
    for i, (loss, scale) in enumerate(steps):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
            bad = p.grad if everywhere else p.grad.view(-1)[:1]
            bad.mul_(scale)
        if resume and i == len(steps) // 2:
            state, optimizer = optimizer.state_dict(), scheduled()
            optimizer.load_state_dict(state)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                optimizer.step(loss=loss)
        except DivergenceError:
            assert on_divergence == "raise"
            return
        for p in model.parameters():
            assert p.isfinite().all(), f"step {i}"
        for group in optimizer.param_groups:
            most = lr * math.exp(LR.high) * 10 ** (CONTROLS["momentum"].high - CONTROLS["momentum"].low)
            assert bounds[0] <= group["lr"] <= max(bounds[0], min(bounds[1], most)) * (1 + 1e-6)
            momentum = group["betas"][0] if "betas" in group else group.get("momentum", 0)
            assert 0 <= momentum < 1
        if validations:
            optimizer.observe_validation(validations[i % len(validations)])
    assert optimizer.controller.step_count == len(steps)


@pytest.mark.parametrize("loss", ["nan", torch.zeros(2), [1.0], True, 1j, torch.zeros((), dtype=torch.complex64)])
def test_loss_that_is_no_number_is_refused(loss):
    """The documented exceptions are the only ones, and they name the argument."""
    optimizer = ScheduledOptimizer(torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1), total_steps=3)
    with pytest.raises((TypeError, ValueError), match="loss must be"):
        optimizer.observe(loss)
