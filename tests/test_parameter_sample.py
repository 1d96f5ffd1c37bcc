"""What is measured of a user's network at an inner step: all of a small one, a sample of a large one."""

import math

import pytest
import torch
from helpers import loss_at, network
from torch import nn

from rlsched import ScheduledOptimizer, SchedulePolicy, moments, parameter_sample
from rlsched.moments import Moments
from rlsched.parameter_sample import ParameterSample, every_of_sparse, moments_of


def flat(tensors):
    """Tensors as one vector."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def test_small_network_is_measured_as_the_environment_measures():
    """The policy would meet other numbers in a user's loop than it was trained on.

    Of the loss, a step that is not finite, or has none, or one without a logarithm, must not hide the rest.
    """
    model, last = network(), None
    parameters = list(model.parameters())
    sample, records, expected = ParameterSample(parameters), [], []
    for step, (loss, finite) in enumerate([(0.7, True), (math.nan, False), (math.nan, True), (0.0, True), (2.0, True)]):
        record = torch.full((parameter_sample.COLUMNS,), torch.nan)
        momentum = [torch.randn_like(p) for p in parameters]
        model.zero_grad()
        loss_at(model, step).backward()
        grad, before = flat(p.grad for p in parameters), flat(parameters)
        record[parameter_sample.LOSS] = loss
        record[parameter_sample.GRAD_NORM] = grad.norm() if finite else math.nan
        record[parameter_sample.CLIP_COEFFICIENT] = 0.5 if step == 4 else 1.0
        sample.take_all(momentum)
        with torch.no_grad():
            for p in parameters:
                p -= 0.1 * torch.randn_like(p)
        sample.finish(record)
        records.append(record)
        last = torch.zeros_like(grad) if last is None else last
        update, m = before - flat(parameters), flat(momentum)
        products = {
            "grad_square": grad @ grad,
            "last_grad_square": last @ last,
            "momentum_square": m @ m,
            "weights_square": before @ before,
            "update_square": update @ update,
            "grad_last_grad": grad @ last,
            "grad_momentum": grad @ m,
            "grad_weights": grad @ before,
            "grad_update": grad @ update,
            "update_weights": update @ before,
        }
        each = Moments(torch.tensor(loss), grad.norm(), torch.tensor(0.5 if step == 4 else 1.0), **products)
        expected.append(each if finite else Moments(*[torch.tensor(math.nan)] * len(each)))
        last = grad
    measured = moments_of(torch.stack(records))
    for name, values in measured._asdict().items():
        wanted = torch.stack([getattr(each, name) for each in expected])
        torch.testing.assert_close(
            torch.tensor(values), wanted, rtol=1e-4, atol=1e-5, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def run_measured(size, monkeypatch, memory_format=torch.contiguous_format):
    """Ten steps of a convolutional network, the nine of the second window measured; returns the controller."""
    monkeypatch.setattr(parameter_sample, "SIZE", size)
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
    assert whole.meter.last_grads[0].numel() == 18_778
    assert 1500 < sampled.meter.last_grads[0].numel() <= 2**11 + 6
    one, other = moments_of(whole.meter.records), moments_of(sampled.meter.records)
    derived = (moments.grad_cosine, moments.momentum_cosine, moments.update_ratio, moments.predicted_decrease)
    plain = [(name, getattr(one, name), getattr(other, name)) for name in ("loss", "grad_norm", "clip_coefficient")]
    for name, *both in [*plain, *((f.__name__, f(one), f(other)) for f in derived)]:
        measured, expected = map(torch.tensor, reversed(both))
        atol = 0.08 if "cosine" in name else 1e-6
        torch.testing.assert_close(
            measured, expected, rtol=0.15, atol=atol, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_weights_that_move_to_other_memory_are_found():
    """The update would be measured as nothing, and the policy would raise the learning rate to its bound."""
    model = network()
    sample, record = ParameterSample(list(model.parameters())), torch.zeros(1, parameter_sample.COLUMNS)
    record[0, parameter_sample.LOSS] = record[0, parameter_sample.GRAD_NORM] = 1.0
    for factor in (0.9, 0.5):
        loss_at(model, 0).backward()
        sample.take_all()
        for p in model.parameters():
            p.data = factor * p.data
        sample.finish(record[0])
        assert moments.update_ratio(moments_of(record)) == pytest.approx([1 - factor], rel=1e-4)


def test_parameters_without_gradient_count_as_zeros():
    """A head that a batch did not use would keep the gradient of an older batch, or end the run with an error."""
    model = network()
    sample = ParameterSample(list(model.parameters()))
    loss_at(model, 0).backward()
    sample.take_grad()
    assert sample.last_grad[:48].abs().sum() > 0
    model[0].weight.grad = None
    sample.take_grad()
    assert sample.last_grad[:48].abs().sum() == 0
    assert sample.last_grad[48:].abs().sum() > 0


@pytest.mark.parametrize("every", [1, 2, 7, 31])
@pytest.mark.parametrize(
    "shape, sparse", [((9,), 1), ((50, 12), 1), ((50, 12), 2), ((9, 4, 5), 1), ((9, 4, 5), 2), ((3, 1), 1), ((4, 0), 1)]
)
def test_sparse_tensor_is_sampled_as_a_dense_one(shape, sparse, every):
    """Of an embedding the numbers of one word would be taken for those of another."""
    for stored in (0, 1, 20):
        indices = torch.stack([torch.randint(size, (stored,)) for size in shape[:sparse]])
        values = torch.randn(stored, *shape[sparse:])
        tensor = torch.sparse_coo_tensor(indices, values, shape, check_invariants=True).coalesce()
        assert every_of_sparse(tensor, every).equal(tensor.to_dense().reshape(-1)[::every])
