"""Elementary functions of a number, be it a float (of one run) or a tensor (of N runs): a formula is written once.

On the host a float is twenty times as fast as a tensor of one number. NaN means "not known", and stays NaN. A series of
numbers, one for each inner step, is a tuple of floats or a tensor whose last dimension it is.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

Number: TypeAlias = Any  # float | Tensor, and both sides of an operator are one or the other
Series: TypeAlias = Any  # tuple[float, ...] | Tensor, (*batch, steps)


def checked_count(argument: str, value: Any, of: str) -> int:
    """A positive number of something, of any type of integer, as an int.

    Raises:
        ValueError: it is none.
    """
    try:
        count = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = 0
    if count <= 0:
        raise ValueError(f"{argument} must be a positive int, the number of {of}, got {value!r}")
    return count


def on_host(tensor: Tensor) -> bool:
    """Whether a number in `tensor` can be read without waiting for an accelerator."""
    return tensor.device.type == "cpu"


def log(x: Number) -> Number:
    """Natural logarithm; NaN where x has none, or is infinite."""
    if isinstance(x, Tensor):
        return torch.where((x > 0) & x.isfinite(), x, torch.nan).log()
    return math.log(x) if 0 < x < math.inf else math.nan


def exp(x: Number) -> Number:
    return x.exp() if isinstance(x, Tensor) else math.exp(min(x, 700.0))


def sqrt(x: Number) -> Number:
    """Square root; NaN where x has none."""
    if isinstance(x, Tensor):
        return x.sqrt()
    return math.sqrt(x) if x >= 0 else math.nan


def clamp(x: Number, low: Number = -math.inf, high: Number = math.inf) -> Number:
    """x within [low, high]; NaN stays NaN."""
    if not isinstance(x, Tensor):
        return min(max(x, low), high)
    if not isinstance(low, Tensor):
        return x.clamp(low, high) if not isinstance(high, Tensor) else torch.minimum(x.clamp(min=low), high)
    return torch.maximum(x, low).clamp(max=high)


def where(condition: Number, one: Number, other: Number) -> Number:
    return torch.where(condition, one, other) if isinstance(condition, Tensor) else one if condition else other


def isnan(x: Number) -> Number:
    return x.isnan() if isinstance(x, Tensor) else math.isnan(x)


def each(formula: Callable[..., Number], *series: Series) -> Series:
    """A formula of numbers, for every step of one or several series."""
    return formula(*series) if isinstance(series[0], Tensor) else tuple(map(formula, *series))


def mean(series: Series) -> Number:
    """Mean over the steps of which a number is known; NaN if there are none."""
    if isinstance(series, Tensor):  # in half of the time of torch's nanmean, for a row of ten
        known = ~series.isnan()
        return torch.where(known, series, 0.0).sum(-1) / known.sum(-1)
    numbers = [x for x in series if x == x]
    return sum(numbers) / len(numbers) if numbers else math.nan


def deviation(series: Series, average: Number) -> Number:
    """Standard deviation of what is known from its `average`."""
    if isinstance(series, Tensor):
        return mean((series - average.unsqueeze(-1)).square()).sqrt()
    return math.sqrt(x) if (x := mean([(x - average) * (x - average) for x in series])) == x else math.nan


def checked_loss(name: str, loss: Any) -> Number:
    """A loss as a float, or as a 0-d tensor without a gradient if it is one.

    Raises:
        TypeError: it is no real number.
        ValueError: it is a tensor of several numbers.
    """
    if isinstance(loss, Tensor) and not loss.is_complex():
        if loss.numel() != 1:
            raise ValueError(f"{name} must be one number, got a tensor of shape {tuple(loss.shape)}")
        return loss.detach().reshape(())
    if isinstance(loss, Real) and not isinstance(loss, bool):
        return float(loss)
    what = f"a tensor of {loss.dtype}" if isinstance(loss, Tensor) else f"{loss!r} of {type(loss).__name__}"
    raise TypeError(f"{name} must be a real number, or a tensor of one, got {what}")
