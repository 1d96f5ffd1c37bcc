"""A sample of a network's parameters, on which directions and updates are measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import is_

import numpy as np
import torch
from torch import Tensor

from rlsched import distributed
from rlsched.moments import PRODUCTS, Moments

SIZE = 2**12  # parameters in a sample, and at most one more of each tensor; a smaller network is measured whole

# Rows of a sample: all but the last are taken before the step.
ROWS = LAST_GRAD, MOMENTUM, GRAD, WEIGHTS, UPDATE = range(5)
# Columns of a record, which is what is written down of an inner step.
LOSS, GRAD_NORM, CLIP_COEFFICIENT = range(3)
PRODUCTS_OF_ROWS = slice(3, 3 + len(ROWS) ** 2)  # of each row with each
COLUMNS = PRODUCTS_OF_ROWS.stop
FACTORS = {  # of each product that is one of the moments
    "grad_square": (GRAD, GRAD),
    "last_grad_square": (LAST_GRAD, LAST_GRAD),
    "momentum_square": (MOMENTUM, MOMENTUM),
    "weights_square": (WEIGHTS, WEIGHTS),
    "update_square": (UPDATE, UPDATE),
    "grad_last_grad": (GRAD, LAST_GRAD),
    "grad_momentum": (GRAD, MOMENTUM),
    "grad_weights": (GRAD, WEIGHTS),
    "grad_update": (GRAD, UPDATE),
    "update_weights": (UPDATE, WEIGHTS),
}
_UNKNOWN = [math.nan] * COLUMNS
_COLUMNS = [PRODUCTS_OF_ROWS.start + len(ROWS) * a + b for a, b in (FACTORS[name] for name in PRODUCTS)]


class ParameterSample:
    """Every k-th number of a network's parameters: its gradient, momentum and weight, as rows of one matrix.

    A complex parameter is two numbers, and a sparse gradient is zero where it stores nothing. Of a sharded network
    every rank takes those of its own shards: `finish` then writes its part of the products, whose sum over all ranks is
    that of the whole network.

    Spread over the whole network, 4,000 of a few 100,000 parameters give a cosine of gradients to within 0.02 (average
    error of the mean of a window); 65,000 that lie together missed by up to 0.1, since the gradients of one row of
    weights are alike.
    """

    def __init__(self, parameters: Sequence[Tensor], last_grad: Tensor | None = None) -> None:
        every = -(-sum(p.numel() * (1 + p.is_complex()) for p in parameters) // SIZE)
        self._every = every | 1 if every > 1 else 1  # odd, not to meet the rows of weights at the same places
        self.parameters = parameters
        self.chosen = _without_the_smallest(parameters) if self._every > 1 else parameters
        # Of tensors that do not lie in the order of their dimensions (channels last): the order in which they lie.
        plain = [p.is_contiguous() or distributed.is_sharded(p) for p in self.chosen]
        self._orders = [
            None if is_plain else np.argsort(as_real(p).stride())[::-1].tolist()
            for p, is_plain in zip(self.chosen, plain, strict=True)
        ]
        self._kept: dict[int, tuple[list[int], list[Tensor]]] = {}
        rank_weights = distributed.rank_weights(self.chosen)
        self._sharded = rank_weights is not None
        self._complex = any(p.is_complex() for p in self.chosen)
        self._taken: list[slice | Tensor] = [slice(None, None, self._every) for _ in self.chosen]
        self._places: list[slice | Tensor] = []  # of what is taken of each shard, in the sample of the whole network
        self._whole = 0  # length of that
        if self._sharded:
            for i, p in enumerate(self.chosen):
                self._taken[i], place = distributed.part_of_every(p, self._every, self._whole)
                self._places.append(place)
                self._whole += -(-p.numel() // self._every)
        parts = self._parts_kept(WEIGHTS, self.chosen)
        lengths = [part.numel() for part in parts]
        self._length = sum(lengths)
        padded = -(-self._length // 16) * 16  # rows that begin at a cache line: sums are the same on every run
        self._matrix = torch.zeros(5, padded, dtype=torch.float32, device=parameters[0].device)
        self._transposed, self._rows = self._matrix.T, list(self._matrix)
        self._views = [
            [view.view(part.shape) for view, part in zip(row[: self._length].split(lengths), parts, strict=True)]
            for row in self._rows
        ]
        self._zero = self._matrix.new_zeros(())
        self._weights: Tensor | None = None  # of the columns, in sums over all ranks
        if rank_weights is not None and set(rank_weights) != {1.0}:
            self._weights = self._matrix.new_zeros(padded)
            for columns, weight in zip(self._weights[: self._length].split(lengths), rank_weights, strict=True):
                columns.fill_(weight)
        if last_grad is None or last_grad.numel() != self.last_grad.numel():
            return
        if self._sharded:
            for view, place in zip(self._views[GRAD], self._places, strict=True):
                view.copy_(last_grad[place].view(view.shape))
        else:
            self.last_grad.copy_(last_grad)

    @property
    def last_grad(self) -> Tensor:
        """The gradient that was taken last, (length,); -inf at the places of other ranks' shards."""
        if not self._sharded:
            return self._rows[GRAD][: self._length]
        whole = self._matrix.new_full((self._whole,), -torch.inf)
        for view, place in zip(self._views[GRAD], self._places, strict=True):
            whole[place] = view.reshape(-1)
        return whole

    def is_of(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these are the parameters that the sample was planned for."""
        return len(parameters) == len(self.parameters) and all(map(is_, parameters, self.parameters))

    def take_grad(self) -> None:
        """Copy the gradients into their row; those before become the last ones."""
        self._take([GRAD], self._parts(self._local([p.grad for p in self.chosen])))

    def take_all(self, momentum: Sequence[Tensor | None] | None = None) -> None:
        """Copy the gradients, the weights and the optimizer's momentum of the chosen parameters into their rows."""
        parts = self._parts(self._local([p.grad for p in self.chosen])) + self._parts_kept(WEIGHTS, self.chosen)
        if momentum is None:
            self._take([GRAD, WEIGHTS], parts)
        else:
            self._take([GRAD, WEIGHTS, MOMENTUM], parts + self._parts_kept(MOMENTUM, momentum))

    def _take(self, rows: Sequence[int], parts: list[Tensor]) -> None:
        self._rows[LAST_GRAD].copy_(self._rows[GRAD])
        torch._foreach_copy_([view for row in rows for view in self._views[row]], parts)

    def finish(self, record: Tensor) -> None:
        """Take the update, now that the step is done, and write the products of all rows into `record`."""
        torch._foreach_copy_(self._views[UPDATE], self._parts_kept(WEIGHTS, self.chosen))
        torch.sub(self._rows[WEIGHTS], self._rows[UPDATE], out=self._rows[UPDATE])
        weighted = self._matrix if self._weights is None else self._matrix * self._weights
        torch.mm(weighted, self._transposed, out=record[PRODUCTS_OF_ROWS].view(5, 5))

    def _local(self, tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """What lies on this rank of tensors, as real numbers."""
        if self._sharded:
            tensors = [distributed.local(tensor) for tensor in tensors]
        return [None if tensor is None else as_real(tensor) for tensor in tensors] if self._complex else tensors

    def _parts(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """What is taken of tensors, one for each chosen parameter; zero of a tensor that is None."""
        parts = []
        for tensor, order, taken in zip(tensors, self._orders, self._taken, strict=True):
            if tensor is None:
                parts.append(self._zero)
                continue
            if tensor.is_sparse:
                if order is None and self._every > 1:
                    parts.append(every_of_sparse(tensor, self._every))
                    continue
                tensor = tensor.to_dense()
            if self._every == 1:
                parts.append(tensor)
            elif order is None and not self._sharded and tensor.is_contiguous():
                length = -(-tensor.numel() // self._every)
                parts.append(tensor.as_strided((length,), (self._every,), tensor.storage_offset()))
            else:
                parts.append((tensor.permute(order) if order else tensor).reshape(-1)[taken])
        return parts

    def _parts_kept(self, row: int, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """The same, kept for as long as the tensors stay where they are."""
        tensors = self._local(tensors)
        where = [0 if tensor is None else -1 if tensor.is_sparse else tensor.data_ptr() for tensor in tensors]
        if row in self._kept and self._kept[row][0] == where:
            return self._kept[row][1]
        parts = self._parts([None if tensor is None else tensor.detach() for tensor in tensors])
        if all(tensor is None or _is_view(part, tensor) for part, tensor in zip(parts, tensors, strict=True)):
            self._kept[row] = where, parts
        return parts


def as_real(tensor: Tensor) -> Tensor:
    """A view of a complex tensor (...) as real numbers (..., 2); any other tensor as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def every_of_sparse(tensor: Tensor, every: int) -> Tensor:
    """Every k-th number of a sparse tensor (COO), (numbers,), for the price of those that it stores.

    What it stores are dense blocks of some length, which begin anywhere. The first k-th number in a block that begins
    at b is its (−b mod k)-th one.
    """
    tensor = tensor.coalesce()
    length = math.prod(tensor.shape[tensor.sparse_dim() :])
    blocks = tensor.values().reshape(-1, max(length, 1))
    begins = torch.zeros_like(tensor.indices()[0])
    for index, size in zip(tensor.indices(), tensor.shape, strict=False):
        begins = begins * size + index
    begins = length * begins.unsqueeze(1)
    first = torch.arange(0, length, every, device=begins.device)  # of a block that begins at a k-th number
    nth = first + -begins % every
    there = nth < length
    count = -(-tensor.numel() // every)
    sample = blocks.new_zeros(count + 1)  # the last one is no number of the sample, to need no count of the others
    places = torch.where(there, (begins + nth) // every, count)
    sample.scatter_(0, places.reshape(-1), blocks.gather(1, nth.clamp(max=length - 1)).reshape(-1))
    return sample[:count]


def _is_view(part: Tensor, tensor: Tensor) -> bool:
    if tensor.is_sparse:
        return False
    return part.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


def _without_the_smallest(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Without the smallest tensors, which together hold a hundredth of the parameters: biases, for the most part."""
    spare = sum(p.numel() for p in parameters) / 100
    small = set()
    for p in sorted(parameters, key=Tensor.numel):
        spare -= p.numel()
        if spare >= 0:
            small.add(id(p))
    return [p for p in parameters if id(p) not in small]


def moments_of(records: Tensor) -> Moments:
    """The moments of a window, each (steps,) floats, from its records (steps, columns); NaN where not finite."""
    rows = [row if abs(row[GRAD_NORM]) < math.inf else _UNKNOWN for row in records.tolist()]
    loss, grad_norm, coefficients = ([row[column] for row in rows] for column in (LOSS, GRAD_NORM, CLIP_COEFFICIENT))
    products = ([row[column] for row in rows] for column in _COLUMNS)
    series = [loss, grad_norm, coefficients, *products]
    return Moments(*(tuple(x) for x in series))
