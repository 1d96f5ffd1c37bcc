"""What is asked of a run beside its steps: how long it is, how it validates, and which of its weights are kept."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from rlsched import schedule
from rlsched.frozen import Window
from rlsched.length import Length
from rlsched.number import checked_count, checked_loss
from rlsched.options import ScheduleOptions
from rlsched.schedule import ScheduleState
from rlsched.signals import Run
from rlsched.tensorboard import RunLog
from rlsched.validation import Validation, validated
from rlsched.weights import KeptWeights


class TrainingRun:
    """A run as a user sees it. `Controller` is one, which documents the attributes."""

    options: ScheduleOptions
    log: RunLog
    length: Length
    run: Run
    state: ScheduleState
    windows: list[Window]
    validation: Validation
    kept: KeptWeights

    @property
    def step_count(self) -> int:
        """Inner steps done."""
        return int(self.state.step)

    @property
    def total_steps(self) -> int | None:
        """Inner steps in the run; None while nobody knows."""
        return self.length.total_steps

    # --- Length -----------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def extend(self, total_steps: int) -> None:
        """Give the run another length, longer or shorter, at any time.

        The learning rate does not jump. The base schedule goes on from where it is, and slower or faster, so that it
        ends with the run: linear decay goes on from the factor that it has come down to, in a straight line to zero
        at the new end. A base schedule of the new length would be higher by now, and the run that had settled would be
        thrown back. What the policy has decided, and bounds and ceilings, count from the base schedule and stay. To the
        policy the run has the new length, of which less is done, and it raises the learning rate if that pays. From the
        next decision on, windows have the new length as well.

        So extend a run before its learning rate is small: at its end, linear decay has hardly anything left.

        Args:
            total_steps: optimizer steps in the whole run, those that are done included.

        Raises:
            ValueError: it is no positive int, or less than what is done.
        """
        self._end_at(checked_count("total_steps", total_steps, "optimizer steps"))

    @torch.compiler.disable
    def finish(self, steps: int) -> None:
        """End the run in `steps` more inner steps: `extend(total_steps)` by what is left.

        A run of unknown length has been at the highest factor of its base schedule; from there on it follows what comes
        after that, which of linear decay is all of it.

        Raises:
            ValueError: it is no positive int.
        """
        self._end_at(self.step_count + checked_count("steps", steps, "optimizer steps that are left"))

    def _end_at(self, total_steps: int) -> None:
        step, state = self.step_count, self.state
        if total_steps == self.total_steps:
            return
        if total_steps < step:
            raise ValueError(f"total_steps must be at least the {step} steps that are done, got {total_steps}")
        self.length = self.length.ending_at(total_steps, step)
        self.run = self.length.measured(self.run, step)
        self.state = state._replace(window_end=max(step, min(state.window_end, total_steps)))
        self._note_window()

    def _note_window(self) -> None:
        """Put on record what holds from now on, in place of what was to hold."""
        state, step = self.state, self.step_count
        if self.windows and self.windows[-1].start == step:
            self.windows.pop()
        clock = self.run.total_steps, self.length.base_schedule.knots
        self.windows.append(Window(step, bool(state.probing), schedule.moved(state), state.control, *clock))

    # --- Validation -------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def observe_validation(self, loss: Tensor | float) -> None:
        """Report a validation loss, whenever there is one, of the weights as they are.

        A policy that was trained to looks at it (the one that ships was not); `should_stop` and `best` go by it. It
        should be of the kind of the training loss. Several processes should report the same, or one of them alone:
        the policy sees the mean over those that have the latest, and the others hear of it at the next decision.

        Args:
            loss: a number, or a tensor of one, for which an accelerator is waited for. What is not finite counts as one
                that is no better.

        Raises:
            TypeError, ValueError: it is neither.
        """
        step, value = self.step_count, float(checked_loss("loss", loss))
        self.validation = validated(self.validation, value, step)
        if self.validation.since_best == 0:
            self.kept.take_best(step)
        self.log.validation(value, step)

    @property
    def should_stop(self) -> bool:
        """Whether the last `patience` validations have brought no new best loss."""
        patience = self.options.patience
        return patience is not None and self.validation.since_best >= patience

    # --- Weights ----------------------------------------------------------------------------------------------------

    def averaged(self, model: nn.Module, batches: Iterable[Any] | None = None) -> AbstractContextManager[None]:
        """The averaged weights, in place for the time of a `with` block::

            with optimizer.averaged(model):
                optimizer.observe_validation(validate(model))

        They are the mean over the run so far, of which the last tenth weighs more than half, and are good at any time:
        for a run whose learning rate does not decay, or not yet. What was observed in the block is a validation of
        them, and the best weights are then averaged ones. Otherwise as `best`.

        Args:
            model: whose weights these are.
            batches: of the training data, for a model with batch norm, as for `best`.

        Raises:
            ValueError: `averaging` was not asked for, or the model has batch norm and there are no batches.
        """
        return self.kept.average_in_place(model, batches)

    def best(self, model: nn.Module, batches: Iterable[Any] | None = None) -> AbstractContextManager[None]:
        """The weights of the best validation, in place for the time of a `with` block::

            with optimizer.best(model):
                torch.save(model.state_dict(), "best.pt")

        After it, however it ends, weights and batch norm are to the last bit what they were. In it nothing can be
        trained, and it takes the memory of one more copy of the weights. Of a sharded model all ranks have to enter it.

        Args:
            model: whose weights these are.
            batches: of the training data, for a model with batch norm, whose running averages they compute anew: as
                `torch.optim.swa_utils.update_bn` takes them, a DataLoader for example.

        Raises:
            ValueError: there are no best weights, or the model has batch norm and there are no batches.
        """
        return self.kept.best_in_place(model, batches)

    def restore_best(self, model: nn.Module, batches: Iterable[Any] | None = None) -> None:
        """Go back to the weights of the best validation, for good. The optimizer's own state stays; see `best`."""
        self.kept.restore_best(model, batches)
