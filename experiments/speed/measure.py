"""The measurements. Each is a generator: of facts, when it has warmed up, and then of rounds.

It runs in a fresh process on one thread. A round counts the calls of one thing and the seconds that they took: of the
core, which other programs leave alone, and on the clock.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor, nn

from rlsched.agents.config import TrainConfig
from rlsched.agents.ppo import train
from rlsched.agents.vec_env import VectorEnvAdapter
from rlsched.control import CONTROLS
from rlsched.envs import FAMILIES, InnerTask, SchedulingEnv, SchedulingVectorEnv
from rlsched.envs.training import InnerTraining
from rlsched.experiments.journal import Row
from rlsched.experiments.speed.plan import POINTS, Measurement, Perceptron

WARM_UP = 2  # calls before the first round, after a first one that may compile
_rounds: Iterator[Row]  # of the one measurement in this process


def begin(measurement: Measurement, cache: str) -> Row:
    """Start the measurement of this process, and return its facts; compiled code goes to a new folder in `cache`."""
    global _rounds
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(dir=cache)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    _rounds = KINDS[measurement.kind](measurement)
    return next(_rounds)


def proceed() -> Row | None:
    """Its next round; None when there is no more."""
    return next(_rounds, None)


def _environments(m: Measurement) -> Iterator[Row]:
    """A window of `size` networks as one environment."""
    task = _inner_task(m)
    env = SchedulingVectorEnv(m.size, [task], compile=m.compile)
    reset = _timed(lambda: env.reset(seed=0))
    _spread_ends(env)
    step = partial(env.step, np.zeros((m.size, len(CONTROLS)), np.float32))
    first_step = _timed(step)
    yield {
        "inner_steps": m.size * task.interval,
        "interval": task.interval,
        "parameters": _training(env).networks.params.shape[1],
        "reset": reset,
        "first_step": first_step,
    }
    yield from _repeated(step, m)


def _eight(m: Measurement) -> Iterator[Row]:
    """A window of `size` environments with one network each, under `DummyVecEnv`."""
    task = _inner_task(m)
    env = DummyVecEnv([partial(SchedulingEnv, [task])] * m.size)
    env.seed(0)
    env.reset()
    for single in env.envs:
        assert isinstance(single, SchedulingEnv)
        _spread_ends(single._batch)
    yield {"inner_steps": m.size * task.interval}
    yield from _repeated(partial(env.step, np.zeros((m.size, len(CONTROLS)), np.float32)), m)


def _loop(m: Measurement) -> Iterator[Row]:
    """A step of one network in plain PyTorch: clipped SGD with momentum, and nothing that is observed."""
    p = _perceptron(m)
    inputs, labels = torch.randn(POINTS, p.inputs), torch.randint(p.classes, (POINTS,))
    network = nn.Sequential(nn.Linear(p.inputs, p.hidden), nn.ReLU(), nn.Linear(p.hidden, p.classes))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        rows = torch.randint(POINTS, (p.batch_size,))
        loss = nn.functional.cross_entropy(network(inputs[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    yield {"inner_steps": 1}
    yield from _repeated(step, m)


def _matmul(m: Measurement) -> Iterator[Row]:
    """The matrix products of an inner step of `size` networks, and nothing else."""
    p, n = _perceptron(m), m.size
    x, first, second = torch.randn(n, p.batch_size, p.inputs), *_weights(n, p)
    hidden, d_hidden = torch.empty(2, n, p.batch_size, p.hidden)
    outputs = torch.empty(n, p.batch_size, p.classes)
    d_first, d_second = torch.empty_like(first), torch.empty_like(second)

    def step() -> None:
        torch.bmm(x, first.mT, out=hidden)
        torch.bmm(hidden, second.mT, out=outputs)
        torch.bmm(outputs.mT, hidden, out=d_second)
        torch.bmm(outputs, second, out=d_hidden)
        torch.bmm(d_hidden.mT, x, out=d_first)

    yield {"inner_steps": n}
    yield from _repeated(step, m)


def _square(m: Measurement) -> Iterator[Row]:
    """One large matrix product, of matrices `size` × `size`."""
    a, b = torch.randn(2, m.size, m.size)
    product = torch.empty_like(a)
    yield {"flops": 2 * m.size**3}
    yield from _repeated(lambda: torch.mm(a, b, out=product), m)


def _memory(m: Measurement) -> Iterator[Row]:
    """The memory that `size` networks take, after a reset and two windows. Has no rounds."""
    task = _inner_task(m)
    _two_windows(1, task)  # what Python and torch load when they are first used is not the networks' own
    before, _ = _resident()
    training = _training(_two_windows(m.size, task))
    after, peak = _resident()
    yield {
        "parameters": training.networks.params.shape[1],
        "tensors": training.nbytes,
        "process": before,
        "resident": after - before,
        "peak": peak - before,
    }


def _training_share(m: Measurement) -> Iterator[Row]:
    """An update of PPO with `size` inner runs. A round has the core's seconds of its three parts.

    The update before the first round is left out: there is an evaluation in it, and maybe a compilation.
    """
    assert isinstance(m.task, str)
    rollout = m.size * TrainConfig.n_steps
    updates: list[Row] = []
    spent: dict[str, float] = {}

    def timed(owner: Any, name: str, part: str) -> Any:
        method = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            start = time.process_time()
            result = method(*args, **options)
            spent[part] = spent.get(part, 0.0) + time.process_time() - start
            if part == "update":
                spent["rollout"] -= spent["environment"]
                updates.append(dict(spent))
                spent.clear()
            return result

        return mock.patch.object(owner, name, call)

    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(timed(VectorEnvAdapter, "step_wait", "environment"))
        stack.enter_context(timed(PPO, "collect_rollouts", "rollout"))
        stack.enter_context(timed(PPO, "train", "update"))
        train(
            TrainConfig(
                run_dir=folder,
                tasks=m.task,
                num_envs=m.size,
                processes=1,
                compile=m.compile,
                batch_size=min(TrainConfig.batch_size, rollout),
                timesteps=(1 + m.rounds) * rollout,
                eval_episodes=1,
            )
        )
    yield {"decisions": rollout}
    yield from updates[1:]


KINDS: Mapping[str, Callable[[Measurement], Iterator[Row]]] = {
    "environments": _environments,
    "eight": _eight,
    "loop": _loop,
    "matmul": _matmul,
    "square": _square,
    "memory": _memory,
    "training": _training_share,
}


def _repeated(call: Callable[[], object], m: Measurement) -> Iterator[Row]:
    _timed(call, calls=WARM_UP)
    while True:
        yield _timed(call, calls=2, seconds=m.seconds)


def _timed(call: Callable[[], object], calls: int = 1, seconds: float = 0.0) -> Row:
    """Call as often as it takes for so many calls and so many seconds."""
    done, cpu, wall = 0, time.process_time(), time.perf_counter()
    while done < calls or time.perf_counter() - wall < seconds:
        call()
        done += 1
    return {"calls": done, "cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}


def _spread_ends(env: SchedulingVectorEnv) -> None:
    """Put every run's clock to a random window of its episode, so that episodes end, and resets come, all the time."""
    (group,) = env._groups
    interval = group.training.task.interval
    windows = (group.run.total_steps - 1) / interval
    steps = 1 + interval * (windows * torch.rand_like(windows)).floor()
    group.state = group.state._replace(step=steps)


def _training(env: SchedulingVectorEnv) -> InnerTraining:
    (group,) = env._groups
    return group.training


def _two_windows(size: int, task: InnerTask) -> SchedulingVectorEnv:
    env = SchedulingVectorEnv(size, [task])
    env.reset(seed=0)
    for _ in range(2):
        env.step(np.zeros((size, len(CONTROLS)), np.float32))
    return env


def _resident() -> tuple[int, int]:
    """Bytes of memory that this process occupies, and the most that it has ever had. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    status = {line.split()[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return 1024 * int(status["VmRSS:"]), 1024 * int(status["VmHWM:"])


def _weights(n: int, p: Perceptron) -> tuple[Tensor, Tensor]:
    return torch.randn(n, p.hidden, p.inputs), torch.randn(n, p.classes, p.hidden)


def _inner_task(m: Measurement) -> InnerTask:
    return m.task.task() if isinstance(m.task, Perceptron) else FAMILIES[m.task]


def _perceptron(m: Measurement) -> Perceptron:
    assert isinstance(m.task, Perceptron)
    return m.task
