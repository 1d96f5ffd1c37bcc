"""Jobs that ask a server for decisions, all at once, while it is there and while it is not."""

from __future__ import annotations

import itertools
import multiprocessing
import socket
import threading
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from rlsched.cli import main
from rlsched.connection import Connection
from rlsched.experiments.table import markdown
from rlsched.files import write
from rlsched.formats import FORMATS
from rlsched.policy import SchedulePolicy
from rlsched.remote import ABOUT, RemotePolicy

FORKS = multiprocessing.get_context("forkserver")  # of a process that has imported all: a server begins at once
FORKS.set_forkserver_preload(["rlsched.agents.serving.server", "rlsched.cli"])
STACK = 256 * 1024  # bytes of each job's thread


@dataclass(frozen=True)
class Load:
    """What is asked of a server.

    Args:
        jobs: at once.
        pause: mean seconds from a job's decision to its next one; 0 for as fast as they come.
        gone: seconds for which the server is gone, killed in the midst; 0 for never.
    """

    jobs: int
    pause: float
    gone: float = 0.0


LOADS = (Load(1, 0.0), Load(100, 0.0), Load(1000, 0.0), Load(1000, 10.0), Load(1000, 10.0, gone=10.0))


def server(policy: Path, port: int, batch: int, wait: float) -> ForkServerProcess:
    """`rlsched serve` as a process, which serves when this returns."""
    options = {"--port": port, "--batch": batch, "--wait": wait}
    words = [str(word) for option in options.items() for word in option]
    process = FORKS.Process(target=main, args=(["serve", str(policy), *words],))
    process.start()
    while process.is_alive():
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return process
        time.sleep(0.02)
    raise ValueError(f"rlsched serve {policy} did not begin")


def measure(load: Load, policy: Path, *, seconds: float, batch: int, wait: float) -> dict[str, Any]:
    """What came of a load.

    Args:
        load: what is asked.
        policy: the file that is served.
        seconds: for which the jobs ask.
        batch: runs in a batch at most.
        wait: milliseconds that a batch waits.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    jobs: list[Job] = []
    serving = server(policy, port, batch, wait)
    try:
        for i in range(load.jobs):
            jobs.append(Job(i, f"http://127.0.0.1:{port}", load.pause))
        before = threading.stack_size(STACK)
        for job in jobs:
            job.thread.start()
        threading.stack_size(before)
        start = time.monotonic()
        if load.gone:
            time.sleep(seconds / 2)
            serving.kill()
            serving.join()
            time.sleep(load.gone)
            serving = server(policy, port, batch, wait)
            seconds = seconds / 2 + 20.0  # some wait for 16 seconds until they ask again
        time.sleep(seconds)
        about = Connection(jobs[0].policy.url, None, 60.0).exchange("GET", ABOUT)
        took = time.monotonic() - start
    finally:
        for job in jobs:
            job.is_over.set()
        for job in jobs:
            if job.thread.is_alive():
                job.thread.join()
        serving.kill()
        serving.join()
    return _counted(load, jobs, about, took)


class Job:
    """A training run, as far as the server sees it: a thread that asks for decisions."""

    def __init__(self, number: int, url: str, pause: float) -> None:
        self.policy = RemotePolicy(url, timeout=5.0 if pause else 120.0)  # where they only queue, see for how long
        self.took: list[float] = []  # seconds of each answer
        self.asked = 0
        self.came_back = False
        self.is_over = threading.Event()
        self.error: BaseException | None = None
        self._pause, self._random = pause, np.random.default_rng(number)
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        generator, missed = torch.Generator().manual_seed(int(self._random.integers(2**31))), 0
        try:
            self.is_over.wait(self._random.uniform(0, self._pause))
            for self.asked in itertools.count(1):
                observation = torch.rand(len(self.policy.observations), generator=generator)
                start = time.perf_counter()
                self.policy.act(observation)
                if self.policy.missed == missed:
                    self.took.append(time.perf_counter() - start)
                    self.came_back = missed > 0
                missed = self.policy.missed
                if self.is_over.wait(self._random.uniform(0, 2 * self._pause)):
                    return
        except BaseException as error:
            self.error = error


def _counted(load: Load, jobs: list[Job], about: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """What came of it, as the jobs and the server tell."""
    errors = [job.error for job in jobs if job.error is not None]
    if errors:
        raise errors[0]
    took = 1e3 * np.concatenate([job.took for job in jobs])
    asked, answered, missed = (
        sum(counts) for counts in zip(*((j.asked, j.policy.answered, j.policy.missed) for j in jobs), strict=True)
    )
    return {
        "jobs": load.jobs,
        "pause": load.pause,
        "gone": load.gone,
        "asked": asked,
        "answered": answered,
        "missed": missed,
        "rate": answered / seconds,
        "p50": float(np.quantile(took, 0.5)),
        "p99": float(np.quantile(took, 0.99)),
        "batch": about["decisions"] / max(1, about["batches"]),
        "back": sum(job.came_back for job in jobs),
    }


def table(out: Path, policy: str, **options: Any) -> str:
    """Measure all loads, write `table.md`, and return it."""
    lines = []
    file = FORMATS["onnx"].save(SchedulePolicy.load(policy), out / "policy.onnx")  # once, and not at each start
    for load in tqdm(LOADS, desc="loads", unit="load"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the server is gone
            row = measure(load, file, **options)
        lost = row["asked"] - row["answered"] - row["missed"]
        pace = f"{row['pause']:g} s" if row["pause"] else "none"
        gone = f"{row['gone']:g} s, {row['back']:,} jobs back" if row["gone"] else "–"
        counts = [f"{row['asked']:,}", f"{row['answered']:,}", f"{row['missed']:,}", f"{lost:,}"]
        figures = [f"{row['p50']:.3g}", f"{row['p99']:.3g}", f"{row['rate']:,.0f}", f"{row['batch']:.1f}"]
        lines.append([f"{row['jobs']:,}", pace, gone, *figures, *counts])
    head = ["jobs", "pause", "server gone", "p50, ms", "p99, ms", "decisions/s", "runs in a batch"]
    text = markdown([*head, "asked", "by the server", "by the fallback", "lost"], lines, labels=3)
    write(out / "table.md", f"{text}\n".encode())
    return text
