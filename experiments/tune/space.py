"""What a study searches: a TOML file in which an entry is a setting of the training, fixed or to be searched.

learning_rate = { low = 2e-4, high = 5e-3, log = true }
hidden = { choices = [[32, 32], [64, 64]] }
timesteps = 100_000
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, get_type_hints

from optuna.distributions import (
    BaseDistribution,
    CategoricalChoiceType,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from rlsched.agents.config import TrainConfig
from rlsched.agents.presets import fixed, read_settings

DEFAULT = Path(__file__).with_name("default.toml")
KINDS = get_type_hints(TrainConfig)

# What is no entry of a space, and why; and what is one, but the same for all trials, or they could not be compared.
THE_STUDY_HAS_IT = {
    "run_dir": "each trial has a folder of its own in that of the study",
    "processes": "each trial is trained by one; --jobs says how many trials are trained side by side",
    "eval_every": "each trial is evaluated six times as it is trained",
}
ONLY_FIXED = ("tasks", "timesteps", "seed", "device", "compile", "eval_episodes", "eval_seed")

Params = Mapping[str, Any]  # values of what is searched, as Optuna has them: a list is text


@dataclass(frozen=True)
class Space:
    """What is searched, and what is fixed.

    Args:
        fixed: settings, by name.
        searched: entries, by name, as they are in the file.
        source: the file, for messages.

    Raises:
        ValueError: an entry is none; the message names the file and the entry.
    """

    fixed: Mapping[str, Any]
    searched: Mapping[str, Mapping[str, Any]]
    source: str = "space"

    def __post_init__(self) -> None:
        for name in (*self.fixed, *self.searched):
            if name in THE_STUDY_HAS_IT:
                raise ValueError(f"{self.source}: {name} is no entry of a space: {THE_STUDY_HAS_IT[name]}")
        for name in self.searched:
            if name in ONLY_FIXED:
                raise ValueError(f"{self.source}: {name} is the same for all trials: give it one value")
        if not self.searched:
            raise ValueError(f"{self.source} has nothing to search, an entry like name = {{ low = 0.1, high = 1.0 }}")
        self.distributions()

    def distributions(self) -> dict[str, BaseDistribution]:
        """For Optuna, by name."""
        return {name: _distribution(f"{self.source}: {name}", KINDS[name], e) for name, e in self.searched.items()}

    def settings(self, params: Params) -> dict[str, Any]:
        """What is searched, as `TrainConfig` takes it."""
        return {name: _setting(KINDS[name], value) for name, value in params.items()}

    def params(self, config: TrainConfig) -> dict[str, Any] | None:
        """The values that a configuration has; None where one of them is not in the space."""
        found = {}
        for name, distribution in self.distributions().items():
            value: Any = _param(getattr(config, name))
            found[name] = value
            if isinstance(distribution, CategoricalDistribution):
                if value not in distribution.choices:
                    return None
                found[name] = distribution.choices[distribution.choices.index(value)]
            elif not distribution._contains(value):
                return None
        return found

    def check(self, config: TrainConfig) -> None:
        """
        Raises:
            ValueError: beside the other settings of `config`, a choice, or an end of a range, is none of a training.
        """
        for name, entry in self.searched.items():
            for value in entry.get("choices", [entry.get("low"), entry.get("high")]):
                try:
                    replace(config, **self.settings({name: _param(value)}))
                except (ValueError, TypeError) as error:
                    raise ValueError(f"{self.source}: {name} = {json.dumps(value)}: {error}") from None

    def grid(self) -> list[dict[str, Any]]:
        """All combinations, the last entry changing fastest.

        Raises:
            ValueError: an entry has no end of values.
        """
        axes = [list(self._values(name, each)) for name, each in self.distributions().items()]
        return [dict(zip(self.searched, values, strict=True)) for values in product(*axes)]

    def _values(self, name: str, distribution: BaseDistribution) -> Iterator[Any]:
        if isinstance(distribution, CategoricalDistribution):
            yield from distribution.choices
        elif isinstance(distribution, IntDistribution) and not distribution.log:
            yield from range(distribution.low, distribution.high + 1, distribution.step)
        elif isinstance(distribution, FloatDistribution) and distribution.step is not None:
            steps = round((distribution.high - distribution.low) / distribution.step)
            yield from (min(distribution.low + i * distribution.step, distribution.high) for i in range(steps + 1))
        else:
            raise ValueError(f"{self.source}: a grid needs {name} in choices or in steps, got {self.searched[name]}")


def read_space(path: Path) -> Space:
    """The space in a TOML file.

    Raises:
        ValueError: it is none; the message says which entry is wrong, and how.
        OSError: it cannot be read.
    """
    entries = read_settings(path)
    searched = {name: entry for name, entry in entries.items() if isinstance(entry, dict)}
    rest = {name: value for name, value in entries.items() if name not in searched}
    return Space(fixed(rest, str(path)), searched, str(path))


def _distribution(what: str, kind: Any, entry: Mapping[str, Any]) -> BaseDistribution:
    if entry.keys() == {"choices"}:
        choices = entry["choices"]
        if not isinstance(choices, list) or not choices:
            raise ValueError(f"{what} must have a list of choices, got {choices!r}")
        params = [_param(value) for value in choices]
        if len(set(params)) < len(params):
            raise ValueError(f"{what} has a choice twice: {choices}")
        return CategoricalDistribution(params)
    if kind not in (int, float):
        raise ValueError(f"{what} must be {{ choices = [ … ] }}, for it is no number; got {dict(entry)}")
    if not {"low", "high"} <= entry.keys() <= {"low", "high", "log", "step"}:
        raise ValueError(
            f"{what} must be {{ low = …, high = … }}, with log = true or step = … if you like, or "
            f"{{ choices = [ … ] }}; got {dict(entry)}"
        )
    low, high, log, step = entry["low"], entry["high"], entry.get("log", False), entry.get("step")
    for bound in (low, high, *([] if step is None else [step])):
        fits = isinstance(bound, int if kind is int else (int, float)) and not isinstance(bound, bool)
        if not fits or not math.isfinite(bound):
            raise ValueError(f"{what} must have {'whole ' if kind is int else ''}numbers, got {dict(entry)}")
    if not low < high or not isinstance(log, bool) or (log and low <= 0):
        raise ValueError(f"{what} must have low below high, and above 0 where log is true; got {dict(entry)}")
    if step is not None and (log or step <= 0):
        raise ValueError(f"{what} must have a positive step, and none where log is true; got {dict(entry)}")
    if step is not None and not math.isclose((high - low) / step, round((high - low) / step), abs_tol=1e-9):
        raise ValueError(f"{what} must reach high from low in whole steps, got {dict(entry)}")
    if kind is int:
        return IntDistribution(low, high, log=log, step=step or 1)
    return FloatDistribution(float(low), float(high), log=log, step=step)


def _param(value: Any) -> CategoricalChoiceType:
    """A setting as Optuna can have it: a list as text."""
    return json.dumps(list(value)) if isinstance(value, list | tuple) else value


def _setting(kind: Any, param: Any) -> Any:
    return tuple(json.loads(param)) if isinstance(param, str) and kind is not str else param
