"""A policy in formats that others can run: ONNX, and TorchScript. Each is an entry of `FORMATS`."""

from __future__ import annotations

import io
import json
import logging
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlsched.files import write
from rlsched.onnx_policy import OnnxPolicy, OnnxSpec, sealed
from rlsched.policy import ONNX, SPEC, SUFFIX, VERSION, Policy, SchedulePolicy
from rlsched.signals import OBSERVATIONS

SAME = 1e-5  # of an action: by as much may two orders of a sum differ, in single precision


class Deployed(nn.Module):
    """All that a policy does between an observation and an action that is applied, for a batch of runs.

    From observations (batch, observations), and a memory (batch, size) where it remembers, to actions in [−1, 1],
    (batch, controls), their influence, (batch,), and the new memory: scaling by the domain and clipping are inside.
    """

    def __init__(self, policy: SchedulePolicy) -> None:
        super().__init__()
        self.actor = policy.actor  # so that its weights are the module's
        self._policy = policy
        self.eval()

    def forward(self, observation: Tensor, memory: Tensor | None = None) -> tuple[Tensor, ...]:
        action, influence, memory = self._policy.decide(observation, memory)
        return (action, influence) if memory is None else (action, influence, memory)


INPUTS = ("observation", "memory")
OUTPUTS = ("action", "influence", "next_memory")


def example(policy: SchedulePolicy, batch: int = 2) -> tuple[Tensor, ...]:
    """Inputs of a deployed policy."""
    observation, memory = torch.zeros(batch, len(policy.observations)), policy.begin((batch,))
    if memory is not None and not (isinstance(memory, Tensor) and memory.dim() == 2):
        raise ValueError(f"policy: one that remembers a tensor (*batch, size) can be exported, not {type(memory)}")
    return (observation,) if memory is None else (observation, memory)


def described(policy: SchedulePolicy, digest: str) -> OnnxSpec:
    """What is written down beside the operations.

    Args:
        policy: that is exported.
        digest: of what decides: the policy's own, or "" where it was changed on the way.
    """
    remembered = example(policy)[1:]
    return OnnxSpec(
        version=VERSION,
        observations=policy.observations,
        controls=policy.controls,
        safe_start=policy.safe_start,
        base_schedule=policy.base_schedule.name,
        memory=remembered[0].shape[-1] if remembered else 0,
        policy=digest,
    )


def onnx_model(policy: SchedulePolicy) -> Any:
    """The operations of a policy as an `onnx.ModelProto`, for batches of any size.

    Raises:
        ModuleNotFoundError: onnx or onnxscript is missing: `pip install 'rlsched[export]'`.
    """
    import onnx
    import onnxscript  # noqa: F401 (what torch exports by: better missed here than in the midst of it)

    inputs = example(policy)
    with _quiet("torch.onnx"):
        program = torch.onnx.export(
            Deployed(policy),
            inputs,
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},) * len(inputs),
            input_names=INPUTS[: len(inputs)],
            output_names=OUTPUTS[: len(inputs) + 1],
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    graph = model.graph
    # Where in the source an operation comes from, with the paths of this machine: of no use elsewhere.
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer, *graph.value_info):
        part.ClearField("metadata_props")
    return model


def onnx_bytes(policy: SchedulePolicy) -> bytes:
    """The content of an ONNX file that decides as the policy does."""
    return sealed(onnx_model(policy).SerializeToString(), described(policy, policy.digest), policy.info)


def torchscript_bytes(policy: SchedulePolicy) -> bytes:
    """The content of a TorchScript file that decides as the policy does, for libtorch.

    torch calls TorchScript deprecated, in favour of `torch.export`. Its .pt2 is a graph for Python or to be compiled
    for one machine, while a TorchScript file is what a program in C++ loads as it is.
    """
    content, spec = io.BytesIO(), json.dumps(described(policy, policy.digest)._asdict())
    with _quiet("torch.jit"), torch.no_grad():
        module = torch.jit.trace(Deployed(policy), example(policy), check_trace=False)
        torch.jit.save(module, content, _extra_files={SPEC: spec})
    plain = io.BytesIO()
    with zipfile.ZipFile(content) as whole, zipfile.ZipFile(plain, "w") as kept:
        for name in whole.namelist():
            if not name.endswith(".debug_pkl"):  # call stacks, with the paths of this machine
                kept.writestr(zipfile.ZipInfo(name), whole.read(name))
    return plain.getvalue()


def difference(policy: Policy, other: Policy, *, runs: int = 256, decisions: int = 8, seed: int = 0) -> float:
    """By how much the actions of two policies differ at most, in runs of observations drawn within their bounds."""
    bounds = [OBSERVATIONS[name] for name in policy.observations]
    low, high = (torch.tensor([getattr(each, end) for each in bounds]) for end in ("low", "high"))
    drawn = torch.rand(decisions, runs, len(bounds), generator=torch.Generator().manual_seed(seed))
    memory, remembered, most = policy.begin((runs,)), other.begin((runs,)), 0.0
    for observation in low + drawn * (high - low):
        action, memory = policy.act(observation, memory)
        answer, remembered = other.act(observation, remembered)
        most = max(most, float((action - answer).abs().max()))
    return most


def save_onnx(policy: SchedulePolicy, path: Path) -> Path:
    """Write an ONNX file that decides as the policy does. Returns its path.

    Raises:
        ModuleNotFoundError: what it takes is missing: `pip install 'rlsched[export]'`.
        ValueError: ONNX Runtime decides otherwise by it, by more than `SAME`.
    """
    content = onnx_bytes(policy)
    off = difference(policy, OnnxPolicy(content))
    if not off <= SAME:
        raise ValueError(f"policy: ONNX Runtime decides otherwise by it, by up to {off:.1e}: nothing was written")
    return write(path, content)


class Format(NamedTuple):
    """How a policy is written."""

    suffix: str  # of its files
    save: Callable[[SchedulePolicy, Path], Path]


FORMATS: Mapping[str, Format] = {
    "safetensors": Format(SUFFIX, SchedulePolicy.save),
    "onnx": Format(ONNX, save_onnx),
    "torchscript": Format(".pt", lambda policy, path: write(path, torchscript_bytes(policy))),
}


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Inside, exporters say nothing of what is deprecated in themselves."""
    of = logging.getLogger(logger)
    before = of.level
    of.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for kind in (DeprecationWarning, FutureWarning, UserWarning):
                warnings.simplefilter("ignore", kind)
            yield
    finally:
        of.setLevel(before)
