"""The controller: measures a training run, asks the policy, and sets the optimizer's hyperparameters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rlsched import control, moments, safety, signals
from rlsched.control import CLIP, CONTROL_NAMES, LR, MOMENTUM
from rlsched.moments import Moments
from rlsched.policy import SchedulePolicy
from rlsched.signals import OBSERVATION_NAMES, History, Run
from rlsched.tensorboard import RunLog

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from torch.utils.tensorboard.writer import SummaryWriter

SAMPLE = 2**16  # parameters on which directions and updates are measured; a smaller network is measured whole
ADAPTIVE = {"RMSprop", "Adagrad", "Adadelta", "Adafactor", "Rprop"}  # beside all optimizers with `betas`
AVERAGING = {"Muon"}  # optimizers whose `momentum` averages gradients; torch's others sum them
BUFFERS = ("exp_avg", "momentum_buffer")  # where torch's optimizers keep their momentum
NEVER = -1  # the next decision, after the last one

# Keys of a controller's state_dict.
PER_GROUP = ("base_lrs", "base_momenta")
SCALARS = ("step_count", "window_start", "window_length", "next_decision", "skipped")
TENSORS = ("control_state", "base_state", "window", "average_norm", "last_grad", "nonfinite")
HISTORY, TOTAL_STEPS, INTERVAL, CONTROLS, POLICY = "history", "total_steps", "interval", "controls", "policy"


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
        log_dir: str | Path | None = None,
        writer: SummaryWriter | None = None,
    ) -> None:
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps <= 0:
            raise ValueError(f"total_steps must be a positive int, the number of optimizer steps, got {total_steps!r}")
        if decisions <= 0:
            raise ValueError(f"decisions must be positive, got {decisions!r}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive or None, got {max_grad_norm!r}")
        if isinstance(controls, str) or not set(controls) <= set(CONTROL_NAMES):
            raise ValueError(f"controls must be some of {CONTROL_NAMES}, got {controls!r}")
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
        self.log = RunLog(log_dir, writer)

        self.base_lrs: list[float] = []
        self.base_momenta: list[float] = []  # NaN where a group has none
        self._adopt_new_groups()
        self.step_count = 0  # inner steps done
        self.skipped = 0  # calls of step without any gradient
        self.window_start, self.window_length = 0, 1  # the first step is a window of its own
        self.next_decision = 1 if total_steps > 1 else NEVER
        self.average_norm: Tensor | None = None  # 0-d, on the parameters' device, like all that is measured
        self.window: Tensor | None = None  # (fields of Moments, interval)
        self.last_grad: Tensor | None = None  # (sample,)
        self.nonfinite: Tensor | None = None  # 0-d, inner steps of this window that were not finite
        self.base_state = control.initial_state(_host(self._first_momentum()))
        self.control_state = self.base_state.clone()
        self.history = signals.start(device=self.base_state.device)
        self._mask = _host([float(name in self.controls) for name in CONTROL_NAMES])
        if math.isnan(self.base_momenta[0]) or self.base_momenta[0] == 0:
            self._mask[MOMENTUM] = 0
        self._losses: list[Tensor] = []
        self._loss_was_reported = False
        self._warned: set[str] = set()
        self._step: _Step | None = None
        self._handles: list[RemovableHandle] = []

    # --- What a training loop calls ---------------------------------------------------------------------------------

    def observe(self, loss: Tensor | float) -> None:
        """Report the loss of the step to come: once, or once per micro-batch (the step then sees their mean)."""
        if not isinstance(loss, Tensor):
            device = next(iter(self._parameters())).device
            loss = torch.full((), float(loss), dtype=torch.float32, device=device)  # does not wait, as a copy would
        if loss.numel() != 1:
            raise ValueError(f"loss must be one number, got a tensor of shape {tuple(loss.shape)}")
        self._losses.append(loss.detach().reshape(()).float())

    def before(self) -> None:
        """Measure the gradients, clip them, and set the hyperparameters of the step to come."""
        self._adopt_new_groups()
        grads = [p.grad for p in self._parameters() if p.grad is not None]
        losses, self._losses = self._losses, []
        if not grads:
            self.skipped += 1
            self._warn("no gradients", "no parameter has a gradient, so nothing is trained: was backward() called?")
            return
        if any(grad.is_sparse for grad in grads):
            raise ValueError("optimizer: sparse gradients are not supported; use Embedding(..., sparse=False)")
        device = grads[0].device
        loss = _mean_over_ranks(torch.stack([x.to(device) for x in losses]).mean()) if losses else None
        self._loss_was_reported |= loss is not None
        if self.window is None:
            like: dict[str, Any] = {"dtype": torch.float32, "device": device}
            self.window = torch.full((len(Moments._fields), self.interval), torch.nan, **like)
            self.average_norm = torch.tensor(torch.nan, **like)
            self.nonfinite = torch.tensor(0.0, **like)
        if self.step_count == self.next_decision:
            self._decide()
        self._set_hyperparameters()
        self._step = _Step(self, grads, loss)

    def after(self) -> None:
        """Measure what the step did to the weights. Call after each step that `before` preceded."""
        if self._step is not None:
            self._step.finish(self)
            self._step = None
            self.step_count += 1
        if self.step_count == self.total_steps:
            self.log.close()

    # --- State ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, as tensors, numbers and strings."""
        names = (*PER_GROUP, *SCALARS, *TENSORS)
        state: dict[str, Any] = {name: getattr(self, name) for name in names}
        state = {name: list(v) if name in PER_GROUP else v for name, v in state.items()}
        state = {name: v.clone() if isinstance(v, Tensor) else v for name, v in state.items()}
        return {**state, HISTORY: torch.stack(self.history), **self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the run that gave `state_dict` was.

        Raises:
            ValueError: the state is of a run with another policy, other controls, total_steps or decisions.
        """
        for name, value in self._identity().items():
            if state_dict[name] != value:
                raise ValueError(f"state_dict is of a run with {name}={state_dict[name]!r}, this one has {value!r}")
        device = next(iter(self._parameters())).device
        for name in (*PER_GROUP, *SCALARS):
            value = state_dict[name]
            setattr(self, name, list(value) if name in PER_GROUP else value)
        for name in TENSORS:
            value = state_dict[name]
            where = torch.device("cpu") if name in ("control_state", "base_state") else device
            setattr(self, name, None if value is None else value.clone().to(where))
        self.history = History(*state_dict[HISTORY].cpu().unbind())
        self._losses = []

    def _identity(self) -> dict[str, Any]:
        """What two runs must have in common for one to go on where the other was."""
        return {
            TOTAL_STEPS: self.total_steps,
            INTERVAL: self.interval,
            CONTROLS: list(self.controls),
            POLICY: self.policy.digest,
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": []}

    def detach(self) -> None:
        """Undo `attach`: take the hooks off the optimizer, and leave its hyperparameters where they are."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # --- Deciding ---------------------------------------------------------------------------------------------------

    def _decide(self) -> None:
        assert self.window is not None and self.nonfinite is not None
        # The only place where the host waits for an accelerator.
        read = torch.cat([self.window[:, : self.window_length].flatten(), self.nonfinite.reshape(1)]).cpu()
        window = Moments(*read[:-1].view(len(Moments._fields), -1))
        if not self._loss_was_reported:
            self._warn(
                "no loss",
                "no loss was reported, so the schedule follows the gradients alone: pass step(loss=loss) or a closure",
            )
        step = _host(float(self.step_count))
        acts = bool(self._mask.any())
        if self.step_count == 1 and self._probes():
            growth = _host(1 / (1 - self._first_momentum()) if self._sums_gradients() else 1.0)
            self.control_state = control.safe_start(
                self.control_state, window.predicted_decrease[-1], window.update_ratio[-1], growth
            )
        if read[-1] > 0 and self._mask[LR]:
            self.control_state = safety.cut_lr(self.control_state)
            self.log.text(
                "rlsched/intervention",
                f"{int(read[-1])} steps with a loss or gradient that is not finite: lr cut",
                self.step_count,
            )
        observation, self.history = signals.observe(window, self._run(), self.history, step, self.control_state)
        action = self.policy.act(observation) * self._mask if acts else torch.zeros_like(self._mask)
        before = self.control_state
        self.control_state = control.move(before, action, step / self.total_steps, self.base_state)
        self._rescale_momentum(float(before[MOMENTUM]), float(self.control_state[MOMENTUM]))
        self.window.fill_(torch.nan)
        self.nonfinite.zero_()
        self.window_start, self.window_length = self.step_count, self.interval
        self.next_decision += self.interval
        if self.next_decision >= self.total_steps:  # the last window takes what is left, and nothing follows it
            self.next_decision = NEVER
        self._log_decision(window, observation, action)

    def _log_decision(self, window: Moments, observation: Tensor, action: Tensor) -> None:
        if self.log.writer is None:
            return
        scalars = {f"observation/{n}": v for n, v in zip(OBSERVATION_NAMES, observation.tolist(), strict=True)}
        scalars |= {f"action/{n}": v for n, v in zip(CONTROL_NAMES, action.tolist(), strict=True)}
        factor = control.fallback_schedule(float(self.step_count), float(self.total_steps))
        scalars |= {
            "rlsched/loss": float(window.loss.nanmean()),
            "rlsched/grad_norm": float(window.grad_norm.nanmean()),
            "rlsched/lr": self._lr(0),
            "rlsched/fallback_lr": self.base_lrs[0] * factor,
            "rlsched/momentum": self._momentum(0),
            "rlsched/clip_multiple": float(control.clip_multiple(self.control_state[CLIP])),
        }
        self.log.decision(self.step_count, {tag: v for tag, v in scalars.items() if math.isfinite(v)})

    def _probes(self) -> bool:
        return self.policy.safe_start and bool(self._mask[LR])

    def _run(self) -> Run:
        adaptive = self._is_one_of(ADAPTIVE) or "betas" in self.optimizer.param_groups[0]
        numbers = (self.total_steps, self.interval, 1 if adaptive else -1)
        return Run(*(_host(float(x)) for x in numbers))

    # --- Setting hyperparameters ------------------------------------------------------------------------------------

    def _adopt_new_groups(self) -> None:
        for group in self.optimizer.param_groups[len(self.base_lrs) :]:
            self.base_lrs.append(float(group["lr"]))
            betas = group.get("betas")
            self.base_momenta.append(float(betas[0] if betas else group.get("momentum", math.nan)))

    def _first_momentum(self) -> float:
        momentum = self.base_momenta[0]
        return 0.0 if math.isnan(momentum) else momentum

    def _momentum(self, group: int, state: float | None = None) -> float:
        """Momentum of a parameter group; a group whose base differs from the first one's keeps its distance."""
        base = self.base_momenta[group]
        state = float(self.control_state[MOMENTUM]) if state is None else state
        moved = state - float(self.base_state[MOMENTUM])
        if moved == 0 or math.isnan(base) or base == 0:
            return base
        return control.momentum_of(-math.log10(1 - base) + moved)

    def _lr(self, group: int) -> float:
        """Learning rate of a parameter group in the step to come."""
        step = min(self.step_count, self.total_steps - 1)
        lr = self.base_lrs[group] * control.fallback_schedule(float(step), float(self.total_steps))
        if step == 0 and self._probes():
            return lr * control.PROBE
        lr *= math.exp(float(self.control_state[LR]))
        if self._sums_gradients() and self.base_momenta[group] > 0:
            lr *= (1 - self._momentum(group)) / (1 - self.base_momenta[group])
        return lr

    def _set_hyperparameters(self) -> None:
        if self.step_count == self.total_steps:
            self._warn(
                "too long",
                f"training goes on after total_steps={self.total_steps}: the learning rate stays where it ended",
            )
        for i, group in enumerate(self.optimizer.param_groups):
            lr = self._lr(i)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
            if self._mask[MOMENTUM]:
                if "betas" in group:
                    group["betas"] = (self._momentum(i), *group["betas"][1:])
                elif "momentum" in group:
                    group["momentum"] = self._momentum(i)

    def _is_one_of(self, names: set[str]) -> bool:
        return any(kind.__name__ in names for kind in type(self.optimizer).__mro__)

    def _sums_gradients(self) -> bool:
        return "betas" not in self.optimizer.param_groups[0] and not self._is_one_of(AVERAGING)

    def _rescale_momentum(self, old: float, new: float) -> None:
        """Keep the size of the update apart from momentum, where the optimizer's buffer is a sum of gradients.

        With b ← βb + g and the update ηb, the average of gradients is m = (1 − β) b. The learning rate carries the
        factor 1 − β, so a change of β leaves m as it is if b is multiplied by (1 − β_old) / (1 − β_new).
        """
        if old == new or not self._sums_gradients():
            return
        for i, group in enumerate(self.optimizer.param_groups):
            if self.base_momenta[i] > 0:
                factor = (1 - self._momentum(i, old)) / (1 - self._momentum(i, new))
                states = (self.optimizer.state[p] for p in group["params"] if p in self.optimizer.state)
                buffers = [s["momentum_buffer"] for s in states if s.get("momentum_buffer") is not None]
                if buffers:
                    torch._foreach_mul_(buffers, factor)

    # --- Helpers ----------------------------------------------------------------------------------------------------

    def _parameters(self) -> Iterable[Tensor]:
        return (p for group in self.optimizer.param_groups for p in group["params"])

    def _warn(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(f"rlsched: {message}", stacklevel=4)


def _mean_over_ranks(loss: Tensor) -> Tensor:
    """The loss of the whole batch. Ranks that decided by their own part of it would drift apart."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(loss)
        loss = loss / torch.distributed.get_world_size()
    return loss


def _host(value: float | list[float]) -> Tensor:
    """A tensor of what is decided with, whatever the default dtype and device."""
    return torch.tensor(value, dtype=torch.float32, device="cpu")


class _Step:
    """What is measured around one inner step."""

    def __init__(self, controller: Controller, grads: list[Tensor], loss: Tensor | None) -> None:
        c = controller
        assert c.average_norm is not None and c.nonfinite is not None
        grad_norm = torch.nn.utils.get_total_norm(grads, foreach=None).float()
        finite = safety.is_finite(grad_norm, loss)
        nan = torch.full_like(grad_norm, torch.nan)

        self.column = c.step_count - c.window_start
        self.measured = self.column < c.window_length and moments.is_measured(self.column, c.window_length)
        cosines = nan, nan
        if self.measured or moments.is_measured(self.column + 1, c.window_length):
            grad = self._sample(c, [p.grad for p in c._parameters()])
            if self.measured:
                last = c.last_grad
                if last is None or last.shape != grad.shape:  # at first, and when parameters have been added
                    last = torch.zeros_like(grad)
                momentum = self._momentum(c, last)
                cosines = moments.cosine(grad, last), moments.cosine(grad, momentum)
                # Scaled so that the sample's squared norm is the whole gradient's.
                self.grad = grad
                self.scale = grad_norm.square() / moments.dot(grad, grad).clamp(min=1e-30)
                self.weights = self._sample(c, list(c._parameters()))
            c.last_grad = torch.where(finite, grad, 0.0)

        safety.zero_unless(finite, grads)
        multiple = float(control.clip_multiple(c.control_state[CLIP]))
        coefficient = moments.clip_coefficient(grad_norm, c.average_norm, multiple)
        if c.max_grad_norm is not None:
            coefficient = torch.minimum(coefficient, c.max_grad_norm / grad_norm.clamp(min=1e-30))
        if c.max_grad_norm is not None or c.control_state[CLIP] < control.CONTROLS[CLIP].high:
            torch._foreach_mul_(grads, torch.where(finite, coefficient, 1.0))
        c.average_norm = torch.where(finite, moments.average_norm(c.average_norm, grad_norm), c.average_norm)
        c.nonfinite += ~finite

        self.loss = nan if loss is None else loss
        row = Moments(self.loss, grad_norm, (coefficient < 1).float(), *cosines, nan, nan)
        self.row = Moments(*(torch.where(finite, value, torch.nan) for value in row))
        self.finite = finite

    def finish(self, controller: Controller) -> None:
        if self.column >= controller.window_length:  # past the last decision
            return
        row = self.row
        if self.measured:
            after = self._sample(controller, list(controller._parameters()))
            ratio, decrease = moments.update_moments(self.weights, after, self.grad, self.loss)
            row = row._replace(
                update_ratio=torch.where(self.finite, ratio, torch.nan),
                predicted_decrease=torch.where(self.finite, decrease * self.scale, torch.nan),
            )
        assert controller.window is not None
        controller.window[:, self.column] = torch.stack(row)

    @staticmethod
    def _sample(controller: Controller, tensors: list[Tensor | None]) -> Tensor:
        """The same share of the leading elements of every tensor, as one vector; zeros for a tensor that is None."""
        parameters = list(controller._parameters())
        share = min(1.0, SAMPLE / sum(p.numel() for p in parameters))
        parts = []
        for parameter, tensor in zip(parameters, tensors, strict=True):
            count = math.ceil(share * parameter.numel())
            if tensor is None:
                parts.append(torch.zeros(count, dtype=torch.float32, device=parameter.device))
            else:
                parts.append(tensor.detach().reshape(-1)[:count].float())
        return torch.cat(parts)

    @classmethod
    def _momentum(cls, controller: Controller, last_grad: Tensor) -> Tensor:
        """The optimizer's momentum before this step; the last gradient where it has none."""
        if not controller.base_momenta[0] > 0:
            return last_grad
        state = controller.optimizer.state
        tensors = []
        for p in controller._parameters():
            own = state.get(p, {})
            tensors.append(next((own[key] for key in BUFFERS if own.get(key) is not None), None))
        return cls._sample(controller, tensors)
