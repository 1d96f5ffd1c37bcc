"""A schedule that is given before the run, in the controls of a policy, and the search for the best one in a cell."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import optuna
import torch
from torch import nn
from torch.optim import Optimizer

from rlsched.base_schedule import START
from rlsched.control import CONTROLS, base_values, decided
from rlsched.experiments.benchmark.bases import Base
from rlsched.experiments.benchmark.methods import BASELINES, COSINE, Drive, Parameters
from rlsched.experiments.benchmark.results import log_loss
from rlsched.experiments.benchmark.run import trained
from rlsched.experiments.benchmark.tasks import TASKS
from rlsched.experiments.cell import Cell
from rlsched.experiments.journal import Row
from rlsched.experiments.quiet import quiet
from rlsched.traits import traits_of

SEARCHED, CHOSEN, JUDGED = 0, 1, (2, 3)  # seeds: of the search, to choose among its best, and to judge the chosen one
BEST = 4  # schedules of the search that come to be chosen from
REACH = 10.0  # how far beyond the baselines' sweep the learning rate is searched, either way


@dataclass(frozen=True)
class Course:
    """A course of a run's controls.

    Attributes:
        level: highest factor on the usual learning rate.
        warm_up: part of the run in which the learning rate rises to that.
        plateau: part of the run at whose end it begins to fall, at least `warm_up`.
        power: it falls as this power of the time that is left then.
        momentum, final_momentum: as the control of that name has it (1 is 0.9), moved evenly from one to the other; of
            no meaning where the optimizer has none.
        weight_decay: factor on it.
    """

    level: float
    warm_up: float = 0.0
    plateau: float = 0.0
    power: float = 1.0
    momentum: float = 1.0
    final_momentum: float = 1.0
    weight_decay: float = 1.0

    def factor(self, progress: float) -> float:
        """On the highest learning rate, after this fraction of the run."""
        if progress < self.warm_up:
            return START + (1 - START) * progress / self.warm_up
        start = max(self.plateau, self.warm_up)
        return 1.0 if progress <= start else float(((1 - progress) / (1 - start)) ** self.power)


class Planned(Drive):
    """An optimizer on a course."""

    def __init__(self, optimizer: Optimizer, course: Course, steps: int) -> None:
        super().__init__(optimizer)
        self.course, self.steps, self.taken = course, steps, 0
        (self.group,) = optimizer.param_groups
        self.base = base_values(self.group)
        self.sums_gradients = traits_of(optimizer).sums_gradients
        self._set()

    def step(self, loss: Any) -> float:
        lr = super().step(loss)
        self.taken += 1
        self._set()
        return lr

    def _set(self) -> None:
        course, progress = self.course, min(self.taken / self.steps, 1.0)
        momentum = course.momentum + progress * (course.final_momentum - course.momentum)
        moved = dict.fromkeys(CONTROLS, 0.0)
        moved["momentum"] = momentum - CONTROLS["momentum"].origin(self.base["momentum"])
        moved["weight_decay"] = math.log(course.weight_decay)
        values = decided(self.base, moved, self.sums_gradients)
        values["lr"] = values["lr"] * course.level * course.factor(progress)
        for name in ("lr", "momentum", "weight_decay"):
            if CONTROLS[name].can_move(self.base[name]):
                CONTROLS[name].write(self.group, float(values[name]))


class Search(NamedTuple):
    """What to search."""

    cell: Cell
    trials: int  # at least as many as the baseline's sweep has learning rates


def key(row: Row) -> Search:
    """What a row is the result of."""
    return Search(Cell(*row["cell"]), row["trials"])


def search(job: Search) -> Row:
    """Search the best course in a cell, and judge it and the best cosine by runs that chose neither.

    Both are chosen by the mean log loss of two seeds: cosine's learning rate of its whole sweep, the course of the few
    that were best in the search (multivariate TPE), on the first seed.
    """
    cell, base = job.cell, TASKS[job.cell.task].bases[job.cell.optimizer]
    tried: dict[Course, float] = {}

    def on(course: Course, seed: int) -> float:
        return _run(cell, lambda parameters: Planned(base.make(parameters, 1.0), course, cell.steps), seed)

    def cosine(factor: float, seed: int) -> float:
        return _run(cell, lambda parameters: BASELINES[COSINE].drive(base, parameters, factor, cell.steps), seed)

    def objective(trial: optuna.Trial) -> float:
        course = _suggested(trial, base)
        tried[course] = on(course, SEARCHED)
        return tried[course]

    with quiet("optuna", logging.WARNING):
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0, multivariate=True, n_startup_trials=12))
        for factor in base.sweep:
            study.enqueue_trial({"level": factor, **plain(base)})
        study.optimize(objective, job.trials)
    best = sorted(tried, key=lambda course: tried[course])[:BEST]
    course = min(best, key=lambda each: tried[each] + on(each, CHOSEN))
    factor = min(base.sweep, key=lambda each: sum(cosine(each, seed) for seed in (SEARCHED, CHOSEN)))
    return {
        "cell": list(cell),
        "trials": job.trials,
        "course": asdict(course),
        "losses": [on(course, seed) for seed in JUDGED],
        "cosine": factor,
        "cosine_losses": [cosine(factor, seed) for seed in JUDGED],
    }


def gain(row: Row) -> float:
    """Log ratio of the final loss of the course to that of cosine, mean over the seeds."""
    return float(np.mean(row["losses"]) - np.mean(row["cosine_losses"]))


def plain(base: Base) -> dict[str, float]:
    """What is searched beside the level, as a linear decay has it: where the search begins."""
    group = base.make([nn.Parameter(torch.zeros(2, 2))], 1.0).param_groups[0]
    given, found = base_values(group), {"warm_up": 0.0, "plateau": 0.0, "power": 1.0}
    momentum, weight_decay = CONTROLS["momentum"], CONTROLS["weight_decay"]
    if momentum.can_move(given["momentum"]):
        found |= dict.fromkeys(("momentum", "final_momentum"), float(momentum.origin(given["momentum"])))
    if weight_decay.can_move(given["weight_decay"]):
        found["weight_decay"] = 1.0
    return found


def _suggested(trial: optuna.Trial, base: Base) -> Course:
    momentum = CONTROLS["momentum"]
    ranges: dict[str, tuple[float, float]] = {
        "warm_up": (0.0, 0.2),
        "plateau": (0.0, 0.9),
        "power": (0.5, 3.0),
        "momentum": (momentum.low, momentum.high),
        "final_momentum": (momentum.low, momentum.high),
        "weight_decay": (0.1, 30.0),
    }
    level = trial.suggest_float("level", min(base.sweep) / REACH, max(base.sweep) * REACH, log=True)
    return Course(level, **{x: trial.suggest_float(x, *ranges[x], log=x == "weight_decay") for x in plain(base)})


def _run(cell: Cell, drive: Callable[[Parameters], Drive], seed: int) -> float:
    """The log of the final loss."""
    return log_loss(trained(cell, seed, lambda network: drive(network.parameters()))[0])
