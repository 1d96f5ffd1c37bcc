"""The `rlsched` command."""

from __future__ import annotations

import argparse
import os
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import rlsched
from rlsched.policy import SUFFIX, SchedulePolicy, available

if TYPE_CHECKING:
    from rlsched.agents import TrainConfig

DESCRIPTION = "Learned schedules for PyTorch optimizers: train a scheduling policy, and compare it with others."
EXTRAS = {"gymnasium", "stable_baselines3", "sb3_contrib", "tensorboard", "sklearn", "matplotlib", "tqdm"}

TRAIN = """\
Train a scheduling policy with PPO on generated inner training tasks. A run that was interrupted goes on
when the same command is given again.

examples:
  rlsched train --preset demo                        # a small policy, in minutes on two cores
  rlsched train --run-dir runs/mine --compile        # a policy like the shipped one, in a quarter of an hour
  rlsched train --run-dir runs/relu --activation relu --hidden 32 32 --timesteps 1000000
  tensorboard --logdir runs                          # watch it
"""
COMPARE = """\
Compare a policy with constant, linear and cosine schedules on real training runs of equal work. The others are
tuned over five learning rates; the policy gets three base learning rates and takes them as they come. Whether it
adapts to a run shows in a replay: the same run under the mean of what the policy did with the other seeds (so there
is none with --seeds 1). Writes runs.jsonl (results already there are kept), table.md, plot.png and TensorBoard logs
to the folder --out.

Tasks are digits, mnist (which needs --data), the families of rlsched.envs.FAMILIES, and your own: module:NAME is an
InnerTask, or a sequence of them, in a module of this folder or an installed one.

examples:
  rlsched compare --tasks digits
  rlsched compare --policy runs/mine/policy.safetensors --tasks digits --steps 200 800 --seeds 5
  rlsched compare --tasks mnist --data path/to/mnist --steps 400 1000
  rlsched compare --tasks attention my_module:MY_TASK --out runs/mine/compare
"""
EXPORT = """\
Export the policy of a training run, finished or not, to a policy file: safetensors with JSON metadata, no pickle.
A checkpoint is a Stable-Baselines3 model and holds pickles: export only those that you trust.

examples:
  rlsched export runs/mine --out mine.safetensors
  rlsched export runs/mine/checkpoint.zip --out mine.safetensors
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 for wrong input, 130 when interrupted."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if (here := os.getcwd()) not in sys.path:  # for tasks as module:NAME; `python -m` has it there, the command has not
        sys.path.append(here)
    return exit_code(f"rlsched {options.verb}", lambda: options.run(options))


def exit_code(command: str, work: Callable[[], object]) -> int:
    """Do the work of a command; what went wrong is told in a line. Returns 0, 1 for wrong input, 130 if interrupted."""
    try:
        work()
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from here", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in EXTRAS:
            raise
        print(f"{command} needs {error.name}: pip install 'rlsched[train]'", file=sys.stderr)
        return 1
    except (ValueError, FileNotFoundError) as error:
        print(f"{command}: error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("rlsched", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"rlsched {rlsched.__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{train,compare,export}")

    def verb(name: str, summary: str, text: str, run: Any) -> argparse.ArgumentParser:
        raw = argparse.RawDescriptionHelpFormatter
        sub = verbs.add_parser(name, help=summary, description=text, formatter_class=raw)
        sub.set_defaults(run=run)
        return sub

    train = verb("train", "train a scheduling policy", TRAIN, _train)
    train.add_argument("--preset", default="default", help="where the other options start from: default, demo")
    train.add_argument("--run-dir", "--log-dir", help="folder of the run: checkpoint, TensorBoard log, policy file")
    _add_config_options(train)

    compare = verb("compare", "compare a policy with other schedules", COMPARE, _compare)
    shipped = ", ".join(available()) or "none"
    compare.add_argument("--policy", default="default", help=f"policy file, or a shipped policy ({shipped})")
    compare.add_argument("--tasks", "--task", nargs="+", default=["digits"], help="names, see above (default: digits)")
    compare.add_argument(
        "--optimizers", nargs="+", default=["sgd", "adam"], help="sgd, adam, adamw (default: sgd adam)"
    )
    compare.add_argument("--steps", nargs="+", type=int, default=[400], help="inner steps of a run (default: 400)")
    compare.add_argument("--seeds", type=int, default=3, help="runs of each kind (default: 3)")
    compare.add_argument("--data", type=Path, help="folder with the files of tasks that need them (mnist)")
    compare.add_argument("--out", "--log-dir", type=Path, default=Path("runs/compare"), help="(default: runs/compare)")

    export = verb("export", "export a policy file from a training run", EXPORT, _export)
    export.add_argument("source", type=Path, help="folder of a training run, or a checkpoint in it")
    export.add_argument("--out", type=Path, required=True, help=f"policy file to write, ending in {SUFFIX}")
    return parser


def _add_config_options(parser: argparse.ArgumentParser) -> None:
    """An option for each field of TrainConfig; needs the training extras only when training is asked for."""
    try:
        from rlsched.agents.config import TrainConfig
    except ModuleNotFoundError:
        return  # `train` itself will name what is missing
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
    from rlsched.agents.config import PRESETS, TrainConfig

    if options.preset not in PRESETS:
        raise ValueError(f"--preset must be one of {sorted(PRESETS)}, got {options.preset!r}")
    given = {field.name: getattr(options, field.name, None) for field in fields(TrainConfig)}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}
    return TrainConfig(**{"run_dir": f"runs/{options.preset}", **PRESETS[options.preset], **given})


def _train(options: argparse.Namespace) -> None:
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
        f"better in   {scores['share_better']:.0%} of the episodes"
    )


def _compare(options: argparse.Namespace) -> None:
    from rlsched.experiments.compare.analysis import report
    from rlsched.experiments.compare.run import RUNS, TENSORBOARD, Plan, compare
    from rlsched.experiments.table import PLOT, TABLE

    policy = SchedulePolicy.load(options.policy)
    torch.set_num_threads(min(2, torch.get_num_threads()))  # the networks are small: more cost more than they give
    plan = Plan(options.tasks, options.optimizers, options.steps, options.seeds, data=options.data)
    compare(plan, policy, options.out)
    print(report(options.out, policy.digest))
    print()
    for what, name in (("table", TABLE), ("plot", PLOT), ("results", RUNS), ("TensorBoard", TENSORBOARD)):
        print(f"{what:<11} {options.out / name}")


def _export(options: argparse.Namespace) -> None:
    from rlsched.agents.export import load_checkpoint

    policy = load_checkpoint(options.source)
    print(f"{policy.save(options.out)}: {policy!r}")


if __name__ == "__main__":
    sys.exit(main())
