"""The verb `train`: an option for each field of the configuration, and what it prints."""

from __future__ import annotations

import argparse
import sys
import typing
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from rlsched.agents.config import PRESETS, TrainConfig

NEEDS = ("torch", "rlsched.agents.ppo")
TRAIN = """\
Train a scheduling policy with PPO on generated inner training tasks. A run that was interrupted goes on
when the same command is given again.

examples:
  rlsched train --preset demo                        # a small policy, in minutes on two cores
  rlsched train --run-dir runs/mine --compile        # a policy like the shipped one, in a quarter of an hour
  rlsched train --run-dir runs/relu --activation relu --hidden 32 32 --timesteps 1000000
  tensorboard --logdir runs                          # watch it
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Beside its own, an option for each field of TrainConfig."""
    parser.description = TRAIN
    parser.add_argument("--preset", default="default", help="where the other options start from: default, broad, demo")
    parser.add_argument("--run-dir", "--log-dir", help="folder of the run: checkpoint, TensorBoard log, policy file")
    types = typing.get_type_hints(TrainConfig)
    group = parser.add_argument_group("configuration (defaults of the preset `default` in brackets)")
    for field in fields(TrainConfig):
        if field.name == "run_dir":
            continue
        kind, name = types[field.name], "--" + field.name.replace("_", "-")
        help_text = f"{field.metadata.get('help', '')} [{_shown(field.default)}]".strip()
        if kind is bool:
            group.add_argument(name, action=argparse.BooleanOptionalAction, default=None, help=help_text)
        elif kind in (int, float, str):
            group.add_argument(name, type=kind, metavar=kind.__name__.upper(), help=help_text)
        else:
            (item, _) = typing.get_args(kind)
            group.add_argument(name, type=item, nargs="+", metavar=item.__name__.upper(), help=help_text)


def _shown(default: Any) -> str:
    if default is MISSING:
        return "required"
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _config(options: argparse.Namespace) -> TrainConfig:
    if options.preset not in PRESETS:
        raise ValueError(f"--preset must be one of {sorted(PRESETS)}, got {options.preset!r}")
    given = {field.name: getattr(options, field.name, None) for field in fields(TrainConfig)}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}
    return TrainConfig(**{"run_dir": f"runs/{options.preset}", **PRESETS[options.preset], **given})


def run(options: argparse.Namespace) -> None:
    """Train, or go on, as the options say, and print the scores."""
    import torch

    from rlsched.agents import train

    config = _config(options)
    torch.set_num_threads(config.processes)
    run_dir = Path(config.run_dir)
    print(f"training in {run_dir}; watch it with: tensorboard --logdir {run_dir}", file=sys.stderr)
    policy = train(config)
    scores = policy.info["evaluation"]
    print(
        f"policy      {run_dir / 'policy.safetensors'}\n"
        f"TensorBoard {run_dir}\n"
        f"return      {scores['return']:.3f}   (log of first over last validation loss, mean over the same "
        f"{config.eval_episodes} episodes)\n"
        f"base        {scores['return_of_zero_policy']:.3f}   (the base schedule, from the same base learning rates)\n"
        f"regret      {scores['regret']:.3f}   (what is missing to the base schedule from the best of several base "
        f"learning rates)\n"
        f"better in   {scores['share_better']:.0%} of the episodes"
    )
