"""What a scheduled run writes for TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsched.control import CONTROLS
from rlsched.decisions import DecisionLog
from rlsched.number import exp

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

    from rlsched.controller import Controller
    from rlsched.per_group import Decision
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
        log_dir: folder of the event file; a writer is made for it, which needs the `tensorboard` package. Beside it
            lies the file of decisions that `rlsched explain --run` reads.
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
        self.decisions = None if log_dir is None else DecisionLog(log_dir)

    def decision(
        self, run: Controller, window: Summary, decisions: Sequence[Decision], base_lrs: Sequence[float]
    ) -> None:
        """Write what was seen in a window, and what was decided for the next. Of several groups, each by its name.

        Args:
            run: the controller, after the decision.
            window: what was measured.
            decisions: of each group, or of all; what the policy saw, and its actions.
            base_lrs: learning rates of the base schedule, of the same groups.
        """
        if self.decisions is not None:
            self.decisions.add(run, window, decisions)
        if self.writer is None:
            return
        proposed = "proposed_" if run.options.shadow else ""
        scalars = {"rlsched/loss": exp(window.loss), "rlsched/grad_norm": exp(window.grad_norm)}
        names = [f"/{name}" for name in run.groups.names] if run.options.per_group else [""]
        for i, (name, (observation, actions, _), base_lr) in enumerate(zip(names, decisions, base_lrs, strict=True)):
            seen = zip(run.policy.observations, observation.tolist(), strict=True)
            own = {f"observation/{entry}": value for entry, value in seen}
            own |= {f"action/{control}": value for control, value in actions.items()}
            own |= {f"rlsched/{proposed}{control}": value for control, value in run.proposals[i].items()}
            own |= {"rlsched/base_schedule_lr": base_lr, "rlsched/equivalent_lr": run.equivalent_lrs[i]}
            if run.options.shadow:
                own["rlsched/lr"] = float(run.optimizer.param_groups[i]["lr"])
            if hasattr(run.policy, "influence"):
                own["rlsched/influence"] = float(run.policy.influence(observation))
            scalars |= {f"{tag}{name}": value for tag, value in own.items()}
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
        return {"writer": None, "decisions": None}  # an open file is neither copied nor pickled
