"""What keeps a run alive: gradients that are not finite, a first step that goes too far, divergence, and bounds."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from rlsched import schedule
from rlsched.control import LR
from rlsched.meter import Meter
from rlsched.moments import Moments
from rlsched.number import Number
from rlsched.schedule import LOG_PROBE, PROBE, ScheduleState
from rlsched.signals import FAST, Run, Summary
from rlsched.tensorboard import RunLog

LOGGER = logging.getLogger("rlsched")

CUT, ROLLBACK, RAISE = "cut", "rollback", "raise"
ON_DIVERGENCE = (CUT, ROLLBACK, RAISE, None)  # what can be done about it
LR_CUT = math.log(10)  # e-folds taken off the learning rate
BACK_OFF = math.log(2)  # e-folds below the learning rate that diverged, which are out of bounds from then on
NONFINITE_STEPS = 3  # in a row: a bad batch comes alone
RISE = math.log(3)  # of the average loss over its lowest
SNAPSHOT_INTERVAL = 5  # decisions between two snapshots
MAX_PROBES = 20  # inner steps, until one of them is finite and small enough


class DivergenceError(RuntimeError):
    """Training diverges, and `on_divergence="raise"` was asked for."""


class Intervention(NamedTuple):
    """Something that was done to keep a run alive."""

    step: int  # inner steps done
    message: str


class GuardState(NamedTuple):
    """What the guard remembers of a run."""

    nonfinite: int = 0  # steps in a row, up to the last one
    first: float = math.nan  # log loss of the first window
    average: float = math.nan  # running average of the log loss
    lowest: float = math.nan  # that it was
    ceiling: float = LR.high  # of the lr control's state
    restored_at: int = -1  # inner step whose gradients are of weights that were taken back
    interventions: tuple[Intervention, ...] = ()


class Snapshot(NamedTuple):
    """A run at one moment. Buffers of a model (batch norm's) are not in it."""

    weights: list[tuple[Tensor, Tensor]]  # each parameter and what it was
    optimizer_state: dict[Tensor, Any]
    schedule: ScheduleState
    guard: GuardState
    average_norm: Number  # of the gradient

    @classmethod
    def of(cls, optimizer: Optimizer, schedule: ScheduleState, guard: GuardState, average_norm: Number) -> Snapshot:
        weights = [(p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
        states = {p: copy.deepcopy(state) for p, state in optimizer.state.items()}
        return cls(weights, states, schedule, guard, average_norm)

    @torch.no_grad()
    def restore(self, optimizer: Optimizer) -> None:
        """Bring weights and optimizer state back, in place."""
        for p, weights in self.weights:
            p.copy_(weights)
        for p in list(optimizer.state):
            if p in self.optimizer_state:
                _restore(optimizer.state[p], self.optimizer_state[p])
            else:
                del optimizer.state[p]

    def packed(self) -> dict[str, Any]:
        """The same by the order of the parameters, for a checkpoint."""
        states = [self.optimizer_state.get(p) for p, _ in self.weights]
        weights = [weights for _, weights in self.weights]
        norm = float(self.average_norm)
        return {**self._asdict(), "weights": weights, "optimizer_state": states, "average_norm": norm}

    @classmethod
    def unpacked(cls, plain: Mapping[str, Any], parameters: Sequence[Tensor]) -> Snapshot:
        """What gave `plain`, of these parameters."""
        weights = list(zip(parameters, plain["weights"], strict=True))
        states = zip(parameters, plain["optimizer_state"], strict=True)
        return cls(**{**plain, "weights": weights, "optimizer_state": {p: s for p, s in states if s is not None}})


class Guard:
    """Watches over one run, and answers what happens to it.

    A run diverges if its last three steps or more were not finite; or if the running average of its loss is three
    times the lowest that it was, and has lost half of all that was gained since the run began.

    Args:
        optimizer: whose weights and state snapshots are of.
        meter: whose running average of the gradient norm is part of them.
        on_divergence: of `ON_DIVERGENCE`.
        max_update_ratio: of the norm of updates over that of the weights.
        moves_lr: whether the learning rate is under control.
        log: where interventions are written.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        meter: Meter,
        *,
        on_divergence: str | None,
        max_update_ratio: float,
        moves_lr: bool,
        log: RunLog,
    ) -> None:
        self.optimizer, self.meter = optimizer, meter
        self.on_divergence = on_divergence
        self.max_update_ratio = max_update_ratio
        self.moves_lr = moves_lr
        self.log = log
        self.state = GuardState()
        self.snapshot: Snapshot | None = None

    @property
    def keeps_snapshots(self) -> bool:
        return self.on_divergence == ROLLBACK

    def intervene(self, step: int, message: str, level: int = logging.WARNING) -> None:
        """Put on record what is done."""
        done = (*self.state.interventions, Intervention(step, message))
        self.state = self.state._replace(interventions=done)
        LOGGER.log(level, "step %d: %s", step, message)
        self.log.text("rlsched/intervention", message, step)

    # --- The probe --------------------------------------------------------------------------------------------------

    def judge_probe(self, run: Run, state: ScheduleState, window: Moments) -> ScheduleState:
        """Start at the learning rate that the probe allows; or probe on, if it told nothing or itself went too far."""
        step, offset = state.step, schedule.probe(run, state, window)
        is_finite = math.isfinite(window.grad_norm[-1])
        went_too_far = is_finite and offset < LR.low
        self._note_nonfinite(state, window)
        if went_too_far:
            state = state._replace(lr_offset=state.lr_offset + LOG_PROBE)
            offset -= LOG_PROBE
            self.intervene(step, f"a step at {PROBE:.0e} of the lr went too far: undone, the lr scaled by as much")
        if went_too_far or not is_finite:
            if self.snapshot is not None and state.window_start != self.state.restored_at:
                state = self.roll_back(state)
            needed = 2 if went_too_far else 1  # steps: one that moves nothing, and the probe
            if step + needed < min(MAX_PROBES, run.total_steps):
                return state
            if offset > -math.inf:  # there is no time to find out: believe it, beyond the reach of the control too
                state = state._replace(lr_offset=state.lr_offset + min(0.0, offset - LR.low))
        if offset < 0:
            factor = max(math.exp(offset), PROBE)
            self.intervene(step, f"a step at the full lr would go too far: scaled by {factor:.2g}", logging.INFO)
        if not self.keeps_snapshots:
            self.snapshot = None
        return schedule.start(state, offset)

    # --- Bounds -----------------------------------------------------------------------------------------------------

    def bound_lr(self, state: ScheduleState, before: ScheduleState, window: Summary) -> ScheduleState:
        """Hold the lr control below the ceiling, and updates below their bound."""
        room = math.log(self.max_update_ratio) - window.update_ratio
        if room < 0:
            ratio = math.exp(window.update_ratio)
            self.intervene(state.step, f"updates have {ratio:.2g} times the norm of the weights: lr scaled down")
        ceiling = self.state.ceiling
        highest = ceiling if math.isnan(room) else min(ceiling, before.control[LR.name] + room)
        return schedule.with_lr(state, min(state.control[LR.name], max(highest, LR.low)))

    # --- Divergence -------------------------------------------------------------------------------------------------

    def answer_divergence(
        self, state: ScheduleState, before: ScheduleState, window: Moments, summary: Summary
    ) -> tuple[ScheduleState, ScheduleState, bool]:
        """Look at a window, and do what is to be done.

        Args:
            state: after the decision.
            before: before it.
            window, summary: what was measured.

        Returns:
            The state to go on with; that under which the optimizer's buffers were filled; whether the run diverges.

        Raises:
            DivergenceError: the run diverges, and that was asked for.
        """
        reason = self.why_diverged(window, summary)
        if reason is None:
            self._note_nonfinite(state, window)
            return state, before, False
        if self.on_divergence == RAISE:
            raise DivergenceError(f"at step {state.step}, {reason}")
        answer, filled = [], before
        if self.on_divergence == ROLLBACK and self.snapshot is not None:
            state, filled = self.roll_back(state), self.snapshot.schedule
            answer.append("rolled back")
        if self.on_divergence is not None and self.moves_lr:
            state = self._cut(state, before.control[LR.name])
            answer.append("lr cut to a tenth")
        nothing = "nothing is done" + (", as lr is not among the controls" if self.on_divergence else " about it")
        self.intervene(state.step, f"{reason}: {' and '.join(answer) or nothing}")
        return state, filled, True

    def why_diverged(self, window: Moments, summary: Summary) -> str | None:
        """A reason to say that the run diverges, or None.

        What comes after a divergence is judged anew: it has to get worse by as much to be told again.
        """
        finite = [math.isfinite(norm) for norm in window.grad_norm]
        last = next((i for i, ok in enumerate(reversed(finite)) if ok), None)
        nonfinite = self.state.nonfinite + len(finite) if last is None else last
        if nonfinite >= NONFINITE_STEPS:
            self.state = self.state._replace(nonfinite=0)
            return f"loss or gradient were not finite in the last {nonfinite} steps"
        now, first, average, lowest = summary.loss, self.state.first, self.state.average, self.state.lowest
        if math.isnan(now):  # a loss that has no logarithm does not count
            self.state = self.state._replace(nonfinite=nonfinite)
            return None
        if math.isnan(first):
            first = average = lowest = now
        average += FAST * (now - average)
        lowest = best = min(lowest, average)
        has_risen = average > best + RISE and math.exp(average) > (math.exp(first) + math.exp(best)) / 2
        if has_risen:
            average = lowest = max(now, average)
        self.state = self.state._replace(nonfinite=nonfinite, first=first, average=average, lowest=lowest)
        return f"the loss has risen from {math.exp(best):.3g} to {math.exp(average):.3g}" if has_risen else None

    def _cut(self, state: ScheduleState, lr: float) -> ScheduleState:
        """The learning rate cut to a tenth, after a divergence at the lr control's state `lr`."""
        ceiling = max(LR.low, min(self.state.ceiling, lr - BACK_OFF))
        self.state = self.state._replace(ceiling=ceiling)
        reached = max(LR.low, lr - LR_CUT)
        rest = lr - LR_CUT - reached  # beyond the control's reach
        return schedule.with_lr(state, reached)._replace(lr_offset=state.lr_offset + rest)

    def _note_nonfinite(self, state: ScheduleState, window: Moments) -> None:
        number = sum(not math.isfinite(norm) for norm in window.grad_norm)
        number -= state.window_start == self.state.restored_at
        if number > 0:
            steps = len(window.grad_norm)
            self.intervene(state.step, f"{number} of {steps} steps without a finite loss and gradient: left out")

    # --- Snapshots --------------------------------------------------------------------------------------------------

    def is_well(self, loss: float) -> bool:
        """Whether a run that does not diverge is nearly as good as ever, its loss at the present weights too."""
        if self.state.nonfinite or not math.isfinite(loss):
            return False
        average = self.state.average
        return math.isnan(self.state.first) or (
            average < self.state.lowest + RISE / 4 and loss < math.exp(average + RISE)
        )

    def consider_snapshot(self, run: Run, state: ScheduleState, loss: Number | None) -> None:
        """Take a snapshot at a decision if it is due, and the run well; `loss` is at the weights as they are."""
        if self.keeps_snapshots:
            is_due = self.snapshot is None or (state.step // run.interval) % SNAPSHOT_INTERVAL == 0
            if is_due and self.is_well(0.0 if loss is None else float(loss)):
                self.take_snapshot(state)

    def take_snapshot(self, state: ScheduleState) -> None:
        self.snapshot = Snapshot.of(self.optimizer, state, self.state, self.meter.average_norm)

    def roll_back(self, state: ScheduleState) -> ScheduleState:
        """Weights and optimizer as they were in the snapshot, and the state that goes with them."""
        assert self.snapshot is not None
        self.snapshot.restore(self.optimizer)
        self.meter.average_norm = self.snapshot.average_norm
        now = self.state
        self.state = self.snapshot.guard._replace(
            ceiling=now.ceiling, interventions=now.interventions, restored_at=state.step
        )
        then = self.snapshot.schedule
        return state._replace(history=then.history, memory=then.memory)

    def may_go_back(self, state: ScheduleState) -> bool:
        """Whether the run may have to go back before there is another snapshot."""
        return bool(state.probing) or (self.keeps_snapshots and not self.is_well(0.0))


def _restore(state: dict[str, Any], saved: dict[str, Any]) -> None:
    for key in list(state):
        if key not in saved:
            del state[key]
        elif isinstance(state[key], Tensor) and isinstance(saved[key], Tensor):
            state[key].copy_(saved[key])
        else:
            state[key] = copy.deepcopy(saved[key])
