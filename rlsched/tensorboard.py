"""Who hears of a run: TensorBoard, and other listeners."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsched.decisions import DecisionLog
from rlsched.figures import FIGURES, INTERVENTION, POLICY_CHARTS, VALIDATION_LOSS, figure_table

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

    from rlsched.controller import Controller
    from rlsched.per_group import Decision
    from rlsched.remote import RemoteTrace
    from rlsched.summary import Summary

Listener = Callable[[int, Mapping[str, float]], Any]  # of a decision: inner steps done, and its figures
NEEDED = ("add_scalar", "add_text", "add_custom_scalars", "flush")  # methods of a writer


def _layout() -> dict[str, dict[str, list[Any]]]:
    """The charts of figures for TensorBoard's Custom Scalars, in their order: first what became of the run."""
    tags = {"loss": [VALIDATION_LOSS]}
    for figure in FIGURES.values():
        if figure.chart is not None:
            tags.setdefault(figure.chart, []).append(figure.name)
    # TensorBoard looks for these at the beginning of a tag. With `per_group`, a group's name comes behind it.
    charts = {chart: ["Multiline", [f"{tag}(/.*)?$" for tag in of_chart]] for chart, of_chart in tags.items()}
    policy = {chart: charts.pop(chart) for chart in POLICY_CHARTS}
    return {"rlsched: the run": charts, "rlsched: the policy": policy}


LAYOUT = _layout()


class RunLog:
    """Tells of decisions, validations and interventions.

    Args:
        log_dir: folder of the event file; a writer is made for it, which needs the `tensorboard` package. Beside it
            lies the file of decisions that `rlsched explain --run` reads.
        writer: a `SummaryWriter` to write to instead.
        trace: of a policy that may have its runs report (`rlsched.remote.RemotePolicy.trace`).

    Attributes:
        writer: of TensorBoard, or None.
        records: who is told of each decision in full: the file of decisions, the trace.
        listeners: are called at each decision; neither copied nor pickled, like the others.
    """

    def __init__(
        self,
        log_dir: str | Path | None = None,
        writer: SummaryWriter | None = None,
        trace: Callable[[], RemoteTrace | None] | None = None,
    ) -> None:
        if log_dir is not None and writer is not None:
            raise ValueError("give log_dir or writer, not both")
        if log_dir is not None:
            try:
                from torch.utils.tensorboard.writer import SummaryWriter
            except ImportError as error:
                raise ImportError("log_dir needs TensorBoard: pip install 'rlsched[tensorboard]'") from error
            writer = SummaryWriter(str(log_dir))
        self.writer: SummaryWriter | None = None
        self.records: list[DecisionLog | RemoteTrace] = [] if log_dir is None else [DecisionLog(log_dir)]
        if trace is not None and (own := trace()) is not None:
            self.records.append(own)
        self.listeners: list[Listener] = []
        if writer is not None:
            self.write_to(writer)

    def write_to(self, writer: SummaryWriter) -> None:
        """Write to this from now on: first of all how its charts are to be laid out, and what they show."""
        self.writer = writer
        writer.add_custom_scalars(LAYOUT)
        writer.add_text("rlsched/figures", figure_table(FIGURES.values()))

    @property
    def is_heard(self) -> bool:
        """Whether anybody wants figures."""
        return self.writer is not None or bool(self.listeners)

    def decision(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures of a decision, after so many inner steps."""
        if self.writer is not None:
            for name, value in figures.items():
                self.writer.add_scalar(name, value, step)
        for listener in self.listeners:
            listener(step, figures)

    def validation(self, loss: float, step: int) -> None:
        if self.writer is not None and math.isfinite(loss):
            self.writer.add_scalar(VALIDATION_LOSS, loss, step)

    def intervention(self, message: str, step: int) -> None:
        if self.writer is not None:
            self.writer.add_text(INTERVENTION, message, step)

    def record(self, run: Controller, window: Summary, decisions: Sequence[Decision]) -> None:
        """A decision in full, as `rlsched.decisions.rows` takes it."""
        for record in self.records:
            record.add(run, window, decisions)

    def close(self) -> None:
        for record in self.records:
            record.close()
        if self.writer is not None:
            self.writer.flush()

    def __getstate__(self) -> dict[str, Any]:
        return {"writer": None, "records": [], "listeners": []}  # an open file is neither copied nor pickled
