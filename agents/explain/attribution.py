"""What each action owes to each observation, by integrated gradients (Sundararajan et al. 2017)."""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np
import torch
from captum.attr import IntegratedGradients
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from rlsched.agents.explain.decisions import Decisions
from rlsched.policy import SchedulePolicy

MEMORY = "memory"  # what is owed to all that the policy remembers
# On the way from the baseline, at which gradients are taken: more of them for decisions whose sums are off by more than
# EXACT, as they are where the way goes over the kinks of a ReLU.
POINTS, EXACT = (32, 128, 512), 5e-3
AT_ONCE = 256  # decisions in a batch


class Attribution(NamedTuple):
    """What the actions owe to each feature: how far it raises them on the way from the baseline to what was seen.

    For every decision and control the values sum to the action minus that at the baseline.
    """

    features: tuple[str, ...]  # the observations, and `MEMORY` where the policy remembers
    values: NDArray[np.float64]  # (n, controls, features)
    baseline: NDArray[np.float64]  # (observations,)
    baseline_action: NDArray[np.float64]  # (controls,)
    error: float  # by which the sums are off at most: what numerical integration misses


def typical(policy: SchedulePolicy, decisions: Decisions) -> Tensor:
    """A typical observation, (observations,): the mean of the policy's training, or else that of the decisions."""
    return decisions.observations.mean(0) if policy.domain is None else policy.domain.mean


def attribute(policy: SchedulePolicy, decisions: Decisions, *, show: bool = False) -> Attribution:
    """Integrated gradients of the actions, from the typical observation (and an empty memory) to what was seen.

    Args:
        policy: that decided.
        decisions: n of them.
        show: a progress bar.
    """
    actor = copy.deepcopy(policy.actor).double()  # sums of the values are to be exact

    def actions(*inputs: Tensor) -> Tensor:
        found: Tensor = actor(*inputs)[0]
        return found

    baseline = typical(policy, decisions)
    inputs = [decisions.observations.double()]
    baselines = [baseline.double().unsqueeze(0)]
    if decisions.memory is not None:
        inputs.append(decisions.memory.double())
        baselines.append(policy.begin().double().unsqueeze(0))
    gradients = IntegratedGradients(actions)

    def owed_by(control: int, part: tuple[Tensor, ...], points: int) -> Tensor:
        seen, *remembered = gradients.attribute(
            part, tuple(baselines), target=control, n_steps=points, method="gausslegendre"
        )
        return torch.cat([seen, *(memory.sum(-1, keepdim=True) for memory in remembered)], -1).detach()

    controls = range(len(policy.controls))
    at_baseline = actions(*baselines)[0]
    owed = torch.zeros(len(inputs[0]), len(controls), len(policy.observations) + len(inputs) - 1, dtype=torch.float64)
    off = torch.full((len(owed),), torch.inf)
    for start in tqdm(range(0, len(owed), AT_ONCE), desc="attribution", unit="part", leave=False, disable=not show):
        rows = torch.arange(start, min(start + AT_ONCE, len(owed)))
        for points in POINTS:
            part = tuple(x[rows] for x in inputs)
            owed[rows] = torch.stack([owed_by(control, part, points) for control in controls], 1)
            off[rows] = (owed[rows].sum(-1) - (actions(*part) - at_baseline)).abs().amax(1).float()
            rows = rows[off[rows] > EXACT]
            if not len(rows):
                break
    remembered = () if decisions.memory is None else (MEMORY,)
    return Attribution(
        (*policy.observations, *remembered),
        owed.numpy(),
        baseline.double().numpy(),
        at_baseline.numpy(),
        float(off.max()),
    )


def importance(attribution: Attribution) -> NDArray[np.float64]:
    """Mean size of what the actions owe to each feature, (controls, features)."""
    return np.abs(attribution.values).mean(0)


def importance_over_run(
    attribution: Attribution, progress: NDArray[np.float64], parts: int = 10
) -> NDArray[np.float64]:
    """The same in each of equal parts of a run, (parts, controls, features); NaN where nothing was decided."""
    part = np.minimum((progress * parts).astype(int), parts - 1)
    sizes = np.abs(attribution.values)
    empty = np.full(sizes.shape[1:], np.nan)
    return np.stack([sizes[part == i].mean(0) if (part == i).any() else empty for i in range(parts)])
