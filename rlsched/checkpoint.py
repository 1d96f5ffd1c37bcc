"""The state of a run as bytes: every key that is saved is named here."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from rlsched.frozen import Window
from rlsched.meter import MeterState
from rlsched.safety import GuardState, Intervention
from rlsched.schedule import ScheduleState
from rlsched.validation import Validation

KINDS: Mapping[str, Any] = {
    "schedule": ScheduleState,
    "meter": MeterState,
    "guard": GuardState,
    "validation": Validation,
}
STATE_KEY = "rlsched"  # of the bytes in a state_dict


class Saved(NamedTuple):
    """What a run goes on from."""

    schedule: ScheduleState
    meter: MeterState
    guard: GuardState
    bases: list[dict[str, float]]  # what the user gave each parameter group, by control
    windows: list[Window]  # what was decided
    skipped: int  # calls of step without any gradient
    total_steps: int | None  # None while the length of the run is not known
    validation: Validation
    kept: dict[str, Any]  # copies of the weights, see `KeptWeights.state`


def packed(saved: Saved, identity: Mapping[str, Any]) -> dict[str, bytes]:
    """The state as bytes under "rlsched", with what two runs must have in common for one to go on where the other was.

    Checkpoints of torch.distributed ask a fresh controller for the names and shapes of what they load. Those of a run
    in progress are others: bytes have none.
    """
    plain = {name: value._asdict() if hasattr(value, "_asdict") else value for name, value in saved._asdict().items()}
    plain["guard"]["interventions"] = [tuple(each) for each in saved.guard.interventions]
    plain["windows"] = [window._asdict() for window in saved.windows]
    file = io.BytesIO()
    torch.save({**plain, "identity": dict(identity)}, file)
    return {STATE_KEY: file.getvalue()}


def unpacked(state_dict: Mapping[str, Any], identity: Mapping[str, Any]) -> Saved:
    """What `packed` was given.

    Raises:
        ValueError: it is of a run with another identity, of another rlsched, or no state at all.
    """
    if not state_dict.get(STATE_KEY):
        raise ValueError(f"state_dict has no {STATE_KEY!r}, so it is not of a rlsched.Controller")
    plain = torch.load(io.BytesIO(state_dict[STATE_KEY]), map_location="cpu", weights_only=True)
    there = plain.pop("identity", None)
    if there is None:
        raise ValueError("state_dict was saved by another version of rlsched, which this one does not read")
    for name, value in identity.items():
        if there.get(name) != value:
            raise ValueError(f"state_dict is of a run with {name}={there.get(name)!r}, this one has {value!r}")
    try:
        plain["guard"]["interventions"] = tuple(Intervention(*each) for each in plain["guard"]["interventions"])
        plain["windows"] = [Window(**window) for window in plain["windows"]]
        for name, kind in KINDS.items():
            plain[name] = kind(**plain[name])
        return Saved(**plain)
    except (KeyError, TypeError) as error:
        raise ValueError(f"state_dict was saved by another version of rlsched: {error}") from error
