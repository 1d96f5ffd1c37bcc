"""Command line: `python -m rlsched.experiments.recipes --help`."""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlsched.cli import exit_code
from rlsched.experiments.recipes.analysis import report
from rlsched.experiments.recipes.recipes import RECIPES
from rlsched.experiments.recipes.run import Plan, run

DESCRIPTION = """\
Train by ordinary scripts, as they are and with rlsched in place of their scheduler, from the base learning rate of
each script and from others. Writes runs.jsonl (results already there are kept) and table.md, with a verdict below the
table, to the folder --out.

examples:
  python -m rlsched.experiments.recipes --recipes lstm gpt --seeds 1
  python -m rlsched.experiments.recipes --option on_divergence=rollback --option max_grad_norm=1
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 for wrong input, 130 when interrupted."""
    name = "python -m rlsched.experiments.recipes"
    parser = argparse.ArgumentParser(
        name, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/recipes"), help="folder for the results (default: %(default)s)"
    )
    parser.add_argument(
        "--recipes", nargs="+", default=list(RECIPES), metavar="NAME", help=f"of: {', '.join(RECIPES)} (default: all)"
    )
    parser.add_argument("--seeds", type=int, default=2, help="runs of each kind (default: %(default)s)")
    parser.add_argument(
        "--base-lrs",
        nargs="+",
        type=float,
        default=list(Plan.lr_factors),
        metavar="FACTOR",
        help="on the recipe's own; by hand, 1 is always among them (default: 0.1 1 10)",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        dest="options",
        type=_option,
        metavar="NAME=VALUE",
        help="of ScheduledOptimizer; may be given again. Results with other options stay, and are other columns",
    )
    parser.add_argument("--processes", type=int, default=2, help="of one thread each (default: %(default)s)")
    given = parser.parse_args(arguments)

    def work() -> None:
        plan = Plan(tuple(given.recipes), given.seeds, tuple(given.base_lrs), dict(given.options))
        run(plan, given.out, given.processes)
        print(report(given.out))

    return exit_code(name, work)


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


if __name__ == "__main__":
    sys.exit(main())
