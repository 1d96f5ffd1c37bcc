"""The decisions that are to be explained, from episodes that were played or from the runs of a user."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlsched.agents.evaluation import Evaluation
from rlsched.decisions import NAME, Recorded, read
from rlsched.policy import SchedulePolicy

SAME = 1e-4  # actions that differ by less are the same, computed on two machines


class Course(NamedTuple):
    """The decisions of a run, one after the other, from its first."""

    name: str
    run: int  # the same for the parameter groups of one run
    observations: Tensor  # (decisions, observations)
    steps: NDArray[np.int64]  # (decisions,): inner steps done
    progress: NDArray[np.float64]  # (decisions,): fraction of the run that is done, in [0, 1]


class Decisions(NamedTuple):
    """The decisions of n moments in all, those of a course one after the other."""

    courses: tuple[str, ...]  # their names
    course: NDArray[np.int64]  # (n,): which of them
    run: NDArray[np.int64]  # (n,): which run; several courses may be of one
    steps: NDArray[np.int64]  # (n,): inner steps done
    progress: NDArray[np.float64]  # (n,): fraction of the run that is done, in [0, 1]
    observations: Tensor  # (n, observations)
    memory: Tensor | None  # (n, size): what the policy remembered, where it does
    actions: Tensor  # (n, controls): before they are clipped and scaled by the influence
    influence: Tensor  # (n,), in [0, 1]

    @property
    def applied(self) -> Tensor:
        """The actions as they moved the controls, (n, controls)."""
        return self.actions.clamp(-1, 1) * self.influence.unsqueeze(-1)


@torch.no_grad()
def decided(policy: SchedulePolicy, courses: Sequence[Course]) -> Decisions:
    """What the policy decided in each course, and what it remembered there.

    Raises:
        ValueError: there are no decisions, or what the policy remembers is no tensor.
    """
    if not sum(len(course.steps) for course in courses):
        raise ValueError("there are no decisions to explain")
    memories, actions = [], []
    for course in courses:
        memory = policy.begin()
        if memory is None:
            actions.append(policy.actor(course.observations)[0])
            continue
        if not isinstance(memory, Tensor):
            raise ValueError(
                f"a policy can be explained that remembers nothing or a tensor, this one {type(memory).__name__}"
            )
        for observation in course.observations:
            memories.append(memory)
            action, memory = policy.actor(observation, memory)
            actions.append(action.unsqueeze(0))
    observations = torch.cat([course.observations for course in courses])
    influence = policy.influence(observations)
    counts = [len(course.steps) for course in courses]
    return Decisions(
        courses=tuple(course.name for course in courses),
        course=np.repeat(np.arange(len(courses)), counts),
        run=np.repeat([course.run for course in courses], counts),
        steps=np.concatenate([course.steps for course in courses]),
        progress=np.concatenate([course.progress for course in courses]),
        observations=observations,
        memory=torch.stack(memories) if memories else None,
        actions=torch.cat(actions),
        influence=torch.as_tensor(influence),
    )


def of_episodes(policy: SchedulePolicy, evaluation: Evaluation) -> Decisions:
    """The decisions in the episodes of an evaluation of this policy."""
    courses = []
    for episode in range(len(evaluation.returns)):
        done = evaluation.paths["inner_steps"][episode]  # after each window; the first decision follows the first step
        steps = np.concatenate([[1], done[:-1]])
        observations = torch.from_numpy(evaluation.observations[evaluation.episodes == episode])
        progress = steps / evaluation.paths["total_steps"][episode]
        courses.append(Course(f"episode {episode}", episode, observations, steps.astype(np.int64), progress))
    return decided(policy, courses)


def of_runs(policy: SchedulePolicy, folders: Sequence[str | Path]) -> Decisions:
    """The decisions of runs under this policy, from their `log_dir`.

    Raises:
        FileNotFoundError, ValueError: see `rlsched.decisions.read`; or a run was another policy's, or does not show its
            beginning, which a policy that remembers needs.
    """
    courses = []
    recorded: list[Recorded] = []
    for number, folder in enumerate(folders):
        run = read(folder)
        if run.policy != policy.digest:
            raise ValueError(
                f"{folder} is a run of another policy, sha256={run.policy[:12]}; the one to explain has "
                f"sha256={policy.digest[:12]}"
            )
        for group, all_decisions in run.groups.items():
            decisions = [each for each in all_decisions if each.influence > 0]  # 0: the server of the policy was gone
            recorded += decisions
            name = f"{folder}, {group}" if group else str(folder)
            steps = np.array([decision.step for decision in decisions])
            progress = steps / np.array([decision.total_steps for decision in decisions])
            courses.append(Course(name, number, _observations(policy, folder, decisions), steps, progress))
    found = decided(policy, courses)
    answered = torch.tensor([[each.action[name] for name in policy.controls] for each in recorded])
    off = (found.applied - answered).abs().amax(1).nan_to_num(nan=torch.inf)
    if (off > SAME).any():
        first = int((off > SAME).nonzero()[0])
        place = f"{found.courses[found.course[first]]}: at step {found.steps[first]}"
        if found.memory is not None:
            raise ValueError(f"{place} the policy remembered what {NAME} does not show: it lacks the run's beginning")
        raise ValueError(f"{place} the policy would have decided otherwise than {NAME} says: it was altered")
    return found


def _observations(policy: SchedulePolicy, folder: str | Path, decisions: Sequence[Recorded]) -> Tensor:
    for decision in decisions:
        for what, names, there in (
            ("observations", policy.observations, decision.observation),
            ("controls", policy.controls, decision.action),
        ):
            if there.keys() != set(names):
                raise ValueError(f"{folder}: at step {decision.step} {NAME} has other {what} than the policy: {names}")
    return torch.tensor([[each.observation[name] for name in policy.observations] for each in decisions])
