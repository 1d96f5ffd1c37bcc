"""A training of a policy: what `rlsched train` has left in its folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rlsched.agents.exporting import CHECKPOINT
from rlsched.agents.ppo import CONFIG, POLICY
from rlsched.agents.tensorboard import (
    BASE,
    BETTER,
    DIVERGED,
    EPISODES,
    FAMILY,
    GAIN,
    LOG,
    OPTIMIZER,
    REGRET,
    REGRET_OF,
    RETURN,
    ROLLOUT_FAMILY,
    SPEED,
    TUNED,
)
from rlsched.experiments.report.blocks import (
    DASHED,
    DOTTED,
    SOLID,
    Chart,
    Line,
    Panel,
    Picture,
    Section,
    Text,
    colors,
    file_name,
    looks,
)
from rlsched.experiments.report.events import Log, has_log, read_log
from rlsched.experiments.table import markdown
from rlsched.policy import SchedulePolicy

TIMESTEPS = "timesteps"
HOW_TO_READ = """\
An episode is the training of a small network. Its **return** is log(first / last validation loss): a return that is \
higher by 0.7 is a final loss that is half as high. The same episodes are played with the policy, with the **base \
schedule** from the same base learning rates, and with the base schedule from the best of several, chosen in hindsight \
(**tuned**). **Regret** is the return that is missing to *tuned*; below 0 the policy is better than tuning."""
PPO = {
    "value loss": "train/value_loss",
    "explained variance of the critic (1 is perfect)": "train/explained_variance",
    "KL divergence of an update": "train/approx_kl",
    "standard deviation of the actions": "train/std",
    "timesteps per second": SPEED,
}
SCORES = {"return": RETURN, "gain over base": GAIN, "regret": REGRET, "better in": BETTER, "diverged": DIVERGED}
SHARES = (BETTER, DIVERGED)


class TrainingRun(NamedTuple):
    """A training, as far as it has come."""

    folder: Path
    config: Mapping[str, Any]
    logs: Mapping[str, Log]  # `LOG`, and the references `BASE` and `TUNED` as soon as there was an evaluation
    policy: SchedulePolicy | None  # of a training that has come to its end
    notes: list[str]  # what is to be known of how it could be read

    @property
    def log(self) -> Log:
        return self.logs[LOG]

    def timesteps(self) -> int:
        """How many it had."""
        return int(max((scalars.steps[-1] for scalars in self.log.scalars.values()), default=0))


def is_here(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and ((folder / LOG).is_dir() or (folder / CHECKPOINT).is_file())


def read(folder: Path) -> TrainingRun:
    """The training in this folder.

    Raises:
        ValueError: it is of another version, logged nothing yet, or cannot be read.
        OSError: it cannot be read.
    """
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        wanted = config[TIMESTEPS]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{folder / CONFIG} is no configuration of a training with its {TIMESTEPS}") from None
    path = folder / LOG
    if not has_log(path):
        if has_log(folder):
            raise ValueError(
                f"{folder} is a training of another version of rlsched, which logged to the folder itself; this one "
                f"reads {path}"
            )
        raise ValueError(f"{path} has no TensorBoard log: the training logged nothing yet")
    logs = {LOG: read_log(path)} | {name: read_log(path / name) for name in (BASE, TUNED) if has_log(path / name)}
    run = TrainingRun(folder, config, logs, _policy(folder), [])
    done = run.timesteps()
    if any(log.is_cut_off for log in logs.values()):
        run.notes.append("The last record of its TensorBoard log is not whole, and is left out.")
    if run.policy is None or done < wanted:
        run.notes.append(f"It has had {done:,} of {wanted:,} {TIMESTEPS}: it goes on, or was stopped there.")
    return run


def _policy(folder: Path) -> SchedulePolicy | None:
    return SchedulePolicy.load(folder / POLICY) if (folder / POLICY).exists() else None


def sections(runs: Mapping[str, TrainingRun]) -> list[Section]:
    """The story of trainings, by their names."""
    found = [Section("Trainings", [Text(HOW_TO_READ), *_side_by_side(runs)])]
    for name, run in runs.items():
        found.append(Section(f"Training {name}", [*_alone(name, run)]))
    return found


def _side_by_side(runs: Mapping[str, TrainingRun]) -> Iterable[Chart | Text]:
    lines, regrets = [], []
    for (name, run), color in zip(runs.items(), colors(len(runs)), strict=True):
        for log, dash in ((LOG, SOLID), (BASE, DOTTED), (TUNED, DASHED)):
            if log in run.logs and RETURN in run.logs[log].scalars:
                lines.append(Line(name, *run.logs[log].scalars[RETURN], color, dash, has_marks=dash == SOLID))
        if REGRET in run.log.scalars:
            regrets.append(Line(name, *run.log.scalars[REGRET], color, has_marks=True))
    if not lines:
        yield Text("There was no evaluation yet.")
        return
    panels = [Panel("return, mean over the episodes", lines, height=260), Panel("regret, interquartile mean", regrets)]
    note = "Solid: the policy; dotted: the base schedule; dashed: tuned."
    yield Chart("return", "What the policy is worth", panels, note, TIMESTEPS)


def _alone(name: str, run: TrainingRun) -> Iterable[Chart | Picture | Text]:
    for slug, title, tags in (
        ("regret-by-family", "Regret by family: where there is still to learn", REGRET_OF),
        ("return-by-family", "Return by family, of the episodes that it trains on, while it explores", ROLLOUT_FAMILY),
    ):
        found = _below(run.log, tags)
        if found:
            lines = [
                Line(label, *run.log.scalars[f"{tags}/{label}"], *look, has_marks=True)
                for label, look in zip(found, looks(len(found)), strict=True)
            ]
            label = tags.removeprefix("2 ").removeprefix("rollout/")
            panel = Panel(label, lines, height=300)
            yield Chart(file_name(f"{name}-{slug}"), title, [panel], "", TIMESTEPS)
    if by := _latest(run):
        yield Text(by)
    panels = [
        Panel(title, [Line(name, *run.log.scalars[tag])], height=140)
        for title, tag in PPO.items()
        if tag in run.log.scalars
    ]
    if panels:
        yield Chart(file_name(f"{name}-ppo"), "How the training goes", panels, "", TIMESTEPS)
    for tag, (step, image) in sorted(run.log.images.items()):
        if tag.startswith(EPISODES):
            title = f"episode of {tag.partition('/')[2].partition(' ')[2]}, at {step:,} {TIMESTEPS}"
            yield Picture(file_name(f"{name}-{tag}"), title, image, is_folded=True)
    rows = [[f"`{key}`", _value(value)] for key, value in run.config.items()]
    yield Text(markdown(["configuration", "value"], rows, labels=2), "Configuration")


def _latest(run: TrainingRun) -> str:
    """The latest returns in each family, and with each optimizer, as Markdown tables."""
    tables = []
    for what, tags in (("family", FAMILY), ("optimizer", OPTIMIZER)):
        rows = []
        for label in _below(run.log, tags):
            own = [_last(run, log, f"{tags}/{label}") for log in (LOG, BASE, TUNED)]
            rows.append([label, *own])
        if rows:
            tables.append(markdown([f"latest return by {what}", "policy", "base schedule", "tuned"], rows))
    return "\n\n".join(tables)


def _last(run: TrainingRun, log: str, tag: str) -> str:
    scalars = run.logs[log].scalars.get(tag) if log in run.logs else None
    return "–" if scalars is None else f"{scalars.values[-1]:.3f}"


def _below(log: Log, tags: str) -> list[str]:
    return [tag.removeprefix(f"{tags}/") for tag in log.scalars if tag.startswith(f"{tags}/")]


def _value(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def overview(runs: Mapping[str, TrainingRun]) -> str:
    """A line for each training, as a Markdown table."""
    rows = []
    for name, run in runs.items():
        values = [run.log.scalars.get(tag) for tag in SCORES.values()]
        shown = [
            "–" if s is None else f"{s.values[-1]:.0%}" if tag in SHARES else f"{s.values[-1]:.3f}"
            for s, tag in zip(values, SCORES.values(), strict=True)
        ]
        done = f"{run.timesteps():,} of {run.config[TIMESTEPS]:,}"
        rows.append([f"`{name}`", str(run.config.get("tasks", "–")), done, *shown])
    return markdown(["training", "tasks", TIMESTEPS, *SCORES], rows, labels=2)
