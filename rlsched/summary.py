"""A window of inner steps in a few numbers, of one run or of N."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from rlsched import moments
from rlsched.moments import Moments, cosine
from rlsched.number import Number, Series, clamp, deviation, each, exp, log, mean, where


class Summary(NamedTuple):
    """A window in a few numbers, each (*batch,); NaN where nothing was measured."""

    loss: Number  # mean log loss
    grad_norm: Number  # mean log gradient norm
    clipped: Number  # share of the inner steps
    clip_coefficient: Number  # mean logarithm of the factor on the gradient
    grad_cosine: Number
    momentum_cosine: Number
    update_ratio: Number  # mean logarithm
    predicted_decrease: Number  # mean logarithm
    shared_gradient: Number  # mean ⟨g_t, g_{t−1}⟩ over mean ‖g_t‖²: the part of the gradient that batches share
    grad_weights_cosine: Number
    update_weights_cosine: Number
    loss_std: Number  # of the logarithm
    grad_norm_std: Number  # of the logarithm
    loss_trend: Number  # mean log loss of the window's second half minus that of its first half
    last_grad_norm: Number  # last log gradient norm


def summarise(window: Moments) -> Summary:
    """The numbers of a window (*batch, steps) that observations are made of."""
    log_loss, log_norm = each(log, window.loss), each(log, window.grad_norm)
    loss, grad_norm = mean(log_loss), mean(log_norm)
    half = (log_loss.shape[-1] if isinstance(log_loss, Tensor) else len(log_loss)) // 2
    measured = moments.last_steps(window)
    whole = mean(measured.grad_square)
    return Summary(
        loss=loss,
        grad_norm=grad_norm,
        clipped=mean(each(lambda factor: (factor < 1) + 0 * factor, window.clip_coefficient)),  # NaN stays NaN
        clip_coefficient=mean(each(log, window.clip_coefficient)),
        grad_cosine=mean(moments.grad_cosine(measured)),
        momentum_cosine=mean(moments.momentum_cosine(measured)),
        update_ratio=mean(each(lambda x: log(clamp(x, low=1e-12)), moments.update_ratio(measured))),
        predicted_decrease=mean(each(lambda x: log(clamp(x, low=1e-7)), moments.predicted_decrease(measured))),
        shared_gradient=mean(measured.grad_last_grad) / where(whole > 0, whole, math.nan),
        grad_weights_cosine=mean(each(cosine, measured.grad_weights, measured.grad_square, measured.weights_square)),
        update_weights_cosine=mean(
            each(cosine, measured.update_weights, measured.update_square, measured.weights_square)
        ),
        loss_std=deviation(log_loss, loss),
        grad_norm_std=deviation(log_norm, grad_norm),
        loss_trend=mean(_part(log_loss, half, None)) - mean(_part(log_loss, None, half)),
        last_grad_norm=log_norm[..., -1] if isinstance(log_norm, Tensor) else log_norm[-1],
    )


def whole(parts: Sequence[Summary]) -> Summary:
    """A window of one run, of whose parts these are: what the parts share, and what adds up. The rest is not known."""
    if len(parts) == 1:
        return parts[0]
    first, unknown = parts[0], Summary(*[math.nan] * len(Summary._fields))
    squares = [exp(2 * part.grad_norm) for part in parts]
    decreases = [exp(part.predicted_decrease) for part in parts]
    return unknown._replace(
        loss=first.loss,
        loss_std=first.loss_std,
        loss_trend=first.loss_trend,
        clipped=first.clipped,
        clip_coefficient=first.clip_coefficient,
        grad_norm=log(sum(x for x in squares if x == x)) / 2,
        predicted_decrease=log(sum(x for x in decreases if x == x)),
    )


def _part(series: Series, start: int | None, stop: int | None) -> Series:
    return series[..., start:stop] if isinstance(series, Tensor) else series[start:stop]
