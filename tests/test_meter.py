"""Measuring and clipping, on accelerators too, which the host never waits for but at a decision."""

import math
from contextlib import nullcontext

import pytest
import torch
from helpers import lively_policy, loss_at, network
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlsched import ScheduledOptimizer, hyperparameters, meter


@pytest.mark.parametrize("known", [bool, torch.tensor], ids=["on the CPU", "on an accelerator"])
def test_gradients_are_zeroed_only_when_something_is_not_finite(known):
    """A NaN times zero is NaN still; and a finite step must not be touched."""
    values = [torch.tensor([1.0, -2.0]), torch.tensor([[math.inf, math.nan]])]
    grads = [v.clone() for v in values]
    meter.zero_unless(known(True), grads)
    for grad, value in zip(grads, values, strict=True):
        torch.testing.assert_close(grad, value, equal_nan=True)
    meter.zero_unless(known(False), grads)
    assert all((grad == 0).all() for grad in grads)


ON_META = {
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, foreach=False),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "SGD": lambda p: torch.optim.SGD(p, 0.1, 0.9),
    "SGD, tensor lr": lambda p: torch.optim.SGD(p, torch.tensor(0.1), 0.9, foreach=False),
}


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("make", ON_META.values(), ids=ON_META)
def test_between_decisions_no_accelerator_is_waited_for(make, max_grad_norm):
    """Small steps on a GPU would take twice the time: each would be queued only when the last one is done.

    Tensors on the device "meta" have no values. To read one from the host is an error, as it is to copy one there.
    """
    model = network().to("meta")
    options = {"total_steps": 200, "decisions": 10, "policy": lively_policy(), "max_grad_norm": max_grad_norm}
    optimizer = ScheduledOptimizer(make(model.parameters()), **options)
    controller = optimizer.controller
    controller.state = controller.state._replace(window_end=20)  # of which the last 8 steps are measured

    def step(report):
        optimizer.zero_grad()
        loss = model(torch.randn(16, 6, device="meta")).square().mean()
        loss.backward()
        report(loss)

    for _ in range(5):
        step(lambda loss: optimizer.step(loss=loss))
        step(lambda loss: optimizer.step(loss=0.5))
        step(lambda loss: optimizer.step())
        step(lambda loss: (optimizer.observe(loss), optimizer.observe(loss), optimizer.step()))
    assert controller.step_count == 20
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        step(lambda loss: optimizer.step(loss=loss))


class CountReads(TorchDispatchMode):
    """Counts how often the host asks for a number."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


KINDS = {
    "AdamW, fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, 0.1, 0.9, fused=True),
    "RMSprop, tensor lr": lambda p: torch.optim.RMSprop(p, torch.tensor(0.01)),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_between_decisions_only_the_optimizer_reads(make, monkeypatch):
    """As above, for optimizers that do not run without values; the way of an accelerator is taken on the CPU."""
    for module in (meter, hyperparameters):
        monkeypatch.setattr(module, "on_host", lambda _: False)

    def reads(wrap):
        model, counter = network(), CountReads()
        inner = make(model.parameters())
        optimizer = ScheduledOptimizer(inner, total_steps=310, decisions=10, policy=lively_policy()) if wrap else inner
        for step in range(32):  # decisions before the inner steps 1 and 32
            optimizer.zero_grad()
            loss = loss_at(model, step)
            loss.backward()
            with counter if step > 1 else nullcontext():
                optimizer.step(**({"loss": loss} if wrap else {}))
        return counter.reads

    assert reads(wrap=True) == reads(wrap=False)


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_accelerators_do_what_the_cpu_does(make, monkeypatch):
    """On the CPU the norms are computed with as floats, elsewhere as tensors: two schedules would come of it."""

    def run(on_host):
        for module in (meter, hyperparameters):
            monkeypatch.setattr(module, "on_host", lambda _: on_host)
        model = network()
        optimizer = ScheduledOptimizer(
            make(model.parameters()), total_steps=40, policy=lively_policy(), max_grad_norm=0.5
        )
        lrs = []
        for step in range(40):
            optimizer.zero_grad()
            loss = loss_at(model, step)
            loss.backward()
            bad = {9: math.nan, 19: math.inf}.get(step)
            if bad is not None:
                model[0].weight.grad[0, 0] = bad
            optimizer.observe(loss)
            optimizer.step(loss=loss / 2)
            lrs.append(float(optimizer.param_groups[0]["lr"]))
        state = torch.tensor(list(optimizer.controller.state.control.values()))
        return nn.utils.parameters_to_vector(model.parameters()).detach(), state, torch.tensor(lrs)

    for one, other in zip(run(True), run(False), strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
