"""From the summary of a window to the observation that a policy sees. Every observation is an entry in `OBSERVATIONS`.

Pure functions for one run (numbers are floats) and for N at once (tensors of shape (*batch,)): the environment and the
optimizer wrapper call the same ones. Every observation is dimensionless, bounded, and scaled by fixed numbers, so that
there is no running normaliser to save, to lose or to disagree about.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from rlsched.control import CONTROLS, Control
from rlsched.number import Number, clamp, isnan, log, where
from rlsched.summary import Summary
from rlsched.validation import Validation, unseen

FAST, SLOW = 0.4, 0.1  # weight of a new window in the running averages of the log loss
HALF_LIVES = {"short": 0.02, "medium": 0.1, "long": 0.3}  # of running averages of the log loss, in fractions of a run
LONGEST_INTERVAL = 32.0  # inner steps; a longer window looks like this one to the policy


class Run(NamedTuple):
    """What is known of a run before it starts, each (*batch,)."""

    total_steps: Number  # inner steps
    interval: Number  # inner steps in a window
    adaptive: Number  # +1 for optimizers that divide by a second moment (Adam, RMSprop), −1 for the others (SGD)
    sums_gradients: Number  # 1 where momentum is a sum of gradients (SGD, RMSprop), 0 where it is their average
    reach: Number = math.inf  # e-folds: as far as the policy may move the learning rate from the base schedule


class Readings(NamedTuple):
    """What the formula of an observation may read."""

    window: Summary
    run: Run
    step: Number  # inner steps done
    control: Mapping[str, Number]  # states of the controls
    history: Mapping[str, Number]  # values of `TRACES`
    validation: Validation


History = dict[str, Number]  # a value for each of `TRACES`, (*batch,); NaN until it was first seen


@dataclass(frozen=True)
class Trace:
    """Something that is remembered from one window to the next.

    Its value is NaN until `seen` first gives a number, which it then has in that same window. After each window it
    moves by `weight` of the way to what is seen: 0 keeps the first one forever.
    """

    seen: Callable[[Summary], Number]
    weight: Callable[[Run], Number] = lambda run: 0.0


def _half_life(fraction: float) -> Callable[[Run], Number]:
    """The weight of a new window in a running average whose half-life is this fraction of the run."""
    return lambda run: 1 - 0.5 ** (run.interval / (fraction * run.total_steps))


TRACES: Mapping[str, Trace] = {
    "first_loss": Trace(lambda w: w.loss),
    "fast_loss": Trace(lambda w: w.loss, lambda run: FAST),
    "slow_loss": Trace(lambda w: w.loss, lambda run: SLOW),
    "first_norm": Trace(lambda w: w.last_grad_norm),
    **{f"loss_{name}": Trace(lambda w: w.loss, _half_life(fraction)) for name, fraction in HALF_LIVES.items()},
    "shared_gradient": Trace(lambda w: w.shared_gradient, lambda run: SLOW),
}
OF_THE_LOSS = {name for name in TRACES if "loss" in name}  # traces that all parts of a network share


@dataclass(frozen=True)
class Observation:
    """One entry of the observation vector: dimensionless, and always within [low, high]."""

    name: str
    meaning: str
    low: float
    high: float
    formula: Callable[[Readings], Number]  # NaN where it is not known
    unknown: float = 0.0  # what the policy sees then


def _loss_versus(trace: str) -> Callable[[Readings], Number]:
    return lambda r: r.window.loss - r.history[trace]


def _state_of(control: Control) -> Observation:
    seen = control.seen
    return Observation(
        control.name,
        f"state of the {control.name} control{seen}",
        seen.low,
        seen.high,
        lambda r: (r.control[control.name] - seen.shift) / seen.scale,
    )


OBSERVATIONS: Mapping[str, Observation] = {
    observation.name: observation
    for observation in (
        Observation("progress", "inner steps done / total steps", 0, 1, lambda r: r.step / r.run.total_steps),
        Observation(
            "decisions_left",
            "log of the windows that are left, / 4",
            0,
            2,
            lambda r: log(clamp((r.run.total_steps - r.step) / r.run.interval, low=1.0)) / 4,
        ),
        Observation(
            "decisions",
            "log of the windows in the run, − 4",
            -4,
            4,
            lambda r: log(r.run.total_steps / r.run.interval) - 4,
        ),
        Observation(
            "interval",
            f"log of the inner steps in a window (at most {LONGEST_INTERVAL:g}), / 3",
            0,
            1.2,
            lambda r: log(clamp(r.run.interval, high=LONGEST_INTERVAL)) / 3,
        ),
        Observation(
            "loss_vs_fast",
            "log loss minus its fast running average, × 2",
            -2,
            2,
            lambda r: 2 * (r.window.loss - r.history["fast_loss"]),
        ),
        Observation(
            "loss_vs_slow",
            "log loss minus its slow running average",
            -3,
            3,
            _loss_versus("slow_loss"),
        ),
        Observation(
            "loss_vs_first",
            "log loss minus that of the first window, / 2",
            -5,
            5,
            lambda r: (r.window.loss - r.history["first_loss"]) / 2,
        ),
        *(
            Observation(
                f"loss_vs_{name}",
                f"log loss minus its running average with a half-life of {fraction:g} of the run",
                -3,
                3,
                _loss_versus(f"loss_{name}"),
            )
            for name, fraction in HALF_LIVES.items()
        ),
        Observation("loss_noise", "standard deviation of the log loss, × 3", 0, 2, lambda r: 3 * r.window.loss_std),
        Observation(
            "loss_trend",
            "log loss of the window's second half minus that of its first half, × 5",
            -1,
            1,
            lambda r: 5 * r.window.loss_trend,
        ),
        Observation("grad_cosine", "cosine of successive gradients, × 2", -2, 2, lambda r: 2 * r.window.grad_cosine),
        Observation(
            "momentum_cosine", "cosine of gradient and momentum, × 2", -2, 2, lambda r: 2 * r.window.momentum_cosine
        ),
        Observation(
            "late_agreement",
            "cosine of successive gradients, × 2, as far as the log loss has fallen by 3: whether gradients still "
            "agree as the loss gets small, or the network learns its data by heart",
            -2,
            2,
            lambda r: 2 * r.window.grad_cosine * clamp((r.history["first_loss"] - r.window.loss) / 3, 0.0, 1.0),
        ),
        Observation(
            "grad_weights_cosine",
            "cosine of gradient and weights, × 2: above 0 where a step makes the weights smaller",
            -2,
            2,
            lambda r: 2 * r.window.grad_weights_cosine,
        ),
        Observation(
            "update_weights_cosine",
            "cosine of the change of the weights in a step and the weights, × 2: above 0 where they grow",
            -2,
            2,
            lambda r: -2 * r.window.update_weights_cosine,
        ),
        Observation(
            "update_ratio",
            "log of the norm of the update over that of the weights, (+ 5) / 3",
            -4,
            4,
            lambda r: (r.window.update_ratio + 5) / 3,
        ),
        Observation(
            "predicted_decrease",
            "log of the decrease that the gradient predicts for the update, over the loss, (+ 5) / 3",
            -4,
            4,
            lambda r: (r.window.predicted_decrease + 5) / 3,
        ),
        Observation(
            "grad_norm_change",
            "log gradient norm minus that of the first window",
            -3,
            3,
            lambda r: r.window.last_grad_norm - r.history["first_norm"],
        ),
        Observation(
            "grad_norm_noise", "standard deviation of the log gradient norm", 0, 3, lambda r: r.window.grad_norm_std
        ),
        # With gradients G + ε of independent batches, ⟨g_t, g_{t−1}⟩ is ‖G‖² and ‖g_t‖² is ‖G‖² + tr Σ in the mean, so
        # that their ratio r gives the simple noise scale tr Σ / ‖G‖² = 1/r − 1 in units of the user's own batch
        # (McCandlish et al. 2018, "An Empirical Model of Large-Batch Training").
        Observation(
            "noise_scale",
            "log of the gradient noise scale, in mini-batches, from the running averages of ⟨g_t, g_{t−1}⟩ and ‖g_t‖², "
            "/ 4",
            -1.2,
            1.2,
            lambda r: log(1 / clamp(r.history["shared_gradient"], 0.01, 0.99) - 1) / 4,
        ),
        # How far the validation loss is above its lowest is the "generalization loss" by which Prechelt (1998, "Early
        # Stopping – But When?") decides to stop.
        Observation(
            "validation_vs_best",
            "log of the last validation loss minus that of the lowest, × 2",
            0,
            4,
            lambda r: 2 * (log(r.validation.loss) - log(r.validation.best)),
        ),
        Observation(
            "validation_gap",
            "log of the last validation loss minus the log loss, / 2: above 0 as the network learns its data by heart",
            -2,
            4,
            lambda r: (log(r.validation.loss) - r.window.loss) / 2,
        ),
        Observation(
            "validation_age",
            "log of 1 + the windows since the last validation loss, / 4: below 0.17 where it is new since the last "
            "decision; −1 where there was none",
            -1,
            1.2,
            lambda r: log(1 + (r.step - r.validation.step) / r.run.interval) / 4,
            unknown=-1.0,
        ),
        Observation("clip_fraction", "share of the inner steps that were clipped", 0, 1, lambda r: r.window.clipped),
        Observation("adaptive", "+1 for Adam and its relatives, −1 for SGD", -1, 1, lambda r: r.run.adaptive),
        *(_state_of(control) for control in CONTROLS.values()),
    )
}
OBSERVATION_NAMES = tuple(OBSERVATIONS)


def start(like: Number = math.nan) -> History:
    """The history of runs that have not begun; of N runs `like` is a tensor (N,)."""
    return {name: math.nan * like for name in TRACES}


def joined(history: History) -> History:
    """The history of a parameter group that joins a run: what is known of the loss, and of the group's own nothing."""
    return {name: value if name in OF_THE_LOSS else math.nan for name, value in history.items()}


def observe(
    names: Sequence[str],
    window: Summary,
    run: Run,
    history: History,
    step: Number,
    control: Mapping[str, Number],
    validation: Validation | None = None,
) -> tuple[Tensor, History]:
    """The observation at the end of a window, and the history to pass on to the next.

    Args:
        names: the observations to make, of `OBSERVATIONS`.
        window: the summary of the window.
        run: the run's constants.
        history: what the previous call returned, or `start()`.
        step: inner steps done, (*batch,).
        control: states of the controls that held in the window, each (*batch,).
        validation: the validation losses so far, in the unit of the training loss; None if there was none.

    Returns:
        The observation, (*batch, len(names)), float32, and the new history.
    """
    seen = {name: trace.seen(window) for name, trace in TRACES.items()}
    history = {name: where(isnan(history[name]), value, history[name]) for name, value in seen.items()}
    readings = Readings(window, run, step, control, history, validation or unseen(0.0 * run.total_steps))
    values = [OBSERVATIONS[name].formula(readings) for name in names]
    like = run.total_steps
    if isinstance(like, Tensor):
        low, high, unknown = _bounds(tuple(names), like.device)
        observation = torch.stack([value.expand(like.shape) for value in values], -1)
        observation = torch.where(observation.isnan(), unknown, observation).clamp(low, high).float()
    else:
        entries = [OBSERVATIONS[name] for name in names]
        bounded = [e.unknown if isnan(v) else clamp(v, e.low, e.high) for e, v in zip(entries, values, strict=True)]
        observation = torch.tensor(bounded, dtype=torch.float32, device="cpu")
    return observation, {name: _averaged(history[name], seen[name], TRACES[name].weight(run)) for name in TRACES}


def observation_table(observations: Iterable[Observation]) -> str:
    """The observations as a Markdown table, for documentation."""
    rows = [
        f"| {i} | `{o.name}` | {o.low:g} | {o.high:g} | {o.unknown:g} | {o.meaning} |"
        for i, o in enumerate(observations)
    ]
    return "\n".join(["| # | observation | min | max | unknown | meaning |", "|--:|---|--:|--:|--:|---|", *rows])


@lru_cache
def _bounds(names: tuple[str, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    rows = [[getattr(OBSERVATIONS[n], what) for n in names] for what in ("low", "high", "unknown")]
    low, high, unknown = torch.tensor(rows, dtype=torch.float32, device=device)
    return low, high, unknown


def _averaged(value: Number, seen: Number, weight: Number) -> Number:
    return where(isnan(seen), value, value + weight * (seen - value))
