"""The figures of a decision, which TensorBoard and every other logger get. Every figure is an entry in `FIGURES`."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from rlsched import schedule
from rlsched.control import CONTROLS, LR
from rlsched.number import exp, log
from rlsched.signals import OBSERVATIONS

if TYPE_CHECKING:
    from torch import Tensor

    from rlsched.controller import Controller
    from rlsched.per_group import Decision
    from rlsched.policy import Policy
    from rlsched.summary import Summary


class Decided(NamedTuple):
    """What the formula of a figure may read: of a parameter group that has a state of its own, or of all of them."""

    window: Summary  # that the decision was made of
    expected: float  # running average of its log loss
    used: Mapping[str, float]  # hyperparameters from here on, by control
    proposed: Mapping[str, float]  # the same before bounds, and the answer to a divergence; of the policy's controls
    base_lr: float  # learning rate of the base schedule from here on
    law: float  # by which a learning rate is multiplied that is to be compared with it, as momentum has moved
    actions: Mapping[str, float]  # of the policy, by control
    seen: Mapping[str, float]  # observation
    distance: float  # of it from what the policy was trained on, over that at which its influence begins to fall
    influence: float  # what is left of an action, in [0, 1]
    threshold: float  # the gradient norm is clipped to this
    interventions: int  # so far


@dataclass(frozen=True)
class Figure:
    """One number of a decision, by the name that it has in every logger. Names sort by what is to be read first."""

    name: str
    meaning: str
    formula: Callable[[Decided], float]  # NaN where it is not known
    chart: str | None = None  # which it is drawn in, together with others
    of_run: bool = False  # whether it is one for all groups, under `per_group`


RATE, NORM = "learning rate", "gradient norm, before and after clipping"
POLICY_CHARTS = ACTIONS, TRUST, AGREEMENT = (
    "actions of the policy",
    "distance from what the policy was trained on, and its influence",
    "agreement of gradients",
)


def _mean_log(*fields: str) -> Callable[[Decided], float]:
    """The number whose mean logarithm these fields of the window add up to."""
    return lambda d: exp(sum(getattr(d.window, name) for name in fields))


def _of_control(name: str) -> list[Figure]:
    tag, what = {
        LR.name: ("rlsched/lr", RATE),
        "clip": ("rlsched_gradients/clip_multiple", "clip threshold, over the running average of the gradient norm"),
    }.get(name, (f"rlsched/{name}", name.replace("_", " ")))
    return [
        Figure(tag, f"{what}, in use from here on", lambda d: d.used[name], what, of_run=name == "clip"),
        Figure(
            f"rlsched_policy/proposed_{name}",
            f"`{tag}` as the policy alone would have it: before bounds, and the answer to a divergence",
            lambda d: d.proposed.get(name, math.nan),
            what,
        ),
        Figure(
            f"rlsched_policy/action_{name}",
            f"action on the {name} control, in [−1, 1]; 0 leaves it where it is",
            lambda d: d.actions.get(name, math.nan),
            ACTIONS,
        ),
    ]


def _of_observation(name: str) -> Figure:
    chart = AGREEMENT if name in ("grad_cosine", "momentum_cosine") else None
    return Figure(f"rlsched_seen/{name}", f"the observation `{name}`", lambda d: d.seen.get(name, math.nan), chart)


FIGURES: Mapping[str, Figure] = {
    figure.name: figure
    for figure in (
        Figure("rlsched/loss", "loss, geometric mean of the window", _mean_log("loss"), "loss", of_run=True),
        *_of_control(LR.name),
        Figure(
            "rlsched/lr_base_schedule",
            "learning rate of the base schedule from here on, without a policy",
            lambda d: d.base_lr,
            RATE,
        ),
        Figure(
            "rlsched/lr_log10_factor",
            "log10 of the factor on the base schedule's learning rate: 0 is the base schedule, 1 ten times it. Where "
            "momentum sums gradients, the learning rate counts as it would be at the base momentum",
            lambda d: log(d.used[LR.name] * d.law / d.base_lr) / math.log(10) if d.base_lr > 0 else math.nan,
            "learning rate over that of the base schedule, log10",
        ),
        Figure(
            "rlsched/loss_trend",
            "log of the loss over its running average of about ten windows; below 0 it falls",
            lambda d: d.window.loss - d.expected,
            "trend of the loss",
            of_run=True,
        ),
        *(figure for name in CONTROLS if name not in (LR.name, "clip") for figure in _of_control(name)),
        Figure(
            "rlsched/update_ratio",
            "norm of an update over that of the weights, geometric mean",
            _mean_log("update_ratio"),
            "size of updates, over the weights",
        ),
        Figure(
            "rlsched_gradients/norm",
            "gradient norm before clipping, geometric mean",
            _mean_log("grad_norm"),
            NORM,
            of_run=True,
        ),
        Figure(
            "rlsched_gradients/norm_clipped",
            "gradient norm after clipping, geometric mean",
            _mean_log("grad_norm", "clip_coefficient"),
            NORM,
            of_run=True,
        ),
        Figure(
            "rlsched/safety_interventions",
            "what was done to keep the run alive, so far",
            lambda d: d.interventions,
            "interventions so far",
            of_run=True,
        ),
        *_of_control("clip"),
        Figure(
            "rlsched_gradients/clip_threshold",
            "what the norm of the next gradient is clipped to",
            lambda d: d.threshold,
            "clip threshold",
            of_run=True,
        ),
        Figure(
            "rlsched_gradients/clipped",
            "share of the steps that were clipped",
            lambda d: d.window.clipped,
            "share of the steps that were clipped",
            of_run=True,
        ),
        Figure(
            "rlsched_policy/distance",
            "of the observation from those that the policy was trained on; above 1 its influence falls",
            lambda d: d.distance,
            TRUST,
        ),
        Figure(
            "rlsched_policy/influence",
            "what is left of an action there, in [0, 1]; actions are shown after it",
            lambda d: d.influence,
            TRUST,
        ),
        *map(_of_observation, OBSERVATIONS),
    )
}
# What is written to TensorBoard when it comes about, and not at a decision.
VALIDATION_LOSS, INTERVENTION = "rlsched/validation_loss", "rlsched/intervention"


def figures_of(
    run: Controller,
    windows: Sequence[Summary],
    whole: Summary,
    decisions: Sequence[Decision],
    base_lrs: Sequence[float],
    written: Collection[str],
) -> dict[str, float]:
    """The figures of a decision, by name, as far as they are known and finite.

    With `per_group` those of a group have its name behind their own: "rlsched/lr/head".

    Args:
        run: after the decision.
        windows: what was measured, of each group that has a state of its own.
        whole: the same of the whole network.
        decisions: of the same groups.
        base_lrs: of the same groups, learning rates of the base schedule.
        written: controls whose values are set in the groups.
    """
    parts = zip(windows, decisions, base_lrs, strict=True)
    decided = [_decided(run, i, *each, written) for i, each in enumerate(parts)]
    names = [f"/{name}" for name in run.groups.names] if run.options.per_group else [""]
    figures: dict[str, float] = {}
    for name, figure in FIGURES.items():
        if figure.of_run:
            figures[name] = figure.formula(decided[0]._replace(window=whole))
        else:
            figures |= {f"{name}{group}": figure.formula(each) for group, each in zip(names, decided, strict=True)}
    return {name: float(value) for name, value in figures.items() if math.isfinite(value)}


def _decided(
    run: Controller, i: int, window: Summary, decision: Decision, base_lr: float, written: Collection[str]
) -> Decided:
    groups, policy = run.groups, run.policy
    used = groups.in_use(i, base_lr, written)
    wanted = schedule.hyperparameters(run.run, decision.state, {**groups.bases[i], LR.name: base_lr})
    distance, influence = _trust(policy, decision.observation)
    return Decided(
        window=window,
        expected=decision.state.history["slow_loss"],
        used=used,
        proposed={name: wanted[name] for name in policy.controls},
        base_lr=base_lr,
        law=groups.law(i, used["momentum"]),
        actions=decision.actions,
        seen=dict(zip(policy.observations, decision.observation.tolist(), strict=True)),
        distance=distance,
        influence=influence,
        threshold=run.meter.threshold(groups.clip),
        interventions=len(run.guard.state.interventions),
    )


def _trust(policy: Policy, observation: Tensor) -> tuple[float, float]:
    """How far an observation is from what a policy was trained on, and how far that is trusted there."""
    domain: Any = getattr(policy, "domain", None)
    distance = math.nan if domain is None else float(domain.distance(observation) / domain.limit)
    return distance, float(policy.influence(observation)) if hasattr(policy, "influence") else math.nan


def figure_table(figures: Iterable[Figure]) -> str:
    """Figures as a Markdown table, sorted as loggers sort them, for documentation."""
    rows = [f"| `{f.name}` | {f.meaning} |" for f in sorted(figures, key=lambda figure: figure.name)]
    return "\n".join(["| figure | what it is |", "|---|---|", *rows])
