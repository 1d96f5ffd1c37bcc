"""The verb `export`: from a training run to a policy file."""

from __future__ import annotations

import argparse
from pathlib import Path

NEEDS = ("torch", "rlsched.agents.exporting")
EXPORT = """\
Export the policy of a training run, finished or not, to a policy file: safetensors with JSON metadata, no pickle.
A checkpoint is a Stable-Baselines3 model and holds pickles: export only those that you trust.

examples:
  rlsched export runs/mine --out mine.safetensors
  rlsched export runs/mine/checkpoint.zip --out mine.safetensors
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    from rlsched.policy import SUFFIX

    parser.description = EXPORT
    parser.add_argument("source", type=Path, help="folder of a training run, or a checkpoint in it")
    parser.add_argument("--out", type=Path, required=True, help=f"policy file to write, ending in {SUFFIX}")


def run(options: argparse.Namespace) -> None:
    """Write the policy file that the options ask for."""
    from rlsched.agents.exporting import load_checkpoint
    from rlsched.policy import SUFFIX

    if options.out.suffix != SUFFIX:
        raise ValueError(f"--out must end in {SUFFIX}, got {str(options.out)!r}")
    policy = load_checkpoint(options.source)
    print(f"{policy.save(options.out)}: {policy!r}")
