"""How the actions follow an observation, all else being as it was (partial dependence, Friedman 2001), or typical."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlsched.agents.explain.attribution import typical
from rlsched.agents.explain.decisions import Decisions
from rlsched.policy import SchedulePolicy

POINTS = 33  # of a curve
MOST = 400  # decisions that a curve is the mean of, evenly chosen
RANGE = 0.005  # the curve goes from this quantile of what was seen to that from above
BAND = 0.1  # the band leaves out this part of the decisions on either side
STEADY = 0.6  # net change of a curve over all its ups and downs, from which on it rises or falls
FLAT = 0.02  # change of an action that is none


class Response(NamedTuple):
    """The actions as one observation goes over the range in which it was seen."""

    observation: str
    values: NDArray[np.float64]  # (points,): of the observation
    mean: NDArray[np.float64]  # (points, controls): over the decisions, all else being as it was in each
    low: NDArray[np.float64]  # (points, controls): quantile `BAND` of the same
    high: NDArray[np.float64]  # (points, controls): and that from above
    typical: NDArray[np.float64]  # (points, controls): all else being typical, and with an empty memory

    def direction(self, control: int) -> str:
        """What more of the observation does to an action: "raises", "lowers", "both ways" or "little"."""
        changes = np.diff(self.mean[:, control])
        ways = float(np.abs(changes).sum())
        if ways < FLAT:
            return "little"
        net = float(changes.sum())
        if abs(net) < STEADY * ways:
            return "both ways"
        return "raises" if net > 0 else "lowers"


@torch.no_grad()
def responses(policy: SchedulePolicy, decisions: Decisions) -> dict[str, Response]:
    """The responses to each observation that was not always the same, by its name."""
    n = len(decisions.observations)
    chosen = torch.linspace(0, n - 1, min(n, MOST)).round().long()
    observations = decisions.observations[chosen]
    memory = None if decisions.memory is None else decisions.memory[chosen]
    middle = typical(policy, decisions)
    found = {}
    for i, name in enumerate(policy.observations):
        low, high = np.quantile(decisions.observations[:, i].numpy(), [RANGE, 1 - RANGE])
        if not high - low > 1e-6:
            continue
        values = torch.linspace(float(low), float(high), POINTS)
        moved = _with(observations, i, values).flatten(0, 1)
        actions, _ = policy.actor(moved, None if memory is None else memory.repeat(POINTS, 1))
        curves = actions.double().unflatten(0, (POINTS, -1))  # (points, decisions, controls)
        still = policy.actor(_with(middle, i, values), policy.begin((POINTS,)))[0]
        quantiles = torch.quantile(curves, torch.tensor([BAND, 1 - BAND], dtype=torch.float64), dim=1)
        band_low, band_high = quantiles.numpy()
        found[name] = Response(
            name, values.double().numpy(), curves.mean(1).numpy(), band_low, band_high, still.double().numpy()
        )
    return found


def _with(observations: Tensor, i: int, values: Tensor) -> Tensor:
    """Observations (*batch, observations) with each of the values at place i, (values, *batch, observations)."""
    moved = observations.expand(len(values), *observations.shape).clone()
    moved[..., i] = values.view(-1, *[1] * (observations.dim() - 1))
    return moved
