"""The validation losses of a run: the last one, the lowest one, and how long ago they were; of one run or of N."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import mean
from typing import NamedTuple

from rlsched.number import Number, isnan, where


class Validation(NamedTuple):
    """What is known of the validation losses of a run, each (*batch,); NaN where there was none."""

    loss: Number  # the last one
    step: Number  # inner steps done when it was measured
    best: Number  # the lowest one
    best_step: Number  # inner steps done then
    since_best: Number  # validations since then


def unseen(zero: Number = 0.0) -> Validation:
    """Of runs that were never validated; of N runs `zero` is a tensor of zeros (N,)."""
    unknown = zero + math.nan
    return Validation(unknown, unknown, unknown, unknown, zero)


def validated(before: Validation, loss: Number, step: Number) -> Validation:
    """What is known after one more validation; a loss that is not finite counts, and is never the best."""
    better = (abs(loss) < math.inf) & ((loss < before.best) | isnan(before.best))
    return Validation(
        loss=loss,
        step=step,
        best=where(better, loss, before.best),
        best_step=where(better, step, before.best_step),
        since_best=where(better, 0.0, before.since_best + 1),
    )


def agreed(ranks: Iterable[Sequence[float]]) -> Validation:
    """What several ranks know of one run together: the mean over those that have heard the latest validation loss."""
    known = [Validation(*numbers) for numbers in ranks]
    latest = max((one.step for one in known if not math.isnan(one.step)), default=math.nan)
    heard = [one for one in known if one.step == latest]
    return Validation(*map(mean, zip(*heard, strict=True))) if heard else unseen()
