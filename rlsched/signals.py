"""From the moments of a window to the observation that a policy sees.

Pure functions on tensors of shape `(*batch,)`: the environment calls them for N networks, the optimizer wrapper
for one. Every observation is dimensionless, bounded, and scaled by fixed numbers, so that there is no running
normaliser to save, to lose or to disagree about.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlsched.control import CLIP, LR, MOMENTUM
from rlsched.moments import Moments
from rlsched.spec import Observation

FAST, SLOW = 0.4, 0.1  # weight of a new window in the running averages of the log loss
LONGEST_INTERVAL = 32.0  # inner steps; a longer window looks like this one to the policy


class Run(NamedTuple):
    """What is known of a run before it starts, each (*batch,)."""

    total_steps: Tensor  # inner steps
    interval: Tensor  # inner steps in a window
    adaptive: Tensor  # +1 for optimizers that divide by a second moment (Adam, RMSprop), −1 for the others (SGD)


class History(NamedTuple):
    """What is remembered from one window to the next, each (*batch,); NaN until it was first seen."""

    first_loss: Tensor  # log loss of the first window
    fast_loss: Tensor  # running averages of the log loss
    slow_loss: Tensor
    first_norm: Tensor  # log gradient norm at the end of the first window


class Readings(NamedTuple):
    """What an observation's formula may read, each (*batch,)."""

    run: Run
    history: History
    step: Tensor  # inner steps done
    control: Tensor  # control state, (*batch, controls)
    loss: Tensor  # mean log loss of the window
    loss_std: Tensor
    loss_trend: Tensor  # mean of the window's second half minus its first half
    grad_norm: Tensor  # last log gradient norm of the window
    grad_norm_std: Tensor
    clipped: Tensor
    grad_cosine: Tensor
    momentum_cosine: Tensor
    update_ratio: Tensor  # mean logarithm
    predicted_decrease: Tensor  # mean logarithm


OBSERVATIONS = (
    Observation("progress", "inner steps done / total steps", 0, 1, lambda r: r.step / r.run.total_steps),
    Observation(
        "decisions_left",
        "log of the windows that are left, / 4",
        0,
        2,
        lambda r: ((r.run.total_steps - r.step) / r.run.interval).clamp(min=1).log() / 4,
    ),
    Observation(
        "decisions",
        "log of the windows in the run, − 4",
        -4,
        4,
        lambda r: (r.run.total_steps / r.run.interval).log() - 4,
    ),
    Observation(
        "interval",
        f"log of the inner steps in a window (at most {LONGEST_INTERVAL:g}), / 3",
        0,
        1.2,
        lambda r: r.run.interval.clamp(max=LONGEST_INTERVAL).log() / 3,
    ),
    Observation(
        "loss_vs_fast",
        "log loss minus its fast running average, × 2",
        -2,
        2,
        lambda r: 2 * (r.loss - r.history.fast_loss),
    ),
    Observation(
        "loss_vs_slow", "log loss minus its slow running average", -3, 3, lambda r: r.loss - r.history.slow_loss
    ),
    Observation(
        "loss_vs_first",
        "log loss minus that of the first window, / 2",
        -5,
        5,
        lambda r: (r.loss - r.history.first_loss) / 2,
    ),
    Observation("loss_noise", "standard deviation of the log loss, × 3", 0, 2, lambda r: 3 * r.loss_std),
    Observation(
        "loss_trend",
        "log loss of the window's second half minus that of its first half, × 5",
        -1,
        1,
        lambda r: 5 * r.loss_trend,
    ),
    Observation("grad_cosine", "cosine of successive gradients, × 2", -2, 2, lambda r: 2 * r.grad_cosine),
    Observation("momentum_cosine", "cosine of gradient and momentum, × 2", -2, 2, lambda r: 2 * r.momentum_cosine),
    Observation(
        "update_ratio",
        "log of the norm of the update over that of the weights, (+ 5) / 3",
        -4,
        4,
        lambda r: (r.update_ratio + 5) / 3,
    ),
    Observation(
        "predicted_decrease",
        "log of the decrease that the gradient predicts for the update, over the loss, (+ 5) / 3",
        -4,
        4,
        lambda r: (r.predicted_decrease + 5) / 3,
    ),
    Observation(
        "grad_norm_change",
        "log gradient norm minus that of the first window",
        -3,
        3,
        lambda r: r.grad_norm - r.history.first_norm,
    ),
    Observation("grad_norm_noise", "standard deviation of the log gradient norm", 0, 3, lambda r: r.grad_norm_std),
    Observation("clip_fraction", "share of the inner steps that were clipped", 0, 1, lambda r: r.clipped),
    Observation("momentum", "state of the momentum control, − 1", -1, 2, lambda r: r.control[..., MOMENTUM] - 1),
    Observation("clip", "state of the clip control, / 2", 0, 1.5, lambda r: r.control[..., CLIP] / 2),
    Observation("adaptive", "+1 for Adam and its relatives, −1 for SGD", -1, 1, lambda r: r.run.adaptive),
    Observation("lr", "state of the lr control, / 5", -1.4, 1.4, lambda r: r.control[..., LR] / 5),
)
OBSERVATION_NAMES = tuple(observation.name for observation in OBSERVATIONS)


def start(batch: torch.Size | tuple[int, ...] = (), device: torch.device | None = None) -> History:
    """The history of runs that have not begun."""
    unseen = torch.full((len(History._fields), *batch), torch.nan, dtype=torch.float32, device=device)
    return History(*unseen.unbind())


def observe(window: Moments, run: Run, history: History, step: Tensor, control: Tensor) -> tuple[Tensor, History]:
    """The observation at the end of a window, and the history to pass on to the next.

    Args:
        window: moments of the window's inner steps, each (*batch, steps); NaN where not measured.
        run: the run's constants.
        history: what the previous call returned, or `start(batch)`.
        step: inner steps done, (*batch,).
        control: control state that held in the window, (*batch, controls).

    Returns:
        The observation, (*batch, len(OBSERVATIONS)), 0 where nothing was measured; and the new history.
    """
    logs = _log(torch.stack([window.loss, window.grad_norm]))
    (log_loss, log_norm), stds = logs, _nanstd(logs)
    half = log_loss.shape[-1] // 2
    ratio, decrease = window.update_ratio.clamp(min=1e-12).log(), window.predicted_decrease.clamp(min=1e-7).log()
    averaged = [log_loss, window.clipped, window.grad_cosine, window.momentum_cosine, ratio, decrease]
    loss, clipped, grad_cosine, momentum_cosine, update_ratio, predicted_decrease = torch.stack(averaged).nanmean(-1)
    grad_norm = log_norm[..., -1]
    seen = torch.stack(history)
    history = History(*torch.where(seen.isnan(), torch.stack([loss, loss, loss, grad_norm]), seen))
    readings = Readings(
        run=run,
        history=history,
        step=step,
        control=control,
        loss=loss,
        loss_std=stds[0],
        loss_trend=log_loss[..., half:].nanmean(-1) - log_loss[..., :half].nanmean(-1),
        grad_norm=grad_norm,
        grad_norm_std=stds[1],
        clipped=clipped,
        grad_cosine=grad_cosine,
        momentum_cosine=momentum_cosine,
        update_ratio=update_ratio,
        predicted_decrease=predicted_decrease,
    )
    observation = torch.stack([o.formula(readings) for o in OBSERVATIONS], -1)
    low, high = (observation.new_tensor([getattr(o, bound) for o in OBSERVATIONS]) for bound in ("low", "high"))
    return torch.nan_to_num(observation, nan=0.0).clamp(low, high), _remember(history, loss)


def _remember(history: History, loss: Tensor) -> History:
    fast, slow = torch.lerp(history.fast_loss, loss, FAST), torch.lerp(history.slow_loss, loss, SLOW)
    return history._replace(
        fast_loss=torch.where(loss.isnan(), history.fast_loss, fast),
        slow_loss=torch.where(loss.isnan(), history.slow_loss, slow),
    )


def _log(x: Tensor) -> Tensor:
    """Logarithm; NaN where x has none."""
    return torch.where((x > 0) & x.isfinite(), x, torch.nan).log()


def _nanstd(x: Tensor) -> Tensor:
    return (x - x.nanmean(-1, keepdim=True)).square().nanmean(-1).sqrt()
