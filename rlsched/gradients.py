"""The gradients of a step: dense or sparse, real or complex, whole or this rank's part of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from rlsched.number import Number, on_host


def is_dense(grad: Tensor) -> bool:
    """Whether this is a plain tensor of real numbers."""
    return not (grad.is_sparse or grad.is_complex())


def summed_up(parameters: Sequence[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """The gradients, with the parts of each number of a sparse one summed up as optimizers sum them."""
    whole = (p.grad for p in parameters if p.grad is not None)
    return [g.coalesce().values() if g.is_sparse else grad for g, grad in zip(whole, grads, strict=True)]


def leave_out_unless(finite: Tensor | bool, parameters: Iterable[Tensor], grads: Iterable[Tensor]) -> None:
    """Take the gradients of a step away that is not finite, so that an optimizer leaves the parameters alone.

    A 0-d tensor that tells so is not looked at, as the host would have to wait for it: `grads`, as `local_grads` has
    them, are zeroed.
    """
    if isinstance(finite, Tensor):
        for grad in grads:
            grad.masked_fill_(~finite, 0)
    elif not finite:
        for p in parameters:
            p.grad = None


def norms_of(grads: list[Tensor], rank_weights: list[float] | None) -> list[float] | Tensor:
    """Norm of each gradient, in single precision at least: half precision overflows at 65,504. On an accelerator (n,).

    Of gradients that several ranks hold, only this rank's part of their squares counts.
    """
    double = any(grad.dtype == torch.float64 for grad in grads)
    norms = torch._foreach_norm(grads, 2.0, torch.float64 if double else torch.float32)
    if rank_weights is not None:
        torch._foreach_mul_(norms, [math.sqrt(weight) for weight in rank_weights])
    return list(map(float, norms)) if on_host(grads[0]) else torch.stack(norms)


def total_norm(norms: list[float] | Tensor) -> Number:
    """Norm of all gradients that have these norms."""
    return torch.linalg.vector_norm(norms).float() if isinstance(norms, Tensor) else math.hypot(*norms)


def norms_of_parts(norms: list[float] | Tensor, counts: Sequence[int]) -> list[float] | Tensor:
    """Norms (parts,) of parts of a network with so many gradients each, whose norms follow on each other."""
    ends = list(accumulate(counts))
    parts = [total_norm(norms[end - count : end]) for end, count in zip(ends, counts, strict=True)]
    return torch.stack(parts) if isinstance(norms, Tensor) else parts
