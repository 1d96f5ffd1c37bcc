"""The wrapper on a GPU."""

import math

import pytest
import torch
from helpers import FACES, driven, lively_policy, loss_at, network

from rlsched import ScheduledOptimizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
STEPS = 40
OPTIMIZERS = {
    "AdamW": lambda p, device: torch.optim.AdamW(p, 0.01),
    "AdamW, fused": lambda p, device: torch.optim.AdamW(p, 0.01, fused=True),
    "AdamW, capturable": lambda p, device: torch.optim.AdamW(p, 0.01, capturable=device == "cuda"),
    "SGD": lambda p, device: torch.optim.SGD(p, 0.1, 0.9),
}


def trained(face, make, device, scale=None):
    """Learning rates and weights of a run; with a scale it is scaled, and a batch that overflows comes now and then."""
    model = network().to(device)
    inner = make(model.parameters(), device)
    optimizer, controller = driven(face, inner, total_steps=STEPS, decisions=10)
    scaler = torch.amp.GradScaler(device, init_scale=scale or 1.0, enabled=scale is not None)
    lrs = []
    for step in range(STEPS):
        for overflows in [True, False] if scale is not None and step % 9 == 4 else [False]:
            optimizer.zero_grad()
            loss = loss_at(model, step, device=device) * (math.inf if overflows else 1.0)
            scaler.scale(loss).backward()
            controller.observe(loss)
            scaler.step(optimizer)
            scaler.update()
        lrs.append(float(inner.param_groups[0]["lr"]))
    assert controller.step_count == STEPS
    return lrs, [p.detach().cpu() for p in model.parameters()]


def assert_close(one, other):
    """Decisions follow what was measured, which sums in another order make a millionth off."""
    assert one[0] == pytest.approx(other[0], rel=1e-3)
    torch.testing.assert_close(one[1], other[1], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_run_is_that_on_a_cpu(make, face):
    """What was measured on a GPU would be something else than what the policy has learnt from."""
    plain = "SGD" if make is OPTIMIZERS["SGD"] else "AdamW"
    assert_close(trained(face, make, "cuda"), trained(face, OPTIMIZERS[plain], "cpu"))


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_scaled_run_is_the_unscaled_one(make, face):
    """Statistics of scaled gradients would move with the scale; a skipped step that counts would end the run early."""
    assert_close(trained(face, make, "cuda", scale=2.0**16), trained(face, make, "cuda"))


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_between_decisions_nothing_waits_for_the_gpu(make):
    """Small steps would take twice the time: each would be queued only when the last one is done."""
    model = network().to("cuda")
    optimizer = ScheduledOptimizer(
        make(model.parameters(), "cuda"), total_steps=200, decisions=10, policy=lively_policy()
    )
    inputs = torch.randn(16, 6, device="cuda")

    def steps(count):
        for _ in range(count):
            optimizer.zero_grad()
            loss = model(inputs).square().mean()
            loss.backward()
            optimizer.step(loss=loss)

    steps(21)  # with a decision: the next window has begun
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps(18)
    finally:
        torch.cuda.set_sync_debug_mode("default")
