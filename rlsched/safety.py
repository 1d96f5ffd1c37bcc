"""What keeps a run alive: gradients that are not finite, divergence, and inputs that the policy was not trained on."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from rlsched.control import CONTROLS, LR
from rlsched.moments import Moments
from rlsched.signals import FAST

ANSWERS = ("cut", "rollback", "raise", None)  # to divergence
CUT = math.log(10)  # e-folds taken off the learning rate
BACK_OFF = math.log(2)  # e-folds below the learning rate that diverged, which are out of bounds from then on
NONFINITE_STEPS = 3  # in a row: a bad batch comes alone
RISE = math.log(3)  # of the average loss over its lowest
SNAPSHOT_INTERVAL = 5  # decisions between two snapshots


class DivergenceError(RuntimeError):
    """Training diverges, and `on_divergence="raise"` was asked for."""


class Intervention(NamedTuple):
    """Something that was done to keep a run alive."""

    step: int  # inner steps done
    message: str


class Guard:
    """Tells whether a run diverges, and how high its learning rate may still go.

    A run diverges if its last three steps or more were not finite; or if the running average of its loss is three
    times the lowest that it was, and has lost half of all that was gained since the run began.
    """

    def __init__(self) -> None:
        self.nonfinite = 0  # steps in a row, up to the last one
        self.first = math.nan  # log loss of the first window
        self.average = math.nan  # running average of the log loss
        self.lowest = math.nan  # that it was
        self.ceiling = CONTROLS[LR].high  # of the lr control's state

    def why_diverged(self, window: Moments) -> str | None:
        """Look at a window: a reason to say that the run diverges, or None.

        What comes after a divergence is judged anew: it has to get worse by as much to be told again.
        """
        finite = window.grad_norm.isfinite().tolist()
        last = next((i for i, ok in enumerate(reversed(finite)) if ok), None)
        self.nonfinite = self.nonfinite + len(finite) if last is None else last
        if self.nonfinite >= NONFINITE_STEPS:
            steps, self.nonfinite = self.nonfinite, 0
            return f"loss or gradient were not finite in the last {steps} steps"
        now = float(window.loss.log().nanmean())  # a loss that has no logarithm does not count
        if not math.isfinite(now):
            return None
        if math.isnan(self.first):
            self.first = self.average = self.lowest = now
        self.average += FAST * (now - self.average)
        lowest = self.lowest = min(self.lowest, self.average)
        if self.average > lowest + RISE and math.exp(self.average) > (math.exp(self.first) + math.exp(lowest)) / 2:
            self.average = self.lowest = max(now, self.average)
            return f"the loss has risen from {math.exp(lowest):.3g} to {math.exp(self.average):.3g}"
        return None

    def is_well(self, loss: float) -> bool:
        """Whether a run that does not diverge is nearly as good as ever, its loss at the present weights too."""
        if self.nonfinite or not math.isfinite(loss):
            return False
        return math.isnan(self.first) or (
            self.average < self.lowest + RISE / 4 and loss < math.exp(self.average + RISE)
        )

    def cut(self, lr_state: float) -> tuple[float, float]:
        """Cut the learning rate to a tenth, after a divergence at the lr control's state `lr_state`.

        Returns:
            The new state, and the log of the factor on the base learning rate that is beyond the control's reach.
        """
        low = CONTROLS[LR].low
        self.ceiling = max(low, min(self.ceiling, lr_state - BACK_OFF))
        lr = max(low, lr_state - CUT)
        return lr, lr_state - CUT - lr

    def state_dict(self) -> dict[str, float]:
        return dict(self.__dict__)

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.__dict__.update(state_dict)


class Snapshot:
    """The weights and the state of an optimizer at one moment. Buffers of a model (batch norm's) are not among them."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.weights = [(p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
        self.state = {p: copy.deepcopy(state) for p, state in optimizer.state.items()}

    @torch.no_grad()
    def restore(self, optimizer: Optimizer) -> None:
        """Bring both back, in place."""
        for p, weights in self.weights:
            p.copy_(weights)
        for p in list(optimizer.state):
            if p in self.state:
                _restore(optimizer.state[p], self.state[p])
            else:
                del optimizer.state[p]


def _restore(state: dict[str, Any], saved: dict[str, Any]) -> None:
    for key in list(state):
        if key not in saved:
            del state[key]
        elif isinstance(state[key], Tensor) and isinstance(saved[key], Tensor):
            state[key].copy_(saved[key])
        else:
            state[key] = copy.deepcopy(saved[key])


class Domain(NamedTuple):
    """Where the observations lie that a policy was trained on."""

    mean: Tensor  # (observations,)
    whitening: Tensor  # (observations, observations): a whitened observation has the covariance 1
    limit: Tensor  # 0-d: a distance that one of a thousand observations exceeds

    @classmethod
    def of(cls, observations: Tensor) -> Domain:
        """The domain of observations (n, observations), of which there have to be many more than entries."""
        x = observations.double()
        mean = x.mean(0)
        # An entry that hardly changed in training is taken to vary by a tenth: all of them are scaled to about 1.
        variance, basis = torch.linalg.eigh(torch.cov(x.T) + 0.01 * torch.eye(x.shape[1], dtype=x.dtype))
        domain = cls(mean.float(), (basis / variance.sqrt()).T.float(), torch.ones(()))
        distances = domain.distance(observations)
        return domain._replace(limit=distances.quantile(0.999))

    def distance(self, observation: Tensor) -> Tensor:
        """Mahalanobis distance from the mean, (*batch,)."""
        return torch.linalg.vector_norm((observation - self.mean) @ self.whitening.T, dim=-1)

    def influence(self, observation: Tensor) -> Tensor:
        """What is left of an action, (*batch,), in (0, 1]: 1 inside, and falling with the square of the distance."""
        return (self.limit / self.distance(observation).clamp(min=1e-12)).square().clamp(max=1)


def on_host(tensor: Tensor) -> bool:
    """Whether a number in `tensor` can be read without waiting for an accelerator."""
    return tensor.device.type == "cpu"


def zero_unless(finite: Tensor | bool, grads: Iterable[Tensor]) -> None:
    """Zero the gradients of a step that is not finite; a 0-d tensor that tells so is not looked at."""
    if isinstance(finite, Tensor):
        for grad in grads:
            grad.masked_fill_(~finite, 0)
    elif not finite:
        torch._foreach_zero_(list(grads))
