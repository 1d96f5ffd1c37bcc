"""Measures an optimizer's inner steps: loss, gradients, updates; and clips the gradients, which is measured too."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlsched import distributed, moments
from rlsched.moments import Moments
from rlsched.number import Number
from rlsched.parameter_sample import (
    CLIP_COEFFICIENT,
    COLUMNS,
    GRAD_NORM,
    LOSS,
    PRODUCTS_OF_ROWS,
    ParameterSample,
    as_real,
    moments_of,
)
from rlsched.schedule import ScheduleState

LARGEST = torch.finfo(torch.float32).max  # number in a record
Buffers = Callable[[Sequence[Tensor]], list[Tensor | None]]  # the optimizer's momentum of each parameter


class MeterState(NamedTuple):
    """What is measured so far."""

    records: Tensor | None = None  # (interval, COLUMNS) float32, on the parameters' device; of the window's inner steps
    average_norm: Number = math.nan  # running average of the gradient norm; 0-d on the parameters' device if that waits
    last_grad: Tensor | None = None  # of the sample, which the next gradient is compared with
    losses: tuple[Number, ...] = ()  # reported for the step to come, 0-d or floats
    loss_was_reported: bool = False  # ever


class Meter:
    """Measures one optimizer.

    Args:
        interval: inner steps in a window.
        has_momentum: whether the optimizer has any.
        max_grad_norm: the gradient norm is clipped to this as well.
        watches: whether it only looks, and leaves gradients as they are.
    """

    def __init__(
        self, interval: int, *, has_momentum: bool, max_grad_norm: float | None = None, watches: bool = False
    ) -> None:
        self.interval, self.has_momentum, self.watches = interval, has_momentum, watches
        self.max_grad_norm = math.inf if max_grad_norm is None else max_grad_norm
        self.records: Tensor | None = None
        self.average_norm: Number = math.nan
        self.loss_was_reported = False
        self._losses: list[Number] = []
        self._sample: ParameterSample | None = None
        self._last_grad: Tensor | None = None  # of a sample that is yet to be made
        self._record: Tensor | None = None  # of the step that is under way
        self._is_measured = False  # whether products of that step are
        self._all_dense = True  # gradients, and real numbers
        self._ranks = 1
        self._rank_weights: list[float] | None = None

    @property
    def is_sharded(self) -> bool:
        """Whether this rank holds a part of the parameters alone."""
        return self._rank_weights is not None

    def learn_ranks(self, parameters: Sequence[Tensor]) -> None:
        """Find out which processes train together, and which of them holds what."""
        self._ranks, self._rank_weights = distributed.ranks(), distributed.rank_weights(parameters)

    # --- A step -----------------------------------------------------------------------------------------------------

    def report(self, loss: Tensor | float) -> None:
        """The loss of the step to come, or of one of its micro-batches.

        Raises:
            TypeError: it is no number.
            ValueError: it is a tensor of several numbers.
        """
        if not isinstance(loss, Tensor):
            loss = float(loss)
        elif loss.numel() != 1:
            raise ValueError(f"loss must be one number, got a tensor of shape {tuple(loss.shape)}")
        else:
            loss = loss.item() if on_host(loss) else loss.detach().reshape(())
        self._losses.append(loss)

    def local_grads(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The gradients that there are, as real numbers that can be changed in place: of what this rank holds, and of a
        sparse gradient the values that it stores. These may be several parts of a number: to scale them scales it.
        """
        grads: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
        if self._rank_weights is not None:
            grads = [distributed.local(grad) for grad in grads]
        self._all_dense = all(map(_is_dense, grads))
        return grads if self._all_dense else [as_real(grad._values() if grad.is_sparse else grad) for grad in grads]

    def forget_losses(self) -> None:
        """Of a step that does not count."""
        self._losses = []

    def loss_and_norm(self, parameters: Sequence[Tensor], grads: list[Tensor]) -> tuple[Number | None, Number]:
        """The loss of the whole batch, None if nobody reported one, and the gradient norm of the whole model.

        On the host these are floats: reading a number is free there, and tensors of one number are slow.
        """
        device = grads[0].device
        if self.records is None:
            self.records = torch.full((self.interval, COLUMNS), torch.nan, dtype=torch.float32, device=device)
        losses, self._losses = self._losses, []
        self.loss_was_reported |= bool(losses)
        weights = self._rank_weights
        if weights is not None:
            weights = [weight for weight, p in zip(weights, parameters, strict=True) if p.grad is not None]
        summed = grads if self._all_dense else _summed(parameters, grads)
        loss, norm = _mean(losses, device), total_norm(summed, weights)
        if self._ranks > 1:
            return distributed.whole_step(loss, norm, sharded=weights is not None, device=device)
        return loss, norm

    def skip_step(self) -> None:
        """Begin a step that is not measured."""
        assert self.records is not None
        self._record, self._is_measured = self.records[0], False

    def begin_step(
        self,
        parameters: Sequence[Tensor],
        grads: list[Tensor],
        loss: Number | None,
        norm: Number,
        state: ScheduleState,
        *,
        is_last: bool,
        buffers: Buffers,
        multiple: float,
    ) -> None:
        """Measure the gradients of a step, and clip them.

        Args:
            parameters, grads, loss, norm: as `loss_and_norm` has them.
            state: where the schedule is.
            is_last: whether nobody looks at this window.
            buffers: where the optimizer's momentum is.
            multiple: the gradient norm is clipped to so many times its running average.
        """
        column, length = state.step - state.window_start, state.window_end - state.window_start
        assert self.records is not None
        self._record = record = self.records[column % self.interval]
        cells: Any = record
        finite: Tensor | bool
        if isinstance(norm, Tensor):
            finite = norm.isfinite() if loss is None else (loss + norm).isfinite()
            norm_seen: Number = torch.where(finite, norm, torch.nan)
        else:
            cells = record.numpy()
            finite = abs(loss or 0.0) + norm <= LARGEST
            norm_seen, loss = (norm, loss) if finite else (math.nan, None)
        if not self.watches:
            zero_unless(finite, grads)
        cells[GRAD_NORM] = norm_seen
        if loss is not None:
            cells[LOSS] = loss

        self._is_measured = not is_last and moments.is_measured(column, length)
        if not is_last and moments.is_measured(column + 1, length):  # whose gradient is compared with this one
            sample = self._sample
            if sample is None or not sample.is_of(parameters):
                sample = self._sample = ParameterSample(parameters, self.last_grad)
            if not self._is_measured:
                sample.take_grad()
            else:
                sample.take_all(buffers(sample.chosen) if self.has_momentum else None)
        cells[CLIP_COEFFICIENT] = 1.0 if self.watches else self._clip(grads, norm, finite, multiple)

    def finish_step(self) -> bool:
        """Measure what the step did to the weights. Says whether there was a step."""
        if self._record is None:
            return False
        if self._is_measured and self._sample is not None:
            self._sample.finish(self._record)
        self._record = None
        return True

    def _clip(self, grads: list[Tensor], norm: Number, finite: Tensor | bool, multiple: float) -> Number:
        """Scale the gradients down to what is allowed, and return the factor."""
        if not isinstance(norm, Tensor) and not finite:
            return 1.0
        average = self.average_norm
        if isinstance(norm, Tensor) and not isinstance(average, Tensor):
            average = torch.full((), average, dtype=torch.float32, device=norm.device)
        coefficient = moments.clip_coefficient(norm, average, multiple, self.max_grad_norm)
        later = moments.average_norm(average, norm)
        if isinstance(finite, Tensor):
            coefficient, later = torch.where(finite, coefficient, 1.0), torch.where(finite, later, average)
        self.average_norm = later
        if isinstance(coefficient, Tensor) or coefficient < 1:
            torch._foreach_mul_(grads, coefficient)
        return coefficient

    def zero_nonfinite_grads(self, parameters: Sequence[Tensor]) -> None:
        """Zero all gradients unless they are finite: those of an evaluation in the midst of a step."""
        grads = self.local_grads(parameters)
        if grads and self._rank_weights is None:
            norm = total_norm(grads, None)
            zero_unless(norm.isfinite() if isinstance(norm, Tensor) else math.isfinite(norm), grads)

    # --- A window ---------------------------------------------------------------------------------------------------

    def window(self, steps: int) -> Moments:
        """The moments of the first `steps` inner steps of a window, the same on all ranks.

        The only place where the host waits for an accelerator.
        """
        return moments_of(self._whole_records()[:steps])

    def clear(self) -> None:
        """Begin a window."""
        if self.records is not None:
            self.records.fill_(torch.nan)

    def _whole_records(self) -> Tensor:
        assert self.records is not None
        return distributed.whole_window(self.records, PRODUCTS_OF_ROWS, sharded=self._rank_weights is not None)

    # --- State ------------------------------------------------------------------------------------------------------

    @property
    def last_grad(self) -> Tensor | None:
        """The sample of the gradient that the next one is compared with."""
        return self._last_grad if self._sample is None else self._sample.last_grad

    def state(self) -> MeterState:
        """What was measured, of the whole model; of one that is sharded all ranks have to call this."""
        records, last_grad, average = self.records, self.last_grad, self.average_norm
        if self._rank_weights is not None:
            records = None if records is None else self._whole_records()
            last_grad = None if last_grad is None else distributed.merged(last_grad)
        records, last_grad = (None if x is None else x.clone() for x in (records, last_grad))  # a view saves its base
        return MeterState(records, float(average), last_grad, tuple(map(float, self._losses)), self.loss_was_reported)

    def check(self, state: MeterState) -> None:
        """Refuse a state that `state` cannot have given.

        Raises:
            ValueError: naming the part.
        """
        for name, shape in (("records", (self.interval, COLUMNS)), ("last_grad", None)):
            tensor: Tensor | None = getattr(state, name)
            if tensor is None:
                continue
            fits = tensor.ndim == 1 if shape is None else tensor.shape == shape
            if not fits or tensor.dtype != torch.float32 or tensor.layout is not torch.strided:
                raise ValueError(
                    f"state_dict: meter.{name} must be a float32 tensor of shape {shape or '(numbers,)'}, got "
                    f"{tensor.dtype} of shape {tuple(tensor.shape)}"
                )

    def load(self, state: MeterState, device: torch.device) -> None:
        """Go on from a state that `state` gave."""
        records, last_grad = (None if x is None else x.to(device) for x in (state.records, state.last_grad))
        if self._rank_weights is not None and records is not None:
            records = distributed.own_window(records, PRODUCTS_OF_ROWS)
        self.records, self._last_grad, self._sample, self._record = records, last_grad, None, None
        self.average_norm, self.loss_was_reported = state.average_norm, state.loss_was_reported
        self._losses = list(state.losses)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sample": None, "_last_grad": self.last_grad}


def on_host(tensor: Tensor) -> bool:
    """Whether a number in `tensor` can be read without waiting for an accelerator."""
    return tensor.device.type == "cpu"


def _is_dense(grad: Tensor) -> bool:
    """Whether this is a plain tensor of real numbers."""
    return not (grad.is_sparse or grad.is_complex())


def _summed(parameters: Sequence[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """The gradients, with the parts of each number of a sparse one summed up as optimizers sum them."""
    whole = (p.grad for p in parameters if p.grad is not None)
    return [g.coalesce().values() if g.is_sparse else grad for g, grad in zip(whole, grads, strict=True)]


def zero_unless(finite: Tensor | bool, grads: Iterable[Tensor]) -> None:
    """Zero the gradients of a step that is not finite; a 0-d tensor that tells so is not looked at."""
    if isinstance(finite, Tensor):
        for grad in grads:
            grad.masked_fill_(~finite, 0)
    elif not finite:
        torch._foreach_zero_(list(grads))


def _mean(losses: list[Number], device: torch.device) -> Number | None:
    """Mean over the losses that are finite, NaN if none is; None without any.

    A step that a GradScaler skips leaves its loss, perhaps infinite, to the next one.
    """
    if len(losses) < 2:
        return losses[0] if losses else None
    like: dict[str, Any] = {"dtype": torch.float32, "device": device}  # torch.full does not wait, as a copy would
    stacked = torch.stack([x.to(**like) if isinstance(x, Tensor) else torch.full((), x, **like) for x in losses])
    mean = torch.where(stacked.isfinite(), stacked, torch.nan).nanmean()
    return mean.item() if on_host(mean) else mean


def total_norm(grads: list[Tensor], rank_weights: list[float] | None) -> Number:
    """Norm of all gradients, in single precision at least: half precision overflows at 65,504.

    Of gradients that several ranks hold, only this rank's part of their squares counts.
    """
    double = any(grad.dtype == torch.float64 for grad in grads)
    norms = torch._foreach_norm(grads, 2.0, torch.float64 if double else torch.float32)
    if rank_weights is not None:
        torch._foreach_mul_(norms, [math.sqrt(weight) for weight in rank_weights])
    if on_host(grads[0]):
        return math.hypot(*map(float, norms))
    return torch.linalg.vector_norm(torch.stack(norms)).float()
