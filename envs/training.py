"""Batched inner training: N networks of one architecture, trained as one stack of tensors.

The weights of all networks are one matrix, `(networks, parameters)`, and so are their gradients and the state of
their optimizers. The gradient comes from `Stack`, the update from `optimizers`, and in between is what is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from rlsched import moments
from rlsched.envs.draws import minibatch_rows, seeded
from rlsched.envs.optimizers import NUMBERS, OPTIMIZERS, rule, stepped
from rlsched.envs.pools import Slots, pool_of
from rlsched.envs.recording import Recorded
from rlsched.envs.stacking import Buffers, Stack
from rlsched.envs.tasks import InnerTask
from rlsched.moments import Moments
from rlsched.signals import Run

# A CPU trains a chunk of networks for a whole window before it turns to the next, so that they stay in its cache: as
# many as have CHUNK_WEIGHTS weights, but at least MIN_CHUNK, since fewer would cost more in calls than they save.
CHUNK_WEIGHTS, MIN_CHUNK = 2**18, 64
ALL = slice(None)


class Networks(NamedTuple):
    """What an inner step changes."""

    params: Tensor  # (networks, parameters)
    momentum: Tensor  # (networks, parameters), running average of the gradients
    second_moment: Tensor  # (networks, parameters), running average of their squares
    last_grad: Tensor  # (networks, parameters)
    last_square: Tensor  # (networks,), squared norm of the last gradient
    average_norm: Tensor  # (networks,), running average of the gradient norm
    buffers: Buffers  # what else a network holds: name -> (networks, *shape)

    def rows(self, index: Slots) -> Networks:
        """Some of the networks: views of them for a slice, copies for a list."""
        tensors = {name: getattr(self, name)[index] for name in self._fields[:-1]}
        return Networks(**tensors, buffers={name: b[index] for name, b in self.buffers.items()})

    def write(self, index: Slots, networks: Networks) -> None:
        """Set the networks of these rows to others, which may be views of them."""
        for name in self._fields[:-1]:
            _write(getattr(self, name), index, getattr(networks, name))
        for name, new in networks.buffers.items():
            _write(self.buffers[name], index, new)


class Settings(NamedTuple):
    """What stays fixed in an episode, each (networks,); float32, except for the integers."""

    total_steps: Tensor
    final_steps: Tensor  # what total_steps becomes after `told_after` decisions
    told_after: Tensor
    optimizer: Tensor  # its number, see `optimizers.NUMBERS`, int64
    adaptive: Tensor  # +1 for optimizers that divide by a second moment, −1 for SGD
    sums_gradients: Tensor  # 1 where torch's momentum is a sum of gradients, 0 where it is their average
    lr: Tensor  # base lr in the terms of torch.optim
    momentum: Tensor  # base momentum
    weight_decay: Tensor
    loss_scale: Tensor
    max_grad_norm: Tensor  # of the script's own clipping, which comes before all that is measured
    loss_reported: Tensor  # 1 where the policy sees the loss, else 0
    validation_reported: Tensor  # and the validation losses
    points: Tensor  # training points, int64
    batch_size: Tensor  # int64
    seed: Tensor  # of the mini-batches, int64

    def rows(self, index: Slots) -> Settings:
        return Settings(*(tensor[index] for tensor in self))


class InnerTraining:
    """`size` networks of one inner task, each with its own data, optimizer and clock.

    The clock is the caller's, and so are the hyperparameters, which may be others at every step. They go by name: "lr",
    "momentum" and "weight_decay", in the terms of torch.optim, and "clip", the highest multiple of its own running
    average that a gradient norm may have. Each is a tensor (networks,), or (steps, networks).

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
        self._pool = pool_of(task.source, size, example, self.device)
        self._compile = compile and not self._stack.looped
        self._step: Callable[..., Any] = self._inner_step
        self._evaluate: Callable[..., Tensor] = self._stack.evaluate
        if not self._stack.looped:
            self._step = Recorded(self._step, compile=compile)
            self._evaluate = Recorded(self._evaluate, compile=compile)
        self._used = [name for name, weight in task.setup.optimizers.items() if weight > 0]

        def vector(dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.ones(size, dtype=dtype, device=self.device)

        def matrix() -> Tensor:
            return torch.zeros(size, self._stack.parameters, device=self.device)

        _, buffers = self._stack.flatten(network)
        stacked = {name: torch.stack([b] * size).to(self.device) for name, b in buffers.items()}
        self.networks = Networks(matrix(), matrix(), matrix(), matrix(), vector(), vector(), stacked)
        integers = ("optimizer", "points", "batch_size", "seed")
        self.settings = Settings(*(vector(torch.int64 if n in integers else torch.float32) for n in Settings._fields))

        chunk = size if self.device.type == "cuda" else max(MIN_CHUNK, CHUNK_WEIGHTS // self._stack.parameters)
        chunks = math.ceil(size / chunk)
        bounds = np.linspace(0, size, chunks + 1).round().astype(int).tolist()
        self._chunks = [slice(a, b) for a, b in pairwise(bounds)]

    @property
    def nbytes(self) -> int:
        """Memory that the networks, their optimizers and their data take."""
        tensors = [*self.networks[:-1], *self.networks.buffers.values(), *self.settings, *self._pool.tensors()]
        storages = [tensor.untyped_storage() for tensor in tensors]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def begin(
        self, slots: list[int], rngs: list[Generator], lr_quantiles: Sequence[float | None] | None = None
    ) -> None:
        """Draw a new episode for each of `slots`, from its own generator; see `SetupDistribution.draw`."""
        setups, points, seeds = [], [], []
        for slot, rng, quantile in zip(slots, rngs, lr_quantiles or [None] * len(slots), strict=True):
            setup = self.task.setup.draw(rng, self.task.batch_sizes, quantile)
            seed, weights_seed = rng.integers(2**63, size=2).tolist()
            params, buffers = self._stack.flatten(self.task.initial_network(weights_seed), setup.gain)
            self.networks.params[slot] = params
            for name, buffer in buffers.items():
                self.networks.buffers[name][slot] = buffer
            setups.append(setup)
            seeds.append(seed)
            points.append(self._pool.put(slot, rng))
        for name in ("momentum", "second_moment", "last_grad", "last_square"):
            getattr(self.networks, name)[slots] = 0.0
        self.networks.average_norm[slots] = torch.nan

        traits = [OPTIMIZERS[s.optimizer].traits for s in setups]
        drawn: dict[str, list[Any]] = {
            "total_steps": [1 + s.decisions * self.task.interval for s in setups],  # the first is on its own
            "final_steps": [1 + s.final_decisions * self.task.interval for s in setups],
            "optimizer": [NUMBERS[s.optimizer] for s in setups],
            "adaptive": [1 if of.adaptive else -1 for of in traits],
            "sums_gradients": [of.sums_gradients for of in traits],
            "points": points,
            "seed": seeds,
        }
        for name, tensor in self.settings._asdict().items():
            values = drawn[name] if name in drawn else [getattr(s, name) for s in setups]
            tensor[slots] = torch.tensor(values, dtype=tensor.dtype, device=self.device)

    def run(self, slots: Slots = ALL) -> Run:
        """What is known of the episodes in `slots` before they start."""
        settings = self.settings.rows(slots)
        interval = torch.full_like(settings.total_steps, self.task.interval)
        return Run(settings.total_steps, interval, settings.adaptive, settings.sums_gradients)

    def tell_length(self, decisions: Tensor) -> None:
        """Give the runs whose turn it is, after so many `decisions` (networks,), their last length."""
        settings = self.settings
        settings.total_steps[:] = torch.where(
            decisions == settings.told_after, settings.final_steps, settings.total_steps
        )

    def group(self, slots: Slots = ALL) -> dict[str, Tensor]:
        """The base hyperparameters in the terms of torch.optim, as a parameter group of tensors (slots,)."""
        return {name: getattr(self.settings, name)[slots] for name in ("lr", "momentum", "weight_decay")}

    def first_step(self, slots: list[int], hyperparameters: Mapping[str, Tensor], done: Tensor) -> Moments:
        """One inner step of some networks, after `done` (slots,) steps; its moments, each (slots, 1)."""
        return self._train(slots, hyperparameters, done, 1, self._inner_step)

    def window(self, hyperparameters: Mapping[str, Tensor], done: Tensor) -> Moments:
        """Train every network for a window of inner steps, after `done` (networks,) steps.

        Returns:
            Their moments, each (networks, interval).
        """
        parts = [
            self._train(
                chunk,
                {n: h[..., chunk] for n, h in hyperparameters.items()},
                done[chunk],
                self.task.interval,
                self._step,
            )
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
                losses.append(evaluate(networks.params, networks.buffers, *self._pool.validation(part)))
        return torch.cat(losses)

    def minibatches(self, slots: Slots, steps: int, done: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """The `steps` mini-batches of some networks after `done` (slots,) steps: (slots, batch, *shape) each."""
        batch = self.task.batch_sizes[0]
        s = self.settings.rows(slots)
        rows = minibatch_rows(s.seed, done.long(), steps, batch, s.batch_size, s.points)
        return (self._pool.batch(index) for index in self._pool.index(slots, rows))

    def _train(
        self, slots: Slots, hyperparameters: Mapping[str, Tensor], done: Tensor, steps: int, step: Callable[..., Any]
    ) -> Moments:
        """Inner steps of the networks in `slots`."""
        networks, settings = self.networks.rows(slots), self.settings.rows(slots)
        count = done + torch.arange(1, steps + 1, device=self.device)[:, None]
        coefficients = {
            **rule(self._used, settings.optimizer, settings.sums_gradients, hyperparameters, count),
            "clip": hyperparameters["clip"],
            "loss_scale": settings.loss_scale,
        }
        if self.task.setup.clipping > 0:
            coefficients["max_grad_norm"] = settings.max_grad_norm
        names = tuple(coefficients)
        table = torch.stack([c.expand(steps, -1) for c in coefficients.values()], 1)[..., None]
        rows = []
        noise = int((settings.seed + done.long()).sum()) & (2**63 - 1)
        with seeded(noise, self.device):
            for i, batch in enumerate(self.minibatches(slots, steps, done)):
                measured = self._compile or moments.is_measured(i, steps)  # one graph for all steps
                networks, row = step(networks, names, table[i], *batch, measured)
                rows.append(row)
        self.networks.write(slots, networks)
        window = Moments(*torch.stack(rows, -1).unbind())
        window.momentum_square.masked_fill_((hyperparameters["momentum"] == 0).expand(steps, -1).T, 0.0)
        for name in moments.PRODUCTS if steps > moments.MEASURED_STEPS else ():
            getattr(window, name)[:, : -moments.MEASURED_STEPS] = torch.nan
        return window

    def _inner_step(
        self, networks: Networks, names: tuple[str, ...], table: Tensor, inputs: Tensor, targets: Tensor, measured: bool
    ) -> tuple[Networks, Tensor]:
        """One inner step.

        Args:
            networks: before it; their averages move on in place.
            names: of the coefficients in the table.
            table: of this step, (coefficients, networks, 1): as one tensor, a compiled step is called in less time.
            inputs, targets: the mini-batches, (networks, batch, *shape).
            measured: whether products are.

        Returns:
            The networks after it, and its moments, (fields of `Moments`, networks).
        """
        params, momentum, second_moment, last_grad, last_square, average, buffers = networks
        c = dict(zip(names, table.unbind(), strict=True))
        grad, loss, changed = self._stack.gradient(params, buffers, inputs, targets, c["loss_scale"][:, 0])
        grad_norm = torch.linalg.vector_norm(grad, dim=-1)
        if "max_grad_norm" in c:
            own = (c["max_grad_norm"][:, 0] / grad_norm.clamp(min=1e-12)).clamp(max=1)
            grad, grad_norm = grad * own[:, None], grad_norm * own
        coefficient = moments.clip_coefficient(grad_norm, average, c["clip"][:, 0])
        values = dict.fromkeys(Moments._fields, loss)
        values |= {"grad_norm": grad_norm, "clip_coefficient": coefficient, "grad_square": grad_norm.square()}
        if measured:
            values |= {
                "last_grad_square": last_square,
                "momentum_square": _square(momentum),
                "weights_square": _square(params),
                "grad_last_grad": _dot(grad, last_grad),
                "grad_momentum": _dot(grad, momentum),
                "grad_weights": _dot(grad, params),
            }
        after, update = stepped(params, momentum, second_moment, coefficient[:, None] * grad, c)
        if measured:
            values |= {
                "update_square": _square(update),
                "grad_update": _dot(grad, update),
                "update_weights": _dot(update, params),
            }
        average = moments.average_norm(average, grad_norm)
        moved = Networks(after, momentum, second_moment, grad, values["grad_square"], average, buffers | changed)
        return moved, torch.stack(Moments(**values))


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


def _write(tensor: Tensor, index: Slots, new: Tensor) -> None:
    if isinstance(index, list) or tensor[index].data_ptr() != new.data_ptr():
        tensor[index] = new


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of the rows of two matrices."""
    if torch.compiler.is_compiling() or len(a) == 1:
        return (a * b).sum(-1)  # compiled, one pass for all of those that are computed together
    return torch.bmm(a[:, None], b[:, None].mT)[:, 0, 0]  # in less time, without a product of the size of a and b


def _square(a: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a, dim=-1).square()
