"""The words in which a policy sees and acts: entries of the observation vector and of the action vector.

The entries themselves stand beside their formulas, observations in `rlsched.signals.OBSERVATIONS` and controls
in `rlsched.control.CONTROLS`. Adding one is adding an entry there; the spaces of the environment, the shape of
the policy, what TensorBoard names it and the table in the documentation all follow from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from rlsched.signals import Readings

VERSION = 1  # raised whenever an entry keeps its name but changes its meaning


@dataclass(frozen=True)
class Observation:
    """One entry of the observation vector: dimensionless, and always within [low, high]."""

    name: str
    meaning: str
    low: float
    high: float
    formula: Callable[[Readings], Tensor]  # Readings of shape (*batch,) -> (*batch,), clipped by the caller


@dataclass(frozen=True)
class Control:
    """One entry of the action vector, in [-1, 1], and the state that it moves.

    A decision adds `step * action` to the state (`early_step` in the first fifth of a run), which stays within
    [low, high]. An action of zero leaves the state as it is.
    """

    name: str
    meaning: str
    low: float
    high: float
    step: float
    early_step: float


def observation_table(observations: Iterable[Observation]) -> str:
    """The observations as a Markdown table, for documentation."""
    rows = [f"| {i} | `{o.name}` | {o.low:g} | {o.high:g} | {o.meaning} |" for i, o in enumerate(observations)]
    return "\n".join(["| # | observation | min | max | meaning |", "|--:|---|--:|--:|---|", *rows])


def control_table(controls: Iterable[Control]) -> str:
    """The controls as a Markdown table, for documentation."""
    rows = [
        f"| {i} | `{c.name}` | {c.low:g} | {c.high:g} | ±{c.early_step:g}, later ±{c.step:g} | {c.meaning} |"
        for i, c in enumerate(controls)
    ]
    return "\n".join(
        ["| # | control | min | max | a decision moves it by | meaning |", "|--:|---|--:|--:|---|---|", *rows]
    )
