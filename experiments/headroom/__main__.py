"""Command line: `python -m rlsched.experiments.headroom --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from rlsched.cli import exit_code
from rlsched.experiments import work
from rlsched.experiments.benchmark.statistics import paired
from rlsched.experiments.benchmark.tasks import DEVELOPMENT, TASKS, cells
from rlsched.experiments.headroom.search import JUDGED, Search, gain, key, plain, search
from rlsched.experiments.journal import Journal, Row
from rlsched.experiments.table import TABLE, markdown, signed
from rlsched.files import locked, write

RESULTS = "results.jsonl"
DESCRIPTION = """\
How much better than tuned cosine could a schedule be that is given before the run? In each cell of the development
suite, search level, warm-up, plateau, power of the decay, momentum and weight decay, and judge the best course found
on other seeds. Writes results.jsonl (cells that are there are not searched again) and table.md to the folder --out.
"""
HEAD = ["cell", "log ratio", "cosine's lr", "level", "warm-up", "plateau", "power", "momentum", "weight decay"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 for wrong input, 130 when interrupted."""
    name = "python -m rlsched.experiments.headroom"
    parser = argparse.ArgumentParser(
        name, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--tasks", nargs="+", choices=DEVELOPMENT, metavar="TASK", help="of the development suite (default: all)")
    add("--trials", type=int, default=40, help="runs of the search in each cell (default: %(default)s)")
    add("--out", type=Path, default=Path("runs/headroom"), help="folder (default: %(default)s)")
    add("--processes", type=int, default=2, help="of one thread each (default: %(default)s)")
    options = parser.parse_args(arguments)

    def action() -> None:
        torch.set_num_threads(1)
        asked = [cell for task in options.tasks or DEVELOPMENT for cell in cells(task)]
        fewest = max(len(TASKS[cell.task].bases[cell.optimizer].sweep) for cell in asked)
        if options.trials < fewest:
            raise ValueError(f"trials must be at least {fewest}, what a search begins with, got {options.trials}")
        with locked(options.out):
            journal = Journal(options.out / RESULTS, key)
            missing = [job for cell in asked if (job := Search(cell, options.trials)) not in journal]
            work.do(search, missing, journal, options.processes, "searching")
        text = table([journal.rows[Search(cell, options.trials)] for cell in asked])
        write(options.out / TABLE, f"{text}\n".encode())
        print(text)

    return exit_code(name, action)


def table(rows: Sequence[Row]) -> str:
    """A line for each cell, and what they come to."""
    gains = [gain(row) for row in rows]
    lines = [[str(key(row).cell), signed(each), *_course(row)] for row, each in zip(rows, gains, strict=True)]
    all_of_them = paired(gains)
    mean, low, high = (signed(value) for value in (all_of_them.value, all_of_them.low, all_of_them.high))
    return f"""{markdown(HEAD, lines)}

Log ratio of the final validation loss of the best course to that of cosine with its learning rate tuned: mean of seeds
{" and ".join(map(str, JUDGED))}, which chose neither. Interquartile mean over the cells {mean} \
({low} to {high}; bootstrap of the cells), mean {signed(float(np.mean(gains)))}. Courses from the \
{max(row["trials"] for row in rows)} runs of a search; learning rates are factors on the usual one."""


def _course(row: Row) -> list[str]:
    task, optimizer, _ = row["cell"]
    course, searched = row["course"], plain(TASKS[task].bases[optimizer])
    shown = [f"× {row['cosine']:.3g}", f"× {course['level']:.3g}", f"{course['warm_up']:.0%}"]
    shown += [f"{max(course['plateau'], course['warm_up']):.0%}", f"{course['power']:.2g}"]
    betas = [1 - 10 ** -course[name] for name in ("momentum", "final_momentum")]
    shown += [f"{betas[0]:.2f} to {betas[1]:.2f}" if "momentum" in searched else "–"]
    return [*shown, f"× {course['weight_decay']:.3g}" if "weight_decay" in searched else "–"]


if __name__ == "__main__":
    sys.exit(main())
