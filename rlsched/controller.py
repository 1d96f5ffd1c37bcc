"""The controller: measures a training run, asks the policy, and sets the optimizer's hyperparameters."""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rlsched import control, distributed, moments, safety, sampling, signals
from rlsched.control import CLIP, CONTROL_NAMES, LR, MOMENTUM
from rlsched.frozen import FrozenSchedule, Window
from rlsched.hyperparameters import Hyperparameters
from rlsched.moments import Moments
from rlsched.policy import SchedulePolicy
from rlsched.safety import ANSWERS, SNAPSHOT_INTERVAL, DivergenceError, Guard, Intervention, Snapshot
from rlsched.sampling import Sample
from rlsched.signals import OBSERVATION_NAMES, History, Run
from rlsched.tensorboard import RunLog

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from torch.utils.tensorboard.writer import SummaryWriter

NEVER = -1  # the next decision, after the last one
MAX_PROBES = 20  # inner steps, until one of them is finite and small enough
LARGEST = torch.finfo(torch.float32).max  # number in a record
LOGGER = logging.getLogger("rlsched")

STATE_KEY = "rlsched"  # of a controller's state, as bytes; what follows are the keys in it
SCALARS = (
    "step_count",
    "window_start",
    "window_length",
    "next_decision",
    "skipped",
    "probing",
    "restored_at",
    "lr_offset",
)
TENSORS = ("control_state", "base_state", "window", "average_norm", "last_grad")
HYPERPARAMETERS, GUARD, HISTORY, LOSSES = "hyperparameters", "guard", "history", "losses"
INTERVENTIONS, CONTROL_PATH = "interventions", "control_path"
TOTAL_STEPS, INTERVAL, CONTROLS, POLICY = "total_steps", "interval", "controls", "policy"


class Controller:
    """Drives one optimizer. `ScheduledOptimizer` and `attach` are its two faces; both document the arguments."""

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        total_steps: int,
        policy: str | Path | SchedulePolicy = "default",
        controls: Sequence[str] = CONTROL_NAMES,
        decisions: int = 100,
        max_grad_norm: float | None = None,
        follow_scheduler: bool = False,
        on_divergence: str | None = "cut",
        lr_bounds: tuple[float, float] = (0.0, math.inf),
        max_update_ratio: float = 3.0,
        shadow: bool = False,
        log_dir: str | Path | None = None,
        writer: SummaryWriter | None = None,
    ) -> None:
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps <= 0:
            raise ValueError(f"total_steps must be a positive int, the number of optimizer steps, got {total_steps!r}")
        if decisions <= 0:
            raise ValueError(f"decisions must be positive, got {decisions!r}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive or None, got {max_grad_norm!r}")
        if on_divergence not in ANSWERS:
            raise ValueError(f"on_divergence must be one of {ANSWERS}, got {on_divergence!r}")
        if not (len(lr_bounds) == 2 and 0 <= lr_bounds[0] <= lr_bounds[1]):
            raise ValueError(f"lr_bounds must be (lowest, highest) with 0 <= lowest <= highest, got {lr_bounds!r}")
        if not max_update_ratio > 0:
            raise ValueError(f"max_update_ratio must be positive, got {max_update_ratio!r}")
        if isinstance(controls, str) or not set(controls) <= set(CONTROL_NAMES):
            raise ValueError(f"controls must be some of {CONTROL_NAMES}, got {controls!r}")
        if shadow and follow_scheduler:
            raise ValueError("follow_scheduler: in shadow mode nothing is set, and so nothing can follow")
        if not all("lr" in group for group in optimizer.param_groups):
            raise ValueError(
                f"optimizer: {type(optimizer).__name__} has parameter groups without 'lr', so there is no learning "
                "rate to schedule"
            )
        if not isinstance(policy, SchedulePolicy):
            policy = SchedulePolicy.load(policy)
        self.optimizer = optimizer
        self.total_steps = total_steps
        self.interval = control.decision_interval(total_steps, decisions)
        self.policy = policy
        self.controls = tuple(name for name in CONTROL_NAMES if name in controls)
        self.max_grad_norm = max_grad_norm
        self.on_divergence = None if shadow else on_divergence
        self.max_update_ratio = max_update_ratio
        self.shadow = shadow
        self.interventions: list[Intervention] = []
        self.proposal: dict[str, float] = {}  # lr and momentum of the first group, clip multiple: as last decided
        self.log = RunLog(log_dir, writer)

        self.step_count = 0  # inner steps done
        self.skipped = 0  # calls of step without any gradient
        self.window_start, self.window_length = 0, 1  # the first step is a window of its own
        self.next_decision = 1 if total_steps > 1 else NEVER
        self.average_norm: Tensor | None = None  # 0-d, on the parameters' device, like all that is measured
        self.window: Tensor | None = None  # (interval, columns of `sampling`)
        self.hyperparameters = Hyperparameters(optimizer, lr_bounds=lr_bounds, follow_scheduler=follow_scheduler)
        self.base_state = control.initial_state(_host(self.hyperparameters.first_momentum))
        self.control_state = self.base_state.clone()
        self.lr_offset = 0.0  # added to the lr control's state, where that does not reach low enough
        self.history = signals.start(device=self.base_state.device)
        self._mask = _host([float(name in self.controls) for name in CONTROL_NAMES])
        if self.hyperparameters.first_momentum == 0:
            self._mask[MOMENTUM] = 0
        self._moves_momentum = bool(self._mask[MOMENTUM]) and not shadow
        self.probing = policy.safe_start and bool(self._mask[LR]) and not shadow
        self.guard = Guard()
        self._keeps_snapshots = self.on_divergence == "rollback"
        self._snapshot: tuple[Snapshot, Tensor, History, Tensor, dict[str, float]] | None = None
        self.restored_at = -1  # inner step whose gradients are of weights that were taken back
        adaptive = 1 if self.hyperparameters.is_adaptive else -1
        self._run = Run(*(_host(float(x)) for x in (total_steps, self.interval, adaptive)))
        self._sample: Sample | None = None
        self._last_grad: Tensor | None = None  # of a sample that is yet to be made
        self._losses: list[Tensor | float] = []
        self._loss_was_reported = False
        self._warned: set[str] = set()
        self._record: Tensor | None = None  # row of the window, of a step that is under way
        self._measured = False  # whether that step's direction and update are
        self._handles: list[RemovableHandle] = []
        self._scales_by_itself = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        self._apply()
        self.control_path = [self._place()]  # of each window

    # --- What a training loop calls ---------------------------------------------------------------------------------

    def observe(self, loss: Tensor | float) -> None:
        """Report the loss of the step to come: once, or once per micro-batch (the step then sees their mean)."""
        if not isinstance(loss, Tensor):
            loss = float(loss)
        elif loss.numel() != 1:
            raise ValueError(f"loss must be one number, got a tensor of shape {tuple(loss.shape)}")
        else:
            loss = loss.item() if safety.on_host(loss) else loss.detach().reshape(())
        self._losses.append(loss)

    @torch.compiler.disable
    def before(self, loss: Tensor | float | None = None) -> None:
        """Measure the gradients, clip them, and set the hyperparameters of the step to come."""
        if loss is not None:
            self.observe(loss)
        parameters = self._parameters()
        grads = [p.grad for p in parameters if p.grad is not None]
        if self._shares is not None:
            grads = [distributed.local(grad) for grad in grads]
        if loss is None and self._only_creates_state(grads):
            return
        losses, self._losses = self._losses, []
        if not grads:
            self.skipped += 1
            self._warn("no gradients", "no parameter has a gradient, so nothing is trained: was backward() called?")
            return
        if any(grad.is_sparse for grad in grads):
            raise ValueError("optimizer: sparse gradients are not supported; use Embedding(..., sparse=False)")
        if self.window is None or self.average_norm is None:
            like: dict[str, Any] = {"dtype": torch.float32, "device": grads[0].device}
            self.window = torch.full((self.interval, sampling.COLUMNS), torch.nan, **like)
            self.average_norm = torch.full((), torch.nan, **like)
        if self.hyperparameters.adopt_groups():
            self._apply()
        self._loss_was_reported |= bool(losses)
        # On the CPU these are floats: reading a number is free there, and tensors of one number are slow.
        loss, norm = _mean(losses, self.window.device), _total_norm(grads, self._shares_of_grads(parameters))
        if self._ranks > 1:
            common: dict[str, Any] = {"sharded": self._shares is not None, "device": self.window.device}
            loss, norm = distributed.whole_step(loss, norm, reported=bool(losses), **common)
        if self.step_count == self.next_decision:
            self._decide(loss)
        if self.step_count == 0 and (self.probing or self._keeps_snapshots):
            self._take_snapshot()
        if not self.shadow:
            self._set_hyperparameters()

        column = self.step_count - self.window_start
        self._record = record = self.window[column % self.interval]
        if self.step_count == self.restored_at:  # the gradients are of weights that are no more
            self._measured = False
            for p in parameters:
                p.grad = None
            return
        cells: Any = record
        finite: Tensor | bool
        if isinstance(norm, Tensor):
            finite = (loss + norm).isfinite()
        else:
            cells = record.numpy()
            finite = abs(float(loss)) + norm <= LARGEST
            if not finite:
                loss = norm = math.nan
        if not self.shadow:
            safety.zero_unless(finite, grads)
        cells[sampling.LOSS], cells[sampling.GRAD_NORM] = loss, norm

        measures = self.next_decision != NEVER  # nobody looks at the last window
        self._measured = measures and moments.is_measured(column, self.window_length)
        if measures and moments.is_measured(column + 1, self.window_length):
            if self._sample is None or not self._sample.is_of(parameters):
                self._sample = Sample(parameters, self.last_grad)
            self._sample.take_grad()
            if self._measured:
                if self.hyperparameters.first_momentum > 0:
                    self._sample.take_momentum(self.hyperparameters.buffers(self._sample.chosen))
                self._sample.take_weights()
        cells[sampling.CLIP] = 1.0 if self.shadow else self._clip(grads, norm, finite)

    @torch.compiler.disable
    def after(self) -> None:
        """Measure what the step did to the weights. Call after each step that `before` preceded."""
        if self._record is not None:
            if self._measured and self._sample is not None:
                self._sample.finish(self._record)
            self._record = None
            self.step_count += 1
            self.hyperparameters.after_step()
        if self.step_count == self.total_steps:
            self.log.close()

    @torch.compiler.disable
    def zero_nonfinite_grads(self) -> None:
        """Zero all gradients unless they are finite: those of an evaluation in the midst of a step."""
        grads = [p.grad for p in self._parameters() if p.grad is not None]
        if grads and not self.shadow and self._shares is None:
            norm = _total_norm(grads, None)
            safety.zero_unless(norm.isfinite() if isinstance(norm, Tensor) else math.isfinite(norm), grads)

    # --- State ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, as bytes under "rlsched".

        Checkpoints of torch.distributed ask a fresh controller for the names and shapes of what they load. Those of a
        run in progress are others: bytes have none. Of a model that is sharded all ranks have to call this.
        """
        state = {name: getattr(self, name) for name in (*SCALARS, *TENSORS)}
        if self._shares is not None:
            state["window"] = None if self.window is None else self._whole_window()
            state["last_grad"] = None if self.last_grad is None else distributed.merged(self.last_grad)
        state = {name: v.clone() if isinstance(v, Tensor) else v for name, v in state.items()}  # a view saves its base
        state[HISTORY], state[LOSSES] = torch.stack(self.history), [float(loss) for loss in self._losses]
        state |= {HYPERPARAMETERS: self.hyperparameters.state_dict(), GUARD: self.guard.state_dict()}
        state |= {CONTROL_PATH: self.control_path, INTERVENTIONS: [tuple(i) for i in self.interventions]}
        file = io.BytesIO()
        torch.save({**state, **self._identity()}, file)
        return {STATE_KEY: file.getvalue()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the run that gave `state_dict` was.

        Snapshots are not in the state: the next one is taken at a decision that finds the run well, and a probe that
        has gone too far just before is not undone.

        Raises:
            ValueError: the state is of a run with another policy, other controls, total_steps or decisions, or of no
                controller at all.
        """
        if not state_dict.get(STATE_KEY):
            raise ValueError(f"state_dict has no {STATE_KEY!r}, so it is not of a rlsched.Controller")
        state_dict = torch.load(io.BytesIO(state_dict[STATE_KEY]), map_location="cpu", weights_only=True)
        for name, value in self._identity().items():
            if state_dict[name] != value:
                raise ValueError(f"state_dict is of a run with {name}={state_dict[name]!r}, this one has {value!r}")
        device = self._parameters()[0].device
        for name in SCALARS:
            setattr(self, name, state_dict[name])
        for name in TENSORS:
            value = state_dict[name]
            where = torch.device("cpu") if name in ("control_state", "base_state") else device
            setattr(self, name, None if value is None else value.to(where))
        if self.window is not None and self._shares is not None:
            self.window = distributed.own_window(self.window, sampling.PRODUCTS)
        self.history = History(*state_dict[HISTORY].unbind())
        self.hyperparameters.load_state_dict(state_dict[HYPERPARAMETERS])
        self.guard.load_state_dict(state_dict[GUARD])
        self.control_path = state_dict[CONTROL_PATH]
        self.interventions = [Intervention(*i) for i in state_dict[INTERVENTIONS]]
        self._snapshot = None
        self._losses = state_dict[LOSSES]
        self._apply()

    @property
    def last_grad(self) -> Tensor | None:
        """The sample of the gradient that the next one is compared with."""
        return self._last_grad if self._sample is None else self._sample.last_grad

    @last_grad.setter
    def last_grad(self, value: Tensor | None) -> None:
        self._last_grad, self._sample = value, None

    def _identity(self) -> dict[str, Any]:
        """What two runs must have in common for one to go on where the other was."""
        return {
            TOTAL_STEPS: self.total_steps,
            INTERVAL: self.interval,
            CONTROLS: list(self.controls),
            POLICY: self.policy.digest,
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": [], "_sample": None, "_snapshot": None, "_last_grad": self.last_grad}

    def freeze(self) -> FrozenSchedule:
        """The schedule that this run followed, to be replayed without a policy.

        Frozen is what was decided, not what is done beside it: `max_grad_norm`, `lr_bounds`, steps that were left out
        since they were not finite, weights that were rolled back. Of a run with decisions still to come, the last one
        is held to the end, with a warning.

        Raises:
            ValueError: the run follows a torch scheduler, or is in shadow mode, so that the learning rate was not the
                policy's.
        """
        if self.hyperparameters.follow_scheduler:
            raise ValueError(
                "follow_scheduler=True: the learning rate is a torch scheduler's times the policy's factor, and is no "
                "schedule of its own to freeze"
            )
        if self.shadow:
            raise ValueError(
                "shadow=True: the run followed another schedule than the policy's, so there is none to freeze"
            )
        if self.next_decision != NEVER:
            self._warn(
                "unfinished",
                f"the run is at step {self.step_count} of {self.total_steps}: its last decision is held to the end",
            )
        windows = []
        for step, lr, momentum, clip in self.control_path:
            moved = self._moved(momentum)
            momentum = self.hyperparameters.momentum(0, moved) if self.hyperparameters.first_momentum > 0 else 0.0
            windows.append(Window(int(step), math.exp(lr), momentum, float(control.clip_multiple(_host(clip)))))
        return FrozenSchedule.of(windows, self.total_steps, self.hyperparameters.base_lrs)

    def detach(self) -> None:
        """Undo `attach`: take the hooks off the optimizer, and leave its hyperparameters where they are."""
        for handle in self._handles:
            handle.remove()
        if self._handles and self._scales_by_itself:
            self.optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
        self._handles = []

    # --- Deciding ---------------------------------------------------------------------------------------------------

    def _decide(self, loss: Tensor | float) -> None:
        assert self.window is not None
        # The only place where the host waits for an accelerator.
        window = sampling.moments_of(self._whole_window()[: self.window_length].cpu())
        if self.hyperparameters.first_momentum == 0:  # there is only the last gradient to agree with
            window = window._replace(momentum_cosine=window.grad_cosine)
        if self.probing and self._must_probe_again(window):
            self._open_window(1)
            return
        self.probing = False
        if not self._loss_was_reported and window.loss.isnan().all():  # nor on another rank
            self._warn(
                "no loss",
                "no loss was reported, so the schedule follows the gradients alone: pass step(loss=loss) or a closure",
            )
        step = _host(float(self.step_count))
        if self.shadow:
            self.control_state = self._state_in_use()
        before = self.control_state
        with torch.inference_mode():  # a quarter faster
            observation, self.history = signals.observe(window, self._run, self.history, step, before)
            influence = self.policy.influence(observation)
        action = self.policy.act(observation) * influence * self._mask if self.controls else torch.zeros_like(before)
        self.control_state = control.move(before, action, step / self.total_steps, self.base_state)
        if self._mask[LR]:
            self._bound_lr(before, window)
        buffers_at = float(before[MOMENTUM])  # momentum that the optimizer's buffers were filled with
        reason = self.guard.why_diverged(window)
        if reason is not None:
            buffers_at = self._answer_divergence(reason, before)
        else:
            self._note_nonfinite(window)
        if self._moves_momentum:
            old, new = self._moved(buffers_at), self._moved(float(self.control_state[MOMENTUM]))
            self.hyperparameters.rescale_buffers(old, new)
        if reason is None and self._is_time_for_a_snapshot() and self.guard.is_well(float(loss)):
            self._take_snapshot()
        self._open_window(self.interval)
        self._log_decision(window, observation, action, float(influence))

    def _open_window(self, length: int) -> None:
        assert self.window is not None
        self.window.fill_(torch.nan)
        self.window_start, self.window_length = self.step_count, length
        self.next_decision += length
        if self.next_decision >= self.total_steps:  # the last window takes what is left, and nothing follows it
            self.next_decision = NEVER
        self._apply()
        self.control_path.append(self._place())

    def _log_decision(self, window: Moments, observation: Tensor, action: Tensor, influence: float) -> None:
        fallback = lr = float(self.optimizer.param_groups[0]["lr"])
        if not self.hyperparameters.follow_scheduler:
            fallback = self.hyperparameters.base_lrs[0] * self._schedule()
        self.proposal = {
            "lr": self.hyperparameters.lr(fallback),
            "momentum": self.hyperparameters.momenta[0],
            "clip_multiple": self._multiple,
        }
        if self.log.writer is None:
            return
        scalars = {f"observation/{n}": v for n, v in zip(OBSERVATION_NAMES, observation.tolist(), strict=True)}
        scalars |= {f"action/{n}": v for n, v in zip(CONTROL_NAMES, action.tolist(), strict=True)}
        scalars |= {f"rlsched/{'proposed_' if self.shadow else ''}{name}": v for name, v in self.proposal.items()}
        scalars |= {
            "rlsched/loss": float(window.loss.nanmean()),
            "rlsched/grad_norm": float(window.grad_norm.nanmean()),
            "rlsched/fallback_lr": fallback,
            "rlsched/influence": influence,
        }
        if self.shadow:
            scalars["rlsched/lr"] = lr
        self.log.decision(self.step_count, {tag: v for tag, v in scalars.items() if math.isfinite(v)})

    # --- Keeping it safe --------------------------------------------------------------------------------------------

    def _must_probe_again(self, window: Moments) -> bool:
        """Judge the probe: start at the learning rate that it allows, unless it told nothing or itself went too far."""
        momentum = self.hyperparameters.first_momentum if self.hyperparameters.sums_gradients else 0.0
        offset = control.safe_offset(window.predicted_decrease[-1], window.update_ratio[-1], _host(1 / (1 - momentum)))
        is_finite = bool(window.grad_norm[-1].isfinite())
        low = control.CONTROLS[LR].low
        went_too_far = is_finite and bool(offset < low)
        self._note_nonfinite(window)
        if went_too_far:
            self.lr_offset += math.log(control.PROBE)
            offset = offset - math.log(control.PROBE)
            self._intervene(f"a step at {control.PROBE:.0e} of the lr went too far: undone, the lr scaled by as much")
        if went_too_far or not is_finite:
            if self._snapshot is not None and self.window_start != self.restored_at:
                self._restore()
            needed = 2 if went_too_far else 1  # steps: one that moves nothing, and the probe
            if self.step_count + needed < min(MAX_PROBES, self.total_steps):
                return True
            if offset.isfinite():  # there is no time to find out: believe it, beyond the reach of the control too
                self.lr_offset += min(0.0, float(offset) - low)
        if offset < 0:
            factor = max(offset.exp().item(), control.PROBE)
            self._intervene(f"a step at the full lr would go too far: scaled by {factor:.2g}", logging.INFO)
        self.control_state = control.safe_start(self.control_state, offset)
        if not self._keeps_snapshots:
            self._snapshot = None
        return False

    def _bound_lr(self, before: Tensor, window: Moments) -> None:
        """Hold the lr control below the guard's ceiling, and updates below their bound."""
        log_ratio, lr = float(window.update_ratio.log().nanmean()), float(before[LR])
        room = math.log(self.max_update_ratio) - log_ratio
        if room < 0:
            self._intervene(f"updates have {math.exp(log_ratio):.2g} times the norm of the weights: lr scaled down")
        highest = self.guard.ceiling if math.isnan(room) else min(self.guard.ceiling, lr + room)
        self.control_state[LR].clamp_(max=max(highest, control.CONTROLS[LR].low))

    def _answer_divergence(self, reason: str, before: Tensor) -> float:
        """Do what `on_divergence` says, and return the momentum state that the optimizer's buffers were filled with."""
        buffers_at = before[MOMENTUM]
        if self.on_divergence is None:
            self._intervene(f"{reason}: nothing is done about it")
        elif self.on_divergence == "raise":
            raise DivergenceError(f"at step {self.step_count}, {reason}")
        else:
            answer = []
            if self._keeps_snapshots and self._snapshot is not None:
                buffers_at = self._restore()[MOMENTUM]
                answer.append("rolled back")
            if self._mask[LR]:
                lr, rest = self.guard.cut(float(before[LR]))
                self.control_state[LR] = lr
                self.lr_offset += rest
                answer.append("lr cut to a tenth")
            self._intervene(f"{reason}: {' and '.join(answer) or 'nothing is done, as lr is not among the controls'}")
        return float(buffers_at)

    def _is_time_for_a_snapshot(self) -> bool:
        is_due = self._snapshot is None or (self.step_count // self.interval) % SNAPSHOT_INTERVAL == 0
        return self._keeps_snapshots and is_due

    def _take_snapshot(self) -> None:
        assert self.average_norm is not None
        average_norm, guard = self.average_norm.clone(), self.guard.state_dict()
        self._snapshot = Snapshot(self.optimizer), self.control_state, self.history, average_norm, guard

    def _restore(self) -> Tensor:
        """Go back to the snapshot, and return the control state that it was taken under."""
        assert self._snapshot is not None and self.average_norm is not None
        snapshot, state, self.history, average_norm, guard = self._snapshot
        self.guard.load_state_dict({**guard, "ceiling": self.guard.ceiling})
        snapshot.restore(self.optimizer)
        self.average_norm.copy_(average_norm)
        self.restored_at = self.step_count
        return state

    def _note_nonfinite(self, window: Moments) -> None:
        number = int((~window.grad_norm.isfinite()).sum()) - (self.window_start == self.restored_at)
        if number > 0:
            self._intervene(f"{number} of {len(window.grad_norm)} steps without a finite loss and gradient: left out")

    def _intervene(self, message: str, level: int = logging.WARNING) -> None:
        self.interventions.append(Intervention(self.step_count, message))
        LOGGER.log(level, "step %d: %s", self.step_count, message)
        self.log.text("rlsched/intervention", message, self.step_count)

    def _state_in_use(self) -> Tensor:
        """In shadow mode: the control state that the user's own hyperparameters amount to."""
        state, (low, high) = self.base_state.clone(), (control.CONTROLS[LR].low, control.CONTROLS[LR].high)
        lr, momentum = self.hyperparameters.in_use()
        fallback = self.hyperparameters.base_lrs[0] * self._schedule()
        state[MOMENTUM] = control.initial_state(_host(momentum))[MOMENTUM]
        state[LR] = min(max(math.log(lr / fallback) if lr > 0 else low, low), high)
        return state

    # --- Setting hyperparameters ------------------------------------------------------------------------------------

    def _apply(self) -> None:
        """Work out what the control state means for each parameter group, until it changes."""
        self._ranks, self._shares = distributed.ranks(), distributed.shares(self._parameters())
        _, log_factor, momentum, _ = self._place()
        self._multiple = float(control.clip_multiple(self.control_state[CLIP]))
        self.hyperparameters.decide(log_factor, self._moved(momentum))

    def _place(self) -> tuple[float, ...]:
        """Where the controls are: inner step, log of the factor on the fallback lr, states of momentum and clip."""
        lr, momentum, clip = self.control_state.tolist()
        return self.step_count, (math.log(control.PROBE) if self.probing else lr) + self.lr_offset, momentum, clip

    def _set_hyperparameters(self) -> None:
        if self.step_count == self.total_steps:
            self._warn(
                "too long",
                f"training goes on after total_steps={self.total_steps}: the learning rate stays where it ended",
            )
        if self.hyperparameters.write(self._schedule(), with_momentum=self._moves_momentum):
            self._warn(
                "scheduler",
                "a torch scheduler, or other code, has changed the learning rate, which has no effect: take it away, "
                "or let the policy modulate it by follow_scheduler=True",
            )

    def _schedule(self) -> float:
        """The fallback schedule's factor on the base learning rate."""
        step = min(self.step_count, self.total_steps - 1)
        return control.fallback_schedule(float(step), float(self.total_steps))

    def _moved(self, momentum: float) -> float:
        """How far a state of the momentum control is from where it began."""
        return momentum - float(self.base_state[MOMENTUM])

    def _clip(self, grads: list[Tensor], norm: Any, finite: Any) -> Tensor | float:
        """Scale the gradients down to what the clip control and `max_grad_norm` allow, and return the factor."""
        assert self.average_norm is not None
        average: Any = self.average_norm if isinstance(norm, Tensor) else float(self.average_norm)
        coefficient = moments.clip_coefficient(norm, average, self._multiple, self.max_grad_norm or math.inf)
        later = moments.average_norm(average, norm)
        if isinstance(norm, Tensor):
            coefficient, later = torch.where(finite, coefficient, 1.0), torch.where(finite, later, average)
        elif not finite:
            return 1.0
        self.average_norm.fill_(later)
        if isinstance(coefficient, Tensor) or coefficient < 1:
            torch._foreach_mul_(grads, coefficient)
        return coefficient

    # --- Helpers ----------------------------------------------------------------------------------------------------

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _shares_of_grads(self, parameters: Sequence[Tensor]) -> list[float] | None:
        if self._shares is None:
            return None
        return [share for share, p in zip(self._shares, parameters, strict=True) if p.grad is not None]

    def _only_creates_state(self, grads: Sequence[Tensor]) -> bool:
        """Whether this is the step of torch.distributed.checkpoint that makes an optimizer create its state."""
        if self.optimizer.state:
            return False
        lrs = [group["lr"] for group in self.optimizer.param_groups]
        known = all(not isinstance(lr, Tensor) or safety.on_host(lr) for lr in lrs)
        return known and not any(lrs) and bool(grads) and not any(grad.any() for grad in grads)

    def _whole_window(self) -> Tensor:
        """The window as it is of the whole model, the same on all ranks."""
        assert self.window is not None
        return distributed.whole_window(self.window, sampling.PRODUCTS, sharded=self._shares is not None)

    def _warn(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(f"rlsched: {message}", stacklevel=4)


def _mean(losses: list[Tensor | float], device: torch.device) -> Tensor | float:
    """Mean over the losses that are finite; 0, which has no logarithm either, if there is none.

    A step that a GradScaler skips leaves its loss, perhaps infinite, to the next one.
    """
    if len(losses) < 2:
        return losses[0] if losses else 0.0
    like: dict[str, Any] = {"dtype": torch.float32, "device": device}  # torch.full does not wait, as a copy would
    values = torch.stack([x.to(**like) if isinstance(x, Tensor) else torch.full((), x, **like) for x in losses])
    return torch.where(values.isfinite(), values, torch.nan).nanmean()


def _total_norm(grads: list[Tensor], shares: list[float] | None) -> Tensor | float:
    """Norm of all gradients, in single precision at least: half precision overflows at 65,504.

    Of gradients that several ranks hold, only this rank's `shares` of their squares count.
    """
    double = any(grad.dtype == torch.float64 for grad in grads)
    norms = torch._foreach_norm(grads, 2.0, torch.float64 if double else torch.float32)
    if shares is not None:
        torch._foreach_mul_(norms, [math.sqrt(share) for share in shares])
    if safety.on_host(grads[0]):
        return math.hypot(*map(float, norms))
    return torch.linalg.vector_norm(torch.stack(norms)).float()


def _host(value: float | list[float]) -> Tensor:
    """A tensor of what is decided with, whatever the default dtype and device."""
    return torch.tensor(value, dtype=torch.float32, device="cpu")
