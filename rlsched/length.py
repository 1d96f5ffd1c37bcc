"""How long a run is: known beforehand, changed on the way, or not known."""

from __future__ import annotations

import math
from collections.abc import Sized
from typing import NamedTuple

from rlsched.base_schedule import BaseSchedule
from rlsched.number import checked_count
from rlsched.schedule import decision_interval
from rlsched.signals import Run

FIRST_INTERVAL = 10  # inner steps in a window at the start of a run of unknown length
MARGIN = 0.01  # of a run, and at least one: so many steps more are no mistake to warn of


class Length(NamedTuple):
    """How many inner steps a run has, and what its base schedule is over them.

    A run of unknown length is taken for one with a horizon: a number of steps that is doubled whenever half of them are
    done. So it is always in its first half, and its windows grow as it does. Its base schedule stands still where it is
    highest, until the length is known.
    """

    total_steps: int | None  # inner steps; None while nobody knows
    decisions: int  # about so many in the run, or in its horizon
    schedule: BaseSchedule  # over all of its steps

    @property
    def base_schedule(self) -> BaseSchedule:
        """What holds now."""
        return self.schedule.held() if self.total_steps is None else self.schedule

    def steps(self, step: int) -> int:
        """Inner steps in the run, or in its horizon after `step` of them."""
        if self.total_steps is not None:
            return self.total_steps
        first = FIRST_INTERVAL * self.decisions
        return first * 2 ** (2 * step // first).bit_length()

    def measured(self, run: Run, step: int) -> Run:
        """The run, with its length and its windows as they are after `step` inner steps."""
        steps = self.steps(step)
        return run._replace(total_steps=steps, interval=decision_interval(steps, self.decisions))

    def ending_at(self, total_steps: int, step: int) -> Length:
        """Another length after `step` inner steps, at which the base schedule goes on from where it is."""
        if self.total_steps is None:
            progress = self.schedule.peak
        else:
            progress = min(step, self.total_steps - 1) / self.total_steps
        return self._replace(total_steps=total_steps, schedule=self.schedule.rest(progress, step / total_steps))

    def margin(self) -> int:
        """Steps after the end that many loops take."""
        return 0 if self.total_steps is None else max(1, int(MARGIN * self.total_steps))


def steps_of(loader: Sized, epochs: int, accumulate: int = 1) -> int:
    """The `total_steps` of a run of some epochs: one for each batch, or for each `accumulate` batches of an epoch.

    Args:
        loader: a DataLoader, or anything with a length.
        epochs: how often all of it is trained on.
        accumulate: batches of which the gradients make one step; the last step of an epoch may have fewer.

    Raises:
        TypeError: the loader has no length, as one of an IterableDataset.
        ValueError: a number is not a positive int.
    """
    try:
        batches = len(loader)
    except TypeError as error:
        raise TypeError(
            f"loader has no length ({error}): count the optimizer steps by hand, or give total_steps=None"
        ) from error
    steps = math.ceil(batches / checked_count("accumulate", accumulate, "batches in a step"))
    return steps * checked_count("epochs", epochs, "epochs")
