"""One training run under one schedule, and all runs of a comparison."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from tqdm import tqdm

from rlsched import ScheduledOptimizer
from rlsched.envs import InnerTask
from rlsched.envs.sources import Points
from rlsched.experiments import replay, schedules
from rlsched.experiments.compare.tasks import named
from rlsched.experiments.journal import Journal, Row
from rlsched.experiments.points import SPLIT_SEED, batches
from rlsched.files import locked
from rlsched.policy import Policy

RUNS, TENSORBOARD, EACH = "runs.jsonl", "tensorboard", "tensorboard-runs"
POLICY = "policy"
REPLAY = "replay"  # of the mean control path of the policy's runs with the other seeds
EVALUATIONS = 50  # of the validation loss, in a run
SMALLEST_FACTOR = 1e-4  # on a learning rate: factors have four decimal places
SMALLEST_LOSS = 1e-12  # a loss below it counts as this: a network that is always right has one of 0
SCHEDULES = {name: schedules.SCHEDULES[name] for name in ("constant", "linear", "cosine")}


@dataclass(frozen=True)
class Base:
    """A base optimizer at its usual default learning rate."""

    make: Callable[..., Optimizer]
    lr: float
    options: dict[str, float]


OPTIMIZERS = {
    "sgd": Base(SGD, 0.1, {"momentum": 0.9}),
    "adam": Base(Adam, 1e-3, {}),
    "adamw": Base(AdamW, 1e-3, {}),
}


@dataclass(frozen=True)
class Plan:
    """What to compare: the product of its lists.

    Args:
        tasks: names, or inner tasks by names of your own, as `tasks.named` takes them. In the results a task is its
            name: a task that was changed needs another name, or another folder.
        optimizers: keys of `OPTIMIZERS`.
        steps: inner steps of a run.
        seeds: runs of each kind.
        policy_factors: base learning rates of the policy's runs, over the usual default.
        sweep: those that the other schedules are tuned over.
        data: folder of the data files, for tasks that need them.

    Raises:
        ValueError: a value is out of its range.
        FileNotFoundError: the folder lacks a file.
    """

    tasks: Sequence[str] | Mapping[str, InnerTask] = ("digits",)
    optimizers: Sequence[str] = ("sgd", "adam")
    steps: Sequence[int] = (400,)
    seeds: int = 3
    policy_factors: Sequence[float] = (0.1, 1.0, 10.0)
    sweep: Sequence[float] = (0.1, 10**-0.5, 1.0, 10**0.5, 10.0)
    data: Path | None = None
    inner_tasks: Mapping[str, InnerTask] = field(init=False, repr=False, compare=False)  # what `tasks` came to

    def __post_init__(self) -> None:
        for name, allowed, is_allowed in (
            ("optimizers", f"some of {sorted(OPTIMIZERS)}", OPTIMIZERS.__contains__),
            ("steps", "whole numbers of at least 1", _is_count),
            ("policy_factors", f"finite numbers of at least {SMALLEST_FACTOR:g}", _is_factor),
            ("sweep", f"finite numbers of at least {SMALLEST_FACTOR:g}", _is_factor),
        ):
            given = getattr(self, name)
            if not given or not isinstance(given, list | tuple) or not all(map(is_allowed, given)):
                raise ValueError(f"{name} must be a sequence of {allowed}, got {given!r}")
        if not _is_count(self.seeds):
            raise ValueError(f"seeds must be a whole number of at least 1, got {self.seeds!r}")
        object.__setattr__(self, "inner_tasks", named(self.tasks, self.data))

    def trials(self) -> Iterator[Trial]:
        for task, optimizer, steps in product(self.inner_tasks, self.optimizers, self.steps):
            for seed in range(self.seeds):
                for factor in self.policy_factors:
                    yield Trial(task, optimizer, steps, POLICY, round(factor, 4), seed)
                for schedule, factor in product(SCHEDULES, self.sweep):
                    yield Trial(task, optimizer, steps, schedule, round(factor, 4), seed)
            if self.seeds > 1:  # else there is nothing to take the mean of
                for seed, factor in product(range(self.seeds), self.policy_factors):
                    yield Trial(task, optimizer, steps, REPLAY, round(factor, 4), seed)


@dataclass(frozen=True)
class Trial:
    """One training run."""

    task: str
    optimizer: str
    steps: int
    schedule: str
    lr_factor: float  # on the optimizer's usual default
    seed: int


Key = tuple[Trial, str | None]  # a trial, and the digest of the policy where it has one


def key(row: Row) -> Key:
    """What a row is the result of."""
    return Trial(**row["run"]), row["policy"]


def compare(plan: Plan, policy: Policy, out: Path, name: str | None = None, *, log_runs: bool = False) -> None:
    """Do the trials of a plan that `out/runs.jsonl` does not have yet, and add a line for each.

    A replay follows the mean over all of the policy's runs in the file that differ from it in nothing but the seed.
    One that is there already stays as it is when more seeds come. Another policy's runs are added to those that are
    there.

    Args:
        plan: what to compare.
        policy: the scheduling policy.
        out: folder for the results.
        name: what to call the policy beside other ones.
        log_runs: whether each run of the first seed is logged for TensorBoard, in `tensorboard-runs` of that folder,
            with all that the policy saw and decided.

    Raises:
        ValueError: a task cannot be compared on; a line of the results is none.
        OSError: `out` is in use by another process, or cannot be written to.
    """
    for task, inner in plan.inner_tasks.items():
        inner.check(task)
    with locked(out):
        journal = Journal(out / RUNS, key)
        missing = [trial for trial in plan.trials() if (trial, _policy_of(trial, policy)) not in journal]
        for trial in tqdm(list(dict.fromkeys(missing)), desc="comparing", unit="run"):
            paths = _paths_of_others(trial, policy, journal) if trial.schedule == REPLAY else []
            if paths is None:
                warnings.warn(f"{journal.path} has runs of an older rlsched, of which there is no replay", stacklevel=2)
                continue
            log_dir = _log_dir(out, trial, policy) if log_runs and trial.seed == 0 else None
            result = perform(trial, plan.inner_tasks[trial.task], policy, log_dir, paths)
            digest = _policy_of(trial, policy)
            called = {} if digest is None or name is None else {"policy_name": name}
            journal.add({"run": asdict(trial), "policy": digest, **called, **result})


def perform(
    trial: Trial,
    task: InnerTask,
    policy: Policy,
    log_dir: Path | None = None,
    paths: Sequence[replay.ControlPath] = (),
) -> Row:
    """Do one trial. The initial weights and the order of the data depend on the seed alone.

    Args:
        trial: what to train, and how.
        task: the network, its data and its loss.
        policy: the scheduling policy.
        log_dir: folder for TensorBoard.
        paths: what a replay follows the mean of.
    """
    if bool(paths) != (trial.schedule == REPLAY):
        raise ValueError(f"paths are for a replay to follow, got {len(paths)} for a trial of {trial.schedule!r}")
    base, data = OPTIMIZERS[trial.optimizer], _data(task)
    torch.manual_seed(trial.seed)
    network = task.network()
    first_loss, _ = validate(network, task, data)
    writer = None
    if log_dir is not None:
        from torch.utils.tensorboard.writer import SummaryWriter

        writer = SummaryWriter(str(log_dir))
    optimizer = base.make(network.parameters(), lr=base.lr * trial.lr_factor, **base.options)
    scheduled = None
    if trial.schedule in (POLICY, REPLAY):
        led = replay.Replay(policy, paths, trial.steps) if trial.schedule == REPLAY else policy
        scheduled = ScheduledOptimizer(optimizer, total_steps=trial.steps, policy=led, writer=writer)
    else:
        scheduler = SCHEDULES[trial.schedule](optimizer, trial.steps)

    curve = []
    start = time.perf_counter()
    for step, (inputs, targets) in enumerate(batches(data, task.batch_sizes[0], trial.steps, trial.seed)):
        optimizer.zero_grad()
        loss = task.loss(network(inputs), targets)
        loss.backward()
        group = optimizer.param_groups[0]
        if scheduled is not None:
            scheduled.step(loss=loss)
            lr = float(group["lr"])
        else:
            lr = float(group["lr"])
            optimizer.step()
            scheduler.step()
        momentum = float(group["betas"][0] if "betas" in group else group["momentum"])
        if (step + 1) % max(1, trial.steps // EVALUATIONS) == 0 or step + 1 == trial.steps:
            validation_loss, accuracy = validate(network, task, data)
            curve.append((step + 1, validation_loss, accuracy, lr, momentum))
            if writer is not None:
                names = ("validation_loss", "accuracy", "lr", "momentum")
                for name, value in zip(names, curve[-1][1:], strict=True):
                    if value is not None:
                        writer.add_scalar(f"compare/{name}", value, step + 1)
                writer.add_scalar("compare/train_loss", loss.item(), step + 1)
    seconds = time.perf_counter() - start
    if writer is not None:
        writer.close()
    result = {
        "log_loss": _log(trial, curve[-1][1]),
        "first_log_loss": _log(trial, first_loss),
        "accuracy": curve[-1][2],
        "seconds": seconds,
        "curve": _short(curve),
    }
    return (
        result if scheduled is None else {**result, "control_path": replay.control_path(scheduled.controller.windows)}
    )


@torch.no_grad()
def validate(network: nn.Module, task: InnerTask, data: Points) -> tuple[float, float | None]:
    """Validation loss, infinite beyond all bounds, and accuracy, where each point has one label."""
    network.eval()
    outputs, targets = network(data.validation_inputs), data.validation_targets
    network.train()
    loss = float(task.loss(outputs, targets))
    accuracy = None
    is_labelled = targets.ndim == 1 and not targets.is_floating_point()
    if is_labelled and isinstance(outputs, Tensor) and outputs.ndim == 2:
        accuracy = float((outputs.argmax(-1) == targets).float().mean())
    return (loss if math.isfinite(loss) else math.inf), accuracy


def _data(task: InnerTask) -> Points:
    return task.source.draw(np.random.default_rng(SPLIT_SEED))


def _paths_of_others(trial: Trial, policy: Policy, journal: Journal[Key]) -> list[replay.ControlPath] | None:
    """Control paths of the policy's runs that differ from `trial` in the seed alone; None if one has none."""
    learned = {
        other.seed: row
        for (other, digest), row in journal.rows.items()
        if digest == policy.digest and other == replace(trial, schedule=POLICY, seed=other.seed)
    }
    if not all("control_path" in row for row in learned.values()):
        return None
    return [row["control_path"] for seed, row in learned.items() if seed != trial.seed]


def _log(trial: Trial, loss: float) -> float:
    """The logarithm of a validation loss; NaN if it is not finite."""
    if loss < 0:
        raise ValueError(f"the loss of task {trial.task!r} must not be negative to be compared, it became {loss:g}")
    return math.log(max(loss, SMALLEST_LOSS)) if math.isfinite(loss) else math.nan


def _short(rows: Sequence[Sequence[float | None]]) -> list[list[float | None]]:
    """Rows that begin with an inner step, at five digits, to be written down."""
    return [[step, *(None if value is None else float(f"{value:.5g}") for value in values)] for step, *values in rows]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 1


def _is_factor(value: object) -> bool:
    return isinstance(value, int | float) and SMALLEST_FACTOR <= value < math.inf


def _log_dir(out: Path, trial: Trial, policy: Policy) -> Path:
    """Where TensorBoard shows a trial, one policy beside the other."""
    digest = _policy_of(trial, policy)
    schedule = trial.schedule if digest is None else f"{trial.schedule}-{digest[:8]}"
    setting = f"{trial.task}-{trial.optimizer}-{trial.steps}"
    return out / EACH / setting / f"{schedule}-x{trial.lr_factor:g}"


def _policy_of(trial: Trial, policy: Policy) -> str | None:
    return policy.digest if trial.schedule in (POLICY, REPLAY) else None
