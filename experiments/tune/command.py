"""The verb `tune`: what it takes, and what it prints."""

from __future__ import annotations

import argparse
from pathlib import Path

from rlsched.agents.config import PRESETS, TrainConfig
from rlsched.agents.presets import SUFFIX, preset

NEEDS = ("torch", "optuna", "rlsched.agents.ppo", "rlsched.experiments.tune.run")
TUNE = """\
Search for the settings of a training that give the best policy: an Optuna study, whose trials are trainings of their
own, trained side by side. A trial is judged by episodes that it did not train on, of the mixture of inner tasks that it
trains on; the best few are then played in other episodes, by which the best is chosen. Trials that fall behind are
pruned. A study that was interrupted goes on when the same command is given again, and with more --trials it is
continued.

--space is a TOML file in which an entry is a setting of `rlsched train`, by its name there with _ for -:
  learning_rate = { low = 2e-4, high = 5e-3, log = true }    searched, here in factors (step = … in steps)
  hidden = { choices = [[32, 32], [64, 64]] }                one of them
  timesteps = 200_000                                        the same in all trials
All else is as the preset says, whose own values the first trial has. Without it, what is searched is how PPO learns.

Writes best.toml, a preset for `rlsched train --preset`, table.md, history.png, settings.png, importance.png and all
trainings to the folder --out. docs/tune.md says how to read them.

examples:
  rlsched tune --trials 20
  rlsched tune --preset broad --timesteps 500000 --space mine.toml --jobs 8 --out runs/tune-broad
  rlsched tune --space grid.toml --sampler grid --pruner none
  rlsched tune --trials 20 --suite development       # and the benchmark's development suite for the best few
  rlsched train --preset runs/tune/best.toml --run-dir runs/tuned
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = TUNE
    add = parser.add_argument
    add("--space", type=Path, metavar="FILE", help="what is searched, see above")
    presets = f"what all else is: {', '.join(PRESETS)}, or a {SUFFIX} file"
    add("--preset", default="demo", help=f"{presets} (default: demo, the smallest)")
    add("--timesteps", type=int, help="of each trial (default: those of the preset)")
    add("--trials", type=int, help="how many (default: 20; of a grid, all)")
    add("--jobs", type=int, default=2, help="trials side by side, in a process of one thread each (default: 2)")
    add("--sampler", default="tpe", help="tpe (multivariate), grid or random (default: tpe)")
    add("--pruner", default="asha", help="asha (successive halving), hyperband or none (default: asha)")
    add("--objective", default="regret", help="regret to the tuned base schedule, or return (default: regret)")
    add("--seed", type=int, default=0, help="of the sampler (default: 0)")
    add("--best", type=int, default=3, help="so many are played again (default: 3)")
    add("--suite", help="development, to benchmark these on it in a short form: minutes to hours")
    add("--out", type=Path, default=Path("runs/tune"), help="folder of the study (default: runs/tune)")


def run(options: argparse.Namespace) -> None:
    """Do what is missing of the study that the options ask for, and print what it found."""
    from rlsched.experiments.table import TABLE
    from rlsched.experiments.tune.analysis import BEST, HISTORY, IMPORTANCE, SETTINGS
    from rlsched.experiments.tune.run import DEVELOPMENT, tune
    from rlsched.experiments.tune.space import DEFAULT, read_space
    from rlsched.experiments.tune.study import Plan

    space = read_space(options.space or DEFAULT)
    settings = {**preset(options.preset), **space.fixed, "processes": 1}
    if options.timesteps is not None:
        if "timesteps" in space.fixed:
            raise ValueError(f"--timesteps: {options.space} has them already; say them once")
        settings["timesteps"] = options.timesteps
    asked = {name: getattr(options, name) for name in ("objective", "sampler", "pruner", "trials", "seed")}
    plan = Plan(TrainConfig(**settings), space, **asked)
    report = tune(plan, options.out, options.jobs, few=options.best, suite=options.suite)
    print(report.story())
    print()
    for what, name in (
        ("preset", BEST),
        ("table", TABLE),
        ("pictures", HISTORY),
        ("", SETTINGS),
        ("", IMPORTANCE),
        ("benchmark", f"{DEVELOPMENT}/{TABLE}"),
    ):
        if (options.out / name).exists():
            print(f"{what:<10} {options.out / name}")
    if report.best is not None:
        print(f"\nto train with it: rlsched train --preset {options.out / BEST}")
