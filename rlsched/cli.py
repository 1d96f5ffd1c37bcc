"""The `rlsched` command."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, NoReturn

import rlsched

# Verbs import what they need: torch takes seconds, in which Ctrl-C should be heard, and `--version` needs nothing.
DESCRIPTION = "Learned schedules for PyTorch optimizers: train a scheduling policy, and compare it with others."
INTERRUPTED = "interrupted: the same command goes on from here"
BEGINS_ANEW = "interrupted: the same command begins anew"
EXTRAS = {  # the extra that brings a package
    **dict.fromkeys(("gymnasium", "stable_baselines3", "sb3_contrib", "tensorboard"), "train"),
    **dict.fromkeys(("scipy", "sklearn", "matplotlib", "tqdm"), "train"),
    "captum": "analysis",
}


@dataclass(frozen=True)
class Verb:
    """What the command can do.

    Args:
        name: of the verb.
        summary: what it does, in a line.
        module: has `add_options(parser)`, `run(options)`, and `NEEDS`, the modules that take long to import for it.
        resumes: whether the same command goes on from where it was interrupted.
    """

    name: str
    summary: str
    module: str
    resumes: bool = True


VERBS = {
    verb.name: verb
    for verb in (
        Verb("train", "train a scheduling policy", "rlsched.agents.commands.train"),
        Verb("compare", "compare a policy with other schedules", "rlsched.experiments.compare.command"),
        Verb("benchmark", "measure policies on a suite of tasks", "rlsched.experiments.benchmark.command"),
        Verb("export", "export a policy file from a training run", "rlsched.agents.commands.export", resumes=False),
        Verb("explain", "why a policy decides as it does", "rlsched.experiments.explain.command", resumes=False),
    )
}


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
    verb = VERBS[options.verb]
    return exit_code(f"rlsched {verb.name}", lambda: _run(verb, options), INTERRUPTED if verb.resumes else BEGINS_ANEW)


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
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{" + ",".join(VERBS) + "}")
    for verb in VERBS.values():
        fill = partial(_fill, verb)
        verbs.add_parser(verb.name, help=verb.summary, formatter_class=argparse.RawDescriptionHelpFormatter, fill=fill)
    return parser


def _fill(verb: Verb, parser: Parser) -> None:
    import_module(verb.module).add_options(parser)


def _run(verb: Verb, options: argparse.Namespace) -> None:
    command = import_module(verb.module)
    with _importing():
        for name in command.NEEDS:
            import_module(name)
    command.run(options)


if __name__ == "__main__":
    sys.exit(main())
