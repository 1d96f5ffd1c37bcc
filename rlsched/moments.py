"""What is measured at one inner step.

All functions take flat vectors, `(*batch, parameters)`, and return `(*batch,)`: one network or N stacked networks.
Those of norms take and return floats as well, which on the CPU are faster than tensors of one number.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

MEASURED_STEPS = 8  # per window: enough to average over, and few enough to be free in a long window
NORM_DECAY = 0.9  # per inner step, of the running average of the gradient norm
NORM_JUMP = 10.0  # a gradient norm counts at most this many times the running average
TINY = 1e-30  # norm of weights that are zero


Number = TypeVar("Number", float, Tensor)


class Moments(NamedTuple):
    """Moments of one inner step, each (*batch,). Stacked along a last dimension they make a window.

    NaN means "not measured": a loss that nobody reported, or one that has no logarithm; and directions and
    updates outside the last `MEASURED_STEPS` inner steps of a window.
    """

    loss: Tensor
    grad_norm: Tensor  # before clipping
    clipped: Tensor  # 1 where the gradient was clipped, else 0
    grad_cosine: Tensor  # cos(g_t, g_{t-1})
    momentum_cosine: Tensor  # cos(g_t, m_{t-1})
    update_ratio: Tensor  # ‖Δθ‖ / ‖θ‖
    predicted_decrease: Tensor  # ⟨θ_t − θ_{t+1}, g_t⟩ / loss


def is_measured(step: int, interval: int) -> bool:
    """Whether directions and updates are measured at inner step `step` (from 0) of a window of `interval`."""
    return step >= interval - MEASURED_STEPS


def as_measured(window: Moments) -> Moments:
    """The moments of a window, (*batch, steps), of which all were computed, without those that are not measured."""
    steps = window.loss.shape[-1]
    skipped = torch.tensor([not is_measured(i, steps) for i in range(steps)], device=window.loss.device)
    names = ("grad_cosine", "momentum_cosine", "update_ratio", "predicted_decrease")
    return window._replace(**{name: torch.where(skipped, torch.nan, getattr(window, name)) for name in names})


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def norm(a: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a, dim=-1)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the angle between a and b; 0 where one of them is zero."""
    return dot(a, b) / (norm(a) * norm(b)).clamp(min=1e-30)


def update_moments(before: Tensor, after: Tensor, grad: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    """`update_ratio` and `predicted_decrease` of the step from the weights `before` to `after`."""
    update = before - after
    decrease = torch.where(loss > 0, dot(update, grad) / loss, torch.nan)
    return norm(update) / norm(before).clamp(min=TINY), decrease


def average_norm(average: Number, grad_norm: Number) -> Number:
    """Running average of the gradient norm after one more step; an `average` of NaN starts it."""
    if isinstance(grad_norm, float):
        bounded = min(grad_norm, NORM_JUMP * average)
        return grad_norm if math.isnan(average) else NORM_DECAY * average + (1 - NORM_DECAY) * bounded
    bounded = torch.minimum(grad_norm, NORM_JUMP * average)
    return torch.where(average.isnan(), grad_norm, NORM_DECAY * average + (1 - NORM_DECAY) * bounded)


def clip_coefficient(grad_norm: Number, average: Number, multiple: Number | float, limit: float = math.inf) -> Number:
    """Factor in (0, 1] that brings the gradient norm down to `multiple` times its running average, and to `limit`."""
    if isinstance(grad_norm, float):
        threshold = math.inf if math.isnan(average) else multiple * max(average, 1e-30)
        return min(1.0, min(threshold, limit) / max(grad_norm, 1e-30))
    threshold = torch.where(average.isnan(), torch.inf, multiple * average.clamp(min=1e-30)).clamp(max=limit)
    return (threshold / grad_norm.clamp(min=1e-30)).clamp(max=1)
