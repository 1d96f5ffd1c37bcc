"""The report of a benchmark, from its `runs.jsonl` and nothing else: tables, pictures, and a log for TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from rlsched.experiments.benchmark import plots
from rlsched.experiments.benchmark.methods import POLICY
from rlsched.experiments.benchmark.results import REFERENCE, Condition, Results, Score
from rlsched.experiments.benchmark.statistics import MOST_SPEED_UP, Estimate
from rlsched.experiments.cell import Cell
from rlsched.experiments.table import TABLE, markdown, signed
from rlsched.files import write

HEAD = ["method", "lr", "cells", "log ratio", "95 %", "speed-up", "improves", "worst cell", "diverged", "accuracy"]
CAPTION = """\
Against cosine with its learning rate tuned per cell (task, optimizer, length). **Log ratio** of the final validation
loss, lower is better: median over the seeds, then interquartile mean over the cells; its interval is of the seeds
(stratified bootstrap). **lr** is the factor on the usual learning rate, which a policy's run has to live with; × 0.01
and × 100 are left out where the usual one is a recipe's, so that there are fewer cells. *Best of n* took n runs in each
cell, the others one. **Speed-up**: how many times sooner a run is where the reference ends, at most {most:g}; below 1
it never is, and the reference was where it ends after that part of its steps. **Improves**: the probability to end
lower than the reference.
**Accuracy**: mean difference in percentage points. A run that diverged (ended at the loss of its untrained network,
above it, or at no number) counts as that loss. {seeds} seeds."""
DIFFERENCES = """\
Difference of log losses, first less second, on equal weights and data: interquartile mean over the cells; its interval
is of the cells (paired bootstrap), and says what other tasks of this kind might show."""


def report(out: Path) -> str:
    """Write the table, the pictures and the log for TensorBoard beside the `runs.jsonl` in `out`; return the table.

    Raises:
        ValueError: there are no runs, or a line is none.
    """
    results = Results(out)
    text = "\n\n".join(
        part for part in (scores(results), differences(results), by_cell(results), notes(results)) if part
    )
    write(out / TABLE, f"{text}\n".encode())
    plots.pictures(results, out)
    plots.tensorboard(results, out / plots.TENSORBOARD)
    return text


def scores(results: Results) -> str:
    """A line for each condition, with a caption."""
    lines = []
    for contender in results.contenders:
        for condition in results.conditions(contender):
            if (score := results.score(condition)) is not None:
                label = results.label(contender)
                bold = "**" if contender.method == POLICY else ""
                lines.append([f"{bold}{label}{bold}", _factor(results, condition), *_shown(score)])
    seeds = sorted({len(runs) for by in results.runs.values() for f in by.values() for runs in f.values()})
    caption = CAPTION.format(most=MOST_SPEED_UP, seeds="/".join(map(str, seeds)))
    return f"{markdown(HEAD, lines, labels=2)}\n\n{caption}"


def differences(results: Results) -> str:
    """A line for each pair of policies and each base learning rate; nothing if there is one policy."""
    lines = []
    for first, second in combinations(results.policies(), 2):
        label = f"{results.label(first)} − {results.label(second)}"
        factors = [condition.factor for condition in results.conditions(first)]
        for name, some in [*((f"× {factor:g}", [factor]) for factor in factors), ("mean of them", factors)]:
            if found := results.difference(first, second, some):
                lines.append([label, name, str(found[0]), *_estimate(found[1])])
    return f"{markdown(['policies', 'lr', 'cells', 'difference', '95 %'], lines, 2)}\n\n{DIFFERENCES}" if lines else ""


def by_cell(results: Results) -> str:
    """The reference in each cell, and the log ratios of the policies."""
    conditions = [condition for policy in results.policies() for condition in results.conditions(policy)]
    several = len(results.policies()) > 1
    head = [f"{results.label(c.contender) + ' ' if several else ''}× {c.factor:g}" for c in conditions]
    lines = []
    for cell in results.runs:
        if reference := results.reference(cell):
            rows = list(reference.values())
            loss = np.median([math.inf if row["loss"] is None else row["loss"] for row in rows])
            best = f"× {results.best(cell, REFERENCE):.3g}"
            ratios = [_ratio(results.ratios(cell, condition)) for condition in conditions]
            lines.append([str(cell), f"{loss:.4g}", best, f"{rows[0]['chance']:.3g}", *ratios])
    table = markdown(["cell", "reference", "its lr", "chance", *head], lines)
    return f"{table}\n\nFinal loss of the reference, and log ratio to it (median over the seeds) of the policies."


def notes(results: Results) -> str:
    """What is to be known of the reference before the figures are believed."""
    lines = []
    for what, cells in (
        ("Reference no better than one answer to all", results.not_learnt()),
        ("Best learning rate of the reference at the edge of the sweep", results.at_the_edge()),
    ):
        lines.append(f"- {what}: {_listed(cells)}")
    return "\n".join(lines)


def _listed(cells: Sequence[Cell]) -> str:
    return f"{len(cells)} cells: {'; '.join(map(str, cells))}" if cells else "none"


def _factor(results: Results, condition: Condition) -> str:
    if not condition.is_tuned:
        return f"× {condition.factor:g}"
    return f"best of {max(len(results.tried(cell, condition.contender)) for cell in results.runs)}"


def _shown(score: Score) -> list[str]:
    ratio, worst = score.worst
    return [
        str(score.cells),
        *_estimate(score.ratio),
        f"{score.speed_up:.2f}",
        f"{score.improvement:.0%}",
        f"{signed(ratio)} ({worst})",
        f"{score.diverged} of {score.runs}",
        "–" if math.isnan(score.accuracy) else signed(score.accuracy, 1),
    ]


def _estimate(estimate: Estimate) -> list[str]:
    interval = "–" if math.isnan(estimate.low) else f"{signed(estimate.low)} to {signed(estimate.high)}"
    return [signed(estimate.value), interval]


def _ratio(ratios: Sequence[float]) -> str:
    return signed(float(np.median(ratios))) if ratios else ""
