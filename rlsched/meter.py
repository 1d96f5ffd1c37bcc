"""Measures an optimizer's inner steps: loss, gradients, updates; and clips the gradients, which is measured too."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlsched import distributed, moments
from rlsched.accumulation import BackwardPasses
from rlsched.gradients import is_dense, leave_out_unless, summed_up, total_norm
from rlsched.moments import Moments
from rlsched.number import Number, checked_loss, on_host
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

LARGEST = torch.finfo(torch.float32).max  # loss in a record
LARGEST_NORM = 1e18  # a larger gradient has a square that is not finite in single precision
MAX_RECORDS = 1024  # of a window; in a longer one, every k-th step is recorded, and all that are measured
Buffers = Callable[[Sequence[Tensor]], list[Tensor | None]]  # the optimizer's momentum of each parameter


class MeterState(NamedTuple):
    """What is measured so far."""

    records: Tensor | None = None  # (rows, COLUMNS) float32, on the parameters' device; of the window's inner steps
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
        self.parts = 1  # that the loss of the last step was divided into
        self._losses: list[Number] = []
        self._backward = BackwardPasses()
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
        self._backward.watch(parameters)

    # --- A step -----------------------------------------------------------------------------------------------------

    def report(self, loss: Tensor | float) -> None:
        """The loss of the step to come, or of one of its micro-batches.

        Raises:
            TypeError: it is no number.
            ValueError: it is a tensor of several numbers.
        """
        is_quotient = isinstance(loss, Tensor) and loss.grad_fn is not None and loss.grad_fn.name() == "DivBackward0"
        self._backward.losses_are_quotients = is_quotient
        loss = checked_loss("loss", loss)
        self._losses.append(loss.item() if isinstance(loss, Tensor) and on_host(loss) else loss)

    def local_grads(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The gradients that there are, as real numbers that can be changed in place: of what this rank holds, and of a
        sparse gradient the values that it stores. These may be several parts of a number: to scale them scales it.
        """
        grads: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
        if self._rank_weights is not None:
            grads = [distributed.local(grad) for grad in grads]
        self._all_dense = all(map(is_dense, grads))
        return grads if self._all_dense else [as_real(grad._values() if grad.is_sparse else grad) for grad in grads]

    def forget_losses(self) -> None:
        """Of a step that does not count."""
        self._losses = []
        self._backward.parts()

    def loss_and_norm(self, parameters: Sequence[Tensor], grads: list[Tensor]) -> tuple[Number | None, Number]:
        """The loss of the whole batch, None if nobody reported one, and the gradient norm of the whole model.

        On the host these are floats: reading a number is free there, and tensors of one number are slow.
        """
        device = grads[0].device
        if self.records is None:
            rows = min(self.interval, MAX_RECORDS)
            self.records = torch.full((rows, COLUMNS), torch.nan, dtype=torch.float32, device=device)
        losses, self._losses = self._losses, []
        self.loss_was_reported |= bool(losses)
        self.parts = self._backward.parts()
        weights = self._rank_weights
        if weights is not None:
            weights = [weight for weight, p in zip(weights, parameters, strict=True) if p.grad is not None]
        summed = grads if self._all_dense else summed_up(parameters, grads)
        loss, norm = _mean(losses, device), total_norm(summed, weights)
        if loss is not None and self.parts > 1:
            loss = loss * self.parts
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
        row = row_of(column, length)
        record = self.records[row % len(self.records)] if row is not None else self.records.new_empty(COLUMNS)
        self._record = record
        cells: Any = record
        finite: Tensor | bool
        if isinstance(norm, Tensor):
            finite = norm <= LARGEST_NORM if loss is None else (norm <= LARGEST_NORM) & torch.as_tensor(loss).isfinite()
            norm_seen: Number = torch.where(finite, norm, torch.nan)
        else:
            cells = record.numpy()
            finite = abs(loss or 0.0) <= LARGEST and norm <= LARGEST_NORM
            norm_seen, loss = (norm, loss) if finite else (math.nan, None)
        if not self.watches:
            leave_out_unless(finite, parameters, grads)
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
            leave_out_unless(norm.isfinite() if isinstance(norm, Tensor) else math.isfinite(norm), parameters, grads)

    # --- A window ---------------------------------------------------------------------------------------------------

    def window(self, steps: int) -> Moments:
        """The moments of the first `steps` inner steps of a window, the same on all ranks.

        The only place where the host waits for an accelerator.
        """
        last = row_of(steps - 1, steps)
        assert last is not None
        return moments_of(self._whole_records()[: last + 1])

    def clear(self, interval: int) -> None:
        """Begin a window of at most `interval` inner steps."""
        self.interval = interval
        if self.records is not None:
            rows = min(interval, MAX_RECORDS)
            if len(self.records) != rows:
                self.records = self.records.new_empty(rows, COLUMNS)
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

    @staticmethod
    def check(state: MeterState, window: int) -> None:
        """Refuse a state that `state` cannot have given in a window of so many inner steps.

        Raises:
            ValueError: naming the part.
        """
        needed = row_of(window - 1, window)
        assert needed is not None
        for name, shape in (
            ("records", f"(rows, {COLUMNS}), with {needed + 1} to {MAX_RECORDS} rows"),
            ("last_grad", "(numbers,)"),
        ):
            tensor: Tensor | None = getattr(state, name)
            if tensor is None:
                continue
            fits = tensor.ndim == 1
            if name == "records":
                fits = tensor.ndim == 2 and needed < len(tensor) <= MAX_RECORDS and tensor.shape[1] == COLUMNS
            if not fits or tensor.dtype != torch.float32 or tensor.layout is not torch.strided:
                raise ValueError(
                    f"state_dict: meter.{name} must be a float32 tensor of shape {shape}, got {tensor.dtype} of shape "
                    f"{tuple(tensor.shape)}"
                )

    def load(self, state: MeterState, device: torch.device) -> None:
        """Go on from a state that `state` gave."""
        records, last_grad = (None if x is None else x.to(device) for x in (state.records, state.last_grad))
        if self._rank_weights is not None and records is not None:
            records = distributed.own_window(records, PRODUCTS_OF_ROWS)
        self.records, self._last_grad, self._sample, self._record = records, last_grad, None, None
        self.average_norm, self.loss_was_reported = state.average_norm, state.loss_was_reported
        self._losses = list(state.losses)

    def detach(self) -> None:
        """Leave the parameters as they were found."""
        self._backward.detach()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sample": None, "_last_grad": self.last_grad}


def row_of(column: int, length: int) -> int | None:
    """Where the inner step `column` of a window of `length` is recorded; None if it is not."""
    if length <= MAX_RECORDS:
        return column
    earlier, rows = length - moments.MEASURED_STEPS, MAX_RECORDS - moments.MEASURED_STEPS
    every = -(-earlier // rows)
    if column >= earlier:
        return -(-earlier // every) + column - earlier
    return None if column % every else column // every


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
