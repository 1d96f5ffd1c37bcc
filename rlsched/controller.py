"""The controller: measures a training run, asks the policy, and sets the optimizer's hyperparameters."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer

from rlsched import distributed, per_group, schedule
from rlsched.control import CONTROLS, LR
from rlsched.figures import figures_of
from rlsched.half_precision import HalfPrecision
from rlsched.hyperparameters import ParameterGroups
from rlsched.length import Length
from rlsched.meter import Meter
from rlsched.notices import warn
from rlsched.number import Number
from rlsched.options import ScheduleOptions, shows_options
from rlsched.safety import Guard
from rlsched.signals import Run
from rlsched.summary import summarise, whole
from rlsched.tensorboard import RunLog
from rlsched.training_run import TrainingRun
from rlsched.validation import agreed, unseen
from rlsched.weights import KeptWeights

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from typing_extensions import Unpack

    from rlsched.options import Options


ATTACHED = "_rlsched_is_attached"  # attribute of an optimizer


def refuse_attached(optimizer: Optimizer) -> None:
    """Refuse an optimizer that a controller drives already."""
    if ATTACHED in vars(optimizer):
        raise ValueError("optimizer is driven by rlsched.attach already: call detach() of its controller first")


class Controller(TrainingRun):
    """Drives one optimizer. `ScheduledOptimizer` and `attach` are its two faces; the former documents the arguments.

    Attributes:
        optimizer: the optimizer that it drives.
        options: the arguments.
        policy: what decides, loaded.
        log: who hears of it, a `RunLog`. Its `listeners` are called as `listener(step, figures)` at each decision.
        length: how long the run is, a `Length`.
        run: what is known of it before it starts, its length and that of its windows as they are now.
        states: where its schedule is: one `ScheduleState` for all parameter groups, or with `per_group` one for each;
            `state` is the first of them.
        groups: the optimizer's hyperparameters, a `ParameterGroups`: as the user gave them, and as decided.
        meter: what is measured of the inner steps, a `Meter`.
        guard: what keeps the run alive, a `Guard`.
        windows: what held from one decision to the next, so far, under the first state.
        validation: what is known of the validation losses, a `Validation`.
        kept: copies of the weights, a `KeptWeights`.
        proposals: the hyperparameters of each group by control, as last decided, or where all groups have one state, of
            the first group alone; `proposal` is the first of them.
        skipped: calls of step without any gradient.
        is_prepared: whether a `Population` has prepared the step to come.
    """

    @shows_options()
    def __init__(self, optimizer: Optimizer, **options: Unpack[Options]) -> None:
        self.options = given = ScheduleOptions(**options)
        self.optimizer = optimizer
        self.policy = given.loaded_policy()
        self.log = RunLog(given.log_dir, given.writer, getattr(self.policy, "trace", None))
        self.is_prepared = False
        self._halves = HalfPrecision()
        self._warned: set[str] = set()
        self._handles: list[RemovableHandle] = []
        self._scales_by_itself = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        self.begin(given.total_steps)

    def begin(self, total_steps: int | None) -> None:
        """A run that is yet to start, of the optimizer as it is."""
        given, optimizer = self.options, self.optimizer
        self.groups = ParameterGroups(
            optimizer, lr_bounds=given.lr_bounds, follow_scheduler=given.follow_scheduler, watches=given.shadow
        )
        traits, bases = self.groups.traits, self.groups.bases
        if not given.shadow and not any(base[LR.name] for base in bases):
            raise ValueError("optimizer: the learning rate is 0 in every parameter group, so there is none to schedule")
        trust = given.trust or traits.trust
        adaptive, sums = 1 if traits.adaptive else -1, int(traits.sums_gradients)
        self.length = Length(total_steps, given.decisions, self.policy.base_schedule)
        self.run = self.length.measured(Run(0, 0, adaptive, sums, math.log(trust)), 0)
        chosen = set(self.policy.controls) & set(given.controls)
        own = bases if given.per_group else bases[:1]  # base values of each state
        self._moving = tuple(n for n, c in CONTROLS.items() if n in chosen and any(c.can_move(b[n]) for b in own))
        self._written = () if given.shadow else self._moving
        if not given.shadow:
            others = {LR.name} if given.follow_scheduler else set()  # which a scheduler sets then
            self.groups.driven = frozenset({*self._moving, LR.name}) - others
        self.meter = Meter(
            self.run.interval,
            has_momentum=any(base["momentum"] > 0 for base in own),
            max_grad_norm=given.max_grad_norm,
            watches=given.shadow,
        )
        self.guard = Guard(
            optimizer,
            self.meter,
            on_divergence=None if given.shadow else given.on_divergence,
            undo_overfitting=given.undo_overfitting,
            snapshots=given.snapshots,
            model=given.model,
            max_update_ratio=given.max_update_ratio,
            moves_lr=LR.name in self._moving,
            acts=bool(self._moving),
            log=self.log,
        )
        probing = self.policy.safe_start * (LR.name in self._written and not traits.own_scale)
        self.states = per_group.begin(self.run, own, self.policy, probing=probing)
        self.validation = unseen()
        self.kept = KeptWeights(optimizer, keep_best=given.keep_best, averaging=given.averaging)
        self.skipped = 0
        self.proposals: list[dict[str, float]] = []
        self._has_resumed = False  # and no step has begun since
        self._hold()
        self.windows = []
        self._note_window()

    @property
    def equivalent_lr(self) -> float:
        """Learning rate of the first group as it would be at the base momentum, see `ParameterGroups.equivalent_lr`."""
        return self.equivalent_lrs[0]

    @property
    def equivalent_lrs(self) -> list[float]:
        """The same of each group that has a state of its own."""
        return [self.groups.equivalent_lr(i, state, self._decay()) for i, state in enumerate(self.states)]

    # --- What a training loop calls ---------------------------------------------------------------------------------

    def observe(self, loss: Tensor | float) -> None:
        """Report the loss of the step to come: once, or once per micro-batch (the step then sees their mean)."""
        self.meter.report(loss)

    @torch.compiler.disable
    def prepare_step(self, loss: Tensor | float | None = None) -> None:
        """Measure the gradients, clip them, and set the hyperparameters of the step to come."""
        if not self.is_prepared:
            per_group.alone(self.policy, self.preparing(loss))

    def preparing(self, loss: Tensor | float | None) -> per_group.Deciding[None]:
        """The same in two halves, between which the policy is asked."""
        self.kept.refuse_to_train()
        if loss is not None:
            self.meter.report(loss)
        parameters = self._parameters()
        grads = self.meter.local_grads(parameters)
        if loss is None and self.groups.would_only_create_state(grads):
            return
        if not grads:
            self.meter.forget_losses()
            self.skipped += 1
            self._warn("no gradients", "no parameter has a gradient, so nothing is trained: was backward() called?")
            return
        if self.groups.adopt():
            self._hold()
        sizes = [len(group["params"]) for group in self.optimizer.param_groups] if self.options.per_group else ()
        whole_loss, norm = self.meter.loss_and_norm(parameters, grads, sizes)
        if self.meter.parts > 1 and "parts" not in self._warned:
            self._warned.add("parts")
            message = f"losses are quotients, of {self.meter.parts} backward passes: multiplied by {self.meter.parts}"
            self.guard.intervene(self.step_count, message, kind="loss", level=logging.INFO)
        if schedule.is_decision_due(self.run, self.state):
            yield from self._decide(whole_loss)
        state, restored_at = self.state, self.guard.state.restored_at
        if state.step == 0 and (state.probing or self.guard.keeps_snapshots):
            self.guard.take_snapshot(self.states)
        elif self._has_resumed and not state.probing and self.guard.snapshot is None:
            self.guard.consider_snapshot(self.run, self.states, whole_loss, self.validation)
        self._has_resumed = False
        if not self.options.shadow:
            self._set_hyperparameters()
        if state.step == restored_at:  # the gradients are of weights that are no more
            self.meter.skip_step()
            self.kept.average_anew()
            for p in parameters:
                p.grad = None
            return
        is_last = state.window_end >= self.run.total_steps  # nobody looks at the last window
        buffers, multiple = self.groups.momentum_buffers, self.groups.clip
        measured = parameters, grads, whole_loss, norm
        self.meter.begin_step(*measured, state, is_last=is_last, buffers=buffers, multiple=multiple)
        if not self.options.shadow:
            self._halves.before_step(parameters)

    @torch.compiler.disable
    def finish_step(self) -> None:
        """Measure what the step did to the weights. Call after each step that `prepare_step` preceded."""
        self._halves.after_step(self.optimizer)
        if self.meter.finish_step():
            self._set_clock(step=self.state.step + 1)
            self.groups.after_step()
            self.kept.after_step()
        if self.state.step == self.run.total_steps:
            self.log.close()

    @torch.compiler.disable
    def zero_nonfinite_grads(self) -> None:
        """Zero all gradients unless they are finite: those of an evaluation in the midst of a step."""
        if not self.options.shadow:
            self.meter.zero_nonfinite_grads(self._parameters())

    # --- Deciding ---------------------------------------------------------------------------------------------------

    def _decide(self, loss: Number | None) -> per_group.Deciding[None]:
        run = self.run = self.length.measured(self.run, self.step_count)
        before, guard, groups = self.states, self.guard, self.groups
        windows = self.meter.windows(self.step_count - self.state.window_start)
        window = windows[0]
        if self.state.probing:
            before = self.states = guard.judge_probe(run, before, windows)
            if self.state.probing:
                return self._open_window(1)
        summaries = list(map(summarise, windows))
        summary = whole(summaries)
        if not self.meter.loss_was_reported and math.isnan(summary.loss):  # nor on another rank
            self._warn(
                "no loss",
                "no loss was reported, so the schedule follows the gradients alone: pass step(loss=loss) or a closure",
            )
        if any(loss <= 0 for loss in window.loss):
            self._warn(
                "no logarithm",
                "a loss is zero or negative, and has no logarithm: such a step counts as one without a loss",
            )
        if self.options.shadow:
            decay = self._decay()
            before = [s._replace(control=groups.states_in_use(i, s, decay)) for i, s in enumerate(before)]
        self.validation = agreed(distributed.of_all_ranks(self.validation, self._parameters()[0].device))
        moving = [self._moving]
        if self.options.per_group:
            moving = [tuple(n for n in self._moving if CONTROLS[n].can_move(base[n])) for base in groups.bases]
        decisions = yield from per_group.decide(self.policy, run, before, summaries, self.validation, moving)
        states = [decision.state for decision in decisions]
        if guard.moves_lr:
            whose = [f"group {name}: " for name in groups.names] if self.options.per_group else [""]
            states = list(map(guard.bound_lr, states, before, summaries, whose))
        states, filled, diverges = guard.answer_divergence(run, states, before, windows, summary, self.validation)
        if "momentum" in self._written:
            groups.rescale_buffers(run, filled, states)
        if not diverges:
            guard.consider_snapshot(run, states, loss, self.validation)
        self.states = states
        self._open_window(run.interval)
        base_lrs = [groups.lr_of_base_schedule(i, self._decay()) for i in range(len(states))]
        proposed = [{**groups.decided[i], LR.name: groups.lr(i, base_lr)} for i, base_lr in enumerate(base_lrs)]
        self.proposals = [{name: values[name] for name in self.policy.controls} for values in proposed]
        self.log.record(self, summary, decisions)
        if self.log.is_heard:
            told = figures_of(self, summaries, summary, decisions, base_lrs, self._written)
            self.log.decision(self.step_count, told)

    def _open_window(self, length: int) -> None:
        self.meter.clear(self.run.interval)
        self.states = [schedule.open_window(self.run, state, length) for state in self.states]
        self._hold()
        self._note_window()

    def _hold(self) -> None:
        """Work out what holds until the next decision."""
        self.meter.learn_ranks(self._parameters())
        if self.options.per_group:
            per_group.check(self.optimizer.param_groups, self.meter.is_sharded)
            new = self.groups.bases[len(self.states) :]
            self.states += [per_group.join(self.run, self.state, base, self.policy) for base in new]
        self.groups.decide(self.run, self.states)

    def _decay(self) -> float:
        """The base schedule's factor on the base learning rate."""
        return schedule.decay(self.run, self.state, self.length.base_schedule, self.state.step)

    def _set_hyperparameters(self) -> None:
        if self.step_count == self.run.total_steps + self.length.margin():
            self._warn(
                "too long",
                f"training goes on after total_steps={self.total_steps}: the learning rate stays where it ended; "
                "extend(total_steps) gives the run another length",
            )
        usual_decay = self.policy.base_schedule.factor(self.step_count, self.run.total_steps)
        if self.groups.write(self._decay(), self._written, usual_decay):
            self._warn(
                "scheduler",
                "a torch scheduler, or other code, has changed the learning rate, which has no effect: take it away, "
                "or let the policy modulate it by follow_scheduler=True",
            )

    # --- After the run ----------------------------------------------------------------------------------------------

    def detach(self) -> None:
        """Undo `attach`: take the hooks off the optimizer, and give it back to whoever goes on without a schedule.

        Learning rate, momentum and weight decay are the user's own again, but for a learning rate that follows a
        scheduler, which stays where that has it; and a momentum that sums gradients is rescaled to theirs.
        """
        if self._handles:
            self.give_back()
        for handle in self._handles:
            handle.remove()
        if self._handles and self._scales_by_itself:
            self.optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
        vars(self.optimizer).pop(ATTACHED, None)
        self._handles = []

    def give_back(self) -> None:
        """End the schedule of an optimizer, as `detach` does; to step on under it is an error from then on."""
        self.meter.detach()
        if not self.options.shadow:
            self.groups.give_back()

    def __repr__(self) -> str:
        values = {name: "/".join(f"{each[name]:.4g}" for each in self.proposals) for name in self.proposal}
        now = ", ".join(f"{name}={value}" for name, value in values.items())
        base, used = self.groups.bases[0]["momentum"], self.proposal.get("momentum")
        is_one = used is not None and len(self.proposals) == 1
        if is_one and used != base and self.groups.traits.sums_gradients:
            now += f" (as lr={self.equivalent_lr:.4g} is at a momentum of {base:.4g})"
        mode = "shadow, " if self.options.shadow else "probing, " if self.state.probing else ""
        steps = "unknown" if self.total_steps is None else self.total_steps
        return (
            f"Controller(step {self.step_count} of {steps}, {mode}{len(self.windows) - 1} decisions"
            f"{': ' + now if now else ''}, {len(self.interventions)} interventions, {self.policy!r})"
        )

    def _warn(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warn(message)
