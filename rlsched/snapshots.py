"""A copy of a run at one moment, to go back to."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from rlsched.number import Number
from rlsched.schedule import ScheduleState

FULL, HOST, WEIGHTS = "full", "host", "weights"
SNAPSHOTS = (FULL, HOST, WEIGHTS)  # of weights and optimizer state; the same in host memory; of the weights alone


class Snapshot(NamedTuple):
    """A run at one moment."""

    tensors: list[tuple[Tensor, Tensor]]  # each parameter and each buffer of the model, and what it was
    optimizer_state: dict[Tensor, Any]
    schedule: list[ScheduleState]  # of all groups, or of each
    guard: Any  # what the guard remembers
    average_norm: Number  # of the gradient

    @classmethod
    def of(
        cls,
        optimizer: Optimizer,
        schedule: list[ScheduleState],
        guard: Any,
        average_norm: Number,
        *,
        model: Module | None = None,
        kind: str = FULL,
        optimizer_state: dict[Tensor, Any] | None = None,
    ) -> Snapshot:
        """A snapshot of the present.

        Args:
            optimizer: whose weights and state it is of.
            schedule, guard, average_norm: what goes with them.
            model: has buffers that belong to it, as those of batch norm.
            kind: of `SNAPSHOTS`.
            optimizer_state: take this for the optimizer's state, as an earlier snapshot has it.
        """
        tensors = tensors_of(optimizer, model)
        device = "cpu" if kind == HOST else None
        if optimizer_state is None:
            states = [
                (t, optimizer.state[t]) for t in tensors if t in optimizer.state
            ]  # others keep what they like in it
            optimizer_state = {t: _copied(state, device) for t, state in states}
        return cls([(t, _copied(t, device)) for t in tensors], optimizer_state, schedule, guard, average_norm)

    @torch.no_grad()
    def restore(self, optimizer: Optimizer) -> None:
        """Bring weights, buffers and optimizer state back, in place."""
        for tensor, saved in self.tensors:
            tensor.copy_(saved)
        for tensor, _ in self.tensors:
            if tensor in self.optimizer_state and tensor in optimizer.state:
                _restore(optimizer.state[tensor], self.optimizer_state[tensor])
            else:
                optimizer.state.pop(tensor, None)

    def packed(self) -> dict[str, Any]:
        """The same by the order of its tensors, for a checkpoint."""
        states = [self.optimizer_state.get(tensor) for tensor, _ in self.tensors]
        saved = [saved for _, saved in self.tensors]
        norm = float(self.average_norm)
        return {**self._asdict(), "tensors": saved, "optimizer_state": states, "average_norm": norm}

    @classmethod
    def unpacked(cls, plain: Mapping[str, Any], tensors: Sequence[Tensor]) -> Snapshot:
        """What gave `plain`, of these parameters and buffers."""
        pairs = list(zip(tensors, plain["tensors"], strict=True))
        states = zip(tensors, plain["optimizer_state"], strict=True)
        return cls(**{**plain, "tensors": pairs, "optimizer_state": {t: s for t, s in states if s is not None}})


def tensors_of(optimizer: Optimizer, model: Module | None) -> list[Tensor]:
    """What a snapshot is of: the parameters, and the buffers of the model."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return parameters if model is None else [*parameters, *model.buffers()]


def _copied(value: Any, device: str | None) -> Any:
    """A copy of a tensor, or of what an optimizer keeps of a parameter; on another device if one is named."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True) if device else value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(entry, device) for key, entry in value.items()}
    if isinstance(value, list):
        return [_copied(entry, device) for entry in value]
    return copy.deepcopy(value)


def _restore(state: dict[str, Any], saved: dict[str, Any]) -> None:
    for key in list(state):
        if key not in saved:
            del state[key]
        elif isinstance(state[key], Tensor) and isinstance(saved[key], Tensor):
            state[key].copy_(saved[key])
        else:
            state[key] = _copied(saved[key], None)
