"""The training loops that are timed: networks, base optimizers, and what stands around or in place of them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from rlsched import ScheduledOptimizer, schedule

CLASSES, VOCABULARY, LENGTH = 10, 256, 32
Step = Callable[[], None]  # one step of a training loop


@dataclass(frozen=True)
class Network:
    """A network and the mini-batch that it is trained on, again and again."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]  # of a batch of this size
    batch_size: int = 64


def _mlp(*widths: int) -> Network:
    def make() -> nn.Module:
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))

    return Network(make, lambda batch: torch.randn(batch, widths[0]))


def _cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for fan_in, fan_out, stride in ((3, 64, 1), (64, 128, 2), (128, 256, 2), (256, 256, 2)):
        layers += [nn.Conv2d(fan_in, fan_out, 3, stride, 1), nn.BatchNorm2d(fan_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, CLASSES))


class Transformer(nn.Module):
    """Four blocks that read a sequence, and classify it by its mean."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 4, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.tokens(tokens) + self.places).mean(1))


NETWORKS = {
    "MLP, 10 thousand": _mlp(64, 96, 32),
    "MLP, 100 thousand": _mlp(256, 256, 128),
    "MLP, 1 million": _mlp(784, 784, 448),
    "MLP, 10 million": _mlp(1024, 2304, 2304, 1024),
    "MLP, 30 million": _mlp(2048, 4096, 4096, 1024),
    "CNN, 1 million": Network(_cnn, lambda batch: torch.randn(batch, 3, 16, 16), batch_size=16),
    "transformer, 0.8 million": Network(
        Transformer, lambda batch: torch.randint(VOCABULARY, (batch, LENGTH)), batch_size=16
    ),
}
OPTIMIZERS: dict[str, Callable[[list[Any]], Optimizer]] = {
    "AdamW": lambda parameters: AdamW(parameters, 1e-3),
    "SGD": lambda parameters: SGD(parameters, 1e-2, momentum=0.9),
}
# What a step of the base optimizer is timed with. The first is what the others are held against.
PLAIN = "clip_grad_norm_ + LambdaLR"
WINDOWS = {"rlsched, windows of 10": 10, "rlsched, windows of 100": 100}
GROUPED = {"rlsched, four groups": False, "rlsched, four groups, per_group": True}  # in windows of 10
UNMEASURED = "rlsched, steps that are not measured"
SCHEDULE_FREE, PRODIGY = "schedulefree", "prodigyopt"
DECISIONS = 100


def loops(optimizer: str) -> list[str]:
    """What can be timed with a base optimizer: other packages only where they are installed."""
    others = [SCHEDULE_FREE, PRODIGY] if optimizer == "AdamW" else [SCHEDULE_FREE]  # Prodigy is a kind of Adam
    return [PLAIN, *WINDOWS, *GROUPED, UNMEASURED, *filter(find_spec, others)]


def window(name: str) -> int:
    """Steps after which a loop has done all that it does."""
    return WINDOWS.get(name, 10)


def loop(name: str, network: Network, optimizer: str) -> Step:
    """A training loop, step by step."""
    torch.manual_seed(0)
    model = network.make()
    inputs, labels = network.inputs(network.batch_size), torch.randint(CLASSES, (network.batch_size,))
    parameters: list[Tensor] = list(model.parameters())
    total_steps = window(name) * DECISIONS
    groups: list[Any] = [{"params": parameters[i::4]} for i in range(4)] if name in GROUPED else parameters
    inner: Any = _other(name, optimizer, parameters) or OPTIMIZERS[optimizer](groups)
    is_scheduled, scheduler = name in {*WINDOWS, *GROUPED, UNMEASURED}, None
    if is_scheduled:
        options: dict[str, Any] = {"total_steps": total_steps, "decisions": DECISIONS}
        inner = ScheduledOptimizer(inner, **options, per_group=GROUPED.get(name, False))
        if name == UNMEASURED:
            controller = inner.controller
            state = schedule.open_window(controller.run, controller.state, total_steps)._replace(probing=0)
            controller.states = [state]
    elif name == PLAIN:
        scheduler = LambdaLR(inner, lambda step: max(0.01, 1 - step / total_steps))

    def step() -> None:
        inner.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        if is_scheduled:
            inner.step(loss=loss)
        elif scheduler is None:
            inner.step()
        else:
            nn.utils.clip_grad_norm_(parameters, 1.0)
            inner.step()
            scheduler.step()

    return step


def _other(name: str, optimizer: str, parameters: list[Tensor]) -> Any:
    """An optimizer of another package, ready to train; None for the loops that have none."""
    if name == SCHEDULE_FREE:
        made = getattr(import_module(name), f"{optimizer}ScheduleFree")(parameters)
        made.train()
        return made
    return import_module(name).Prodigy(parameters) if name == PRODIGY else None


def memory(step: Step) -> int:
    """Bytes of the tensors that a loop keeps: weights, gradients, the state of its optimizer, what is measured."""
    for _ in range(3):  # past the probe, which keeps the weights as they were
        step()
    seen: set[int] = set()
    reached: dict[int, int] = {}  # address of a storage -> its bytes
    todo: list[Any] = list(getattr(step, "__closure__", None) or ())
    while todo:  # all that the loop refers to; a module or a class is not its own
        item = todo.pop()
        if id(item) in seen or isinstance(item, type | ModuleType | FunctionType):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            reached[storage.data_ptr()] = storage.nbytes()
            todo.append(item.grad if item.is_leaf else None)
        todo.extend(gc.get_referents(item))
    return sum(reached.values())
