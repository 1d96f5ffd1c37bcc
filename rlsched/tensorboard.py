"""What a scheduled run writes for TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rlsched.control import CONTROLS
from rlsched.number import exp

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

    from rlsched.controller import Controller
    from rlsched.summary import Summary

# Charts that belong together, for TensorBoard's Custom Scalars tab.
LAYOUT = {
    "rlsched": {
        "loss": ["Multiline", ["rlsched/(validation_)?loss"]],
        "learning rate at the base momentum, and that of the base schedule": [
            "Multiline",
            ["rlsched/(equivalent|base_schedule)_lr"],
        ],
        "learning rate": ["Multiline", ["rlsched/(proposed_)?lr"]],
        **{name: ["Multiline", [f"rlsched/(proposed_)?{name}"]] for name in CONTROLS if name != "lr"},
        "agreement of gradients": ["Multiline", ["observation/grad_cosine", "observation/momentum_cosine"]],
        "size of updates": ["Multiline", ["observation/update_ratio", "observation/predicted_decrease"]],
        "actions": ["Multiline", ["action/.*"]],
        "influence of the policy": ["Multiline", ["rlsched/influence"]],
    }
}


class RunLog:
    """Scalars at every decision: what the policy saw, what it decided, what the optimizer got.

    The loss and the gradient norm are geometric means of the window.

    Args:
        log_dir: folder of the event file; a writer is made for it, which needs the `tensorboard` package.
        writer: a `SummaryWriter` to write to instead.
    """

    def __init__(self, log_dir: str | Path | None = None, writer: SummaryWriter | None = None) -> None:
        if log_dir is not None and writer is not None:
            raise ValueError("give log_dir or writer, not both")
        if log_dir is not None:
            try:
                from torch.utils.tensorboard.writer import SummaryWriter
            except ImportError as error:
                raise ImportError("log_dir needs TensorBoard: pip install 'rlsched[tensorboard]'") from error
            writer = SummaryWriter(str(log_dir))
            writer.add_custom_scalars(LAYOUT)
        self.writer = writer

    def decision(
        self, run: Controller, window: Summary, observation: Tensor, actions: Mapping[str, float], base_lr: float
    ) -> None:
        """Write what was seen in a window, and what was decided for the next.

        Args:
            run: the controller, after the decision.
            window: what was measured.
            observation: what the policy saw of it, (observations,).
            actions: of the policy, by control.
            base_lr: learning rate of the base schedule, of the first group.
        """
        if self.writer is None:
            return
        proposed = "proposed_" if run.options.shadow else ""
        scalars = {f"observation/{n}": v for n, v in zip(run.policy.observations, observation.tolist(), strict=True)}
        scalars |= {f"action/{name}": value for name, value in actions.items()}
        scalars |= {f"rlsched/{proposed}{name}": value for name, value in run.proposal.items()}
        scalars |= {
            "rlsched/loss": exp(window.loss),
            "rlsched/grad_norm": exp(window.grad_norm),
            "rlsched/base_schedule_lr": base_lr,
            "rlsched/equivalent_lr": run.equivalent_lr,
        }
        if run.options.shadow:
            scalars["rlsched/lr"] = float(run.optimizer.param_groups[0]["lr"])
        if hasattr(run.policy, "influence"):
            scalars["rlsched/influence"] = float(run.policy.influence(observation))
        for tag, value in scalars.items():
            if math.isfinite(value):
                self.writer.add_scalar(tag, value, run.step_count)

    def validation(self, loss: float, step: int) -> None:
        if self.writer is not None and math.isfinite(loss):
            self.writer.add_scalar("rlsched/validation_loss", loss, step)

    def text(self, tag: str, text: str, step: int) -> None:
        if self.writer is not None:
            self.writer.add_text(tag, text, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.flush()

    def __getstate__(self) -> dict[str, Any]:
        return {"writer": None}  # an open file is neither copied nor pickled
