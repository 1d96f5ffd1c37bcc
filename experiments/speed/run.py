"""Measures what a plan asks for, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rlsched.experiments.journal import Journal, Row
from rlsched.experiments.speed import measure
from rlsched.experiments.speed.plan import Measurement, Perceptron, Plan
from rlsched.files import locked

RESULTS = "results.jsonl"


def run(plan: Plan, out: Path) -> None:
    """Measure what `out/results.jsonl` does not have yet, and add a line for each."""
    groups = plan.groups()
    with ExitStack() as stack:
        stack.enter_context(locked(out))
        journal = Journal(out / RESULTS, key)
        asked = sum(1 + m.rounds for m in {m for group in groups for m in group if m not in journal})
        cache = stack.enter_context(tempfile.TemporaryDirectory())
        bar = stack.enter_context(tqdm(total=asked, desc="measuring", unit="round"))
        for group in groups:
            missing = [m for m in group if m not in journal]
            for m, row in _measure(missing, cache, bar) if missing else ():
                journal.add({"measurement": asdict(m), **row})


def key(row: Row) -> Measurement:
    """What a row is the result of: facts and rounds of a measurement."""
    return _measurement(**row["measurement"])


def _measure(group: Sequence[Measurement], cache: str, bar: Any) -> Iterator[tuple[Measurement, Row]]:
    """Warm up one measurement after the other; then each has its first round, each its second, and so on."""
    context = multiprocessing.get_context("forkserver")  # a fresh process, without the seconds of these imports
    context.set_forkserver_preload([measure.__name__, "torch._dynamo"])
    with ExitStack() as stack:
        pools = [stack.enter_context(ProcessPoolExecutor(1, mp_context=context)) for _ in group]

        def answer(i: int, *question: Any) -> Row | None:
            bar.set_postfix_str(f"{group[i].kind} {group[i].task} × {group[i].size}")
            result: Row | None = pools[i].submit(*question).result()
            bar.update()
            return result

        facts = [answer(i, measure.begin, m, cache) for i, m in enumerate(group)]
        rounds = [[answer(i, measure.proceed) for i in range(len(group))] for _ in range(max(m.rounds for m in group))]
    for i, m in enumerate(group):
        yield m, {"facts": facts[i], "rounds": [each[i] for each in rounds if each[i] is not None]}


def _measurement(task: dict[str, int] | str, **options: Any) -> Measurement:
    return Measurement(task=task if isinstance(task, str) else Perceptron(**task), **options)
