"""An explanation in TensorBoard: the page as text, and the pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch.utils.tensorboard.writer import SummaryWriter

from rlsched.experiments.explain.explanation import Explanation

RUN = "explanation"  # folder of the event file, which TensorBoard shows as a run
EVENTS = "events.out.tfevents.*"
TAG = "rlsched_explanation"


def beside(runs: Sequence[str | Path]) -> Path:
    """The folder to write to for whoever looks at these runs: the one they all lie in, or that of a single run."""
    return Path(runs[0]) if len(runs) == 1 else Path(os.path.commonpath([Path(run).resolve() for run in runs]))


def write(explained: Explanation, folder: str | Path) -> Path:
    """Write an explanation as a run in a folder, in place of the one that was there; returns where.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(folder) / RUN
    before = list(path.glob(EVENTS))
    with SummaryWriter(str(path)) as writer:
        writer.add_text(f"{TAG}/why the policy decided so", explained.page())
        for number, (name, figure) in enumerate(explained.figures(), 1):  # TensorBoard sorts by names
            writer.add_figure(f"{TAG}/{number:02} {name}", figure)
    for file in before:
        file.unlink()
    return path
