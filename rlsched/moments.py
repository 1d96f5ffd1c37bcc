"""What is measured at one inner step, of one network or of N stacked ones.

Measured are products of a few vectors (gradient, last gradient, momentum, weights, update): products are sums, so that
those of a sharded network are added up over its shards. What a formula wants of them is derived below, once.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from rlsched.number import Number, Series, clamp, each, isnan, sqrt, where

MEASURED_STEPS = 8  # per window: enough to average over, and few enough to be free in a long window
NORM_DECAY = 0.9  # per inner step, of the running average of the gradient norm
NORM_JUMP = 10.0  # a gradient norm counts at most this many times the running average
TINY = 1e-30  # norm of weights that are zero


class Moments(NamedTuple):
    """Moments of the inner steps of a window, each (*batch, steps), or of one step, each (*batch,).

    NaN means "not measured": a loss that nobody reported; a step that was not finite; and products outside the last
    `MEASURED_STEPS` inner steps of a window. The update is θ_t − θ_{t+1}, so that it points where the gradient does.
    """

    loss: Series
    grad_norm: Series  # ‖g_t‖ of the whole network, before clipping
    clip_coefficient: Series  # factor in (0, 1] on the gradient, which is below 1 where it was clipped
    grad_square: Series  # ‖g_t‖², like all products of the network or of a sample of its parameters
    last_grad_square: Series  # ‖g_{t−1}‖²
    momentum_square: Series  # ‖m_{t−1}‖², 0 without momentum
    weights_square: Series  # ‖θ_t‖²
    update_square: Series  # ‖θ_t − θ_{t+1}‖²
    grad_last_grad: Series  # ⟨g_t, g_{t−1}⟩
    grad_momentum: Series  # ⟨g_t, m_{t−1}⟩
    grad_weights: Series  # ⟨g_t, θ_t⟩
    grad_update: Series  # ⟨g_t, θ_t − θ_{t+1}⟩
    update_weights: Series  # ⟨θ_t − θ_{t+1}, θ_t⟩


PRODUCTS = Moments._fields[3:]


def is_measured(step: int, interval: int) -> bool:
    """Whether products are measured at inner step `step` (from 0) of a window of `interval`."""
    return step >= interval - MEASURED_STEPS


def last_steps(window: Moments, steps: int = MEASURED_STEPS) -> Moments:
    """The last inner steps of a window: by default those whose products are measured."""
    return Moments(*(series[..., -steps:] if isinstance(series, Tensor) else series[-steps:] for series in window))


# --- What is derived from products ----------------------------------------------------------------------------------


def cosine(product: Number, one_square: Number, other_square: Number) -> Number:
    """Cosine of the angle between two vectors; 0 where one of them is zero."""
    return product / clamp(sqrt(one_square) * sqrt(other_square), low=1e-30)


def grad_cosine(m: Moments) -> Series:
    """cos(g_t, g_{t−1})."""
    return each(cosine, m.grad_last_grad, m.grad_square, m.last_grad_square)


def momentum_cosine(m: Moments) -> Series:
    """cos(g_t, m_{t−1}). Without momentum there is only the last gradient to agree with."""

    def formula(product: Number, grad: Number, square: Number, last_product: Number, last_square: Number) -> Number:
        alone = square == 0
        return cosine(where(alone, last_product, product), grad, where(alone, last_square, square))

    return each(formula, m.grad_momentum, m.grad_square, m.momentum_square, m.grad_last_grad, m.last_grad_square)


def update_ratio(m: Moments) -> Series:
    """‖θ_t − θ_{t+1}‖ / ‖θ_t‖."""
    return each(
        lambda update, weights: sqrt(update) / clamp(sqrt(weights), low=TINY), m.update_square, m.weights_square
    )


def predicted_decrease(m: Moments) -> Series:
    """⟨g_t, θ_t − θ_{t+1}⟩ / loss; NaN where the loss is not positive.

    The sample stands for the network as a whole: its squared gradient for that of the whole gradient.
    """

    def formula(product: Number, grad_norm: Number, grad_square: Number, loss: Number) -> Number:
        positive = where(loss > 0, loss, math.nan)
        return product * (grad_norm * grad_norm) / clamp(grad_square, low=1e-30) / positive

    return each(formula, m.grad_update, m.grad_norm, m.grad_square, m.loss)


# --- Clipping -------------------------------------------------------------------------------------------------------


def average_norm(average: Number, grad_norm: Number) -> Number:
    """Running average of the gradient norm after one more step; an `average` of NaN starts it."""
    bounded = clamp(grad_norm, high=NORM_JUMP * average)
    return where(isnan(average), grad_norm, NORM_DECAY * average + (1 - NORM_DECAY) * bounded)


def clip_coefficient(grad_norm: Number, average: Number, multiple: Number, limit: float = math.inf) -> Number:
    """Factor in (0, 1] that brings the gradient norm down to `multiple` times its running average, and to `limit`."""
    threshold = where(isnan(average), math.inf, multiple * clamp(average, low=1e-30))
    return clamp(clamp(threshold, high=limit) / clamp(grad_norm, low=1e-30), high=1.0)
