"""The state of a run as bytes: every key that is saved is named here."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from rlsched.frozen import Window
from rlsched.meter import MeterState
from rlsched.safety import GuardState, Intervention
from rlsched.schedule import ScheduleState

STATE_KEY = "rlsched"  # of the bytes in a state_dict
HELPERS = "torch.distributed.checkpoint.state_dict"


class Saved(NamedTuple):
    """What a run goes on from."""

    schedule: ScheduleState
    meter: MeterState
    guard: GuardState
    bases: list[dict[str, float]]  # what the user gave each parameter group, by control
    windows: list[Window]  # what was decided
    skipped: int  # calls of step without any gradient


def packed(saved: Saved, identity: Mapping[str, Any]) -> dict[str, bytes]:
    """The state as bytes under "rlsched", with what two runs must have in common for one to go on where the other was.

    Checkpoints of torch.distributed ask a fresh controller for the names and shapes of what they load. Those of a run
    in progress are others: bytes have none.
    """
    plain = {name: value._asdict() if hasattr(value, "_asdict") else value for name, value in saved._asdict().items()}
    plain["guard"]["interventions"] = [tuple(each) for each in saved.guard.interventions]
    plain["windows"] = [window._asdict() for window in saved.windows]
    file = io.BytesIO()
    torch.save(_apart({**plain, "identity": dict(identity)}), file)
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
        for name, kind in (("schedule", ScheduleState), ("meter", MeterState), ("guard", GuardState)):
            plain[name] = kind(**plain[name])
        return Saved(**plain)
    except (KeyError, TypeError) as error:
        raise ValueError(f"state_dict was saved by another version of rlsched: {error}") from error


def _apart(value: Any) -> Any:
    """A copy of nested containers in which none occurs twice, so that equal states are equal bytes."""
    if isinstance(value, Mapping):
        return {_apart(key): _apart(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_apart, value))
    return sys.intern(value) if isinstance(value, str) else value


# --- torch.distributed.checkpoint -----------------------------------------------------------------------------------
#
# Its helpers (`get_optimizer_state_dict` and so on) drop all that is not in a parameter group or of a parameter, and
# look into the groups for what to load. So the bytes are in the first group for them; else at the top of a state_dict,
# where they are in nobody's way: neither in the groups of a plain optimizer, nor when groups are compared.


def is_asked_by_helpers(function: str | None = None) -> bool:
    """Whether one of these helpers, or the one of this name, is calling: directly, or by way of others."""
    frame = sys._getframe(1) if HELPERS in sys.modules else None
    while frame is not None:
        if frame.f_globals.get("__name__") == HELPERS and function in (None, frame.f_code.co_name):
            return True
        frame = frame.f_back
    return False


def with_state(state_dict: dict[str, Any], state: Mapping[str, bytes]) -> dict[str, Any]:
    """A state_dict of an optimizer with the bytes where they will be found again."""
    if not is_asked_by_helpers():
        return {**state_dict, **state}
    first, *others = state_dict["param_groups"]
    return {**state_dict, "param_groups": [{**first, **state}, *others]}


def parted(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The optimizer's own part of what `with_state` gave, and the bytes; no bytes, if they are not there."""
    rest = {key: value for key, value in state_dict.items() if key != STATE_KEY}
    state = {STATE_KEY: state_dict[STATE_KEY]} if STATE_KEY in state_dict else {}
    groups = rest.get("param_groups")
    if groups and STATE_KEY in groups[0]:
        first = dict(groups[0])
        state = {STATE_KEY: first.pop(STATE_KEY)} | state
        rest["param_groups"] = [first, *groups[1:]]
    return rest, state
