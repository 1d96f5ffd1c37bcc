"""What keeps a run alive when something in it is not finite."""

import math

import pytest
import torch

from rlsched import safety
from rlsched.control import CONTROLS, LR


@pytest.mark.parametrize("known", [bool, torch.tensor], ids=["on the CPU", "on an accelerator"])
def test_gradients_are_zeroed_only_when_something_is_not_finite(known):
    """A NaN times zero is NaN still; and a finite step must not be touched."""
    values = [torch.tensor([1.0, -2.0]), torch.tensor([[math.inf, math.nan]])]
    grads = [v.clone() for v in values]
    safety.zero_unless(known(True), grads)
    for grad, value in zip(grads, values, strict=True):
        torch.testing.assert_close(grad, value, equal_nan=True)
    safety.zero_unless(known(False), grads)
    assert all((grad == 0).all() for grad in grads)


def test_cut_is_a_tenth_down_to_the_lower_bound():
    """Repeated cuts would take the learning rate out of the policy's reach."""
    state = torch.tensor([1.0, 0.9, 3.0])
    cut = safety.cut_lr(state)
    assert (cut - state)[LR].exp().item() == pytest.approx(0.1)
    assert torch.equal(cut[1:], state[1:]) and state[LR] == 1
    for _ in range(10):
        cut = safety.cut_lr(cut)
    assert cut[LR] == CONTROLS[LR].low
