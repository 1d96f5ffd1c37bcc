"""What a policy is worth: episodes played to their end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import trim_mean
from tqdm import tqdm

from rlsched.envs import InnerTask, SchedulingVectorEnv
from rlsched.envs.mixtures import mixture
from rlsched.policy import Policy, SchedulePolicy


class Evaluation(NamedTuple):
    """Episodes played by one policy."""

    returns: NDArray[np.float64]  # (episodes,): log(first / last validation loss), in [−2, 20]
    diverged: NDArray[np.bool_]  # (episodes,): ended by a loss or weight that is not finite
    observations: NDArray[np.float32]  # (timesteps of all episodes, observations)
    paths: dict[
        str, list[NDArray[Any]]
    ]  # of each info: for each episode, its values at every decision, float64 or text
    episodes: NDArray[np.int64]  # (timesteps of all episodes,): whose observation it is, counted from 0

    @property
    def mean_return(self) -> float:
        return float(self.returns.mean())


def scores(policy: Evaluation, zero: Evaluation, tuned: NDArray[np.float64]) -> dict[str, float]:
    """What a policy is worth beside the base schedule, as it is and as it is `tuned`, on the same episodes."""
    gains = policy.returns - zero.returns
    return {
        "return": policy.mean_return,
        "return_of_zero_policy": zero.mean_return,
        "gain": float(gains.mean()),
        "median_gain": float(np.median(gains)),
        "share_better": float((gains > 0).mean()),
        "diverged": float(policy.diverged.mean()),
        "regret": float(trim_mean(tuned - policy.returns, 0.25)),  # what is missing, interquartile mean
    }


def environment_options(policy: Policy) -> dict[str, Any]:
    """The arguments of an environment that shows a policy what it asks for, and lets it move what it moves."""
    return {
        "observations": policy.observations,
        "controls": policy.controls,
        "base_schedule": policy.base_schedule,
        "safe_start": policy.safe_start,
    }


# Quantiles of the range of base learning rates, four to five decades: the upper three, by about half of one.
SWEEP = (0.35, 0.46, 0.57, 0.68, 0.78, 0.89, 1.0)


def references(
    base_schedule: str, make: Callable[..., Any], *, episodes: int, seed: int
) -> tuple[Evaluation, NDArray[np.float64]]:
    """What a policy is held against: the base schedule as it is, and its returns as it is `tuned`, (episodes,).

    Args:
        base_schedule: its name.
        make, episodes, seed: as of `tuned`.
    """
    zero = SchedulePolicy.zero(base_schedule)
    with closing(make(episodes, **environment_options(zero))) as env:
        evaluation = evaluate(zero, seed=seed, env=env)
    return evaluation, tuned(zero, make, episodes=episodes, seed=seed)


def tuned(zero: Policy, make: Callable[..., Any], *, episodes: int, seed: int) -> NDArray[np.float64]:
    """The return of the base schedule with the best of several base learning rates, (episodes,).

    It is what a policy's return is to be compared with: what a user has who tunes the learning rate of each task.

    Args:
        zero: follows the base schedule.
        make: makes the vector environment, from the number of its runs and options of `SchedulingVectorEnv`.
        episodes, seed: those of `evaluate`, for the same episodes.
    """
    clones = len(SWEEP)
    options: dict[str, Any] = {"clones": clones, "sweep": SWEEP, **environment_options(zero)}
    with closing(make(clones * episodes, **options)) as env:
        returns = evaluate(zero, seed=seed, env=env).returns
    return returns.reshape(episodes, clones).max(1)


def evaluate(
    policy: Policy,
    tasks: str | InnerTask | Sequence[InnerTask] = "mlp",
    *,
    episodes: int = 192,
    seed: int = 1_000_000,
    env: Any = None,
    show: bool = False,
) -> Evaluation:
    """Play one episode in each of `episodes` environments: with what a deployed policy does, its influence included.

    Args:
        policy: decides; its `safe_start` is that of the environment, so that `SchedulePolicy.zero()` gives exactly
            the base schedule.
        tasks: mixture of inner tasks.
        episodes: their number.
        seed: of the first episode; the others count up. The same seed gives the same episodes to every policy.
        env: a vector environment to play in, for instance one over several processes, in place of a new one. It has to
            be made with `environment_options(policy)`.
        show: a progress bar.
    """
    if env is None:
        env = SchedulingVectorEnv(episodes, mixture(tasks)[:episodes], **environment_options(policy))
    for name in ("observations", "controls", "base_schedule"):
        there, wanted = env.metadata[name], getattr(policy, name)
        wanted = getattr(wanted, "name", wanted)
        if there != wanted:
            raise ValueError(
                f"env has {name} {there!r}, the policy {wanted!r}: make it with environment_options(policy)"
            )
    memory = policy.begin((env.num_envs,))
    observations, infos = env.reset(seed=seed)
    returns, diverged = np.zeros(env.num_envs), np.zeros(env.num_envs, bool)
    running = np.ones(env.num_envs, bool)
    paths: dict[str, list[list[Any]]] = {}
    seen, whose = [], []
    shown = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    bar = tqdm(total=env.num_envs, desc="episodes", bar_format=shown, leave=False, disable=not show)
    while running.any():
        seen.append(observations[running])
        whose.append(np.flatnonzero(running))
        actions, memory = policy.act(torch.from_numpy(observations), memory)
        observations, _, done, cut, infos = env.step(actions.numpy())
        if (running & cut).any():  # a worker was lost, and its episodes with it: all of them again
            bar.close()
            return evaluate(policy, seed=seed, env=env, show=show)
        final = infos.get("final_info", infos)
        for key, values in infos.items():
            if key.startswith(("_", "final")):
                continue
            path = paths.setdefault(key, [[] for _ in range(env.num_envs)])
            for i in np.flatnonzero(running):
                path[i].append(final[key][i] if done[i] else values[i])
        ended = running & done
        returns[ended] = final["return"][ended]  # rewards may be scaled
        diverged |= running & (final["diverged"] > 0)
        running &= ~done
        done_of_each = np.where(running, infos["inner_steps"] / infos["total_steps"], 1.0)
        bar.update(float(done_of_each.sum()) - bar.n)
    bar.close()
    arrays = {
        key: [np.array(values, str if isinstance(values[0], str) else np.float64) for values in path]
        for key, path in paths.items()
    }
    return Evaluation(returns, diverged, np.concatenate(seen), arrays, np.concatenate(whose))
