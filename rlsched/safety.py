"""What keeps a run alive: gradients that are not finite, a first step that goes too far, divergence, and bounds."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch.nn import Module
from torch.optim import Optimizer

from rlsched import schedule
from rlsched.control import LR
from rlsched.meter import Meter
from rlsched.moments import Moments, last_steps
from rlsched.number import Number
from rlsched.schedule import LOG_PROBE, PROBE, ScheduleState
from rlsched.signals import Run
from rlsched.snapshots import FULL, WEIGHTS, Snapshot
from rlsched.summary import Summary
from rlsched.tensorboard import RunLog
from rlsched.validation import Validation
from rlsched.verdict import (
    NOISE,
    RISE,
    GuardState,
    Intervention,
    is_above_best,
    judge_loss,
    judge_validation,
)

LOGGER = logging.getLogger("rlsched")

CUT, ROLLBACK, RAISE = "cut", "rollback", "raise"
ON_DIVERGENCE = (ROLLBACK, CUT, RAISE, None)  # what can be done about it
LR_CUT = math.log(10)  # e-folds taken off the learning rate
BACK_OFF = math.log(2)  # e-folds below the learning rate that diverged, which are out of bounds from then on
EASE = 0.02  # e-folds by which a good window raises that bound again
NONFINITE_STEPS = 3  # in a row: a bad batch comes alone
SNAPSHOT_INTERVAL = 5  # decisions between two snapshots
MAX_PROBES = 20  # inner steps, until one of them is finite and small enough
LEAST_MEASURED = 4  # steps of a window, to tell whether its gradients are gone
PRINTED = 3  # interventions of a kind are printed, and then each that doubles their number


States = list[ScheduleState]  # one for all groups, or one for each


class DivergenceError(RuntimeError):
    """Training diverges, and `on_divergence="raise"` was asked for."""


class Guard:
    """Watches over one run, and answers what happens to it.

    A run diverges if its last three steps or more were not finite; if the running average of its loss is three times
    the lowest that it was, and has lost half of all that was gained since the run began; or if it has lost that much
    for a tenth of the run, or for a third of that if it is worse than untrained; or if most steps of three windows had
    no gradient. It learns its data by heart if its validation loss is far above its lowest.

    Args:
        optimizer: whose weights and state snapshots are of.
        meter: whose running average of the gradient norm is part of them.
        on_divergence: of `ON_DIVERGENCE`.
        undo_overfitting: whether a run that learns its data by heart is rolled back, if one that diverges is.
        snapshots: of `SNAPSHOTS`.
        model: whose buffers are part of them.
        max_update_ratio: of the norm of updates over that of the weights.
        moves_lr: whether the learning rate is under control.
        acts: whether anything is; a run that just follows its base schedule is left alone.
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
        acts: bool = True,
        undo_overfitting: bool = True,
        snapshots: str = FULL,
        model: Module | None = None,
    ) -> None:
        self.optimizer, self.meter = optimizer, meter
        self.on_divergence = on_divergence
        self.undo_overfitting = undo_overfitting
        self.snapshots, self.model = snapshots, model
        self.max_update_ratio = max_update_ratio
        self.moves_lr, self.acts = moves_lr, acts
        self.log = log
        self.state = GuardState()
        self.snapshot: Snapshot | None = None
        self._times: Counter[str] = Counter()  # of each kind of intervention

    @property
    def keeps_snapshots(self) -> bool:
        return self.on_divergence == ROLLBACK and self.acts

    def intervene(self, step: int, message: str, *, kind: str, level: int = logging.WARNING) -> None:
        """Put on record what is done; of many interventions of a `kind` some are printed."""
        self.state = self.state._replace(interventions=(*self.state.interventions, Intervention(step, message)))
        self._times[kind] += 1
        times = self._times[kind]
        if times <= PRINTED or times & (times - 1) == 0:
            repeated = f" ({times} times by now)" if times > PRINTED else ""
            LOGGER.log(level, "rlsched: step %d: %s%s", step, message, repeated)
        self.log.intervention(message, step)

    # --- The probe --------------------------------------------------------------------------------------------------

    def judge_probe(self, run: Run, states: States, windows: Sequence[Moments]) -> States:
        """Start at the learning rate that the probe allows; or probe on, if it told nothing or itself went too far.

        Several groups make the step together: what it promises for the loss is summed up, and binds them all. What it
        does to weights binds the group whose weights they are.
        """
        first, step = windows[0], states[0].step
        decrease = sum(map(schedule.promised, windows))
        offsets = [schedule.probe(run, *each, decrease) for each in zip(states, windows, strict=True)]
        is_finite = math.isfinite(first.grad_norm[-1])
        went_too_far = is_finite and min(offsets) < LR.low
        self._note_nonfinite(states[0], first)
        if went_too_far:
            taken = [LOG_PROBE * (offset < LR.low) for offset in offsets]
            states = [s._replace(lr_offset=s.lr_offset + off) for s, off in zip(states, taken, strict=True)]
            offsets = [offset - off for offset, off in zip(offsets, taken, strict=True)]
            message = f"a step at {PROBE:.0e} of the lr went too far: undone, the lr scaled by as much"
            self.intervene(step, message, kind="probe")
        if went_too_far or not is_finite:
            if self.snapshot is not None and states[0].window_start != self.state.restored_at:
                states = self.roll_back(states)
            needed = 2 if went_too_far else 1  # steps: one that moves nothing, and the probe
            if step + needed < min(MAX_PROBES, run.total_steps):
                return states
            if min(offsets) > -math.inf:  # there is no time to find out: believe it, beyond the control's reach too
                beyond = [min(0.0, offset - LR.low) for offset in offsets]
                states = [s._replace(lr_offset=s.lr_offset + rest) for s, rest in zip(states, beyond, strict=True)]
        if min(offsets) < 0:
            factors = ", ".join(f"{min(max(math.exp(offset), PROBE), 1):.2g}" for offset in offsets)
            message = f"a step at the full lr would go too far: scaled by {factors}"
            self.intervene(step, message, kind="start", level=logging.INFO)
        if not self.keeps_snapshots:
            self.snapshot = None
        return list(map(schedule.start, states, offsets))

    # --- Bounds -----------------------------------------------------------------------------------------------------

    def bound_lr(self, state: ScheduleState, before: ScheduleState, window: Summary, whose: str = "") -> ScheduleState:
        """Hold the lr control below its bound, and updates below theirs; of the group `whose`, if there are several."""
        room = math.log(self.max_update_ratio) - window.update_ratio
        if room < 0:
            ratio = math.exp(window.update_ratio)
            message = f"{whose}updates have {ratio:.2g} times the norm of the weights: lr scaled down"
            self.intervene(state.step, message, kind="update")
        highest = state.bound if math.isnan(room) else min(state.bound, before.control[LR.name] + room)
        return schedule.with_lr(state, min(state.control[LR.name], max(highest, LR.low)))

    # --- Divergence -------------------------------------------------------------------------------------------------

    def answer_divergence(
        self,
        run: Run,
        states: States,
        before: States,
        windows: Sequence[Moments],
        summary: Summary,
        validation: Validation,
    ) -> tuple[States, States, bool]:
        """Look at a window, and do what is to be done: with all groups, as they have one loss.

        Args:
            states: after the decision.
            before: before it.
            windows, summary: what was measured of each group; the summary is that of the whole network.
            validation: the validation losses so far.

        Returns:
            The states to go on with; those under which the optimizer's buffers were filled; whether the run diverges.

        Raises:
            DivergenceError: the run diverges, and that was asked for.
        """
        step = states[0].step
        alarm = self.alarm(run, before[0], windows, summary)
        if self.undo_overfitting and self.keeps_snapshots:
            self.state, overfits = judge_validation(self.state, run, before[0], validation)
            alarm = alarm or overfits
        if alarm is None:
            self._note_nonfinite(states[0], windows[0])
            if self.is_well():
                states = [state._replace(bound=min(LR.high, state.bound + EASE)) for state in states]
            return states, before, False
        if self.on_divergence == RAISE:
            raise DivergenceError(f"at step {step}, {alarm}")
        answer, filled = [], before
        if self.keeps_snapshots and self.snapshot is not None:
            then = self.snapshot.schedule
            states, filled = self.roll_back(states), [*then, *before[len(then) :]]
            answer.append("rolled back")
        if self.on_divergence is not None and self.moves_lr:
            states = [self._cut(*each) for each in zip(states, before, strict=True)]
            answer.append("lr cut to a tenth")
        nothing = "nothing is done" + (", as lr is not among the controls" if self.on_divergence else " about it")
        self.intervene(step, f"{alarm}: {' and '.join(answer) or nothing}", kind="divergence")
        return states, filled, True

    def alarm(self, run: Run, before: ScheduleState, windows: Sequence[Moments], summary: Summary) -> str | None:
        """Whether the run diverges."""
        window = windows[0]
        finite = [math.isfinite(norm) for norm in window.grad_norm]
        last = next((i for i, ok in enumerate(reversed(finite)) if ok), None)
        nonfinite = self.state.nonfinite + len(finite) if last is None else last
        if nonfinite >= NONFINITE_STEPS:
            self.state = self.state._replace(nonfinite=0)
            return f"loss or gradient were not finite in the last {nonfinite} steps"
        self.state = self.state._replace(nonfinite=nonfinite)
        if math.isnan(summary.loss):  # a loss that has no logarithm does not count
            return None
        if self.state.on_trial:
            self._try(window, summary)
        if math.isnan(self.state.first):
            self.state = self.state.anew(summary.loss)
        elif not self.state.is_sure:
            self.state = self.state.surer(summary)
        share = max(map(_share_alive, windows))
        self.state, alarm = judge_loss(self.state, run, before, summary, share_alive=share)
        return alarm

    def _try(self, window: Moments, summary: Summary) -> None:
        """See whether weights that were brought back are as good as they were: if not, the data are others."""
        self.state = self.state._replace(on_trial=False)
        there = next(x for x in window.loss if x > 0)
        level = self.state._replace(average=min(math.log(there), summary.loss))
        if level.has_lost_half:
            self.state = self.state.anew(summary.loss)
            self.snapshot = None

    def _cut(self, state: ScheduleState, before: ScheduleState) -> ScheduleState:
        """The state with the learning rate that a run goes on with, and the bound that keeps it off `before`."""
        lr = before.control[LR.name]
        wanted = lr - LR_CUT
        reached = max(LR.low, wanted)
        bound = max(LR.low, min(state.bound, lr - BACK_OFF))
        rest = wanted - reached  # beyond the control's reach
        return schedule.with_lr(state, reached)._replace(bound=bound, lr_offset=state.lr_offset + rest)

    def _note_nonfinite(self, state: ScheduleState, window: Moments) -> None:
        number = sum(not math.isfinite(norm) for norm in window.grad_norm)
        number -= state.window_start == self.state.restored_at
        if number > 0:
            steps = len(window.grad_norm)
            message = f"{number} of {steps} steps without a finite loss and gradient: left out"
            self.intervene(state.step, message, kind="not finite")

    # --- Snapshots --------------------------------------------------------------------------------------------------

    def is_well(self) -> bool:
        """Whether a run that does not diverge is as good as it ever was, but for the noise."""
        state = self.state
        unknown = math.isnan(state.first)
        bad = state.nonfinite or state.dead > 0 or state.on_trial
        return not bad and (unknown or state.average <= state.lowest + NOISE * state.noise)

    def consider_snapshot(self, run: Run, states: States, loss: Number | None, validation: Validation) -> None:
        """Take a snapshot at a decision if it is due, and the run well; `loss` is at the weights as they are."""
        if not self.keeps_snapshots:
            return
        here = 0.0 if loss is None else float(loss)
        then = -1 if self.snapshot is None else self.snapshot.schedule[0].step
        if self.undo_overfitting and validation.best_step > then:  # what is best is well, whatever the training loss
            is_wanted = math.isfinite(here) and self.state.dead <= 0
        else:
            is_due = then < 0 or (states[0].step // run.interval) % SNAPSHOT_INTERVAL == 0
            is_well = self.is_well() and not (self.undo_overfitting and is_above_best(validation))
            is_wanted = is_due and is_well and (then < 0 or self.state.has_gained) and self._is_no_worse(here)
        if is_wanted:
            self.take_snapshot(states)

    def _is_no_worse(self, loss: float) -> bool:
        return math.isfinite(loss) and (
            math.isnan(self.state.first) or loss <= 0 or math.log(loss) < self.state.average + RISE
        )

    def take_snapshot(self, states: States) -> None:
        kept = self.snapshot.optimizer_state if self.snapshot is not None and self.snapshots == WEIGHTS else None
        options: dict[str, Any] = {"model": self.model, "kind": self.snapshots, "optimizer_state": kept}
        self.snapshot = Snapshot.of(self.optimizer, list(states), self.state, self.meter.average_norm, **options)

    def roll_back(self, states: States) -> States:
        """Weights and optimizer as they were in the snapshot, and the states that go with them."""
        assert self.snapshot is not None
        self.snapshot.restore(self.optimizer)
        self.meter.average_norm = self.snapshot.average_norm
        then, interventions = self.snapshot, self.state.interventions
        self.state = then.guard._replace(
            interventions=interventions, restored_at=states[0].step, on_trial=True, overfit=-1, dead=-1
        )
        pairs = zip(states, then.schedule, strict=False)  # groups that came since then are as they are
        restored = [state._replace(history=old.history, memory=old.memory) for state, old in pairs]
        return [*restored, *states[len(restored) :]]

    def may_go_back(self, state: ScheduleState, validation: Validation) -> bool:
        """Whether the run may have to go back before there is another snapshot."""
        is_well = self.is_well() and not (self.undo_overfitting and is_above_best(validation))
        return bool(state.probing) or (self.keeps_snapshots and not is_well)


def _share_alive(window: Moments) -> float:
    """Of the steps whose gradient was measured, those in which it is not zero; NaN if these are fewer than four."""
    measured = [square for square in last_steps(window).grad_square if square == square]
    return sum(square > 0 for square in measured) / len(measured) if len(measured) >= LEAST_MEASURED else math.nan
