"""What is measured of a user's network at an inner step: all of a small one, a sample of a large one."""

import math
from contextlib import nullcontext

import pytest
import torch
from helpers import lively_policy, loss_at, network
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlsched import ScheduledOptimizer, SchedulePolicy, moments, safety, sampling
from rlsched.moments import Moments
from rlsched.sampling import Sample, moments_of


def flat(tensors):
    """Tensors as one vector."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def test_small_network_is_measured_as_the_environment_measures():
    """The policy would meet other numbers in a user's loop than it was trained on."""
    model, last, losses = network(), None, [0.7, math.nan, 0.0, 2.0]
    parameters = list(model.parameters())
    sample, records, expected = Sample(parameters), [], []
    for step, loss in enumerate(losses):
        record = torch.full((sampling.COLUMNS,), torch.nan)
        momentum = [torch.randn_like(p) for p in parameters]
        model.zero_grad()
        loss_at(model, step).backward()
        grad, before = flat(p.grad for p in parameters), flat(parameters)
        record[sampling.LOSS], record[sampling.GRAD_NORM] = loss, grad.norm()
        sample.take_grad()
        sample.take_momentum(momentum)
        sample.take_weights()
        with torch.no_grad():
            for p in parameters:
                p -= 0.1 * torch.randn_like(p)
        sample.finish(record)
        records.append(record)
        last = torch.zeros_like(grad) if last is None else last
        cosines = moments.cosine(grad, last), moments.cosine(grad, flat(momentum))
        updates = moments.update_moments(before, flat(parameters), grad, torch.tensor(loss))
        known = torch.tensor(loss if loss > 0 else math.nan)
        expected.append(torch.stack([known, grad.norm(), torch.tensor(0.0), *cosines, *updates]))
        last = grad
    expected[1] = torch.full((len(Moments._fields),), torch.nan)  # the loss was not finite
    measured = torch.stack(moments_of(torch.stack(records)), -1)
    torch.testing.assert_close(measured, torch.stack(expected), rtol=1e-4, atol=1e-6, equal_nan=True)


def run_measured(size, monkeypatch, memory_format=torch.contiguous_format):
    """Ten steps of a convolutional network, the nine of the second window measured; returns the controller."""
    monkeypatch.setattr(sampling, "SIZE", size)
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 48, 3), nn.Flatten(), nn.Linear(768, 10))
    model = model.to(memory_format=memory_format)
    inner = torch.optim.SGD(model.parameters(), 0.01, 0.9)
    optimizer = ScheduledOptimizer(inner, total_steps=100, decisions=10, policy=SchedulePolicy.zero())
    for _ in range(10):
        optimizer.zero_grad()
        x, y = torch.randn(32, 3, 8, 8).to(memory_format=memory_format), torch.randint(10, (32,))
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step(loss=loss)
    return optimizer.controller


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_sample_stands_for_the_whole_network(monkeypatch, memory_format):
    """A policy that sees the gradients of one layer, or of a corner of it, would take them for the network's."""
    whole = run_measured(2**16, monkeypatch)
    sampled = run_measured(2**11, monkeypatch, memory_format)
    assert whole.last_grad.numel() == 18_778
    assert 1500 < sampled.last_grad.numel() <= 2**11 + 6
    for name, expected, measured in zip(
        Moments._fields, moments_of(whole.window), moments_of(sampled.window), strict=True
    ):
        atol = 0.08 if "cosine" in name else 1e-6
        torch.testing.assert_close(
            measured, expected, rtol=0.15, atol=atol, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_weights_that_move_to_other_memory_are_found():
    """The update would be measured as nothing, and the policy would raise the learning rate to its bound."""
    model = network()
    sample, record = Sample(list(model.parameters())), torch.zeros(1, sampling.COLUMNS)
    record[0, sampling.LOSS] = record[0, sampling.GRAD_NORM] = 1.0
    for factor in (0.9, 0.5):
        loss_at(model, 0).backward()
        sample.take_grad()
        sample.take_weights()
        for p in model.parameters():
            p.data = factor * p.data
        sample.finish(record[0])
        assert moments_of(record).update_ratio.item() == pytest.approx(1 - factor, rel=1e-4)


def test_parameters_without_gradient_count_as_zeros():
    """A head that a batch did not use would keep the gradient of an older batch, or end the run with an error."""
    model = network()
    sample = Sample(list(model.parameters()))
    loss_at(model, 0).backward()
    sample.take_grad()
    assert sample.last_grad[:48].abs().sum() > 0
    model[0].weight.grad = None
    sample.take_grad()
    assert sample.last_grad[:48].abs().sum() == 0
    assert sample.last_grad[48:].abs().sum() > 0


# --- Accelerators ---------------------------------------------------------------------------------------------------

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
    optimizer.controller.window_length = optimizer.controller.next_decision = 20  # of which the last 8 are measured

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
    assert optimizer.controller.step_count == 20
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
    monkeypatch.setattr(safety, "on_host", lambda _: False)

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
        monkeypatch.setattr(safety, "on_host", lambda _: on_host)
        model = network()
        optimizer = ScheduledOptimizer(
            make(model.parameters()), total_steps=40, policy=lively_policy(), max_grad_norm=0.5
        )
        hyperparameters = []
        for step in range(40):
            optimizer.zero_grad()
            loss = loss_at(model, step)
            loss.backward()
            bad = {9: math.nan, 19: math.inf}.get(step)
            if bad is not None:
                model[0].weight.grad[0, 0] = bad
            optimizer.observe(loss)
            optimizer.step(loss=loss / 2)
            hyperparameters.append(float(optimizer.param_groups[0]["lr"]))
        return flat(model.parameters()), optimizer.controller.control_state, torch.tensor(hyperparameters)

    for one, other in zip(run(True), run(False), strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
