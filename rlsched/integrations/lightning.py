"""Lightning: a callback for `Trainer(callbacks=[...])`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rlsched.integrations.common import Loggers, Monitor, check_options, controller_of
from rlsched.notices import warn
from rlsched.optimizer import Controller
from rlsched.options import shows_options

try:
    from lightning.pytorch import Callback
    from lightning.pytorch.loggers import TensorBoardLogger
except ImportError:
    try:
        from pytorch_lightning import Callback
        from pytorch_lightning.loggers import TensorBoardLogger
    except ImportError as error:
        raise ImportError("rlsched.integrations.lightning needs Lightning: pip install 'rlsched[lightning]'") from error

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.utils.hooks import RemovableHandle
    from typing_extensions import Unpack

    from rlsched.options import CallbackOptions


class ScheduleCallback(Callback):
    """Lets the learned schedule drive a module's optimizer, and reports to it the loss of each training step.

    A validation loss that the module logs as `monitor` is reported too, but that of the sanity check before training;
    with `patience` the Trainer then stops when it is time. `callback.controller.best(module)` has the best weights.

    One line does for a module whose `configure_optimizers` returns a plain optimizer::

        trainer = Trainer(max_epochs=10, callbacks=[ScheduleCallback()])

    Where it returns a `ScheduledOptimizer`, the callback reports the loss and no more. Lightning's own closure would
    report it too, but with `accumulate_grad_batches` only that of the last batch, divided, and none with "16-mixed".

    Checkpoints hold the schedule, and a run resumed from one is bit-equal to one that never stopped, if Lightning
    goes on with the same data: in the middle of an epoch it does so only with a DataLoader that has a state.

    The Trainer's loggers get the figures of each decision (`docs/figures.md`), whatever `log_every_n_steps`.

    Args:
        monitor: name of the validation loss among the metrics that the module logs.
        options: as for `rlsched.attach`; none of them with a `ScheduledOptimizer`. `total_steps` is the Trainer's
            `estimated_stepping_batches` unless it is given.

    Attributes:
        controller: what drives the optimizer, from the start of `fit` on.

    Raises:
        ValueError: in `fit`, for manual optimization, a Trainer that does not know how many steps it is going to
            take, and options that `attach` refuses.
    """

    @shows_options(required=False)
    def __init__(self, *, monitor: str = "val_loss", **options: Unpack[CallbackOptions]) -> None:
        check_options(options)
        self.options = options
        self.monitor = Monitor(monitor, "val_loss")
        self.controller: Controller | None = None
        self._restored: dict[str, Any] = {}
        self._losses: list[Tensor] = []  # of the batches since the last step
        self._hook: RemovableHandle | None = None
        self._loggers: Loggers | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.teardown(trainer, pl_module, stage)  # of a fit that failed
            self.controller, self._restored = None, {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise ValueError(
                "ScheduleCallback cannot tell which loss belongs to which step of manual optimization: return a "
                "ScheduledOptimizer, and call its observe(loss) before its step()"
            )
        (optimizer,) = trainer.optimizers  # Lightning has seen to it
        total_steps = self.options.get("total_steps") or trainer.estimated_stepping_batches
        if not 0 < total_steps < float("inf"):
            raise ValueError(
                "total_steps: the Trainer does not know how many steps it is going to take; give it max_steps, or "
                "ScheduleCallback total_steps"
            )
        self._hook = optimizer.register_step_pre_hook(self._report)  # comes before the controller's own hook
        self.controller = controller_of(optimizer, pl_module, total_steps, self.options)
        self._log_to(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.controller is not None
        if self._restored:
            self.controller.load_state_dict(self._restored)
        if trainer.global_step > 0 and self.controller.step_count == 0:
            warn("the checkpoint holds no schedule, so the schedule starts anew")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.controller is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        loss = self.monitor.found_in(trainer.callback_metrics)
        self.monitor.warn_if_missed(self.controller.options)
        if loss is not None:
            self.controller.observe_validation(trainer.strategy.reduce(loss, reduce_op="mean"))
            trainer.should_stop = trainer.should_stop or self.controller.should_stop

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._losses = []

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        loss = loss.detach() * trainer.accumulate_grad_batches
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._losses.append(loss if scaler is None else loss / scaler.scale(torch.ones_like(loss)))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")  # Lightning itself does not call it then

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._hook is not None:
            self._hook.remove()
        if self._loggers is not None:
            self._loggers.close()
            self._loggers = None
        if self.controller is not None:
            self.controller.detach()

    def _log_to(self, trainer: Trainer) -> None:
        """Have the Trainer's loggers told of decisions, at once: `log_dict` would drop them between its own steps."""
        assert self.controller is not None
        board = next((logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)

        def tell(_: int, figures: Mapping[str, float]) -> None:
            for logger in trainer.loggers:
                if logger is not board or loggers.lent is None:
                    logger.log_metrics(dict(figures), step=trainer.global_step)

        loggers = self._loggers = Loggers(self.controller.log, tell, None if board is None else board.experiment)

    def state_dict(self) -> dict[str, Any]:
        """The controller's state; a `ScheduledOptimizer` keeps another copy."""
        return {} if self.controller is None else self.controller.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def _report(
        self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hand the mean loss of the batches to the optimizer's step, by way of Lightning's closure if there is one."""
        closure: Callable[[], Any] | None = kwargs.get("closure")
        if closure is None:
            return args, {**kwargs, "loss": self._mean_loss()}

        def closure_with_mean_loss() -> Tensor | None:
            closure()
            return self._mean_loss()

        return args, {**kwargs, "closure": closure_with_mean_loss}

    def _mean_loss(self) -> Tensor | None:
        losses, self._losses = self._losses, []
        return torch.stack(losses).mean() if losses else None
