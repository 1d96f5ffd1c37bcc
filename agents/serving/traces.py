"""What runs report of their decisions, kept in a folder of bounded size."""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlsched.decisions import NAME, DecisionLog, decision_of
from rlsched.policy import Policy

_log = logging.getLogger("rlsched")

JOB = re.compile(r"[0-9a-f]{32}")  # what a client calls a run; nothing else becomes the name of a folder
PART = 10  # of the bound, that one run may have


class Traces:
    """A folder for each run, with the file of its decisions that `rlsched explain --run` reads.

    Where they come to more than `limit`, the runs that have not reported for longest go, each as a whole.

    Args:
        folder: of the folders; one server has it for itself.
        limit: bytes of all files.
        policy: whose decisions these are; reports of others are dropped.

    Attributes:
        kept, dropped: reports so far. Those are dropped that are none, and those of a run that has a tenth of `limit`.
    """

    def __init__(self, folder: Path, limit: int, policy: Policy) -> None:
        self.folder, self.limit, self.policy = folder, limit, policy
        self.kept = self.dropped = 0
        found = [path for path in folder.glob(f"*/{NAME}") if JOB.fullmatch(path.parent.name)]
        found.sort(key=lambda path: path.stat().st_mtime)
        self._sizes = OrderedDict((path.parent.name, path.stat().st_size) for path in found)  # the oldest first
        self._logs: dict[str, DecisionLog] = {}

    def add(self, reports: Sequence[Any]) -> None:
        """Keep reports: {"job": …, "decision": a `rlsched.decisions.Recorded`} each. A full disk is told in the log."""
        by_job: dict[str, list[dict[str, Any]]] = {}
        for report in reports:
            if self._is_one(report):
                by_job.setdefault(report["job"], []).append(report["decision"])
        told = sum(map(len, by_job.values()))
        self.dropped += len(reports) - told
        for job, decisions in by_job.items():
            if self._sizes.get(job, 0) >= self.limit // PART:
                self.dropped += len(decisions)
                continue
            try:
                log = self._logs[job] = self._logs.get(job) or DecisionLog(self.folder / job)
                log.write(self.policy.digest, decisions)
                self._sizes[job] = log.path.stat().st_size
            except (OSError, ValueError) as error:
                self.dropped += len(decisions)
                _log.warning("a trace cannot be kept: %s", error)
                continue
            self._sizes.move_to_end(job)
            self.kept += len(decisions)
        while sum(self._sizes.values()) > self.limit:
            job, _ = self._sizes.popitem(last=False)
            self._logs.pop(job, None)
            with suppress(OSError):
                (self.folder / job / NAME).unlink()
                (self.folder / job).rmdir()

    def _is_one(self, report: Any) -> bool:
        try:
            if not JOB.fullmatch(report["job"]):
                return False
            decision = decision_of(report["decision"])
        except (TypeError, ValueError, KeyError, AttributeError):
            return False
        observations, controls = set(self.policy.observations), set(self.policy.controls)
        return decision.observation.keys() == observations and decision.action.keys() == controls
