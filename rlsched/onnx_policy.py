"""A policy in an ONNX file, which ONNX Runtime decides by."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlsched.actors import Memory
from rlsched.base_schedule import named_base_schedule
from rlsched.control import CONTROLS
from rlsched.policy import (
    DIGEST,
    INFO,
    ONNX,
    SPEC,
    VERSION,
    Policy,
    PolicyFileError,
    SchedulePolicy,
    checked_names,
    checked_safe_start,
    fields_of,
)
from rlsched.signals import OBSERVATIONS

DIGITS = 64  # of a checksum
FATAL = 4  # of ONNX Runtime's levels of what it logs
Array = NDArray[np.float32]


class OnnxSpec(NamedTuple):
    """What a policy is but for its operations, as its ONNX file says it."""

    version: int  # as of policy files
    observations: tuple[str, ...]
    controls: tuple[str, ...]
    safe_start: float
    base_schedule: str
    memory: int  # numbers that a run remembers; 0 for none
    policy: str  # digest of the policy that it decides as; "" where it is none's copy


class OnnxPolicy:
    """A policy as `rlsched export --format onnx` writes it: it decides the same by ONNX Runtime, without torch's actor.

    It stands wherever a policy object does, such as `ScheduledOptimizer(policy=…)`; `decide` takes and gives arrays.
    `pip install 'rlsched[export]'` brings ONNX Runtime.

    Args:
        content: of the file.
        name: what errors call it.
        threads: for the decisions of one call.

    Raises:
        ModuleNotFoundError: ONNX Runtime is missing.
        PolicyFileError: this is no ONNX file that rlsched wrote, it was altered, or needs what this rlsched does not
            have.
    """

    def __init__(self, content: bytes, *, name: str = "content", threads: int = 1) -> None:
        _check_seal(content, name)
        runtime = _onnxruntime(name)
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = FATAL  # what is wrong is told by an error
        try:
            self._session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
            metadata = self._session.get_modelmeta().custom_metadata_map
            spec, self.info = fields_of(SPEC, metadata[SPEC]), fields_of(INFO, metadata[INFO])
            if spec.keys() != set(OnnxSpec._fields) or spec["version"] != VERSION:
                raise ValueError(f"it is of version {spec.get('version')} of policy files, and not of {VERSION}")
            said = OnnxSpec(**spec)
            self.observations = checked_names("observations", said.observations, OBSERVATIONS)
            self.controls = checked_names("controls", said.controls, CONTROLS)
            self.base_schedule = named_base_schedule(said.base_schedule)
            self.safe_start, self.memory = checked_safe_start(said.safe_start), said.memory
            self._check_shapes()
        except Exception as error:  # of ONNX Runtime, which has its own for each of its reasons
            raise PolicyFileError(f"{name} is no policy that this rlsched can use: {error}") from error
        self.digest = said.policy or hashlib.sha256(content).hexdigest()
        self._made_of = content, name, threads

    @classmethod
    def load(cls, path: str | Path, *, threads: int = 1) -> OnnxPolicy:
        """Load an ONNX file.

        Raises:
            FileNotFoundError: there is no such file.
            ModuleNotFoundError, PolicyFileError: see above.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"policy: there is no file {str(path)!r}")
        return cls(path.read_bytes(), name=str(path), threads=threads)

    def _check_shapes(self) -> None:
        """
        Raises:
            Exception: it does not take and give what its metadata say.
        """
        runs = 2
        seen = np.zeros((runs, len(self.observations)), np.float32)
        action, influence, memory = self.decide(
            seen, np.zeros((runs, self.memory), np.float32) if self.memory else None
        )
        there = action.shape, influence.shape, 0 if memory is None else memory.shape[-1]
        if there != ((runs, len(self.controls)), (runs,), self.memory):
            raise ValueError(f"for {runs} runs it gives {there}")

    def begin(self, batch: tuple[int, ...] = ()) -> Memory:
        """What it remembers at the start of runs of shape `batch`."""
        return torch.zeros(*batch, self.memory, dtype=torch.float32, device="cpu") if self.memory else None

    def act(self, observation: Tensor, memory: Memory = None) -> tuple[Tensor, Memory]:
        """The action in [−1, 1], (*batch, controls), and the new memory, for observations (*batch, observations)."""
        batch = tuple(observation.shape[:-1])
        if self.memory and memory is None:
            memory = self.begin(batch)
        remembered = memory.reshape(-1, self.memory).numpy() if self.memory else None
        action, _, later = self.decide(observation.reshape(-1, len(self.observations)).numpy(), remembered)
        after = None if later is None else torch.from_numpy(later).reshape(*batch, self.memory)
        return torch.from_numpy(action).reshape(*batch, len(self.controls)), after

    def influence(self, observation: Tensor) -> Tensor:
        """How far the actions are trusted, (*batch,), in [0, 1]: 1 where the policy was trained."""
        flat = observation.reshape(-1, len(self.observations)).numpy()
        influence = self.decide(flat, np.zeros((len(flat), self.memory), np.float32) if self.memory else None)[1]
        return torch.from_numpy(influence).reshape(observation.shape[:-1])

    def decide(self, observations: Array, memory: Array | None = None) -> tuple[Array, Array, Array | None]:
        """Actions (batch, controls), influences (batch,) and the new memory, for observations (batch, observations).

        Args:
            observations: float32, one row for each run.
            memory: (batch, `memory`) where that is not 0, zeros at the start of a run; else None.
        """
        inputs = {"observation": observations} | ({} if memory is None else {"memory": memory})
        action, influence, *later = self._session.run(None, inputs)
        return action, influence, later[0] if later else None

    def __reduce__(self) -> tuple[Any, ...]:
        return _made, self._made_of  # a session cannot be copied

    def __repr__(self) -> str:
        return f"OnnxPolicy({self._made_of[1]}, {self.base_schedule.name}, sha256={self.digest[:12]})"


def load_policy(name_or_path: str | Path) -> Policy:
    """A policy of any kind: an ONNX file, or what `SchedulePolicy.load` takes."""
    return (OnnxPolicy if Path(name_or_path).suffix == ONNX else SchedulePolicy).load(name_or_path)


def sealed(model: bytes, spec: OnnxSpec, info: dict[str, Any]) -> bytes:
    """An ONNX model as the file of a policy: what it is in its metadata, and a checksum of all of it at the end."""
    content = model + _entry(SPEC, json.dumps(spec._asdict())) + _entry(INFO, json.dumps(info))
    return content + _seal(content)


def _check_seal(content: bytes, name: str) -> None:
    """Done before ONNX Runtime reads a byte.

    Raises:
        PolicyFileError: the content is not that of a policy's ONNX file, or was altered.
    """
    size = len(_seal(b""))
    end, expected = content[-size:], _seal(content[:-size])
    if end == expected:
        return
    if end[:-DIGITS] == expected[:-DIGITS]:
        raise PolicyFileError(f"{name} was altered after it was written: its contents do not match its checksum")
    raise PolicyFileError(
        f"{name} is no policy: not an ONNX file that `rlsched export --format onnx` wrote, or not whole"
    )


def _seal(content: bytes) -> bytes:
    return _entry(DIGEST, hashlib.sha256(content).hexdigest())


def _entry(key: str, value: str) -> bytes:
    """An entry of the metadata of an ONNX model. Protocol buffers are parts one after the other, so that it is added by
    writing it behind the model, and the checksum of what stands before it can be the last."""
    return _part(14, _part(1, key.encode()) + _part(2, value.encode()))


def _part(field: int, content: bytes) -> bytes:
    """A field of a protocol buffer: number, kind (2: with its length), length, content."""
    length, size = b"", len(content)
    while size > 127:
        length, size = length + bytes([size % 128 + 128]), size // 128
    return bytes([field << 3 | 2]) + length + bytes([size]) + content


def _made(content: bytes, name: str, threads: int) -> OnnxPolicy:
    return OnnxPolicy(content, name=name, threads=threads)


def _onnxruntime(name: str) -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        needed = "needs ONNX Runtime: pip install 'rlsched[export]'"
        raise ModuleNotFoundError(f"policy: {name} {needed}", name="onnxruntime") from error
    return onnxruntime
