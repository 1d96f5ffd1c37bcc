"""Batched inner training: N networks of one architecture, trained as one stack of tensors.

The weights of all networks are one matrix, `(networks, parameters)`, and so are their gradients and the state of
their optimizers. The gradient comes from `torch.func`, so any architecture that it can vectorise will do; what
follows the gradient is elementwise. The updates are those of `torch.optim.SGD` (with momentum) and
`torch.optim.AdamW`.
"""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from numpy.random import Generator
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from rlsched import control, moments
from rlsched.envs.tasks import Episode, InnerTask
from rlsched.moments import Moments
from rlsched.signals import Run

BETA2, EPSILON = 0.999, 1e-8  # of AdamW


class Networks(NamedTuple):
    """Everything that an inner step changes."""

    params: Tensor  # (networks, parameters)
    momentum: Tensor  # (networks, parameters), running average of the gradients
    second_moment: Tensor  # (networks, parameters), running average of their squares
    last_grad: Tensor  # (networks, parameters)
    average_norm: Tensor  # (networks,), running average of the gradient norm
    steps: Tensor  # (networks,), inner steps done, float32


class Settings(NamedTuple):
    """What stays fixed in an episode, each (networks,)."""

    total_steps: Tensor
    adaptive: Tensor  # +1 AdamW, −1 SGD
    lr: Tensor  # base lr in the terms of torch.optim
    momentum: Tensor  # base momentum
    weight_decay: Tensor
    loss_scale: Tensor
    points: Tensor  # training points
    loss_reported: Tensor  # 1 where the policy sees the loss, else 0


class InnerTraining:
    """`size` networks of one inner task, each with its own data, hyperparameters and clock.

    Args:
        task: the family of inner tasks that the networks are drawn from.
        size: number of networks.
        compile: compile the inner step with `torch.compile`: about twice as fast after seconds to compile.
    """

    def __init__(self, task: InnerTask, size: int, *, compile: bool = False) -> None:
        self.task = task
        self.size = size
        network = deepcopy(task.network()).requires_grad_(False)  # the task may hand out one network to all
        shapes = {name: p.shape for name, p in network.named_parameters()}
        sizes = [shape.numel() for shape in shapes.values()]
        parameters = sum(sizes)

        def loss(params: Tensor, inputs: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
            pieces = zip(shapes.items(), params.split(sizes), strict=True)
            weights = {name: piece.view(shape) for (name, shape), piece in pieces}
            return scale * task.loss(functional_call(network, weights, (inputs,)), targets)

        self._loss = vmap(loss)
        self._gradient = vmap(grad_and_value(loss))
        self._compile = compile
        self._graph = torch.compile(self._inner_step, dynamic=False) if compile else self._inner_step

        matrix, vector = torch.zeros(size, parameters), torch.zeros(size)
        self.networks = Networks(matrix, matrix.clone(), matrix.clone(), matrix.clone(), vector, vector.clone())
        self.settings = Settings(*(torch.ones(size) for _ in Settings._fields))
        self._data: _Data | None = None

    def begin(self, slots: list[int], rngs: list[Generator]) -> None:
        """Draw a new episode for each of `slots`, from its own generator."""
        setups, loss_scales, points = [], [], []
        for slot, rng in zip(slots, rngs, strict=True):
            episode = self.task.episode(rng)
            setups.append(self.task.setup.draw(rng, episode.loss_scale))
            loss_scales.append(episode.loss_scale)
            if self._data is None:
                self._data = _Data(self.size, self.task.max_points, episode)
            points.append(self._data.put(slot, episode))
            self.networks.params[slot] = episode.params
        for tensor in self.networks[1:]:
            tensor[slots] = 0.0
        self.networks.average_norm[slots] = torch.nan

        def column(values: list[Any]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32)

        drawn = Settings(
            total_steps=column([1 + s.decisions * self.task.interval for s in setups]),  # the first is on its own
            adaptive=column([1 if s.adaptive else -1 for s in setups]),
            lr=column([s.lr for s in setups]),
            momentum=column([s.momentum for s in setups]),
            weight_decay=column([s.weight_decay for s in setups]),
            loss_scale=column(loss_scales),
            points=column(points),
            loss_reported=column([s.loss_reported for s in setups]),
        )
        for tensor, values in zip(self.settings, drawn, strict=True):
            tensor[slots] = values

    def run(self, slots: slice | list[int]) -> Run:
        """What the signals need to know of the episodes in `slots`."""
        total, adaptive = self.settings.total_steps[slots], self.settings.adaptive[slots]
        return Run(total, torch.full_like(total, self.task.interval), adaptive)

    def first_step(self, slots: list[int], rngs: list[Generator], states: Tensor, lr_factor: float) -> Moments:
        """The first inner step of new episodes, at `lr_factor` times the lr; `states` as in `window`."""
        subset = Networks(*(tensor[slots] for tensor in self.networks))
        settings = Settings(*(tensor[slots] for tensor in self.settings))
        inputs, targets = self._batches(slots, rngs, 1)
        hyperparameters = _hyperparameters(states, settings)
        subset, step = self._inner_step(subset, settings, hyperparameters, lr_factor, inputs[0], targets[0], True)
        for tensor, value in zip(self.networks, subset, strict=True):
            tensor[slots] = value
        return Moments(*(value.unsqueeze(-1) for value in step))

    def window(self, rngs: list[Generator], states: Tensor) -> Moments:
        """Train every network for one window; `states` are the control states, (size, controls).

        Returns:
            The moments of its inner steps, each (size, interval).
        """
        interval = self.task.interval
        inputs, targets = self._batches(range(self.size), rngs, interval)
        hyperparameters = _hyperparameters(states, self.settings)
        steps = []
        # Every task and size is a graph of its own; torch stops compiling at the ninth unless told otherwise.
        with torch._dynamo.config.patch(cache_size_limit=256) if self._compile else nullcontext():
            for i in range(interval):
                measure = moments.is_measured(i, interval)
                self.networks, step = self._graph(
                    self.networks, self.settings, hyperparameters, 1.0, inputs[i], targets[i], measure
                )
                steps.append(step)
        return Moments(*(torch.stack(values, -1) for values in zip(*steps, strict=True)))

    def validation_loss(self, slots: slice | list[int]) -> Tensor:
        """Loss on the validation points, without the factor on the loss, (slots,)."""
        assert self._data is not None
        inputs, targets = self._data.validation_inputs[slots], self._data.validation_targets[slots]
        return self._loss(self.networks.params[slots], inputs, targets, torch.ones(len(inputs)))

    def _batches(self, slots: range | list[int], rngs: list[Generator], steps: int) -> tuple[Tensor, Tensor]:
        """Mini-batches for `steps` inner steps: (steps, slots, batch, *input shape) and (steps, slots, batch)."""
        assert self._data is not None
        points = self.settings.points.int().tolist()
        shape = (steps, self.task.batch_size)
        rows = [torch.from_numpy(rng.integers(points[slot], size=shape)) for slot, rng in zip(slots, rngs, strict=True)]
        return self._data.gather(torch.tensor(list(slots)), torch.stack(rows, 1))

    def _inner_step(
        self,
        networks: Networks,
        settings: Settings,
        hyperparameters: Hyperparameters,
        lr_factor: float,
        inputs: Tensor,
        targets: Tensor,
        measure: bool,
    ) -> tuple[Networks, Moments]:
        params, momentum, second_moment, last_grad, average, steps = networks
        lr, beta, multiple = hyperparameters
        grad, loss = self._gradient(params, inputs, targets, settings.loss_scale)
        grad_norm = moments.norm(grad)
        coefficient = moments.clip_coefficient(grad_norm, average, multiple)

        adaptive = settings.adaptive > 0
        decay = torch.where(adaptive, 0.0, settings.weight_decay)
        step_grad = coefficient[:, None] * grad + decay[:, None] * params
        lr = lr * lr_factor * control.fallback_schedule(steps, settings.total_steps)
        decoupled_decay = torch.where(adaptive, 1 - lr * settings.weight_decay, 1.0)
        new_momentum = torch.lerp(step_grad, momentum, beta[:, None])
        new_second_moment = torch.lerp(step_grad.square(), second_moment, BETA2)
        count = steps + 1
        size = torch.where(adaptive, lr / (1 - beta**count), lr)
        root = new_second_moment.sqrt() / (1 - BETA2**count).sqrt()[:, None] + EPSILON
        update = torch.where(adaptive[:, None], new_momentum / root, new_momentum)
        new_params = decoupled_decay[:, None] * params - size[:, None] * update

        nothing = torch.full_like(loss, torch.nan)
        reported = torch.where(settings.loss_reported > 0, loss, torch.nan)
        cosines, updates = (nothing, nothing), (nothing, nothing)
        if measure:
            agreement = moments.cosine(grad, last_grad)
            # Without momentum there is only the last gradient to agree with.
            cosines = agreement, torch.where(settings.momentum > 0, moments.cosine(grad, momentum), agreement)
            updates = moments.update_moments(params, new_params, grad, reported)
        step = Moments(reported, grad_norm, (coefficient < 1).float(), *cosines, *updates)
        average = moments.average_norm(average, grad_norm)
        return Networks(new_params, new_momentum, new_second_moment, grad, average, count), step


class Hyperparameters(NamedTuple):
    """What the control states mean, each (networks,)."""

    lr: Tensor  # before the fallback schedule; on the running average of the gradients
    momentum: Tensor
    clip_multiple: Tensor


def sum_to_average(settings: Settings) -> Tensor:
    """Base lr on the average of gradients over that in torch's terms, (networks,): SGD's momentum is their sum."""
    return torch.where(settings.adaptive > 0, 1.0, 1 / (1 - settings.momentum))


def _hyperparameters(states: Tensor, settings: Settings) -> Hyperparameters:
    return Hyperparameters(
        settings.lr * sum_to_average(settings) * states[:, control.LR].exp(),
        control.momentum_of(states[:, control.MOMENTUM]),
        control.clip_multiple(states[:, control.CLIP]),
    )


class _Data:
    """The data of all networks in preallocated tensors."""

    def __init__(self, size: int, points: int, like: Episode) -> None:
        self.points = points
        self.inputs = like.inputs.new_zeros(size * points, *like.inputs.shape[1:])
        self.targets = like.targets.new_zeros(size * points, *like.targets.shape[1:])
        self.validation_inputs = like.validation_inputs.new_zeros(size, *like.validation_inputs.shape)
        self.validation_targets = like.validation_targets.new_zeros(size, *like.validation_targets.shape)

    def put(self, slot: int, episode: Episode) -> int:
        """Store an episode's data; returns its number of training points."""
        start, points = slot * self.points, len(episode.targets)
        if points > self.points:
            raise ValueError(f"max_points of the inner task is {self.points}, but an episode has {points} points")
        self.inputs[start : start + points] = episode.inputs
        self.targets[start : start + points] = episode.targets
        self.validation_inputs[slot] = episode.validation_inputs
        self.validation_targets[slot] = episode.validation_targets
        return points

    def gather(self, slots: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of `rows` (steps, slots, batch) of the networks in `slots`."""
        index = (rows + (slots * self.points)[:, None]).flatten()
        inputs = self.inputs.index_select(0, index).view(*rows.shape, *self.inputs.shape[1:])
        return inputs, self.targets.index_select(0, index).view(*rows.shape, *self.targets.shape[1:])
