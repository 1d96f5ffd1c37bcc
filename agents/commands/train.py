"""The verb `train`: an option for each field of the configuration, and what it prints."""

from __future__ import annotations

import argparse
import os
import sys
import typing
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from rlsched.agents.config import COMMITTEES, PRESETS, TrainConfig
from rlsched.agents.presets import SUFFIX, preset

NEEDS = ("torch", "rlsched.agents.ppo")
TRAIN = """\
Train a scheduling policy with PPO on generated inner training tasks. A run that was interrupted goes on
when the same command is given again.

examples:
  rlsched train --preset demo                        # a small policy, in minutes on two cores
  rlsched train --run-dir runs/mine --compile        # a policy for small perceptrons, in a quarter of an hour
  rlsched train --preset shipped --compile           # two trainings, whose policies become one: as the one that ships
  rlsched train --run-dir runs/relu --activation relu --hidden 32 32 --timesteps 1000000
  rlsched train --engine ray --workers 64 --address auto    # on a Ray cluster of which this machine is a part
  tensorboard --logdir runs                          # watch it
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Beside its own, an option for each field of TrainConfig."""
    parser.description = TRAIN
    presets = (
        f"where the other options start from: {', '.join([*PRESETS, *COMMITTEES])}, or a {SUFFIX} file of settings"
    )
    parser.add_argument("--preset", default="default", help=f"{presets} (default: default)")
    parser.add_argument("--run-dir", "--log-dir", help="folder of the run: checkpoint, TensorBoard log, policy file")
    types = typing.get_type_hints(TrainConfig)
    group = parser.add_argument_group("configuration (defaults of the preset `default` in brackets)")
    for field in fields(TrainConfig):
        if field.name == "run_dir":
            continue
        kind, also = types[field.name], field.metadata.get("also")
        names = ["--" + each.replace("_", "-") for each in (field.name, also) if each]
        help_text = f"{field.metadata.get('help', '')} [{_shown(field.default)}]".strip()
        if kind is bool:
            group.add_argument(*names, action=argparse.BooleanOptionalAction, default=None, help=help_text)
        elif kind in (int, float, str):
            group.add_argument(*names, type=kind, metavar=kind.__name__.upper(), help=help_text)
        else:
            (item, _) = typing.get_args(kind)
            group.add_argument(*names, type=item, nargs="+", metavar=item.__name__.upper(), help=help_text)


def _shown(default: Any) -> str:
    if default is MISSING:
        return "required"
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _configs(options: argparse.Namespace) -> list[TrainConfig]:
    """What is to be trained: one policy, or the members of a committee, each in a folder of its own."""
    committee = COMMITTEES.get(options.preset)
    starts = {"": preset(options.preset)} if committee is None else committee.members
    asked = {field.name: getattr(options, field.name, None) for field in fields(TrainConfig)}
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in asked.items() if v is not None}
    folder = Path(given.pop("run_dir", f"runs/{Path(options.preset).stem}"))
    return [TrainConfig(**{**start, **given, "run_dir": folder / name}) for name, start in starts.items()]


def run(options: argparse.Namespace) -> None:
    """Train, or go on, as the options say, and print the scores."""
    import torch

    from rlsched.agents import train
    from rlsched.agents.ppo import POLICY
    from rlsched.committee import committee_of, corrected

    configs = _configs(options)
    policies = []
    for config in configs:
        torch.set_num_threads(min(config.processes, os.cpu_count() or 1))
        run_dir = Path(config.run_dir)
        print(f"training in {run_dir}; watch it with: tensorboard --logdir {run_dir}", file=sys.stderr)
        policies.append(train(config))
        scores = policies[-1].info["evaluation"]
        print(
            f"policy      {run_dir / POLICY}\n"
            f"TensorBoard {run_dir}\n"
            f"return      {scores['return']:.3f}   (log of first over last validation loss, mean over the same "
            f"{config.eval_episodes} episodes)\n"
            f"base        {scores['return_of_zero_policy']:.3f}   (the base schedule, from the same base learning "
            f"rates)\n"
            f"regret      {scores['regret']:.3f}   (what is missing to the base schedule from the best of several base "
            f"learning rates)\n"
            f"better in   {scores['share_better']:.0%} of the episodes"
        )
    if options.preset in COMMITTEES:
        committee = COMMITTEES[options.preset]
        whole = corrected(committee_of(policies), **committee.corrections)
        print(f"committee   {whole.save(Path(configs[0].run_dir).parent / POLICY)}")
