"""What more workers bring, and when the learner is what holds them up: `python -m rlsched.experiments.speed.scale`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from stable_baselines3 import PPO

from rlsched.agents.config import TrainConfig
from rlsched.agents.vec_env import VectorEnvAdapter
from rlsched.cli import exit_code
from rlsched.envs import SchedulingVectorEnv
from rlsched.envs.groups import Array
from rlsched.envs.mixtures import mixture
from rlsched.envs.sharding import Make, Processes, Request, ShardedVectorEnv, Transport
from rlsched.experiments.table import markdown
from rlsched.files import write

DESCRIPTION = """\
Measure how many decisions a second 1, 2, … workers make, as processes and on Ray; what a step costs that only travels;
and what the learner takes. Writes scale.json and scale.md to the folder --out. Leave the machine alone meanwhile.
"""
CORES = (1, 8, 16, 32, 64, 128)  # of the table on paper
STEPS = TrainConfig.n_steps
TRAVELS = 20  # in a round


class Still(VectorEnv[Array, Array, Array]):
    """Shows what the environment showed at first, for ever, and trains nothing."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(self, observations: Array, infos: dict[str, Array], like: SchedulingVectorEnv) -> None:
        self.num_envs, self.shown = len(observations), (observations, infos)
        self.single_observation_space = like.single_observation_space
        self.single_action_space = like.single_action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Array, dict[str, Any]]:
        return self.shown

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        no = np.zeros(self.num_envs, bool)
        return self.shown[0], np.zeros(self.num_envs, np.float32), no, no, self.shown[1]


def measure(tasks: str, num_envs: int, numbers: Sequence[int], rounds: int, steps: int) -> dict[str, Any]:
    """Medians of rounds in which all take turns, so that what else runs on the machine is in all of them alike."""
    from rlsched.envs.cluster import Workers  # needs Ray, and the tables do not

    torch.set_num_threads(1)
    few = mixture(tasks)
    with closing(SchedulingVectorEnv(num_envs, few)) as env:
        still = Still(*env.reset(seed=0), env)
        actions = np.zeros(env.action_space.shape or (), np.float32)
        env.step(actions)
        core = [_seconds(lambda: env.step(actions), steps, time.process_time) for _ in range(rounds)]
    with ExitStack() as stack:
        workers = stack.enter_context(Workers(max(numbers)))
        engines: dict[str, Callable[[Sequence[Make]], Transport]] = {"processes": Processes, "ray": workers.transport}
        timed: dict[tuple[str, int], tuple[Callable[[], object], Callable[[], object]]] = {}
        for name, transport in engines.items():
            for number in numbers:
                sharded = ShardedVectorEnv(num_envs, few, processes=number, transport=transport)
                stack.callback(sharded.close)
                sharded.reset(seed=0)
                sharded.step(actions)
                carrier = transport([partial(_part, still, number)] * number)
                stack.callback(carrier.close)
                request: list[Request | None] = [("step", actions[: num_envs // number])] * number
                carrier.ask([("open", None)] * number)
                timed[name, number] = partial(sharded.step, actions), partial(carrier.ask, request)
        found: dict[tuple[str, int], list[tuple[float, ...]]] = {key: [] for key in timed}
        for _ in range(rounds):
            for key, (step, travel) in timed.items():
                cpu = time.process_time()
                travelled = _seconds(travel, TRAVELS)
                cpu = (time.process_time() - cpu) / TRAVELS
                found[key].append((_seconds(step, steps), travelled, cpu))
    model = PPO("MlpPolicy", VectorEnvAdapter(still), n_steps=STEPS, batch_size=2048, n_epochs=4, device="cpu")
    learner = [_seconds(lambda: model.learn(num_envs * STEPS), 1, time.process_time) for _ in range(rounds)]
    return {
        "tasks": tasks,
        "num_envs": num_envs,
        "load": os.getloadavg()[0],
        "core": float(np.median(core)),
        "learner": float(np.median(learner)),
        "engines": [
            {"engine": name, "workers": number, **dict(zip(("step", "travel", "packing"), medians, strict=True))}
            for (name, number), each in found.items()
            for medians in [np.median(each, 0).tolist()]
        ],
    }


def _part(still: Still, number: int) -> Still:
    """A shard of it."""
    size = still.num_envs // number
    observations, infos = still.shown
    return Still(observations[:size], {key: values[:size] for key, values in infos.items()}, still)  # type: ignore[arg-type]


def _seconds(call: Callable[[], object], calls: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Of one call."""
    start = clock()
    for _ in range(calls):
        call()
    return (clock() - start) / calls


def tables(found: dict[str, Any]) -> str:
    """What was measured, and what follows for more cores."""
    runs = found["num_envs"]
    rows = [
        [
            f"{e['engine']}, {e['workers']}",
            f"{runs / e['step']:,.0f}",
            f"{e['travel'] * 1000:.2f}",
            f"{e['packing'] * 1000:.2f}",
        ]
        for e in found["engines"]
    ]
    measured = markdown(["workers", "decisions/s", "ms of a step that only travels", "of the learner's core"], rows)
    return (
        f"Mixture {found['tasks']}, {runs} runs, medians of rounds in turns; load of the machine {found['load']:.1f}. "
        f"One core: {runs / found['core']:,.0f} decisions per second of its time; the learner (rollout and update of "
        f"{runs * STEPS:,} decisions): {found['learner']:.2f} s of its core.\n\n{measured}\n\n{paper(found)}"
    )


def paper(found: dict[str, Any]) -> str:
    """With more cores: while the workers train, the learner waits, and the other way round.

    What travels is packed and unpacked on the learner's core, in proportion to the decisions, as the update is.
    """
    runs = found["num_envs"]
    (alone,) = (e["packing"] for e in found["engines"] if e["engine"] == "ray" and e["workers"] == 1)
    environment, travel, learner = found["core"] / runs, alone / runs, found["learner"] / (runs * STEPS)  # s a decision
    rows = []
    for cores in CORES:
        seconds = environment / cores + travel + learner
        rows.append([str(cores), f"{1 / seconds:,.0f}", f"{environment / cores / seconds:.0%}"])
    table = markdown(["cores", "decisions/s", "time that they are busy"], rows)
    half = environment / (travel + learner)
    return (
        f"{table}\n\nHalf of the time at {half:.0f} cores; never more than {1 / (travel + learner):,.0f} decisions/s."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 for wrong input, 130 when interrupted."""
    name = "python -m rlsched.experiments.speed.scale"
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(name, description=DESCRIPTION, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("--out", type=Path, default=Path("docs/results/speed"), help="(default: docs/results/speed)")
    add("--tasks", default="mlp", help="mixture (default: mlp)")
    add("--num-envs", type=int, default=256, help="inner runs (default: 256)")
    add("--workers", type=int, nargs="+", default=[1, 2], help="numbers of them, 1 among these (default: 1 2)")
    add("--rounds", type=int, default=5, help="(default: 5)")
    add("--steps", type=int, default=5, help="of the environment in a round (default: 5)")
    options = parser.parse_args(arguments)

    def work() -> None:
        if 1 not in options.workers:
            raise ValueError(f"--workers must have 1 among them, got {options.workers}")
        found = measure(options.tasks, options.num_envs, options.workers, options.rounds, options.steps)
        write(options.out / "scale.json", f"{json.dumps(found, indent=2)}\n".encode())
        write(options.out / "scale.md", f"{tables(found)}\n".encode())
        print(tables(found))

    return exit_code(name, work, "interrupted: the same command begins anew")


if __name__ == "__main__":
    sys.exit(main())
