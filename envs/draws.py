"""Random draws that depend on their seed alone, and checks of the ranges that are drawn from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor


def log_uniform(rng: Generator, low: float, high: float, quantile: float | None = None) -> float:
    """A draw; or a quantile of what could have been drawn, for which `rng` moves on all the same."""
    drawn = rng.uniform(np.log(low), np.log(high))
    return float(np.exp(drawn if quantile is None else np.log(low) + quantile * np.log(high / low)))


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Torch's global random numbers start from `seed` inside, and go on outside as if nothing had been."""
    if device is not None and device.type == "cuda":
        with torch.random.fork_rng([device]):
            torch.manual_seed(seed)
            yield
        return
    state = torch.get_rng_state()  # on a CPU, this is 50 times as fast as the above
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def minibatch_rows(
    seeds: Tensor, first_step: Tensor, steps: int, batch: int, batches: Tensor, points: Tensor
) -> Tensor:
    """Row numbers of the mini-batches of many networks at once, each network's a function of its seed and step.

    SplitMix64 (Steele et al. 2014) of a counter, and so without a state that would have to be kept per network.

    Args:
        seeds: (networks,), int64.
        first_step: inner steps done, (networks,), int64.
        steps: number of inner steps.
        batch: rows in each mini-batch.
        batches: size of each network's own mini-batch, (networks,), int64: its rows recur until there are `batch`.
        points: each network's training points, (networks,), int64.

    Returns:
        (steps, networks, batch), int64, uniform on [0, points).
    """
    step = first_step + torch.arange(steps, device=seeds.device)[:, None]
    column = torch.arange(batch, device=seeds.device) % batches[:, None]
    z = seeds[:, None] + (step[..., None] * batch + column) * -7046029254386353131  # 2^64 / golden ratio
    z = (z ^ _shifted(z, 30)).mul_(-4658895280553007687)
    z = (z ^ _shifted(z, 27)).mul_(-7723592293110705685)
    return _shifted(z, 33).remainder_(points[:, None])


def _shifted(z: Tensor, bits: int) -> Tensor:
    """z >> bits as if z were unsigned."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def check_at_least(least: int, config: object, *names: str) -> None:
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(config, name)}")


def check_ranges(config: object, *names: str) -> None:
    for name in names:
        low, high = getattr(config, name)
        if not 0 < low <= high:
            raise ValueError(f"{name} must be a range (low, high) with 0 < low <= high, got {(low, high)}")


def check_probabilities(config: object, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} is a probability in [0, 1], got {getattr(config, name)}")
