"""Copies of the weights in training, and how they take the place of those."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.swa_utils import update_bn

from rlsched import distributed

if TYPE_CHECKING:
    from typing_extensions import Self


class CopyState(NamedTuple):
    """A copy of weights."""

    step: int  # inner steps that were done
    tensors: list[Tensor]  # whole


class KeptState(NamedTuple):
    """What is kept of the weights of a run; None of what is not."""

    best: CopyState | None = None
    average: CopyState | None = None


class WeightCopy:
    """A copy of an optimizer's weights, in the memory of one more of them."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []  # of each parameter, as it is spread over ranks; none before the first `take`
        self.step = 0  # inner steps that were done then

    @torch.no_grad()
    def take(self, parameters: list[Tensor], step: int) -> None:
        """Copy the weights as they are."""
        for copy, p in zip(self.tensors, parameters, strict=False):
            copy.copy_(p)
        self.tensors += [p.detach().clone() for p in parameters[len(self.tensors) :]]
        self.step = step

    def state(self) -> CopyState:
        """The copy, whole; of a sharded model all ranks have to call this."""
        return CopyState(self.step, list(map(distributed.whole, self.tensors)))

    @classmethod
    def of(cls, state: CopyState, parameters: list[Tensor]) -> Self:
        """What gave a state; of a sharded model all ranks have to call this."""
        copy = cls()
        pairs = zip(parameters, state.tensors, strict=False)
        copy.tensors, copy.step = [distributed.part(whole, p) for p, whole in pairs], state.step
        return copy

    @staticmethod
    def dtype(parameter: Tensor) -> torch.dtype:
        """Of the copy of a parameter."""
        return parameter.dtype


class WeightAverage(WeightCopy):
    """The average of an optimizer's weights over the steps so far, the later ones weighing more.

    After step t the weights w_t go into the average with the weight (η + 1) / (t + η), which is polynomial-decay
    averaging (Shamir & Zhang 2013, "Stochastic Gradient Descent for Non-smooth Optimization"): w_s weighs in proportion
    to s^η. So it forgets how the run began, and averages over more the longer the run is; half of the weight is on the
    last 1 − 2^(−1 / (η + 1)) of it. (`torch.optim.swa_utils.AveragedModel` averages a model, which it copies and which
    an optimizer does not know.) Weights in half precision are averaged in single: small steps would be lost.
    """

    POWER = 8  # η: half of the weight is on the last 7 % of the run

    @torch.no_grad()
    def move(self, parameters: list[Tensor]) -> None:
        """Move towards the weights as they are after one more step; `step` counts these."""
        self.step += 1
        pairs = [
            (distributed.local(copy), distributed.local(p)) for copy, p in zip(self.tensors, parameters, strict=False)
        ]
        if pairs:
            copies, weights = zip(*((copy, p.to(copy.dtype)) for copy, p in pairs), strict=True)
            torch._foreach_lerp_(copies, weights, (self.POWER + 1) / (self.step + self.POWER))
        for p in parameters[len(self.tensors) :]:
            self.tensors.append(p.detach().to(self.dtype(p), copy=True))

    @staticmethod
    def dtype(parameter: Tensor) -> torch.dtype:
        return torch.promote_types(parameter.dtype, torch.float32)


class KeptWeights:
    """What is kept of one optimizer's weights beside those in training.

    Args:
        optimizer: whose weights they are.
        keep_best: whether those of the best validation are kept.
        averaging: whether the average is.
    """

    def __init__(self, optimizer: Optimizer, *, keep_best: bool, averaging: bool) -> None:
        self.optimizer = optimizer
        self.best = WeightCopy() if keep_best else None
        self.average = WeightAverage() if averaging else None
        self._blocks = 0  # in which others are in the place of those in training

    def take_best(self, step: int) -> None:
        """The weights as they are, after `step` inner steps, are the best so far."""
        if self.best is not None:
            self.best.take(self._parameters(), step)

    def after_step(self) -> None:
        """The weights as they are go into the average."""
        if self.average is not None:
            self.average.move(self._parameters())

    def average_anew(self) -> None:
        """The average begins anew with the weights as they are, which were brought back from where they had gone."""
        if self.average is not None:
            self.average = WeightAverage()

    def refuse_to_train(self) -> None:
        """Call before each step.

        Raises:
            RuntimeError: it would be one of weights that are not those in training, and would be lost.
        """
        if self._blocks:
            raise RuntimeError("step() inside of a `with` block that has other weights in place: train after it")

    @contextmanager
    def best_in_place(self, model: nn.Module, batches: Iterable[Any] | None) -> Iterator[None]:
        """See `ScheduledOptimizer.best`."""
        with self._in_place(self._the_best(), model, batches):
            yield

    @contextmanager
    def average_in_place(self, model: nn.Module, batches: Iterable[Any] | None) -> Iterator[None]:
        """See `ScheduledOptimizer.averaged`."""
        if self.average is None:
            raise ValueError("averaging=True averages the weights; it was not given")
        with self._in_place(self.average, model, batches):
            yield

    def restore_best(self, model: nn.Module, batches: Iterable[Any] | None) -> None:
        """See `ScheduledOptimizer.restore_best`."""
        self._put(self._the_best().tensors, model, batches)

    def state(self) -> KeptState:
        """What is kept, whole; of a sharded model all ranks have to call this."""
        return KeptState(*(None if copy is None else copy.state() for copy in (self.best, self.average)))

    def check(self, state: KeptState) -> None:
        """Refuse a state of other weights.

        Raises:
            ValueError: naming the copy.
        """
        for name, copy, kind in (("best", state.best, WeightCopy), ("average", state.average, WeightAverage)):
            if copy is None:
                continue
            parameters = self._parameters()[: len(copy.tensors)]
            there = [(tuple(x.shape), x.dtype) for x in copy.tensors]
            ours = [(tuple(p.shape), kind.dtype(p)) for p in parameters]
            if there != ours or any(x.layout is not torch.strided for x in copy.tensors):
                raise ValueError(f"state_dict: kept.{name} must be a copy of weights of {ours}, got {there}")

    def load(self, state: KeptState) -> None:
        """Go on from a state that `state` gave. What was not kept there begins to be kept now."""
        parameters = self._parameters()
        if self.best is not None and state.best is not None:
            self.best = WeightCopy.of(state.best, parameters)
        if self.average is not None and state.average is not None:
            self.average = WeightAverage.of(state.average, parameters)

    def _the_best(self) -> WeightCopy:
        if self.best is None:
            raise ValueError("keep_best=True keeps the weights of the best validation; it was not given")
        if not self.best.tensors:
            raise ValueError("there are no best weights: no finite validation loss was observed on this rank so far")
        if any(map(distributed.is_sharded, self.best.tensors)):
            steps = [int(step) for (step,) in distributed.of_all_ranks([self.best.step], self.best.tensors[0].device)]
            if len(set(steps)) > 1:
                raise ValueError(
                    f"the ranks took their best weights after {steps} steps, and each has but a part of them: all have "
                    "to observe the same validation losses"
                )
        return self.best

    @contextmanager
    def _in_place(self, copy: WeightCopy, model: nn.Module, batches: Iterable[Any] | None) -> Iterator[None]:
        undo = self._put(copy.tensors, model, batches)
        self._blocks += 1
        try:
            yield
        finally:
            self._blocks -= 1
            undo()

    @torch.no_grad()
    def _put(self, copies: list[Tensor], model: nn.Module, batches: Iterable[Any] | None) -> Callable[[], None]:
        """Put copies in the place of the weights, and return what undoes it, to the last bit."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be the torch.nn.Module that is trained, got {type(model).__name__}")
        averages = _running_averages(model)
        if averages and batches is None:
            raise ValueError(
                "batches: the model has batch norm, whose running averages are of other weights. Give batches to "
                "compute them anew, as torch.optim.swa_utils.update_bn takes them: a DataLoader of the training data"
            )
        there = [*self._parameters(), *(model.buffers() if averages else ())]
        before = [tensor.detach().clone() for tensor in there]

        @torch.no_grad()
        def undo() -> None:
            for tensor, was in zip(there, before, strict=True):
                tensor.copy_(was)

        try:
            for p, copy in zip(there, copies, strict=False):
                p.copy_(copy)
            if averages:
                _average_anew(model, averages, batches, there[0].device)
        except BaseException:
            undo()
            raise
        return undo

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def _running_averages(model: nn.Module) -> list[_BatchNorm]:
    """The layers that have some of their inputs."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def _average_anew(model: nn.Module, layers: list[_BatchNorm], batches: Any, device: torch.device) -> None:
    """Compute running averages from batches; each layer's mode and momentum are its own again, whatever happens."""
    modes, momenta = [(m, m.training) for m in model.modules()], [(m, m.momentum) for m in layers]
    try:
        update_bn(batches, model, device)
    finally:
        for module, mode in modes:
            module.training = mode
        for layer, momentum in momenta:
            layer.momentum = momentum
    if not all(layer.num_batches_tracked for layer in layers):
        raise ValueError("batches: there were none, so there is nothing to compute batch norm's running averages from")
