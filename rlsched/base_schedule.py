"""What a schedule does while the policy stands still: a named factor on the base learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from rlsched.number import Number, clamp


@dataclass(frozen=True)
class BaseSchedule:
    """A factor on the base learning rate, linear between its knots.

    Attributes:
        name: its key in `BASE_SCHEDULES`.
        meaning: in words.
        knots: (fraction of the run, factor) each, from fraction 0 to 1, rising. The highest factor is 1.
    """

    name: str
    meaning: str
    knots: tuple[tuple[float, float], ...]

    def factor(self, step: Number, total_steps: Number) -> Number:
        """The factor at inner step `step` in [0, total_steps)."""
        progress = step / total_steps
        factor = self.knots[0][1]
        for (start, left), (end, right) in pairwise(self.knots):
            if left != right:
                factor = factor + (right - left) * ((clamp(progress, start, end) - start) / (end - start))
        return factor + 0 * progress  # of the shape of `step`, constant or not

    @property
    def peak(self) -> float:
        """The last fraction of the run at which the factor is the highest."""
        highest = max(factor for _, factor in self.knots)
        return max(fraction for fraction, factor in self.knots if factor == highest)

    def held(self) -> BaseSchedule:
        """The highest factor throughout."""
        highest = max(factor for _, factor in self.knots)
        return replace(self, knots=((0.0, highest), (1.0, highest)))

    def rest(self, progress: float, new: float) -> BaseSchedule:
        """What is left of it after the fraction `progress` of a run, for a run of another length.

        The other run follows it from its own fraction `new` to its end, at a pace that makes both end together. Before
        that it has the factor that holds there, so that nothing jumps.
        """
        factor = self.factor(progress, 1.0)
        left = [knot for knot in self.knots if knot[0] > progress and new < 1]
        moved = {1 - (1 - fraction) / (1 - progress) * (1 - new): value for fraction, value in left}
        return replace(self, knots=tuple(sorted({0.0: factor, new: factor, 1.0: factor, **moved}.items())))

    def steps_of_knots(self, total_steps: int) -> set[int]:
        """The inner steps on both sides of each knot: between them the factor is linear in the step."""
        places = [fraction * total_steps for fraction, _ in self.knots]
        steps = {f(place) for place in places for f in (math.floor, math.ceil)}
        return {step for step in steps if 0 <= step < total_steps}


START = 0.01  # a warm-up begins with a hundredth of the learning rate: with nothing, its first step would train nothing
WARM_UP, COOL_DOWN = 0.05, 0.2  # fractions of the run

BASE_SCHEDULES: Mapping[str, BaseSchedule] = {
    schedule.name: schedule
    for schedule in (
        BaseSchedule("linear", "linear decay from the base learning rate to zero", ((0.0, 1.0), (1.0, 0.0))),
        BaseSchedule(
            "warm-up-linear",
            f"warm-up over the first {WARM_UP:.0%} of the run, then linear decay to zero",
            ((0.0, START), (WARM_UP, 1.0), (1.0, 0.0)),
        ),
        BaseSchedule(
            "warm-up-stable-decay",
            f"warm-up over the first {WARM_UP:.0%}, the base learning rate, linear decay to zero over the last "
            f"{COOL_DOWN:.0%} (Hu et al. 2024, MiniCPM)",
            ((0.0, START), (WARM_UP, 1.0), (1 - COOL_DOWN, 1.0), (1.0, 0.0)),
        ),
        BaseSchedule("constant", "the base learning rate throughout", ((0.0, 1.0), (1.0, 1.0))),
    )
}


def named_base_schedule(name: str | BaseSchedule) -> BaseSchedule:
    """The base schedule of this name.

    Raises:
        ValueError: there is none, or another one; by its name a policy file and a frozen schedule have to find it.
    """
    found = BASE_SCHEDULES.get(name.name if isinstance(name, BaseSchedule) else name)
    if found is None or (isinstance(name, BaseSchedule) and name != found):
        raise ValueError(f"base_schedule must be one of {list(BASE_SCHEDULES)}, got {name!r}")
    return found
