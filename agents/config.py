"""Configuration of a training run."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from numbers import Integral, Real
from typing import Any, NamedTuple, get_type_hints

from rlsched.actors import ACTIVATIONS, ACTORS, Perceptron, checked_widths
from rlsched.base_schedule import BASE_SCHEDULES
from rlsched.control import CONTROL_NAMES, CONTROLS
from rlsched.envs.arguments import check_sets, some_names
from rlsched.envs.groups import REWARDS
from rlsched.envs.mixtures import mixture
from rlsched.envs.training import usable_device
from rlsched.policy import SchedulePolicy
from rlsched.signals import OBSERVATION_NAMES, OBSERVATIONS


class Range(NamedTuple):
    """What a number may be, if it is finite."""

    low: float
    high: float = math.inf
    open: bool = False  # whether `low` itself is out of it

    def __contains__(self, value: Any) -> bool:
        return bool(self.low <= value <= self.high and value < math.inf and not (self.open and value == self.low))

    def __str__(self) -> str:
        if self.high < math.inf:
            low = f"above {self.low:g} and at most" if self.open else f"between {self.low:g} and"
            return f"{low} {self.high:.12g}"
        if not self.open:
            return f"at least {self.low:g}"
        return "positive and finite" if self.low == 0 else f"finite and above {self.low:g}"


COUNT = Range(1)
POSITIVE = Range(0, open=True)
SEED = Range(0, 2**32 - 1)  # of NumPy
ENGINES = ("processes", "ray")
EXPLORATIONS = ("independent", "coherent")
LOCAL = "local"
TYPES = {int: Integral, float: Real, str: str | os.PathLike, bool: bool}  # what is taken for each type of a field


def option(default: Any, meaning: str, within: Range | None = None, also: str | None = None) -> Any:
    """A field with its documentation, for the command line, another name there, and the range of its numbers."""
    return field(default=default, metadata={"help": meaning, "range": within, "also": also})


@dataclass(frozen=True)
class TrainConfig:
    """How a scheduling policy is trained. By default it sees and moves all that there is.

    Raises:
        ValueError: a field has another type, or is out of its range.
    """

    run_dir: str = option("runs/policy", "checkpoint, TensorBoard log and policy file; a run found there is resumed")
    tasks: str = option("mlp", "mixture of inner tasks: a key of rlsched.envs.MIXTURES, or your own as module:NAME")
    reward: str = option("validation", f"loss whose drop is the reward: {', '.join(REWARDS)}")
    timesteps: int = option(1_500_000, "experience to train on: decisions, over all inner runs", COUNT)
    observations: tuple[str, ...] = option(OBSERVATION_NAMES, "what the policy sees: names of docs/spec.md")
    controls: tuple[str, ...] = option(CONTROL_NAMES, f"what it moves, of {', '.join(CONTROL_NAMES)}")
    base_schedule: str = option("linear", f"what it modulates: {', '.join(BASE_SCHEDULES)}")
    safe_start: float = option(
        1.0, "part of the learning rate that the probe allows that runs start at", Range(0, 1, open=True)
    )
    trust: float = option(1e4, "factor by which the policy may move the learning rate, either way", Range(1, open=True))
    initial_policy: str = option(
        "", "policy whose actor it begins with, a file or a shipped one; it then sees and moves what that does"
    )
    num_envs: int = option(512, "inner training runs at once", COUNT)
    clones: int = option(1, "runs of a set that differ in their actions alone; advantages are centred on it", COUNT)
    processes: int = option(
        min(2, os.cpu_count() or 1), "worker processes that train them, one thread each", COUNT, also="workers"
    )
    engine: str = option("processes", "where these are: processes of this machine, or ray, actors of a Ray cluster")
    address: str = option(LOCAL, "of the Ray cluster: local starts one here; auto, the one that runs here; host:port")
    compile: bool = option(False, "torch.compile the inner steps: twice as fast, needs a C compiler")
    device: str = option("cpu", "where the inner networks are trained: cpu, cuda, ...")
    seed: int = option(0, "of weights, episodes and actions", SEED)

    n_steps: int = option(32, "timesteps of each inner run between two updates of PPO", COUNT)
    batch_size: int = option(2048, "timesteps in a mini-batch of PPO", Range(2))
    n_epochs: int = option(4, "passes over the timesteps in an update", COUNT)
    learning_rate: float = option(7e-4, "of Adam at the start; falls linearly", POSITIVE)
    final_learning_rate: float = option(1e-4, "of Adam at the end", POSITIVE)
    gae_lambda: float = option(0.97, "decay of advantages in generalised advantage estimation", Range(0, 1))
    target_kl: float = option(0.03, "an update stops when the policy has moved 1.5 times as far", POSITIVE)
    log_std_init: float = option(-0.7, "initial log standard deviation of the actions", Range(-20, 2))
    exploration: str = option(
        "independent", "noise on the actions: independent, or coherent, which is the same in like states of a rollout"
    )
    averaging: float = option(0.0, "half-life of the running average of the actor, in updates; 0 for none", Range(0))
    privileged_critic: bool = option(False, "the critic is told what the actor is not: the task, its return so far")
    actor: str = option("perceptron", f"kind of network that decides: {', '.join(ACTORS)}")
    hidden: tuple[int, ...] = option((64, 64), "widths of the actor's layers, and of the critic's")
    activation: str = option("tanh", "between the layers: tanh or relu")

    eval_every: int = option(60, "updates between evaluations against the base schedule", COUNT)
    eval_episodes: int = option(128, "episodes of an evaluation, the same each time", COUNT)
    eval_seed: int = option(1_000_000, "of these episodes", SEED)

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(TrainConfig).items():
            if kind in TYPES:
                object.__setattr__(self, name, _checked(name, getattr(self, name), kind))
        mixture(self.tasks)
        usable_device(self.device)
        object.__setattr__(self, "observations", some_names("observations", self.observations, OBSERVATIONS))
        object.__setattr__(self, "controls", some_names("controls", self.controls, CONTROLS))
        object.__setattr__(self, "hidden", checked_widths(self.hidden, len(self.observations), len(self.controls)))
        if self.initial_policy:
            self._take_over(self.initial_policy)
        if not self.hidden:
            raise ValueError("hidden must hold at least one positive width, got none")
        for name, known in (
            ("engine", ENGINES),
            ("reward", REWARDS),
            ("base_schedule", BASE_SCHEDULES),
            ("exploration", EXPLORATIONS),
            ("actor", ACTORS),
            ("activation", ACTIVATIONS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {list(known)}, got {getattr(self, name)!r}")
        if self.privileged_critic and self.actor != Perceptron.name:
            raise ValueError(f"actor must be {Perceptron.name!r} for a privileged_critic, got {self.actor!r}")
        rollout = self.num_envs * self.n_steps
        if self.batch_size > rollout:
            raise ValueError(f"batch_size must be at most num_envs × n_steps = {rollout}, got {self.batch_size}")
        if self.timesteps < rollout:
            raise ValueError(f"timesteps must be at least num_envs × n_steps = {rollout}, got {self.timesteps}")
        check_sets(self.num_envs, self.clones)
        sets = self.num_envs // self.clones
        if self.processes > sets:
            each = "num_envs" if self.clones == 1 else "num_envs / clones"
            raise ValueError(f"processes must be at most {each} = {sets}, got {self.processes}")
        if self.engine == "ray" and self.device != "cpu":
            raise ValueError(
                f"device must be 'cpu' with engine='ray', whose workers have a core each, got {self.device!r}"
            )
        if self.engine != "ray" and self.address != LOCAL:
            raise ValueError(f"address is for engine='ray', and engine is {self.engine!r}, got {self.address!r}")

    def _take_over(self, name: str) -> None:
        """What the initial policy sees, moves and is made of; how it starts and what it modulates, if not asked."""
        try:
            policy = SchedulePolicy.load(name)
        except (OSError, ValueError) as error:
            raise ValueError(f"initial_policy must be one that can be loaded: {error}") from error
        if not isinstance(policy, SchedulePolicy):
            raise ValueError(f"initial_policy must be a file or a shipped policy, got {name!r}")
        actor = policy.actor
        its: dict[str, Any] = {"observations": policy.observations, "controls": policy.controls, "actor": actor.name}
        its |= {"hidden": actor.hidden, "activation": actor.activation}
        free = {"safe_start": float(policy.safe_start), "base_schedule": policy.base_schedule.name}
        for key, value in {**its, **free}.items():
            given = getattr(self, key)
            if given == getattr(TrainConfig, key):
                object.__setattr__(self, key, value)
            elif key in its and given != value:
                raise ValueError(f"{key} must be the initial_policy's, {value!r}, got {given!r}")

    def hyperparameters(self) -> dict[str, Any]:
        """The fields that decide what is learned, in types that JSON and TensorBoard can hold."""
        values = asdict(self)
        for name in ("run_dir", "processes", "engine", "address", "compile", "device"):  # how and where it is learned
            del values[name]
        return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


def _checked(name: str, value: Any, kind: type) -> Any:
    """The value of a field as a `kind`: NumPy's numbers and paths are taken for Python's numbers and strings."""
    (within,) = (f.metadata["range"] for f in fields(TrainConfig) if f.name == name)
    fits = isinstance(value, TYPES[kind]) and isinstance(value, bool) == (kind is bool)
    if not fits or (within is not None and value not in within):
        words = {str: "text", bool: "True or False", int: f"a whole number, {within}", float: within}
        raise ValueError(f"{name} must be {words[kind]}, got {value!r}")
    return os.fspath(value) if kind is str else kind(value)


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In which settings what is on disk differs from what is asked for, in words; empty where it does not."""
    return ", ".join(
        f"{key} (there {there.get(key)!r}, now {now.get(key)!r})"
        for key in sorted(there.keys() | now.keys())
        if there.get(key) != now.get(key)
    )


_BROAD: dict[str, Any] = {
    "tasks": "broad",
    "num_envs": 896,  # eight sets for each of 28 families
    "clones": 4,
    "safe_start": 0.3,
    "timesteps": 3_000_000,
    "batch_size": 3584,
    "n_epochs": 12,
    "learning_rate": 1.5e-3,
    "averaging": 10.0,
    "privileged_critic": True,
    "hidden": (128, 128),
    "eval_every": 60,
    "eval_episodes": 100,
}
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "broad": _BROAD,
    "demo": {
        "tasks": "small",
        "num_envs": 256,
        "n_steps": 64,
        "timesteps": 400_000,
        "eval_every": 8,
        "eval_episodes": 48,
    },
}
_SEEN_BY_PERCEPTRONS = (
    *("progress", "decisions_left", "decisions", "interval", "loss_vs_fast", "loss_vs_slow", "loss_vs_first"),
    *("loss_noise", "loss_trend", "grad_cosine", "momentum_cosine", "update_ratio", "predicted_decrease"),
    *("grad_norm_change", "grad_norm_noise", "clip_fraction", "momentum", "clip", "adaptive", "lr"),
)
_PERCEPTRONS: dict[str, Any] = {"observations": _SEEN_BY_PERCEPTRONS, "controls": ("lr", "momentum", "clip")}


class Committee(NamedTuple):
    """Trainings whose policies become one."""

    members: dict[str, dict[str, Any]]  # by their names
    corrections: dict[str, float]  # of it then, by how much, see `rlsched.committee`


COMMITTEES: dict[str, Committee] = {
    "shipped": Committee(
        {
            "perceptrons": _PERCEPTRONS,
            "short": {**_BROAD, "tasks": "short", "num_envs": 672, "batch_size": 2688},
        },
        corrections={"bolder": 0.2, "calmer": 1.8, "steadier": 0.8, "warier": 1.5},
    )
}
