"""A scheduled optimizer's state_dict: as a plain optimizer can go on from it, and as a schedule goes on from it."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from rlsched.checkpoint import STATE_KEY
from rlsched.controller import Controller
from rlsched.hyperparameters import SUM
from rlsched.notices import warn

HELPERS = "torch.distributed.checkpoint.state_dict"


def saved(controller: Controller) -> dict[str, Any]:
    """The state_dict of the controller's optimizer, with what the user gave in its groups, and the controller's state.

    A momentum buffer that sums gradients is scaled by the power of two that brings it nearest to what it would hold at
    the base momentum: to multiply by that, as by no other number, can be undone to the last bit.
    """
    state_dict, exponents = dict(controller.optimizer.state_dict()), []
    asked = is_asked_by_helpers()  # which load in place, and keep nothing but tensors of the shapes that there are
    if "param_groups" in state_dict:  # which a few others have elsewhere
        state_dict["param_groups"] = controller.groups.given(state_dict["param_groups"])
        if not asked and not controller.meter.is_sharded:
            exponents = _exponents(controller, state_dict)
            state_dict = _scaled(state_dict, exponents)
    state = controller.packed(None if asked else controller.saved_snapshot(), exponents)
    return _joined(state_dict, state, in_group=asked)


def load(controller: Controller, state_dict: Mapping[str, Any]) -> None:
    """Load what `saved` gave; or begin a schedule, with a warning, from the state_dict of a plain optimizer.

    Raises:
        ValueError: as of `Controller.load_state_dict`. The optimizer and the controller are then as they were.
    """
    own, state = _parted(state_dict)
    found = controller.unpacked(state) if state else None
    if found is not None and "param_groups" in own:
        found = found._replace(bases=controller.groups.edited(found.bases, own["param_groups"]))
        own = _scaled(own, [-exponent for exponent in found.exponents])
    meter = controller.meter
    with _all_or_nothing(controller.optimizer, controller, controller.groups, controller.guard, meter, controller.kept):
        controller.optimizer.load_state_dict(own)
        if found is not None:
            return controller.go_on(found)
        controller.groups.let_go()
        controller.begin(controller.total_steps)
        warn(
            f"state_dict has no {STATE_KEY!r}, so it is of an optimizer without a schedule: one begins here, "
            f"at the learning rate in state_dict, and at step 0 of {controller.total_steps or 'unknown length'}"
        )
        meter.detach()


# --- Where the controller's state is --------------------------------------------------------------------------------
#
# It is at the top of a state_dict, where it is in nobody's way: neither in the groups of a plain optimizer, nor when
# groups are compared. But the helpers of torch.distributed.checkpoint (`get_optimizer_state_dict` and so on) drop all
# that is not in a parameter group or of a parameter, and look into the groups for what to load: for them it is in the
# first group.


def is_asked_by_helpers(function: str | None = None) -> bool:
    """Whether one of these helpers, or the one of this name, is calling: directly, or by way of others."""
    frame = sys._getframe(1) if HELPERS in sys.modules else None
    while frame is not None:
        if frame.f_globals.get("__name__") == HELPERS and function in (None, frame.f_code.co_name):
            return True
        frame = frame.f_back
    return False


def _joined(state_dict: dict[str, Any], state: Mapping[str, bytes], *, in_group: bool) -> dict[str, Any]:
    if not in_group:
        return {**state_dict, **state}
    first, *others = state_dict["param_groups"]
    return {**state_dict, "param_groups": [{**first, **state}, *others]}


def _parted(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The optimizer's own state_dict, and the controller's state; an empty one, if it is not there."""
    own = {key: value for key, value in state_dict.items() if key != STATE_KEY}
    state = {STATE_KEY: state_dict[STATE_KEY]} if STATE_KEY in state_dict else {}
    groups = own.get("param_groups")
    if groups and STATE_KEY in groups[0]:
        first = dict(groups[0])
        state = {STATE_KEY: first.pop(STATE_KEY), **state}
        own["param_groups"] = [first, *groups[1:]]
    return own, state


# --- Momentum that sums gradients -----------------------------------------------------------------------------------


def _exponents(controller: Controller, state_dict: Mapping[str, Any]) -> list[int]:
    """Of 2, for each group; 0 where a loss of bits could not be undone, as there is an end to the range of floats."""
    groups = state_dict["param_groups"][: len(controller.groups.bases)]
    exponents = [round(math.log2(controller.groups.growth_of_buffers(i))) for i in range(len(groups))]
    return [
        exponent if all(_is_reversible(buffer, exponent) for _, buffer in _sums(state_dict, group)) else 0
        for exponent, group in zip(exponents, groups, strict=True)
    ]


def _is_reversible(buffer: Tensor, exponent: int) -> bool:
    if exponent == 0:
        return True
    return not buffer.is_sparse and bool((buffer * 2.0**exponent * 2.0**-exponent).equal(buffer))


def _scaled(state_dict: Mapping[str, Any], exponents: Sequence[int]) -> dict[str, Any]:
    """A state_dict whose sums of gradients are multiplied by 2 to the power of their group's exponent.

    They are in host memory then: on an accelerator there may be no room for another copy.
    """
    scaled = dict(state_dict)
    for group, exponent in zip(state_dict["param_groups"], exponents, strict=False):
        if exponent:
            scaled["state"] = dict(scaled["state"])
            for key, buffer in _sums(state_dict, group):
                scaled["state"][key] = {**scaled["state"][key], SUM: buffer.cpu() * 2.0**exponent}
    return scaled


def _sums(state_dict: Mapping[str, Any], group: Mapping[str, Any]) -> Iterator[tuple[Any, Tensor]]:
    """The sums of gradients of a group, with their keys."""
    for key in group["params"]:
        buffer = state_dict["state"].get(key, {}).get(SUM)
        if isinstance(buffer, Tensor):
            yield key, buffer


@contextmanager
def _all_or_nothing(*objects: Any) -> Iterator[None]:
    """Give the attributes of objects their values back if something fails."""
    before = [dict(vars(each)) for each in objects]
    try:
        yield
    except BaseException:
        for each, attributes in zip(objects, before, strict=True):
            vars(each).clear()
            vars(each).update(attributes)
        raise
