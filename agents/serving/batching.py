"""Decisions in batches: what is asked within a few milliseconds is decided in one call."""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlsched.policy import Policy

Array = NDArray[np.float32]
Decided = tuple[Array, Array, Array | None]  # actions (n, controls), influence (n,), memory (n, size) or None


class Engine(Protocol):
    """Decides for n runs at once."""

    def decide(self, observations: Array, memory: Array | None = None) -> Decided:
        """Of observations (n, observations) and, where the policy remembers, memories (n, size)."""


class TorchEngine:
    """A policy as an engine, on torch."""

    def __init__(self, policy: Policy) -> None:
        self._policy: Any = policy

    @torch.inference_mode()
    def decide(self, observations: Array, memory: Array | None = None) -> Decided:
        seen = torch.from_numpy(observations)
        remembered = None if memory is None else torch.from_numpy(memory)
        actions, later = self._policy.act(seen, remembered)
        trusted = self._policy.influence(seen) if hasattr(self._policy, "influence") else torch.ones(len(seen))
        return actions.numpy(), trusted.numpy(), later.numpy() if isinstance(later, Tensor) else None


class _Waiting(NamedTuple):
    """What was asked, and who waits for it."""

    observations: Array
    memory: Array | None
    answer: asyncio.Future[Decided]


class Batcher:
    """Collects what is asked, and decides it in one call.

    Args:
        engine: decides.
        most: runs in a batch: with so many it is decided at once.
        wait: seconds that the first of a batch waits for others.

    Attributes:
        decisions, batches: made so far.
    """

    def __init__(self, engine: Engine, *, most: int, wait: float) -> None:
        self.engine, self.most, self.wait = engine, most, wait
        self.decisions = self.batches = 0
        self._waiting: list[_Waiting] = []
        self._timer: asyncio.TimerHandle | None = None

    async def decide(self, observations: Array, memory: Array | None) -> Decided:
        """What the engine decides, among others."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Decided] = loop.create_future()
        self._waiting.append(_Waiting(observations, memory, answer))
        if sum(len(each.observations) for each in self._waiting) >= self.most:
            self._decide()
        elif self._timer is None:
            self._timer = loop.call_later(self.wait, self._decide)
        return await answer

    def _decide(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        waiting = [each for each in self._waiting if not each.answer.done()]  # whom nobody has cancelled
        self._waiting, self._timer = [], None
        if not waiting:
            return
        memories = [each.memory for each in waiting if each.memory is not None]
        try:
            observations = np.concatenate([each.observations for each in waiting])
            decided = self.engine.decide(observations, np.concatenate(memories) if memories else None)
        except Exception as error:
            for each in waiting:
                each.answer.set_exception(error)
            return
        self.decisions, self.batches = self.decisions + len(observations), self.batches + 1
        start = 0
        for each in waiting:
            own = slice(start, start := start + len(each.observations))
            actions, influence, memory = decided
            each.answer.set_result((actions[own], influence[own], None if memory is None else memory[own]))
