"""What a scheduled run writes for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

# Charts that belong together, for TensorBoard's Custom Scalars tab.
LAYOUT = {
    "rlsched": {
        "loss": ["Multiline", ["rlsched/loss"]],
        "learning rate and its fallback": ["Multiline", ["rlsched/(proposed_|fallback_)?lr"]],
        "momentum": ["Multiline", ["rlsched/(proposed_)?momentum"]],
        "agreement of gradients": ["Multiline", ["observation/grad_cosine", "observation/momentum_cosine"]],
        "size of updates": ["Multiline", ["observation/update_ratio", "observation/predicted_decrease"]],
        "actions": ["Multiline", ["action/.*"]],
        "influence of the policy": ["Multiline", ["rlsched/influence"]],
    }
}


class RunLog:
    """Scalars at every decision: what the policy saw, what it decided, what the optimizer got.

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

    def decision(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the scalars of the decision before inner step `step`."""
        if self.writer is not None:
            for tag, value in scalars.items():
                self.writer.add_scalar(tag, value, step)

    def text(self, tag: str, text: str, step: int) -> None:
        if self.writer is not None:
            self.writer.add_text(tag, text, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.flush()

    def __getstate__(self) -> dict[str, Any]:
        return {"writer": None}  # an open file is neither copied nor pickled
