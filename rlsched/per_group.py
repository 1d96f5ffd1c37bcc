"""The control states of a run: one for all parameter groups of an optimizer, or one for each, decided in one call.

To the core a group is a run of its own, which has the clock and the loss in common with the others.

Where the policy is asked, a decision is in two halves, with that between them: it is a generator, which yields what is
to be decided and is sent what was. So one call can be for all groups of a run, and for many runs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Hashable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from rlsched import schedule
from rlsched.actors import Memory
from rlsched.control import LR
from rlsched.number import Number
from rlsched.policy import Policy
from rlsched.schedule import ScheduleState
from rlsched.signals import Run, joined
from rlsched.summary import Summary
from rlsched.validation import Validation

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


class Decision(NamedTuple):
    """What was decided for one group, or for all."""

    observation: Tensor  # (observations,)
    actions: dict[str, float]  # of the policy, by control
    state: ScheduleState  # that they have led to


class Asked(NamedTuple):
    """What is to be decided, of each state."""

    observations: list[Tensor]  # (observations,) each
    memories: list[Memory]


Acted = list[tuple[Tensor, Memory]]  # the action (controls,) and the new memory, of each state
Deciding = Generator[Asked, Acted, T]  # asks once, or not at all


def begin(run: Run, bases: Sequence[Mapping[str, Number]], policy: Policy, *, probing: float) -> list[ScheduleState]:
    """The states of a run before its first inner step, one for each of `bases`.

    Raises:
        ValueError: there are several, and what the policy remembers has no batch dimension.
    """
    memories = [_memory(policy, len(bases)) for _ in bases]
    pairs = zip(bases, memories, strict=True)
    return [schedule.begin(run, base, probing=probing, memory=memory) for base, memory in pairs]


def check(groups: Sequence[Mapping[str, Any]], is_sharded: bool) -> None:
    """Refuse an optimizer whose groups cannot be measured each by itself.

    Raises:
        ValueError: its parameters are sharded, or a group has none.
    """
    if is_sharded:
        raise ValueError("per_group=True: parameters that fully_shard has sharded are measured as a whole alone")
    for i, group in enumerate(groups):
        if not group["params"]:
            raise ValueError(f"per_group=True: parameter group {i} has no parameters, and nothing to decide by")


def join(run: Run, first: ScheduleState, base: Mapping[str, Number], policy: Policy) -> ScheduleState:
    """The state of a group that joins a run: with the first one's learning rate, as that is known to be safe."""
    own = schedule.begin(run, base, probing=False, memory=_memory(policy, 2))
    control = {**own.control, LR.name: first.control[LR.name]}
    return first._replace(control=control, base=own.base, history=joined(first.history), memory=own.memory)


def decide(
    policy: Policy,
    run: Run,
    states: Sequence[ScheduleState],
    windows: Sequence[Summary],
    validation: Validation,
    moving: Sequence[Collection[str]],
) -> Deciding[list[Decision]]:
    """What the policy makes of a window, of each state.

    Args:
        policy: which will be asked for all of them.
        run: the run's constants.
        states: that held in the window.
        windows: what was measured under each of them.
        validation: the validation losses so far.
        moving: the controls that move, of each. Those of a group without a gradient in all of the window stand still.
    """
    seen_by_each = [
        schedule.observe(run, state, window, policy.observations, validation)
        for state, window in zip(states, windows, strict=True)
    ]
    acted = yield Asked([seen for seen, _ in seen_by_each], [state.memory for state in states])
    is_still = [math.isnan(window.grad_norm) for window in windows]
    decisions = []
    for i, ((seen, state), (action, memory)) in enumerate(zip(seen_by_each, acted, strict=True)):
        actions = dict(zip(policy.controls, action.tolist(), strict=True))
        moves = () if is_still[i] and not all(is_still) else moving[i]
        state = schedule.move(run, state, {name: actions[name] for name in moves}, memory)
        decisions.append(Decision(seen, actions, state))
    return decisions


def _memory(policy: Policy, groups: int) -> Memory:
    memory = policy.begin()
    if groups > 1 and not (memory is None or isinstance(memory, Tensor)):
        raise ValueError(
            "per_group=True decides for all groups at once, so that the policy has to remember a tensor, or None; it "
            f"remembers {type(memory).__name__}"
        )
    return memory


def together(policy: Policy, work: Mapping[K, Deciding[T]]) -> dict[K, T | Exception]:
    """Do several runs' work, with one call of the policy for all that ask.

    Returns:
        What came of each. The others go on where one of them raises.
    """
    results: dict[K, T | Exception] = {}
    asked: dict[K, Asked] = {}

    def go_on(key: K, acted: Acted | None) -> None:
        try:
            asked[key] = next(work[key]) if acted is None else work[key].send(acted)
        except StopIteration as end:
            results[key] = end.value
        except Exception as error:
            results[key] = error

    for key in work:
        go_on(key, None)
    while asked:
        now, asked = asked, {}
        observations, memories = (list(chain(*parts)) for parts in zip(*now.values(), strict=True))
        acted = iter(_acted(policy, Asked(observations, memories)))
        for key, part in now.items():
            go_on(key, [next(acted) for _ in part.observations])
    return results


def alone(policy: Policy, work: Deciding[T]) -> T:
    """Do one run's work."""
    try:
        asked = next(work)
        while True:
            asked = work.send(_acted(policy, asked))
    except StopIteration as end:
        result: T = end.value
        return result


def _acted(policy: Policy, asked: Asked) -> Acted:
    observations, memories = asked
    if len(observations) == 1:
        return [policy.act(observations[0], memories[0])]
    remembered = None if memories[0] is None else torch.stack(memories)
    actions, memory = policy.act(torch.stack(observations), remembered)
    later = [None] * len(actions) if memory is None else [one.clone() for one in memory]  # a view saves its base
    return list(zip(actions, later, strict=True))
