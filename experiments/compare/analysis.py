"""Table, plot and TensorBoard log of a comparison, from its `runs.jsonl` and nothing else."""

from __future__ import annotations

import math
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from rlsched.experiments.cell import Cell
from rlsched.experiments.compare.run import POLICY, REPLAY, RUNS, SCHEDULES, TENSORBOARD, key
from rlsched.experiments.journal import Row, read
from rlsched.experiments.table import markdown, publish

COLORS = {"cosine": "tab:blue", "linear": "tab:green", "constant": "tab:gray"}
LED = {  # the kinds of run that a policy has, with what they are called and the colors of each policy in turn
    POLICY: ("learned", ("tab:red", "tab:purple", "tab:pink", "tab:cyan")),
    REPLAY: ("replay of its mean", ("tab:orange", "tab:brown", "tab:olive", "navy")),
}
FIRST = "first_log_loss"  # of the untrained network: what a diverged run counts as
LOG_LOSS = "1 log validation loss"  # tags are numbered, for TensorBoard sorts them
CURVES = {"2 accuracy": 2, "3 learning rate": 3, "4 momentum": 4}  # by the column of a run's curve
FINAL = "5 final log validation loss"
WORST = 1.0  # what it counts as in a row of older versions, without `FIRST`: worse than chance among ten classes


class Contender(NamedTuple):
    """What is compared: a schedule, and the digest of the policy that leads it, where one does."""

    schedule: str
    policy: str | None = None


class Method(NamedTuple):
    """A contender with the base learning rate that it is shown at: a factor on the default, or None for the best."""

    contender: Contender
    factor: float | None


class Results:
    """The runs of a comparison by setting, contender and learning rate."""

    def __init__(self, out: Path) -> None:
        self.runs: dict[Cell, dict[Contender, dict[float, list[Row]]]] = {}
        names: dict[str, str | None] = {}
        for (trial, digest), row in read(out / RUNS, key).items():
            contenders = self.runs.setdefault(Cell(trial.task, trial.optimizer, trial.steps), {})
            contenders.setdefault(Contender(trial.schedule, digest), defaultdict(list))[trial.lr_factor].append(row)
            if digest is not None:
                names[digest] = row.get("policy_name") or names.get(digest)
        self.names = names  # of the policies, by their digests, in the order in which they came

    def label(self, contender: Contender) -> str:
        """What a contender is called: with its policy, where there are several."""
        if contender.policy is None:
            return contender.schedule
        label, _ = LED[contender.schedule]
        if len(self.names) == 1:
            return label
        name, digest = self.names[contender.policy], contender.policy[:8]
        return f"{label} ({digest})" if name is None else f"{label} ({name}, {digest})"

    def color(self, contender: Contender) -> str:
        if contender.policy is None:
            return COLORS[contender.schedule]
        _, colors = LED[contender.schedule]
        return colors[list(self.names).index(contender.policy) % len(colors)]

    def led(self, schedule: str) -> list[Contender]:
        """The contenders of this kind, one for each policy."""
        return [Contender(schedule, digest) for digest in self.names]

    def methods(self) -> Iterator[Method]:
        """What is compared: a policy and its replay at each of their learning rates, the other schedules at the best.

        None of them lacks runs in all settings.
        """
        for contender in dict.fromkeys(contender for runs in self.runs.values() for contender in runs):
            factors = {factor for runs in self.runs.values() for factor in runs.get(contender, {})}
            yield from (Method(contender, f) for f in (sorted(factors) if contender.policy else [None]))

    def of(self, method: Method, setting: Cell) -> list[Row]:
        """The runs of a method in a setting; none where it has none."""
        by_lr = self.runs[setting].get(method.contender, {})
        factor = self.best(setting, method.contender) if method.factor is None and by_lr else method.factor
        return by_lr.get(factor, []) if factor is not None else []

    def log_loss(self, setting: Cell, contender: Contender, factor: float) -> float:
        """Mean over the seeds of the final log validation loss, as runs count."""
        return float(np.mean([counted(row) for row in self.runs[setting][contender][factor]]))

    def best(self, setting: Cell, contender: Contender) -> float:
        """The learning rate, as a factor on the default, with the lowest mean log loss."""
        return min(self.runs[setting][contender], key=lambda factor: self.log_loss(setting, contender, factor))


def counted(row: Row) -> float:
    """Final log validation loss; that of the untrained network for a run that diverged, or ended above it."""
    worst = float(row.get(FIRST, WORST))
    return min(row["log_loss"], worst) if math.isfinite(row["log_loss"]) else worst


def table(results: Results) -> str:
    """Final log validation loss, mean over seeds and their standard deviation, as a Markdown table."""
    settings = list(results.runs)
    groups = [group for s in settings for by_lr in results.runs[s].values() for group in by_lr.values()]
    rows = []
    factors = sorted({f for s in settings for c in results.led(POLICY) for f in results.runs[s].get(c, {})})
    for contender in results.led(POLICY):
        for factor in factors:
            cells = [_cell(results, s, contender, factor) for s in settings]
            rows.append([f"**{results.label(contender)}, lr × {factor:g}**", "1", *cells])
    for contender in results.led(REPLAY):
        for factor in factors:
            if any(factor in results.runs[s].get(contender, {}) for s in settings):
                cells = [_cell(results, s, contender, factor) for s in settings]
                rows.append([f"{results.label(contender)}, lr × {factor:g}", "–", *cells])
    fixed = [Contender(schedule) for schedule in reversed(SCHEDULES)]
    for contender in fixed:
        sweep = max(len(results.runs[s].get(contender, {})) for s in settings)
        cells = [_best_cell(results, s, contender) for s in settings]
        rows.append([f"{contender.schedule}, best of {sweep}", str(sweep), *cells])
    for contender in fixed:
        for factor in factors:
            if all(factor in results.runs[s].get(contender, {}) for s in settings):
                cells = [_cell(results, s, contender, factor) for s in settings]
                rows.append([f"{contender.schedule}, lr × {factor:g}", "1", *cells])
    caption = (
        "Final log validation loss (lower is better), mean ± standard deviation over "
        f"{'/'.join(map(str, sorted(set(map(len, groups)))))} seeds; × is the factor on the usual default learning "
        f"rate; {_worst(groups)}."
    )
    if any(contender in results.runs[s] for s in settings for contender in results.led(REPLAY)):
        caption += (
            " A replay follows, whatever it sees, the mean of the controls over the learned runs with the other seeds, "
            "which tells it what suits the task and the base learning rate: what the learned schedule gains over it is "
            "what adapting to the single run is worth."
        )
    return f"{markdown(['schedule', 'runs it takes', *map(str, settings)], rows)}\n\n{caption}"


def plot(results: Results) -> Figure:
    """Validation loss through training, and the final one by learning rate, for each setting."""
    settings = list(results.runs)
    figure = Figure(figsize=(4.2 * len(settings), 9), layout="constrained")
    axes = figure.subplots(3, len(settings), squeeze=False)
    for column, setting in enumerate(settings):
        loss_axis, lr_axis, sweep_axis = axes[:, column]
        loss_axis.set_title(str(setting))
        for contender, by_lr in results.runs[setting].items():
            color, label = results.color(contender), results.label(contender)
            factors = sorted(by_lr)
            shown = [results.best(setting, contender)] if contender.policy is None else factors
            name = f"{label}, best of {len(factors)}" if contender.policy is None else label
            for factor, style in zip(shown, ("--", "-", ":") if len(shown) == 3 else ["-"] * len(shown), strict=True):
                curves = np.array([row["curve"] for row in by_lr[factor]], dtype=float)  # accuracy may be null
                loss = geometric_mean(curves[:, :, 1])
                loss_axis.plot(curves[0, :, 0], loss, style, color=color, label=f"{name}, lr × {factor:.3g}")
                lr_axis.plot(curves[0, :, 0], curves[0, :, 3], style, color=color)
            finals = [results.log_loss(setting, contender, factor) for factor in factors]
            sweep_axis.plot(factors, finals, "o-", color=color, label=label)
        loss_axis.set(yscale="log", ylabel="validation loss", xlabel="inner steps")
        lr_axis.set(yscale="log", ylabel="learning rate (first seed)", xlabel="inner steps")
        sweep_axis.set(xscale="log", ylabel="final log validation loss", xlabel="base learning rate / default")
        loss_axis.legend(fontsize="small")
        sweep_axis.legend(fontsize="small")
    return figure


def tensorboard(results: Results, folder: Path) -> None:
    """Write a run for each method, with its hyperparameters. The folder is made anew.

    Losses are means over the seeds, learning rates and momenta those of the first.
    """
    from torch.utils.tensorboard.summary import hparams
    from torch.utils.tensorboard.writer import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    for method in results.methods():
        label, finals = results.label(method.contender), {}
        at = "tuned" if method.factor is None else f"lr-x{method.factor:g}"
        writer = SummaryWriter(str(folder / f"{re.sub(r'[^a-zA-Z0-9.]+', '-', label).strip('-')}-{at}"))
        for setting in results.runs:
            if not (rows := results.of(method, setting)):
                continue
            curves = np.array([row["curve"] for row in rows], dtype=float)  # (seeds, evaluations, columns)
            columns = {LOG_LOSS: np.log(geometric_mean(curves[:, :, 1]))}
            columns |= {tag: curves[0, :, column] for tag, column in CURVES.items()}
            for tag, values in columns.items():
                for step, value in zip(curves[0, :, 0], values, strict=True):
                    if math.isfinite(value):  # what has no labels has no accuracy
                        writer.add_scalar(f"{setting}/{tag}", value, int(step))
            finals[f"{setting}/{FINAL}"] = final = float(np.mean([counted(row) for row in rows]))
            writer.add_scalar(f"{setting}/{FINAL}", final, setting.steps)
        facts = {"schedule": label, "base learning rate": "tuned" if method.factor is None else f"× {method.factor:g}"}
        for summary in hparams(facts, finals):
            writer._get_file_writer().add_summary(summary)
        writer.close()


def report(out: Path) -> str:
    """Write `table.md`, `plot.png` and the log for TensorBoard beside the `runs.jsonl` in `out`; return the table."""
    results = Results(out)
    tensorboard(results, out / TENSORBOARD)
    return publish(out, table(results), plot(results))


def _cell(results: Results, setting: Cell, contender: Contender, factor: float) -> str:
    values = [counted(row) for row in results.runs[setting].get(contender, {}).get(factor, [])]
    if not values:
        return "–"
    return f"{np.mean(values):.3f} ± {np.std(values):.3f}"


def _best_cell(results: Results, setting: Cell, contender: Contender) -> str:
    if contender not in results.runs[setting]:
        return "–"
    best = results.best(setting, contender)
    return f"{_cell(results, setting, contender, best)} (lr × {best:.3g})"


def _worst(groups: list[list[Row]]) -> str:
    """What a diverged run counts as."""
    is_recorded = {FIRST in row for group in groups for row in group}
    if is_recorded == {False}:
        return f"a diverged run counts as {WORST:g}"
    text = "a run that diverged, or ended above the loss of its untrained network, counts as that"
    return text if is_recorded == {True} else f"{text}, or as {WORST:g} if it is of a version that did not record it"


def geometric_mean(losses: np.ndarray) -> np.ndarray:
    """Over the first axis, the seeds; a loss beyond all bounds counts as a thousand."""
    return np.exp(np.log(np.clip(losses, 1e-12, 1e3)).mean(0))
