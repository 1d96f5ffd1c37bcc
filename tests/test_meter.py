"""Measuring and clipping, on accelerators too, which the host never waits for but at a decision."""

import math
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from helpers import lively_policy, loss_at, network
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlsched import ScheduledOptimizer, gradients, hyperparameters, meter, records
from rlsched.moments import MEASURED_STEPS


@pytest.mark.parametrize("known", [bool, torch.tensor], ids=["on the CPU", "on an accelerator"])
def test_gradients_are_left_out_only_when_something_is_not_finite(known):
    """A NaN times zero is NaN still; and a finite step must not be touched.

    A gradient of zeros is one: Adam decays weights and divides 0 by 0 in half precision. So it is taken away, unless to
    know that would be to wait for an accelerator.
    """
    values = [torch.tensor([1.0, -2.0]), torch.tensor([[math.inf, math.nan]])]
    parameters = [torch.zeros_like(v) for v in values]
    for p, v in zip(parameters, values, strict=True):
        p.grad = v.clone()
    gradients.leave_out_unless(known(True), parameters, [p.grad for p in parameters])
    for p, value in zip(parameters, values, strict=True):
        torch.testing.assert_close(p.grad, value, equal_nan=True)
    gradients.leave_out_unless(known(False), parameters, [p.grad for p in parameters])
    assert all(p.grad is None if known is bool else (p.grad == 0).all() for p in parameters)


@pytest.mark.parametrize("known", [bool, torch.tensor], ids=["on the CPU", "on an accelerator"])
def test_gradients_of_any_kind_are_left_out(known):
    """torch cannot fill a sparse gradient by a mask: the step would be an error on an accelerator alone."""
    parameters = [torch.zeros(3, 2), torch.zeros(2, dtype=torch.complex64)]
    rows = torch.tensor([[1, 1]]), torch.full((2, 2), math.inf)
    parameters[0].grad = torch.sparse_coo_tensor(*rows, (3, 2), check_invariants=True)
    parameters[1].grad = torch.full((2,), complex(1, math.nan))
    grads = meter.Meter(1, has_momentum=False).local_grads(parameters)
    gradients.leave_out_unless(known(False), parameters, grads)
    assert all(p.grad is None if known is bool else (p.grad.to_dense() == 0).all() for p in parameters)


@pytest.mark.parametrize("length", [1, 9, 1023, 1024, 1025, 5000, 10**6])
def test_record_of_a_window_is_bounded(length):
    """A window of a run of 10⁹ steps would take a gigabyte, in memory and in every checkpoint."""
    places = {row: column for column in range(length) if (row := records.row_of(column, length)) is not None}
    assert sorted(places) == list(range(len(places))) and len(places) <= records.MAX_RECORDS
    last = min(length, MEASURED_STEPS)
    assert list(places.values())[-last:] == list(range(length - last, length)), "steps that are measured"
    if length <= records.MAX_RECORDS:
        assert list(places) == list(places.values())
    else:
        assert len(places) > records.MAX_RECORDS / 3
        gaps = {b - a for a, b in pairwise(list(places.values())[:-MEASURED_STEPS])}
        assert len(gaps) == 1, "spread evenly"


ON_META = {
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, foreach=False),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "SGD": lambda p: torch.optim.SGD(p, 0.1, 0.9),
    "SGD, tensor lr": lambda p: torch.optim.SGD(p, torch.tensor(0.1), 0.9, foreach=False),
}


@pytest.mark.parametrize("max_grad_norm, per_group", [(None, False), (1.0, False), (None, True)])
@pytest.mark.parametrize("make", ON_META.values(), ids=ON_META)
def test_between_decisions_no_accelerator_is_waited_for(make, max_grad_norm, per_group):
    """Small steps on a GPU would take twice the time: each would be queued only when the last one is done.

    Tensors on the device "meta" have no values. To read one from the host is an error, as it is to copy one there.
    """
    model = network().to("meta")
    options = {"total_steps": 200, "decisions": 10, "policy": lively_policy(), "max_grad_norm": max_grad_norm}
    groups = [{"params": layer.parameters()} for layer in (model[0], model[2])]
    optimizer = ScheduledOptimizer(make(groups), per_group=per_group, **options)
    controller = optimizer.controller
    controller.states = [
        state._replace(window_end=20) for state in controller.states
    ]  # of which the last 8 steps are measured

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
    with pytest.raises(NotImplementedError, match="meta"):
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
    for module in (meter, gradients, hyperparameters):
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
        for module in (meter, gradients, hyperparameters):
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
            optimizer.observe(loss)
            optimizer.step(loss=loss / 2)
            lrs.append(float(optimizer.param_groups[0]["lr"]))
        state = torch.tensor(list(optimizer.controller.state.control.values()))
        return nn.utils.parameters_to_vector(model.parameters()).detach(), state, torch.tensor(lrs)

    for one, other in zip(run(True), run(False), strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


# --- Losses as people report them -----------------------------------------------------------------------------------


def reported(parts, report, divide=True):
    """The loss of each step that is recorded, where gradients are accumulated over `parts` mini-batches."""
    model = network()
    optimizer = ScheduledOptimizer(torch.optim.SGD(model.parameters(), 0.1), total_steps=100, policy=lively_policy())
    controller, seen = optimizer.controller, []
    for step in range(4):
        optimizer.zero_grad()
        for part in range(parts):
            whole = loss_at(model, parts * step + part)
            loss = whole / parts
            shown = loss if divide else whole
            if report == "before":
                optimizer.observe(shown)
            loss.backward()
            if report == "after":
                optimizer.observe(shown)
        optimizer.step(loss=shown if report == "last" else None)
        seen.append(float(controller.meter.records[0, meter.LOSS]))
    return seen, controller.interventions


@pytest.mark.parametrize("report", ["before", "after", "last"])
def test_loss_that_is_divided_for_accumulation_is_recognised(report):
    """Taken for the loss itself it would make a step look as many times as bold as there are parts."""
    whole, silent = reported(4, report, divide=False)
    divided, said = reported(4, report)
    assert divided == pytest.approx(whole, rel=1e-5)
    assert not silent and [message for _, message in said] == [
        "losses are quotients, of 4 backward passes: multiplied by 4"
    ]


def test_divided_loss_after_a_skipped_step_counts_once():
    """A GradScaler that skips a step would have the next loss counted twice."""
    model = network()
    optimizer = ScheduledOptimizer(torch.optim.SGD(model.parameters(), 0.1), total_steps=100, policy=lively_policy())
    for step in range(2):
        optimizer.zero_grad()
        for part in range(4):
            loss = loss_at(model, part) / 4
            loss.backward()
            optimizer.observe(loss)
        if step == 1:
            optimizer.step()
    whole = sum(loss_at(network(), part).item() for part in range(4)) / 4
    assert float(optimizer.controller.meter.records[0, meter.LOSS]) == pytest.approx(whole, rel=1e-5)


def test_mean_that_is_a_quotient_is_left_as_it_is():
    """A sum of losses over the number of points is a quotient as well."""
    model = network()
    optimizer = ScheduledOptimizer(torch.optim.SGD(model.parameters(), 0.1), total_steps=100, policy=lively_policy())
    loss = loss_at(model, 0) / 8
    loss.backward()
    optimizer.step(loss=loss)
    assert float(optimizer.controller.meter.records[0, meter.LOSS]) == pytest.approx(loss.item())
