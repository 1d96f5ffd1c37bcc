"""Whether a run diverges, as its loss tells; or overfits, as its validation loss does."""

from __future__ import annotations

import math
from typing import NamedTuple

from rlsched.schedule import ScheduleState
from rlsched.signals import FAST, Run
from rlsched.summary import Summary
from rlsched.validation import Validation

RISE = math.log(3)  # of the average loss over its lowest
NOISE = 3.0  # a loss is above another by so many times the noise, or it is the same
NOISE_WEIGHT = 0.1  # of a new window in the running average of the noise
PATIENCE = 0.1  # of the windows of a run: for so long may a loss that was gained be lost
LEAST_PATIENCE = 3  # windows
LUCK = math.log(2)  # by which the loss of the first mini-batch may be below that of the next ones, by chance
LEARNT = math.log(2)  # below the first loss: a run that is as far may have no gradient because it is done
OVERFIT = math.log(2)  # of the validation loss over its lowest; less as the run ends, when nothing is to follow
LEAST_OVERFIT = 0.02
TIMES_OVERFIT = 2  # validations in a row, of which each shows it


class Intervention(NamedTuple):
    """Something that was done to keep a run alive."""

    step: int  # inner steps done
    message: str


class GuardState(NamedTuple):
    """What the guard remembers of a run."""

    nonfinite: int = 0  # steps in a row, up to the last one
    first: float = math.nan  # log loss of the first window
    is_sure: bool = False  # whether that has been compared with the next window's
    average: float = math.nan  # running average of the log loss
    lowest: float = math.nan  # that it was
    noise: float = 0.0  # running average of how far the log loss of a window is from the running average
    lost: int = 0  # windows in a row in which half of what was gained is lost
    dead: int = -1  # windows in a row in which a step had no gradient; −1: until one in which each of them has
    overfit: int = 0  # validations in a row whose loss was far above the lowest; −1: since that was answered
    restored_at: int = -1  # inner step whose gradients are of weights that were taken back
    on_trial: bool = False  # whether weights were brought back, and no loss of theirs has been seen
    interventions: tuple[Intervention, ...] = ()

    @property
    def has_gained(self) -> bool:
        """Whether the loss is below the first by more than the noise, or nothing is known of it."""
        return not self.average >= self.first - self.noise

    @property
    def is_past_half(self) -> bool:
        """Whether half of what was gained since the run began is lost, noise or not."""
        return math.exp(self.average) > (math.exp(self.first) + math.exp(self.lowest)) / 2

    @property
    def has_lost_half(self) -> bool:
        """The same by more than the noise."""
        is_clear = self.average > self.lowest + NOISE * self.noise or self.average > self.first + self.noise
        return self.is_past_half and is_clear

    def anew(self, loss: float) -> GuardState:
        """The same, to compare what comes with this log loss."""
        return self._replace(first=loss, average=loss, lowest=loss, lost=0, dead=-1)

    def surer(self, window: Summary) -> GuardState:
        """The same after the second window: the first was of one mini-batch, whose loss may have been low by luck."""
        is_luck = 0 < window.loss - self.first < min(NOISE * window.loss_std, LUCK)
        return (self.anew(window.loss) if is_luck else self)._replace(is_sure=True)


def judge_loss(
    was: GuardState, run: Run, before: ScheduleState, window: Summary, *, share_alive: float = math.nan
) -> tuple[GuardState, str | None]:
    """What is known after another window, under the state `before`, and why it cannot go on so, if it diverges.

    What comes after it is judged anew: it has to get worse by as much to be told again.

    Of the steps of a window a `share_alive` had a gradient, if that is known; a network whose units are all off for all
    data has none. (One of embeddings, which is seen at a few of its numbers, may never have one in each step.)
    """
    patience = max(LEAST_PATIENCE, PATIENCE * run.total_steps / run.interval)
    average = was.average + FAST * (window.loss - was.average)
    surprise = abs(window.loss - was.average)
    if before.step > patience * run.interval:  # what comes at once is a change, and no noise
        surprise = min(surprise, NOISE * was.noise)
    noise = was.noise + NOISE_WEIGHT * (surprise - was.noise)
    if not was.noise:  # the first loss is that of one mini-batch
        noise = max(surprise, window.loss_std)
    noise = max(noise, window.loss_std / math.sqrt(run.interval))
    lowest = min(was.lowest, average)
    state = was._replace(average=average, lowest=lowest, noise=noise)

    lost = (state.lost + 1) * state.has_lost_half
    lost_is_enough = lost > (max(LEAST_PATIENCE, patience / 3) if average > state.first + noise else patience)
    dead = state.dead
    if share_alive == 1:
        dead = 0
    elif average < state.first - LEARNT:
        dead = min(dead, 0)
    elif share_alive < 1 and dead >= 0:
        dead += 1
    after = state._replace(lost=lost, dead=dead)
    if (average > lowest + RISE and state.is_past_half) or lost_is_enough:
        alarm = f"the loss has risen from {math.exp(lowest):.3g} to {math.exp(average):.3g}"
        return after.anew(max(window.loss, average)), alarm
    if dead >= LEAST_PATIENCE and share_alive <= 0.5:
        return after.anew(average), "nothing but the smallest parameters has a gradient any more"
    return after, None


def judge_validation(
    was: GuardState, run: Run, before: ScheduleState, validation: Validation
) -> tuple[GuardState, str | None]:
    """What is known after a window, under the state `before`, of whether the network learns its data by heart.

    How far the validation loss is above its lowest is the "generalization loss" of Prechelt (1998, "Early Stopping –
    But When?"). In the course of a run it may come down again as the learning rate does; at the end it stays.
    """
    if not validation.step > before.window_start:  # nothing new
        return was, None
    allowed = LEAST_OVERFIT + OVERFIT * (1 - before.step / run.total_steps)
    if not is_above_best(validation, allowed):
        return was._replace(overfit=0), None
    state = was if was.overfit < 0 else was._replace(overfit=was.overfit + 1)
    if state.overfit < TIMES_OVERFIT:
        return state, None
    alarm = f"the validation loss has risen from {validation.best:.3g} to {validation.loss:.3g}"
    return state._replace(overfit=-1), alarm


def is_above_best(validation: Validation, allowed: float = LEAST_OVERFIT) -> bool:
    """Whether the last validation loss is more e-folds above the lowest than is allowed; not if there was none."""
    return validation.best > 0 and not validation.loss <= validation.best * math.exp(allowed)
