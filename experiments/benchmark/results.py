"""The runs of a benchmark by cell and contender, and how each fared against the reference, from `runs.jsonl` alone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rlsched.experiments.benchmark import statistics
from rlsched.experiments.benchmark.bases import Base
from rlsched.experiments.benchmark.methods import (
    BASE_SCHEDULE,
    BASELINES,
    COSINE,
    ONLY,
    POLICY,
    REPLAY,
    WITHOUT,
    leads,
)
from rlsched.experiments.benchmark.run import BASE_LRS, RUNS, key
from rlsched.experiments.benchmark.statistics import Estimate
from rlsched.experiments.benchmark.tasks import TASKS
from rlsched.experiments.cell import Cell
from rlsched.experiments.journal import Row, read

SMALLEST_LOSS = 1e-12  # what a loss below it counts as: it has a logarithm
TUNED = math.nan  # in place of a factor: the best one of each cell
Runs = dict[int, Row]  # by seed


class Contender(NamedTuple):
    """What is compared."""

    method: str
    policy: str | None = None  # the digest of the one that leads it
    told: bool = True  # of the validation losses


class Condition(NamedTuple):
    """A contender at one factor on the usual learning rate, or at `TUNED`."""

    contender: Contender
    factor: float

    @property
    def is_tuned(self) -> bool:
        return math.isnan(self.factor)


REFERENCE = Contender(COSINE)


@dataclass(frozen=True)
class Score:
    """How a condition fared against the reference, on the cells that have both."""

    cells: int
    ratio: Estimate  # log ratio of the final validation losses: below 0 where the condition ends lower
    speed_up: float
    improvement: float  # probability of it
    worst: tuple[float, Cell]  # log ratio
    diverged: int  # runs
    runs: int
    accuracy: float  # difference in percentage points; NaN where there is none


class Results:
    """All runs of a file."""

    def __init__(self, out: Path) -> None:
        self.runs: dict[Cell, dict[Contender, dict[float, Runs]]] = {}
        self.names: dict[str, str] = {}  # of policies, by their digests, in the order in which they came
        self.base_schedules: dict[str, str] = {}  # by the digests of the policies that stand still
        for (trial, digest), row in read(out / RUNS, key).items():
            contender = Contender(trial.method, digest, trial.told or not leads(trial.method))
            by_factor = self.runs.setdefault(trial.cell, {}).setdefault(contender, defaultdict(dict))
            by_factor[trial.lr_factor][trial.seed] = row
            if digest is not None:
                names = self.base_schedules if trial.method == BASE_SCHEDULE else self.names
                names.setdefault(digest, row["policy_name"])
        if not self.runs:
            raise ValueError(f"{out / RUNS} has no runs yet")

    @property
    def contenders(self) -> list[Contender]:
        """All of them: policies, what is left of them, the reference, other baselines."""
        found = dict.fromkeys(c for by_contender in self.runs.values() for c in by_contender)
        order = [POLICY, REPLAY, BASE_SCHEDULE]
        return sorted(found, key=lambda c: (_place(c.method, order), c.method.startswith(WITHOUT)))

    def policies(self) -> list[Contender]:
        return [contender for contender in self.contenders if contender.method == POLICY]

    def conditions(self, contender: Contender) -> list[Condition]:
        """Each base learning rate of what a policy leads; for a baseline, the best, and those that all cells have."""
        factors = sorted({f for by in self.runs.values() for f in by.get(contender, {})})
        if leads(contender.method):
            return [Condition(contender, factor) for factor in factors]
        untuned = [Condition(contender, factor) for factor in factors if self._is_everywhere(contender, factor)]
        return [Condition(contender, TUNED), *untuned]

    def _is_everywhere(self, contender: Contender, factor: float) -> bool:
        """Whether all cells have it in whose reach it is."""
        cells = [cell for cell, by in self.runs.items() if contender in by]
        return factor in BASE_LRS and all(
            factor in self.runs[cell][contender] for cell in cells if _base(cell).within_reach([factor])
        )

    def label(self, contender: Contender) -> str:
        """What a contender is called: with its policy, where there are several."""
        method = contender.method
        if not leads(method):
            return BASELINES[method].title
        if method == BASE_SCHEDULE:
            text = f"base schedule ({self.base_schedules[contender.policy or '']})"
        elif method == REPLAY:
            text = "replay of the mean"
        elif method.startswith(ONLY):
            text = f"{method.removeprefix(ONLY)} alone"
        else:
            text = method.replace(WITHOUT, "without ").replace(POLICY, "policy")
        if len(self.names) > 1 and contender.policy in self.names:
            text += f" {self.names[contender.policy]} ({contender.policy[:8]})"
        return text if contender.told else f"{text}, not told of validation"

    def at(self, cell: Cell, condition: Condition) -> Runs:
        """The runs of a condition on a cell, by seed; none, if there are none."""
        by_factor = self.runs[cell].get(condition.contender, {})
        if not condition.is_tuned:
            return by_factor.get(condition.factor, {})
        return by_factor[self.best(cell, condition.contender)] if by_factor else {}

    def best(self, cell: Cell, contender: Contender) -> float:
        """The factor with the lowest mean log loss over the seeds, of those that it was tuned over."""
        by_factor, tried = self.runs[cell][contender], self.tried(cell, contender)
        return min(tried, key=lambda f: (np.mean([log_loss(row) for row in by_factor[f].values()]), f))

    def tried(self, cell: Cell, contender: Contender) -> list[float]:
        """The factors that a baseline was tuned over: others are there to see what comes of a wrong one."""
        factors = sorted(self.runs[cell].get(contender, {}))
        return [factor for factor in factors if factor in _base(cell).sweep] or factors

    def reference(self, cell: Cell) -> Runs:
        return self.at(cell, Condition(REFERENCE, TUNED))

    def ratios(self, cell: Cell, condition: Condition) -> list[float]:
        """Log ratio to the reference, of the seeds that both have."""
        runs, reference = self.at(cell, condition), self.reference(cell)
        return [log_loss(runs[seed]) - log_loss(reference[seed]) for seed in runs if seed in reference]

    def score(self, condition: Condition) -> Score | None:
        """None without a cell that has the condition and the reference."""
        cells = [cell for cell in self.runs if self.ratios(cell, condition)]
        if not cells:
            return None
        ratios = {cell: self.ratios(cell, condition) for cell in cells}
        median, worst = max((float(np.median(ratios[cell])), cell) for cell in cells)
        rows = [row for cell in cells for row in self.at(cell, condition).values()]
        gains = [gain for cell in cells if (gain := self._accuracy(cell, condition)) is not None]
        return Score(
            len(cells),
            statistics.stratified(list(ratios.values())),
            float(statistics.interquartile_mean([self._speed_up(cell, condition) for cell in cells])),
            float(np.mean([self._improvement(cell, condition) for cell in cells])),
            (median, worst),
            sum(map(diverged, rows)),
            len(rows),
            float(np.mean(gains)) if gains else math.nan,
        )

    def difference(self, first: Contender, second: Contender, factors: Sequence[float]) -> tuple[int, Estimate] | None:
        """Of the log losses of two policies, first less second, and the number of cells that have both.

        Median over the seeds that both have, and mean over those of the factors that a cell has.
        """
        means = []
        for cell in self.runs:
            medians = []
            for factor in factors:
                a, b = self.at(cell, Condition(first, factor)), self.at(cell, Condition(second, factor))
                if seeds := a.keys() & b.keys():
                    medians.append(np.median([log_loss(a[seed]) - log_loss(b[seed]) for seed in seeds]))
            means += [float(np.mean(medians))] if medians else []
        return (len(means), statistics.paired(means)) if means else None

    def not_learnt(self) -> list[Cell]:
        """Cells in which the reference ends no lower than one answer to all would."""
        return [
            cell
            for cell in self.runs
            if (runs := self.reference(cell))
            and np.median([_finite(r["loss"]) / r["chance"] for r in runs.values()]) >= 1
        ]

    def at_the_edge(self) -> list[Cell]:
        """Cells in which the best learning rate of the reference is the lowest or the highest that was tried."""
        tried = {cell: self.tried(cell, REFERENCE) for cell in self.runs}
        return [c for c, of in tried.items() if len(of) > 1 and self.best(c, REFERENCE) in (of[0], of[-1])]

    def _speed_up(self, cell: Cell, condition: Condition) -> float:
        runs, reference = self.at(cell, condition), self.reference(cell)
        curves = [(runs[seed]["curve"], reference[seed]["curve"]) for seed in runs if seed in reference]
        ups = [statistics.speed_up(a["step"], _numbers(a["loss"]), _numbers(b["loss"])) for a, b in curves]
        return float(np.median(ups))

    def _improvement(self, cell: Cell, condition: Condition) -> float:
        runs, reference = (map(log_loss, r.values()) for r in (self.at(cell, condition), self.reference(cell)))
        return statistics.probability_of_improvement(list(runs), list(reference))

    def _accuracy(self, cell: Cell, condition: Condition) -> float | None:
        runs, reference = self.at(cell, condition), self.reference(cell)
        gains = [
            100 * (runs[seed]["accuracy"] - reference[seed]["accuracy"])
            for seed in runs
            if seed in reference and runs[seed]["accuracy"] is not None
        ]
        return float(np.median(gains)) if gains else None


def _base(cell: Cell) -> Base:
    return TASKS[cell.task].bases[cell.optimizer]


def log_loss(row: Row) -> float:
    """Of the final validation loss; of the untrained network's for a run that diverged, or ended above it."""
    return math.log(max(min(_finite(row["loss"]), row["first_loss"]), SMALLEST_LOSS))


def diverged(row: Row) -> bool:
    """Whether a run ended where the untrained network was, or above it, or at no number."""
    return _finite(row["loss"]) >= row["first_loss"]


def _finite(loss: float | None) -> float:
    return math.inf if loss is None else loss


def _numbers(losses: Iterable[float | None]) -> list[float]:
    return [math.nan if loss is None else loss for loss in losses]


def _place(method: str, order: list[str]) -> int:
    if leads(method):
        return order.index(method) if method in order else len(order)
    return len(order) + 1 + list(BASELINES).index(method)
