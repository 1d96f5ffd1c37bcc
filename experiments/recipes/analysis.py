"""The table of the recipes and a verdict, from their `runs.jsonl` and nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from rlsched.experiments.journal import Row, read
from rlsched.experiments.recipes.run import BY_HAND, RUNS, WRAPPED, Trial, key
from rlsched.experiments.table import TABLE, markdown

Rows = dict[Trial, Row]

WRECKED, WORSE = 0.5, 0.1  # above the recipe's loss, as a part of it
MOST = 10.0  # of which the exact figure is told
NOT_FINITE = "not finite"
CAPTION = """\
Final loss, mean over {seeds} seeds, by the factor on the recipe's own base learning rate. Where runs are wrapped, the
brackets have their excess over the recipe by hand (its own learning rate, the same seed) and the interventions per run.
No loss can come near zero: digits that are told apart are noisy, and some of the sorted sequences are wrong."""


def report(out: Path) -> str:
    """Write `table.md` beside the `runs.jsonl` in `out`, and return what is in it."""
    rows = read(out / RUNS, key)
    text = f"{table(rows)}\n\n{verdict(rows)}"
    (out / TABLE).write_text(text + "\n")
    return text


def table(rows: Rows) -> str:
    """Final losses by recipe, base learning rate and way, as a Markdown table with a caption."""
    columns = sorted(
        {(trial.way, trial.options, trial.lr_factor) for trial in rows},
        key=lambda column: (column[0] != BY_HAND, column),
    )
    lines = []
    for recipe in dict.fromkeys(trial.recipe for trial in rows):
        mine = [trial for trial in rows if trial.recipe == recipe]
        facts = rows[mine[0]]["recipe"]
        clip = "" if facts["clip"] is None else f", clip {facts['clip']:g}"
        cells = [
            _cell(rows, [t for t in mine if (t.way, t.options, t.lr_factor) == column], column[0]) for column in columns
        ]
        lines.append([facts["title"], f"{facts['optimizer']}, lr {facts['lr']:g}{clip}", *cells])
    head = [f"{_named(way, options)}, lr × {factor:g}" for way, options, factor in columns]
    caption = CAPTION.format(seeds=len({trial.seed for trial in rows}))
    return f"{markdown(['recipe', 'optimizer', *head], lines, labels=2)}\n\n{caption}"


def verdict(rows: Rows) -> str:
    """Which wrapped runs are wrecked, and which are otherwise much worse than by hand; a line of Markdown for each."""
    lines = []
    for options in sorted({trial.options for trial in rows if trial.way == WRAPPED}):
        parts = {t: excess(rows, t) for t in rows if (t.way, t.options) == (WRAPPED, options)}
        for what, low, high in (
            (f"wrecked (more than {WRECKED:.0%} above the recipe's loss, or {NOT_FINITE})", WRECKED, math.inf),
            (f"more than {WORSE:.0%} above it, but not wrecked", WORSE, WRECKED),
        ):
            found = [f"{_run(rows, t)} ({_percent(part)})" for t, part in parts.items() if low < part <= high]
            listed = f": {'; '.join(found)}" if found else ""
            lines.append(f"- {_named(WRAPPED, options)}, {what}: {len(found)} of {len(parts)} runs{listed}")
    return "\n".join(lines)


def excess(rows: Rows, trial: Trial) -> float:
    """How far a loss is above that of the recipe by hand with the same seed, as a part of it.

    Infinite where the loss is not finite, and NaN where the recipe's is not, or is not there.
    """
    row, reference = rows[trial], rows.get(Trial(trial.recipe, BY_HAND, 1.0, trial.seed), {"loss": None})
    if reference["loss"] is None:
        return math.nan
    return math.inf if row["loss"] is None else float(row["loss"] / reference["loss"] - 1)


def _cell(rows: Rows, trials: Sequence[Trial], way: str) -> str:
    if not trials:
        return ""
    losses = [rows[trial]["loss"] for trial in trials]
    loss = NOT_FINITE if None in losses else f"{fmean(losses):.4g}"
    if way == BY_HAND:
        return loss
    interventions = fmean(len(rows[trial]["interventions"]) for trial in trials)
    return f"{loss} ({_percent(fmean(excess(rows, trial) for trial in trials))}, {interventions:g})"


def _percent(part: float) -> str:
    if not math.isfinite(part):
        return "–"
    return f"{part:+.0%}".replace("-", "−") if part < MOST else f"over {MOST:.0%}"


def _run(rows: Rows, trial: Trial) -> str:
    return f"{rows[trial]['recipe']['title']} × {trial.lr_factor:g}, seed {trial.seed}"


def _named(way: str, options: str) -> str:
    values = ", ".join(f"{name}={value!r}" for name, value in json.loads(options).items())
    return f"{way} with {values}" if values else way
