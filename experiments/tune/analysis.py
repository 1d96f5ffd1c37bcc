"""What a study found: the table, the pictures, and the best settings as a preset."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullLocator
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

import rlsched
from rlsched.agents.presets import write_preset
from rlsched.experiments.table import TABLE, markdown, save
from rlsched.experiments.tune.study import ERROR, Study
from rlsched.files import write

BEST = "best.toml"
HISTORY, IMPORTANCE, SETTINGS = "history.png", "importance.png", "settings.png"
FRESH = "scores in other episodes"  # of a trial
SHOWN = 10  # trials, on a screen
FEWEST = 5  # trials that came to their end, for importances
MARKS = {  # of the states of trials: colour, marker, word
    TrialState.COMPLETE: ("C0", "o", "trained to its end"),
    TrialState.PRUNED: ("0.6", "x", "pruned: as far as it came"),
}


class Report:
    """What a study has found so far.

    Args:
        study: that is read.
        few: trials that were played again, the best first.
    """

    def __init__(self, study: Study, few: Sequence[FrozenTrial]) -> None:
        self.study = study
        self.objective = study.plan.objective
        fresh = [(each, study.noted(each.number, FRESH)) for each in few]
        self.fresh = {trial.number: found[self.objective] for trial, found in fresh if found is not None}
        worse = 1 if study.plan.is_minimized else -1
        self.few = sorted(few, key=lambda trial: worse * self.fresh.get(trial.number, worse * math.inf))

    @property
    def best(self) -> FrozenTrial | None:
        """The best of those that were played again."""
        return self.few[0] if self.few else None

    def publish(self) -> None:
        """Write the table, the pictures, and the presets."""
        out = self.study.out
        write(out / TABLE, f"{self.table()}\n".encode())
        save(history(self.study, None if self.best is None else self.best.number), out / HISTORY)
        if self.study.complete():
            save(slices(self.study), out / SETTINGS)
        found = importances(self.study)
        if found:
            save(_importance(found, self.objective), out / IMPORTANCE)
        for trial in self.few:
            self._preset(trial, self.study.folder(trial.number) / "preset.toml")
        if self.best is not None:
            self._preset(self.best, out / BEST)

    def _preset(self, trial: FrozenTrial, path: Path) -> None:
        config = self.study.config(trial.number)
        common = config.hyperparameters()
        del common["eval_every"]
        found = {name: common.pop(name) for name in self.study.plan.space.searched}
        about = [
            f"Trial {trial.number} of a study by rlsched {rlsched.__version__}: {self.objective} {trial.value:.4f}",
            *(f"and {value:.4f} in other episodes" for value in [self.fresh.get(trial.number)] if value is not None),
            f"To train so: rlsched train --preset {path.name}",
        ]
        write_preset(path, about, {"found": found, "the same in all trials": common})

    def table(self) -> str:
        """All trials as Markdown, the best first."""
        names = list(self.study.plan.space.searched)
        head = ["trial", "ended", self.objective, "in other episodes", "of its timesteps", *names]
        return markdown(head, [self._row(trial, names) for trial in self._order()], labels=2)

    def story(self) -> str:
        """The best trials, and what became of the others, for a screen."""
        order, names = self._order(), list(self.study.plan.space.searched)
        states = [trial.state for trial in order]
        counted = [
            f"{states.count(state)} {word}"
            for state, word in (
                (TrialState.COMPLETE, "trained to the end"),
                (TrialState.PRUNED, "pruned"),
                (TrialState.FAIL, "failed"),
            )
            if state in states
        ]
        lines = [f"{len(order)} trials: {', '.join(counted)}", ""]
        rows = [self._row(trial, names) for trial in order[:SHOWN]]
        lines += _columns(
            ["trial", "ended", self.objective, "in other episodes", *names],
            [[row[0], row[1].partition(":")[0], *row[2:4], *row[5:]] for row in rows],
        )
        lines += [f"… {len(order) - SHOWN} more in {TABLE}"] if len(order) > SHOWN else []
        if self.best is None:
            reasons = [trial.user_attrs[ERROR] for trial in order if ERROR in trial.user_attrs]
            return "\n".join([*lines, "", "no trial was trained to its end", *reasons[:1]])
        found = importances(self.study)
        if found:
            shares = ", ".join(f"{name} {share:.0%}" for name, share in list(found.items())[:SHOWN])
            lines += ["", f"what the {self.objective} depends on (fANOVA, a guess with few trials): {shares}"]
        return "\n".join(lines)

    def _order(self) -> list[FrozenTrial]:
        """Those played again, then others that came to their end, the best first; then those that came farthest."""
        numbers = [trial.number for trial in self.few]
        rest = [trial for trial in self.study.complete() if trial.number not in numbers]
        short = [trial for trial in self.study.trials if trial.state != TrialState.COMPLETE]
        return [*self.few, *rest, *sorted(short, key=lambda trial: (-(trial.last_step or 0), trial.number))]

    def _row(self, trial: FrozenTrial, names: Sequence[str]) -> list[str]:
        value = _value(trial)
        fresh = self.fresh.get(trial.number)
        return [
            str(trial.number),
            _fate(trial),
            "" if value is None else f"{value:.4f}",
            "" if fresh is None else f"{fresh:.4f}",
            f"{_part(self.study, trial):.0%}",
            *(_short(trial.params.get(name, "")) for name in names),
        ]


def in_words(study: Study, trial: FrozenTrial) -> str:
    """How a trial ended, in a line."""
    settings = ", ".join(f"{name} {_short(value)}" for name, value in trial.params.items())
    value = _value(trial)
    scored = "" if value is None else f"{study.plan.objective} {value:.4f}"
    if trial.state == TrialState.COMPLETE:
        return f"{scored} ({settings})"
    if trial.state == TrialState.PRUNED:
        return f"pruned after {_part(study, trial):.0%}, {scored} ({settings})"
    return f"failed, {trial.user_attrs.get(ERROR)} ({settings})"


def importances(study: Study) -> dict[str, float]:
    """How much of the objective's variance each setting explains, the most important first; empty if none can tell."""
    trials = study.complete()
    values = {trial.value for trial in trials}
    varied = [name for name in study.plan.space.searched if len({trial.params[name] for trial in trials}) > 1]
    if len(trials) < FEWEST or len(values) < 2 or not varied:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return get_param_importances(study.optuna, evaluator=FanovaImportanceEvaluator(seed=0))


def history(study: Study, best: int | None) -> Figure:
    """The trials one after the other, and the course of each; that of the best one stands out."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    what = f"{study.plan.objective} ({'lower' if study.plan.is_minimized else 'higher'} is better)"
    for state, (colour, marker, label) in MARKS.items():
        some = [trial for trial in study.trials if trial.state == state and _value(trial) is not None]
        if some:
            left.plot([t.number for t in some], [_value(t) for t in some], marker, color=colour, label=label)
    complete = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    if complete:
        better = np.minimum if study.plan.is_minimized else np.maximum
        numbers = [*(trial.number for trial in complete), len(study.trials) - 1]
        so_far = better.accumulate([float(trial.value or 0.0) for trial in complete])
        left.step(numbers, [*so_far, so_far[-1]], where="post", color="C1", label="the best so far")
    failed = [trial.number for trial in study.trials if trial.state == TrialState.FAIL]
    for i, number in enumerate(failed):
        left.axvline(number, color="C3", linestyle=":", label=None if i else "failed")
    left.set(xlabel="trial", ylabel=what, title="the trials")
    left.xaxis.get_major_locator().set_params(integer=True)
    if left.get_legend_handles_labels()[1]:
        left.legend(fontsize="small")
    for trial in sorted(study.trials, key=lambda trial: trial.number == best):
        steps = sorted(trial.intermediate_values)
        is_best, is_pruned = trial.number == best, trial.state == TrialState.PRUNED
        style: dict[str, Any] = {"color": "C1" if is_best else "0.6" if is_pruned else "C0"}
        style |= {"linewidth": 2.5 if is_best else 1, "label": f"trial {trial.number}, the best" if is_best else None}
        right.plot(steps, [trial.intermediate_values[step] for step in steps], marker=".", **style)
    right.set(xlabel="timesteps", title="how they were trained (gray: pruned)")
    right.xaxis.set_major_formatter(EngFormatter(sep=""))
    if best is not None:
        right.legend(fontsize="small")
    return figure


def slices(study: Study) -> Figure:
    """The objective against each setting."""
    distributions = study.plan.space.distributions()
    columns = min(4, len(distributions))
    rows = math.ceil(len(distributions) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.8 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axis, (name, distribution) in zip(grid.flat, distributions.items(), strict=False):
        if isinstance(distribution, CategoricalDistribution):
            axis.set_xticks(range(len(distribution.choices)), [str(choice) for choice in distribution.choices])
        elif isinstance(distribution, FloatDistribution | IntDistribution):
            _show_range(axis, distribution.low, distribution.high, distribution.log)
        for state, (colour, marker, label) in MARKS.items():
            some = [t for t in study.trials if t.state == state and _value(t) is not None]
            places = [_place(distribution, trial.params[name]) for trial in some]
            axis.plot(places, [_value(trial) for trial in some], marker, color=colour, label=label, markersize=5)
        axis.set_xlabel(name)
    for axis in list(grid.flat)[len(distributions) :]:
        axis.set_axis_off()
    for axis in grid[:, 0]:
        axis.set_ylabel(study.plan.objective)
    grid[0, 0].legend(fontsize="x-small")
    return figure


def _show_range(axis: Axes, low: float, high: float, log: bool) -> None:
    """All of a range, with labels that have room."""
    if not log:
        margin = 0.05 * (high - low)
        axis.set_xlim(low - margin, high + margin)
        return
    axis.set_xscale("log")
    margin = (high / low) ** 0.05
    axis.set_xlim(low / margin, high * margin)
    ticks = np.geomspace(low, high, 3)
    axis.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
    axis.xaxis.set_minor_locator(NullLocator())


def _importance(found: dict[str, float], objective: str) -> Figure:
    figure = Figure(figsize=(7, 0.4 * len(found) + 1.4), layout="constrained")
    axis: Axes = figure.subplots()
    names = list(found)[::-1]
    bars = axis.barh(names, [found[name] for name in names])
    axis.bar_label(bars, [f"{found[name]:.0%}" for name in names], padding=3)
    axis.set(xlabel=f"part of the {objective}'s variance (fANOVA)", xlim=(0, max(found.values()) * 1.15))
    return figure


def _place(distribution: Any, value: Any) -> float:
    return float(distribution.choices.index(value) if isinstance(distribution, CategoricalDistribution) else value)


def _value(trial: FrozenTrial) -> float | None:
    """The objective where a trial ended, or how far it had come."""
    if trial.state == TrialState.COMPLETE:
        return trial.value
    return None if trial.last_step is None else trial.intermediate_values[trial.last_step]


def _part(study: Study, trial: FrozenTrial) -> float:
    """Of its timesteps, that a trial was trained, as far as is known."""
    return min(1.0, (trial.last_step or 0) / study.plan.config.timesteps)


def _fate(trial: FrozenTrial) -> str:
    if trial.state == TrialState.FAIL:
        return f"failed: {trial.user_attrs.get(ERROR)}"
    words = {TrialState.COMPLETE: "at its end", TrialState.PRUNED: "pruned", TrialState.RUNNING: "goes on"}
    return words.get(trial.state, "waits")


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
