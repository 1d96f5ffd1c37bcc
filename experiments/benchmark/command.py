"""The verb `rlsched benchmark`: its options, and what it does."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from rlsched.experiments.benchmark.analysis import report
from rlsched.experiments.benchmark.methods import BASELINES, ablations
from rlsched.experiments.benchmark.run import BASE_LRS, Plan
from rlsched.experiments.benchmark.run import run as run_plan
from rlsched.experiments.benchmark.tasks import SUITES
from rlsched.onnx_policy import load_policy

NEEDS = ()  # its options say what there is
DESCRIPTION = f"""\
Measure policies on a suite of tasks, each from five base learning rates, against cosine whose learning rate is tuned
for each task, and against other baselines. Choose between policies on --suite development, which takes minutes, and on
--suite plateaus, networks that learn next to nothing at first; run --suite test once for a policy that is released, and
choose nothing by it. Runs of several policies and methods stand
side by side in runs.jsonl, and those that are there are not done again. From it come table.md, base-lr.png,
profile.png, the learning rates in lr*.png and TensorBoard logs, all in the folder --out.

--methods are policy and the baselines {", ".join(list(BASELINES)[:6])},
{", ".join(list(BASELINES)[6:])}; all is all of these.
--ablations are what is left of a policy: base-schedule, replay (of its mean with the other seeds), only-CONTROL and
without-OBSERVATION; all of them, if none is named.

examples:
  rlsched benchmark --suite development
  rlsched benchmark --suite development --policy default --policy runs/mine/policy.safetensors --seeds 2
  rlsched benchmark --suite development --tasks wine-by-heart --ablations replay only-lr
  rlsched benchmark --suite development --methods policy cosine schedule-free prodigy --untuned
  rlsched benchmark --suite test --methods all --data path/to/mnist
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give the verb's parser its description and its options."""
    parser.description = DESCRIPTION
    add = parser.add_argument
    factors = " ".join(f"{factor:g}" for factor in BASE_LRS)
    base_lrs = f"on the usual ones, for policies; of those, a tenth to ten times a recipe's own (default: {factors})"
    tasks = "; ".join(f"of {suite}: {', '.join(tasks)}" for suite, tasks in SUITES.items())
    data = "with MNIST's original test files; without, its tasks are left out"
    policy = "policy file, or the name of a shipped policy; may be given again (default: default)"
    add("--suite", required=True, choices=SUITES, help="see above")
    add("--policy", action="append", metavar="POLICY", help=policy)
    add("--tasks", nargs="+", metavar="TASK", help=f"{tasks} (default: all)")
    add("--seeds", type=int, default=3, help="runs of each kind (default: 3)")
    add("--methods", nargs="+", default=["policy", "cosine"], metavar="METHOD", help="(default: policy cosine)")
    add("--ablations", nargs="*", metavar="METHOD", help="beside the methods, for each policy (default: none)")
    add("--base-lrs", nargs="+", type=float, default=list(BASE_LRS), metavar="FACTOR", help=base_lrs)
    add("--untuned", action="store_true", help="baselines from these learning rates as well, beside their sweep")
    add("--no-validation", action="store_true", help="policies do not hear of validation losses")
    add("--data", type=Path, metavar="FOLDER", help=data)
    add("--out", type=Path, metavar="FOLDER", help="for the results (default: runs/benchmark/SUITE)")
    add("--processes", type=int, default=2, help="of one thread each (default: 2)")


def run(options: argparse.Namespace) -> None:
    """Do what is missing, and report.

    Raises:
        ValueError, OSError: an option is not what it can be.
    """
    given = list(dict.fromkeys(options.policy or ["default"]))
    stems = [Path(name).stem for name in given]  # no path of this machine, where they tell the files apart
    names = stems if len(set(stems)) == len(stems) else given
    policies = {name: load_policy(file) for name, file in zip(names, given, strict=True)}
    methods = list(options.methods)
    if options.ablations is not None:
        methods += options.ablations or [name for policy in policies.values() for name in ablations(policy)]
    told, out = not options.no_validation, options.out or Path("runs/benchmark") / options.suite
    more = {"told": told, "data": options.data, "untuned": options.untuned}
    plan = Plan(options.suite, options.tasks, options.seeds, methods, options.base_lrs, **more)
    for name, why in plan.skipped.items():
        print(f"skipped: {name}, {why}", file=sys.stderr)
    torch.set_num_threads(1)
    run_plan(plan, policies, out, options.processes)
    print(f"{report(out)}\n\neverything is in {out}")
