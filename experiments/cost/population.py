"""What a decision costs a job of a population beside one of as many jobs that decide alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from tqdm import tqdm

from rlsched import Population, attach
from rlsched.experiments.table import markdown
from rlsched.files import write
from rlsched.policy import SchedulePolicy

JOBS = (1, 10, 100, 1000)
ROUNDS, DECISIONS = 5, 1000  # at least so many rounds, of about so many decisions in all


def population_table(out: Path, jobs: Sequence[int] = JOBS) -> str:
    """Time both, write `population.md`, and return the table."""
    lines = []
    for count in tqdm(jobs, desc="populations", unit="size"):
        alone, together = costs(count)
        shares = f"{alone:.3f}", f"{together:.3f}", f"{together / alone:.2f}"
        lines.append([f"{count:,}", *shares])
    head = ["jobs", "alone, ms a job and decision", "in a population", "ratio"]
    caption = "Processor time of a step with a decision, of a network of 170 parameters: median of interleaved rounds."
    text = f"{markdown(head, lines)}\n\n{caption}"
    write(out / "population.md", f"{text}\n".encode())
    return text


def costs(jobs: int) -> tuple[float, float]:
    """Milliseconds of processor time that a job's step with a decision takes, alone and in a population."""
    rounds = max(ROUNDS, DECISIONS // jobs)
    policy = SchedulePolicy.load("default")
    losses = [1.0 + i / jobs for i in range(jobs)]
    alone = [_job() for _ in range(jobs)]
    controllers = [
        attach(optimizer, policy=policy, total_steps=4 * rounds, decisions=4 * rounds) for optimizer in alone
    ]
    together = Population(
        attach(_job(), policy=policy, total_steps=4 * rounds, decisions=4 * rounds) for _ in range(jobs)
    )
    took: tuple[list[float], list[float]] = [], []
    for round_ in range(rounds + 2):
        for kind in (0, 1) if round_ % 2 else (1, 0):
            start = time.process_time()
            if kind:
                together.step(losses)
            else:
                for optimizer, controller, loss in zip(alone, controllers, losses, strict=True):
                    controller.observe(loss)
                    optimizer.step()
            if round_ >= 2:  # past the probe
                took[kind].append(1e3 * (time.process_time() - start) / jobs)
    return statistics.median(took[0]), statistics.median(took[1])


def _job() -> Optimizer:
    """An optimizer with gradients."""
    model = nn.Linear(16, 10)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-3)
    return SGD(model.parameters(), 0.1, 0.9)
