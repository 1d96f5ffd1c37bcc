"""The state of a run as bytes: every key that is saved is named here or in the types of its parts."""

from __future__ import annotations

import io
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from rlsched.control import CONTROLS, LR
from rlsched.frozen import Window
from rlsched.records import MeterState
from rlsched.schedule import ScheduleState
from rlsched.signals import TRACES
from rlsched.snapshots import Snapshot, tensors_of
from rlsched.validation import Validation
from rlsched.verdict import GuardState
from rlsched.weights import KeptState

STATE_KEY = "rlsched"  # of the bytes in a state_dict


class Saved(NamedTuple):
    """What a run goes on from."""

    schedule: list[ScheduleState]  # of all parameter groups, or of each
    meter: MeterState
    guard: GuardState
    bases: list[dict[str, float]]  # what the user gave each parameter group, by control
    windows: list[Window]  # what was decided
    skipped: int  # calls of step without any gradient
    total_steps: int | None  # None while the length of the run is not known
    validation: Validation
    kept: KeptState  # copies of the weights
    exponents: list[int]  # of 2, by which each group's momentum buffers are scaled beside it; none, if they are not
    snapshot: Snapshot | None  # if the run may have to go back to it


def packed(saved: Saved, identity: Mapping[str, Any]) -> dict[str, bytes]:
    """The state as bytes under "rlsched", with what two runs must have in common for one to go on where the other was.

    Checkpoints of torch.distributed ask a fresh controller for the names and shapes of what they load. Those of a run
    in progress are others: bytes have none.
    """
    snapshot = None if saved.snapshot is None else _plain(saved.snapshot.packed())
    plain = _plain({**saved._asdict(), "snapshot": snapshot if _is_safe(snapshot) else None, "identity": identity})
    file = io.BytesIO()
    torch.save(plain, file)
    return {STATE_KEY: file.getvalue()}


def unpacked(
    state_dict: Mapping[str, Any],
    identity: Mapping[str, Any],
    optimizer: Optimizer,
    *,
    model: Module | None = None,
    memory: Any = None,
) -> Saved:
    """What `packed` was given.

    Args:
        state_dict: has the bytes.
        identity: what the state has to be of.
        optimizer: that goes on.
        model: whose buffers are in its snapshots.
        memory: a memory of the policy that has to go on.

    Raises:
        ValueError: it is of a run with another identity, of another rlsched, no state at all, or something in it cannot
            be.
    """
    plain = _read_bytes(state_dict)
    there = plain.pop("identity", None)
    if not isinstance(there, dict):
        raise ValueError("state_dict was saved by another version of rlsched, which this one does not read")
    for name, value in identity.items():
        if type(there.get(name)) is not type(value) or there[name] != value:
            raise ValueError(f"state_dict is of a run with {name}={there.get(name)!r}, this one has {value!r}")
    snapshot = plain.get("snapshot")
    if snapshot is not None:
        plain["snapshot"] = None  # it is read by what the rest says
    saved: Saved = _read(Saved, plain, "")
    _check(saved, memory, per_group=bool(identity.get("per_group")))
    groups = len(optimizer.param_groups)
    _demand(len(saved.bases) <= groups, "bases", f"those of {groups} parameter groups", saved.bases)
    if snapshot is None:
        return saved
    return saved._replace(snapshot=_read_snapshot(snapshot, saved, tensors_of(optimizer, model), memory))


def _read_bytes(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    state = state_dict.get(STATE_KEY)
    if not isinstance(state, bytes | bytearray) or not state:
        raise ValueError(f"state_dict has no {STATE_KEY!r}, so it is not of a rlsched.Controller")
    try:
        plain = torch.load(io.BytesIO(state), map_location="cpu", weights_only=True)
    except Exception as error:  # of zip files, of pickles, and whatever is in them
        raise ValueError(f"state_dict[{STATE_KEY!r}] cannot be read: {error}") from error
    return plain if isinstance(plain, dict) else {}


def _plain(value: Any) -> Any:
    """A copy of nested containers, with no class of our own, and none of them twice: equal states are equal bytes."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {_plain(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return sys.intern(value) if isinstance(value, str) else value


def _is_safe(value: Any) -> bool:
    """Whether torch loads this without pickle's dangers; an optimizer may keep what it likes of its parameters."""
    if isinstance(value, dict):
        return all(map(_is_safe, [*value, *value.values()]))
    if isinstance(value, list | tuple):
        return all(map(_is_safe, value))
    return value is None or type(value) in (bool, int, float, str, Tensor, torch.nn.Parameter)


# --- What can be ----------------------------------------------------------------------------------------------------
#
# A state is read by the types of its parts. A number is finite, unless it is one that may not be known; and an int, if
# its range is one of ints.

LARGEST = sys.float_info.max
COUNTED = (0, 2**62)
A_LOG_LOSS = (-104.0, 89.0)  # in single precision
RANGES = {
    "schedule.step": COUNTED,
    "schedule.lr_offset": (-math.inf, 0.0),
    "schedule.ceiling": (LR.low, LR.high + LR.step),
    "schedule.bound": (LR.low, LR.high),
    "schedule.probing": (0.0, 1.0),
    "schedule.window_start": COUNTED,
    "schedule.window_end": COUNTED,
    "meter.average_norm": (0.0, math.inf),
    "average_norm": (0.0, math.inf),
    "guard.nonfinite": COUNTED,
    "guard.first": A_LOG_LOSS,
    "guard.average": A_LOG_LOSS,
    "guard.lowest": A_LOG_LOSS,
    "guard.noise": (0.0, math.inf),
    "guard.lost": COUNTED,
    "guard.dead": (-1, 2**62),
    "guard.overfit": (-1, 2**62),
    "guard.restored_at": (-1, 2**62),
    "guard.interventions.step": COUNTED,
    "windows.start": COUNTED,
    "windows.total_steps": (1, 2**62),
    "windows.knots": (-1e-6, 1 + 1e-6),
    "skipped": COUNTED,
    "total_steps": (1, 2**62),
    "validation.step": (0.0, 2.0**62),
    "validation.best_step": (0.0, 2.0**62),
    "validation.since_best": (0.0, 2.0**62),
    "kept.best.step": COUNTED,
    "kept.average.step": COUNTED,
    "exponents": (-64, 64),
}
MAY_BE_UNKNOWN = re.compile(
    r"schedule\.history\.\w+|guard\.(first|average|lowest)|(meter\.)?average_norm|bases\.\w+|"
    r"validation\.(step|best|best_step)"
)
ANY_LOSS = ("meter.losses", "validation.loss")  # of a step that a GradScaler has skipped; of weights that are lost
KEYS = {"control": CONTROLS, "base": CONTROLS, "moved": CONTROLS, "bases": CONTROLS, "history": TRACES}

_type_hints = lru_cache(get_type_hints)


def _read(kind: Any, value: Any, name: str) -> Any:
    """A value of the type that a part of a state has.

    Args:
        kind: a NamedTuple, a container, an elementary type, or Any, which is that of a `Number`.
        value: what was saved.
        name: of it, for errors.

    Raises:
        ValueError: it is of another type, or out of its range.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:
        (kind,) = (argument for argument in arguments if argument is not NoneType)
        return None if value is None else _read(kind, value, name)
    if _general(name) == "schedule.memory":
        return value
    if origin in (list, tuple):
        _demand(isinstance(value, list | tuple), name, "a sequence", value)
        return origin(_read(arguments[0], each, f"{name}[{i}]") for i, each in enumerate(value))
    if origin is dict:
        _demand(isinstance(value, dict), name, "a dict", value)
        _same_names(value, KEYS[_general(name).rpartition(".")[2]], name)
        return {key: _read(arguments[1], each, f"{name}.{key}") for key, each in value.items()}
    if hasattr(kind, "_fields"):
        _demand(isinstance(value, dict), name, "a dict", value)
        hints = _type_hints(kind)
        _same_names(value, hints, name)
        return kind(**{key: _read(hints[key], value[key], f"{name}.{key}".lstrip(".")) for key in hints})
    if kind in (int, float, Any):
        return _read_number(kind, value, name)
    _demand(isinstance(value, kind), name, f"a {kind.__name__}", value)
    return value


def _read_number(kind: Any, value: Any, name: str) -> Any:
    general = _general(name)
    low, high = RANGES.get(general, (-math.inf, math.inf))
    if kind is int or isinstance(low, int):
        _demand(type(value) is int, name, "an int", value)
    _demand(type(value) in (int, float), name, "a number", value)
    may_be_unknown = value != value and MAY_BE_UNKNOWN.fullmatch(general)
    is_allowed = (low <= value <= high and abs(value) <= LARGEST) or may_be_unknown or general in ANY_LOSS
    _demand(is_allowed, name, "finite" + f" and in [{low:g}, {high:g}]" * (general in RANGES), value)
    return value


def _general(name: str) -> str:
    """A name without what number it is in a sequence, and without whose it is."""
    return re.sub(r"\[\d+\]", "", name).removeprefix("snapshot.")


def _demand(condition: Any, name: str, what: str, value: Any) -> None:
    if not condition:
        shown = f"of shape {tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value)[:80]
        raise ValueError(f"state_dict: {name or 'the state'} must be {what}, got {shown}")


def _same_names(value: Mapping[str, Any], names: Iterable[str], name: str) -> None:
    for what, keys in (("lacks", set(names) - set(value)), ("has an unknown", set(value) - set(names))):
        if keys:
            raise ValueError(
                f"state_dict was saved by another version of rlsched: {name or 'it'} {what} {min(map(repr, keys))}"
            )


def _check(saved: Saved, memory: Any, *, per_group: bool) -> None:
    """Refuse what cannot be together."""
    _demand(saved.schedule, "schedule", "of at least one parameter group", saved.schedule)
    now, bases, windows, total_steps = saved.schedule[0], saved.bases, saved.windows, saved.total_steps
    _demand(now.window_start <= now.step, "schedule[0].window_start", f"at most the step, {now.step}", now.window_start)
    _demand(now.window_start < now.window_end, "schedule[0].window_end", "behind its start", now.window_end)
    is_within = now.step <= now.window_end or (total_steps is not None and now.window_end >= total_steps)
    _demand(is_within, "schedule[0].step", f"at most the end of its window, {now.window_end}", now.step)
    _demand(bases, "bases", "those of at least one parameter group", bases)
    for i, base in enumerate(bases):
        for name, value in base.items():
            may_lack = name != LR.name and math.isnan(value)
            allowed = CONTROLS[name].allowed
            _demand(may_lack or CONTROLS[name].is_valid(value), f"bases[{i}].{name}", allowed, value)
    own = len(bases) if per_group else 1
    _demand(len(saved.schedule) == own, "schedule", f"{own} states", f"{len(saved.schedule)} states")
    _check_states(saved.schedule, bases, "schedule", memory)
    _demand(len(saved.exponents) in (0, len(bases)), "exponents", "one for each group, or none", saved.exponents)
    starts = [window.start for window in windows]
    rising = all(map(int.__lt__, starts, starts[1:]))
    _demand(starts[:1] == [0] and rising, "windows", "in their order from the first step on", starts)
    _demand(starts[-1] <= now.step, "windows", f"of steps up to {now.step}", starts[-1])
    last = windows[-1].total_steps
    _demand(total_steps in (None, last), "total_steps", f"{last}, as in the last of the windows, or None", total_steps)
    validation = saved.validation
    _demand(not validation.step > now.step, "validation.step", f"at most the step, {now.step}", validation.step)
    for i, window in enumerate(windows):
        places = [knot[0] for knot in window.knots if len(knot) == 2]
        are_knots = len(places) == len(window.knots) and places[:1] == [0] and places[-1:] == [1]
        are_knots = are_knots and all(one < other for one, other in pairwise(places))
        what = "pairs of a fraction of the run, rising from 0 to 1, and a factor"
        _demand(are_knots, f"windows[{i}].knots", what, window.knots)
        for name, control in CONTROLS.items():
            origin = now.base[name]
            low, high = min(control.low - origin, 0.0), max(control.high - origin, 0.0)
            low = -math.inf if name == LR.name else low - 1e-6  # which an offset may take lower
            what, value = f"in [{low:g}, {high:g}]", window.moved[name]
            _demand(low <= value <= high + 1e-6, f"windows[{i}].moved.{name}", what, value)


def _check_states(
    states: Sequence[ScheduleState], bases: Sequence[Mapping[str, float]], where: str, memory: Any
) -> None:
    clocks = [(s.step, s.window_start, s.window_end, s.probing) for s in states]
    _demand(len(set(clocks)) == 1, where, "of groups at the same step", clocks)
    for i, (state, base) in enumerate(zip(states, bases, strict=False)):
        _check_controls(state, base, f"{where}[{i}]", memory)


def _check_controls(state: ScheduleState, base: Mapping[str, float], where: str, memory: Any) -> None:
    for name, control in CONTROLS.items():
        origin, value = state.base[name], state.control[name]
        expected = control.origin(base[name])
        _demand(math.isclose(origin, expected), f"{where}.base.{name}", f"{expected!r}, the base value's", origin)
        low, high = min(control.low, origin), max(control.high, origin)
        _demand(low <= value <= high, f"{where}.control.{name}", f"in [{low:g}, {high:g}]", value)
    _demand(
        _is_like(memory, state.memory), f"{where}.memory", "finite, and like what the policy begins with", state.memory
    )


def _is_like(begun: Any, value: Any) -> bool:
    """Whether this can be what a policy remembers that began with something; of None nothing is known."""
    if isinstance(begun, Tensor) and isinstance(value, Tensor):
        return value.shape == begun.shape and value.dtype == begun.dtype and bool(value.isfinite().all())
    if isinstance(begun, dict) and isinstance(value, dict):
        return begun.keys() == value.keys() and all(_is_like(begun[key], value[key]) for key in begun)
    if isinstance(begun, list | tuple) and type(begun) is type(value):
        return len(begun) == len(value) and all(map(_is_like, begun, value))
    if isinstance(begun, int | float):
        return type(value) in (int, float) and abs(value) <= LARGEST
    return begun is None or type(begun) is type(value)


def _read_snapshot(plain: Any, saved: Saved, tensors: Sequence[Tensor], memory: Any) -> Snapshot:
    name = "snapshot"
    _demand(isinstance(plain, dict), name, "a dict", plain)
    _same_names(plain, Snapshot._fields, name)
    read: dict[str, Any] = {"average_norm": _read(float, plain["average_norm"], f"{name}.average_norm")}
    for part, kind in (("schedule", list[ScheduleState]), ("guard", GuardState)):
        read[part] = _read(kind, plain[part], f"{name}.{part}")
    most = len(saved.schedule)  # fewer are in a snapshot of a time when there were fewer groups
    _demand(0 < len(read["schedule"]) <= most, f"{name}.schedule", f"1 to {most} states", read["schedule"])
    _check_states(read["schedule"], saved.bases, f"{name}.schedule", memory)
    for part in ("tensors", "optimizer_state"):
        value = plain[part]
        is_whole = isinstance(value, list) and len(value) == len(tensors)
        _demand(
            is_whole,
            f"{name}.{part}",
            f"a list of {len(tensors)}, one for each parameter and each buffer of `model`",
            value,
        )
    for i, (tensor, then, state) in enumerate(zip(tensors, plain["tensors"], plain["optimizer_state"], strict=True)):
        is_alike = isinstance(then, Tensor) and (then.shape, then.dtype) == (tensor.shape, tensor.dtype)
        _demand(is_alike, f"{name}.tensors[{i}]", f"a tensor of shape {tuple(tensor.shape)} {tensor.dtype}", then)
        _demand(state is None or isinstance(state, dict), f"{name}.optimizer_state[{i}]", "a dict or None", state)
    return Snapshot.unpacked({**plain, **read}, tensors)
