"""One training run by one method, and all runs of a benchmark."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from rlsched.envs.sources import Points
from rlsched.experiments import work
from rlsched.experiments.benchmark.bases import Base
from rlsched.experiments.benchmark.methods import (
    BASE_SCHEDULE,
    BASELINES,
    COSINE,
    ONLY,
    POLICY,
    REPLAY,
    WITHOUT,
    Drive,
    Ignorant,
    Led,
    ablations,
    leads,
)
from rlsched.experiments.benchmark.tasks import SUITES, TASKS, Task, cells
from rlsched.experiments.cell import Cell
from rlsched.experiments.journal import Journal, Row
from rlsched.experiments.points import batches
from rlsched.experiments.replay import ControlPath, Replay, control_path
from rlsched.files import locked
from rlsched.policy import Policy, SchedulePolicy

RUNS = "runs.jsonl"
EVALUATIONS = 50  # of the validation loss, in a run
ALL = "all"  # baselines, and the policy
BASE_LRS = (0.01, 0.1, 1.0, 10.0, 100.0)


@dataclass(frozen=True)
class Trial:
    """One training run."""

    task: str
    optimizer: str
    steps: int
    method: str
    lr_factor: float  # on the usual learning rate
    seed: int
    told: bool = True  # a policy, of the validation losses

    @property
    def cell(self) -> Cell:
        return Cell(self.task, self.optimizer, self.steps)


Key = tuple[Trial, str | None]  # a trial, and the digest of the policy where one leads it


def key(row: Row) -> Key:
    """What a row is the result of."""
    return Trial(**row["run"]), row["policy"]


class Job(NamedTuple):
    """A trial and what it needs."""

    trial: Trial
    policy: Policy | None = None
    name: str | None = None  # of the policy
    paths: Sequence[ControlPath] = ()  # for a replay to follow the mean of
    data: Path | None = None


@dataclass(frozen=True)
class Plan:
    """What to run: every method on every cell of the tasks.

    Args:
        suite: a key of `tasks.SUITES`.
        tasks: some of its tasks; None: all of which the data are there.
        seeds: runs of each kind.
        methods: names of `methods.BASELINES`, "policy", `ALL`, and what is left of a policy (`methods.ablations`). The
            reference is always among them, and so is what a replay follows.
        base_lrs: base learning rates of a policy's runs, as factors on the usual ones; those within an optimizer's
            reach are used.
        sweep: the factors that the baselines are tuned over; None: those of each base optimizer.
        untuned: whether the baselines also have the base learning rates of a policy's runs, which tune nothing.
        told: whether a policy hears of the validation losses.
        data: folder with the user's data files.

    Raises:
        ValueError: a value is out of its range.
    """

    suite: str
    tasks: Sequence[str] | None = None
    seeds: int = 3
    methods: Sequence[str] = (POLICY, COSINE)
    base_lrs: Sequence[float] = BASE_LRS
    sweep: Sequence[float] | None = None
    told: bool = True
    data: Path | None = None
    untuned: bool = False
    skipped: Mapping[str, str] = field(init=False, compare=False)  # tasks and methods, and why

    def __post_init__(self) -> None:
        if self.suite not in SUITES:
            raise ValueError(f"suite must be one of {list(SUITES)}, got {self.suite!r}")
        suite = SUITES[self.suite]
        if self.tasks is not None and (not self.tasks or not set(self.tasks) <= set(suite)):
            raise ValueError(f"tasks must be some of {list(suite)}, got {list(self.tasks)}")
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")
        for name in ("base_lrs", "sweep"):
            factors = getattr(self, name)
            if factors is not None and not (factors and all(0 < factor < math.inf for factor in factors)):
                raise ValueError(f"{name} must be positive and finite factors, got {list(factors)}")
        wrong = [name for name in self.methods if not (name in (ALL, *BASELINES) or leads(name))]
        if wrong or not self.methods:
            known = [ALL, POLICY, *BASELINES, BASE_SCHEDULE, REPLAY, f"{ONLY}CONTROL", f"{WITHOUT}OBSERVATION"]
            raise ValueError(f"methods must be some of {known}, got {wrong or 'none'}")
        skipped = {}
        for name in suite if self.tasks is None else self.tasks:
            if suite[name].needs_folder:
                try:
                    suite[name].data(self.data)
                except (ValueError, FileNotFoundError) as error:
                    if self.tasks is not None or self.data is not None:
                        raise ValueError(f"task {name}: {error}") from error
                    skipped[name] = str(error)
        for name in self._methods():
            if name in BASELINES and not BASELINES[name].is_there:
                skipped[name] = f"it needs the package {BASELINES[name].package}"
        object.__setattr__(self, "skipped", skipped)

    def jobs(self, policies: Mapping[str, Policy]) -> Iterator[Job]:
        """All of them, without the paths of replays. What a policy does not know is not asked of it."""
        suite = SUITES[self.suite]
        for name in suite if self.tasks is None else dict.fromkeys(self.tasks):
            for cell in [] if name in self.skipped else cells(name):
                base = suite[name].bases[cell.optimizer]
                for seed in range(self.seeds):
                    yield from self._of_cell(cell, base, seed, policies)

    def _of_cell(self, cell: Cell, base: Base, seed: int, policies: Mapping[str, Policy]) -> Iterator[Job]:
        for method in self._methods():
            if method in self.skipped or (method in BASELINES and not BASELINES[method].of(base)):
                continue
            if method in BASELINES:
                sweep = base.sweep if self.sweep is None else self.sweep
                for factor in dict.fromkeys([*sweep, *(base.within_reach(self.base_lrs) if self.untuned else ())]):
                    yield Job(Trial(*cell, method, factor, seed), data=self.data)
                continue
            for name, policy in policies.items():
                if method != POLICY and method not in ablations(policy):
                    continue
                if method == REPLAY and self.seeds < 2:  # there is nothing to take the mean of
                    continue
                if method == BASE_SCHEDULE:
                    name, policy = policy.base_schedule.name, SchedulePolicy.zero(policy.base_schedule)
                for factor in base.within_reach(self.base_lrs):
                    yield Job(Trial(*cell, method, factor, seed, self.told), policy, name, data=self.data)

    def _methods(self) -> list[str]:
        given = [m for name in self.methods for m in ([POLICY, *BASELINES] if name == ALL else [name])]
        followed = [POLICY] if REPLAY in given else []
        return list(dict.fromkeys([COSINE, *followed, *given]))


def run(plan: Plan, policies: Mapping[str, Policy], out: Path, processes: int = 2) -> None:
    """Do the runs of a plan that `out/runs.jsonl` does not have yet, and add a line for each.

    A replay follows the mean over all of its policy's runs in the file that differ from it in nothing but the seed.

    Args:
        plan: what to run.
        policies: by the names that they are to have.
        out: folder for the results.
        processes: that train side by side, each with one thread; with 1, this one trains.

    Raises:
        ValueError: a value is out of its range; a method is no policy's; a line of the results is none.
        OSError: `out` is in use by another process, or cannot be written to.
    """
    work.check(processes)
    _check_methods(plan, policies)
    with locked(out):
        journal = Journal(out / RUNS, key)
        jobs = {(job.trial, job.policy and job.policy.digest): job for job in plan.jobs(policies)}
        missing = [job for name, job in jobs.items() if name not in journal]
        work.do(perform, [job for job in missing if job.trial.method != REPLAY], journal, processes)
        replays = [_with_paths(job, journal) for job in missing if job.trial.method == REPLAY]
        work.do(perform, replays, journal, processes, "replaying") if replays else None


def perform(job: Job) -> Row:
    """Do one run."""
    trial, base = job.trial, TASKS[job.trial.task].bases[job.trial.optimizer]
    found, drive = trained(trial.cell, trial.seed, lambda network: _drive(job, base, network), job.data)
    row: Row = {"run": asdict(trial), "policy": None if job.policy is None else job.policy.digest, **found}
    if trial.method in BASELINES and (package := BASELINES[trial.method].package) is not None:
        row["package"] = f"{package} {version(package)}"
    if isinstance(drive, Led):
        controller = drive.scheduled.controller
        row |= {"policy_name": job.name, "interventions": [list(each) for each in controller.interventions]}
        if trial.method == POLICY:
            path = control_path(controller.windows, 4)
            row["control_path"] = {"start": [s for s, _ in path]} | {
                name: [state[name] for _, state in path]
                for name in job.policy.controls  # type: ignore[union-attr]
            }
    return row


def trained(
    cell: Cell, seed: int, drive_of: Callable[[nn.Module], Drive], folder: Path | None = None
) -> tuple[Row, Drive]:
    """Train a network of a cell; how that went, and what took its steps.

    Initial weights, mini-batches and whatever else is drawn depend on the seed alone.
    """
    task = TASKS[cell.task]
    base, points = task.bases[cell.optimizer], task.data(folder)
    torch.manual_seed(seed)
    network = task.network()
    first, _ = evaluate(network, task, points)
    drive = drive_of(network)
    ends = {round(cell.steps * i / EVALUATIONS) for i in range(1, EVALUATIONS + 1)}
    curve: dict[str, list[Any]] = {"step": [], "loss": [], "accuracy": [], "lr": []}
    loss, accuracy = first, None
    start = time.perf_counter()
    for step, (inputs, targets) in enumerate(batches(points, task.batch, cell.steps, seed), 1):
        drive.optimizer.zero_grad()
        training_loss = task.objective.loss(network(inputs), targets)
        training_loss.backward()
        if base.clip is not None:
            clip_grad_norm_(network.parameters(), base.clip)
        lr = drive.step(training_loss)
        if step in ends:
            with drive.evaluating(network, points.inputs[:512]):
                loss, accuracy = evaluate(network, task, points)
            drive.validated(loss)
            for name, value in zip(curve, (step, _short(loss, 5), _short(accuracy, 3), _short(lr, 4)), strict=True):
                curve[name].append(value)
    seconds = time.perf_counter() - start
    if task.objective.accuracy is None:
        del curve["accuracy"]
    return {
        "loss": _short(loss, 6),
        "first_loss": _short(first, 6),
        "chance": _short(task.objective.chance(points.validation_targets), 6),
        "accuracy": _short(accuracy, 4),
        "seconds": round(seconds, 2),
        "curve": curve,
    }, drive


@torch.no_grad()
def evaluate(network: nn.Module, task: Task, points: Points) -> tuple[float, float | None]:
    """Validation loss, and accuracy where there is one. What is drawn for them is the same at every call."""
    network.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outputs, targets = network(points.validation_inputs), points.validation_targets
    network.train()
    accuracy = task.objective.accuracy
    loss = float(task.objective.loss(outputs, targets))
    return loss, None if accuracy is None else accuracy(outputs, targets)


def _drive(job: Job, base: Base, network: nn.Module) -> Drive:
    trial, policy = job.trial, job.policy
    if policy is None:
        return BASELINES[trial.method].drive(base, network.parameters(), trial.lr_factor, trial.steps)
    options: dict[str, Any] = {}
    if trial.method.startswith(ONLY):
        options["controls"] = (trial.method.removeprefix(ONLY),)
    elif trial.method.startswith(WITHOUT):
        policy = Ignorant(policy, trial.method.removeprefix(WITHOUT))
    elif trial.method == REPLAY:
        policy = Replay(policy, job.paths, trial.steps)
    optimizer = base.make(network.parameters(), trial.lr_factor)
    return Led(optimizer, trial.told, total_steps=trial.steps, policy=policy, model=network, **options)


def _check_methods(plan: Plan, policies: Mapping[str, Policy]) -> None:
    """Raise ValueError where a method is none of any policy: a name that is mistyped would be left out in silence."""
    known = {POLICY, *(name for policy in policies.values() for name in ablations(policy))}
    unknown = [name for name in plan.methods if leads(name) and name not in known]
    if unknown and policies:
        raise ValueError(f"methods must be some of a policy's, {sorted(known)}, got {unknown}")
    if len({policy.digest for policy in policies.values()}) < len(policies):
        raise ValueError(f"policies must differ, got the same one twice among {list(policies)}")


def _with_paths(job: Job, journal: Journal[Key]) -> Job:
    """With the control paths of the policy's runs that differ from it in the seed alone."""
    assert job.policy is not None
    paths = []
    for (other, digest), row in journal.rows.items():
        same = replace(other, seed=job.trial.seed, method=REPLAY) == job.trial
        if digest == job.policy.digest and other.method == POLICY and same and other.seed != job.trial.seed:
            columns = dict(row["control_path"])
            starts = columns.pop("start")
            states = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            paths.append(list(zip(starts, states, strict=True)))
    return job._replace(paths=paths)


def _short(value: float | None, digits: int) -> float | None:
    """At so many digits, to be written down; None if it is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}")
