"""A policy and its smaller kin: made, written, measured, and compared."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from rlsched.actors import Perceptron
from rlsched.agents.evaluation import evaluate
from rlsched.agents.explain.decisions import Decisions, of_episodes
from rlsched.envs.mixtures import mixture
from rlsched.experiments.compress.smaller import in_int8, pruned, student, tree
from rlsched.experiments.journal import Journal
from rlsched.experiments.table import TABLE, markdown, signed
from rlsched.files import locked, write
from rlsched.formats import described, onnx_model
from rlsched.onnx_policy import load_policy, sealed
from rlsched.policy import ONNX, SUFFIX, Policy, SchedulePolicy

DATA, RUNS = "compression.json", "runs.jsonl"
SCORED = 1_000_000  # seed of the first episode of a score
TAUGHT = 2_000_000  # of the episodes to teach from; each round has a range of its own
BATCHES = (1, 1_000)  # in which decisions are timed
POLICY, ZERO = "policy", "base schedule"


@dataclass(frozen=True)
class Plan:
    """How a policy is compressed."""

    tasks: str  # mixture of inner tasks
    episodes: int  # to score each in, and to teach from
    rounds: int  # of own runs of those that are taught
    seed: int


class Row(NamedTuple):
    """What one of them costs, and what it is worth."""

    name: str
    file: str  # "" for the base schedule
    size: int  # bytes
    microseconds: tuple[float, ...]  # of a call, for each of `BATCHES`
    score: float  # mean return
    lost: float  # mean of the policy's return less its own, in the same episodes
    error: float  # standard error of that


MAKERS: dict[str, Callable[[SchedulePolicy, Decisions, int], Any]] = {
    "pruned": pruned,
    "student": student,
    "tree": tree,
}
FILES = {  # of each kind
    POLICY: f"policy{SUFFIX}",
    "onnx": f"policy{ONNX}",
    "int8": f"int8{ONNX}",
    "pruned": f"pruned{SUFFIX}",
    "student": f"student{SUFFIX}",
    "tree": f"tree{ONNX}",
}


def compress(policy: SchedulePolicy, name: str, plan: Plan, out: Path) -> str:
    """Make, write and measure; returns the table. What is there of the same policy and plan is not made again.

    Raises:
        BlockingIOError, OSError: the folder is in use, or nothing can be written there.
        ValueError: there are no such tasks.
    """
    mixture(plan.tasks)  # there has to be one, before anything is made
    with locked(out):
        makes = Making(policy, plan, out)
        paths = {kind: makes.file(kind) for kind in FILES if kind != "pruned" or isinstance(policy.actor, Perceptron)}
        decide: dict[str, Policy] = {kind: load_policy(path) for kind, path in paths.items()}
        returns = {kind: makes.returns(kind, each) for kind, each in decide.items()}
        returns[ZERO] = makes.returns(ZERO, SchedulePolicy.zero(policy.base_schedule))
        times = latencies(decide)
        rows = []
        for kind, own in returns.items():
            lost = returns[POLICY] - own
            error = float(lost.std(ddof=1) / len(lost) ** 0.5) if len(lost) > 1 else 0.0
            path, took = paths.get(kind), times.get(kind, ())
            size = 0 if path is None else path.stat().st_size
            rows.append(Row(kind, FILES.get(kind, ""), size, took, float(own.mean()), float(lost.mean()), error))
        page = f"{_head(policy, name, plan)}\n\n{table(rows)}\n"
        data = {"policy": {"name": name, "sha256": policy.digest}, "plan": asdict(plan), "batches": BATCHES}
        data["rows"] = [row._asdict() for row in rows]
        write(out / DATA, json.dumps(data, indent=1, allow_nan=False).encode() + b"\n")
        write(out / TABLE, page.encode())
    return f"{page}\nfiles  {out}: {' '.join([*(path.name for path in paths.values()), TABLE, DATA])}"


class Making:
    """Makes what is not in the folder yet, and plays what was not played yet."""

    def __init__(self, policy: SchedulePolicy, plan: Plan, out: Path) -> None:
        self.policy, self.plan, self.out = policy, plan, out
        self._lessons: Decisions | None = None
        self._model: Any = None  # of the policy, in ONNX
        self._journal = Journal(out / RUNS, lambda row: (row["policy"], row["tasks"], row["episodes"]))

    def file(self, kind: str) -> Path:
        """The file of a kind."""
        path = self.out / FILES[kind]
        made = self._made_from(kind)
        if path.exists():
            there: Any = load_policy(path)
            if there.info.get("compressed") == made:
                return path
        if kind in MAKERS:
            smaller = self._taught(kind, made)
            return smaller.save(path) if path.suffix == SUFFIX else write(path, _onnx(smaller, onnx_model(smaller)))
        same = self.policy.with_actor(self.policy.actor, {**self.policy.info, "compressed": made})
        if kind == POLICY:
            return same.save(path)
        if self._model is None:
            self._model = onnx_model(same)
        is_int8 = kind == "int8"
        model, digest = (in_int8(self._model), "") if is_int8 else (self._model, same.digest)
        return write(path, _onnx(same, model, digest))

    def returns(self, kind: str, policy: Policy) -> NDArray[np.float64]:
        """Of the episodes that score, by this policy."""
        key = policy.digest, self.plan.tasks, self.plan.episodes
        if key not in self._journal:
            _say(f"{kind}: its score")
            played = evaluate(policy, self.plan.tasks, episodes=self.plan.episodes, seed=SCORED, show=True)
            row = dict(zip(("policy", "tasks", "episodes"), key, strict=True))
            self._journal.add({**row, "kind": kind, "returns": played.returns.tolist()})
        return np.array(self._journal.rows[key]["returns"])

    def _made_from(self, kind: str) -> dict[str, Any]:
        taught = asdict(self.plan) if kind in MAKERS else {}
        return {"of": self.policy.digest, "kind": kind, **taught}

    def _taught(self, kind: str, made: dict[str, Any]) -> SchedulePolicy:
        """A smaller policy by imitation, on the policy's runs and then on its own as well."""
        learn, lessons = MAKERS[kind], self._policys_own()
        for turn in range(self.plan.rounds + 1):
            _say(f"{kind}: taught on {len(lessons.actions):,} decisions")
            smaller = self.policy.with_actor(learn(self.policy, lessons, self.plan.seed), {"compressed": made})
            if turn < self.plan.rounds:
                lessons = _both(lessons, self._lesson(smaller, turn + 1))
        return smaller

    def _policys_own(self) -> Decisions:
        if self._lessons is None:
            self._lessons = self._lesson(self.policy, 0)
        return self._lessons

    def _lesson(self, plays: Policy, turn: int) -> Decisions:
        """What the policy decides in runs that another one leads."""
        _say("episodes to learn from")
        seed = TAUGHT + 10_000 * (self.plan.seed * 100 + turn)
        return of_episodes(
            self.policy, evaluate(plays, self.plan.tasks, episodes=self.plan.episodes, seed=seed, show=True)
        )


def latencies(policies: dict[str, Policy], seconds: float = 0.5) -> dict[str, tuple[float, ...]]:
    """Median microseconds of a call of `act`, in each of `BATCHES`. They take turns."""
    found: dict[str, tuple[float, ...]] = dict.fromkeys(policies, ())
    for batch in BATCHES:
        took: dict[str, list[float]] = {kind: [] for kind in policies}
        start = time.perf_counter()
        while time.perf_counter() - start < seconds * len(policies) or len(took[POLICY]) < 20:
            for kind, policy in policies.items():
                memory, seen = policy.begin((batch,)), torch.zeros(batch, len(policy.observations))
                before = time.perf_counter()
                policy.act(seen, memory)
                took[kind].append(time.perf_counter() - before)
        found = {kind: (*found[kind], 1e6 * statistics.median(took[kind])) for kind in policies}
    return found


def table(rows: list[Row]) -> str:
    """As Markdown."""
    head = ["", "file", "kB", *(f"µs for {batch:,}" for batch in BATCHES), "return", "lost"]
    cells = []
    for row in rows:
        times = [f"{took:,.0f}" for took in row.microseconds] or ["–"] * len(BATCHES)
        size = f"{row.size / 1000:.1f}" if row.size else "–"
        lost = "–" if row.name == POLICY else f"{signed(row.lost)} ± {row.error:.3f}"
        cells.append([row.name, f"`{row.file}`" if row.file else "–", size, *times, f"{row.score:.3f}", lost])
    return markdown(head, cells, labels=2)


def _head(policy: SchedulePolicy, name: str, plan: Plan) -> str:
    return (
        f"Of {name}, {policy!r}. Return: log of first over last validation loss, mean over the same {plan.episodes} "
        f"episodes of the mixture {plan.tasks}, which nobody was taught on; lost: what is missing to the policy, ± "
        f"standard error. Times: median of a call for one decision, and for {BATCHES[1]:,} at once, on one thread."
    )


def _onnx(policy: SchedulePolicy, model: Any, digest: str = "") -> bytes:
    return sealed(model.SerializeToString(), described(policy, digest), policy.info)


def _both(one: Decisions, other: Decisions) -> Decisions:
    """The decisions of two sets of runs, as far as imitation needs them: what was seen, and what was decided."""
    return one._replace(
        observations=torch.cat([one.observations, other.observations]), actions=torch.cat([one.actions, other.actions])
    )


def _say(what: str) -> None:
    print(what, file=sys.stderr)
