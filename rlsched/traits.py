"""What sets one optimizer apart from another: the one table of such facts."""

from __future__ import annotations

from typing import NamedTuple

from torch.optim import Optimizer

ADAPTIVE = {"RMSprop", "Adagrad", "Adadelta", "Adafactor", "Rprop"}  # beside all optimizers with `betas`
# Optimizers whose `momentum` averages gradients, or weights; torch's others sum gradients.
AVERAGING = {"Muon", "SGDScheduleFree", "SGDScheduleFreeReference"}
# Optimizers that find their own scale: what the first steps do tells nothing of those to come.
OWN_SCALE = {"Adadelta", "Rprop", "Prodigy", "DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan", "DAdaptLion", "DAdaptSGD"}
OWN_SCALE_TRUST = 10.0  # the factor by which a policy may move their learning rate, which it was not trained to do


class Traits(NamedTuple):
    """What sets one optimizer apart from another, for a schedule."""

    adaptive: bool  # divides updates by a second moment of the gradients
    sums_gradients: bool  # its momentum is a sum of gradients, and not their average
    own_scale: bool  # its learning rate is a factor on a scale that it finds by itself


def is_plain(optimizer: Optimizer) -> bool:
    """Whether it is SGD without momentum."""
    traits = traits_of(optimizer)
    has_none = all(group.get("momentum", 1) == 0 for group in optimizer.param_groups)
    return has_none and traits.sums_gradients and not traits.adaptive


def traits_of(optimizer: Optimizer) -> Traits:
    """The traits of an optimizer, by its groups and by the names of its class and of those that it derives from."""
    names = {kind.__name__ for kind in type(optimizer).__mro__}
    has_betas = "betas" in optimizer.param_groups[0]
    return Traits(has_betas or bool(names & ADAPTIVE), not has_betas and not names & AVERAGING, bool(names & OWN_SCALE))
