"""What is written down of a window, a record for each of its inner steps, and kept of that in a checkpoint."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlsched import moments
from rlsched.number import Number
from rlsched.parameter_sample import COLUMNS

MAX_RECORDS = 1024  # of a window; in a longer one, every k-th step is recorded, and all that are measured


class MeterState(NamedTuple):
    """What is measured so far."""

    # (rows, parts × COLUMNS) float32, on the parameters' device; of the window's inner steps
    records: Tensor | None = None
    average_norm: Number = math.nan  # running average of the gradient norm; 0-d on the parameters' device if that waits
    last_grads: tuple[Tensor, ...] = ()  # of the sample of each part, which the next gradient is compared with
    losses: tuple[Number, ...] = ()  # reported for the step to come, 0-d or floats
    loss_was_reported: bool = False  # ever


def row_of(column: int, length: int) -> int | None:
    """Where the inner step `column` of a window of `length` is recorded; None if it is not."""
    if length <= MAX_RECORDS:
        return column
    earlier, rows = length - moments.MEASURED_STEPS, MAX_RECORDS - moments.MEASURED_STEPS
    every = -(-earlier // rows)
    if column >= earlier:
        return -(-earlier // every) + column - earlier
    return None if column % every else column // every


def check(state: MeterState, window: int, parts: int = 1) -> None:
    """Refuse a state that `Meter.state` cannot have given of so many parts in a window of so many inner steps.

    Raises:
        ValueError: naming the part.
    """
    needed = row_of(window - 1, window)
    assert needed is not None
    columns = parts * COLUMNS
    shape = f"(rows, {columns}), with {needed + 1} to {MAX_RECORDS} rows"
    tensors = [] if state.records is None else [("records", state.records, shape)]
    if len(state.last_grads) > parts:
        raise ValueError(f"state_dict: meter.last_grads must be at most {parts}, got {len(state.last_grads)}")
    tensors += [(f"last_grads[{i}]", tensor, "(numbers,)") for i, tensor in enumerate(state.last_grads)]
    for name, tensor, shape in tensors:
        fits = tensor.ndim == 1
        if name == "records":
            fits = tensor.ndim == 2 and needed < len(tensor) <= MAX_RECORDS and tensor.shape[1] == columns
        if not fits or tensor.dtype != torch.float32 or tensor.layout is not torch.strided:
            raise ValueError(
                f"state_dict: meter.{name} must be a float32 tensor of shape {shape}, got {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}"
            )
