"""Shards on a Ray cluster: workers on its machines, and in the place of each that is lost another one."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from typing import Any, NamedTuple

import ray
from ray import _private, cloudpickle
from ray._private.services import canonicalize_bootstrap_address
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlsched.envs.sharding import Host, Lost, Make, Request

HERE, FOUND = "local", "auto"  # addresses: a cluster that is started on this machine; the one that runs on it
REACHED = 5.0  # seconds within which a cluster answers
PATIENCE = 15.0  # seconds that a worker waits for a core of its own
STARTED = 300.0  # seconds within which a worker has started, on a machine that has a core for it
BEGINNINGS = ("open", "reset")  # methods by which a shard that is lost begins anew
LOSSES = 5  # of a worker, one after the other without a step between them, after which it is given up


def say(message: str) -> None:
    """To the standard error, on a line of its own even beside a progress bar."""
    with suppress(ImportError):
        from tqdm import tqdm

        return tqdm.write(f"rlsched: {message}", file=sys.stderr)
    print(f"rlsched: {message}", file=sys.stderr)


class _Worker(Host):
    """Lives on the cluster, with one thread."""

    def where(self) -> str:
        """The address of its machine."""
        return str(ray.util.get_node_ip_address())


class _Place(NamedTuple):
    """A worker that is there."""

    actor: Any
    machine: str  # its address


class Workers:
    """Workers on a Ray cluster, each with a core and a thread of its own.

        with Workers(16, address="10.0.0.1:6379") as workers:
            env = ShardedVectorEnv(512, "mlp", processes=16, transport=workers.transport)

    They hold the shards of all the environments that are made with this transport. A worker that is lost, by itself or
    with its machine, is started again on a core that is free; or, where none is within `patience`, on one that it
    shares. What it held begins anew, as `ShardedVectorEnv` says.

    Args:
        number: of the workers.
        address: "local", for a cluster that is started on this machine and ends with this; "auto", for the one that
            `ray start` began on it; or host:port of a cluster of which this machine is a part. In a program that has
            called `ray.init`, it is that cluster.
        patience: seconds to wait for a core.
        tell: is called with a line when a worker was lost.

    Raises:
        ValueError: the address is none; the cluster has fewer cores than that.
        ConnectionError: there is no cluster at the address.
    """

    def __init__(
        self,
        number: int,
        *,
        address: str = HERE,
        patience: float = PATIENCE,
        tell: Callable[[str], None] = say,
    ) -> None:
        self._patience, self._tell = patience, tell
        self._environments = count()
        self._places: list[_Place | None] = [None] * number
        self._losses = [0] * number  # since it last made a step
        self._reasons: list[str | None] = [None] * number  # why it is gone, of one that is
        self._cores: PlacementGroup | None = None
        self._begun = not ray.is_initialized()
        if self._begun:
            _connect(address)
        try:
            self._cores = _reserved(number, patience)
            self._start(range(number))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def transport(self, makes: Sequence[Make]) -> _Shards:
        """For `ShardedVectorEnv(transport=…)`, of at most as many processes as there are workers.

        Raises:
            ValueError: what makes an environment cannot be sent to another machine; there are more shards than workers.
        """
        if len(makes) > len(self._places):
            raise ValueError(f"processes must be at most the {len(self._places)} workers, got {len(makes)}")
        try:
            sent = [cloudpickle.dumps(make) for make in makes]
        except Exception as error:
            raise ValueError(f"tasks: an inner task (or an option) cannot be sent to a worker: {error}") from error
        return _Shards(self, next(self._environments), sent)

    def close(self) -> None:
        """End the workers, and the cluster if it was started here."""
        if not ray.is_initialized():
            return
        if self._begun:
            ray.shutdown()
            return
        for place in filter(None, self._places):
            with suppress(RayError):
                ray.kill(place.actor)
        if self._cores is not None:
            remove_placement_group(self._cores)

    def actor(self, number: int) -> Any:
        """The worker as it is there now; None if it is lost."""
        place = self._places[number]
        return None if place is None else place.actor

    def lose(self, number: int, actor: Any, error: RayError) -> ChildProcessError:
        """Give up the worker, which failed; what to answer in its stead."""
        place, reason = self._places[number], _reason(error)
        if place is not None and place.actor is actor:
            with suppress(RayError):
                ray.kill(actor)  # it may be cut off, and not dead
            self._losses[number] += 1
            self._reasons[number], self._places[number] = f"lost on {place.machine} ({reason})", None
        if self._losses[number] > LOSSES:
            return ChildProcessError(f"worker {number} was lost {LOSSES + 1} times in a row: {reason}")
        return Lost(f"worker {number} was lost: {reason}")

    def stepped(self, number: int) -> None:
        self._losses[number] = 0

    def revive(self, numbers: Sequence[int]) -> None:
        """Start those anew that are lost."""
        lost = [number for number in numbers if self._places[number] is None]
        self._start(lost)
        for number in lost:
            place = self._places[number]
            assert place is not None
            self._tell(
                f"worker {number} was {self._reasons[number]} and is started again on {place.machine}; its episodes "
                "begin anew, and the run goes on"
            )

    def _start(self, numbers: Sequence[int]) -> None:
        """Side by side, since each has to import torch."""
        actors = {number: self._actor(number) for number in numbers}
        for number, actor in actors.items():
            self._places[number] = self._settled(number, actor)

    def _actor(self, number: int, *, alone: bool = True) -> Any:
        """A worker that is about to start: on its core, or wherever there is a machine."""
        core = PlacementGroupSchedulingStrategy(self._cores, placement_group_bundle_index=number)
        where = core if alone else "SPREAD"
        return ray.remote(_Worker).options(num_cpus=int(alone), max_restarts=0, scheduling_strategy=where).remote()

    def _settled(self, number: int, actor: Any) -> _Place:
        """The worker when it has started.

        Its core is on a machine that may be lost as well, and then it waits for another one.
        """
        begin = placed = time.monotonic()
        alone, failures = True, 0
        answer = actor.where.remote()
        while True:
            try:
                if ray.wait([answer], timeout=0.1)[0]:
                    return _Place(actor, ray.get(answer))
                error = None
            except RayActorError as died:  # with its machine, or as it imported what it needs
                error, failures = died, failures + 1
            now = time.monotonic()
            if placement_group_table(self._cores)["state"] == "CREATED":
                placed = now
            without_core = alone and now - placed > self._patience
            if failures > LOSSES or now - begin > STARTED:
                why = f"within {STARTED:g} s" if error is None else f"in {failures} attempts: {_reason(error)}"
                raise ChildProcessError(f"worker {number} did not start {why}")
            if without_core:
                alone = False
                self._tell(f"no core of the cluster is free for worker {number}: it shares one")
            if without_core or error is not None:
                with suppress(RayError):
                    ray.kill(actor)
                actor = self._actor(number, alone=alone)
                answer = actor.where.remote()


class _Shards:
    """A `Transport` to the shards of one environment, shard i on worker i."""

    def __init__(self, workers: Workers, environment: int, makes: Sequence[bytes]) -> None:
        self._workers, self._environment, self._makes = workers, environment, makes
        self._homes: list[Any] = [None] * len(makes)  # the worker, as an actor, in which the shard is

    def ask(self, requests: Sequence[Request | None]) -> list[Any]:
        asked = {shard: request for shard, request in enumerate(requests) if request is not None}
        self._workers.revive([shard for shard, (method, _) in asked.items() if method in BEGINNINGS])
        sent = {shard: self._sent(shard, request) for shard, request in asked.items()}
        received = {shard: self._received(shard, *pair) for shard, pair in sent.items()}
        return [received.get(shard) for shard in range(len(requests))]

    def close(self) -> None:
        for shard, home in enumerate(self._homes):
            if home is not None and home is self._workers.actor(shard) and ray.is_initialized():
                home.forget.remote(self._environment)
        self._homes.clear()

    def _sent(self, shard: int, request: Request) -> tuple[str, Any]:
        """The method, and what its answer will be in; or `Lost`."""
        actor, make, method = self._workers.actor(shard), None, request[0]
        if actor is None or actor is not self._homes[shard]:
            if method not in BEGINNINGS:
                return method, Lost(f"worker {shard} was lost")
            self._homes[shard], make = actor, self._makes[shard]
        return method, actor.answer.remote(self._environment, request, make)

    def _received(self, shard: int, method: str, sent: Any) -> Any:
        if isinstance(sent, Lost):
            return sent
        try:
            answer = ray.get(sent)
        except RayTaskError as error:
            return error.cause if isinstance(error.cause, Exception) else RuntimeError(str(error))
        except RayError as error:
            return self._workers.lose(shard, self._homes[shard], error)
        if method == "step":
            self._workers.stepped(shard)
        return answer


def _reason(error: RayError) -> str:
    """In a few words, out of Ray's page."""
    found = re.search(r"because (its [^.]*)\.", str(error))
    unreachable = isinstance(error, ActorUnavailableError)
    return found[1] if found else "it cannot be reached" if unreachable else type(error).__name__


def _reserved(number: int, patience: float) -> PlacementGroup:
    """A core for each worker.

    Raises:
        ValueError: the cluster has fewer, or others use them.
    """
    cores = int(ray.cluster_resources().get("CPU", 0))
    if number > cores:
        raise ValueError(f"processes must be at most {cores}, the CPUs of the Ray cluster, got {number}")
    group = placement_group([{"CPU": 1}] * number, strategy="SPREAD")
    if not group.wait(patience):
        free = int(ray.available_resources().get("CPU", 0))
        remove_placement_group(group)
        raise ValueError(
            f"processes must be at most {free}, the CPUs of the Ray cluster that are free (others use {cores - free}), "
            f"got {number}"
        )
    return group


def _connect(address: str) -> None:
    """Start a cluster, or become the driver of one.

    Raises:
        ValueError, ConnectionError: see `Workers`.
    """
    if address != HERE:
        _check_reached(_found() if address == FOUND else address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"include_dashboard": False} if address == HERE else {}
    in_main = threading.current_thread() is threading.main_thread()
    terminate = signal.getsignal(signal.SIGTERM) if in_main else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what Ray is going to change
            ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL, **options)
    except Exception as error:  # of many kinds, some of them plainly that
        said = str(error).strip().splitlines()[0]
        if os.environ.get("RAY_AUTH_MODE") is None and address != HERE:
            said += "; one that was begun with a token asks for RAY_AUTH_MODE=token here as well"
        raise ConnectionError(f"address: there is no Ray cluster to use at {address!r}: {said}") from error
    finally:
        if terminate is not None:
            signal.signal(signal.SIGTERM, terminate)  # which Ray sets
    # Or it prints a page on the standard output, among the results, for each machine that is lost.
    _private.worker._worker_logs_enabled = False


def _found() -> str:
    """The cluster of this machine, or of RAY_ADDRESS; it may be one that is no more."""
    with suppress(ConnectionError):
        found = canonicalize_bootstrap_address(FOUND)
        if found is not None:
            return str(found)
    raise ConnectionError(
        "address: there is no Ray cluster on this machine: begin one with `ray start --head`, or join one with "
        "`ray start --address=…`"
    )


def _check_reached(address: str) -> None:
    """Ray itself takes minutes to find out.

    A cluster speaks gRPC, which begins with HTTP/2's settings.

    Raises:
        ValueError: it is no host and port.
        ConnectionError: nothing answers, or something else.
    """
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16) or "/" in host:
        raise ValueError(f"address must be {HERE!r}, {FOUND!r} or host:port of a Ray cluster, got {address!r}")
    settings = b"\4"  # a type of frame; the rest of its head is its length, flags and stream
    try:
        with socket.create_connection((host.strip("[]"), int(port)), REACHED) as connection:
            if os.environ.get("RAY_USE_TLS", "0") == "1":  # which begins in another way
                return
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + settings + bytes(5))
            is_ray = connection.recv(4)[3:] == settings
    except OSError as error:
        why = f"no answer within {REACHED:g} s" if isinstance(error, TimeoutError) else error.strerror or str(error)
        raise ConnectionError(f"address: there is no Ray cluster at {address!r}: {why}") from error
    if not is_ray:
        raise ConnectionError(f"address: what answers at {address!r} is no Ray cluster")
