"""A study: which trials there are, what each is to train, and how each ended; all of it in Optuna's journal.

One command at a time has a study's folder, and writes its journal. So a trial that is found running when the study is
opened has lost its command, and is taken up: with the settings that it had, in the folder where its training's
checkpoint lies.
"""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.pruners import BasePruner, HyperbandPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, PartialFixedSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from rlsched.agents.config import COUNT, SEED, TrainConfig, differences
from rlsched.experiments.quiet import quiet
from rlsched.experiments.tune.space import Space
from rlsched.files import end_last_line, write

STUDY, JOURNAL, TRIALS = "study.json", "journal.jsonl", "trials"
NAME = "tune"  # of the study in its journal

# Of the scores of an evaluation.
OBJECTIVES = {"regret": StudyDirection.MINIMIZE, "return": StudyDirection.MAXIMIZE}
TPE, GRID, RANDOM = SAMPLERS = ("tpe", "grid", "random")
ASHA, HYPERBAND, NONE = PRUNERS = ("asha", "hyperband", "none")
EVALUATIONS = 6  # of a training, after that of the untrained policy
REDUCTION = 3  # of the trials that come to a rung, one in so many goes on; the next rung is so many times as far
DEATHS = 3  # of processes, until a trial is given up
ERROR, DIED, SCORES = "error", "processes that died", "scores"  # attributes of a trial


@dataclass(frozen=True)
class Plan:
    """What a study does.

    Args:
        config: what all trials have in common, and the values that the first one has of what is searched.
        space: what is searched. What it fixes holds, whatever `config` says.
        objective: a key of `OBJECTIVES`.
        sampler: of `SAMPLERS`.
        pruner: of `PRUNERS`.
        trials: their number; None: all of a grid, else 20.
        seed: of the sampler; trainings have that of `config`.

    Raises:
        ValueError: a value is out of its range, or what is asked for is no objective.
    """

    config: TrainConfig
    space: Space
    objective: str = "regret"
    sampler: str = TPE
    pruner: str = ASHA
    trials: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("objective", OBJECTIVES), ("sampler", SAMPLERS), ("pruner", PRUNERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {list(known)}, got {getattr(self, name)!r}")
        if self.trials is not None and self.trials not in COUNT:
            raise ValueError(f"trials must be a whole number, {COUNT}, got {self.trials}")
        if self.seed not in SEED:
            raise ValueError(f"seed must be a whole number, {SEED}, got {self.seed}")
        object.__setattr__(self, "config", replace(self.config, **self.space.fixed, processes=1))
        self.space.check(self.config)
        if "base_schedule" in self.space.searched and self.objective == "regret":
            raise ValueError(
                f"{self.space.source}: base_schedule cannot be searched by the regret, which is to the base schedule: "
                "use the objective 'return'"
            )
        if self.sampler == GRID:
            _ = self.grid

    @cached_property
    def grid(self) -> list[dict[str, Any]]:
        return self.space.grid()

    @property
    def is_minimized(self) -> bool:
        return OBJECTIVES[self.objective] is StudyDirection.MINIMIZE

    @property
    def number(self) -> int:
        """Of trials."""
        if self.sampler == GRID:
            return min(self.trials or len(self.grid), len(self.grid))
        return self.trials or 20

    def identity(self) -> dict[str, Any]:
        """What a study that goes on must have in common with the one that began, in types that JSON can hold."""
        common = self.config.hyperparameters()
        del common["eval_every"]
        return {
            **{name: value for name, value in common.items() if name not in self.space.searched},
            **{f"space.{name}": dict(entry) for name, entry in self.space.searched.items()},
            "first trial": self.space.params(self.config),
            **{f"--{name}": getattr(self, name) for name in ("objective", "sampler", "pruner", "seed")},
        }

    def trial_config(self, params: dict[str, Any], run_dir: Path) -> TrainConfig:
        """
        Raises:
            ValueError: the values do not go together.
        """
        config = replace(self.config, **self.space.settings(params), run_dir=str(run_dir))
        updates = math.ceil(config.timesteps / (config.num_envs * config.n_steps))
        return replace(config, eval_every=math.ceil(updates / EVALUATIONS))

    def make_sampler(self, number: int) -> BaseSampler:
        """Of one trial. What it draws depends on its number and on the trials before, not on who began them when."""
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        sampler: BaseSampler = RandomSampler(seed)
        if self.sampler == TPE:
            sampler = TPESampler(multivariate=True, constant_liar=True, seed=seed)
        given = self.grid[number] if self.sampler == GRID else None
        if number == 0 and self.sampler != GRID:
            given = self.space.params(self.config)
        return sampler if given is None else PartialFixedSampler(given, sampler)

    def make_pruner(self) -> BasePruner:
        steps = self.config.timesteps
        first = math.ceil(steps / EVALUATIONS)
        if self.pruner == ASHA:
            return SuccessiveHalvingPruner(min_resource=first, reduction_factor=REDUCTION)
        if self.pruner == HYPERBAND:
            return HyperbandPruner(min_resource=first, max_resource=steps, reduction_factor=REDUCTION)
        return NopPruner()


class _Held(JournalFileOpenLock):
    """The lock on the study's folder, which the command has already, serves the journal in it too."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


class Study:
    """A study in a folder, which is locked; one that is there goes on.

    Args:
        plan: what it does.
        out: the folder.

    Raises:
        ValueError: the study there is another one, or cannot be read.
        OSError: nothing can be written there.
    """

    def __init__(self, plan: Plan, out: Path) -> None:
        self.plan, self.out = plan, out
        _check(out, plan.identity())
        write(out / STUDY, f"{json.dumps(plan.identity(), indent=2)}\n".encode())
        end_last_line(out / JOURNAL)
        with _silent():
            storage = JournalStorage(JournalFileBackend(str(out / JOURNAL), lock_obj=_Held(str(out / JOURNAL))))
            self.optuna = optuna.create_study(
                storage=storage,
                study_name=NAME,
                direction=OBJECTIVES[plan.objective],
                pruner=plan.make_pruner(),
                load_if_exists=True,
            )
        self._open: dict[int, Trial] = {}
        self._left = [trial for trial in self.trials if trial.state == TrialState.RUNNING]
        self.taken_up = len(self._left)

    @property
    def trials(self) -> list[FrozenTrial]:
        """All of them, by their numbers."""
        return self.optuna.get_trials(deepcopy=False)

    def folder(self, number: int) -> Path:
        return self.out / TRIALS / f"{number:04}"

    def begin(self) -> int | None:
        """The number of the next trial: one that lost its command, or a new one; None, if there are no more."""
        if not self._left and len(self.trials) >= self.plan.number:
            return None
        number = self._left[0].number if self._left else len(self.trials)
        with _silent():
            self.optuna.sampler = self.plan.make_sampler(number)
            trial = Trial(self.optuna, self._left.pop(0)._trial_id) if self._left else self.optuna.ask()
            for name, distribution in self.plan.space.distributions().items():
                trial._suggest(name, distribution)  # what it has already stays
        self._open[number] = trial
        return number

    def config(self, number: int) -> TrainConfig:
        """Of the training of a trial.

        Raises:
            ValueError: its values do not go together.
        """
        return self.plan.trial_config(self.trials[number].params, self.folder(number))

    def evaluated(self, number: int, timesteps: int, scores: dict[str, float]) -> bool:
        """Write an evaluation down; returns whether the training is to go on."""
        trial, value = self._open[number], scores[self.plan.objective]
        if timesteps in self.trials[number].intermediate_values:  # it goes on from there
            return True
        trial.report(value, timesteps)
        return timesteps >= self.plan.config.timesteps or not trial.should_prune()

    def done(self, number: int, scores: dict[str, float]) -> None:
        value = scores[self.plan.objective]
        if not math.isfinite(value):
            self.failed(number, f"the {self.plan.objective} is {value}")
            return
        trial = self._open.pop(number)
        trial.set_user_attr(SCORES, scores)
        self.optuna.tell(trial, value)

    def pruned(self, number: int) -> None:
        self.optuna.tell(self._open.pop(number), state=TrialState.PRUNED)

    def failed(self, number: int, reason: str) -> None:
        trial = self._open.pop(number)
        trial.set_user_attr(ERROR, " ".join(reason.split()))
        self.optuna.tell(trial, state=TrialState.FAIL)

    def died(self, number: int, how: str) -> bool:
        """Write down that the process of a trial died; returns whether another one is to take it up."""
        trial = self._open[number]
        deaths = int(trial.user_attrs.get(DIED, 0)) + 1
        trial.set_user_attr(DIED, deaths)
        if deaths < DEATHS:
            return True
        self.failed(number, f"{deaths} processes died of it, the last one {how}")
        return False

    def annotate(self, number: int, name: str, value: dict[str, float]) -> None:
        """Write more down of a trial, which may have ended."""
        self.optuna.set_user_attr(f"{name}.{number}", value)

    def noted(self, number: int, name: str) -> dict[str, float] | None:
        """What `annotate` wrote down; None if that was nothing."""
        found: dict[str, float] | None = self.optuna.user_attrs.get(f"{name}.{number}")
        return found

    def complete(self) -> list[FrozenTrial]:
        """The trials that came to their end, the best first."""
        worse = 1 if self.plan.is_minimized else -1
        found = [trial for trial in self.trials if trial.state == TrialState.COMPLETE]
        return sorted(found, key=lambda trial: worse * (trial.value or 0.0))


def _check(out: Path, now: dict[str, Any]) -> None:
    path = out / STUDY
    if not path.exists():
        return
    try:
        there = json.loads(path.read_bytes())
        if not isinstance(there, dict):
            raise ValueError("it holds no study")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"--out: {path} cannot be read: {error}. Delete it to go on with the trials there as you say now, or "
            "choose another --out"
        ) from error
    if differing := differences(there, json.loads(json.dumps(now))):
        raise ValueError(
            f"--out: {str(out)!r} holds another study: {differing}. Choose another --out, or delete that one"
        )


@contextmanager
def _silent() -> Iterator[None]:
    """Inside, Optuna says nothing of what it does, nor that a part of it is young."""
    with quiet("optuna", logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
