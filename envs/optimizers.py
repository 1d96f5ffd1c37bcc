"""The optimizers of inner tasks: which of `torch.optim` each of them is, and how a stack of networks takes its steps.

Each network of a stack has an optimizer of its own, so there is one rule, of which all of them are cases. θ are the
weights, g is the clipped gradient, v the running average of its square and m that of the gradient:

    g ← g + l2 θ                                weight decay, but AdamW's
    v ← v + forget (g² − v)                     Adam, AdamW, RMSprop
    g ← g / (early_root √v + early_epsilon)     RMSprop
    m ← m + (1 − momentum) (g − m)
    d = g + lookahead (m − g)                   Nesterov; elsewhere m
    d ← d / (root √v + epsilon)                 Adam, AdamW
    θ ← shrink θ − lr d                         with AdamW's weight decay
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from rlsched.control import CONTROLS, growth
from rlsched.traits import Traits, traits_of

BETA2, ALPHA, EPSILON = 0.999, 0.99, 1e-8  # of Adam and AdamW; of RMSprop; of all three

Tensors = Mapping[str, Tensor]
# What leaves out a term of the rule.
NEUTRAL = {
    "l2": 0.0,
    "forget": 0.0,
    "early_root": 0.0,
    "early_epsilon": 1.0,
    "lookahead": 1.0,
    "root": 0.0,
    "epsilon": 1.0,
    "shrink": 1.0,
}


@dataclass(frozen=True)
class InnerOptimizer:
    """One optimizer of `torch.optim`.

    Attributes:
        torch_class: its class.
        fixed: arguments of the class that are the same in every episode.
        terms: what it has of the rule: (hyperparameters, number of the step from 1) -> coefficients, by name.
    """

    torch_class: type[Optimizer]
    fixed: Mapping[str, Any]
    terms: Callable[[Tensors, Tensor], dict[str, Any]]

    def make(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> Optimizer:
        """The optimizer of a network in plain torch."""
        optimizer = self.torch_class(parameters, lr=lr, weight_decay=weight_decay, **self.fixed)  # type: ignore[call-arg]
        for group in optimizer.param_groups:
            CONTROLS["momentum"].write(group, momentum)
        return optimizer

    @cached_property
    def traits(self) -> Traits:
        return traits_of(self.make([nn.Parameter(torch.zeros(1))], 1.0, 0.5, 0.0))

    @property
    def needs_momentum(self) -> bool:
        """Whether torch refuses a momentum of zero."""
        return bool(self.fixed.get("nesterov"))


def _sgd(h: Tensors, count: Tensor) -> dict[str, Any]:
    return {"l2": h["weight_decay"]}


def _nesterov(h: Tensors, count: Tensor) -> dict[str, Any]:
    return {"l2": h["weight_decay"], "lookahead": h["momentum"]}


def _adam(h: Tensors, count: Tensor) -> dict[str, Any]:
    return {
        "l2": h["weight_decay"],
        "forget": 1 - BETA2,
        "root": (1 - BETA2**count).rsqrt(),  # averages that begin at zero are too small
        "epsilon": EPSILON,
        "lr": h["lr"] / (1 - h["momentum"] ** count),
    }


def _adamw(h: Tensors, count: Tensor) -> dict[str, Any]:
    return {**_adam(h, count), "l2": 0.0, "shrink": 1 - h["lr"] * h["weight_decay"]}


def _rmsprop(h: Tensors, count: Tensor) -> dict[str, Any]:
    return {"l2": h["weight_decay"], "forget": 1 - ALPHA, "early_root": 1.0, "early_epsilon": EPSILON}


OPTIMIZERS: Mapping[str, InnerOptimizer] = {
    "SGD": InnerOptimizer(SGD, {}, _sgd),
    "Nesterov": InnerOptimizer(SGD, {"momentum": 0.9, "nesterov": True}, _nesterov),
    "Adam": InnerOptimizer(Adam, {"betas": (0.9, BETA2), "eps": EPSILON}, _adam),
    "AdamW": InnerOptimizer(AdamW, {"betas": (0.9, BETA2), "eps": EPSILON}, _adamw),
    "RMSprop": InnerOptimizer(RMSprop, {"alpha": ALPHA, "eps": EPSILON}, _rmsprop),
}
NUMBERS: Mapping[str, int] = {name: number for number, name in enumerate(OPTIMIZERS)}


def rule(
    names: Sequence[str], numbers: Tensor, sums_gradients: Tensor, hyperparameters: Tensors, count: Tensor
) -> dict[str, Tensor]:
    """The coefficients of the rule for networks with different optimizers, each (steps, networks) or (networks,).

    A term that none of the optimizers has is not among them.

    Args:
        names: the optimizers that there may be in the stack.
        numbers: which of all optimizers each network has, (networks,), as in `NUMBERS`.
        sums_gradients: their trait, (networks,).
        hyperparameters: "lr", "momentum" and "weight_decay" in torch's terms, (networks,) or (steps, networks).
        count: number of each step, from 1, (steps, networks).
    """
    momentum = hyperparameters["momentum"]
    coefficients: dict[str, Any] = {
        "momentum": momentum,
        "lr": hyperparameters["lr"] * growth(momentum, sums_gradients),
    }
    for name in names:
        own = numbers == NUMBERS[name]
        for term, value in OPTIMIZERS[name].terms(hyperparameters, count).items():
            coefficients[term] = torch.where(own, value, coefficients.get(term, NEUTRAL.get(term, 0.0)))
    return coefficients


def stepped(params: Tensor, momentum: Tensor, second_moment: Tensor, grad: Tensor, c: Tensors) -> tuple[Tensor, Tensor]:
    """The weights after one step, and how far they moved, θ_t − θ_{t+1}; each (networks, parameters).

    Those before the step stay as they are. Memory is used again where it can be: fresh pages cost more than arithmetic.

    Args:
        params: θ, (networks, parameters).
        momentum, second_moment: m and v, which move on in place.
        grad: g, clipped, which is overwritten.
        c: the coefficients of the rule, each (networks, 1).
    """
    if "l2" in c:
        grad.addcmul_(params, c["l2"])
    if "forget" in c:
        root = grad.square()
        second_moment.lerp_(root, c["forget"])
        torch.sqrt(second_moment, out=root)
    if "early_root" in c:
        grad.div_(torch.addcmul(c["early_epsilon"], root, c["early_root"]))
    momentum.lerp_(grad, 1 - c["momentum"])
    direction = torch.lerp(grad, momentum, c["lookahead"], out=grad) if "lookahead" in c else momentum
    if "root" in c:
        direction = torch.div(direction, torch.addcmul(c["epsilon"], root, c["root"], out=root), out=root)
    if "shrink" in c:
        after = (params * c["shrink"]).addcmul_(direction, c["lr"], value=-1)
    else:
        after = torch.addcmul(params, direction, c["lr"], value=-1)
    return after, torch.sub(params, after, out=grad)
