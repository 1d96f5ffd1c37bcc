"""The base optimizers of the benchmark, at the learning rates and with the clipping that people give them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import SGD, Adadelta, Adam, AdamW, Muon, Optimizer, RMSprop
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau, StepLR

from rlsched.experiments.schedules import quarter_on_plateau, warm_up_cosine

EPOCHS = 20  # in a run, where a recipe counts in epochs
# Factors on the usual learning rate that the baselines are tuned over, half a decade apart. Adam's usual learning rate
# is low for small networks and short runs, and SGD's is high.
RISING, FALLING = (0.1, 0.316, 1.0, 3.16, 10.0, 31.6), (0.01, 0.0316, 0.1, 0.316, 1.0, 3.16)


@dataclass(frozen=True)
class Recipe:
    """What a public script does with the learning rate.

    Args:
        source: where it is from.
        schedule: of the optimizer and the number of steps.
        every: its steps are so many in a run; None: one with each of the optimizer's.
    """

    source: str
    schedule: Callable[[Optimizer, int], LRScheduler | ReduceLROnPlateau]
    every: int | None = None


@dataclass(frozen=True)
class Base:
    """A base optimizer.

    Args:
        kind: its class.
        lr: its usual learning rate.
        options: its other arguments.
        clip: for `clip_grad_norm_`, in the runs of all methods.
        reach: the factor by which the learning rate of a policy's run may be wrong, either way: ten where the learning
            rate is that of a recipe, else a hundred.
        recipe: the schedule of a script that has this optimizer.
        sweep: factors on the learning rate that the baselines are tuned over.
    """

    kind: Callable[..., Optimizer]
    lr: float
    options: Mapping[str, Any] = field(default_factory=dict)
    clip: float | None = None
    reach: float = 100.0
    recipe: Recipe | None = None
    sweep: tuple[float, ...] = RISING

    def make(self, parameters: Iterable[nn.Parameter], factor: float) -> Optimizer:
        return self.kind(parameters, lr=self.lr * factor, **self.options)

    def within_reach(self, factors: Iterable[float]) -> list[float]:
        """Those of the factors, each once, by which a learning rate may be wrong."""
        return [factor for factor in dict.fromkeys(factors) if 1 / self.reach <= factor <= self.reach]


def plain(lr: float, clip: float | None = 0.25) -> Base:
    """SGD without momentum, at the learning rates at which language models are trained."""
    recipe = Recipe("pytorch/examples, word_language_model", lambda optimizer, _: quarter_on_plateau(optimizer), EPOCHS)
    return Base(SGD, lr, {}, clip, 10.0, recipe, FALLING)


SGD_MOMENTUM = Base(SGD, 0.1, {"momentum": 0.9}, sweep=FALLING)
PLAIN_UNCLIPPED = Base(SGD, 0.3, sweep=FALLING)  # at a learning rate that suits perceptrons
SGD_DECAY = Base(SGD, 0.1, {"momentum": 0.9, "weight_decay": 5e-4}, sweep=FALLING)
ADAM = Base(Adam, 1e-3)
ADAMW = Base(AdamW, 1e-3, {"weight_decay": 0.01})
ADAMW_GPT = Base(
    AdamW,
    1e-3,
    {"weight_decay": 0.1, "betas": (0.9, 0.95)},
    clip=1.0,
    recipe=Recipe("nanoGPT", lambda optimizer, steps: warm_up_cosine(optimizer, steps, max(1, steps // 20))),
)
RMSPROP = Base(RMSprop, 1e-3)
ADADELTA = Base(
    Adadelta, 1.0, reach=10.0, recipe=Recipe("pytorch/examples, mnist", lambda o, _: StepLR(o, 1, 0.7), EPOCHS)
)
MUON = Base(Muon, 0.02, {"weight_decay": 0.01})
