"""From actions to hyperparameters, and the fallback schedule underneath.

The control state has one entry per control and the shape `(*batch, len(CONTROLS))`; the functions here serve one
network (`batch = ()`) and N networks alike. The policy never sets a hyperparameter outright. It moves it away
from the fallback schedule: linear decay of the base learning rate to zero, the base momentum, no clipping but of
outliers.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

from rlsched.spec import Control

EARLY = 0.2  # fraction of a run in which a decision may take the early step
MIN_MOMENTUM, MAX_MOMENTUM = 0.1, 0.99
OUTLIER = 100.0  # a gradient norm is clipped to so many times its running average, whatever the control says

CONTROLS = (
    Control("lr", "log of the factor on the fallback learning rate", -7.0, 7.0, step=0.25, early_step=0.7),
    Control(
        "momentum",
        "−log10(1 − momentum): 1 is a momentum of 0.9, 2 of 0.99",
        -math.log10(1 - MIN_MOMENTUM),
        -math.log10(1 - MAX_MOMENTUM),
        step=0.3,
        early_step=0.3,
    ),
    Control(
        "clip",
        f"the gradient norm is clipped to exp(clip − 0.7) times its running average; at the maximum to {OUTLIER:g} "
        "times, which is no more than a guard against outliers",
        0.0,
        3.0,
        step=0.5,
        early_step=0.5,
    ),
)
CONTROL_NAMES = tuple(control.name for control in CONTROLS)
LR, MOMENTUM, CLIP = range(len(CONTROLS))

Number = TypeVar("Number", float, Tensor)


def decision_interval(total_steps: int, decisions: int) -> int:
    """Inner steps in a window, so that a run of `total_steps` inner steps has about `decisions` decisions."""
    return max(1, math.ceil(total_steps / decisions))


def fallback_schedule(step: Number, total_steps: Number) -> Number:
    """Factor on the base lr at inner step `step` in [0, total_steps): linear, from 1 down to 1 / total_steps."""
    return 1 - step / total_steps


def initial_state(momentum: Tensor) -> Tensor:
    """The control state that means the fallback schedule, from base momenta of shape (*batch,) in [0, 1)."""
    state = momentum.new_zeros(*momentum.shape, len(CONTROLS))
    state[..., MOMENTUM] = -torch.log10(1 - momentum)
    state[..., CLIP] = CONTROLS[CLIP].high
    return state


def step_sizes(progress: Tensor) -> Tensor:
    """How far an action of 1 moves each control, (*batch, controls), at a progress of shape (*batch,)."""
    early, late = (
        progress.new_tensor(sizes) for sizes in ([c.early_step for c in CONTROLS], [c.step for c in CONTROLS])
    )
    return torch.where((progress < EARLY).unsqueeze(-1), early, late)


def move(state: Tensor, action: Tensor, progress: Tensor, base: Tensor) -> Tensor:
    """The control state after a decision.

    Args:
        state: control state before it, (*batch, controls).
        action: in [-1, 1], (*batch, controls); values beyond count as the bound.
        progress: fraction of the run that is done, (*batch,).
        base: `initial_state` of the run, (*batch, controls). Where it lies outside a control's range, the range
            is widened to it, so that standing still is always possible.
    """
    low, high = state.new_tensor([c.low for c in CONTROLS]), state.new_tensor([c.high for c in CONTROLS])
    moved = state + step_sizes(progress) * action.clamp(-1, 1)
    return moved.clamp(torch.minimum(low, base), torch.maximum(high, base))


def momentum_of(state: Number) -> Number:
    """Momentum from the momentum control's state."""
    return 1 - 10**-state


def clip_multiple(state: Tensor) -> Tensor:
    """Clipping threshold over the running average of the gradient norm."""
    return torch.where(state < CONTROLS[CLIP].high, torch.exp(state - 0.7), OUTLIER)


# --- Safe start -------------------------------------------------------------------------------------------------
#
# A base learning rate can be so large that training diverges before the first decision. So the first inner step of
# a scheduled run is a probe: it is taken at PROBE times the base learning rate, and what it did to the weights is
# measured. Updates are proportional to the learning rate, whatever the optimizer, so the probe tells what a step at
# the full base learning rate would have done. If that step promised to take away more than MAX_DECREASE of the loss,
# or a step with all of its momentum to move the weights by more than MAX_UPDATE of their norm, the run starts from
# the learning rate that stays within both limits. The usual default learning rates do, or nearly.

PROBE = math.exp(-7)  # factor on the base learning rate in the probe
MAX_DECREASE = 0.3  # of the loss, as predicted to first order
MAX_UPDATE = 0.1  # of the norm of the weights


def safe_offset(predicted_decrease: Tensor, update_ratio: Tensor, growth: Tensor) -> Tensor:
    """Log of the highest factor on the base learning rate that is safe, as a probe tells.

    Args:
        predicted_decrease: ⟨Δθ, g⟩ / loss of the probe, (*batch,); NaN where the loss is not known.
        update_ratio: ‖Δθ‖ / ‖θ‖ of the probe, (*batch,). Weights that began at zero are nothing to compare an update
            with. If they began near zero, so that it is one or more, the loss alone decides, where it speaks.
        growth: how many times the first update a later one is, once momentum has built up, (*batch,):
            1 / (1 − momentum) where momentum sums gradients, else 1.

    Returns:
        (*batch,); −inf where the probe itself was not finite.
    """
    by_loss = MAX_DECREASE / (predicted_decrease / PROBE).clamp(min=1e-12).nan_to_num(1e-12)
    by_weights = MAX_UPDATE / (growth * update_ratio / PROBE).clamp(min=1e-12)
    near_zero = (update_ratio >= 1) & (update_ratio < 1e3) & (predicted_decrease > 0) & (by_loss >= 1)
    from_zero = near_zero | (update_ratio > 1e12)
    limit = torch.minimum(by_loss, torch.where(from_zero, torch.inf, by_weights))
    return torch.where(update_ratio.isfinite(), limit.log(), -torch.inf)


def safe_start(state: Tensor, offset: Tensor) -> Tensor:
    """The initial control state (*batch, controls) with the lr control at a `safe_offset`, as far as it reaches."""
    return torch.cat([offset.clamp(CONTROLS[LR].low, 0).unsqueeze(-1), state[..., LR + 1 :]], -1)
