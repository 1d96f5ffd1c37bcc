"""What the environments are given, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from rlsched.envs.mixtures import names
from rlsched.envs.tasks import InnerTask
from rlsched.notices import warn
from rlsched.policy import checked_names

Array = NDArray[Any]


def some_names(argument: str, names: Sequence[str], known: Mapping[str, Any]) -> tuple[str, ...]:
    """The names as a tuple.

    Raises:
        ValueError: as `rlsched.policy.checked_names` does, or because there are none: nothing is learned from that.
    """
    if not names:
        raise ValueError(f"{argument} must be at least one of {tuple(known)}, got {names!r}")
    return checked_names(argument, names, known)


def checked_actions(actions: Array, shape: tuple[int, ...] | None) -> Array:
    """A copy of the actions as float32.

    Raises:
        ValueError: they have another shape than `shape`, (num_envs, controls), or are not finite.
    """
    actions = np.array(actions, np.float32)
    if actions.shape != shape:
        raise ValueError(f"actions must have the shape {shape}, got {actions.shape}")
    if not np.isfinite(actions).all():
        raise ValueError(f"actions must be finite, got {actions[~np.isfinite(actions).all(-1)][0]}")
    return actions


def check_sets(num_envs: int, clones: int) -> None:
    """
    Raises:
        ValueError: so many environments are no sets of so many clones.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, got {num_envs}")
    if clones < 1 or num_envs % clones:
        raise ValueError(f"clones must be at least 1 and divide num_envs ({num_envs}), got {clones}")


def seeds_of(seed: int | Sequence[int | None] | None, num_envs: int, clones: int = 1) -> list[int | None]:
    """One seed per set of clones: counted up from an int, or those of the first clones where each has one.

    Raises:
        ValueError: one is negative, or they are not as many as the environments.
    """
    sets = num_envs // clones
    if seed is None:
        return [None] * sets
    if isinstance(seed, (int, np.integer)):
        seed = [int(seed) + i for i in range(sets)]
    elif len(seed) != num_envs:
        raise ValueError(f"seed must be an int or {num_envs} seeds, got {len(seed)}")
    else:
        seed = seed[::clones]
    negative = [s for s in seed if s is not None and s < 0]
    if negative:
        raise ValueError(f"seed must be non-negative, got {negative[0]}")
    return list(seed)


def reset_mask(options: Mapping[str, Any] | None, num_envs: int, clones: int = 1) -> Array:
    """The runs that `reset` begins anew, by its option of this name: a mask (num_envs,), by default of all.

    Raises:
        ValueError: it is no such mask, or not one of whole sets of clones; or there is another option.
    """
    options = options or {}
    if not options.keys() <= {"reset_mask"}:
        raise ValueError(f"options may have a 'reset_mask', got {sorted(options)}")
    mask = options.get("reset_mask", np.ones(num_envs, bool))
    if not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.shape != (num_envs,):
        raise ValueError(f"options: reset_mask must be an array of {num_envs} bools, got {mask!r}")
    sets = mask.reshape(-1, clones)
    if (sets != sets[:, :1]).any():
        raise ValueError(f"options: reset_mask must be the same for all {clones} clones of a set, got {mask}")
    return mask.copy()


def autoreset_mode_of(given: str | AutoresetMode) -> AutoresetMode:
    """A way to go on after an episode, which is given as that or by its name, as in Gymnasium's own environments.

    Raises:
        ValueError: there is none of this name.
    """
    try:
        return AutoresetMode(given)
    except ValueError:
        known = [mode.value for mode in AutoresetMode]
        raise ValueError(f"autoreset_mode must be an AutoresetMode or one of {known}, got {given!r}") from None


def check_begun(method: str, waiting: Array) -> None:
    """
    Raises:
        ResetNeeded: a run waits for a reset before this method can be called, by this mask.
    """
    if waiting.any():
        which = "the runs have" if waiting.all() else f"of the runs, {np.flatnonzero(waiting).tolist()} have"
        raise ResetNeeded(
            f"{method}() was called where {which} no episode, or one that is over: call reset() first, which begins "
            "some of them anew with options={'reset_mask': mask}"
        )


def warn_of_left_out(tasks: Sequence[InnerTask], sets: int) -> None:
    """Say which tasks of a mixture have none of so many runs, or sets of clones."""
    if sets < len(tasks):
        left_out = ", ".join(names(tasks)[sets:])
        warn(f"num_envs: for {len(tasks)} tasks there are {sets} runs (or sets of clones), and none of {left_out}")
