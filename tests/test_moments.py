"""What is measured at one inner step, against closed forms."""

import math

import pytest
import torch

from rlsched import moments


def test_cosine_is_that_of_the_angle():
    """A wrong agreement of gradients would tell the policy that it oscillates when it does not."""
    angle = torch.tensor([0.0, 0.5, math.pi / 2, 2.0, math.pi])
    turned = 7 * torch.stack([angle.cos(), angle.sin()], -1)
    fixed = torch.tensor([[0.01, 0.0]]).expand(5, 2)
    torch.testing.assert_close(moments.cosine(turned, fixed), angle.cos(), atol=1e-6, rtol=0)


def test_cosine_with_nothing_is_zero():
    """The first step has no gradient before it; a NaN would hide the window's other steps."""
    assert moments.cosine(torch.ones(3), torch.zeros(3)) == 0


def test_update_moments_of_a_gradient_step():
    """Both are what the safe start decides by.

    For a step of lr along the gradient, ‖Δθ‖ / ‖θ‖ is lr ‖g‖ / ‖θ‖ and ⟨Δθ, g⟩ / loss is lr ‖g‖² / loss.
    """
    before, grad = torch.tensor([3.0, 4.0]), torch.tensor([0.6, 0.8])
    ratio, decrease = moments.update_moments(before, before - 0.1 * grad, grad, torch.tensor(2.0))
    assert ratio.item() == pytest.approx(0.1 * 1 / 5, rel=1e-5)
    assert decrease.item() == pytest.approx(0.1 * 1 / 2, rel=1e-5)
    _, increase = moments.update_moments(before, before + 0.1 * grad, grad, torch.tensor(2.0))
    assert increase.item() == pytest.approx(-0.1 * 1 / 2, rel=1e-5)


@pytest.mark.parametrize("loss", [0.0, -2.0, math.nan])
def test_decrease_over_a_loss_without_logarithm_is_not_measured(loss):
    """A share of a negative loss has the wrong sign: the safe start would take divergence for progress."""
    before, grad = torch.ones(2), torch.ones(2)
    ratio, decrease = moments.update_moments(before, before - grad, grad, torch.tensor(loss))
    assert ratio.isfinite() and decrease.isnan()


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
    measured = [step for step in range(interval) if moments.is_measured(step, interval)]
    assert measured == list(range(interval))[-8:]


def test_stacked_networks_are_measured_each_on_its_own():
    """Networks that are trained side by side would leak into each other's observations."""
    before, after, grad, last = (torch.randn(5, 7) for _ in range(4))
    loss = torch.rand(5)
    ratio, decrease = moments.update_moments(before, after, grad, loss)
    cosine = moments.cosine(grad, last)
    for i in range(5):
        single = moments.update_moments(before[i], after[i], grad[i], loss[i])
        torch.testing.assert_close((ratio[i], decrease[i]), single)
        torch.testing.assert_close(cosine[i], moments.cosine(grad[i], last[i]))


def test_norms_are_the_same_as_floats_and_as_tensors():
    """Training on a CPU would clip other gradients than training on a GPU."""
    average, number = torch.tensor(math.nan), math.nan
    for norm in [0.0, 3.0, 1e-20, 40.0, 1e30, 0.0, 2.0]:
        tensor = torch.tensor(norm)
        for multiple, limit in [(2.0, math.inf), (math.inf, 0.5), (0.5, 1.0), (math.inf, math.inf)]:
            coefficient = moments.clip_coefficient(norm, number, multiple, limit)
            assert moments.clip_coefficient(tensor, average, multiple, limit).item() == pytest.approx(coefficient)
        average, number = moments.average_norm(average, tensor), moments.average_norm(number, norm)
        assert average.item() == pytest.approx(number, rel=1e-5)
