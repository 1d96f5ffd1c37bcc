"""A policy that another process serves (`rlsched serve`), and decides by over HTTP."""

from __future__ import annotations

import http.client
import json
import logging
import os
import random
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rlsched import distributed
from rlsched.actors import Memory
from rlsched.base_schedule import named_base_schedule
from rlsched.connection import TOKEN, Connection, RefusedError
from rlsched.control import CONTROLS
from rlsched.decisions import rows
from rlsched.notices import warn
from rlsched.signals import OBSERVATIONS

if TYPE_CHECKING:
    from rlsched.controller import Controller
    from rlsched.per_group import Decision
    from rlsched.summary import Summary

_log = logging.getLogger("rlsched")

# What client and server say to each other, in JSON.
PROTOCOL = 1  # raised when any of it changes its meaning
ABOUT, ACT = "/", "/act"  # paths: what is served; and decisions
MOST_REPORTS = 100  # in a request


class Served(NamedTuple):
    """What a server says of itself."""

    protocol: int
    policy: str  # digest
    observations: tuple[str, ...]
    controls: tuple[str, ...]
    safe_start: float
    base_schedule: str
    memory: int  # numbers that a run remembers, zeros at first; 0 for none
    most: int  # runs, or groups of runs, that a request may ask about
    traces: bool  # whether it keeps what runs report


class Answer(NamedTuple):
    """What was decided for n runs."""

    actions: list[list[float]]  # (n, controls), in [−1, 1]
    influence: list[float]  # (n,), in [0, 1]
    memory: list[list[float]] | None  # (n, memory)


class RemotePolicy:
    """A policy whose decisions are made by `rlsched serve`, so that many jobs have one policy.

    A run under it does not end because the server does. Where that is gone or does not answer in time, the controls
    stand still, so that the learning rate goes on along the base schedule from where it is, as it does where a policy
    sees what it was not trained on: a return to the user's own values could bring back a learning rate that was found
    to be too high. A warning says so. The server is asked again after a second, two, four and so on up to 30, and the
    policy decides again as soon as it answers. The server keeps nothing of a run: what a policy remembers travels with
    each request.

    Args:
        url: `http://host:port` or `https://…`, with the path that it has behind a proxy.
        token: that the server asks for; by default that in the environment variable `TOKEN`.
        timeout: seconds to wait for an answer.

    Attributes:
        served: what the server says of itself.
        answered: decisions that it made.
        missed: decisions for which it was gone, and controls stood still.

    Where torch.distributed is initialized, the first rank asks for all, so that `act` is to be called on all of them.

    Raises:
        ValueError: the URL is none; or the server wants another token, or serves what this rlsched does not have.
        ConnectionError: no server answers there.
    """

    def __init__(self, url: str, *, token: str | None = None, timeout: float = 5.0) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout must be a positive number of seconds, got {timeout!r}")
        self._server = Connection(url, token or os.environ.get(TOKEN), timeout)
        self.url = url
        try:
            self.served = self._described(self._server.exchange("GET", ABOUT))
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(f"policy: no server answers at {url}: {_reason(error)}") from error
        self.observations, self.controls = self.served.observations, self.served.controls
        self.safe_start = self.served.safe_start
        self.base_schedule = named_base_schedule(self.served.base_schedule)
        self.answered = self.missed = 0
        self._failures, self._ask_from, self._gone_since = 0, 0.0, 0.0
        self._reports: deque[dict[str, Any]] = deque(maxlen=10 * MOST_REPORTS)  # that the server does not have yet
        self._trusted: dict[tuple[float, ...], float] = {}  # influence of what was last asked
        self._random = random.Random()  # not the user's, which may be seeded

    @property
    def digest(self) -> str:
        """That of the policy which is served: a run may go on under its file, or under another server of it."""
        return self.served.policy

    def begin(self, batch: tuple[int, ...] = ()) -> Memory:
        """What it remembers at the start of runs of shape `batch`."""
        size = self.served.memory
        return torch.zeros(*batch, size, dtype=torch.float32, device="cpu") if size else None

    def act(self, observation: Tensor, memory: Memory = None) -> tuple[Tensor, Memory]:
        """The action in [−1, 1], (*batch, controls), and the new memory, for observations (*batch, observations).

        Raises:
            ValueError: these are no such observations; or the server refuses the first of all requests.
        """
        batch, size = tuple(observation.shape[:-1]), self.served.memory
        memory = self.begin(batch) if memory is None else memory
        self._check("observation", observation, (*batch, len(self.observations)))
        if size:
            self._check("memory", memory, (*batch, size))
        seen = observation.reshape(-1, len(self.observations)).tolist()
        remembered = memory.reshape(-1, size).tolist() if size else None
        answer = distributed.of_first_rank(lambda: self._decided(seen, remembered))
        self._trusted = dict(zip(map(tuple, seen), answer.influence if answer else [0.0] * len(seen), strict=True))
        if answer is None:
            return observation.new_zeros(*batch, len(self.controls)), memory
        actions = torch.tensor(answer.actions, dtype=torch.float32).reshape(*batch, len(self.controls))
        return actions, torch.tensor(answer.memory, dtype=torch.float32).reshape(*batch, size) if size else None

    def influence(self, observation: Tensor) -> Tensor:
        """How far the actions were trusted, (*batch,), in [0, 1], for what `act` was last asked; else NaN.

        0 where the server was gone.
        """
        flat = observation.reshape(-1, len(self.observations)).tolist()
        trusted = [self._trusted.get(tuple(row), torch.nan) for row in flat]
        return torch.tensor(trusted, dtype=torch.float32).reshape(observation.shape[:-1])

    def trace(self) -> RemoteTrace | None:
        """Where a run reports its decisions, if the server keeps such reports; several ranks are one run."""
        return RemoteTrace(self) if self.served.traces and distributed.is_first_rank() else None

    def report(self, reports: Sequence[dict[str, Any]] = (), *, now: bool = False) -> None:
        """Tell the server of decisions, with the next request or `now`; in vain if it is gone by then."""
        self._reports.extend(reports)
        while now and self._reports and time.monotonic() >= self._ask_from:
            self._ask([], [] if self.served.memory else None)

    def _decided(self, seen: list[list[float]], remembered: list[list[float]] | None) -> Answer | None:
        """The server's answer; None where it is gone."""
        parts = []
        for start in range(0, len(seen), self.served.most):
            rows_asked = slice(start, start + self.served.most)
            gone = time.monotonic() < self._ask_from
            part = None if gone else self._ask(seen[rows_asked], None if remembered is None else remembered[rows_asked])
            if part is None:
                self.missed += len(seen)
                return None
            parts.append(part)
        self.answered += len(seen)
        memory = None if remembered is None else [row for part in parts for row in part.memory or ()]
        return Answer([a for p in parts for a in p.actions], [i for p in parts for i in p.influence], memory)

    def _ask(self, seen: list[list[float]], remembered: list[list[float]] | None) -> Answer | None:
        reports = [self._reports.popleft() for _ in range(min(MOST_REPORTS, len(self._reports)))]
        request = {"policy": self.digest, "observations": seen, "memory": remembered, "reports": reports}
        try:
            answer = self._checked(self._server.exchange("POST", ACT, request), len(seen))
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._reports.extendleft(reversed(reports))
            if isinstance(error, RefusedError) and not self.answered and not self.missed:
                raise
            self._is_gone(_reason(error))
            return None
        if self._failures:
            seconds, self._failures = time.monotonic() - self._gone_since, 0
            _log.warning("the policy server at %s is back after %.1f s", self.url, seconds)
        return answer

    def _is_gone(self, reason: str) -> None:
        now = time.monotonic()
        is_new, self._failures = not self._failures, self._failures + 1
        wait = min(30.0, 2.0 ** (self._failures - 1)) * self._random.uniform(0.5, 1)  # not all jobs at one moment
        self._ask_from = now + wait
        if is_new:
            self._gone_since = now
            warn(
                f"the policy server at {self.url} is gone ({reason}): controls stand still, and the learning rate "
                "follows the base schedule from where it is, until the server is back"
            )

    def _check(self, what: str, given: Any, shape: tuple[int, ...]) -> None:
        if not isinstance(given, Tensor) or tuple(given.shape) != shape:
            shown = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(f"{what} must be a tensor {shape}, as {self.url} serves it, got {shown}")

    def _described(self, said: Mapping[str, Any]) -> Served:
        """
        Raises:
            ValueError: this is no description of a policy that can be used here.
        """
        if said.get("protocol") != PROTOCOL or not said.keys() >= set(Served._fields):
            known = f"protocol {PROTOCOL} of rlsched"
            raise ValueError(f"policy: {self.url} does not speak {known}: what answers there says {_shown(said)}")
        served = Served(**{name: said[name] for name in Served._fields})
        for what, names, known_names in (
            ("observations", served.observations, OBSERVATIONS),
            ("controls", served.controls, CONTROLS),
        ):
            unknown = [name for name in names if name not in known_names]
            if unknown:
                raise ValueError(f"policy: {self.url} uses {what} that this rlsched does not have: {unknown}")
        return served._replace(observations=tuple(served.observations), controls=tuple(served.controls))

    def _checked(self, said: Mapping[str, Any], count: int) -> Answer:
        """
        Raises:
            ValueError: this is no answer about `count` runs.
        """
        answer = Answer(*(said.get(name) for name in Answer._fields))  # type: ignore[arg-type]
        widths = {"actions": len(self.controls), "memory": self.served.memory}
        for name, value in answer._asdict().items():
            if name == "memory" and not self.served.memory and value is None:
                continue
            shape = (count, widths[name]) if name in widths else (count,)
            try:
                numbers = torch.tensor(value, dtype=torch.float32).reshape(shape if count else (0,))
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"it gives no {name} of the shape {shape}") from error
            if not numbers.isfinite().all() or (name != "memory" and (numbers.abs() > 1).any()):
                raise ValueError(f"it gives {name} that are out of bounds")
        return answer

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reports": deque(maxlen=self._reports.maxlen)}  # which the original reports

    def __repr__(self) -> str:
        counts = f"{self.answered} answered, {self.missed} missed"
        return f"RemotePolicy({self.url}, {self.base_schedule.name}, sha256={self.digest[:12]}, {counts})"


class RemoteTrace:
    """Reports the decisions of a run to the server, which keeps them as a file of `rlsched.decisions`."""

    def __init__(self, policy: RemotePolicy) -> None:
        self._policy, self._job = policy, uuid.uuid4().hex

    def add(self, run: Controller, window: Summary, decisions: Sequence[Decision]) -> None:
        """As of `rlsched.decisions.DecisionLog`."""
        self._policy.report([{"job": self._job, "decision": row} for row in rows(run, window, decisions)])

    def close(self) -> None:
        """The run is over: what was not reported is."""
        self._policy.report(now=True)


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def _shown(said: Any) -> str:
    return text if len(text := json.dumps(said)) < 100 else f"{text[:100]} …"
