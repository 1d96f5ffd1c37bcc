"""Where a policy was trained, and what its actions are worth elsewhere."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from rlsched.number import Number


class Domain(NamedTuple):
    """Where the observations lie that a policy was trained on. All of it is finite."""

    mean: Tensor  # (observations,)
    whitening: Tensor  # (observations, observations): a whitened observation has the covariance 1
    limit: Tensor  # 0-d, positive: a distance that one of a thousand observations exceeds

    @classmethod
    def of(cls, observations: Tensor) -> Domain:
        """The domain of observations (n, observations), of which there have to be many more than entries."""
        x = observations.double()
        mean = x.mean(0)
        # An entry that hardly changed in training is taken to vary by a tenth: all of them are scaled to about 1.
        variance, basis = torch.linalg.eigh(torch.cov(x.T) + 0.01 * torch.eye(x.shape[1], dtype=x.dtype))
        domain = cls(mean.float(), (basis / variance.sqrt()).T.float(), torch.ones(()))
        distances = domain.distance(observations)
        return domain._replace(limit=distances.quantile(0.999).clamp(min=1e-3))  # where all of them are the same

    def checked(self, observations: int) -> Domain:
        """The domain in float32 on the host.

        Raises:
            ValueError: it is not that of so many observations, or not finite.
        """
        domain = Domain(*(tensor.detach().to("cpu", torch.float32) for tensor in self))
        shapes = (observations,), (observations, observations), ()
        for name, tensor, shape in zip(self._fields, domain, shapes, strict=True):
            if tensor.shape != shape:
                raise ValueError(f"domain: {name} must have the shape {shape}, it has {tuple(tensor.shape)}")
            check_finite(f"domain: {name}", tensor)
        if not domain.limit > 0:
            raise ValueError(f"domain: limit must be positive, it is {domain.limit.item():g}")
        return domain

    def distance(self, observation: Tensor) -> Tensor:
        """Mahalanobis distance from the mean, (*batch,); infinite where it is too large for its type."""
        whitened = functional.linear(observation - self.mean, self.whitening)
        return torch.linalg.vector_norm(whitened, dim=-1).nan_to_num(nan=math.inf, posinf=math.inf)

    def influence(self, observation: Tensor) -> Number:
        """What is left of an action, (*batch,), in [0, 1]: 1 inside, and falling with the square of the distance."""
        distance = self.distance(observation)
        if distance.dim() == 0:
            return min(1.0, (float(self.limit) / max(float(distance), 1e-12)) ** 2)
        return (self.limit / distance.clamp(min=1e-12)).square().clamp(max=1)


def check_finite(what: str, tensor: Tensor) -> None:
    """
    Raises:
        ValueError: an entry of the tensor is NaN or infinite.
    """
    wrong = tensor[~tensor.isfinite()]
    if len(wrong):
        raise ValueError(f"{what} must be finite, it has {wrong[0].item()}")
