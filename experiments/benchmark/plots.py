"""The pictures of a benchmark, and its log for TensorBoard."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from rlsched.experiments.benchmark import statistics
from rlsched.experiments.benchmark.methods import POLICY
from rlsched.experiments.benchmark.results import Condition, Contender, Results, log_loss
from rlsched.experiments.cell import Cell
from rlsched.experiments.journal import Row
from rlsched.experiments.table import save

BASE_LR, PROFILE, TENSORBOARD = "base-lr.png", "profile.png", "tensorboard"
MOST_RATIO = 1.0  # log ratio of final losses that is shown
MOST_FACTOR = 2.0  # on the best loss, that a profile shows
COLUMNS = 6  # of small pictures


def pictures(results: Results, out: Path) -> list[Path]:
    """Write what comes of each base learning rate, the profile, and the learning rates of policies; returns paths."""
    written = [save(base_learning_rates(results), out / BASE_LR), save(profile(results), out / PROFILE)]
    for policy in results.policies():
        told = "" if policy.told else "-not-told"
        name = f"lr-{(policy.policy or '')[:8]}{told}.png" if len(results.policies()) > 1 else "lr.png"
        written.append(save(learning_rates(results, policy), out / name))
    return written


def base_learning_rates(results: Results) -> Figure:
    """How far above or below the reference each policy and each baseline ends, by how wrong its learning rate is."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for contender in results.contenders:
        untuned = [condition for condition in results.conditions(contender) if not condition.is_tuned]
        scores = {condition.factor: score for condition in untuned if (score := results.score(condition)) is not None}
        if len(scores) < 2:
            continue
        ratio, low, high = np.array([(s.ratio.value, s.ratio.low, s.ratio.high) for s in scores.values()]).T
        width = 2.5 if contender.method == POLICY else 1.2
        (line,) = axis.plot(list(scores), ratio, "o-", lw=width, label=results.label(contender))
        axis.fill_between(list(scores), low, high, color=line.get_color(), alpha=0.2, lw=0)
    axis.axhline(0, color="k", ls="--", lw=1, label="cosine, learning rate tuned for each task")
    bottom, top = axis.get_ylim()
    axis.set(xscale="log", xlabel="base learning rate / the usual one", ylim=(bottom, min(top, MOST_RATIO)))
    axis.set_ylabel("final log validation loss, less that of tuned cosine\n(below 0: better)")
    axis.legend(fontsize="small", loc="upper left")
    axis.grid(alpha=0.3)
    return figure


def profile(results: Results) -> Figure:
    """In which part of its cells each policy, and each tuned baseline, ends within a factor of the best of them."""
    conditions = [
        condition
        for contender in results.contenders
        for condition in results.conditions(contender)
        if condition.is_tuned or contender.method == POLICY
    ]
    cells = [cell for cell in results.runs if results.reference(cell)]
    losses = [[_median_loss(results, cell, condition) for cell in cells] for condition in conditions]
    factors = np.geomspace(1, MOST_FACTOR, 200)
    figure = Figure(figsize=(9, 6), layout="constrained")
    axis = figure.subplots()
    for condition, share in zip(conditions, statistics.profile(losses, factors), strict=True):
        where = "tuned" if condition.is_tuned else f"lr × {condition.factor:g}"
        style = "--" if condition.is_tuned else "-"
        axis.plot(factors, share, style, label=f"{results.label(condition.contender)}, {where}")
    axis.set(xlabel="final validation loss / the best in the cell", ylabel="part of the cells", ylim=(0, 1.02))
    axis.legend(fontsize="x-small", loc="lower right")
    return figure


def learning_rates(results: Results, policy: Contender) -> Figure:
    """The learning rate through the runs of the first seed: of a policy, and of the reference at its best."""
    cells = [cell for cell in results.runs if policy in results.runs[cell]]
    rows = -(-len(cells) // COLUMNS)
    figure = Figure(figsize=(3 * COLUMNS, 2.4 * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    colors = [f"C{i}" for i in range(10)]
    for axis, cell in zip(axes, cells, strict=False):
        for condition, color in zip(results.conditions(policy), colors, strict=False):
            if runs := results.at(cell, condition):
                curve = runs[min(runs)]["curve"]
                axis.plot(curve["step"], curve["lr"], color=color, label=f"policy, lr × {condition.factor:g}")
        if runs := results.reference(cell):
            curve = runs[min(runs)]["curve"]
            axis.plot(curve["step"], curve["lr"], "k--", label="cosine, tuned")
            axis.set_ylim(bottom=max(curve["lr"]) * 1e-4)
        axis.set(yscale="log")
        axis.set_title(str(cell), fontsize="x-small")
        axis.tick_params(labelsize="x-small")
    for axis in axes[len(cells) :]:
        axis.remove()
    handles = {
        label: line
        for axis in axes[: len(cells)]
        for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize="small")
    return figure


def tensorboard(results: Results, folder: Path) -> None:
    """Write a run for each cell and method, of the first seed, with its hyperparameters. The folder is made anew."""
    from torch.utils.tensorboard.summary import hparams
    from torch.utils.tensorboard.writer import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    done = set()
    for cell, condition, factor, row in _shown(results):
        name = f"{re.sub(r'[^a-zA-Z0-9]+', '-', results.label(condition.contender))}-x{factor:g}"
        if (cell, name) in done:  # untuned, and best as it is
            continue
        done.add((cell, name))
        writer = SummaryWriter(str(folder / f"{cell.task}-{cell.optimizer}-{cell.steps}" / name))
        for column in row["curve"].keys() - {"step"}:
            for step, value in zip(row["curve"]["step"], row["curve"][column], strict=True):
                if value is not None:
                    writer.add_scalar(f"benchmark/{column}", value, step)
        facts = {**cell._asdict(), "method": results.label(condition.contender), "lr_factor": factor}
        final = {"final/log_loss": log_loss(row)}
        for summary in hparams(facts, final):
            writer._get_file_writer().add_summary(summary)
        writer.add_scalar("final/log_loss", final["final/log_loss"], cell.steps)
        writer.close()


def _shown(results: Results) -> Iterator[tuple[Cell, Condition, float, Row]]:
    """Cell, condition, its factor, and its run with the first seed."""
    for contender in results.contenders:
        for condition in results.conditions(contender):
            for cell in results.runs:
                if runs := results.at(cell, condition):
                    factor = results.best(cell, contender) if condition.is_tuned else condition.factor
                    yield cell, condition, factor, runs[min(runs)]


def _median_loss(results: Results, cell: Cell, condition: Condition) -> float:
    runs = results.at(cell, condition)
    return math.exp(float(np.median([log_loss(row) for row in runs.values()]))) if runs else math.nan
