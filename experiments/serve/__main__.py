"""Command line: `python -m rlsched.experiments.serve --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from rlsched.cli import BEGINS_ANEW, exit_code
from rlsched.experiments.serve.load import table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 for wrong input, 130 when interrupted."""
    name = "python -m rlsched.experiments.serve"
    parser = argparse.ArgumentParser(
        name,
        description="Up to a thousand jobs ask a served policy for decisions, all from one process: how long they "
        "wait, how many are decided in a second, and what becomes of them when the server is killed and restarted.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/serve"), help="folder (default: %(default)s)")
    parser.add_argument("--policy", default="default", help="name or file (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=15.0, help="for each load (default: %(default)g)")
    parser.add_argument("--batch", type=int, default=256, help="as of rlsched serve (default: %(default)s)")
    parser.add_argument("--wait", type=float, default=2.0, help="as of rlsched serve (default: %(default)g)")
    options = parser.parse_args(arguments)

    def work() -> None:
        if not 1 <= options.seconds <= 3600:
            raise ValueError(f"--seconds must be between 1 and 3600, got {options.seconds}")
        torch.set_num_threads(1)
        print(table(options.out, options.policy, seconds=options.seconds, batch=options.batch, wait=options.wait))

    return exit_code(name, work, BEGINS_ANEW)


if __name__ == "__main__":
    sys.exit(main())
