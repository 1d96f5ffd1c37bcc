"""The frozen policy: a small network from observations to actions, in one pickle-free file."""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rlsched.control import CONTROL_NAMES, CONTROLS
from rlsched.safety import Domain
from rlsched.signals import OBSERVATION_NAMES, OBSERVATIONS
from rlsched.spec import VERSION

SUFFIX = ".safetensors"
ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}
# Keys of the file's metadata; safetensors keeps strings only, so `SPEC` and `INFO` are JSON.
SPEC, INFO, DIGEST = "rlsched.spec", "rlsched.info", "rlsched.sha256"


class PolicyFileError(ValueError):
    """A policy file that cannot be used: truncated, altered, or written for another spec."""


class SchedulePolicy:
    """A deterministic scheduling policy: tanh or ReLU layers, then one linear layer, clipped to [-1, 1].

    Args:
        weights: (weight, bias) of each layer, of shapes (out, in) and (out,), float32. The first `in` is the number
            of observations, the last `out` the number of controls.
        activation: "tanh" or "relu", between the layers.
        safe_start: whether runs under this policy begin with the probe of `rlsched.control.safe_start`.
        domain: where the observations lie that it was trained on; without one it is trusted everywhere.
        info: anything JSON can hold about how the policy was trained and how it scored.
    """

    def __init__(
        self,
        weights: list[tuple[Tensor, Tensor]],
        *,
        activation: str = "tanh",
        safe_start: bool = True,
        domain: Domain | None = None,
        info: dict[str, Any] | None = None,
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
        width = len(OBSERVATIONS)
        for weight, bias in weights:
            if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
                raise ValueError(
                    f"weights: a layer of shapes {tuple(weight.shape)} and {tuple(bias.shape)} does not take "
                    f"the {width} values before it"
                )
            width = weight.shape[0]
        if width != len(CONTROLS):
            raise ValueError(f"weights: the last layer gives {width} actions, the spec has {len(CONTROLS)} controls")
        self.weights = [(w.detach().cpu().float(), b.detach().cpu().float()) for w, b in weights]
        self.activation = activation
        self.safe_start = safe_start
        self.domain = domain
        self.info = info or {}

    @classmethod
    def zero(cls) -> SchedulePolicy:
        """The policy that always stands still, and so gives the fallback schedule."""
        layer = torch.zeros(len(CONTROLS), len(OBSERVATIONS)), torch.zeros(len(CONTROLS))
        return cls([layer], safe_start=False, info={"name": "zero"})

    @classmethod
    def load(cls, name_or_path: str | Path) -> SchedulePolicy:
        """Load a shipped policy by its name (see `available`), or a policy file by its path. No pickle is read.

        Raises:
            FileNotFoundError: there is neither such a name nor such a file.
            PolicyFileError: the file is truncated, was altered, or belongs to another version of the spec.
        """
        path = _resolve(name_or_path)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
        except (SafetensorError, OSError) as error:
            raise PolicyFileError(f"{path} is not a whole policy file: {error}") from error
        if not {SPEC, INFO, DIGEST} <= metadata.keys():
            raise PolicyFileError(f"{path} is a safetensors file, but not one written by SchedulePolicy.save")
        floats = all(tensor.dtype == torch.float32 for tensor in tensors.values())
        if not floats or metadata[DIGEST] != _digest(tensors, metadata):
            raise PolicyFileError(f"{path} was altered after it was saved: its contents do not match its checksum")
        spec = json.loads(metadata[SPEC])
        if spec["version"] != VERSION:
            raise PolicyFileError(
                f"{path} is for version {spec['version']} of the observations and actions, this rlsched has version "
                f"{VERSION}: train the policy again, or install the rlsched it was made with"
            )
        for what, names in (("observations", OBSERVATION_NAMES), ("controls", CONTROL_NAMES)):
            if tuple(spec[what]) != names:
                differing = sorted(set(spec[what]) ^ set(names)) or "their order"
                raise PolicyFileError(f"{path} has other {what} than this rlsched: {differing}")
        layers = sum(key.endswith(".weight") for key in tensors)
        weights = [(tensors[f"{i}.weight"], tensors[f"{i}.bias"]) for i in range(layers)]
        domain = {name: tensors[_key(name)] for name in Domain._fields if _key(name) in tensors}
        return cls(
            weights,
            activation=spec["activation"],
            safe_start=spec["safe_start"],
            domain=Domain(**domain) if domain else None,
            info=json.loads(metadata[INFO]),
        )

    def save(self, path: str | Path) -> Path:
        """Write the policy file; its folder is made if need be. Returns the path."""
        path = Path(path)
        if path.suffix != SUFFIX:
            raise ValueError(f"path must end in {SUFFIX}, got {str(path)!r}")
        tensors = {}
        for i, (weight, bias) in enumerate(self.weights):
            tensors[f"{i}.weight"], tensors[f"{i}.bias"] = weight.contiguous(), bias.contiguous()
        tensors |= self._domain_tensors()
        spec = {
            "version": VERSION,
            "observations": OBSERVATION_NAMES,
            "controls": CONTROL_NAMES,
            "activation": self.activation,
            "safe_start": self.safe_start,
        }
        metadata = {SPEC: json.dumps(spec), INFO: json.dumps(self.info)}
        metadata[DIGEST] = _digest(tensors, metadata)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(save(tensors, metadata))  # save_file would make it unreadable for others
        partial.replace(path)
        return path

    def act(self, observation: Tensor) -> Tensor:
        """The action in [-1, 1], (*batch, controls), for observations of shape (*batch, observations)."""
        with torch.no_grad():
            x = observation
            *hidden, (weight, bias) = self.weights
            for w, b in hidden:
                x = ACTIVATIONS[self.activation](torch.nn.functional.linear(x, w, b))
            return torch.nn.functional.linear(x, weight, bias).clamp(-1, 1)

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides the actions: the same for the same policy, wherever it was saved."""
        tensors = {f"{i}.{j}": t for i, layer in enumerate(self.weights) for j, t in enumerate(layer)}
        tensors |= self._domain_tensors()
        return _digest(tensors, {"activation": self.activation, "safe_start": str(self.safe_start)})

    def influence(self, observation: Tensor) -> Tensor:
        """How far to trust an action, (*batch,), in (0, 1]: 1 where the policy was trained."""
        if self.domain is None:
            return observation.new_ones(observation.shape[:-1])
        return self.domain.influence(observation)

    def _domain_tensors(self) -> dict[str, Tensor]:
        domain = {} if self.domain is None else self.domain._asdict()
        return {_key(name): tensor.contiguous() for name, tensor in domain.items()}

    def __repr__(self) -> str:
        widths = [len(OBSERVATIONS), *(bias.numel() for _, bias in self.weights)]
        return f"SchedulePolicy({'-'.join(map(str, widths))}, {self.activation}, sha256={self.digest[:12]})"


def available() -> list[str]:
    """Names of the shipped policies."""
    return sorted(f.name.removesuffix(SUFFIX) for f in _shipped().iterdir() if f.name.endswith(SUFFIX))


def _key(name: str) -> str:
    """Of a tensor of the policy's domain, in its file."""
    return f"domain.{name}"


def _shipped() -> Any:
    return resources.files("rlsched.agents").joinpath("pretrained")


def _resolve(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if path.suffix == SUFFIX:
        if path.is_file():
            return path
        raise FileNotFoundError(f"policy: there is no file {str(path)!r}")
    if str(name_or_path) in available():
        return Path(str(_shipped().joinpath(f"{name_or_path}{SUFFIX}")))
    raise FileNotFoundError(
        f"policy: {str(name_or_path)!r} is neither a {SUFFIX} file nor one of the shipped policies {available()}"
    )


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    sha = hashlib.sha256()
    for key in sorted(tensors):
        sha.update(f"{key}{tuple(tensors[key].shape)}".encode())
        sha.update(tensors[key].contiguous().numpy().tobytes())
    for key in sorted(metadata.keys() - {DIGEST}):
        sha.update(f"{key}{metadata[key]}".encode())
    return sha.hexdigest()
