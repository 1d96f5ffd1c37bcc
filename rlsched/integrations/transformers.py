"""Hugging Face Transformers: a callback for `Trainer(callbacks=[...])`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rlsched.checkpoint import STATE_KEY
from rlsched.controller import Controller
from rlsched.integrations.common import Loggers, Monitor, check_options, controller_of
from rlsched.notices import warn
from rlsched.optimizer import ScheduledOptimizer
from rlsched.options import shows_options

try:
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers import (
        PrinterCallback,
        ProgressCallback,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )
    from transformers.trainer_callback import CallbackHandler
except ImportError as error:
    raise ImportError(
        "rlsched.integrations.transformers needs Transformers: pip install 'rlsched[transformers]'"
    ) from error

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from typing_extensions import Unpack

    from rlsched.options import CallbackOptions


class ScheduleCallback(TrainerCallback):
    """Lets the learned schedule drive a Trainer's optimizer, and reports to it the loss of each training step.

    One line does with the optimizer that the Trainer makes from its arguments::

        trainer = Trainer(model, args, train_dataset=data, callbacks=[ScheduleCallback()])

    With `optimizers=(ScheduledOptimizer(...), None)` the callback reports losses and no more.

    A loss that is evaluated in training is reported too, and with `patience` the Trainer stops when it is time.
    `callback.controller.best(model)` has the best weights.

    The Trainer's own scheduler, its warm-up included, has no effect unless `follow_scheduler` is set; the
    "learning_rate" in its logs is the effective one. Checkpoints hold the schedule, and a run resumed from one is
    bit-equal to one that never stopped.

    The Trainer's log history, and what it reports to, get the figures of each decision (`docs/figures.md`).

    The loss is the one that the model returns, as far as it is what the Trainer backpropagates. It is not with
    `compute_loss_func`, with a `compute_loss` of your own and with label smoothing: call `observe` there.

    Args:
        monitor: name of the validation loss among the metrics of an evaluation; with several data sets to evaluate, one
            of them has to be named, "eval_NAME_loss".
        options: as for `rlsched.attach`; none of them with a `ScheduledOptimizer`. `total_steps` is the number of
            steps that the Trainer is going to take unless it is given.

    Attributes:
        controller: what drives the optimizer, from the start of training on.
    """

    @shows_options(required=False)
    def __init__(self, *, monitor: str = "eval_loss", **options: Unpack[CallbackOptions]) -> None:
        check_options(options)
        self.options = options
        self.monitor = Monitor(monitor, "eval_loss")
        self.controller: Controller | None = None
        self._optimizer: Any = None  # the Trainer's, which knows of GradScaler
        self._lrs: list[float | Tensor] = []  # of the groups, in the last step
        self._losses: list[Tensor] = []  # parts of the loss of the step to come
        self._last: RemovableHandle | None = None  # of the hook on the loss that was observed last
        self._handles: list[RemovableHandle] = []
        self._loggers: Loggers | None = None
        self._warned = False

    def observe(self, loss: Tensor) -> None:
        """Report the loss of a batch before it is backpropagated; of several, the last one counts.

        The gradient that arrives at it is its weight in the loss of the step: one over the number of accumulated
        batches, or 1 for a loss that is normalized by the number of items in all of them; in both cases times the
        scale of GradScaler. A loss that no gradient arrives at is not what is trained on, and does not count.
        """
        if not loss.requires_grad:
            return
        if self._last is not None:
            self._last.remove()
        value = loss.detach().clone()  # the Trainer scales some in place

        def add(weight: Tensor) -> None:
            scaler = self._optimizer.scaler
            scale = 1.0 if scaler is None else scaler.scale(torch.ones_like(value, dtype=torch.float32))
            self._losses.append(weight.float() / scale * value.float())

        self._last = loss.register_hook(add)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        **kwargs: Any,
    ) -> None:
        self.on_train_end()  # of a training that failed
        self._optimizer, self._lrs = optimizer, []
        inner = optimizer.optimizer
        plain = inner.optimizer if isinstance(inner, ScheduledOptimizer) else inner
        self._handles = [
            model.register_forward_hook(self._observe_output),
            inner.register_step_pre_hook(self._report),  # these come before the controller's own
            plain.register_step_post_hook(self._keep_lrs),
        ]
        restored = None
        if inner is plain:
            restored = inner.param_groups[0].pop(STATE_KEY, None)
            self._handles.append(inner.register_state_dict_post_hook(self._add_state))
        self.controller = controller_of(inner, model, state.max_steps, self.options)
        self._log_to(_caller(), args, state, control, model=model, optimizer=optimizer, **kwargs)
        if restored is not None:
            self.controller.load_state_dict({STATE_KEY: restored})
        if state.global_step > 0 and self.controller.step_count == 0:
            warn("the checkpoint holds no schedule, so the schedule starts anew")

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._losses = []  # of a step that GradScaler skipped
        assert self.controller is not None
        self.monitor.warn_if_missed(self.controller.options)  # after all data sets were evaluated

    def on_optimizer_step(self, *args: Any, lr_scheduler: LRScheduler, **kwargs: Any) -> None:
        if self._lrs:
            lr_scheduler._last_lr = list(self._lrs)  # which is what the Trainer logs

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        if not self._handles:  # not in training
            return
        assert self.controller is not None
        loss = self.monitor.found_in(metrics)
        if loss is not None:
            self.controller.observe_validation(loss)
            control.should_training_stop = control.should_training_stop or self.controller.should_stop

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._loggers is not None:
            self._loggers.close()
            self._loggers = None
        if self.controller is not None:
            self.controller.detach()

    def _log_to(
        self,
        handler: CallbackHandler | None,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Have the Trainer's history, and those that it reports to, told of decisions as of a log of its own.

        Not by `Trainer.log`: that would print them, and take the place of the Trainer's own log of the same step.
        """
        assert self.controller is not None
        others = [] if handler is None else handler.callbacks
        writers = {id(cb): writer for cb in others if (writer := getattr(cb, "tb_writer", None)) is not None}

        def tell(_: int, figures: Mapping[str, float]) -> None:
            logs = {**figures, "epoch": state.epoch}
            state.log_history.append({**logs, "step": state.global_step})
            for other in others:
                is_told = loggers.lent is not None and writers.get(id(other)) is loggers.lent
                if not is_told and not isinstance(other, ProgressCallback | PrinterCallback):
                    other.on_log(args, state, control, logs=dict(logs), **kwargs)

        loggers = self._loggers = Loggers(self.controller.log, tell, next(iter(writers.values()), None))

    def _keep_lrs(self, optimizer: Optimizer, *_: Any) -> None:
        self._lrs = [float(group["lr"]) for group in optimizer.param_groups]

    def _add_state(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        """Keep the controller's state in the first group, the one place that load_state_dict lets others use."""
        assert self.controller is not None
        state_dict["param_groups"][0].update(self.controller.state_dict())

    def _observe_output(self, _: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, dict):
            loss = output.get("loss")
        else:
            loss = output[0] if isinstance(output, tuple) else None
        if isinstance(loss, Tensor) and loss.ndim == 0:
            self.observe(loss)

    def _report(
        self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hand the loss to the optimizer's step."""
        losses, self._losses = self._losses, []
        if not losses:
            if not self._warned:
                self._warned = True
                warn(
                    "the Trainer does not backpropagate the loss that the model returns: call observe(loss) of the "
                    "ScheduleCallback in your compute_loss or compute_loss_func"
                )
            return args, kwargs
        return args, {**kwargs, "loss": torch.stack(losses).sum()}


def _caller() -> CallbackHandler | None:
    """Who calls a Trainer's callbacks, and knows the others; they themselves are not told."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler):
            return caller
        frame = frame.f_back
    return None
