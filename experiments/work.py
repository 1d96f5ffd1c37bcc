"""The runs of a study, done one after the other or side by side, and written down as they end."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from rlsched.experiments.journal import Journal, Row
from rlsched.experiments.quiet import quiet

Job = TypeVar("Job")


def do(
    perform: Callable[[Job], Row], jobs: Sequence[Job], journal: Journal[Any], processes: int, doing: str = "training"
) -> None:
    """Do the jobs in their order, and add the row of each to the journal.

    Args:
        perform: does one job; with several processes it must be a function of a module.
        jobs: what to do; with several processes they are pickled.
        journal: for the results.
        processes: that work side by side, each with one thread; with 1, this one works.
        doing: what the progress bar says.

    Raises:
        ValueError: `processes` is out of its range.
    """
    check(processes)
    with ExitStack() as stack:
        if processes > 1 and jobs:
            pool = stack.enter_context(get_context("spawn").Pool(processes, _begin_worker))  # ends with this block
            rows: Iterable[Row] = pool.imap(perform, jobs)
        else:
            stack.enter_context(_silent())
            rows = map(perform, jobs)
        for row in tqdm(rows, total=len(jobs), desc=doing, unit="run"):
            journal.add(row)


def check(processes: int) -> None:
    """Raise ValueError if it is no number of processes."""
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")


@contextmanager
def _silent() -> Iterator[None]:
    """Inside, nothing is said of what is done to keep a run alive: that is in the results."""
    with quiet("rlsched", logging.CRITICAL), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "rlsched: ")
        yield


_FOR_LIFE = ExitStack()  # of a worker


def _begin_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # is for the parent, which ends this process
    _FOR_LIFE.enter_context(_silent())
