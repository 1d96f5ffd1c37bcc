"""What keeps a run alive: gradients that are not finite, a first step that goes too far, divergence, and bounds."""

from __future__ import annotations

import logging
import math
from collections import Counter
from typing import Any, NamedTuple

from torch.nn import Module
from torch.optim import Optimizer

from rlsched import schedule
from rlsched.control import LR
from rlsched.meter import Meter
from rlsched.moments import Moments
from rlsched.number import Number
from rlsched.schedule import LOG_PROBE, PROBE, ScheduleState
from rlsched.signals import FAST, Run
from rlsched.snapshots import FULL, WEIGHTS, Snapshot
from rlsched.summary import Summary
from rlsched.tensorboard import RunLog

LOGGER = logging.getLogger("rlsched")

CUT, ROLLBACK, RAISE = "cut", "rollback", "raise"
ON_DIVERGENCE = (ROLLBACK, CUT, RAISE, None)  # what can be done about it
LR_CUT = math.log(10)  # e-folds taken off the learning rate
BACK_OFF = math.log(2)  # e-folds below the learning rate that diverged, which are out of bounds from then on
EASE = 0.02  # e-folds by which a good window raises that bound again
NONFINITE_STEPS = 3  # in a row: a bad batch comes alone
RISE = math.log(3)  # of the average loss over its lowest
NOISE = 3.0  # a loss is above another by so many times the noise, or it is the same
NOISE_WEIGHT = 0.1  # of a new window in the running average of the noise
PATIENCE = 0.1  # of the windows of a run: for so long may a loss that was gained be lost, or nothing be gained
LEAST_PATIENCE = 3  # windows
FAR_ABOVE = math.log(2)  # the base schedule's learning rate, to gain nothing
PROMISE = math.log(0.1)  # of the loss, which the gradients of a window have to promise, lest the steps are too small
SNAPSHOT_INTERVAL = 5  # decisions between two snapshots
MAX_PROBES = 20  # inner steps, until one of them is finite and small enough
PRINTED = 3  # interventions of a kind are printed, and then each that doubles their number


class DivergenceError(RuntimeError):
    """Training diverges, and `on_divergence="raise"` was asked for."""


class Intervention(NamedTuple):
    """Something that was done to keep a run alive."""

    step: int  # inner steps done
    message: str


class Alarm(NamedTuple):
    """Why a run is not to go on as it does."""

    reason: str
    is_idle: bool = False  # nothing was gained, and nothing is lost


class GuardState(NamedTuple):
    """What the guard remembers of a run."""

    nonfinite: int = 0  # steps in a row, up to the last one
    first: float = math.nan  # log loss of the first window
    average: float = math.nan  # running average of the log loss
    lowest: float = math.nan  # that it was
    noise: float = 0.0  # running average of how far the log loss of a window is from the running average
    lost: int = 0  # windows in a row in which half of what was gained is lost
    idle: int = 0  # windows in a row far above the base schedule, and nothing gained
    ceiling: float = LR.high  # of the lr control's state
    restored_at: int = -1  # inner step whose gradients are of weights that were taken back
    on_trial: bool = False  # whether weights were brought back, and no loss of theirs has been seen
    interventions: tuple[Intervention, ...] = ()

    @property
    def is_past_half(self) -> bool:
        """Whether half of what was gained since the run began is lost, noise or not."""
        return math.exp(self.average) > (math.exp(self.first) + math.exp(self.lowest)) / 2

    @property
    def has_lost_half(self) -> bool:
        """The same by more than the noise."""
        is_clear = self.average > self.lowest + NOISE * self.noise or self.average > self.first + self.noise
        return self.is_past_half and is_clear


class Guard:
    """Watches over one run, and answers what happens to it.

    A run diverges if its last three steps or more were not finite; if the running average of its loss is three times
    the lowest that it was, and has lost half of all that was gained since the run began; or if it has lost that much
    for a tenth of the run, or for a third of that if it is worse than untrained. It idles if for a twentieth of the run
    nothing was gained at all, at learning rates of more than twice those of the base schedule, by steps that ought to
    have gained something to first order.

    Args:
        optimizer: whose weights and state snapshots are of.
        meter: whose running average of the gradient norm is part of them.
        on_divergence: of `ON_DIVERGENCE`.
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
        snapshots: str = FULL,
        model: Module | None = None,
    ) -> None:
        self.optimizer, self.meter = optimizer, meter
        self.on_divergence = on_divergence
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
            message = f"a step at {PROBE:.0e} of the lr went too far: undone, the lr scaled by as much"
            self.intervene(step, message, kind="probe")
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
            message = f"a step at the full lr would go too far: scaled by {factor:.2g}"
            self.intervene(step, message, kind="start", level=logging.INFO)
        if not self.keeps_snapshots:
            self.snapshot = None
        return schedule.start(state, offset)

    # --- Bounds -----------------------------------------------------------------------------------------------------

    def bound_lr(self, state: ScheduleState, before: ScheduleState, window: Summary) -> ScheduleState:
        """Hold the lr control below the ceiling, and updates below their bound."""
        room = math.log(self.max_update_ratio) - window.update_ratio
        if room < 0:
            ratio = math.exp(window.update_ratio)
            message = f"updates have {ratio:.2g} times the norm of the weights: lr scaled down"
            self.intervene(state.step, message, kind="update")
        ceiling = self.state.ceiling
        highest = ceiling if math.isnan(room) else min(ceiling, before.control[LR.name] + room)
        return schedule.with_lr(state, min(state.control[LR.name], max(highest, LR.low)))

    # --- Divergence -------------------------------------------------------------------------------------------------

    def answer_divergence(
        self, run: Run, state: ScheduleState, before: ScheduleState, window: Moments, summary: Summary
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
        alarm = self.alarm(run, before, window, summary)
        if alarm is None:
            self._note_nonfinite(state, window)
            if self.is_well():
                self.state = self.state._replace(ceiling=min(LR.high, self.state.ceiling + EASE))
            return state, before, False
        if self.on_divergence == RAISE:
            raise DivergenceError(f"at step {state.step}, {alarm.reason}")
        answer, filled = [], before
        if self.keeps_snapshots and self.snapshot is not None:
            state, filled = self.roll_back(state), self.snapshot.schedule
            answer.append("rolled back")
        if self.on_divergence is not None and self.moves_lr:
            state = self._cut(state, before, alarm)
            answer.append("lr back to that of the base schedule" if alarm.is_idle else "lr cut to a tenth")
        nothing = "nothing is done" + (", as lr is not among the controls" if self.on_divergence else " about it")
        self.intervene(state.step, f"{alarm.reason}: {' and '.join(answer) or nothing}", kind="divergence")
        return state, filled, True

    def alarm(self, run: Run, before: ScheduleState, window: Moments, summary: Summary) -> Alarm | None:
        """Whether the run diverges, or idles.

        What comes after it is judged anew: it has to get worse by as much to be told again.
        """
        finite = [math.isfinite(norm) for norm in window.grad_norm]
        last = next((i for i, ok in enumerate(reversed(finite)) if ok), None)
        nonfinite = self.state.nonfinite + len(finite) if last is None else last
        if nonfinite >= NONFINITE_STEPS:
            self.state = self.state._replace(nonfinite=0)
            return Alarm(f"loss or gradient were not finite in the last {nonfinite} steps")
        self.state = self.state._replace(nonfinite=nonfinite)
        if math.isnan(summary.loss):  # a loss that has no logarithm does not count
            return None
        if self.state.on_trial:
            self._try(window, summary)
        if math.isnan(self.state.first):
            self._judge_anew(summary.loss)
        return self._alarm_of_loss(run, before, summary)

    def _alarm_of_loss(self, run: Run, before: ScheduleState, window: Summary) -> Alarm | None:
        was, patience = self.state, max(LEAST_PATIENCE, PATIENCE * run.total_steps / run.interval)
        average = was.average + FAST * (window.loss - was.average)
        surprise = abs(window.loss - was.average)
        if before.step > patience * run.interval:  # what comes at once is a change, and no noise
            surprise = min(surprise, NOISE * was.noise)
        noise = was.noise + NOISE_WEIGHT * (surprise - was.noise)
        if not was.noise:  # the first loss is that of one mini-batch
            noise = max(surprise, window.loss_std)
        noise = max(noise, window.loss_std / math.sqrt(run.interval))
        lowest = min(was.lowest, average)
        self.state = state = was._replace(average=average, lowest=lowest, noise=noise)

        lost = (state.lost + 1) * state.has_lost_half
        lost_is_enough = lost > (max(LEAST_PATIENCE, patience / 3) if average > state.first + noise else patience)
        factor = before.control[LR.name] + before.lr_offset
        promised = window.predicted_decrease + math.log(run.interval)  # of the loss, in the window, as a logarithm
        idles = (
            factor > FAR_ABOVE
            and promised > PROMISE
            and state.first - average < max(NOISE * min(noise, window.loss_std), 1e-3)
        )
        idle = (state.idle + 1) * idles
        self.state = state._replace(lost=lost, idle=idle)
        if (average > lowest + RISE and state.is_past_half) or lost_is_enough:
            self._judge_anew(max(window.loss, average))
            return Alarm(f"the loss has risen from {math.exp(lowest):.3g} to {math.exp(average):.3g}")
        if idle > max(LEAST_PATIENCE, patience / 2):
            self._judge_anew(average)
            times = f"{math.exp(factor):.2g} times that of the base schedule"
            return Alarm(f"the loss is where it began, at an lr of {times}", is_idle=True)
        return None

    def _judge_anew(self, loss: float) -> None:
        """Compare what comes with this log loss."""
        self.state = self.state._replace(first=loss, average=loss, lowest=loss, lost=0, idle=0)

    def _try(self, window: Moments, summary: Summary) -> None:
        """See whether weights that were brought back are as good as they were: if not, the data are others."""
        self.state = self.state._replace(on_trial=False)
        there = next(x for x in window.loss if x > 0)
        level = self.state._replace(average=min(math.log(there), summary.loss))
        if level.has_lost_half:
            self._judge_anew(summary.loss)
            self.snapshot = None

    def _cut(self, state: ScheduleState, before: ScheduleState, alarm: Alarm) -> ScheduleState:
        """The state with the learning rate that a run goes on with, and the ceiling that keeps it off `before`."""
        lr = before.control[LR.name]
        wanted = -before.lr_offset if alarm.is_idle else lr - LR_CUT
        reached = max(LR.low, wanted)
        ceiling = max(LR.low, min(self.state.ceiling, wanted if alarm.is_idle else lr - BACK_OFF))
        self.state = self.state._replace(ceiling=ceiling)
        rest = wanted - reached  # beyond the control's reach
        return schedule.with_lr(state, reached)._replace(lr_offset=state.lr_offset + rest)

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
        bad = state.nonfinite or state.idle or state.on_trial
        return not bad and (unknown or state.average <= state.lowest + NOISE * state.noise)

    def consider_snapshot(self, run: Run, state: ScheduleState, loss: Number | None) -> None:
        """Take a snapshot at a decision if it is due, and the run well; `loss` is at the weights as they are."""
        if self.keeps_snapshots:
            is_due = self.snapshot is None or (state.step // run.interval) % SNAPSHOT_INTERVAL == 0
            if is_due and self.is_well() and self._is_no_worse(0.0 if loss is None else float(loss)):
                self.take_snapshot(state)

    def _is_no_worse(self, loss: float) -> bool:
        return math.isfinite(loss) and (
            math.isnan(self.state.first) or loss <= 0 or math.log(loss) < self.state.average + RISE
        )

    def take_snapshot(self, state: ScheduleState) -> None:
        kept = self.snapshot.optimizer_state if self.snapshot is not None and self.snapshots == WEIGHTS else None
        options: dict[str, Any] = {"model": self.model, "kind": self.snapshots, "optimizer_state": kept}
        self.snapshot = Snapshot.of(self.optimizer, state, self.state, self.meter.average_norm, **options)

    def roll_back(self, state: ScheduleState) -> ScheduleState:
        """Weights and optimizer as they were in the snapshot, and the state that goes with them."""
        assert self.snapshot is not None
        self.snapshot.restore(self.optimizer)
        self.meter.average_norm = self.snapshot.average_norm
        now, then = self.state, self.snapshot
        self.state = then.guard._replace(
            ceiling=now.ceiling, interventions=now.interventions, restored_at=state.step, on_trial=True
        )
        return state._replace(history=then.schedule.history, memory=then.schedule.memory)

    def may_go_back(self, state: ScheduleState) -> bool:
        """Whether the run may have to go back before there is another snapshot."""
        return bool(state.probing) or (self.keeps_snapshots and not self.is_well())
