"""What a run decided, and on what it saw: a file of JSON lines beside its TensorBoard log, for who asks why later.

A line with `HEAD` says what the decisions below it have in common; each of the others is a `Recorded`. The file is
added to at every decision, so that it is as long as the run has come. A run that is resumed goes on in it; what it then
decides anew counts, and not what it had decided from there on before. So does a new run in the same folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlsched.files import append, end_last_line, make_folder, whole_lines
from rlsched.number import exp

if TYPE_CHECKING:
    from rlsched.controller import Controller
    from rlsched.per_group import Decision
    from rlsched.summary import Summary

NAME = "decisions.jsonl"
VERSION = 1  # of the file; raised when a field changes its meaning
HEAD = ("rlsched_decisions", "policy")  # keys of a first line: the version, and the digest of what decided
MARK = b'{"rlsched_decisions"'  # how a file begins


class Recorded(NamedTuple):
    """A decision of one parameter group, or of all."""

    step: int  # inner steps done
    total_steps: int  # in the run, as the policy saw it
    group: str  # name of the parameter group; "" where all of them have one state
    loss: float  # geometric mean of the window; NaN where it is not known
    observation: dict[str, float]  # what the policy saw
    action: dict[str, float]  # what it answered, in [−1, 1], its influence included; by control
    influence: float  # how far it is trusted there, in [0, 1]
    proposed: dict[str, float]  # the hyperparameters that this led to, by control


class RecordedRun(NamedTuple):
    """All decisions of a run, in their order."""

    policy: str  # digest of what decided
    groups: dict[str, list[Recorded]]  # by the names of the groups


class DecisionLog:
    """The file of a run that goes on.

    Args:
        folder: where it is; it is made with the first decision.

    Raises:
        ValueError: another file has its name there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / NAME
        self._has_begun = False
        if self.path.exists():
            with self.path.open("rb") as file:
                start = file.read(len(MARK))
            if not MARK.startswith(start):
                raise ValueError(f"log_dir: {self.path} is not a file of decisions of a scheduled run: move it away")

    def add(self, run: Controller, window: Summary, decisions: Sequence[Decision]) -> None:
        """Write down what was decided at one step; see `rows` for the arguments.

        Raises:
            OSError: it cannot be written; the file is as it was.
        """
        self.write(run.policy.digest, rows(run, window, decisions))

    def write(self, policy: str, decisions: Sequence[Mapping[str, Any]]) -> None:
        """Write down decisions as `rows` has them, of the policy with this digest.

        Raises:
            OSError: it cannot be written; the file is as it was.
        """
        lines = [*([] if self._has_begun else [dict(zip(HEAD, (VERSION, policy), strict=True))]), *decisions]
        if not self._has_begun:
            make_folder(self.path.parent)
            end_last_line(self.path)
        append(self.path, b"".join(json.dumps(line, allow_nan=False).encode() + b"\n" for line in lines))
        self._has_begun = True

    def close(self) -> None:
        """The run is over: the file has all of it already."""


def rows(run: Controller, window: Summary, decisions: Sequence[Decision]) -> list[dict[str, Any]]:
    """What was decided at one step, as JSON has it: a `Recorded` for each group, or for all.

    Args:
        run: the controller, after the decision.
        window: what was measured.
        decisions: of each group, or of all.
    """
    policy, loss, steps = run.policy, exp(window.loss), (run.step_count, run.run.total_steps)
    names = run.groups.names if run.options.per_group else [""]
    told = []
    for name, (seen, actions, _), proposed in zip(names, decisions, run.proposals, strict=True):
        observation = dict(zip(policy.observations, seen.tolist(), strict=True))
        influence = float(policy.influence(seen)) if hasattr(policy, "influence") else 1.0
        told.append(_row(Recorded(*steps, name, loss, observation, actions, influence, proposed)))
    return told


def read(folder: str | Path) -> RecordedRun:
    """The decisions of the run that has, or had, this `log_dir`.

    A last line that was cut off as it was written is left out, with a warning.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no decisions, or those of another version, or of several policies; a line is no decision.
        OSError: the file cannot be read.
    """
    path = Path(folder) / NAME
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder")
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {NAME}: it must be the log_dir of a scheduled run, which has that file from its first "
            "decision on"
        )
    groups: dict[str, list[tuple[Recorded, str]]] = {}
    policy, last = None, math.inf  # the last step
    for number, line in whole_lines(path):
        try:
            row = _object(line)
            if HEAD[0] in row:
                version, policy = (row[key] for key in HEAD)
                if version != VERSION:
                    raise _OtherVersionError(version)
                last = math.inf
                continue
            if policy is None:
                raise ValueError("no line before it says of which policy")
            decision = decision_of(row)
        except _OtherVersionError as error:
            raise ValueError(
                f"{path} is of version {error} of this file, this rlsched reads version {VERSION}: use the rlsched "
                "that the run was made with"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}, is no decision of a scheduled run: {error}") from None
        own = groups.setdefault(decision.group, [])
        if decision.step < last or (own and own[-1][0].step == decision.step):  # gone back, or another run
            for decisions in groups.values():
                decisions[:] = [each for each in decisions if each[0].step < decision.step]
        own.append((decision, policy))
        last = decision.step
    groups = {name: decisions for name, decisions in groups.items() if decisions}
    policies = {by for decisions in groups.values() for _, by in decisions}
    if not policies:
        raise ValueError(f"{path} holds no decision yet")
    if len(policies) > 1:
        shown = " and ".join(sorted(digest[:12] for digest in policies))
        raise ValueError(f"{path} holds decisions of several policies, sha256={shown}: they are of different runs")
    return RecordedRun(policies.pop(), {name: [d for d, _ in decisions] for name, decisions in groups.items()})


def decision_of(row: Mapping[str, Any]) -> Recorded:
    """A decision as `rows` has it.

    Raises:
        ValueError, TypeError, AttributeError: it is none.
    """
    if row.keys() != set(Recorded._fields):
        raise ValueError(f"it must have {Recorded._fields}, it has {tuple(row)}")
    step, total_steps, group = row["step"], row["total_steps"], row["group"]
    if not (isinstance(step, int) and isinstance(total_steps, int) and 0 <= step <= total_steps > 0):
        raise ValueError(f"step must be a number of steps, at most total_steps, got {step!r} of {total_steps!r}")
    if not isinstance(group, str):
        raise ValueError(f"group must be a name, got {group!r}")
    observation, action, proposed = (
        {name: _number(value) for name, value in row[key].items()} for key in ("observation", "action", "proposed")
    )
    loss, influence = _number(row["loss"]), _number(row["influence"])
    return Recorded(step, total_steps, group, loss, observation, action, influence, proposed)


class _OtherVersionError(Exception):
    """A head of another version."""


def _row(decision: Recorded) -> dict[str, Any]:
    return {key: _shown(value) for key, value in decision._asdict().items()}


def _shown(value: Any) -> Any:
    """As JSON has it, in as many digits as single precision has; None for what is not finite."""
    if isinstance(value, Mapping):
        return {key: _shown(each) for key, each in value.items()}
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else None
    return value


def _object(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    if not isinstance(row, dict):
        raise ValueError(f"it must be an object, got {type(row).__name__}")
    return row


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
