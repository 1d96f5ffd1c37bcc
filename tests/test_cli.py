"""The `rlsched` command."""

import importlib
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

import rlsched
from rlsched import SchedulePolicy
from rlsched.agents.exporting import CHECKPOINT
from rlsched.cli import VERBS, main
from rlsched.envs import SetupDistribution
from rlsched.envs.mixtures import classifier
from rlsched.envs.sources import TeacherStudent
from rlsched.files import locked

SOURCE = TeacherStudent(inputs=6, classes=3, points=(32, 64), validation_points=16)
TASK = classifier(SOURCE, (8,), batch_size=8, interval=4, setup=SetupDistribution(decisions=(6, 9)))
SIZES = {"num-envs": 8, "n-steps": 4, "batch-size": 16, "timesteps": 64, "processes": 1, "eval-episodes": 4}
TINY = ["--tasks", f"{__name__}:TASK", *(word for name, value in SIZES.items() for word in (f"--{name}", str(value)))]

CHOICES = "{" + ",".join(VERBS) + "}"

BROKEN = """
import torch
from rlsched.envs import InnerTask

TASK = InnerTask(lambda: 1 / 0, (torch.ones(20, 3), torch.arange(20) % 4))
"""
MODULE = """
from functools import partial
import torch
from torch import nn
from rlsched.envs import InnerTask, SetupDistribution

POINTS = torch.linspace(-1, 1, 60).view(20, 3), torch.arange(20) % 4
MINE = InnerTask(partial(nn.Linear, 3, 4), POINTS, batch_size=4, interval=4, setup=SetupDistribution(decisions=(3, 5)))
"""


def test_train_compare_export_work_on_each_others_output(tmp_path, capsys):
    """The three verbs are one path for a newcomer: what one writes the next must read."""
    run_dir, out = tmp_path / "run", tmp_path / "compare"
    assert main(["train", "--run-dir", str(run_dir), *TINY]) == 0
    printed = capsys.readouterr().out
    policy_file = run_dir / "policy.safetensors"
    assert str(policy_file) in printed
    exported = tmp_path / "exported.safetensors"
    assert main(["export", str(run_dir), "--out", str(exported)]) == 0
    assert SchedulePolicy.load(exported).digest == SchedulePolicy.load(policy_file).digest
    arguments = [
        "--policy",
        str(policy_file),
        "--steps",
        "5",
        "--seeds",
        "1",
        "--optimizers",
        "adam",
        "--out",
        str(out),
    ]
    assert main(["compare", *arguments]) == 0
    assert torch.get_num_threads() == 1, "the user had chosen it: two on a busy machine can be ten times slower"
    printed = capsys.readouterr().out
    assert "digits, adam, 5 steps" in printed
    for name in ("table.md", "plot.png", "runs.jsonl", "tensorboard"):
        assert str(out / name) in printed
        assert (out / name).exists()


def test_tasks_in_a_module_of_this_folder(tmp_path, monkeypatch, capsys):
    """The installed command, unlike `python -m`, does not look there by itself; a user's own tasks lie nowhere else."""
    (tmp_path / "my_tasks_here.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    monkeypatch.delitem(sys.modules, "my_tasks_here", raising=False)
    monkeypatch.setattr("rlsched.agents.tensorboard.episode_picture", lambda *_: Figure((1, 1)))  # takes seconds
    sizes = [word for word in TINY if word not in TINY[:2]]
    options = ["--observations", "progress", "loss_trend", "--controls", "lr", "clip", "--hidden", "4"]
    assert main(["train", "--run-dir", "run", "--tasks", "my_tasks_here:MINE", *sizes, *options]) == 0
    policy = SchedulePolicy.load("run/policy.safetensors")
    assert (policy.observations, policy.controls) == (("progress", "loss_trend"), ("lr", "clip"))
    compared = ["--tasks", "my_tasks_here:MINE", "--steps", "4", "--seeds", "1", "--optimizers", "sgd", "--out", "out"]
    assert main(["compare", "--policy", "run/policy.safetensors", *compared]) == 0
    assert "my_tasks_here:MINE, sgd, 4 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--preset", "huge"], "preset"),
        (["train", "--tasks", "imagenet"], "tasks"),
        (["train", "--timesteps", "0"], "timesteps"),
        (["train", "--reward", "loss"], "reward"),
        (["train", "--device", "nowhere"], "device"),
        (["train", "--observations", "progress", "mood"], "observations"),
        (["train", "--controls", "mood"], "controls"),
        (["train", "--base-schedule", "mood"], "base_schedule"),
        (["train", "--actor", "mood"], "actor"),
        (["train", "--seed", "-1"], "seed must be a whole number, between 0 and 4294967295, got -1"),
        (["train", "--gae-lambda", "1.5"], "gae_lambda must be between 0 and 1, got 1.5"),
        (["train", "--learning-rate", "nan"], "learning_rate must be positive and finite, got nan"),
        (["train", "--log-std-init", "inf"], "log_std_init must be between -20 and 2, got inf"),
        (["train", "--tasks", "json:dumps"], "tasks must be an InnerTask or a sequence of them"),
        (["train", "--tasks", "broken_module:TASK"], "cannot be imported, ZeroDivisionError: division by zero"),
        (["train", "--tasks", "broken_tasks:TASK"], "fails on its own data, ZeroDivisionError: division by zero"),
        (["train", *TINY, "--run-dir", "file"], "file: must be a folder, and a file is in the way"),
        (["train", *TINY, "--run-dir", "file/inside"], "must be a folder, and a file is in the way"),
        (["train", *TINY, "--run-dir", "/proc/run"], "/proc/run: No such file or directory"),
        (["compare", "--policy", "nothing.safetensors"], "nothing.safetensors"),
        (["compare", "--policy", "nobody"], "nobody"),
        (["compare", "--tasks", "imagenet"], "tasks"),
        (["compare", "--tasks", "json:dumps"], "tasks must be an InnerTask or a sequence of them"),
        (["compare", "--tasks", "broken_module:TASK"], "cannot be imported, ZeroDivisionError: division by zero"),
        (["compare", "--tasks", "digits", "broken_tasks:TASK"], "fails on its own data, ZeroDivisionError"),
        (["compare", "--seeds", "-1"], "seeds must be a whole number of at least 1, got -1"),
        (["compare", "--steps", "0"], "steps must be"),
        (["compare", "--out", "file"], "file: must be a folder, and a file is in the way"),
        (["compare", "--out", "/proc/out"], "/proc/out: No such file or directory"),
        (["compare", "--policy", "file.safetensors"], "file.safetensors is not a whole policy file"),
        (["compare", "--tasks", "mnist"], "--data"),
        (["compare", "--tasks", "mnist", "--data", "nowhere"], "nowhere"),
        (["export", "nowhere", "--out", "x.safetensors"], "nowhere"),
        (["export", "nowhere", "--out", "x.pt"], "--out must end in .safetensors, got 'x.pt'"),
    ],
)
def test_wrong_input_is_one_clear_line_and_claims_no_folder(arguments, message, tmp_path, monkeypatch, capsys):
    """A traceback hides which argument was wrong; and what is wrong in the first try should not matter to the next."""
    monkeypatch.chdir(tmp_path)
    files = {"file": "", "file.safetensors": "", "broken_module.py": "1 / 0", "broken_tasks.py": BROKEN}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert main(arguments) == 1
    *_, error = capsys.readouterr().err.strip().splitlines()
    assert error.startswith(f"rlsched {arguments[0]}: error: ")
    assert message in error
    assert {path.name for path in tmp_path.iterdir()} == files.keys()
    sys.modules.pop("broken_tasks", None)


@pytest.mark.parametrize("arguments, message", [
    ([], f"rlsched: error: the following arguments are required: {CHOICES} (see rlsched --help)"),
    (["tun"], f"rlsched: error: argument {CHOICES}: invalid choice: 'tun'"),
    (["train", "--timesteps", "1e6"], "rlsched train: error: argument --timesteps: invalid int value: '1e6'"),
    (["compare", "--steps", "nan"], "rlsched compare: error: argument --steps: invalid int value: 'nan'"),
    (["export", "runs/mine"], "rlsched export: error: the following arguments are required: --out"),
])  # fmt: skip
def test_command_that_is_not_understood_is_told_in_a_line(arguments, message, capsys):
    """The usage of twenty options hides which of them was wrong."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)


def test_second_training_and_comparison_in_a_folder_say_who_has_it(tmp_path, capsys):
    """Both would write to the same files."""
    out = ["--out", str(tmp_path), "--steps", "4", "--seeds", "1"]
    for arguments in (["train", "--run-dir", str(tmp_path), *TINY], ["compare", *out]):
        with locked(tmp_path):
            assert main(arguments) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(f"rlsched {arguments[0]}: error: {tmp_path}: in use by process {os.getpid()} on ")


def test_full_disk_is_one_clear_line(tmp_path, monkeypatch, capsys):
    """TensorBoard's thread would print a traceback, and what is full would have to be guessed."""
    run_dir, out = tmp_path / "run", tmp_path / "compare"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))  # nobody can write more to a file
    try:
        assert main(["train", "--run-dir", str(run_dir), *TINY]) == 1
        *_, told = capsys.readouterr().err.strip().splitlines()
        assert told in [f"rlsched train: error: {where}: File too large" for where in (run_dir, run_dir / CHECKPOINT)]
        assert main(["compare", "--steps", "50", "--seeds", "1", "--out", str(out)]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err
    assert said.strip().splitlines()[-1].startswith(f"rlsched compare: error: {out}")
    assert "Traceback" not in said and "Exception in thread" not in said


@pytest.mark.parametrize("verb", ["train", "compare", "benchmark", "export", "explain"])
def test_help_has_examples(verb, capsys):
    """Somebody who asks for help wants a line to copy."""
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "examples:" in printed
    assert f"rlsched {verb}" in printed


def test_interrupt_is_no_traceback(monkeypatch, capsys):
    """Ctrl-C during a long training should say how to go on."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("rlsched.agents.commands.train.run", interrupt)
    assert main(["train"]) == 130
    assert "same command" in capsys.readouterr().err


def test_termination_is_an_interrupt(monkeypatch, capsys):
    """A batch system that ends a training would leave its worker processes behind."""
    before = signal.getsignal(signal.SIGTERM)

    def terminate(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr("rlsched.agents.commands.export.run", terminate)
    assert main(["export", "run", "--out", "x.safetensors"]) == 143
    assert "same command" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def started():
    """Starts a command in a process group of its own, which hears SIGINT even where the tests, in a background, do not.

    At the end the group is killed.
    """
    processes = []

    def start(*arguments):
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            command = [sys.executable, "-m", "rlsched", *map(str, arguments)]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            processes.append(subprocess.Popen(command, **pipes, start_new_session=True))
        finally:
            signal.signal(signal.SIGINT, before)
        return processes[-1]

    yield start
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_training_ends_at_once_with_a_worker_that_is_stopped(how, started, tmp_path):
    """Whoever presses Ctrl-C wants the terminal back, and no processes that stay; a batch system kills after a while.

    SIGINT reaches the workers as well, as it does from a terminal.
    """
    run_dir = tmp_path / "run"
    sizes = [*TINY[2:], "--timesteps", 10**6, "--processes", 2]
    process = started("train", "--run-dir", run_dir, "--tasks", "small", *sizes)
    while not (run_dir / "checkpoint.zip").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    workers = [pid for pid in children(process.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[0], signal.SIGSTOP)
    time.sleep(0.5)
    start = time.perf_counter()
    (os.killpg if how == signal.SIGINT else os.kill)(process.pid, how)
    _, said = process.communicate(timeout=60)
    assert time.perf_counter() - start < 3
    assert process.returncode == (130 if how == signal.SIGINT else 143)
    assert said.strip().splitlines()[-1] == "interrupted: the same command goes on from here"
    assert "Traceback" not in said
    assert len(workers) >= 2 and not any(is_running(pid) for pid in workers)


def children(parent):
    """The process ids of a process's children."""
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def is_running(pid):
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("delay", [0.0, 0.5])
def test_interrupt_while_it_imports_is_no_traceback(delay, how, started, tmp_path):
    """The imports take seconds, and a mistake in a command is seen in the first of them.

    An exception from a signal, in the midst of the C++ that torch imports, would end in an abort.
    """
    process = started("compare", "--out", tmp_path)
    while "torch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + how and "Traceback" not in said


def test_version_does_not_wait_for_torch(capsys):
    """Bug reports need it, and scripts that ask for it wait for nothing that they do not need."""
    with pytest.raises(SystemExit):
        main(["--version"])
    assert rlsched.__version__ in capsys.readouterr().out
    code = "import atexit, sys; atexit.register(lambda: print(*sys.modules)); from rlsched.cli import main; main()"
    command = [sys.executable, "-c", code, "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    version, loaded = said.splitlines()
    assert version == f"rlsched {rlsched.__version__}"
    assert {"torch", "numpy", "gymnasium"}.isdisjoint(loaded.split())


@pytest.mark.parametrize(("verb", "said"), [("explain", "begins anew"), ("compare", "goes on from here")])
def test_interrupted_work_is_not_said_to_be_kept_where_it_is_not(verb, said, monkeypatch, capsys):
    """Who believes it waits for the whole time once more."""

    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"{VERBS[verb].module}.run", interrupt)
    assert main([verb, *(["default"] if verb == "explain" else [])]) == 130
    assert capsys.readouterr().err.strip() == f"interrupted: the same command {said}"


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_verb_says_what_it_needs(verb):
    """Ctrl-C while torch is imported, by the verb itself, can abort the process with a dump of C++ frames."""
    command = importlib.import_module(verb.module)
    for name in command.NEEDS:
        importlib.import_module(name)
    assert callable(command.add_options) and callable(command.run)
