"""The verb `compare`: its options, and what it does."""

from __future__ import annotations

import argparse
from pathlib import Path

NEEDS = ("torch", "rlsched.experiments.compare.run", "rlsched.experiments.compare.analysis")
COMPARE = """\
Compare a policy with constant, linear and cosine schedules on real training runs of equal work. The others are
tuned over five learning rates; the policy gets three base learning rates and takes them as they come. Whether it
adapts to a run shows in a replay: the same run under the mean of what the policy did with the other seeds (so there
is none with --seeds 1). Writes runs.jsonl (results already there are kept, another policy's beside them), table.md,
plot.png, sweep.png and a TensorBoard log, with a run for each schedule, to the folder --out.

Tasks are digits, mnist (which needs --data), the families of rlsched.envs.FAMILIES, and your own: module:NAME is an
InnerTask, or a sequence of them, in a module of this folder or an installed one.

examples:
  rlsched compare --tasks digits
  rlsched compare --policy runs/mine/policy.safetensors --tasks digits --steps 200 800 --seeds 5
  rlsched compare --tasks mnist --data path/to/mnist --steps 400 1000
  rlsched compare --tasks attention my_module:MY_TASK --out runs/mine-compare
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    from rlsched.policy import available

    parser.description = COMPARE
    shipped = ", ".join(available()) or "none"
    parser.add_argument("--policy", default="default", help=f"policy file, or a shipped policy ({shipped})")
    parser.add_argument("--tasks", "--task", nargs="+", default=["digits"], help="names, see above (default: digits)")
    parser.add_argument("--optimizers", nargs="+", default=["sgd", "adam"], help="sgd, adam, adamw (default: sgd adam)")
    parser.add_argument("--steps", nargs="+", type=int, default=[400], help="inner steps of a run (default: 400)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind (default: 3)")
    parser.add_argument("--data", type=Path, help="folder with the files of tasks that need them (mnist)")
    parser.add_argument("--out", "--log-dir", type=Path, default=Path("runs/compare"), help="(default: runs/compare)")
    parser.add_argument("--log-runs", action="store_true", help="also log each run of the first seed for TensorBoard")


def run(options: argparse.Namespace) -> None:
    """Do the runs that are missing, and print the table."""
    import torch

    from rlsched.experiments.compare.analysis import SWEEP, report
    from rlsched.experiments.compare.run import RUNS, TENSORBOARD, Plan, compare
    from rlsched.experiments.table import PLOT, TABLE
    from rlsched.onnx_policy import load_policy

    policy = load_policy(options.policy)
    torch.set_num_threads(min(2, torch.get_num_threads()))  # the networks are small: more cost more than they give
    plan = Plan(options.tasks, options.optimizers, options.steps, options.seeds, data=options.data)
    compare(plan, policy, options.out, str(options.policy), log_runs=options.log_runs)
    print(report(options.out))
    print()
    files = {"table": TABLE, "plot": PLOT, "by base lr": SWEEP, "results": RUNS, "TensorBoard": TENSORBOARD}
    for what, name in files.items():
        print(f"{what:<11} {options.out / name}")
