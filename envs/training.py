"""Batched inner training: N networks of one architecture, trained as one stack of tensors.

The weights of all networks are one matrix, `(networks, parameters)`, and so are their gradients and the state of
their optimizers. The gradient comes from `Stack`; what follows it is elementwise and in place. The updates are those
of `torch.optim`: SGD with and without Nesterov's momentum, Adam, AdamW and RMSprop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from inspect import signature
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from rlsched import control, moments
from rlsched.envs.draws import minibatch_rows, seeded
from rlsched.envs.sources import Points, Source, Stored
from rlsched.envs.stacking import Buffers, Stack
from rlsched.envs.tasks import OPTIMIZERS, InnerTask
from rlsched.moments import Moments
from rlsched.signals import Run

T = TypeVar("T")

BETA2, ALPHA, EPSILON = 0.999, 0.99, 1e-8  # of Adam and AdamW; of RMSprop; of all three
# A CPU trains a chunk of networks for a whole window before it turns to the next, so that they stay in its cache: as
# many as have CHUNK_WEIGHTS weights, but at least MIN_CHUNK, since fewer would cost more in calls than they save.
CHUNK_WEIGHTS, MIN_CHUNK = 2**18, 64


class Networks(NamedTuple):
    """What an inner step changes, in place."""

    params: Tensor  # (networks, parameters)
    momentum: Tensor  # (networks, parameters), running average of the gradients
    second_moment: Tensor  # (networks, parameters), running average of their squares
    last_grad: Tensor  # (networks, parameters)
    average_norm: Tensor  # (networks,), running average of the gradient norm
    steps: Tensor  # (networks,), inner steps done, float32
    buffers: Buffers  # what else a network holds: name -> (networks, *shape)

    def rows(self, index: slice | list[int]) -> Networks:
        """Some of the networks: views of them for a slice, copies for a list."""
        tensors = {name: getattr(self, name)[index] for name in self._fields[:-1]}
        return Networks(**tensors, buffers={name: b[index] for name, b in self.buffers.items()})


class Settings(NamedTuple):
    """What stays fixed in an episode, each (networks,); float32, except for the integers."""

    total_steps: Tensor
    optimizer: Tensor  # index into OPTIMIZERS, int64
    adaptive: Tensor  # +1 for optimizers that divide by a second moment, −1 for SGD
    sums: Tensor  # 1 where torch's momentum is a sum of gradients, 0 where it is their average
    lr: Tensor  # base lr in the terms of torch.optim
    momentum: Tensor  # base momentum
    weight_decay: Tensor
    loss_scale: Tensor
    loss_reported: Tensor  # 1 where the policy sees the loss, else 0
    points: Tensor  # training points, int64
    batch_size: Tensor  # int64
    seed: Tensor  # of the mini-batches, int64

    def rows(self, index: slice | list[int]) -> Settings:
        return Settings(*(tensor[index] for tensor in self))


class InnerTraining:
    """`size` networks of one inner task, each with its own data, hyperparameters and clock.

    Args:
        task: the family of inner tasks that the networks are drawn from.
        size: number of networks.
        compile: compile the inner step with `torch.compile`: about twice as fast after seconds to compile.
        device: where the networks are trained.

    Raises:
        ValueError: nothing can be trained on this device.
    """

    def __init__(
        self, task: InnerTask, size: int, *, compile: bool = False, device: str | torch.device = "cpu"
    ) -> None:
        self.task = task
        self.size = size
        self.device = usable_device(device)
        example, network = task.source.draw(np.random.default_rng(0)), task.initial_network(0)
        few = slice(task.batch_sizes[0])
        self._stack = Stack(network, task.loss, example.inputs[few].to(device), example.targets[few].to(device))
        self._data = _Data(task.source, size, example, self.device)
        self._compile = compile and not self._stack.looped
        self._graph = _compiled(self._inner_step) if self._compile else self._inner_step
        self._evaluate = _compiled(self._stack.evaluate) if self._compile else self._stack.evaluate

        def vector(dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.ones(size, dtype=dtype, device=self.device)

        def matrix() -> Tensor:
            return torch.zeros(size, self._stack.parameters, device=self.device)

        _, buffers = self._stack.flatten(network)
        stacked = {name: torch.stack([b] * size).to(self.device) for name, b in buffers.items()}
        self.networks = Networks(matrix(), matrix(), matrix(), matrix(), vector(), vector(), stacked)
        integers = ("optimizer", "points", "batch_size", "seed")
        self.settings = Settings(*(vector(torch.int64 if n in integers else torch.float32) for n in Settings._fields))
        used = {name for name, weight in task.setup.optimizers.items() if weight > 0}
        self._adam, self._rmsprop = bool(used & {"Adam", "AdamW"}), "RMSprop" in used
        self._nesterov = "Nesterov" in used

        chunk = size if self.device.type == "cuda" else max(MIN_CHUNK, CHUNK_WEIGHTS // self._stack.parameters)
        chunks = math.ceil(size / chunk)
        bounds = np.linspace(0, size, chunks + 1).round().astype(int).tolist()
        self._chunks = [slice(a, b) for a, b in pairwise(bounds)]

    @property
    def nbytes(self) -> int:
        """Memory that the networks, their optimizers and their data take."""
        tensors = [*self.networks[:-1], *self.networks.buffers.values(), *self.settings, *self._data.tensors()]
        storages = [tensor.untyped_storage() for tensor in tensors]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def begin(self, slots: list[int], rngs: list[Generator]) -> None:
        """Draw a new episode for each of `slots`, from its own generator."""
        setups, points, seeds = [], [], []
        for slot, rng in zip(slots, rngs, strict=True):
            setup = self.task.setup.draw(rng, self.task.batch_sizes)
            seed, weights_seed = rng.integers(2**63, size=2).tolist()
            params, buffers = self._stack.flatten(self.task.initial_network(weights_seed), setup.gain)
            self.networks.params[slot] = params
            for name, buffer in buffers.items():
                self.networks.buffers[name][slot] = buffer
            setups.append(setup)
            seeds.append(seed)
            points.append(self._data.put(slot, rng))
        for tensor in (self.networks.momentum, self.networks.second_moment, self.networks.last_grad):
            tensor[slots] = 0.0
        self.networks.steps[slots] = 0.0
        self.networks.average_norm[slots] = torch.nan

        kinds = [OPTIMIZERS[s.optimizer] for s in setups]
        drawn: dict[str, list[Any]] = {
            "total_steps": [1 + s.decisions * self.task.interval for s in setups],  # the first is on its own
            "optimizer": [list(OPTIMIZERS).index(s.optimizer) for s in setups],
            "adaptive": [1 if kind.adaptive else -1 for kind in kinds],
            "sums": [kind.sums for kind in kinds],
            "points": points,
            "seed": seeds,
        }
        for name, tensor in self.settings._asdict().items():
            values = drawn[name] if name in drawn else [getattr(s, name) for s in setups]
            tensor[slots] = torch.tensor(values, dtype=tensor.dtype, device=self.device)

    def run(self, slots: slice | list[int]) -> Run:
        """What the signals need to know of the episodes in `slots`."""
        total, adaptive = self.settings.total_steps[slots], self.settings.adaptive[slots]
        return Run(total, torch.full_like(total, self.task.interval), adaptive)

    def first_step(self, slots: list[int], states: Tensor, lr_factor: float) -> Moments:
        """The first inner step of new episodes, at `lr_factor` times the lr; `states` as in `window`."""
        networks = self.networks.rows(slots)
        step = self._train(networks, slots, states, 1, lr_factor, graph=self._inner_step)
        for name in Networks._fields[:-1]:
            getattr(self.networks, name)[slots] = getattr(networks, name)
        for name, buffer in networks.buffers.items():
            self.networks.buffers[name][slots] = buffer
        return step

    def window(self, states: Tensor) -> Moments:
        """Train every network for one window; `states` are the control states, (size, controls).

        Returns:
            The moments of its inner steps, each (size, interval).
        """
        parts = [
            self._train(self.networks.rows(chunk), chunk, states[chunk], self.task.interval, 1.0, graph=self._graph)
            for chunk in self._chunks
        ]
        return Moments(*(torch.cat(values) for values in zip(*parts, strict=True)))

    def validation_loss(self, slots: list[int] | None = None) -> Tensor:
        """Loss on the validation points, without the factor on the loss, of the networks in `slots` or of all."""
        parts = self._chunks if slots is None else [slots]
        evaluate = self._evaluate if slots is None else self._stack.evaluate
        losses = []
        with torch.no_grad(), seeded(0, self.device):
            for part in parts:
                networks = self.networks.rows(part)
                losses.append(evaluate(networks.params, networks.buffers, *self._data.validation(part)))
        return torch.cat(losses)

    def minibatches(self, slots: slice | list[int], steps: int) -> Iterable[tuple[Tensor, Tensor]]:
        """The next `steps` mini-batches of the networks in `slots`: (slots, batch, *shape) each."""
        batch = self.task.batch_sizes[0]
        s, done = self.settings.rows(slots), self.networks.steps[slots].long()
        rows = minibatch_rows(s.seed, done, steps, batch, s.batch_size, s.points)
        return (self._data.batch(index) for index in self._data.index(slots, rows))

    def _train(
        self, networks: Networks, slots: slice | list[int], states: Tensor, steps: int, lr_factor: float, graph: Any
    ) -> Moments:
        """`steps` inner steps of `networks`, which are those in `slots`."""
        settings = self.settings.rows(slots)
        batches = self.minibatches(slots, steps)
        coefficients = _coefficients(states, settings, networks.steps, steps, lr_factor)
        rows = []
        noise = int((settings.seed + networks.steps.long()).sum()) & (2**63 - 1)
        with seeded(noise, self.device):
            for i, (inputs, targets) in enumerate(batches):
                rows.append(graph(networks, coefficients.at(i), inputs, targets))
        return moments.as_measured(Moments(*torch.stack(rows, -1).unbind()))

    def _inner_step(self, networks: Networks, c: Coefficients, inputs: Tensor, targets: Tensor) -> Tensor:
        """One inner step, in place. Returns its moments, (fields of Moments, networks)."""
        params, momentum, second_moment, last_grad, average, steps, buffers = networks
        grad, loss, changed = self._stack.gradient(params, buffers, inputs, targets, c.loss_scale)
        grad_norm = moments.norm(grad)
        clip = moments.clip_coefficient(grad_norm, average, c.clip_multiple)
        cosine = moments.cosine(grad, last_grad)
        # Without momentum there is only the last gradient to agree with.
        momentum_cosine = torch.where(c.has_momentum, moments.cosine(grad, momentum), cosine)

        step_grad = clip[:, None] * grad + c.l2[:, None] * params
        if self._adam or self._rmsprop:
            second_moment.lerp_(step_grad.square(), c.forget[:, None])
        if self._rmsprop:  # momentum follows the division; with Adam it precedes it
            step_grad = step_grad / (c.early_root[:, None] * second_moment.sqrt() + c.early_epsilon[:, None])
        momentum.lerp_(step_grad, 1 - c.momentum[:, None])
        direction = torch.lerp(step_grad, momentum, c.lookahead[:, None]) if self._nesterov else momentum
        if self._adam:
            direction = direction / (c.root[:, None] * second_moment.sqrt() + c.epsilon[:, None])
        after = c.shrink[:, None] * params - c.lr[:, None] * direction
        updates = moments.update_moments(params, after, grad, loss)
        row = torch.stack([loss, grad_norm, (clip < 1).float(), cosine, momentum_cosine, *updates])

        params.copy_(after)
        last_grad.copy_(grad)
        average.copy_(moments.average_norm(average, grad_norm))
        steps += 1
        for name, buffer in changed.items():
            buffers[name].copy_(buffer)
        return row


class Coefficients(NamedTuple):
    """What an inner step goes by. Each (networks,), or (steps, networks) for several steps."""

    lr: Tensor  # of the average of gradients, with Adam's correction of its bias
    momentum: Tensor
    lookahead: Tensor  # Nesterov: share of the momentum in the direction, where the rest is the gradient; else 1
    root: Tensor  # Adam: factor on the root of the second moment, which corrects its bias; else 0
    epsilon: Tensor  # Adam: added to it; else 1, so that the division does nothing
    early_root: Tensor  # the same for RMSprop
    early_epsilon: Tensor
    forget: Tensor  # weight of a new gradient in the second moment
    l2: Tensor  # weight decay that is added to the gradient
    shrink: Tensor  # AdamW: factor of the decoupled weight decay on the weights; else 1
    clip_multiple: Tensor
    loss_scale: Tensor
    has_momentum: Tensor  # bool

    def at(self, step: int) -> Coefficients:
        return Coefficients(*(c[step] if c.dim() > 1 else c for c in self))


def _coefficients(states: Tensor, settings: Settings, done: Tensor, steps: int, lr_factor: float) -> Coefficients:
    """Of the next `steps` inner steps, with the control states (networks, controls), after `done` (networks,)."""
    number = list(OPTIMIZERS).index
    rmsprop, nesterov = settings.optimizer == number("RMSprop"), settings.optimizer == number("Nesterov")
    adamw = settings.optimizer == number("AdamW")
    adam = adamw | (settings.optimizer == number("Adam"))
    momentum = control.momentum_of(states[:, control.MOMENTUM])
    count = done + torch.arange(1, steps + 1, device=done.device)[:, None]
    lr = settings.lr * sum_to_average(settings) * states[:, control.LR].exp() * lr_factor
    lr = lr * control.fallback_schedule(count - 1, settings.total_steps)
    return Coefficients(
        lr=torch.where(adam, lr / (1 - momentum**count), lr),
        momentum=momentum,
        lookahead=torch.where(nesterov, momentum, 1.0),
        root=torch.where(adam, (1 - BETA2**count).rsqrt(), 0.0),
        epsilon=torch.where(adam, EPSILON, 1.0),
        early_root=rmsprop.float(),
        early_epsilon=torch.where(rmsprop, EPSILON, 1.0),
        forget=torch.where(rmsprop, 1 - ALPHA, 1 - BETA2),
        l2=torch.where(adamw, 0.0, settings.weight_decay),
        shrink=torch.where(adamw, 1 - lr * settings.weight_decay, 1.0),
        clip_multiple=control.clip_multiple(states[:, control.CLIP]),
        loss_scale=settings.loss_scale,
        has_momentum=settings.momentum > 0,
    )


def usable_device(device: str | torch.device) -> torch.device:
    """The device of this name.

    Raises:
        ValueError: there is none, or nothing can be computed on it.
    """
    try:
        torch.zeros(1, device=device).item()
        return torch.device(device)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be one that torch can compute on here, got {device!r}: {reason}") from error


def sum_to_average(settings: Settings) -> Tensor:
    """Base lr on the average of gradients over that in torch's terms, (networks,)."""
    return torch.where(settings.sums > 0, 1 / (1 - settings.momentum), 1.0)


def _compiled(function: Callable[..., T]) -> Callable[..., T]:
    """The function, with graphs of its own: those that tasks share are searched one by one, and end at eight."""
    isolated: dict[str, Any] = (
        {"isolate_recompiles": True} if "isolate_recompiles" in signature(torch.compile).parameters else {}
    )
    return torch.compile(function, dynamic=False, **isolated)


class _Data:
    """The data of all networks: a copy for each in one pool, or one pool for all and rows in it for each."""

    def __init__(self, source: Source, size: int, like: Points, device: torch.device) -> None:
        self._source, self._most, self._device = source, source.max_points, device
        self._batch_inputs, self._batch_targets = _pool(0, like.inputs, device), _pool(0, like.targets, device)
        if isinstance(source, Stored):
            self._inputs = source.inputs.to(device)
            self._targets = self._inputs if source.targets is source.inputs else source.targets.to(device)
            self._rows = torch.zeros(size, self._most, dtype=torch.int32, device=device)
            self._validation_rows = torch.zeros(size, source.validation_points, dtype=torch.int32, device=device)
            return
        alike = like.targets is like.inputs
        self._inputs = _pool(size * self._most, like.inputs, device)
        self._targets = self._inputs if alike else _pool(size * self._most, like.targets, device)
        self._validation_inputs = _pool(size, like.validation_inputs[None], device)
        self._validation_targets = (
            self._validation_inputs if alike else _pool(size, like.validation_targets[None], device)
        )

    def tensors(self) -> list[Tensor]:
        return [value for value in vars(self).values() if isinstance(value, Tensor)]

    def put(self, slot: int, rng: Generator) -> int:
        """Draw an episode's data; returns its number of training points."""
        if isinstance(self._source, Stored):
            train, validation = self._source.rows(rng)
            self._rows[slot, : len(train)] = train
            self._validation_rows[slot] = validation
            return len(train)
        drawn = self._source.draw(rng)
        start, points = slot * self._most, len(drawn.inputs)
        if len(drawn.targets) != points:
            raise ValueError(f"data: the source drew {points} inputs and {len(drawn.targets)} targets")
        if points > self._most:
            raise ValueError(f"max_points of the data is {self._most}, but an episode has {points} points")
        self._inputs[start : start + points] = drawn.inputs
        self._validation_inputs[slot] = drawn.validation_inputs
        if self._targets is not self._inputs:
            self._targets[start : start + points] = drawn.targets
            self._validation_targets[slot] = drawn.validation_targets
        return points

    def index(self, slots: slice | list[int], rows: Tensor) -> Tensor:
        """Where in the pool the `rows` (steps, slots, batch) of the networks in `slots` are, of the same shape."""
        if isinstance(self._source, Stored):
            own = self._rows[slots].expand(len(rows), -1, -1)
            return own.gather(2, rows).long()
        networks = torch.arange(len(self._inputs) // self._most, device=self._device)[slots]
        return rows + (networks * self._most)[:, None]

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets at `index` (slots, batch), until the next call.

        Their memory is used again: to fill fresh pages at every step costs several times as much as to copy the points.
        """
        flat = index.flatten()
        alike = self._targets is self._inputs
        if len(flat) > len(self._batch_inputs):
            self._batch_inputs = _pool(len(flat), self._inputs, self._device)
            self._batch_targets = self._batch_inputs if alike else _pool(len(flat), self._targets, self._device)
        inputs, targets = self._batch_inputs[: len(flat)], self._batch_targets[: len(flat)]
        torch.index_select(self._inputs, 0, flat, out=inputs)
        if not alike:
            torch.index_select(self._targets, 0, flat, out=targets)
        return inputs.unflatten(0, index.shape), targets.unflatten(0, index.shape)

    def validation(self, slots: slice | list[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (slots, validation points, *shape)."""
        if isinstance(self._source, Stored):
            return self.batch(self._validation_rows[slots].long())
        return self._validation_inputs[slots], self._validation_targets[slots]


def _pool(rows: int, like: Tensor, device: torch.device) -> Tensor:
    return torch.zeros(rows, *like.shape[1:], dtype=like.dtype, device=device)
