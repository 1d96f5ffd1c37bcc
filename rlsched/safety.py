"""What keeps a run alive when something in it is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from rlsched.control import CONTROLS, LR

CUT = math.log(10)  # e-folds taken off the learning rate after a window in which something was not finite


def on_host(tensor: Tensor) -> bool:
    """Whether a number in `tensor` can be read without waiting for an accelerator."""
    return tensor.device.type == "cpu"


def zero_unless(finite: Tensor | bool, grads: Iterable[Tensor]) -> None:
    """Zero the gradients of a step that is not finite; a 0-d tensor that tells so is not looked at."""
    if isinstance(finite, Tensor):
        for grad in grads:
            grad.masked_fill_(~finite, 0)
    elif not finite:
        torch._foreach_zero_(list(grads))


def cut_lr(state: Tensor) -> Tensor:
    """The control state (controls,) with the learning rate cut to a tenth."""
    state = state.clone()
    state[LR] = (state[LR] - CUT).clamp(min=CONTROLS[LR].low)
    return state
