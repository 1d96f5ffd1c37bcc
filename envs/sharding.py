"""A scheduling vector environment spread over processes, one per core."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from rlsched.envs.mixtures import mixture
from rlsched.envs.scheduling import (
    ACTION_SPACE,
    OBSERVATION_SPACE,
    Array,
    SchedulingVectorEnv,
    checked_actions,
    seeds_of,
)
from rlsched.envs.tasks import InnerTask


class ShardedVectorEnv(VectorEnv[Array, Array, Array]):
    """A `SchedulingVectorEnv` whose runs are trained by several processes: the same episodes, on more cores.

    The processes are spawned, so a script that makes one does so under `if __name__ == "__main__":`.

    Args:
        num_envs, tasks, options: those of `SchedulingVectorEnv`.
        processes: worker processes, each with a near-equal share of the runs and one thread.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(
        self, num_envs: int, tasks: str | InnerTask | Sequence[InnerTask] = "mlp", *, processes: int = 2, **options: Any
    ) -> None:
        self._pipes: list[Connection] = []
        self._workers: list[BaseProcess] = []
        if not 1 <= processes <= num_envs:
            raise ValueError(f"processes must be between 1 and num_envs ({num_envs}), got {processes}")
        family = mixture(tasks)
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = OBSERVATION_SPACE, ACTION_SPACE
        self.observation_space = batch_space(OBSERVATION_SPACE, num_envs)
        self.action_space = batch_space(ACTION_SPACE, num_envs)
        bounds = np.linspace(0, num_envs, processes + 1).round().astype(int)
        self._shards = [slice(a, b) for a, b in pairwise(bounds)]
        context = multiprocessing.get_context("spawn")
        for shard in self._shards:
            first = shard.start % len(family)  # run i keeps the task i modulo their number
            rotated = family[first:] + family[:first]
            pipe, far = context.Pipe()
            worker = context.Process(
                target=_work, args=(far, shard.stop - shard.start, rotated, options), daemon=True, name="rlsched-shard"
            )
            try:
                worker.start()
            except (AttributeError, TypeError, pickle.PicklingError) as error:
                self.close()
                raise ValueError(
                    "tasks: an inner task cannot be sent to a worker process, for which its network and loss must be "
                    f"importable, not lambdas; or use one process. The reason: {error}"
                ) from error
            far.close()
            self._pipes.append(pipe)
            self._workers.append(worker)
        try:
            self._answers()  # each worker's environment stands
        except BaseException:
            self.close()
            raise

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        seeds = seeds_of(seed, self.num_envs)
        answers = self._ask("reset", [seeds[shard] for shard in self._shards])
        observations, infos = zip(*answers, strict=True)
        return np.concatenate(observations), _join(infos)

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        actions = checked_actions(actions, self.num_envs)
        answers = self._ask("step", [actions[shard] for shard in self._shards])
        observations, rewards, terminated, truncated, infos = (list(part) for part in zip(*answers, strict=True))
        sizes = [shard.stop - shard.start for shard in self._shards]
        return (
            np.concatenate(observations),
            np.concatenate(rewards),
            np.concatenate(terminated),
            np.concatenate(truncated),
            _join(_complete(infos, sizes)),
        )

    def _ask(self, method: str, arguments: list[Any]) -> list[Any]:
        for pipe, argument in zip(self._pipes, arguments, strict=True):
            with suppress(ConnectionError):  # the worker is dead: there will be no answer
                pipe.send((method, argument))
        return self._answers()

    def _answers(self) -> list[Any]:
        answers = []
        for pipe, worker in zip(self._pipes, self._workers, strict=True):
            try:
                answers.append(pipe.recv())
            except (EOFError, ConnectionError):
                worker.join()
                raise RuntimeError(f"a worker process of the environment died (exit code {worker.exitcode})") from None
        for answer in answers:  # all of them are in: the next question gets its own answers
            if isinstance(answer, Exception):
                raise answer
        return answers

    def close_extras(self, **kwargs: Any) -> None:
        for pipe in self._pipes:
            pipe.close()  # the worker sees the end of the pipe and leaves
        for worker in self._workers:
            worker.join()


def _work(pipe: Connection, num_envs: int, tasks: Sequence[InnerTask], options: dict[str, Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted parent closes the pipe
    torch.set_num_threads(1)
    with suppress(EOFError, ConnectionError):  # the parent closed the pipe
        try:
            env = SchedulingVectorEnv(num_envs, tasks, **options)
        except Exception as error:
            return pipe.send(error)
        pipe.send(None)
        while True:
            method, argument = pipe.recv()
            try:
                answer: Any = env.reset(seed=argument) if method == "reset" else env.step(argument)
            except Exception as error:
                answer = error
            pipe.send(answer)


def _complete(infos: list[dict[str, Any]], sizes: list[int]) -> list[dict[str, Any]]:
    """Give the shards in which no episode ended empty `final_obs` and `final_info`, where another has some."""
    ended = next((info for info in infos if "final_info" in info), None)
    if ended is None:
        return infos
    complete = []
    for info, size in zip(infos, sizes, strict=True):
        if "final_info" not in info:
            no = np.zeros(size, bool)
            empty = {
                key: np.zeros(size, value.dtype) if isinstance(value, np.ndarray) else value
                for key, value in ended["final_info"].items()
            }
            nothing = np.full(size, None, dtype=object)
            info = {**info, "final_obs": nothing, "_final_obs": no, "final_info": empty, "_final_info": no}
        complete.append(info)
    return complete


def _join(infos: Sequence[dict[str, Any]]) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for key, value in infos[0].items():
        parts = [info[key] for info in infos]
        joined[key] = _join(parts) if isinstance(value, dict) else np.concatenate(parts)
    return joined
