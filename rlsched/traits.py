"""What sets one optimizer apart from another: the one table of such facts."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch.optim import Optimizer

ADAPTIVE = {"RMSprop", "Adagrad", "Adadelta", "Adafactor", "Rprop"}  # beside all optimizers with `betas`
# Optimizers whose `momentum` averages gradients, or weights; torch's others sum gradients.
AVERAGING = {"Muon", "SGDScheduleFree", "SGDScheduleFreeReference"}
# Optimizers that find their own scale: what the first steps do tells nothing of those to come. Each with the factor by
# which a policy may move their learning rate, which it was not trained to do.
OWN_SCALE = {
    "Adadelta": 100.0,
    **dict.fromkeys(["Rprop", "Prodigy", "DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan", "DAdaptLion", "DAdaptSGD"], 10.0),
}


class Traits(NamedTuple):
    """What sets one optimizer apart from another, for a schedule."""

    adaptive: bool  # divides updates by a second moment of the gradients
    sums_gradients: bool  # its momentum is a sum of gradients, and not their average
    own_scale: bool  # its learning rate is a factor on a scale that it finds by itself
    trust: float  # the factor by which a policy may move its learning rate, either way


def traits_of(optimizer: Optimizer) -> Traits:
    """The traits of an optimizer, by its groups and by the names of its class and of those that it derives from."""
    names = {kind.__name__ for kind in type(optimizer).__mro__}
    has_betas = "betas" in optimizer.param_groups[0]
    trusts = [trust for name, trust in OWN_SCALE.items() if name in names]
    return Traits(
        adaptive=has_betas or bool(names & ADAPTIVE),
        sums_gradients=not has_betas and not names & AVERAGING,
        own_scale=bool(trusts),
        trust=min(trusts, default=math.inf),
    )
