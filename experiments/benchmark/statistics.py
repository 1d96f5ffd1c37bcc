"""The statistics of a benchmark, of plain arrays: rows are cells, and what is averaged last.

Aggregation after Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import bootstrap, trim_mean

Array = NDArray[Any]

RESAMPLES, CONFIDENCE, SEED = 2000, 0.95, 0
MOST_SPEED_UP = 4.0


class Estimate(NamedTuple):
    """A value, and its 95 % interval; NaN where there is too little for one."""

    value: float
    low: float
    high: float


def interquartile_mean(values: ArrayLike, axis: int = -1) -> Any:
    """The mean of what is left without the lowest quarter and the highest."""
    return trim_mean(np.asarray(values, float), 0.25, axis=axis)


def stratified(cells: Sequence[Sequence[float]]) -> Estimate:
    """Median over the seeds, then interquartile mean over the cells.

    The interval is of the seeds: those of each cell are drawn anew, cell by cell.
    """
    value = float(interquartile_mean([np.median(cell) for cell in cells]))
    if min(map(len, cells)) < 2:
        return Estimate(value, np.nan, np.nan)

    def statistic(*drawn: Array, axis: int = -1) -> Any:
        return interquartile_mean(np.stack([np.median(each, axis=axis) for each in drawn]), axis=0)

    return _interval(value, [np.asarray(cell, float) for cell in cells], statistic)


def paired(differences: ArrayLike) -> Estimate:
    """Interquartile mean over the cells of the differences of two methods.

    The interval is of the cells, which are drawn anew in pairs: it says what other tasks of this kind might show.
    """
    found = np.asarray(differences, float)
    value = float(interquartile_mean(found))
    return Estimate(value, np.nan, np.nan) if len(found) < 2 else _interval(value, [found], interquartile_mean)


def probability_of_improvement(runs: Sequence[float], reference: Sequence[float]) -> float:
    """How likely a run ends lower than one of the reference; equal ones count half."""
    x, y = np.asarray(runs)[:, None], np.asarray(reference)[None]
    return float(np.mean((x < y) + (x == y) / 2))


def speed_up(steps: ArrayLike, losses: ArrayLike, reference: ArrayLike) -> float:
    """How many times sooner than the reference a run is where the reference ends, at most `MOST_SPEED_UP`.

    A run that never is there has one below 1: the part of its steps that the reference needs for the run's own end.

    Args:
        steps: of the evaluations, rising.
        losses: of the run at them, NaN where they are not finite.
        reference: of the reference at them.
    """
    at, run, other = (np.asarray(each, float) for each in (steps, losses, reference))
    total = at[-1]
    reached = at[run <= other[-1]]
    if len(reached):
        return float(min(total / reached[0], MOST_SPEED_UP))
    passed = at[other <= run[-1]]  # none, if the run ended as a NaN
    return float(max(passed[0] / total, 1 / MOST_SPEED_UP)) if len(passed) else 1 / MOST_SPEED_UP


def profile(losses: ArrayLike, factors: ArrayLike) -> Array:
    """The part of its cells in which each method is within a factor of the best there: (methods, factors).

    Args:
        losses: (methods, cells), positive; NaN where a method was not run.
        factors: of at least 1.
    """
    ratio = np.asarray(losses, float) / np.nanmin(losses, axis=0)
    within = ratio[..., None] <= np.asarray(factors, float) * (1 + 1e-9)
    return np.nanmean(np.where(np.isnan(ratio)[..., None], np.nan, within), axis=1)


def _interval(value: float, samples: list[Array], statistic: Any) -> Estimate:
    if all(np.ptp(each) == 0 for each in samples):
        return Estimate(value, value, value)
    found = bootstrap(
        samples,
        statistic,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(SEED),
    )
    return Estimate(value, float(found.confidence_interval.low), float(found.confidence_interval.high))
