"""What the ranks of torch.distributed have in common: loss, gradient norm and what the policy sees of a window.

All ranks of the default process group train one model. Each of them has its own part of the batch, and under FSDP2
(`fully_shard`, whose parameters are DTensors) its own shard of each parameter. A tensor of which several ranks hold
the same part (all but the shards; a shard in a mesh of replicas too) is divided between them, so that what is
summed over all ranks is that of the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from rlsched.number import Number

T = TypeVar("T")


def ranks() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first_rank() -> bool:
    return ranks() == 1 or dist.get_rank() == 0


def of_first_rank(compute: Callable[[], T]) -> T:
    """What the first rank computes, or the error that it raises, on all ranks, which all have to call this."""
    if ranks() == 1:
        return compute()
    found: list[Any] = [None, None]
    if is_first_rank():
        try:
            found[0] = compute()
        except Exception as error:
            found[1] = error
    dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise found[1]
    return found[0]


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor, the class of which takes long to import."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Any) -> Any:
    """The part of a tensor that lies on this rank; None of None."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Any) -> Any:
    """The whole of a tensor; of a sharded one all ranks have to call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def part(whole: Tensor, like: Any) -> Any:
    """A whole tensor, spread over the ranks as another one is, and on its device; all ranks have to call this."""
    whole = whole.to(like.device)
    if not is_sharded(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements)


def of_all_ranks(numbers: Sequence[float], device: torch.device) -> list[list[float]]:
    """Some numbers of each rank, the same on all of them; `device` is where the process group communicates."""
    if ranks() == 1:
        return [list(numbers)]
    mine = torch.tensor(numbers, dtype=torch.float64, device=device)
    rows = [torch.empty_like(mine) for _ in range(ranks())]
    dist.all_gather(rows, mine)
    return [row.tolist() for row in rows]


def rank_weights(parameters: Sequence[Tensor]) -> list[float] | None:
    """The weight of what this rank holds of each parameter, in sums over all ranks; None if no parameter is sharded.

    Raises:
        ValueError: the parameters are those of FSDP1, which are shards and do not say of what; or complex shards.
    """
    if any(hasattr(p, "_is_flat_param") or hasattr(p, "_fsdp_flattened") for p in parameters):
        raise ValueError(
            "optimizer: the parameters of a FullyShardedDataParallel are not supported; shard the model with "
            "torch.distributed.fsdp.fully_shard"
        )
    if not any(map(is_sharded, parameters)):
        return None
    if any(is_sharded(p) and p.is_complex() for p in parameters):
        raise ValueError("optimizer: complex parameters that fully_shard has sharded are not supported")
    return [1 / _copies(p) for p in parameters]


def _copies(parameter: Any) -> float:
    """How many ranks hold the same part of a parameter."""
    shards = 1
    if is_sharded(parameter):
        mesh, placements = parameter.device_mesh, parameter.placements
        shards = math.prod(mesh.size(i) for i, kind in enumerate(placements) if not kind.is_replicate())
    return ranks() / shards


def whole_step(loss: Number | None, norm: Number, *, sharded: bool, device: torch.device) -> tuple[Number, Number]:
    """The loss of the whole batch, and the gradient norm of the whole model; floats where the norm was one.

    Args:
        loss: of this rank, 0-d, or None if it has none. The mean over those ranks that have one counts; 0, which has
            no logarithm, if none has.
        norm: of this rank's shards, of which each counts by its weight; else of the whole model.
        sharded: whether the norm has to be summed over the ranks.
        device: where the process group communicates.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # the square of a large norm has no place in float32
    for i, value in enumerate((loss or 0.0 if not isinstance(loss, Tensor) else loss, loss is not None, norm)):
        sums[i] = value
    sums[2].square_()
    dist.all_reduce(sums)
    whole_loss, whole_norm = (sums[0] / sums[1].clamp(min=1)).float(), sums[2].sqrt().float()
    if isinstance(norm, Tensor):
        return whole_loss, whole_norm if sharded else norm
    return float(whole_loss), float(sums[2].sqrt()) if sharded else norm


def whole_window(window: Tensor, columns: slice, *, sharded: bool) -> Tensor:
    """The records (steps, columns) of the whole model, the same on all ranks, with sums over all shards in `columns`.

    What every rank has computed from the same numbers is taken from the first rank, whose last bits then count.
    """
    if ranks() == 1:
        return window
    window = window.clone()
    if sharded:
        window[:, columns] = _reduced(window[:, columns], dist.ReduceOp.SUM)
    else:
        dist.broadcast(window, 0)
    return window


def own_window(window: Tensor, columns: slice) -> Tensor:
    """Of records with sums over all shards, what this rank goes on with: the first one has them all."""
    if ranks() > 1 and dist.get_rank() > 0:
        window = window.clone()
        window[:, columns] = torch.where(window[:, columns].isnan(), torch.nan, 0.0)
    return window


def merged(vector: Tensor) -> Tensor:
    """A vector of which each rank knows its own places, and has -inf at the others."""
    return _reduced(vector, dist.ReduceOp.MAX) if ranks() > 1 else vector


def _reduced(tensor: Tensor, operation: Any) -> Tensor:
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(tensor, operation)
    return tensor


class Part(NamedTuple):
    """Which numbers of the part of a tensor on this rank are in a sample of the whole, and where in it they stand."""

    taken: slice | Tensor  # into the flat part; a tensor is an index (numbers,)
    place: slice | Tensor  # into the sample


def part_of_every(tensor: Any, every: int, begin: int) -> Part:
    """This rank's part in a sample of every k-th number of a whole tensor, which stands at `begin` in a larger one."""
    if not is_sharded(tensor):
        return Part(slice(None, None, every), slice(begin, begin - (-tensor.numel() // every)))
    chunks = tensor.__create_chunk_list__()  # what torch.distributed.checkpoint asks a DTensor
    nothing = [0] * tensor.ndim
    offsets, sizes = (chunks[0].offsets, chunks[0].sizes) if chunks else (nothing, nothing)
    part = block_of_every(tensor.shape, offsets, sizes, every, begin)
    return Part(*(x if isinstance(x, slice) else x.to(tensor.device) for x in part))


def block_of_every(shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int], every: int, begin: int) -> Part:
    """The part that a block of `sizes`, which begins at `offsets` of a tensor, has in such a sample."""
    cut = [i for i, (size, whole) in enumerate(zip(sizes, shape, strict=True)) if size != whole]
    last = cut[-1] if cut else 0  # the last dimension that is cut: from there on, numbers lie side by side
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    begins = np.full(1, offsets[last] * strides[last])  # in the whole tensor, of each such run of numbers
    for i in range(last):
        begins = (begins[:, None] + strides[i] * (offsets[i] + np.arange(sizes[i]))).ravel()
    length = sizes[last] * strides[last]
    first = -begins % every  # in each run
    counts = np.maximum(0, -(-(length - first) // every))
    places = begin + (begins + first) // every
    if len(begins) == 1:
        place = int(places[0])
        return Part(slice(int(first[0]), None, every), slice(place, place + int(counts[0])))
    run = np.repeat(np.arange(len(begins)), counts)
    nth = np.arange(len(run)) - np.repeat(np.cumsum(counts) - counts, counts)
    return Part(torch.from_numpy(run * length + first[run] + every * nth), torch.from_numpy(places[run] + nth))
