"""A comparison or a benchmark: what `rlsched compare` and `rlsched benchmark` have left in `runs.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rlsched.experiments.benchmark import analysis as benchmark_analysis
from rlsched.experiments.benchmark import plots
from rlsched.experiments.benchmark.results import Results as Benchmark
from rlsched.experiments.cell import Cell
from rlsched.experiments.compare import analysis
from rlsched.experiments.compare.analysis import Results as Comparison
from rlsched.experiments.compare.run import RUNS
from rlsched.experiments.report.blocks import (
    DASHED,
    DOTTED,
    SOLID,
    Chart,
    Line,
    Panel,
    Picture,
    Section,
    Text,
    file_name,
)
from rlsched.experiments.report.events import noted
from rlsched.files import whole_lines

STYLES = (DASHED, SOLID, DOTTED)  # of the base learning rates of a policy, from the lowest
LOSS, LR = 1, 3  # columns of a comparison's curves


class Study(NamedTuple):
    """The results of a study."""

    folder: Path
    results: Comparison | Benchmark
    notes: list[str]  # what is to be known of how it could be read


def is_here(folder: Path) -> bool:
    return (folder / RUNS).is_file()


def read(folder: Path) -> Study:
    """The study in this folder.

    Raises:
        ValueError: it is no comparison or benchmark, or has no runs yet; a line is none of its runs.
        OSError: it cannot be read.
    """
    path = folder / RUNS
    (kind, lines), _ = noted(lambda: _kind(path))
    if not lines:
        raise ValueError(f"{path} has no runs yet")
    if kind is None:
        raise ValueError(f"{path} has runs of neither a comparison nor a benchmark of rlsched")
    results, notes = noted(lambda: kind(folder))
    return Study(folder, results, notes)


def _kind(path: Path) -> tuple[type[Comparison] | type[Benchmark] | None, int]:
    """What a file has the runs of, by its first line, and whether there is a line."""
    for _, line in whole_lines(path):
        try:
            run = json.loads(line)["run"]
            return (Benchmark if "method" in run else Comparison if "schedule" in run else None), 1
        except (ValueError, KeyError, TypeError, RecursionError):
            return None, 1
    return None, 0


def section(name: str, study: Study) -> Section:
    if isinstance(study.results, Comparison):
        return Section(f"Comparison {name}", [Text(analysis.table(study.results)), *_comparison(name, study.results)])
    return Section(f"Benchmark {name}", [*_benchmark(name, study.results)])


def _comparison(name: str, results: Comparison) -> Iterator[Chart]:
    for setting in results.runs:
        losses, rates = [], []
        for method in results.methods():
            if not (rows := results.of(method, setting)):
                continue
            curves = np.array([row["curve"] for row in rows], dtype=float)  # (seeds, evaluations, columns)
            factors = sorted(results.runs[setting][method.contender])
            at = factors.index(method.factor) if method.factor in factors else 1
            dash = STYLES[at] if len(factors) == len(STYLES) and method.factor is not None else SOLID
            shown = results.best(setting, method.contender) if method.factor is None else method.factor
            best = "best, " if method.factor is None else ""
            label = f"{results.label(method.contender)}, {best}lr × {shown:.3g}"
            style = (label, curves[0, :, 0]), (results.color(method.contender), dash)
            losses.append(Line(*style[0], analysis.geometric_mean(curves[:, :, LOSS]), *style[1]))
            rates.append(Line(*style[0], curves[0, :, LR], *style[1]))
        panels = [Panel("validation loss", losses, True, 300), Panel("learning rate (first seed)", rates, True)]
        yield Chart(file_name(f"{name}-{setting}"), str(setting), panels)
        yield Chart(
            file_name(f"{name}-{setting}-lr"),
            f"{setting}: final loss by the base learning rate",
            [Panel("final log validation loss, mean over the seeds", _by_lr(results, setting), height=260)],
            x="base learning rate / default",
            is_log=True,
        )


def _by_lr(results: Comparison, setting: Cell) -> list[Line]:
    lines = []
    for contender, by_lr in results.runs[setting].items():
        factors = sorted(by_lr)
        finals = np.array([results.log_loss(setting, contender, factor) for factor in factors])
        color = results.color(contender)
        lines.append(Line(results.label(contender), np.array(factors), finals, color, has_marks=True))
    return lines


def _benchmark(name: str, results: Benchmark) -> Iterator[Text | Picture]:
    yield Text(benchmark_analysis.scores(results))
    yield Picture(file_name(f"{name}-profile"), "performance profile", plots.profile(results))
    if differences := benchmark_analysis.differences(results):
        yield Text(differences)
    yield Text(f"{benchmark_analysis.by_cell(results)}\n\n{benchmark_analysis.notes(results)}", "Each cell")
