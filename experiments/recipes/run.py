"""Trains by every recipe, by hand and wrapped, and writes a line for each run."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import ReduceLROnPlateau

from rlsched import ScheduledOptimizer
from rlsched.experiments import work
from rlsched.experiments.journal import Journal, Row
from rlsched.experiments.recipes.recipes import RECIPES, Recipe
from rlsched.files import locked
from rlsched.options import ScheduleOptions

RUNS = "runs.jsonl"
BY_HAND, WRAPPED = "by hand", "wrapped"
POINTS = 25  # of the curve that is kept of a run


@dataclass(frozen=True)
class Plan:
    """What to train.

    Args:
        recipes: names of `RECIPES`.
        seeds: runs of each kind.
        lr_factors: base learning rates, over the recipe's own.
        options: of `ScheduledOptimizer`, in all wrapped runs.

    Raises:
        ValueError, TypeError: a value is out of its range.
    """

    recipes: Sequence[str] = tuple(RECIPES)
    seeds: int = 2
    lr_factors: Sequence[float] = (0.1, 1.0, 10.0)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.recipes or not set(self.recipes) <= set(RECIPES):
            raise ValueError(f"recipes must be some of {list(RECIPES)}, got {list(self.recipes)}")
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")
        if not self.lr_factors or not all(0 < factor < math.inf for factor in self.lr_factors):
            raise ValueError(f"base learning rates must be positive and finite factors, got {list(self.lr_factors)}")
        allowed = [each.name for each in fields(ScheduleOptions) if each.name != "total_steps"]
        if not set(self.options) <= set(allowed):
            raise ValueError(f"options must be some of {allowed}, got {list(self.options)}")
        ScheduleOptions(total_steps=1, **self.options)

    def trials(self) -> Iterator[Trial]:
        """All runs. By hand, the recipe's own learning rate is always among them."""
        options = json.dumps(self.options, sort_keys=True)
        for recipe, seed in product(self.recipes, range(self.seeds)):
            for factor in dict.fromkeys([1.0, *self.lr_factors]):
                yield Trial(recipe, BY_HAND, factor, seed)
            for factor in dict.fromkeys(self.lr_factors):
                yield Trial(recipe, WRAPPED, factor, seed, options)


@dataclass(frozen=True)
class Trial:
    """One training run."""

    recipe: str
    way: str  # BY_HAND or WRAPPED
    lr_factor: float  # on the recipe's own
    seed: int
    options: str = "{}"  # of the wrapper, as JSON


def key(row: Row) -> Trial:
    """What a row is the result of."""
    return Trial(**row["run"])


def run(plan: Plan, out: Path, processes: int = 2) -> None:
    """Do the trials of a plan that `out/runs.jsonl` does not have yet, and add a line for each.

    Args:
        plan: what to train.
        out: folder for the results.
        processes: that train side by side, each with one thread; with 1, this one trains.

    Raises:
        ValueError: `processes` is out of its range; `out` is a file; a line of the results is none.
    """
    work.check(processes)
    with locked(out):
        journal = Journal(out / RUNS, key)
        work.do(perform, [trial for trial in plan.trials() if trial not in journal], journal, processes)


def perform(trial: Trial) -> Row:
    """Do one trial. Initial weights and mini-batches depend on the seed alone."""
    recipe, options = RECIPES[trial.recipe], json.loads(trial.options)
    torch.manual_seed(trial.seed)
    start = time.perf_counter()
    result = train(recipe, recipe.lr * trial.lr_factor, options if trial.way == WRAPPED else None)
    return {"run": asdict(trial), **result, "seconds": round(time.perf_counter() - start, 1)}


def train(recipe: Recipe, lr: float, options: Mapping[str, Any] | None = None) -> Row:
    """Train by a recipe from a base learning rate: wrapped with these options, or by hand.

    A wrapped script is the script as it was, its clipping included, with the wrapper in place of the scheduler.

    Returns:
        What the recipe is; the final loss; what the wrapper did to keep the run alive, as (step, message); and a curve
        of (step, mean loss since the last one, learning rate at the step). A loss that is not finite is None.
    """
    problem = recipe.problem()
    optimizer = recipe.optimizer(problem.model, lr)
    scheduled, scheduler = None, None
    if options is not None:
        scheduled = ScheduledOptimizer(optimizer, total_steps=recipe.steps, **options)
    elif recipe.schedule is not None:
        scheduler = recipe.schedule(optimizer)
    steps = recipe.steps + recipe.takes_one_more
    ends = {round(steps * i / POINTS) for i in range(1, POINTS + 1)}
    losses, since, curve = problem.losses(), [], []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        for _ in range(recipe.accumulate):
            loss = next(losses) / recipe.accumulate
            loss.backward()
            since.append(loss.item() * recipe.accumulate)
            if scheduled is not None and recipe.accumulate > 1:
                scheduled.observe(loss)
        if recipe.clip is not None:
            clip_grad_norm_(problem.model.parameters(), recipe.clip)
        lr = float(optimizer.param_groups[0]["lr"])
        if scheduled is None:
            optimizer.step()
        elif recipe.accumulate > 1:
            scheduled.step()
        else:
            scheduled.step(loss=loss)
        if scheduled is not None:
            lr = float(optimizer.param_groups[0]["lr"])
        elif scheduler is not None and step % recipe.epoch == 0:
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(problem.validation_loss())
            else:
                scheduler.step()
        if step in ends:
            curve.append([step, _finite(sum(since) / len(since)), float(f"{lr:.4g}")])
            since.clear()
    return {
        "recipe": {
            "title": recipe.title,
            "optimizer": type(optimizer).__name__,
            "lr": recipe.lr,
            "clip": recipe.clip,
            "steps": steps,
        },
        "loss": _finite(problem.validation_loss()),
        "interventions": [] if scheduled is None else [list(each) for each in scheduled.controller.interventions],
        "curve": curve,
    }


def _finite(loss: float) -> float | None:
    return float(f"{loss:.6g}") if math.isfinite(loss) else None
