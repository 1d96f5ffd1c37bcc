"""Measures an optimizer's inner steps: loss, gradients, updates; and clips the gradients, which is measured too."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from rlsched import distributed, moments
from rlsched.accumulation import BackwardPasses
from rlsched.gradients import is_dense, leave_out_unless, norms_of, norms_of_parts, summed_up, total_norm
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
from rlsched.records import MAX_RECORDS, MeterState, row_of
from rlsched.schedule import ScheduleState

LARGEST = torch.finfo(torch.float32).max  # loss in a record
LARGEST_NORM = 1e18  # a larger gradient has a square that is not finite in single precision
Buffers = Callable[[Sequence[Tensor]], list[Tensor | None]]  # the optimizer's momentum of each parameter


class Meter:
    """Measures one optimizer: its network as a whole, or in parts, which share the loss and the clipping.

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
        self._samples: list[ParameterSample] = []  # of each part
        self._last_grads: list[Tensor] = []  # of samples that are yet to be made
        self._sizes: Sequence[int] = ()  # parameters in each part; none, if the network is measured as a whole
        self._norms_of_parts: Any = None  # of the gradients of the step that is under way
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

    def loss_and_norm(
        self, parameters: Sequence[Tensor], grads: list[Tensor], sizes: Sequence[int] = ()
    ) -> tuple[Number | None, Number]:
        """The loss of the whole batch, None if nobody reported one, and the gradient norm of the whole model.

        On the host these are floats: reading a number is free there, and tensors of one number are slow. `sizes` is of
        the parts to measure, if not the whole: so many of the parameters each. There may be more of them than before.
        """
        device = grads[0].device
        self._sizes, columns = sizes, COLUMNS * (len(sizes) or 1)
        if self.records is None:
            rows = min(self.interval, MAX_RECORDS)
            self.records = torch.full((rows, columns), torch.nan, dtype=torch.float32, device=device)
        elif sizes and self.records.shape[1] < columns:
            more = self.records.new_full((len(self.records), columns - self.records.shape[1]), torch.nan)
            self.records = torch.cat([self.records, more], 1)
        losses, self._losses = self._losses, []
        self.loss_was_reported |= bool(losses)
        self.parts = self._backward.parts()
        weights = self._rank_weights
        if weights is not None:
            weights = [weight for weight, p in zip(weights, parameters, strict=True) if p.grad is not None]
        summed = grads if self._all_dense else summed_up(parameters, grads)
        norms = norms_of(summed, weights)
        loss, norm = _mean(losses, device), total_norm(norms)
        if sizes:
            counts = [sum(p.grad is not None for p in part) for part in self._parts(parameters)]
            self._norms_of_parts = norms_of_parts(norms, counts)
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
        record = self.records[row % len(self.records)] if row is not None else torch.empty_like(self.records[0])
        self._record = record
        cells: Any = record
        norms = self._norms_of_parts if self._sizes else norm
        finite: Tensor | bool
        if isinstance(norm, Tensor):
            finite = norm <= LARGEST_NORM if loss is None else (norm <= LARGEST_NORM) & torch.as_tensor(loss).isfinite()
            norm_seen: Number = torch.where(finite, norms, torch.nan)
        else:
            cells = record.numpy()
            finite = abs(loss or 0.0) <= LARGEST and norm <= LARGEST_NORM
            norm_seen, loss = (norms, loss) if finite else (math.nan, None)
        if not self.watches:
            leave_out_unless(finite, parameters, grads)
        cells[slice(GRAD_NORM, None, COLUMNS) if self._sizes else GRAD_NORM] = norm_seen
        if loss is not None:
            cells[LOSS] = loss

        self._is_measured = not is_last and moments.is_measured(column, length)
        if not is_last and moments.is_measured(column + 1, length):  # whose gradient is compared with this one
            for sample in self._samples_of(parameters):
                if not self._is_measured:
                    sample.take_grad()
                else:
                    sample.take_all(buffers(sample.chosen) if self.has_momentum else None)
        cells[CLIP_COEFFICIENT] = 1.0 if self.watches else self._clip(grads, norm, finite, multiple)

    def finish_step(self) -> bool:
        """Measure what the step did to the weights. Says whether there was a step."""
        if self._record is None:
            return False
        if self._is_measured:
            for sample, record in zip(self._samples, self._record.split(COLUMNS), strict=True):
                sample.finish(record)
        self._record = None
        return True

    def _parts(self, parameters: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """The parameters of each part."""
        ends = list(accumulate(self._sizes))
        return [parameters[end - size : end] for end, size in zip(ends, self._sizes, strict=True)] or [parameters]

    def _samples_of(self, parameters: Sequence[Tensor]) -> list[ParameterSample]:
        """The sample of each part."""
        parts, samples = self._parts(parameters), self._samples
        if len(samples) != len(parts) or not all(map(ParameterSample.is_of, samples, parts)):
            lasts = dict(enumerate(self.last_grads))
            self._samples = [
                samples[i] if i < len(samples) and samples[i].is_of(part) else ParameterSample(part, lasts.get(i))
                for i, part in enumerate(parts)
            ]
        return self._samples

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

    def threshold(self, multiple: float) -> float:
        """What the norm of the next gradient is clipped to, at so many times its running average; NaN if it is not."""
        return math.nan if self.watches else min(multiple * float(self.average_norm), self.max_grad_norm)

    def zero_nonfinite_grads(self, parameters: Sequence[Tensor]) -> None:
        """Zero all gradients unless they are finite: those of an evaluation in the midst of a step."""
        grads = self.local_grads(parameters)
        if grads and self._rank_weights is None:
            norm = total_norm(norms_of(grads, None))
            leave_out_unless(norm.isfinite() if isinstance(norm, Tensor) else math.isfinite(norm), parameters, grads)

    # --- A window ---------------------------------------------------------------------------------------------------

    def windows(self, steps: int) -> list[Moments]:
        """The moments of the first `steps` inner steps of a window, of each part, the same on all ranks.

        The only place where the host waits for an accelerator.
        """
        last = row_of(steps - 1, steps)
        assert last is not None
        first, *others = map(moments_of, self._whole_records()[: last + 1].cpu().split(COLUMNS, 1))
        shared = {"loss": first.loss, "clip_coefficient": first.clip_coefficient}
        return [first, *(other._replace(**shared) for other in others)]

    def clear(self, interval: int) -> None:
        """Begin a window of at most `interval` inner steps."""
        self.interval = interval
        if self.records is not None:
            rows = min(interval, MAX_RECORDS)
            if len(self.records) != rows:
                self.records = self.records.new_empty(rows, self.records.shape[1])
            self.records.fill_(torch.nan)

    def _whole_records(self) -> Tensor:
        assert self.records is not None
        return distributed.whole_window(self.records, PRODUCTS_OF_ROWS, sharded=self._rank_weights is not None)

    # --- State ------------------------------------------------------------------------------------------------------

    @property
    def last_grads(self) -> list[Tensor]:
        """Of each part, the sample of the gradient that the next one is compared with; none before there is one."""
        return [sample.last_grad for sample in self._samples] or self._last_grads[:]

    def state(self) -> MeterState:
        """What was measured, of the whole model; of one that is sharded all ranks have to call this."""
        records, last_grads, losses = self.records, self.last_grads, tuple(map(float, self._losses))
        if self._rank_weights is not None:
            records = None if records is None else self._whole_records()
            last_grads = list(map(distributed.merged, last_grads))
        records, last_grads = None if records is None else records.clone(), [x.clone() for x in last_grads]  # no views
        return MeterState(records, float(self.average_norm), tuple(last_grads), losses, self.loss_was_reported)

    def load(self, state: MeterState, device: torch.device) -> None:
        """Go on from a state that `state` gave."""
        records = None if state.records is None else state.records.to(device)
        if self._rank_weights is not None and records is not None:
            records = distributed.own_window(records, PRODUCTS_OF_ROWS)
        self._last_grads, self._samples = [last_grad.to(device) for last_grad in state.last_grads], []
        self.records, self._record = records, None
        self.average_norm, self.loss_was_reported = state.average_norm, state.loss_was_reported
        self._losses = list(state.losses)

    def detach(self) -> None:
        """Leave the parameters as they were found."""
        self._backward.detach()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_samples": [], "_last_grads": self.last_grads}


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
