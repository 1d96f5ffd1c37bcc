"""A user's runs: what `log_dir`, `writer` or a callback of a framework has left of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rlsched import decisions
from rlsched.agents import tensorboard as training_log
from rlsched.control import CONTROLS
from rlsched.experiments.report.blocks import (
    DASHED,
    DOTTED,
    SOLID,
    Array,
    Chart,
    Line,
    Panel,
    Section,
    Text,
    colors,
    one_line,
)
from rlsched.experiments.report.events import FILES, Log, Scalars, has_log, noted, read_log
from rlsched.experiments.table import markdown
from rlsched.figures import FIGURES, INTERVENTION, NORM, RATE, TRUST, VALIDATION_LOSS

LOSS, FACTOR, RATES = "rlsched/loss", "rlsched/lr_log10_factor", "rlsched/lr"
PROPOSED, ACTION, SEEN = "rlsched_policy/proposed_", "rlsched_policy/action_", "rlsched_seen/"


def _chart(figure: str) -> str:
    """The chart that a figure is drawn in."""
    return FIGURES[figure].chart or figure


OF_CONTROLS = {name: _chart(f"{PROPOSED}{name}") for name in CONTROLS}
CLIPPED = _chart("rlsched_gradients/clipped")
LINEAR = (OF_CONTROLS["momentum"], CLIPPED, TRUST)  # all others have a logarithmic axis
STYLES = (SOLID, DASHED, DOTTED)  # of the figures of a chart, in their order
CHARTS = (
    ("loss", "Loss", "Solid: loss, geometric mean of a window; dotted: validation loss.", (_chart(LOSS),)),
    (
        "schedules",
        "Schedules",
        "Solid: in use. Dashed, where it differs: what the policy alone would have, before bounds and the answer to a "
        "divergence (in shadow mode it has no say). Dotted: the base schedule, which holds without a policy.",
        (RATE, _chart(FACTOR), *(chart for chart in OF_CONTROLS.values() if chart != RATE)),
    ),
    (
        "steps",
        "Updates and gradients",
        "Dashed: the gradient norm after clipping.",
        (_chart("rlsched/update_ratio"), NORM, CLIPPED),
    ),
    (
        "trust",
        "How far the policy is trusted",
        "Solid: distance of what it sees from what it was trained on; above 1 its influence (dashed) falls, and with "
        "it all that it does.",
        (TRUST,),
    ),
)
SAME = 1e-4  # what differs by less, relatively, is not proposed otherwise than it is used
MOST_LISTED = 100  # interventions of a run


class Decided(NamedTuple):
    """The decisions of a parameter group, or of all of them, in columns."""

    group: str  # "" where all have one state
    steps: Array  # (n,): inner steps done
    seen: dict[str, Array]  # (n,) each, by observation
    actions: dict[str, Array]  # (n,) each, by control: as they moved it


class ScheduledRun(NamedTuple):
    """A run, as far as it has come."""

    folder: Path
    log: Log
    recorded: decisions.RecordedRun | None  # where there is a file of decisions
    notes: list[str]  # what is to be known of how it could be read

    def figure(self, name: str) -> dict[str, Scalars]:
        """A figure by parameter groups, or under "" where all have one state."""
        return {
            tag.removeprefix(name).removeprefix("/"): scalars
            for tag, scalars in self.log.scalars.items()
            if tag == name or tag.startswith(f"{name}/")
        }

    def decided(self) -> list[Decided]:
        """The decisions of each group, from the file of decisions or else from the figures."""
        if self.recorded is not None:
            return [
                Decided(
                    group,
                    np.array([each.step for each in own], float),
                    _columns([each.observation for each in own]),
                    _columns([each.action for each in own]),
                )
                for group, own in self.recorded.groups.items()
            ]
        actions = {name: self.figure(f"{ACTION}{name}") for name in CONTROLS}
        names = dict.fromkeys(tag.split("/")[1] for tag in self.log.scalars if tag.startswith(SEEN))
        seen = {name: self.figure(f"{SEEN}{name}") for name in names}
        groups = dict.fromkeys(group for by_group in actions.values() for group in by_group)
        steps = {g: next(by[g].steps for by in actions.values() if g in by) for g in groups}
        return [Decided(g, steps[g], _at(steps[g], seen, g), _at(steps[g], actions, g)) for g in groups]

    def progress(self) -> tuple[int, int | None]:
        """The inner step of the last decision, and how many the run is to have, where that is known."""
        if self.recorded is None:
            return int(max(s.steps[-1] for tag, s in self.log.scalars.items() if tag.startswith("rlsched"))), None
        last = max((own[-1] for own in self.recorded.groups.values()), key=lambda each: each.step)
        return last.step, last.total_steps

    def has_ended(self) -> bool:
        """Whether its last decision was for its last window, as far as can be told."""
        step, total = self.progress()
        if total is None or self.recorded is None:
            return True
        steps = [each.step for each in next(iter(self.recorded.groups.values()))]
        window = max((after - before for before, after in pairwise(steps[-3:])), default=0)
        return step + window >= total

    @property
    def digest(self) -> str | None:
        """Of its policy, where that is recorded."""
        return None if self.recorded is None else self.recorded.policy

    def interventions(self) -> list[tuple[int, str]]:
        return self.log.texts.get(INTERVENTION, [])


def is_here(folder: Path) -> bool:
    return has_log(folder) or (folder / decisions.NAME).is_file()


def read(folder: Path) -> ScheduledRun:
    """The run that was logged to this folder.

    Raises:
        ValueError: what is there is no log of a scheduled run, or cannot be read.
        OSError: it cannot be read.
    """
    if not has_log(folder):
        raise ValueError(f"{folder} has {decisions.NAME}, but no TensorBoard log ({FILES}) beside it")
    log, recorded = read_log(folder), None
    notes: list[str] = []
    if not any(tag == RATES or tag.startswith(f"{RATES}/") for tag in log.scalars):
        raise ValueError(f"{folder} {_what_else(log)}")
    if (folder / decisions.NAME).exists():
        recorded, notes = noted(lambda: decisions.read(folder))
    run = ScheduledRun(folder, log, recorded, notes)
    if log.is_cut_off:
        notes.append("The last record of its TensorBoard log is not whole, and is left out.")
    if not run.has_ended():
        step, total = run.progress()
        notes.append(f"Its last decision was at step {step:,} of {total:,}: it goes on, or was stopped there.")
    return run


def _what_else(log: Log) -> str:
    """What a log is that has no learning rate of a scheduled run."""
    if training_log.RETURN in log.scalars or training_log.ABOUT in log.texts:
        return "is the log of a training: give the folder above it"
    if any(tag.startswith("rlsched") for tag in (*log.scalars, *log.texts)):
        return "is the log of a run that made no decision yet, or of another version of rlsched: it has no rlsched/lr"
    tags = ", ".join([*log.scalars, *log.texts, *log.images][:3])
    return f"is a log of something else than rlsched: it has {tags}, and no rlsched/lr"


def sections(runs: Mapping[str, ScheduledRun]) -> list[Section]:
    """What became of runs, by their names: figures side by side, and interventions."""
    labels = dict.fromkeys(_label(run, name, group) for name, run in runs.items() for group in run.figure(RATES))
    labels |= dict.fromkeys(runs)  # what is one for all groups
    color = dict(zip(labels, colors(len(labels)), strict=True))
    blocks: list[Chart | Text] = []
    for name, title, note, charts in CHARTS:
        panels = [panel for panel in (_panel(runs, color, chart) for chart in charts) if panel.lines]
        if panels:
            blocks.append(Chart(name, title, panels, note))
    return [Section("Runs side by side", [*blocks, _interventions(runs)])]


def _label(run: ScheduledRun, name: str, group: str) -> str:
    """What the curves of a group are called: as the run, if it is the only one."""
    return f"{name}, {group}" if group and len(run.figure(RATES)) > 1 else name


def _panel(runs: Mapping[str, ScheduledRun], color: Mapping[str, str], chart: str) -> Panel:
    """The figures of a chart, of all runs and groups."""
    names = [figure.name for figure in FIGURES.values() if figure.chart == chart]
    styles = dict(zip(names, STYLES, strict=False))
    if LOSS in names:
        styles[VALIDATION_LOSS] = DOTTED
    lines = []
    for name, run in runs.items():
        used = run.figure(names[0])
        for figure, dash in styles.items():
            for group, (steps, values) in run.figure(figure).items():
                y = 10**values if figure == FACTOR else values
                if figure.startswith(PROPOSED) and _is_same(used.get(group, used.get("")), steps, y):
                    continue
                label = _label(run, name, group)
                lines.append(Line(label, steps, y, color[label], dash, holds=figure not in (LOSS, VALIDATION_LOSS)))
    is_log = chart not in LINEAR and any((line.y > 0).any() for line in lines)
    return Panel("learning rate over that of the base schedule" if FACTOR in names else chart, lines, is_log)


def _is_same(used: Scalars | None, steps: Array, values: Array) -> bool:
    return used is not None and np.array_equal(used.steps, steps) and np.allclose(used.values, values, SAME, 0)


def _interventions(runs: Mapping[str, ScheduledRun]) -> Text:
    rows = []
    for name, run in runs.items():
        found = run.interventions()
        rows += [[f"`{name}`", one_line(message), str(step)] for step, message in found[:MOST_LISTED]]
        if len(found) > MOST_LISTED:
            rows.append([f"`{name}`", f"… and {len(found) - MOST_LISTED} more", ""])
    if not rows:
        return Text("**Interventions**: none. Nothing had to be done to keep these runs alive.")
    return Text(
        "**Interventions**: what was done to keep the runs alive.\n\n"
        + markdown(["run", "what was done", "at step"], rows, labels=2)
    )


def _columns(rows: Sequence[Mapping[str, float]]) -> dict[str, Array]:
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _at(steps: Array, figures: Mapping[str, Mapping[str, Scalars]], group: str) -> dict[str, Array]:
    """The figures of a group at these steps, by name; NaN where they are not known."""
    found = {}
    for name, by_group in figures.items():
        if group in by_group:
            known = dict(zip(*by_group[group], strict=True))
            found[name] = np.array([known.get(step, np.nan) for step in steps])
    return found


def overview(runs: Mapping[str, ScheduledRun], policies: Mapping[str, str]) -> str:
    """A line for each run, as a Markdown table.

    Args:
        runs: by their names.
        policies: names of those that were found, by digest.
    """
    rows = []
    for name, run in runs.items():
        step, total = run.progress()
        loss, validation = (_final(run.log.scalars.get(tag)) for tag in (LOSS, VALIDATION_LOSS))
        digest = run.digest
        policy = "not recorded" if digest is None else policies.get(digest, f"sha256={digest[:12]}")
        made = max((len(each.steps) for each in run.decided()), default=0)
        rows.append(
            [
                f"`{name}`",
                f"`{policy}`",
                f"{step:,}" if total is None else f"{step:,} of {total:,}",
                str(made),
                loss,
                validation,
                str(len(run.interventions())),
            ]
        )
    head = ["run", "policy", "last decision at", "decisions", "last loss", "last validation loss", "interventions"]
    return markdown(head, rows, labels=2)


def _final(scalars: Scalars | None) -> str:
    return "–" if scalars is None or not len(scalars.values) else f"{scalars.values[-1]:.4g}"
