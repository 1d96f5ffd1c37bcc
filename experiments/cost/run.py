"""Times all loops of a network and a base optimizer in turn, and writes a line for each."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rlsched.experiments.cost.loops import NETWORKS, OPTIMIZERS, PLAIN, loop, loops, memory, window
from rlsched.experiments.journal import Journal, Row
from rlsched.files import locked

RUNS = "runs.jsonl"
MIN_ROUNDS = 3


@dataclass(frozen=True)
class Case:
    """What is timed: a network under a base optimizer, in one kind of loop."""

    network: str
    optimizer: str
    loop: str


def key(row: Row) -> Case:
    """What a row is the result of."""
    return Case(**row["case"])


def measure(
    out: Path, networks: tuple[str, ...] = tuple(NETWORKS), *, seconds: float = 120.0, max_rounds: int = 100
) -> None:
    """Time what `out/runs.jsonl` does not have yet.

    Args:
        out: folder for the results.
        networks: some of `NETWORKS`.
        seconds: about how long to time the loops of one network and optimizer; at least three rounds are done.
        max_rounds: rounds at most.

    Raises:
        ValueError: a value is out of its range; a line of the results is none.
        OSError: `out` is in use by another process, or cannot be written to.
    """
    if not networks or not set(networks) <= set(NETWORKS):
        raise ValueError(f"networks must be some of {list(NETWORKS)}, got {list(networks)}")
    if not 0 <= seconds < math.inf:
        raise ValueError(f"seconds must be at least 0 and finite, got {seconds}")
    if max_rounds < MIN_ROUNDS:
        raise ValueError(f"max_rounds must be at least {MIN_ROUNDS}, got {max_rounds}")
    with locked(out):
        journal = Journal(out / RUNS, key)
        for name, optimizer in tqdm(list(product(networks, OPTIMIZERS)), desc="timing", unit="network"):
            if not all(Case(name, optimizer, kind) in journal for kind in loops(optimizer)):
                for row in time_loops(name, optimizer, seconds, max_rounds):
                    journal.add(row)


def time_loops(name: str, optimizer: str, seconds: float, max_rounds: int) -> Iterator[Row]:
    """Time the loops of a network in turn, round after round, and compare each with the plain one of its round."""
    steps = {kind: loop(kind, NETWORKS[name], optimizer) for kind in loops(optimizer)}
    kept = {kind: memory(step) for kind, step in steps.items()}
    parameters = sum(p.numel() for p in NETWORKS[name].make().parameters())
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for step in steps.values():  # to the end of the first window, which has the probe and sets buffers up
        for _ in range(2):
            step()
    start = time.perf_counter()
    rounds = 0
    while rounds < max_rounds and (rounds < MIN_ROUNDS or time.perf_counter() - start < seconds):
        order = list(steps) if rounds % 2 == 0 else list(steps)[::-1]  # what drifts is not always to the same side
        for kind in order:
            times[kind].append(_time(steps[kind], window(kind)))
        rounds += 1
    for kind in steps:
        ratios = [one / plain for one, plain in zip(times[kind], times[PLAIN], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        yield {
            "case": asdict(Case(name, optimizer, kind)),
            "parameters": parameters,
            "rounds": rounds,
            "milliseconds": 1e3 * statistics.median(times[kind]),
            "ratio": statistics.median(ratios),
            "quartiles": [low, high],
            "bytes": kept[kind],
            "bytes_ratio": kept[kind] / kept[PLAIN],
            "threads": torch.get_num_threads(),
        }


def _time(step: Any, steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps
