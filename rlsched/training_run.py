"""What is asked of a run beside its steps: its length, its validation, copies of its weights, and its state."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rlsched import records, schedule
from rlsched.checkpoint import Saved, packed, unpacked
from rlsched.frozen import FrozenSchedule, Window
from rlsched.length import Length
from rlsched.number import checked_count, checked_loss
from rlsched.options import ScheduleOptions
from rlsched.schedule import ScheduleState
from rlsched.signals import Run
from rlsched.tensorboard import RunLog
from rlsched.validation import Validation, validated
from rlsched.verdict import Intervention
from rlsched.weights import KeptWeights

if TYPE_CHECKING:
    from rlsched.hyperparameters import ParameterGroups
    from rlsched.meter import Meter
    from rlsched.policy import Policy
    from rlsched.safety import Guard
    from rlsched.snapshots import Snapshot


class TrainingRun(ABC):
    """A run as a user sees it. `Controller` is one, which documents the attributes."""

    optimizer: Optimizer
    options: ScheduleOptions
    policy: Policy
    groups: ParameterGroups
    meter: Meter
    guard: Guard
    log: RunLog
    length: Length
    run: Run
    states: list[ScheduleState]
    windows: list[Window]
    validation: Validation
    kept: KeptWeights
    proposals: list[dict[str, float]]
    skipped: int
    _moving: tuple[str, ...]
    _has_resumed: bool

    @abstractmethod
    def _hold(self) -> None:
        """Work out what holds until the next decision."""

    @property
    def state(self) -> ScheduleState:
        """The first of the states, which all have the same clock."""
        return self.states[0]

    def _set_clock(self, **fields: Any) -> None:
        """Set what all states have in common."""
        self.states = [state._replace(**fields) for state in self.states]

    @abstractmethod
    def _warn(self, what: str, message: str) -> None:
        """Warn once of each `what`."""

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def step_count(self) -> int:
        """Inner steps done."""
        return int(self.state.step)

    @property
    def total_steps(self) -> int | None:
        """Inner steps in the run; None while nobody knows."""
        return self.length.total_steps

    @property
    def proposal(self) -> dict[str, float]:
        """The first of the proposals; empty before there is one."""
        return self.proposals[0] if self.proposals else {}

    @property
    def interventions(self) -> list[Intervention]:
        """What was done to keep the run alive, (step, message) each."""
        return list(self.guard.state.interventions)

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
        self._set_clock(window_end=max(step, min(state.window_end, total_steps)))
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

        By it a run is taken back from overfitting (`undo_overfitting`), and `should_stop` and `best` go by it. A policy
        that was trained to, as the one that ships, looks at it too. It should be of the kind of the training loss.
        Several processes should report the same, or one of them alone: the policy sees the mean over those that have
        the latest, and the others hear of it at the next decision.

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

    def freeze(self) -> FrozenSchedule:
        """The schedule that this run followed, to be replayed without a policy.

        Frozen is what was decided, not what is done beside it: `max_grad_norm`, `lr_bounds`, steps that were left out,
        weights that were rolled back. If decisions are still to come, the last one is held to the end, with a warning.

        Raises:
            ValueError: the run follows a torch scheduler, or is in shadow mode, so that the learning rate was not the
                policy's; or each group has a schedule of its own; or nobody knows how long it is.
        """
        for name, whose in (
            ("follow_scheduler", "a torch scheduler's"),
            ("shadow", "the user's own"),
            ("per_group", "each group's own"),
        ):
            if getattr(self.options, name):
                raise ValueError(f"{name}=True: the learning rate was {whose}, so there is no one schedule to freeze")
        if self.total_steps is None:
            raise ValueError("total_steps=None: what has no end cannot be frozen; finish(steps) gives the run one")
        if self.state.window_end < self.total_steps:
            self._warn(
                "unfinished",
                f"the run is at step {self.step_count} of {self.total_steps}: its last decision is held to the end",
            )
        return FrozenSchedule.of(self.windows, self.groups.bases, self.policy.base_schedule)

    # --- State ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, as bytes. Of a sharded model all ranks have to call this.

        A snapshot is part of it where the run may soon be taken back to it: during the probe, and while the run is not
        well. It is no part of the state of a sharded model.
        """
        return self.packed(self.saved_snapshot())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the run that gave `state_dict` was. If that fails, the controller is as it was.

        Without a snapshot in it one is taken as soon as training goes on, if snapshots are kept: a run that diverges
        later goes back to there.

        A state of a run of another length is extended to the `total_steps` of this one (see `extend`), or goes on to
        its own if this one has none.

        Raises:
            ValueError: the state is of a run with another policy, other controls or decisions, that has done more than
                `total_steps`, of another rlsched, of no controller at all, or something in it cannot be.
        """
        saved = self.unpacked(state_dict)
        if any(saved.exponents):
            raise ValueError("state_dict goes with that of the optimizer beside it: ScheduledOptimizer loads them both")
        self.go_on(saved)

    def saved_snapshot(self) -> Snapshot | None:
        """The snapshot, if it belongs to the state."""
        may_go_back = self.guard.may_go_back(self.state, self.validation)
        return self.guard.snapshot if may_go_back and not self.meter.is_sharded else None

    def packed(self, snapshot: Snapshot | None, exponents: Sequence[int] = ()) -> dict[str, bytes]:
        """The state with this snapshot, beside momentum buffers that are scaled by these powers of two."""
        parts = self.states, self.meter.state(), self.guard.state, self.groups.bases, self.windows, self.skipped
        kept = self.kept.state()
        saved = Saved(*parts, self.total_steps, self.validation, kept, list(exponents), snapshot)
        return packed(saved, self._identity())

    def unpacked(self, state_dict: Mapping[str, Any]) -> Saved:
        """What is in a state; see `load_state_dict` for the errors."""
        memory, model = self.policy.begin(), self.options.model
        saved = unpacked(state_dict, self._identity(), self.optimizer, model=model, memory=memory)
        now, asked = saved.schedule[0], self.total_steps
        records.check(saved.meter, now.window_end - now.window_start, len(saved.schedule))
        self.kept.check(saved.kept)
        if asked is not None and asked != saved.total_steps and asked < now.step:
            raise ValueError(f"state_dict is of a run that has done {now.step} steps, this one has total_steps={asked}")
        return saved

    def go_on(self, saved: Saved) -> None:
        """Go on from a state that was unpacked, to the end that this run was to have."""
        asked, base, last = self.total_steps, self.policy.base_schedule, saved.windows[-1]
        self.kept.load(saved.kept)  # which ranks do together
        self.states, self.windows, self.skipped = saved.schedule, saved.windows, saved.skipped
        self.guard.state, self.guard.snapshot = saved.guard, saved.snapshot
        self.validation = saved.validation
        base = base if saved.total_steps is None else replace(base, knots=last.knots)
        self.length = self.length._replace(total_steps=saved.total_steps, schedule=base)
        self.run = self.length.measured(self.run, last.start)
        self.meter.interval = self.run.interval
        self.meter.load(saved.meter, self._parameters()[0].device)
        self.groups.load(saved.bases)
        if asked is not None:
            self._end_at(asked)
        self._hold()
        self._has_resumed = True

    def _identity(self) -> dict[str, Any]:
        """What two runs must have in common for one to go on where the other was."""
        decisions, policy = self.length.decisions, self.policy.digest
        per_group, controls = self.options.per_group, list(self._moving)
        return {"decisions": decisions, "policy": policy, "controls": controls, "per_group": per_group}

    def __getstate__(self) -> dict[str, Any]:
        guard = copy.copy(self.guard)
        guard.snapshot = self.saved_snapshot()
        return {**self.__dict__, "_handles": [], "guard": guard}
