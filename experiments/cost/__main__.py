"""Command line: `python -m rlsched.experiments.cost --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from rlsched.cli import exit_code
from rlsched.experiments.cost.analysis import report
from rlsched.experiments.cost.loops import NETWORKS
from rlsched.experiments.cost.population import population_table
from rlsched.experiments.cost.run import measure

QUICK = tuple(NETWORKS)[:1]  # networks


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 for wrong input, 130 when interrupted."""
    name = "python -m rlsched.experiments.cost"
    parser = argparse.ArgumentParser(
        name,
        description="What a step with rlsched costs beside the same step with clip_grad_norm_ and LambdaLR, and beside "
        "schedulefree and prodigyopt where they are installed. Results that are there already are kept.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/cost"), help="folder for the results (default: %(default)s)"
    )
    parser.add_argument(
        "--networks", nargs="+", default=list(NETWORKS), metavar="NAME", help=f"of: {', '.join(NETWORKS)}"
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="per network and optimizer (default: %(default)g)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="three rounds of the smallest network, to see that it works"
    )
    parser.add_argument(
        "--population", action="store_true", help="instead: a decision in a population beside as many single ones"
    )
    options = parser.parse_args(arguments)
    networks = QUICK if options.quick else tuple(options.networks)

    def work() -> None:
        if options.threads < 1:
            raise ValueError(f"threads must be at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
        if options.population:
            print(population_table(options.out))
            return
        measure(options.out, networks, seconds=0.0 if options.quick else options.seconds)
        print(report(options.out))

    return exit_code(name, work)


if __name__ == "__main__":
    sys.exit(main())
