"""The `rlsched` command."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import rlsched

if TYPE_CHECKING:
    from rlsched.agents import TrainConfig

# Verbs import what they need: torch takes seconds, in which Ctrl-C should be heard, and `--version` needs nothing.
DESCRIPTION = "Learned schedules for PyTorch optimizers: train a scheduling policy, and compare it with others."
INTERRUPTED = "interrupted: the same command goes on from here"
BEGINS_ANEW = "interrupted: the same command begins anew"
EXTRAS = {  # the extra that brings a package
    **dict.fromkeys(("gymnasium", "stable_baselines3", "sb3_contrib", "tensorboard"), "train"),
    **dict.fromkeys(("scipy", "sklearn", "matplotlib", "tqdm"), "train"),
    "captum": "analysis",
}

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
is none with --seeds 1). Writes runs.jsonl (results already there are kept, another policy's beside them), table.md,
plot.png and a TensorBoard log, with a run for each schedule, to the folder --out.

Tasks are digits, mnist (which needs --data), the families of rlsched.envs.FAMILIES, and your own: module:NAME is an
InnerTask, or a sequence of them, in a module of this folder or an installed one.

examples:
  rlsched compare --tasks digits
  rlsched compare --policy runs/mine/policy.safetensors --tasks digits --steps 200 800 --seeds 5
  rlsched compare --tasks mnist --data path/to/mnist --steps 400 1000
  rlsched compare --tasks attention my_module:MY_TASK --out runs/mine-compare
"""
EXPORT = """\
Export the policy of a training run, finished or not, to a policy file: safetensors with JSON metadata, no pickle.
A checkpoint is a Stable-Baselines3 model and holds pickles: export only those that you trust.

examples:
  rlsched export runs/mine --out mine.safetensors
  rlsched export runs/mine/checkpoint.zip --out mine.safetensors
"""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does: worker processes are not left behind."""


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that says in a line what is wrong.

    Args:
        fill: gives it its arguments, not before it is to parse any.
    """

    def __init__(self, *args: Any, fill: Callable[[Parser], None] | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.fill = fill

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        fill, self.fill = self.fill, None
        if fill is not None:
            with _importing():
                fill(self)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 for wrong input, 130 when interrupted and 143 when terminated."""
    options = argparse.Namespace()
    if (here := os.getcwd()) not in sys.path:  # for tasks as module:NAME; `python -m` has it there, the command has not
        sys.path.append(here)
    wrong = exit_code("rlsched", lambda: _parser().parse_args(arguments, options))
    if wrong:
        return wrong
    interrupted = BEGINS_ANEW if options.verb in ("export", "explain") else INTERRUPTED
    return exit_code(f"rlsched {options.verb}", lambda: options.run(options), interrupted)


def exit_code(command: str, work: Callable[[], object], interrupted: str = INTERRUPTED) -> int:
    """Do the work of a command; what went wrong, or that it was `interrupted`, is told in a line.

    Returns:
        0, 1 for wrong input, 130 if it was interrupted, 143 if it was terminated.
    """
    try:
        with _answering(_terminate, signal.SIGTERM), _quiet_threads():
            work()
    except KeyboardInterrupt as interrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        return 143 if isinstance(interrupt, Terminated) else 130
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        extra = EXTRAS.get(package)
        if extra is None:
            raise
        print(f"{command} needs {package}: pip install 'rlsched[{extra}]'", file=sys.stderr)
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"{command}: error: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"{command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _terminate(number: int, frame: object) -> NoReturn:
    raise Terminated


def _leave(number: int, frame: object) -> NoReturn:
    os.write(2, f"\n{INTERRUPTED}\n".encode())  # the standard error, whatever `sys.stderr` is in the midst of
    os._exit(128 + number)


@contextmanager
def _answering(answer: Callable[[int, object], object], *signals: int) -> Iterator[None]:
    """Inside, these signals are answered like this, if they are not ignored."""
    if threading.current_thread() is not threading.main_thread():  # which alone may say what signals do
        yield
        return
    heard = [number for number in signals if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, answer) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _importing() -> AbstractContextManager[None]:
    """Inside, signals end the process where it is: nothing is begun yet, and what is written in C++, as it is imported,
    aborts at an exception that comes from nowhere."""
    return _answering(_leave, signal.SIGINT, signal.SIGTERM)


@contextmanager
def _quiet_threads() -> Iterator[None]:
    """Inside, threads say nothing of a full disk: TensorBoard's raises that error in the main thread as well."""
    before = threading.excepthook

    def tell(arguments: threading.ExceptHookArgs) -> None:
        if not issubclass(arguments.exc_type, OSError):
            before(arguments)

    threading.excepthook = tell
    try:
        yield
    finally:
        threading.excepthook = before


def _parser() -> Parser:
    parser = Parser("rlsched", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"rlsched {rlsched.__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{train,compare,benchmark,export,explain}")
    for name, summary, text, fill, run in (
        ("train", "train a scheduling policy", TRAIN, _train_options, _train),
        ("compare", "compare a policy with other schedules", COMPARE, _compare_options, _compare),
        ("benchmark", "measure policies on a suite of tasks", None, _benchmark_options, _benchmark),
        ("export", "export a policy file from a training run", EXPORT, _export_options, _export),
        ("explain", "why a policy decides as it does", None, _explain_options, _explain),
    ):
        raw = argparse.RawDescriptionHelpFormatter
        verb = verbs.add_parser(name, help=summary, description=text, formatter_class=raw, fill=fill)
        verb.set_defaults(run=run)
    return parser


def _compare_options(parser: Parser) -> None:
    from rlsched.policy import available

    shipped = ", ".join(available()) or "none"
    parser.add_argument("--policy", default="default", help=f"policy file, or a shipped policy ({shipped})")
    parser.add_argument("--tasks", "--task", nargs="+", default=["digits"], help="names, see above (default: digits)")
    parser.add_argument("--optimizers", nargs="+", default=["sgd", "adam"], help="sgd, adam, adamw (default: sgd adam)")
    parser.add_argument("--steps", nargs="+", type=int, default=[400], help="inner steps of a run (default: 400)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind (default: 3)")
    parser.add_argument("--data", type=Path, help="folder with the files of tasks that need them (mnist)")
    parser.add_argument("--out", "--log-dir", type=Path, default=Path("runs/compare"), help="(default: runs/compare)")
    parser.add_argument("--log-runs", action="store_true", help="also log each run of the first seed for TensorBoard")


def _benchmark_options(parser: Parser) -> None:
    from rlsched.experiments.benchmark.command import add_options

    add_options(parser)


def _explain_options(parser: Parser) -> None:
    from rlsched.experiments.explain.command import add_options

    add_options(parser)


def _export_options(parser: Parser) -> None:
    from rlsched.policy import SUFFIX

    parser.add_argument("source", type=Path, help="folder of a training run, or a checkpoint in it")
    parser.add_argument("--out", type=Path, required=True, help=f"policy file to write, ending in {SUFFIX}")


def _train_options(parser: Parser) -> None:
    """Beside its own, an option for each field of TrainConfig."""
    from rlsched.agents.config import TrainConfig

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
    from rlsched.agents.config import PRESETS, TrainConfig

    if options.preset not in PRESETS:
        raise ValueError(f"--preset must be one of {sorted(PRESETS)}, got {options.preset!r}")
    given = {field.name: getattr(options, field.name, None) for field in fields(TrainConfig)}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}
    return TrainConfig(**{"run_dir": f"runs/{options.preset}", **PRESETS[options.preset], **given})


def _train(options: argparse.Namespace) -> None:
    with _importing():
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


def _compare(options: argparse.Namespace) -> None:
    with _importing():
        import torch

        from rlsched.experiments.compare.analysis import report
        from rlsched.experiments.compare.run import RUNS, TENSORBOARD, Plan, compare
        from rlsched.experiments.table import PLOT, TABLE
        from rlsched.policy import SchedulePolicy

    policy = SchedulePolicy.load(options.policy)
    torch.set_num_threads(min(2, torch.get_num_threads()))  # the networks are small: more cost more than they give
    plan = Plan(options.tasks, options.optimizers, options.steps, options.seeds, data=options.data)
    compare(plan, policy, options.out, str(options.policy), log_runs=options.log_runs)
    print(report(options.out))
    print()
    for what, name in (("table", TABLE), ("plot", PLOT), ("results", RUNS), ("TensorBoard", TENSORBOARD)):
        print(f"{what:<11} {options.out / name}")


def _benchmark(options: argparse.Namespace) -> None:
    from rlsched.experiments.benchmark.command import benchmark

    benchmark(options)


def _explain(options: argparse.Namespace) -> None:
    with _importing():
        from rlsched.experiments.explain.command import explain

    explain(options)


def _export(options: argparse.Namespace) -> None:
    with _importing():
        from rlsched.agents.exporting import load_checkpoint
        from rlsched.policy import SUFFIX

    if options.out.suffix != SUFFIX:
        raise ValueError(f"--out must end in {SUFFIX}, got {str(options.out)!r}")
    policy = load_checkpoint(options.source)
    print(f"{policy.save(options.out)}: {policy!r}")


if __name__ == "__main__":
    sys.exit(main())
