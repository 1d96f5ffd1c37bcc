"""What is measured at one inner step, against closed forms."""

import math

import pytest
import torch
from helpers import run_of

from rlsched import moments
from rlsched.moments import PRODUCTS, Moments


def measured(grad, last=None, momentum=None, before=None, after=None, loss=1.0):
    """The moments of steps with these vectors, (*batch, parameters) each; those that are not given are zero."""
    zero = torch.zeros_like(grad)
    last, momentum, before = (zero if x is None else x for x in (last, momentum, before))
    update = before - (before if after is None else after)
    rows = {"grad": grad, "last_grad": last, "momentum": momentum, "weights": before, "update": update}
    products = {}
    for name in PRODUCTS:
        one, other = next((a, b) for a in rows for b in rows if name in (f"{a}_{b}", f"{a}_square" if a == b else None))
        products[name] = (rows[one] * rows[other]).sum(-1)
    whole = torch.linalg.vector_norm(grad, dim=-1)
    return Moments(torch.as_tensor(loss).expand(whole.shape), whole, torch.ones_like(whole), **products)


def test_cosine_is_that_of_the_angle():
    """A wrong agreement of gradients would tell the policy that it oscillates when it does not."""
    angle = torch.tensor([0.0, 0.5, math.pi / 2, 2.0, math.pi])
    turned = 7 * torch.stack([angle.cos(), angle.sin()], -1)
    fixed = torch.tensor([[0.01, 0.0]]).expand(5, 2)
    torch.testing.assert_close(moments.grad_cosine(measured(turned, fixed)), angle.cos(), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        moments.momentum_cosine(measured(turned, momentum=fixed)), angle.cos(), atol=1e-6, rtol=0
    )


def test_cosine_with_nothing_is_zero():
    """The first step has no gradient before it; a NaN would hide the window's other steps."""
    assert moments.grad_cosine(measured(torch.ones(3))) == 0
    assert moments.momentum_cosine(measured(torch.ones(3))) == 0


def test_without_momentum_the_last_gradient_stands_for_it():
    """A policy would take an optimizer without momentum for one whose gradients always turn at right angles."""
    grad, last = torch.randn(2, 9)
    assert moments.momentum_cosine(measured(grad, last)) == moments.grad_cosine(measured(grad, last)) != 0


def test_update_moments_of_a_gradient_step():
    """Both are what the safe start decides by.

    For a step of lr along the gradient, ‖Δθ‖ / ‖θ‖ is lr ‖g‖ / ‖θ‖ and ⟨Δθ, g⟩ / loss is lr ‖g‖² / loss.
    """
    before, grad = torch.tensor([3.0, 4.0]), torch.tensor([0.6, 0.8])
    step = measured(grad, before=before, after=before - 0.1 * grad, loss=2.0)
    assert moments.update_ratio(step).item() == pytest.approx(0.1 * 1 / 5, rel=1e-5)
    assert moments.predicted_decrease(step).item() == pytest.approx(0.1 * 1 / 2, rel=1e-5)
    uphill = measured(grad, before=before, after=before + 0.1 * grad, loss=2.0)
    assert moments.predicted_decrease(uphill).item() == pytest.approx(-0.1 * 1 / 2, rel=1e-5)


def test_decrease_in_a_sample_stands_for_the_whole_network():
    """Of a large network only a sample is measured, whose own part of the decrease would be a thousandth of it."""
    before, grad = torch.randn(2, 5)
    sample = measured(grad, before=before, after=before - 0.1 * grad)
    whole = sample._replace(grad_norm=3 * sample.grad_norm)
    torch.testing.assert_close(moments.predicted_decrease(whole), 9 * moments.predicted_decrease(sample))


@pytest.mark.parametrize("loss", [0.0, -2.0, math.nan])
def test_decrease_over_a_loss_without_logarithm_is_not_measured(loss):
    """A share of a negative loss has the wrong sign: the safe start would take divergence for progress."""
    step = measured(torch.ones(2), before=torch.ones(2), after=torch.zeros(2), loss=loss)
    assert moments.update_ratio(step).isfinite() and moments.predicted_decrease(step).isnan()


def test_average_norm_is_an_exponential_average_with_bounded_jumps():
    """One exploding gradient would lift the average, and with it the clipping threshold, for the rest of a run."""
    average = torch.tensor(math.nan)
    average = moments.average_norm(average, torch.tensor(2.0))
    assert average == 2
    average = moments.average_norm(average, torch.tensor(4.0))
    assert average.item() == pytest.approx(0.9 * 2 + 0.1 * 4)
    spike = moments.average_norm(average, torch.tensor(1e30))
    assert (spike / average).item() == pytest.approx(0.9 + 0.1 * 10)


def test_clip_coefficient_brings_the_norm_down_to_the_threshold():
    """Clipping that lengthens a gradient, or that clips before anything is known, would do harm."""
    norms = torch.tensor([1.0, 4.0, 100.0, 0.0])
    coefficient = moments.clip_coefficient(norms, torch.tensor(2.0), torch.tensor(3.0))
    torch.testing.assert_close(coefficient * norms, norms.clamp(max=6.0))
    assert (coefficient <= 1).all() and (coefficient > 0).all()
    assert (moments.clip_coefficient(norms, torch.tensor(math.nan), torch.tensor(3.0)) == 1).all()
    assert (moments.clip_coefficient(norms, torch.tensor(2.0), torch.tensor(math.inf)) == 1).all()
    assert (moments.clip_coefficient(norms, torch.tensor(0.0), torch.tensor(math.inf)) == 1).all()


@pytest.mark.parametrize("interval", [1, 5, 8, 9, 100])
def test_last_steps_of_a_window_are_measured(interval):
    """A window without a measured step would show the policy zeros; one measured throughout would be slow."""
    steps = [step for step in range(interval) if moments.is_measured(step, interval)]
    assert steps == list(range(interval))[-8:]
    alone = Moments(*(tuple(map(float, range(interval))) for _ in Moments._fields))
    many = Moments(*(torch.arange(float(interval)).expand(2, interval) for _ in Moments._fields))
    for one, two in zip(moments.last_steps(alone), moments.last_steps(many), strict=True):
        assert list(one) == steps and two.tolist() == [steps, steps]


DERIVED = [moments.grad_cosine, moments.momentum_cosine, moments.update_ratio, moments.predicted_decrease]


@pytest.mark.parametrize("derived", DERIVED)
def test_stacked_networks_are_measured_each_on_its_own(derived):
    """Networks that are trained side by side would leak into each other's observations; and one alone, in floats, be
    seen as none of those in training was.
    """
    generator = torch.Generator().manual_seed(0)
    networks, steps = 5, 30
    special = torch.tensor([math.nan, math.inf, 0.0, 1e-38, 3e38, -1.0, 1.0], dtype=torch.float64)

    def draw(name):
        tame = torch.randn(networks, steps, generator=generator, dtype=torch.float64)
        wild = special[torch.randint(len(special), (networks, steps), generator=generator)]
        mixed = torch.where(torch.rand(networks, steps, generator=generator) < 0.8, tame, wild)
        return mixed.abs() if "square" in name else mixed

    window = Moments(*map(draw, Moments._fields))
    together = derived(window)
    for i in range(networks):
        assert list(derived(run_of(window, i))) == pytest.approx(together[i].tolist(), rel=1e-9, nan_ok=True)
    vectors = [torch.randn(networks, 7, generator=generator) for _ in range(5)]
    for i in range(networks):
        torch.testing.assert_close(derived(measured(*vectors))[i], derived(measured(*(v[i] for v in vectors))))


def test_norms_are_the_same_as_floats_and_as_tensors():
    """Training on a CPU would clip other gradients than training on a GPU, or than a batch of runs in training."""
    average, number = torch.tensor([math.nan, math.nan]), math.nan
    for norm in [math.nan, 0.0, 3.0, 1e-20, 40.0, 1e30, 0.0, 2.0]:
        tensor = torch.tensor([norm, norm])
        for multiple, limit in [(2.0, math.inf), (math.inf, 0.5), (0.5, 1.0), (math.inf, math.inf)]:
            coefficient = moments.clip_coefficient(norm, number, multiple, limit)
            for many in (multiple, torch.tensor([multiple, multiple])):
                clipped = moments.clip_coefficient(tensor, average, many, limit)
                assert clipped.tolist() == pytest.approx([coefficient] * 2, nan_ok=True)
        average, number = moments.average_norm(average, tensor), moments.average_norm(number, norm)
        assert average.tolist() == pytest.approx([number] * 2, rel=1e-5, nan_ok=True)
