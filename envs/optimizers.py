"""The optimizers of inner tasks: which of `torch.optim` each of them is, and how a stack of networks takes its steps.

Each network of a stack has an optimizer of its own, so there is one rule of which all of them are cases. θ are the
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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from rlsched.control import CONTROLS, growth
from rlsched.traits import Traits, traits_of

BETA2, ALPHA, EPSILON = 0.999, 0.99, 1e-8  # of Adam and AdamW; of RMSprop; of all three

Hyperparameters = Mapping[str, Tensor]  # "lr", "momentum", "weight_decay" …, each (networks,) or (steps, networks)
Coefficient = Any  # float (the same for all networks) | Tensor (networks,) | Tensor (steps, networks)


class Rule(NamedTuple):
    """What a step goes by. The defaults leave out a line of the rule."""

    lr: Coefficient  # of the average of gradients
    momentum: Coefficient
    l2: Coefficient = 0.0
    forget: Coefficient = 0.0
    early_root: Coefficient = 0.0
    early_epsilon: Coefficient = 1.0
    lookahead: Coefficient = 1.0
    root: Coefficient = 0.0
    epsilon: Coefficient = 1.0
    shrink: Coefficient = 1.0

    def steps(self, steps: int) -> list[Rule]:
        """The rule of each step, with columns (networks, 1)."""
        rows = [c[..., None].expand(steps, -1, -1).unbind() if isinstance(c, Tensor) else [c] * steps for c in self]
        return [Rule(*of_step) for of_step in zip(*rows, strict=True)]


@dataclass(frozen=True)
class InnerOptimizer:
    """One optimizer of `torch.optim`.

    Attributes:
        torch_class: its class.
        fixed: arguments of the class that are the same in every episode.
        case: its case of the rule, from one with no more than lr and momentum, the hyperparameters, and the number of
            the step, from 1.
    """

    torch_class: type[Optimizer]
    fixed: Mapping[str, Any]
    case: Callable[[Rule, Hyperparameters, Tensor], Rule]

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

    def rule(self, hyperparameters: Hyperparameters, count: Tensor) -> Rule:
        """Its rule with these hyperparameters, which are torch's, at the steps of these numbers (from 1)."""
        momentum = hyperparameters["momentum"]
        average_lr = hyperparameters["lr"] * growth(momentum, self.traits.sums_gradients)
        return self.case(Rule(average_lr, momentum), hyperparameters, count)


def _sgd(rule: Rule, hyperparameters: Hyperparameters, count: Tensor) -> Rule:
    return rule._replace(l2=hyperparameters["weight_decay"])


def _nesterov(rule: Rule, hyperparameters: Hyperparameters, count: Tensor) -> Rule:
    return rule._replace(l2=hyperparameters["weight_decay"], lookahead=rule.momentum)


def _adam(rule: Rule, hyperparameters: Hyperparameters, count: Tensor) -> Rule:
    return rule._replace(
        l2=hyperparameters["weight_decay"],
        lr=rule.lr / (1 - rule.momentum**count),  # averages that begin at zero are biased
        forget=1 - BETA2,
        root=(1 - BETA2**count).rsqrt(),
        epsilon=EPSILON,
    )


def _adamw(rule: Rule, hyperparameters: Hyperparameters, count: Tensor) -> Rule:
    shrink = 1 - hyperparameters["lr"] * hyperparameters["weight_decay"]
    return _adam(rule, hyperparameters, count)._replace(l2=0.0, shrink=shrink)


def _rmsprop(rule: Rule, hyperparameters: Hyperparameters, count: Tensor) -> Rule:
    return rule._replace(l2=hyperparameters["weight_decay"], forget=1 - ALPHA, early_root=1.0, early_epsilon=EPSILON)


OPTIMIZERS: Mapping[str, InnerOptimizer] = {
    "SGD": InnerOptimizer(SGD, {}, _sgd),
    "Nesterov": InnerOptimizer(SGD, {"momentum": 0.9, "nesterov": True}, _nesterov),
    "Adam": InnerOptimizer(Adam, {"betas": (0.9, BETA2), "eps": EPSILON}, _adam),
    "AdamW": InnerOptimizer(AdamW, {"betas": (0.9, BETA2), "eps": EPSILON}, _adamw),
    "RMSprop": InnerOptimizer(RMSprop, {"alpha": ALPHA, "eps": EPSILON}, _rmsprop),
}
NUMBERS: Mapping[str, int] = {name: number for number, name in enumerate(OPTIMIZERS)}


def rule_of_stack(used: Sequence[str], numbers: Tensor, hyperparameters: Hyperparameters, count: Tensor) -> Rule:
    """The rule of networks with different optimizers.

    Args:
        used: names of all optimizers that there may be in the stack.
        numbers: which of them each network has, (networks,), as in `NUMBERS`.
        hyperparameters: "lr", "momentum" and "weight_decay" in torch's terms, (networks,) or (steps, networks).
        count: number of the step, from 1, (networks,) or (steps, networks).
    """
    first, *others = used
    mixed = OPTIMIZERS[first].rule(hyperparameters, count)
    for name in others:
        own, rule = numbers == NUMBERS[name], OPTIMIZERS[name].rule(hyperparameters, count)
        mixed = Rule(
            *(a if a is b or _both_are(a, b) else torch.where(own, b, a) for a, b in zip(mixed, rule, strict=True))
        )
    return mixed


def stepped(params: Tensor, momentum: Tensor, second_moment: Tensor, grad: Tensor, c: Rule) -> tuple[Tensor, Tensor]:
    """The weights after one step, and how far they moved, θ_t − θ_{t+1}; each (networks, parameters).

    Those before the step stay as they are. Memory is used again where it can be: fresh pages cost more than arithmetic.

    Args:
        params: θ, (networks, parameters).
        momentum, second_moment: m and v, which move on in place.
        grad: g, clipped, which is overwritten.
        c: the rule of this step.
    """
    if _is_there(c.l2, 0.0):
        grad.addcmul_(params, c.l2)
    if _is_there(c.forget, 0.0):
        root = grad.square()
        second_moment.lerp_(root, c.forget)
        torch.sqrt(second_moment, out=root)
    if _is_there(c.early_root, 0.0):
        grad.div_(c.early_root * root + c.early_epsilon)
    momentum.lerp_(grad, 1 - c.momentum)
    direction = torch.lerp(grad, momentum, c.lookahead, out=grad) if _is_there(c.lookahead, 1.0) else momentum
    if _is_there(c.root, 0.0):
        direction = torch.div(direction, root.mul_(c.root).add_(c.epsilon), out=root)
    if _is_there(c.shrink, 1.0):
        after = (params * c.shrink).addcmul_(direction, c.lr, value=-1)
    else:
        after = torch.addcmul(params, direction, c.lr, value=-1)
    return after, torch.sub(params, after, out=grad)


def _is_there(coefficient: Coefficient, neutral: float) -> bool:
    return isinstance(coefficient, Tensor) or coefficient != neutral


def _both_are(one: Coefficient, other: Coefficient) -> bool:
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other
