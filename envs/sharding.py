"""A scheduling vector environment in shards: the same episodes, trained in several places, one per core."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain, count
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from gymnasium import Space, logger
from gymnasium.error import ClosedEnvironmentError
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from rlsched.envs.arguments import (
    autoreset_mode_of,
    check_begun,
    check_sets,
    checked_actions,
    reset_mask,
    seeds_of,
    warn_of_left_out,
)
from rlsched.envs.groups import Array
from rlsched.envs.mixtures import mixture
from rlsched.envs.rendering import NO_MODE, Frame
from rlsched.envs.scheduling import SchedulingVectorEnv
from rlsched.envs.tasks import InnerTask

GRACE = 0.25  # seconds that worker processes have to end
UNGUARDED = 79  # exit code of a worker process that has met `check_main_guard`

Seen = tuple[Array, dict[str, Any]]  # observations and infos
Make = Callable[[], VectorEnv[Array, Array, Array]]  # makes the environment of a shard, where the shard is to live


class Opened(NamedTuple):
    """A shard's first answer: what its environment is."""

    observation_space: Space[Array]  # of a single run, as the next
    action_space: Space[Array]
    metadata: dict[str, Any]


class Lost(ChildProcessError):
    """A shard is no more, nor are its episodes; its transport begins it anew when it is asked to "open" or "reset"."""


class Shard:
    """The far end of a transport: the environment of one shard, which answers requests.

    Whatever else lives in its process, it draws what torch's global generator would give a process of its own.
    """

    def __init__(self, make: Make) -> None:
        self._make = make
        self._env: VectorEnv[Array, Array, Array] | None = None
        self._random = torch.Generator().get_state()  # of a process that has just begun

    def answer(self, method: str, argument: Any) -> Any:
        """To "open", "reset" with seeds and a mask of runs, "step" with actions, or "render".

        An exception is an answer as well.
        """
        here = torch.get_rng_state()
        torch.set_rng_state(self._random)
        try:
            env = self._env = self._env or self._make()
            if method == "open":
                return Opened(env.single_observation_space, env.single_action_space, env.metadata)
            if method == "reset":
                seeds, chosen = argument
                return env.reset(seed=seeds, options={"reset_mask": chosen})
            return env.render() if method == "render" else env.step(argument)
        except Exception as error:
            return error
        finally:
            self._random = torch.get_rng_state()
            torch.set_rng_state(here)


Request = tuple[str, Any]  # a method and its argument, see `Shard.answer`
_Message = tuple[int, Request | None, bytes | None]  # of which environment, None to forget it, how its shard is made


class Transport(Protocol):
    """Carries requests to the shards, wherever they live, and brings their answers. It is made from one `Make` each."""

    def ask(self, requests: Sequence[Request | None]) -> list[Any]:
        """One answer for each shard's request, all of them awaited; None where there is no request.

        Where the shard failed, or is no more, its answer is the exception: `Lost` if it can be begun anew.
        """
        ...

    def close(self) -> None: ...


class Inline:
    """All shards in this process, one after the other: no faster than one environment, but a debugger sees inside."""

    def __init__(self, makes: Sequence[Make]) -> None:
        self._shards = [Shard(make) for make in makes]

    def ask(self, requests: Sequence[Request | None]) -> list[Any]:
        return [request and shard.answer(*request) for shard, request in zip(self._shards, requests, strict=True)]

    def close(self) -> None:
        self._shards.clear()


class Host:
    """What a worker of several environments holds: its shard of each, by the number of the environment."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._shards: dict[int, Shard] = {}

    def answer(self, environment: int, request: Request, make: bytes | None) -> Any:
        """The shard's answer, which begins anew where it is told how it is made: by a pickled `Make`."""
        if make is not None:
            self._shards[environment] = Shard(partial(_made, make))
        return portable(self._shards[environment].answer(*request))

    def forget(self, environment: int) -> None:
        self._shards.pop(environment, None)


class Workers:
    """Spawned processes, each with one thread, which live as long as the pipes to them.

        with Workers(2) as workers:
            env = ShardedVectorEnv(512, "mlp", processes=2, transport=workers.transport)

    They hold the shards of all the environments that are made with this transport: torch is imported once.

    Args:
        number: of the workers.

    Raises:
        RuntimeError: see `check_main_guard`.
    """

    def __init__(self, number: int) -> None:
        check_main_guard()
        self._environments = count()
        self._pipes: list[Connection] = []
        self._workers: list[BaseProcess] = []
        context = multiprocessing.get_context("spawn")
        try:
            for worker_number in range(number):
                pipe, far = context.Pipe()
                self._pipes.append(pipe)
                worker = context.Process(target=_work, args=(far,), daemon=True, name=f"rlsched-worker-{worker_number}")
                with deaf_to_interrupts():
                    worker.start()
                self._workers.append(worker)
                far.close()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def transport(self, makes: Sequence[Make]) -> Transport:
        """For `ShardedVectorEnv(transport=…)`, of at most as many processes as there are workers.

        Raises:
            ValueError: what makes an environment cannot be sent to another process; there are more shards than workers.
        """
        if len(makes) > len(self._pipes):
            raise ValueError(f"processes must be at most the {len(self._pipes)} workers, got {len(makes)}")
        return _Shards(self, next(self._environments), _pickled(makes))

    def ask(self, messages: Sequence[_Message | None]) -> list[Any]:
        """The answers of the first workers, None where there is no message.

        Raises:
            ClosedEnvironmentError: after `close`.
        """
        if any(pipe.closed for pipe in self._pipes):
            raise ClosedEnvironmentError("the workers were closed, or interrupted: make new ones")
        try:
            self.send(messages)
            ends = zip(messages, self._pipes, self._workers, strict=False)
            return [message and _answer(pipe, worker) for message, pipe, worker in ends]
        except BaseException:  # an interrupt: answers may be under way, which the next to ask would take for its own
            self.close()
            raise

    def send(self, messages: Sequence[_Message | None]) -> None:
        for pipe, message in zip(self._pipes, messages, strict=False):
            if message is not None and not pipe.closed:
                with suppress(ConnectionError):  # the worker is dead, and its answer will say so
                    pipe.send(message)

    def close(self) -> None:
        """End the workers; those that do not go within `GRACE`, be they busy, stopped or hung, are killed."""
        for pipe in self._pipes:
            pipe.close()  # the worker sees the end of the pipe and leaves
        end = time.monotonic() + GRACE
        try:
            for worker in self._workers:
                worker.join(max(0.0, end - time.monotonic()))
        finally:
            for worker in self._workers:
                worker.kill()
            for worker in self._workers:
                worker.join(GRACE)


class _Shards:
    """A `Transport` to the shards of one environment, shard i on worker i."""

    def __init__(self, workers: Workers, environment: int, makes: Sequence[bytes]) -> None:
        self._workers, self._environment = workers, environment
        self._makes: list[bytes | None] = list(makes)  # None once they were sent

    def ask(self, requests: Sequence[Request | None]) -> list[Any]:
        messages: list[_Message | None] = []
        for shard, request in enumerate(requests):
            messages.append(request and (self._environment, request, self._makes[shard]))
            if request is not None:
                self._makes[shard] = None
        return self._workers.ask(messages)

    def close(self) -> None:
        self._workers.send([(self._environment, None, None)] * len(self._makes))


class Processes(_Shards):
    """Each shard in a worker process of its own, which ends with the environment.

    Raises:
        ValueError: what makes an environment cannot be sent to another process.
    """

    def __init__(self, makes: Sequence[Make]) -> None:
        sent = _pickled(makes)
        super().__init__(Workers(len(makes)), 0, sent)

    def close(self) -> None:
        self._workers.close()


def check_main_guard() -> None:
    """Refuse to train in a worker process that is about to start.

    It imports the script that started it. If that trains without asking whether it is the main program, each worker
    comes here; it leaves quietly, and its parent, which is told how, says what is wrong.

    Raises:
        RuntimeError: there is nothing to import, because the script came through a pipe.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(UNGUARDED)
    main = sys.modules["__main__"]
    script = getattr(main, "__file__", None)
    if script is not None and getattr(main, "__spec__", None) is None and not os.path.exists(script):
        raise RuntimeError(
            f"processes: each worker process imports this script, and {script!r} is no file: save it, or use one "
            "process"
        )


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """A process that is started inside does not hear SIGINT: Ctrl-C reaches all of a terminal's processes.

    It is for this process, which closes the pipe, and a traceback from each worker, which may still be importing torch,
    would bury what it says. A signal that comes inside waits.
    """
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    resource_tracker.ensure_running()  # which the first process would start, and open the mask as it does
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _answer(pipe: Connection, worker: BaseProcess) -> Any:
    try:
        return pipe.recv()
    except (EOFError, ConnectionError):
        worker.join(GRACE)
        if worker.exitcode == UNGUARDED:
            return RuntimeError(
                "processes: each worker process imports this script, which starts them: put what trains under "
                "`if __name__ == '__main__':`, or use one process"
            )
        return ChildProcessError(f"the worker process {worker.name} died (exit code {worker.exitcode})")


def _work(pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted parent closes the pipe
    host = Host()
    with suppress(EOFError, ConnectionError):  # the parent closed the pipe
        while True:
            environment, request, make = pipe.recv()
            if request is None:
                host.forget(environment)
            else:
                pipe.send(host.answer(environment, request, make))


def _pickled(makes: Sequence[Make]) -> list[bytes]:
    try:
        return [bytes(ForkingPickler.dumps(make)) for make in makes]  # tensors in memory that both processes share
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        raise ValueError(
            "tasks: an inner task (or an option) cannot be sent to a worker process, for which its network and "
            f"loss must be importable, not lambdas; or use one process. The reason: {error}"
        ) from error


def _made(make: bytes) -> VectorEnv[Array, Array, Array]:
    made: Make = pickle.loads(make)  # here, so that a module which cannot be imported is told as an answer
    return made()


def portable(answer: Any) -> Any:
    """The answer; but for an error that pickling loses (as some of torch's compiler), one that tells the same."""
    if isinstance(answer, Exception):
        try:
            pickle.loads(pickle.dumps(answer))
        except Exception:
            return RuntimeError(f"{type(answer).__name__}: {answer}")
    return answer


class ShardedVectorEnv(VectorEnv[Array, Array, Array]):
    """A `SchedulingVectorEnv` whose runs are trained by several processes: the same episodes, on more cores.

    The processes are spawned, so a script that makes one does so under `if __name__ == "__main__":`.

    Where the transport can begin a lost shard anew (`rlsched.envs.cluster`), the episodes that the shard was in end in
    the step that finds it lost, and new ones begin: *truncated*, without a reward, at the observation that was last
    seen. A learner that goes on from its value there learns nothing from that step. This holds for the mode "SameStep";
    in the others, or in a reset of some of its runs, the loss is raised.

    Args:
        num_envs, tasks, clones, autoreset_mode, render_mode, options: those of `SchedulingVectorEnv`.
        processes: shards, each with a near-equal part of the tasks; or of the runs, where there are fewer tasks: a
            stack of many networks is trained in less time than two of half as many.
        transport: where the shards live: `Processes`, each in a worker process with one thread; `Workers.transport`,
            in processes that several environments share; `Inline`, in this process, for debugging; on a Ray cluster
            (`rlsched.envs.cluster`); or anything that makes a `Transport`.
    """

    metadata: dict[str, Any] = SchedulingVectorEnv.metadata

    def __init__(
        self,
        num_envs: int,
        tasks: str | InnerTask | Sequence[InnerTask] = "mlp",
        *,
        processes: int = 2,
        transport: Callable[[Sequence[Make]], Transport] = Processes,
        clones: int = 1,
        autoreset_mode: str | AutoresetMode = AutoresetMode.SAME_STEP,
        render_mode: str | None = None,
        **options: Any,
    ) -> None:
        check_sets(num_envs, clones)
        autoreset_mode = autoreset_mode_of(autoreset_mode)
        sets = num_envs // clones
        if not 1 <= processes <= sets:
            each = "num_envs" if clones == 1 else "num_envs / clones"
            raise ValueError(f"processes must be between 1 and {each} ({sets}), got {processes}")
        if not callable(transport):
            raise ValueError(f"transport must be Processes, Inline or what else makes a Transport, got {transport!r}")
        family = mixture(tasks)
        self._shards: list[Array] = []  # the numbers of their runs
        members = np.arange(num_envs).reshape(-1, clones)
        used = family[:sets]
        warn_of_left_out(family, sets)
        options |= {"clones": clones, "autoreset_mode": autoreset_mode, "render_mode": render_mode}
        makes = []
        for number in range(processes):
            if len(used) >= processes:
                of_shard, tasks = np.arange(sets) % len(family) % processes == number, used[number::processes]
            else:
                of_shard = np.arange(sets) * processes // sets == number
                first = int(of_shard.argmax()) % len(family)
                tasks = (family[first:] + family[:first])[: of_shard.sum()]
            self._shards.append(members[of_shard].ravel())
            size = len(self._shards[-1])
            makes.append(partial(SchedulingVectorEnv, size, tasks, **options))
        self._transport = transport(makes)
        try:
            opened = self._ask("open", [None] * processes)[0]
        except BaseException:
            self.close()
            raise
        self.num_envs, self._clones, self.render_mode = num_envs, clones, render_mode
        self._waiting = np.ones(num_envs, bool)  # for a reset
        self._seen: list[Seen] = []  # of each shard, after a reset
        self.single_observation_space, self.single_action_space, self.metadata = opened
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        chosen = reset_mask(options, self.num_envs, self._clones)
        seeds = [s for s in seeds_of(seed, self.num_envs, self._clones) for _ in range(self._clones)]
        parts = [split(values, self._shards) for values in (np.array(seeds, object), chosen)]
        answers = self._ask("reset", list(zip(*parts, strict=True)))
        observations, infos = join(answers, self._shards)
        self._waiting &= ~chosen
        return observations, infos

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        actions = checked_actions(actions, self.action_space.shape)
        check_begun("step", self._waiting)
        answers = self._ask("step", split(actions, self._shards))
        observations, rewards, terminated, truncated, infos = join(answers, self._shards)
        if self.metadata["autoreset_mode"] is AutoresetMode.DISABLED:
            self._waiting = terminated.copy()
        return observations, rewards, terminated, truncated, infos

    def render(self) -> tuple[Frame, ...] | None:
        """A frame of each run, see `render_mode`; None, with a warning, without one."""
        if self.render_mode is None:
            logger.warn(NO_MODE)
            return None
        parts = self._ask("render", [None] * len(self._shards))
        frames = dict(zip(np.concatenate(self._shards).tolist(), chain.from_iterable(parts), strict=True))
        return tuple(frames[run] for run in range(self.num_envs))

    def _ask(self, method: str, arguments: list[Any]) -> list[Any]:
        """An answer of each shard; those that are lost on the way are begun anew."""
        answers = self._exchange([(method, argument) for argument in arguments])
        while any(isinstance(answer, Lost) for answer in answers):
            pairs = zip(answers, arguments, strict=True)
            again = [self._beginning(method, x, answer) if isinstance(answer, Lost) else None for answer, x in pairs]
            for shard, answer in enumerate(self._exchange(again)):
                if again[shard] is not None:
                    is_cut = method == "step" and not isinstance(answer, Lost)
                    answers[shard] = _cut_short(self._seen[shard], answer) if is_cut else answer
        if method in ("reset", "step"):
            self._seen = [(answer[0], answer[-1]) for answer in answers]
        return answers

    def _beginning(self, method: str, argument: Any, lost: Lost) -> Request:
        """What to ask of a shard that was lost as it was asked for this."""
        if method == "open" or (method == "reset" and argument[1].all()):
            return method, argument
        if method == "step" and self.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP:
            runs = len(argument)
            return "reset", (np.full(runs, None), np.ones(runs, bool))  # not the episodes that it had at first
        raise lost

    def _exchange(self, requests: Sequence[Request | None]) -> list[Any]:
        if self.closed:
            (method, _), *_ = filter(None, requests)
            raise ClosedEnvironmentError(f"{method}() was called after close(), or after an interrupt: make a new one")
        try:
            answers = self._transport.ask(requests)
        except BaseException:  # an interrupt: answers may be under way, which the next question would take for its own
            self.close()
            raise
        for answer in answers:
            if isinstance(answer, Exception) and not isinstance(answer, Lost):
                raise answer
        return answers

    def close_extras(self, **kwargs: Any) -> None:
        self._transport.close()


def split(values: Array, shards: Sequence[Array]) -> list[Array]:
    """Each shard's part of what goes to the runs: actions or seeds."""
    return [values[shard] for shard in shards]


def join(parts: Sequence[Any], shards: Sequence[Array]) -> Any:
    """What one environment would have returned, from what the shards did: arrays in tuples and dicts, however nested.

    An entry that only some shards have, as `final_info` where an episode ended, is blank for the runs of the others.

    Args:
        parts: of each shard.
        shards: the numbers of their runs.
    """
    return _joined(parts, [len(shard) for shard in shards], np.concatenate(shards).argsort())


def _joined(parts: Sequence[Any], sizes: Sequence[int], order: Array) -> Any:
    first = parts[0]
    if isinstance(first, tuple):
        return tuple(_joined(entry, sizes, order) for entry in zip(*parts, strict=True))
    if not isinstance(first, dict):
        return np.concatenate(parts)[order]
    joined = {}
    for key, like in {key: value for part in parts for key, value in part.items()}.items():
        entry = [part[key] if key in part else _blank(like, size) for part, size in zip(parts, sizes, strict=True)]
        joined[key] = _joined(entry, sizes, order)
    return joined


def _blank(like: Any, size: int) -> Any:
    """As Gymnasium has it: zeros, False in a mask, None among objects."""
    if isinstance(like, dict):
        return {key: _blank(value, size) for key, value in like.items()}
    return np.full((size, *like.shape[1:]), None if like.dtype == object else 0, like.dtype)


def _cut_short(seen: Seen, begun: Seen) -> Any:
    """What a step gives for a shard that was lost in it.

    Args:
        seen: the observations and infos that its episodes were last seen with, with which they end.
        begun: those of the next episodes.
    """
    (last, told), (observations, infos) = seen, begun
    ended = np.ones(len(last), bool)
    final_obs = np.full(len(last), None, object)
    final_obs[:] = list(last)
    final_info = {key: values for key, values in told.items() if not key.startswith(("_", "final"))}
    final_info |= {f"_{key}": ended for key in final_info}
    final = {"final_obs": final_obs, "_final_obs": ended, "final_info": final_info, "_final_info": ended}
    return observations, np.zeros(len(last), np.float32), ~ended, ended, infos | final
