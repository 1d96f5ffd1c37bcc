"""What is asked of a run beside its steps: how it validates, and which of its weights are kept."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from rlsched.options import ScheduleOptions
from rlsched.schedule import ScheduleState
from rlsched.tensorboard import RunLog
from rlsched.validation import Validation, as_float, validated
from rlsched.weights import KeptWeights


class TrainingRun:
    """A run as a user sees it. `Controller` is one, which documents the attributes."""

    options: ScheduleOptions
    log: RunLog
    state: ScheduleState
    validation: Validation
    kept: KeptWeights

    @property
    def step_count(self) -> int:
        """Inner steps done."""
        return int(self.state.step)

    # --- Validation -------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def observe_validation(self, loss: Tensor | float) -> None:
        """Report a validation loss, whenever there is one, of the weights as they are.

        A policy that was trained to looks at it (the one that ships was not); `should_stop` and `best` go by it. It
        should be of the kind of the training loss. Several processes should report the same, or one of them alone:
        the policy sees the mean over those that have the latest, and the others hear of it at the next decision.

        Args:
            loss: a number, or a tensor of one. What is not finite counts as one that is no better.

        Raises:
            TypeError, ValueError: it is neither.
        """
        step, value = self.step_count, as_float(loss)
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
