"""What policies decided in runs, and why, as far as they can be found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rlsched.experiments.report.blocks import (
    DASHED,
    DOTTED,
    GRAY,
    PALETTE,
    Array,
    Chart,
    Heat,
    Line,
    Panel,
    Picture,
    Section,
    Text,
    colors,
    file_name,
)
from rlsched.experiments.report.scheduled import Decided, ScheduledRun
from rlsched.policy import SchedulePolicy

if TYPE_CHECKING:
    from rlsched.experiments.explain.explanation import Explanation

TOP = 12  # of the features of an attribution, that are shown
BEFORE, TYPICAL = "before clipping", "at a typical observation"
ACTIONS = "An action moves its control: 0 leaves it where it is, ±1 moves it as fast as it goes."
NOTE = f"""\
{ACTIONS} Below is what it owes to each observation, by integrated gradients: red raises the action, blue lowers it. \
All of a column add up to the action before it is clipped to ±1, less that at a typical observation. Of the \
observations the {TOP} that matter most in this run are shown; pointing at an action tells what was seen, and the part \
that it had."""


class Known(NamedTuple):
    """A policy that may have decided in runs."""

    name: str
    policy: SchedulePolicy


def sections(runs: Mapping[str, ScheduledRun], policies: Mapping[str, Known], *, show: bool = False) -> list[Section]:
    """The decisions of each run, and what there is to say of each policy.

    Args:
        runs: by their names.
        policies: those that are known, by their digests.
        show: a progress bar.
    """
    by_policy: dict[str | None, dict[str, ScheduledRun]] = {}
    for name, run in runs.items():
        by_policy.setdefault(run.digest, {})[name] = run
    found = []
    for digest, own in by_policy.items():
        explained, why_not = _explained(own, digest, policies, show)
        course = 0
        for name, run in own.items():
            charts = []
            for decided in run.decided():
                called = f"{name}, {decided.group}" if decided.group else name
                place = file_name(f"decisions-{called}")
                if explained is None:
                    charts.append(Chart(place, f"Decisions of {called}", [_actions(decided)], f"{ACTIONS} {why_not}"))
                else:
                    charts.append(Chart(place, f"Decisions of {called}", [*_panels(explained, course)], NOTE))
                course += 1
            found.append(Section(f"Decisions of {name}", charts or [Text("They were not logged.")]))
        if explained is not None:
            found.append(_of_policy(explained))
    return found


def _explained(
    runs: Mapping[str, ScheduledRun], digest: str | None, policies: Mapping[str, Known], show: bool
) -> tuple[Explanation | None, str]:
    """The explanation of runs under one policy, or why there is none."""
    if digest is None:
        return None, (
            "They are not explained: that needs the file of decisions that a run with `log_dir=` leaves, "
            "and this run has none."
        )
    if digest not in policies:
        return None, (
            f"They are not explained: the policy, sha256={digest[:12]}, is not one that is shipped. "
            "`--policy FILE` shows where it is."
        )
    try:
        from rlsched.agents.explain.decisions import of_runs
        from rlsched.experiments.explain.explanation import explanation
    except ModuleNotFoundError as error:
        return None, f"They are not explained: that needs {error.name}, `pip install 'rlsched[analysis]'`."
    name, policy = policies[digest]
    try:
        decisions = of_runs(policy, [run.folder for run in runs.values()])
    except ValueError as error:  # what was recorded is not what this policy decides
        return None, f"They are not explained: {error}."
    return explanation(policy, name, decisions, f"of {', '.join(runs)}", show=show), ""


def _actions(decided: Decided) -> Panel:
    """The actions of all controls; each point tells what was seen."""
    lines = [
        Line(name, decided.steps, values, color, holds=True, has_marks=True, details=decided.seen)
        for (name, values), color in zip(decided.actions.items(), colors(len(decided.actions)), strict=True)
    ]
    return Panel("action", lines)


def _panels(explained: Explanation, course: int) -> Iterator[Panel | Heat]:
    """The action of each control, and below it what that owes to each observation."""
    decisions, attribution = explained.decisions, explained.attribution
    here = decisions.course == course
    steps, seen = decisions.steps[here].astype(float), decisions.observations[here].double().numpy()
    last = steps[-1] - steps[-2] if len(steps) > 1 else 1.0
    edges = np.append(steps, steps[-1] + last)
    for i, control in enumerate(explained.policy.controls):
        owed = attribution.values[here][:, i]  # (n, features)
        order = [int(k) for k in np.argsort(-np.abs(owed).mean(0), kind="stable")[:TOP]]
        names = [attribution.features[k] for k in order]
        typical = float(attribution.baseline_action[i])
        before = _numbers(decisions.actions[here, i])
        details: dict[str, Array] = {BEFORE: before, TYPICAL: np.full(len(steps), typical)}
        for k, name in zip(order, names, strict=True):
            own = owed[:, k]
            details[name] = np.stack([seen[:, k], own], 1) if k < seen.shape[1] else own
        if len(order) < owed.shape[1]:
            details["all others"] = np.delete(owed, order, 1).sum(1)
        yield Panel(
            f"{control}: action",
            [
                Line("as it moved the control", steps, _numbers(decisions.applied[here, i]), PALETTE[0], holds=True,
                     has_marks=True, details=details),
                Line(BEFORE, steps, before, PALETTE[1], DASHED, holds=True),
                Line(TYPICAL, edges[[0, -1]], np.full(2, typical), GRAY, DOTTED),
            ],
            height=150,
        )  # fmt: skip
        yield Heat(f"{control}: what the action owes to each observation", edges, names, owed[:, order].T)


def _numbers(values: object) -> Array:
    return np.asarray(values, dtype=np.float64)


def _of_policy(explained: Explanation) -> Section:
    """The story of a policy in these runs, and the pictures that go with it."""
    pictures = [
        Picture(file_name(f"{explained.name}-{name}"), name.replace("-", " of ", 1), figure, is_folded=number > 0)
        for number, (name, figure) in enumerate(explained.figures(courses=0))
    ]
    blocks: Sequence[Text | Picture] = [Text(f"```\n{explained.story()}\n```"), *pictures]
    return Section(f"Why {explained.name} decides so", blocks)
