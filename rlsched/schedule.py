"""The schedule core: what a run is at a moment, and what happens to it.

Pure functions for one run, whose numbers are floats, and for N runs at once, whose numbers are tensors (N,). The
environment drives them for N networks, the controller for one. In the order of a run::

    state = begin(run, base, probing=True, memory=policy.begin())
    ... the first window is one inner step, at `hyperparameters(run, state, base)` times `decay(...)` ...
    offset = probe(run, state, window)               # how high the learning rate may start
    state = start(state, offset)
    observation, state = observe(run, state, summarise(window), policy.observations)
    action, memory = policy.act(observation, state.memory)
    state = move(run, state, {name: action[..., i] for i, name in enumerate(policy.controls)}, memory)
    state = open_window(run, state, run.interval)
    ... a window of inner steps, and so on from `observe`
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from rlsched import control, moments, signals
from rlsched.base_schedule import BaseSchedule
from rlsched.control import CONTROLS, LR
from rlsched.moments import Moments
from rlsched.number import Number, clamp, isnan, log, mean, sqrt, where
from rlsched.signals import History, Run
from rlsched.summary import Summary
from rlsched.validation import Validation


class ScheduleState(NamedTuple):
    """What a run is at a moment; numbers are (*batch,)."""

    step: Number  # inner steps done
    control: dict[str, Number]  # state of each control
    base: dict[str, Number]  # the states that mean what the user gave: the base schedule
    lr_offset: Number  # added to the lr control's state, where that does not reach low enough
    ceiling: Number  # of the lr control's state: what the probe, or the loss since then, has shown to be safe
    probing: (
        Number  # as long as the lr is that of the probe, the part of what this allows that the run starts at; then 0
    )
    history: History  # see `signals.TRACES`
    window_start: Number  # inner steps done when the window began
    window_end: Number  # and when it ends, which is when the next decision is due
    memory: Any = None  # the policy's
    bound: Number = LR.high  # of the lr control's state: what a guard allows since a divergence


def decision_interval(total_steps: int, decisions: int) -> int:
    """Inner steps in a window, so that a run of `total_steps` inner steps has about `decisions` decisions."""
    return max(1, math.ceil(total_steps / decisions))


def begin(run: Run, base: Mapping[str, Number], *, probing: Number, memory: Any = None) -> ScheduleState:
    """A run before its first inner step, which is a window of its own; `base` are the user's `control.base_values`."""
    zero = 0 * run.total_steps
    origin = {name: zero + c.origin(base[name]) for name, c in CONTROLS.items()}
    return ScheduleState(
        step=zero,
        control=dict(origin),
        base=origin,
        lr_offset=0.0 * zero,
        ceiling=LR.high + zero,
        probing=zero + probing,
        history=signals.start(1.0 + zero),
        window_start=zero,
        window_end=zero + 1,
        memory=memory,
        bound=LR.high + zero,
    )


def moved(state: ScheduleState) -> dict[str, Number]:
    """How far each control is from its origin, in the probe as well."""
    distances = {name: state.control[name] - origin for name, origin in state.base.items()}
    distances[LR.name] = where(state.probing > 0, LOG_PROBE, distances[LR.name]) + state.lr_offset
    return distances


def hyperparameters(run: Run, state: ScheduleState, base: Mapping[str, Number]) -> dict[str, Number]:
    """What holds in a window for a parameter group of these `control.base_values`, before the base schedule's decay."""
    return control.decided(base, moved(state), run.sums_gradients)


def decay(run: Run, state: ScheduleState, schedule: BaseSchedule, step: Number) -> Number:
    """The base schedule's factor on the learning rate at inner step `step`; 1 in the probe, whatever the schedule."""
    last = clamp(step, high=run.total_steps - 1)
    return where(state.probing > 0, 1.0, schedule.factor(last, run.total_steps))


def values(
    run: Run, state: ScheduleState, base: Mapping[str, Number], schedule: BaseSchedule, step: Number
) -> dict[str, Number]:
    """The hyperparameters of a parameter group at inner step `step`, (*batch,) or (steps, *batch)."""
    held = hyperparameters(run, state, base)
    return {**held, LR.name: held[LR.name] * decay(run, state, schedule, step)}


def observe(
    run: Run, state: ScheduleState, window: Summary, names: Sequence[str], validation: Validation | None = None
) -> tuple[Tensor, ScheduleState]:
    """What the policy sees at the end of a window, (*batch, len(names)), and the state that remembers it.

    A window whose loss was below the running average, by more than its standard error, has earned a learning rate that
    is one step above its own. Without a loss, updates that were no larger than a probe allows speak for it.
    """
    expected = state.history["slow_loss"] - window.loss_std / sqrt(run.interval)
    moderate = isnan(window.loss) & (window.update_ratio < math.log(MAX_UPDATE))
    earned = where((window.loss < expected) | moderate, state.control[LR.name] + LR.step, -math.inf)
    observation, history = signals.observe(names, window, run, state.history, state.step, state.control, validation)
    return observation, state._replace(history=history, ceiling=clamp(state.ceiling, low=earned))


def move(run: Run, state: ScheduleState, actions: Mapping[str, Number], memory: Any = None) -> ScheduleState:
    """The state after a decision. `actions` has (*batch,) for the controls that move; the others stand still."""
    progress = state.step / run.total_steps
    states = dict(state.control)
    for name, action in actions.items():
        states[name] = control.moved_by(CONTROLS[name], states[name], action, progress, state.base[name])
    if LR.name in actions:
        states[LR.name] = clamp(clamp(states[LR.name], -run.reach, run.reach), high=state.ceiling)
    return state._replace(control=states, memory=memory)


def open_window(run: Run, state: ScheduleState, length: Number) -> ScheduleState:
    """The next window, of `length` inner steps or of what is left of the run."""
    end = clamp(state.step + length, high=run.total_steps)
    return state._replace(window_start=state.step, window_end=end)


def is_decision_due(run: Run, state: ScheduleState) -> Number:
    """Whether the window is over, and another follows."""
    return (state.step == state.window_end) & (state.step < run.total_steps)


def with_lr(state: ScheduleState, lr: Number) -> ScheduleState:
    """The state with the lr control at `lr`."""
    return state._replace(control={**state.control, LR.name: lr})


# --- Safe start -------------------------------------------------------------------------------------------------
#
# A base learning rate can be so large that training diverges before the first decision. So the first inner step of
# a scheduled run is a probe: it is taken at PROBE times the base learning rate, and what it did to the weights is
# measured. Updates are proportional to the learning rate, whatever the optimizer, so the probe tells what a step at
# the full base learning rate would have done. If that step promised to take away more than MAX_DECREASE of the loss,
# or a step with all of its momentum to move the weights by more than MAX_UPDATE of their norm, the run starts from
# the learning rate that stays within both limits, or from a part of it that the policy was trained to start at: what a
# high start does to a network is not always recovered. The usual default learning rates do, or nearly.

LOG_PROBE = -7.0
PROBE = math.exp(LOG_PROBE)  # factor on the base learning rate in the probe
MAX_DECREASE = 0.3  # of the loss, as predicted to first order
MAX_UPDATE = 0.1  # of the norm of the weights


def promised(window: Moments) -> Number:
    """Decrease of the loss over the loss that the gradient predicts for the last inner step of a window, (*batch,)."""
    return mean(moments.predicted_decrease(moments.last_steps(window, 1)))


def probe(run: Run, state: ScheduleState, window: Moments, decrease: Number | None = None) -> Number:
    """Log of the highest factor on the base learning rate that is safe, (*batch,), from the window of a probe.

    Where the window is of one part of a network, `decrease` is what is `promised` of the whole, as all parts make the
    step together. What the step does to weights is measured by the part alone: a small one would not show in the whole.
    """
    decrease = promised(window) if decrease is None else decrease
    ratio = mean(moments.update_ratio(moments.last_steps(window, 1)))
    momentum = 1 - 10 ** -state.base["momentum"]
    return safe_offset(decrease, ratio, control.growth(momentum, run.sums_gradients))


def safe_offset(predicted_decrease: Number, update_ratio: Number, growth: Number) -> Number:
    """Log of the highest factor on the base learning rate that is safe, as a probe tells.

    Args:
        predicted_decrease: ⟨Δθ, g⟩ / loss of the probe, (*batch,); NaN where the loss is not known.
        update_ratio: ‖Δθ‖ / ‖θ‖ of the probe, (*batch,). Weights that began at zero are nothing to compare an update
            with. If they began near zero, so that it is one or more, the loss alone decides, where it speaks.
        growth: how many times the first update a later one is, once momentum has built up, (*batch,).

    Returns:
        (*batch,); −inf where the probe itself was not finite.
    """
    decrease = where(isnan(predicted_decrease), 0.0, predicted_decrease)
    by_loss = MAX_DECREASE / clamp(decrease / PROBE, low=1e-12)
    by_weights = MAX_UPDATE / clamp(growth * update_ratio / PROBE, low=1e-12)
    near_zero = (update_ratio >= 1) & (update_ratio < 1e3) & (predicted_decrease > 0) & (by_loss >= 1)
    from_zero = near_zero | (update_ratio > 1e12)
    limit = clamp(by_loss, high=where(from_zero, math.inf, by_weights))
    is_finite = (update_ratio < math.inf) & (limit > 0)
    return where(is_finite, log(limit), -math.inf)


def start(state: ScheduleState, offset: Number) -> ScheduleState:
    """The state after the probe: the lr control at its part of a `safe_offset`, or at its origin if that is lower."""
    allowed = clamp(offset, LR.low, LR.high)
    part = clamp(allowed + log(state.probing), LR.low, 0.0)
    return with_lr(state, part)._replace(ceiling=allowed, probing=0 * state.probing)
