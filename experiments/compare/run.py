"""One training run under one schedule, and all runs of a comparison."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler
from tqdm import tqdm

from rlsched import ScheduledOptimizer, SchedulePolicy
from rlsched.experiments.compare import replay
from rlsched.experiments.compare.tasks import TASKS, Data, Task
from rlsched.experiments.records import provenance, read

RUNS, TENSORBOARD = "runs.jsonl", "tensorboard"
POLICY = "policy"
REPLAY = "replay"  # of the mean control path of the policy's runs with the other seeds
EVALUATIONS = 50  # of the validation loss, in a run
SCHEDULES: dict[str, Callable[[Optimizer, int], LRScheduler]] = {
    "constant": lambda optimizer, steps: LambdaLR(optimizer, lambda _: 1.0),
    "linear": lambda optimizer, steps: LambdaLR(optimizer, lambda step: 1 - step / steps),
    "cosine": lambda optimizer, steps: CosineAnnealingLR(optimizer, steps),
}


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
    """What to compare: the product of its lists."""

    tasks: tuple[str, ...] = ("digits",)
    optimizers: tuple[str, ...] = ("sgd", "adam")
    steps: tuple[int, ...] = (400,)
    seeds: int = 3
    policy_factors: tuple[float, ...] = (0.1, 1.0, 10.0)  # base lr of the policy's runs, over the usual default
    sweep: tuple[float, ...] = (0.1, 10**-0.5, 1.0, 10**0.5, 10.0)  # base lrs that the other schedules are tuned over

    def __post_init__(self) -> None:
        for name, given, known in (("tasks", self.tasks, TASKS), ("optimizers", self.optimizers, OPTIMIZERS)):
            if not given or not set(given) <= set(known):
                raise ValueError(f"{name} must be some of {sorted(known)}, got {list(given)}")
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")
        for name in ("steps", "policy_factors", "sweep"):
            if not getattr(self, name) or min(getattr(self, name)) <= 0:
                raise ValueError(f"{name} must be positive numbers, got {list(getattr(self, name))}")

    def runs(self) -> Iterator[Run]:
        for task, optimizer, steps in product(self.tasks, self.optimizers, self.steps):
            for seed in range(self.seeds):
                for factor in self.policy_factors:
                    yield Run(task, optimizer, steps, POLICY, round(factor, 4), seed)
                for schedule, factor in product(SCHEDULES, self.sweep):
                    yield Run(task, optimizer, steps, schedule, round(factor, 4), seed)
            if self.seeds > 1:  # else there is nothing to take the mean of
                for seed, factor in product(range(self.seeds), self.policy_factors):
                    yield Run(task, optimizer, steps, REPLAY, round(factor, 4), seed)


@dataclass(frozen=True)
class Run:
    """One training run."""

    task: str
    optimizer: str
    steps: int
    schedule: str
    lr_factor: float  # on the optimizer's usual default
    seed: int


def compare(plan: Plan, policy: SchedulePolicy, out: Path, data: Path | None = None) -> None:
    """Do the runs of a plan that `out/runs.jsonl` does not have yet, and add a line for each.

    A replay follows the mean over all of the policy's runs in the file that differ from it in nothing but the seed.
    One that is there already stays as it is when more seeds come.

    Args:
        plan: what to compare.
        policy: the scheduling policy.
        out: folder for the results; TensorBoard logs of the first seed's runs go to its `tensorboard`.
        data: folder of the data files, for tasks that need them.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / RUNS
    rows = read(path) if path.exists() else []
    done = {_key(row["run"], row["policy"]) for row in rows}
    missing = [run for run in plan.runs() if _key(asdict(run), _policy_of(run, policy)) not in done]
    for task in {run.task for run in missing}:
        TASKS[task].data(data)  # a missing file is better known before the first run than after an hour
    origin = provenance()
    with path.open("a") as file:
        for run in tqdm(missing, desc="comparing", unit="run"):
            log_dir = (
                out / TENSORBOARD / f"{run.task}-{run.optimizer}-{run.steps}" / f"{run.schedule}-x{run.lr_factor:g}"
            )
            paths = None
            if run.schedule == REPLAY:
                paths = _paths_of_others(run, policy, rows)
                if paths is None:
                    warnings.warn(f"{path} has runs of an older rlsched, of which there is no replay", stacklevel=2)
                    continue
            result = perform(run, policy, data, log_dir if run.seed == 0 else None, paths)
            rows.append({"run": asdict(run), "policy": _policy_of(run, policy), **result, "provenance": origin})
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()


def perform(
    run: Run,
    policy: SchedulePolicy,
    folder: Path | None = None,
    log_dir: Path | None = None,
    paths: Sequence[replay.ControlPath] | None = None,
) -> dict[str, Any]:
    """Do one run. The initial weights and the order of the data depend on the seed alone.

    Args:
        run: what to train.
        policy: the scheduling policy.
        folder: of the data files, for tasks that need them.
        log_dir: folder for TensorBoard.
        paths: what a replay follows the mean of.
    """
    task, base = TASKS[run.task], OPTIMIZERS[run.optimizer]
    data = task.data(folder)
    torch.manual_seed(run.seed)
    network = task.network()
    writer = None
    if log_dir is not None:
        from torch.utils.tensorboard.writer import SummaryWriter

        writer = SummaryWriter(str(log_dir))
    optimizer = base.make(network.parameters(), lr=base.lr * run.lr_factor, **base.options)
    scheduled = None
    if run.schedule in (POLICY, REPLAY):
        scheduled = ScheduledOptimizer(optimizer, total_steps=run.steps, policy=policy, writer=writer)
        if run.schedule == REPLAY:
            assert paths is not None
            scheduled.controller.policy = replay.Replay(scheduled.controller, paths)
    else:
        scheduler = SCHEDULES[run.schedule](optimizer, run.steps)

    curve = []
    start = time.perf_counter()
    for step, (x, y) in enumerate(_batches(task, data, run)):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(x), y)
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
        if (step + 1) % max(1, run.steps // EVALUATIONS) == 0 or step + 1 == run.steps:
            validation_loss, accuracy = validate(network, data)
            curve.append((step + 1, validation_loss, accuracy, lr, momentum))
            if writer is not None:
                names = ("validation_loss", "accuracy", "lr", "momentum")
                for name, value in zip(names, curve[-1][1:], strict=True):
                    writer.add_scalar(f"compare/{name}", value, step + 1)
                writer.add_scalar("compare/train_loss", loss.item(), step + 1)
    seconds = time.perf_counter() - start
    if writer is not None:
        writer.close()
    result = {
        "log_loss": math.log(curve[-1][1]) if math.isfinite(curve[-1][1]) else math.nan,
        "accuracy": curve[-1][2],
        "seconds": seconds,
        "curve": _short(curve),
    }
    return result if scheduled is None else {**result, "control_path": _short(scheduled.controller.control_path)}


@torch.no_grad()
def validate(network: nn.Module, data: Data) -> tuple[float, float]:
    """Validation loss and accuracy; a loss beyond all bounds is infinite."""
    outputs = network(data.validation_inputs)
    loss = float(nn.functional.cross_entropy(outputs, data.validation_labels))
    accuracy = float((outputs.argmax(-1) == data.validation_labels).float().mean())
    return (loss if math.isfinite(loss) else math.inf), accuracy


def _batches(task: Task, data: Data, run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    """`run.steps` mini-batches, epoch after epoch in a new order."""
    generator = torch.Generator().manual_seed(run.seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(run.steps):
        if len(order) < task.batch_size:
            order = torch.randperm(len(data.labels), generator=generator)
        rows, order = order[: task.batch_size], order[task.batch_size :]
        yield data.inputs[rows], data.labels[rows]


def _paths_of_others(run: Run, policy: SchedulePolicy, rows: list[dict[str, Any]]) -> list[replay.ControlPath] | None:
    """Control paths of the policy's runs that differ from `run` in the seed alone; None if one has none."""
    learned = [
        row
        for row in rows
        if row["policy"] == policy.digest
        and Run(**row["run"]) == replace(run, schedule=POLICY, seed=row["run"]["seed"])
    ]
    if not all("control_path" in row for row in learned):
        return None
    return [row["control_path"] for row in learned if row["run"]["seed"] != run.seed]


def _short(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """Rows that begin with an inner step, at five digits, to be written down."""
    return [[step, *(float(f"{value:.5g}") for value in values)] for step, *values in rows]


def _policy_of(run: Run, policy: SchedulePolicy) -> str | None:
    return policy.digest if run.schedule in (POLICY, REPLAY) else None


def _key(run: dict[str, Any], policy: str | None) -> tuple[Any, ...]:
    return (*run.values(), policy)
