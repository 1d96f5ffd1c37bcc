"""What keeps a run alive when something in it is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from rlsched.control import CONTROLS, LR

CUT = math.log(10)  # e-folds taken off the learning rate after a window in which something was not finite


def is_finite(grad_norm: Tensor, loss: Tensor | None) -> Tensor:
    """0-d bool: whether this inner step may reach the weights; a loss of None is not known, and does not count."""
    finite = grad_norm.isfinite()
    return finite if loss is None else finite & loss.isfinite()


def zero_unless(finite: Tensor, grads: Iterable[Tensor]) -> None:
    """Zero the gradients of a step that is not finite, without waiting for an accelerator."""
    if finite.device.type != "cpu":
        mask_unless(finite, grads)
    elif not finite:
        torch._foreach_zero_(list(grads))


def mask_unless(finite: Tensor, grads: Iterable[Tensor]) -> None:
    """The same without looking at `finite` from the host."""
    for grad in grads:
        grad.masked_fill_(~finite, 0)


def cut_lr(state: Tensor) -> Tensor:
    """The control state (controls,) with the learning rate cut to a tenth."""
    state = state.clone()
    state[LR] = (state[LR] - CUT).clamp(min=CONTROLS[LR].low)
    return state
