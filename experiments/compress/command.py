"""The verb `compress`: what it takes."""

from __future__ import annotations

import argparse
from pathlib import Path

from rlsched.agents.config import COUNT, SEED

NEEDS = ("torch", "rlsched.experiments.compress.compression")
COMPRESS = """\
Make smaller policies of a policy, and measure each: size of its file, time of a decision, and what it loses.

  int8      its weights as 8-bit integers, in an ONNX file
  pruned    half of the units of each layer, taught to do as before: a policy file
  student   one layer of 16 units, taught by the policy: a policy file
  tree      a decision tree, taught by the policy, in an ONNX file

A taught one also meets the runs that it leads to itself, and is told there what the policy would do (DAgger). The loss
is in the return of episodes of a mixture that nobody was taught on, from the same seeds. Writes the files, table.md and
compression.json to the folder --out; what is there is not made again. A wrapper takes each of them as policy=.

examples:
  rlsched compress default --out runs/small
  rlsched compress runs/mine/policy.safetensors --tasks broad --episodes 192 --out runs/mine/small
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    from rlsched.policy import available

    shipped = ", ".join(available()) or "none"
    parser.description = COMPRESS
    parser.add_argument("policy", help=f"policy file, or a shipped policy ({shipped})")
    parser.add_argument("--tasks", default="mlp", help="mixture of inner tasks: rlsched.envs.MIXTURES (default: mlp)")
    parser.add_argument("--episodes", type=int, default=48, help="to score each in, and to teach from (default: 48)")
    parser.add_argument("--rounds", type=int, default=2, help="of own runs of those that are taught (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of what is taught (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/compress"), help="(default: runs/compress)")


def run(options: argparse.Namespace) -> None:
    """Compress as the options say, write it down, and print the table."""
    import torch

    from rlsched.experiments.compress.compression import Plan, compress
    from rlsched.policy import SchedulePolicy

    for name, within in (("episodes", COUNT), ("seed", SEED)):
        if getattr(options, name) not in within:
            raise ValueError(f"--{name} must be a whole number, {within}, got {getattr(options, name)}")
    if options.rounds < 0:
        raise ValueError(f"--rounds must be 0 or more, got {options.rounds}")
    policy = SchedulePolicy.load(options.policy)
    torch.set_num_threads(1)  # the networks are small; and a decision in a training loop has no more
    plan = Plan(options.tasks, options.episodes, options.rounds, options.seed)
    print(compress(policy, str(options.policy), plan, options.out))
