"""What a scheduling policy is, and the one that is shipped: an actor in a pickle-free file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rlsched.actors import Actor, Memory, Perceptron, actor
from rlsched.base_schedule import BaseSchedule, named_base_schedule
from rlsched.connection import is_address
from rlsched.control import CONTROLS
from rlsched.domain import Domain, check_finite
from rlsched.files import write
from rlsched.hub import SCHEME, Shared, parts
from rlsched.number import Number
from rlsched.remote import RemotePolicy
from rlsched.signals import OBSERVATIONS

SUFFIX = ".safetensors"
ONNX = ".onnx"
VERSION = 2  # of the file; raised as well when an observation or a control keeps its name but changes its meaning
# Keys of the file's metadata; safetensors keeps strings only, so `SPEC` and `INFO` are JSON.
SPEC, INFO, DIGEST = "rlsched.spec", "rlsched.info", "rlsched.sha256"


class PolicyFileError(ValueError):
    """A policy file that cannot be used: truncated, altered, malformed, or written for another rlsched."""


@runtime_checkable
class Policy(Protocol):
    """Decides, given what it asked to see."""

    observations: tuple[str, ...]  # that it uses, of `rlsched.signals.OBSERVATIONS`
    controls: tuple[str, ...]  # that it moves, of `rlsched.control.CONTROLS`
    safe_start: float  # of what a probe (`rlsched.schedule.probe`) allows, the part that runs start at; 0 without one
    base_schedule: BaseSchedule  # what it modulates

    @property
    def digest(self) -> str:
        """The same for the same decisions, and for no others."""

    def begin(self, batch: tuple[int, ...] = ()) -> Memory:
        """What it remembers at the start of runs of shape `batch`."""

    def act(self, observation: Tensor, memory: Memory = None) -> tuple[Tensor, Memory]:
        """The action in [−1, 1], (*batch, controls), and the new memory, for observations (*batch, observations)."""


class _Spec(NamedTuple):
    """What a policy is but for its numbers, as its file says it."""

    version: int
    observations: tuple[str, ...]
    controls: tuple[str, ...]
    actor: str
    actor_options: dict[str, Any]
    safe_start: float
    base_schedule: str


class SchedulePolicy(Shared):
    """A deterministic scheduling policy: the actions of an actor, clipped to [−1, 1], as far as they are to be trusted.

    Args:
        actor: decides; its weights are taken over as they are, in float32 on the host, and have to be finite.
        observations: names of what it sees, in the order of its inputs.
        controls: names of what it moves, in the order of its outputs.
        safe_start: the part of the learning rate that a probe allows (`rlsched.schedule.probe`) that runs under this
            policy start at, if not below it: from 0 (or False), which is without a probe, to 1 (or True).
        domain: where the observations lie that it was trained on; without one it is trusted everywhere.
        base_schedule: the name of the schedule that it modulates, in `rlsched.base_schedule.BASE_SCHEDULES`.
        info: anything JSON can hold about how the policy was trained and how it scored.

    Raises:
        ValueError: there is no such observation, control or base schedule, or their numbers are not the actor's; a
            weight or the domain is not finite, or the domain not that of the observations.
    """

    def __init__(
        self,
        actor: Actor,
        observations: Sequence[str],
        controls: Sequence[str],
        *,
        safe_start: float = 1.0,
        domain: Domain | None = None,
        base_schedule: str | BaseSchedule = "linear",
        info: dict[str, Any] | None = None,
    ) -> None:
        self.observations = checked_names("observations", observations, OBSERVATIONS)
        self.controls = checked_names("controls", controls, CONTROLS)
        if (actor.inputs, actor.outputs) != (len(self.observations), len(self.controls)):
            raise ValueError(
                f"actor takes {actor.inputs} observations and gives {actor.outputs} actions, for "
                f"{len(self.observations)} observations and {len(self.controls)} controls"
            )
        if info is not None and not isinstance(info, dict):
            raise ValueError(f"info must be a dict, got {type(info).__name__}")
        self.actor = actor.to("cpu", torch.float32).requires_grad_(False).eval()
        for name, tensor in self.actor.state_dict().items():
            check_finite(f"actor: {name}", tensor)
        self.safe_start = checked_safe_start(safe_start)
        self.domain = None if domain is None else domain.checked(len(self.observations))
        self.base_schedule = named_base_schedule(base_schedule)
        self.info = info or {}

    @classmethod
    def zero(cls, base_schedule: str | BaseSchedule = "linear") -> SchedulePolicy:
        """The policy that always stands still, and so gives the base schedule."""
        still = Perceptron(1, 1, ())
        return cls(still, ("progress",), ("lr",), safe_start=0.0, base_schedule=base_schedule, info={"name": "zero"})

    def with_actor(self, actor: Actor, info: dict[str, Any]) -> SchedulePolicy:
        """The same policy, decided by another actor, of which `info` tells; refused as when one is made."""
        same = {name: getattr(self, name) for name in ("safe_start", "domain", "base_schedule")}
        return SchedulePolicy(actor, self.observations, self.controls, info=info, **same)

    @classmethod
    def load(cls, name_or_path: str | Path) -> SchedulePolicy:
        """Load a shipped policy by its name (see `available`), or a policy file by its path. No pickle is read.

        The address of a server (`rlsched serve`) gives a `rlsched.remote.RemotePolicy`, which decides as its policy
        does, and has no actor. "hf://user/name", or "hf://user/name@revision", is `from_pretrained`.

        Raises:
            FileNotFoundError: there is neither such a name nor such a file.
            PolicyFileError: the file is truncated, was altered, is malformed, or needs what this rlsched does not have.
            ConnectionError, ValueError: as of a `RemotePolicy`.
        """
        if is_address(name_or_path):
            return RemotePolicy(str(name_or_path))  # type: ignore[return-value] # decides alike: see above
        if str(name_or_path).startswith(SCHEME):
            repo_id, revision = parts(str(name_or_path))
            return cls.from_pretrained(repo_id, revision=revision)
        path = _resolve(name_or_path)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
        except (SafetensorError, OSError) as error:
            raise PolicyFileError(f"{path} is not a whole policy file: {error}") from error
        if not {SPEC, INFO, DIGEST} <= metadata.keys():
            raise PolicyFileError(f"{path} is a safetensors file, but not one written by SchedulePolicy.save")
        if any(tensor.dtype != torch.float32 for tensor in tensors.values()):
            raise PolicyFileError(f"{path} holds other numbers than float32, which no policy file does")
        if metadata[DIGEST] != _digest(tensors, metadata):
            raise PolicyFileError(f"{path} was altered after it was saved: its contents do not match its checksum")
        try:
            spec, info = fields_of(SPEC, metadata[SPEC]), fields_of(INFO, metadata[INFO])
            if spec.get("version") == VERSION:
                return cls._of(spec, info, tensors)
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:  # RuntimeError: of `load_state_dict`
            raise PolicyFileError(f"{path} is no policy that this rlsched {_version()} can use: {error}") from error
        raise PolicyFileError(
            f"{path} is of version {spec.get('version')} of policy files, this rlsched reads version {VERSION}: "
            "train the policy again, or install the rlsched it was made with"
        )

    @classmethod
    def _of(cls, spec: dict[str, Any], info: dict[str, Any], tensors: Mapping[str, Tensor]) -> SchedulePolicy:
        """The policy whose `_spec()` and `_tensors()` these are."""
        if spec.keys() != set(_Spec._fields):
            raise ValueError(f"{SPEC} must have {_Spec._fields}, it has {tuple(spec)}")
        weights = dict(tensors)
        domain = {name: weights.pop(_key(name)) for name in Domain._fields if _key(name) in weights}
        if domain and len(domain) < len(Domain._fields):
            raise ValueError(f"domain must have {Domain._fields}, it has {tuple(domain)}")
        said = _Spec(**spec)
        observations = checked_names("observations", said.observations, OBSERVATIONS)
        controls = checked_names("controls", said.controls, CONTROLS)
        made = actor(said.actor, len(observations), len(controls), **said.actor_options)
        made.load_state_dict(weights)
        return cls(
            made,
            observations,
            controls,
            safe_start=said.safe_start,
            domain=Domain(**domain) if domain else None,
            base_schedule=said.base_schedule,
            info=info,
        )

    def save(self, path: str | Path) -> Path:
        """Write the policy file, in one move; its folder is made if need be. Returns the path.

        Raises:
            ValueError: `path` does not end in `SUFFIX`.
            OSError: it cannot be written.
        """
        path = Path(path)
        if path.suffix != SUFFIX:
            raise ValueError(f"path must end in {SUFFIX}, got {str(path)!r}")
        return write(path, self.content())  # save_file would make it unreadable for others

    def content(self) -> bytes:
        """Of its file."""
        metadata = {SPEC: json.dumps(self._spec()._asdict()), INFO: json.dumps(self.info)}
        tensors = self._tensors()
        metadata[DIGEST] = _digest(tensors, metadata)
        return save(tensors, metadata)

    def begin(self, batch: tuple[int, ...] = ()) -> Memory:
        """What it remembers at the start of runs of shape `batch`."""
        return self.actor.begin(batch)

    @torch.inference_mode()
    def act(self, observation: Tensor, memory: Memory = None) -> tuple[Tensor, Memory]:
        """The action in [−1, 1], (*batch, controls), and the new memory, for observations (*batch, observations)."""
        action, _, memory = self.decide(observation, memory)
        return action, memory

    def decide(self, observation: Tensor, memory: Memory = None) -> tuple[Tensor, Number, Memory]:
        """The same with the influence between them, in plain operations of torch, as an exporter can follow them."""
        action, memory = self.actor(observation, memory)
        action = action.nan_to_num(nan=0.0).clamp(-1, 1)  # of weights whose products overflow
        influence = self.influence(observation)
        if isinstance(influence, Tensor):
            return action * influence.unsqueeze(-1), influence, memory
        return (action if influence == 1 else action * influence), influence, memory

    def influence(self, observation: Tensor) -> Number:
        """How far the actions are trusted, (*batch,), in [0, 1]: 1 where the policy was trained."""
        if self.domain is not None:
            return self.domain.influence(observation)
        return observation.new_ones(observation.shape[:-1]) if observation.dim() > 1 else 1.0

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides the actions. It is the same for the same policy, wherever it was saved."""
        return _digest(self._tensors(), {SPEC: json.dumps(self._spec()._asdict())})

    def _spec(self) -> _Spec:
        return _Spec(
            VERSION,
            self.observations,
            self.controls,
            self.actor.name,
            {"hidden": self.actor.hidden, "activation": self.actor.activation},
            self.safe_start,
            self.base_schedule.name,
        )

    def _tensors(self) -> dict[str, Tensor]:
        domain = {} if self.domain is None else self.domain._asdict()
        tensors = {**self.actor.state_dict(), **{_key(name): tensor for name, tensor in domain.items()}}
        return {key: tensor.contiguous() for key, tensor in tensors.items()}

    def __repr__(self) -> str:
        widths = "-".join(map(str, (self.actor.inputs, *self.actor.hidden, self.actor.outputs)))
        return (
            f"SchedulePolicy({self.actor.name} {widths}, {self.actor.activation}, {self.base_schedule.name}, "
            f"sha256={self.digest[:12]})"
        )


def available() -> list[str]:
    """Names of the shipped policies."""
    return sorted(f.name.removesuffix(SUFFIX) for f in _shipped().iterdir() if f.name.endswith(SUFFIX))


def checked_names(argument: str, names: Sequence[str], known: Mapping[str, Any]) -> tuple[str, ...]:
    """The names as a tuple.

    Raises:
        ValueError: they are not known names, or one is there twice, or they are a single string.
    """
    are_known = isinstance(names, Collection) and not isinstance(names, str)
    are_known = are_known and all(isinstance(name, str) and name in known for name in names)
    if not are_known or len(set(names)) < len(names):
        raise ValueError(f"{argument} must be some of {tuple(known)}, each once, got {names!r}")
    return tuple(names)


def checked_safe_start(value: Any) -> float:
    """A `safe_start`; 0 and 1 as a bool, which is an int.

    Raises:
        ValueError: it is none.
    """
    if not (isinstance(value, int | float) and 0 <= value <= 1):
        raise ValueError(f"safe_start must be a number between 0 and 1, got {value!r}")
    return bool(value) if value in (0, 1) else float(value)


def fields_of(what: str, text: str) -> dict[str, Any]:
    """Of an entry of the metadata.

    Raises:
        ValueError: it is not a JSON object.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{what} must be a JSON object, got {type(fields).__name__}")
    return fields


def _version() -> str:
    from rlsched import __version__

    return __version__


def _key(name: str) -> str:
    """Of a tensor of the policy's domain, in its file."""
    return f"domain.{name}"


def _shipped() -> Any:
    return resources.files("rlsched").joinpath("pretrained")


def _resolve(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if path.suffix == SUFFIX:
        if path.is_file():
            return path
        raise FileNotFoundError(f"policy: there is no file {str(path)!r}")
    if path.suffix == ONNX:
        raise ValueError(f"policy: {str(path)!r} is an ONNX file, which rlsched.OnnxPolicy.load reads")
    if str(name_or_path) in available():
        return Path(str(_shipped().joinpath(f"{name_or_path}{SUFFIX}")))
    raise FileNotFoundError(
        f"policy: {str(name_or_path)!r} is neither a {SUFFIX} file, nor one of the shipped policies {available()}, "
        "nor the http:// address of a server"
    )


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    sha = hashlib.sha256()
    for key in sorted(tensors):
        sha.update(f"{key}{tuple(tensors[key].shape)}".encode())
        sha.update(tensors[key].reshape(-1).numpy().tobytes())  # NumPy has at most 64 dimensions
    for key in sorted(metadata.keys() - {DIGEST}):
        sha.update(f"{key}{metadata[key]}".encode())
    return sha.hexdigest()
