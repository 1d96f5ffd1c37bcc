"""Table and plot of a comparison, from its `runs.jsonl` and nothing else."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from rlsched.experiments.compare.run import POLICY, REPLAY, RUNS, SCHEDULES
from rlsched.experiments.records import publish, read

COLORS = {POLICY: "tab:red", REPLAY: "tab:orange", "cosine": "tab:blue", "linear": "tab:green", "constant": "tab:gray"}
NAMES = {POLICY: "learned", REPLAY: "replay of its mean"}  # the others are called what they are
WORST = 1.0  # log loss at which a diverged run is counted: worse than chance among ten classes

Row = dict[str, Any]


class Setting(NamedTuple):
    """What all schedules are compared on."""

    task: str
    optimizer: str
    steps: int

    def __str__(self) -> str:
        return f"{self.task}, {self.optimizer}, {self.steps} steps"


class Results:
    """The runs of a comparison by setting, schedule and learning rate; of policy runs, those of one policy."""

    def __init__(self, out: Path, policy: str) -> None:
        self.runs: dict[Setting, dict[str, dict[float, list[Row]]]] = {}
        for row in read(out / RUNS):
            if row["policy"] not in (None, policy):
                continue
            run = row["run"]
            schedules = self.runs.setdefault(Setting(run["task"], run["optimizer"], run["steps"]), {})
            schedules.setdefault(run["schedule"], defaultdict(list))[run["lr_factor"]].append(row)

    def log_loss(self, setting: Setting, schedule: str, factor: float) -> float:
        """Mean over the seeds of the final log validation loss; a diverged run counts as `WORST`."""
        return float(np.mean([_bounded(row["log_loss"]) for row in self.runs[setting][schedule][factor]]))

    def best(self, setting: Setting, schedule: str) -> float:
        """The learning rate, as a factor on the default, with the lowest mean log loss."""
        return min(self.runs[setting][schedule], key=lambda factor: self.log_loss(setting, schedule, factor))


def table(results: Results) -> str:
    """Final log validation loss, mean over seeds and their standard deviation, as a Markdown table."""
    settings = list(results.runs)
    seeds = {len(rows) for s in settings for by_lr in results.runs[s].values() for rows in by_lr.values()}
    rows = [["schedule", "runs it takes", *map(str, settings)], ["---", "--:", *["--:"] * len(settings)]]
    factors = sorted({f for s in settings for f in results.runs[s].get(POLICY, {})})
    for factor in factors:
        cells = [_cell(results, s, POLICY, factor) for s in settings]
        rows.append([f"**learned, lr × {factor:g}**", "1", *cells])
    for factor in factors:
        if any(factor in results.runs[s].get(REPLAY, {}) for s in settings):
            cells = [_cell(results, s, REPLAY, factor) for s in settings]
            rows.append([f"replay of its mean, lr × {factor:g}", "–", *cells])
    for schedule in reversed(SCHEDULES):
        sweep = max(len(results.runs[s].get(schedule, {})) for s in settings)
        cells = []
        for s in settings:
            best = results.best(s, schedule)
            cells.append(f"{_cell(results, s, schedule, best)} (lr × {best:.3g})")
        rows.append([f"{schedule}, best of {sweep}", str(sweep), *cells])
    for schedule in reversed(SCHEDULES):
        for factor in factors:
            if all(factor in results.runs[s].get(schedule, {}) for s in settings):
                cells = [_cell(results, s, schedule, factor) for s in settings]
                rows.append([f"{schedule}, lr × {factor:g}", "1", *cells])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    caption = (
        "Final log validation loss (lower is better), mean ± standard deviation over "
        f"{'/'.join(map(str, sorted(seeds)))} seeds; × is the factor on the usual default learning rate; "
        f"a diverged run counts as {WORST:g}."
    )
    if any(REPLAY in results.runs[s] for s in settings):
        caption += (
            " A replay follows, whatever it sees, the mean of the controls over the learned runs with the other seeds, "
            "which tells it what suits the task and the base learning rate: what the learned schedule gains over it is "
            "what adapting to the single run is worth."
        )
    return "\n".join([*lines, "", caption])


def plot(results: Results) -> Figure:
    """Validation loss through training, and the final one by learning rate, for each setting."""
    settings = list(results.runs)
    figure = Figure(figsize=(4.2 * len(settings), 9), layout="constrained")
    axes = figure.subplots(3, len(settings), squeeze=False)
    for column, setting in enumerate(settings):
        loss_axis, lr_axis, sweep_axis = axes[:, column]
        loss_axis.set_title(str(setting))
        for schedule, by_lr in results.runs[setting].items():
            color = COLORS[schedule]
            factors = sorted(by_lr)
            best = results.best(setting, schedule)
            shown = factors if schedule in NAMES else [best]
            for factor, style in zip(shown, ("--", "-", ":") if len(shown) == 3 else ["-"] * len(shown), strict=True):
                curves = np.array([row["curve"] for row in by_lr[factor]])
                name = NAMES.get(schedule, f"{schedule}, best of {len(factors)}")
                label = f"{name}, lr × {factor:.3g}"
                loss_axis.plot(curves[0, :, 0], _geometric_mean(curves[:, :, 1]), style, color=color, label=label)
                lr_axis.plot(curves[0, :, 0], curves[0, :, 3], style, color=color)
            finals = [results.log_loss(setting, schedule, factor) for factor in factors]
            sweep_axis.plot(factors, finals, "o-", color=color, label=NAMES.get(schedule, schedule))
        loss_axis.set(yscale="log", ylabel="validation loss", xlabel="inner steps")
        lr_axis.set(yscale="log", ylabel="learning rate (first seed)", xlabel="inner steps")
        sweep_axis.set(xscale="log", ylabel="final log validation loss", xlabel="base learning rate / default")
        loss_axis.legend(fontsize="small")
        sweep_axis.legend(fontsize="small")
    return figure


def report(out: Path, policy: str) -> str:
    """Write `table.md` and `plot.png` beside the `runs.jsonl` in `out`, and return the table."""
    results = Results(out, policy)
    return publish(out, table(results), plot(results))


def _cell(results: Results, setting: Setting, schedule: str, factor: float) -> str:
    values = [_bounded(row["log_loss"]) for row in results.runs[setting].get(schedule, {}).get(factor, [])]
    if not values:
        return "–"
    return f"{np.mean(values):.3f} ± {np.std(values):.3f}"


def _bounded(log_loss: float) -> float:
    return min(log_loss, WORST) if math.isfinite(log_loss) else WORST


def _geometric_mean(losses: np.ndarray) -> np.ndarray:
    return np.exp(np.log(np.clip(losses, 1e-12, 1e3)).mean(0))
