"""Processes that train, a trial at a time each. What they find they tell the command, which alone writes it down."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from rlsched.agents.config import TrainConfig
from rlsched.envs.sharding import check_main_guard, deaf_to_interrupts, portable
from rlsched.files import write

START = "spawn"  # how a process begins
ERROR = "error.txt"  # in the folder of a trial
Scores = dict[str, float]
Hear = Callable[[int, Scores], bool]  # timesteps and scores of an evaluation -> whether to go on


class Evaluated(NamedTuple):
    """A training was evaluated, and waits for an answer: whether to go on."""

    timesteps: int
    scores: Scores


class Done(NamedTuple):
    """A training has come to its end."""

    scores: Scores


class Stopped(NamedTuple):
    """A training did not go on, as it was told."""


class Failed(NamedTuple):
    """A training cannot be done with its settings."""

    reason: str


class Broken(NamedTuple):
    """A training cannot be done here and now: the disk is full, say."""

    error: OSError


class Died(NamedTuple):
    """The process is gone; what it trained is in its checkpoint."""

    exit_code: int


Message = Evaluated | Done | Stopped | Failed | Broken | Died


class _Stop(Exception):
    pass


def perform(config: TrainConfig, go_on: Hear) -> Message:
    """Train, or go on where an earlier process left off; returns how it ended."""
    from rlsched.agents.ppo import train

    def evaluated(timesteps: int, scores: Scores) -> None:
        if not go_on(timesteps, scores):
            raise _Stop

    try:
        policy = train(config, on_evaluation=evaluated, show=False)
    except _Stop:
        return Stopped()
    except EOFError:  # nobody listens
        raise
    except OSError as error:
        return Broken(error)
    except Exception as error:
        write(Path(config.run_dir) / ERROR, traceback.format_exc().encode())
        return Failed(f"{type(error).__name__}: {error}")
    return Done(policy.info["evaluation"])


class _Worker:
    def __init__(self, name: str) -> None:
        context: Any = multiprocessing.get_context(START)
        self.pipe, far = context.Pipe()
        self.process = context.Process(target=_work, args=(far,), daemon=True, name=name)
        with deaf_to_interrupts():
            self.process.start()
        far.close()
        self.job: int | None = None

    def message(self) -> Message:
        try:
            said: Message = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            return Died(self.process.exitcode)
        return said


class Workers:
    """Processes of one thread each, which end with this one, however it ends, and with the block.

    Args:
        number: of them.
    """

    def __init__(self, number: int) -> None:
        check_main_guard()
        self.number = number
        self._workers: list[_Worker] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for worker in self._workers:
            worker.pipe.close()
            worker.process.kill()  # a checkpoint is whole whenever that comes
        for worker in self._workers:
            worker.process.join()

    @property
    def busy(self) -> list[int]:
        """The jobs that are being done."""
        return [worker.job for worker in self._workers if worker.job is not None]

    def begin(self, job: int, config: TrainConfig) -> None:
        """Have a process that has nothing to do train; one is started where there is none."""
        worker = next((worker for worker in self._workers if worker.job is None), None)
        if worker is None:
            worker = _Worker(f"rlsched-trial-{job}")
            self._workers.append(worker)
        worker.job = job
        with suppress(ConnectionError):  # it is dead, and its message will say so
            worker.pipe.send(config)

    def wait(self) -> list[tuple[int, Message]]:
        """What is said next, with the jobs that it is said of. All but `Evaluated` end a job."""
        pipes = {worker.pipe: worker for worker in self._workers if worker.job is not None}
        heard: list[tuple[int, Message]] = []
        for pipe in wait(list(pipes)):
            worker = pipes[pipe]
            message = worker.message()
            assert worker.job is not None
            heard.append((worker.job, message))
            if isinstance(message, Died):
                worker.pipe.close()
                self._workers.remove(worker)
            if not isinstance(message, Evaluated):
                worker.job = None
        return heard

    def answer(self, job: int, go_on: bool) -> None:
        """Answer an evaluation."""
        (worker,) = (worker for worker in self._workers if worker.job == job)
        with suppress(ConnectionError):
            worker.pipe.send(go_on)


def _work(pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # is for the parent, which ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own is the system's too, which warns of it when this process is killed
    torch.set_num_threads(1)
    with suppress(EOFError, ConnectionError):  # the parent closed the pipe
        while True:
            message = perform(pipe.recv(), partial(_ask, pipe))
            if isinstance(message, Broken):
                error = portable(message.error)
                message = Broken(error if isinstance(error, OSError) else OSError(str(error)))
            pipe.send(message)


def _ask(pipe: Connection, timesteps: int, scores: Scores) -> bool:
    pipe.send(Evaluated(timesteps, scores))
    return bool(pipe.recv())


def _end_with_parent() -> None:
    """A training whose command was killed would go on for hours, and be in the way of the one that takes it up."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
