"""What keeps a run alive when something in it is not finite."""

import math

import pytest
import torch

from rlsched import safety
from rlsched.control import CONTROLS, LR


@pytest.mark.parametrize("zero", [safety.zero_unless, safety.mask_unless])
def test_gradients_are_zeroed_only_when_something_is_not_finite(zero):
    """A NaN times zero is NaN still; and a finite step must not be touched. An accelerator takes the second way."""
    values = [torch.tensor([1.0, -2.0]), torch.tensor([[math.inf, math.nan]])]
    grads = [v.clone() for v in values]
    zero(torch.tensor(True), grads)
    for grad, value in zip(grads, values, strict=True):
        torch.testing.assert_close(grad, value, equal_nan=True)
    zero(torch.tensor(False), grads)
    assert all((grad == 0).all() for grad in grads)


def test_accelerators_are_not_waited_for(monkeypatch):
    """Reading one flag from the host at every step would halve the speed of small steps on a GPU."""
    called = []
    monkeypatch.setattr(safety, "mask_unless", lambda *args: called.append(args))
    finite = torch.ones((), dtype=torch.bool, device="meta")  # cannot be read at all
    safety.zero_unless(finite, [])
    assert called == [(finite, [])]


@pytest.mark.parametrize("norm, loss, finite", [(1.0, 1.0, True), (1.0, None, True), (1.0, -3.0, True),
                                                (math.inf, 1.0, False), (math.nan, None, False),
                                                (1.0, math.inf, False), (1.0, math.nan, False)])  # fmt: skip
def test_a_step_is_finite_if_its_gradient_and_its_known_loss_are(norm, loss, finite):
    """A loop that reports no loss would never train, or one with a NaN loss would."""
    loss = None if loss is None else torch.tensor(loss)
    assert bool(safety.is_finite(torch.tensor(norm), loss)) is finite


def test_cut_is_a_tenth_down_to_the_lower_bound():
    """Repeated cuts would take the learning rate out of the policy's reach."""
    state = torch.tensor([1.0, 0.9, 3.0])
    cut = safety.cut_lr(state)
    assert (cut - state)[LR].exp().item() == pytest.approx(0.1)
    assert torch.equal(cut[1:], state[1:]) and state[LR] == 1
    for _ in range(10):
        cut = safety.cut_lr(cut)
    assert cut[LR] == CONTROLS[LR].low
