"""The command of this study. On Linux, since it reads from the kernel how much memory a process occupies."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from rlsched.cli import exit_code
from rlsched.experiments.speed.analysis import report
from rlsched.experiments.speed.plan import QUICK, Plan
from rlsched.experiments.speed.run import RESULTS, run
from rlsched.experiments.table import PLOT, TABLE

DESCRIPTION = """\
Measure on one core how fast networks are trained in a stack, beside eight single environments, a plain loop and the
matrix products alone; how the cost grows; what PPO takes; and how much memory is needed. Writes results.jsonl
(results already there are kept), table.md and plot.png to the folder --out. Leave the machine alone meanwhile.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 for wrong input, 130 when interrupted."""
    name = "python -m rlsched.experiments.speed"
    parser = argparse.ArgumentParser(
        name, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results/speed"), help="(default: docs/results/speed)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, a trial: the figures say nothing")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which needs a C compiler")
    options = parser.parse_args(arguments)
    plan = replace(QUICK if options.quick else Plan(), compile=not options.no_compile)
    # The processes that measure read this as they import NumPy; their torch is told by itself.
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))
    torch.set_num_threads(1)

    def work() -> None:
        run(plan, options.out)
        print(report(options.out, plan), end="\n\n")
        for what, file in (("table", TABLE), ("plot", PLOT), ("results", RESULTS)):
            print(f"{what:<8} {options.out / file}")

    return exit_code(name, work)


if __name__ == "__main__":
    sys.exit(main())
