"""Inner tasks: a network, its data and its loss, and how it is trained; drawn anew for every episode."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from rlsched.control import growth
from rlsched.envs.draws import check_at_least, check_probabilities, check_ranges, log_uniform, seeded
from rlsched.envs.optimizers import OPTIMIZERS
from rlsched.envs.sources import Source
from rlsched.envs.stored import Stored

Loss = Callable[[Any, Tensor], Tensor]


class TrainingSetup(NamedTuple):
    """How one episode trains, in the terms of torch.optim."""

    decisions: int  # as the run is told when it begins
    final_decisions: int  # as it is told after `told_after` decisions: others where it is extended or cut short
    told_after: int
    optimizer: str  # a key of OPTIMIZERS
    lr: float
    momentum: float  # `momentum` of SGD and RMSprop, the first beta of Adam and AdamW
    weight_decay: float
    batch_size: int
    loss_scale: float  # factor on the loss
    gain: float  # factor on the initial weights
    max_grad_norm: float  # of the user's own clipping, before anything is measured; infinite without
    loss_reported: bool  # whether the policy sees the loss
    validation_reported: bool  # and the validation losses


def setting(default: Any, meaning: str) -> Any:
    """A field with its meaning, which docs/tasks.md shows."""
    factory = (lambda: dict(default)) if isinstance(default, dict) else (lambda: default)
    return field(default_factory=factory, metadata={"help": meaning})


@dataclass(frozen=True)
class SetupDistribution:
    """Distribution of training set-ups. Ranges are log-uniform."""

    decisions: tuple[int, int] = setting((30, 140), "decisions of a run, each before a window of inner steps")
    other_length: float = setting(0.0, "probability that a run gets another length in its course")
    length_change: tuple[float, float] = setting((0.5, 2.0), "factor on its decisions then")
    optimizers: Mapping[str, float] = setting({"SGD": 1, "AdamW": 1}, "their weights in the draw")
    sgd_lr: tuple[float, float] = setting((1e-5, 2.0), "base lr of SGD, times loss scale, at a momentum of 0.9")
    adaptive_lr: tuple[float, float] = setting(
        (3e-5, 0.3), "base lr of Adam and AdamW, and of RMSprop without momentum"
    )
    weight_decay: tuple[float, float] = setting((1e-5, 1e-2), "in half of the episodes, else 0")
    clipping: float = setting(0.0, "probability that the script clips the gradient norm itself")
    max_grad_norm: tuple[float, float] = setting(
        (0.05, 5.0), "to what, over the loss scale; SGD's base lr is then higher by as much as this is below 1"
    )
    no_momentum: float = setting(
        0.05, "probability that SGD runs without momentum; RMSprop does in half of the episodes"
    )
    other_momentum: float = setting(0.3, "probability of a momentum between 0.5 and 0.98 in place of 0.9")
    loss_scale: tuple[float, float] = setting((0.1, 10.0), "factor on the loss")
    gain: tuple[float, float] = setting((0.3, 2.0), "factor on the weight matrices that the network begins with")
    no_loss: float = setting(0.05, "probability that the policy is told no loss")
    no_validation: float = setting(
        0.5, "probability that the policy is told no validation loss, where it is told the loss"
    )

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "decisions",
            "sgd_lr",
            "adaptive_lr",
            "weight_decay",
            "loss_scale",
            "gain",
            "max_grad_norm",
            "length_change",
        )
        check_probabilities(
            self, "other_length", "clipping", "no_momentum", "other_momentum", "no_loss", "no_validation"
        )
        weights = self.optimizers.values()
        if not set(self.optimizers) <= set(OPTIMIZERS) or not weights or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(f"optimizers must give some of {list(OPTIMIZERS)} a weight, got {dict(self.optimizers)}")

    def draw(self, rng: Generator, batch_sizes: tuple[int, ...], lr_quantile: float | None = None) -> TrainingSetup:
        """One set-up; with this quantile of the range of the base learning rate, all else being the same."""
        decisions = round(log_uniform(rng, *self.decisions))
        names, weights = zip(*self.optimizers.items(), strict=True)
        optimizer = names[rng.choice(len(names), p=[w / sum(weights) for w in weights])]
        adaptive, sums_gradients, *_ = OPTIMIZERS[optimizer].traits
        loss_scale = log_uniform(rng, *self.loss_scale)
        momentum = 0.9
        if rng.random() < self.other_momentum:
            momentum = 1 - log_uniform(rng, 0.02, 0.5)
        may_lack_momentum = sums_gradients and not OPTIMIZERS[optimizer].needs_momentum
        if may_lack_momentum and rng.random() < (0.5 if adaptive else self.no_momentum):
            momentum = 0.0
        lr = log_uniform(rng, *(self.adaptive_lr if adaptive else self.sgd_lr), lr_quantile)
        lr /= growth(momentum, sums_gradients)
        clips = self.clipping > 0 and rng.random() < self.clipping
        clip = log_uniform(rng, *self.max_grad_norm) if clips else math.inf
        if not adaptive:
            lr /= 0.1 * loss_scale * min(1.0, clip)
        last, told_after = decisions, decisions
        if self.other_length > 0 and rng.random() < self.other_length:
            told_after = max(1, int(decisions * rng.uniform(0.2, 0.8)))
            last = max(told_after + 1, round(decisions * log_uniform(rng, *self.length_change)))
        return TrainingSetup(
            decisions=decisions,
            final_decisions=last,
            told_after=told_after,
            optimizer=optimizer,
            lr=lr,
            momentum=momentum,
            weight_decay=log_uniform(rng, *self.weight_decay) if rng.random() < 0.5 else 0.0,
            batch_size=int(rng.choice(batch_sizes)),
            loss_scale=loss_scale,
            gain=log_uniform(rng, *self.gain),
            max_grad_norm=loss_scale * clip,
            loss_reported=(told := rng.random()) >= self.no_loss,
            validation_reported=told >= self.no_loss + (1 - self.no_loss) * self.no_validation,
        )


@dataclass(frozen=True)
class InnerTask:
    """A family of inner tasks that share one architecture, and so can be trained as one stack.

    A user's own network, data and loss become one like this::

        InnerTask(lambda: nn.Linear(784, 10), (images, labels), nn.functional.cross_entropy, batch_size=64)

    Args:
        network: makes a module with new initial weights, from torch's global random numbers; it is no module itself.
            (For worker processes, it has to be importable: a class, a function or a `functools.partial`, and no
            lambda.)
        data: a pair of tensors (inputs, targets), a map-style `Dataset` of such pairs, or a `Source`.
        loss: (outputs, targets) -> mean loss of one network on one batch, 0-d, and better positive: the reward is its
            logarithm's drop.
        batch_size: points in a mini-batch; or (smallest, largest), of which each episode has the largest, halved any
            number of times. A smaller batch recurs until it is as large as the largest, which is the same for all but
            dropout, where each copy has its own mask, and batch norm's running variance, whose n / (n − 1) is of the
            largest.
        interval: inner steps in a window.
        setup: how the episodes train.
        validation_interval: windows between two validations. There is one at the start and one at the end of a run.
        patience: the run ends after so many validations in a row without a new best loss; never by default.
        reward_scale: rewards are divided by it. Where families differ in how far the log loss of a run can differ, it
            keeps those that differ most from being all that is learned.
        name: what it is called where runs are reported; in a mixture, "task" and its number by default.

    Raises:
        ValueError: a value is out of its range, or inputs and targets differ in length.
        TypeError: `data` is none of the above, or `network` makes nothing.
    """

    network: Callable[[], nn.Module]
    data: Source | Dataset[Any] | tuple[Any, Any]
    loss: Loss = functional.cross_entropy
    batch_size: int | tuple[int, int] = 32
    interval: int = 10
    setup: SetupDistribution = field(default_factory=SetupDistribution)
    validation_interval: int = 1
    patience: int | None = None
    reward_scale: float = 1.0
    name: str | None = field(default=None, compare=False)
    source: Source = field(init=False, repr=False)  # what `data` came to

    def __post_init__(self) -> None:
        if isinstance(self.network, nn.Module) or not callable(self.network):
            raise TypeError(
                "network must be what makes a new network, such as a class or a function without arguments, "
                f"got {self.network if callable(self.network) else repr(self.network)}"
            )
        source = self.data if hasattr(self.data, "draw") else Stored.of(self.data)
        object.__setattr__(self, "source", source)
        check_at_least(1, self, "interval", "validation_interval")
        smallest, largest = (self.batch_size,) * 2 if isinstance(self.batch_size, int) else self.batch_size
        if not 1 <= smallest <= largest:
            raise ValueError(f"batch_size must be at least 1, or (smallest, largest), got {self.batch_size}")
        if self.patience is not None:
            check_at_least(1, self, "patience")
        if not 0 < self.reward_scale < math.inf:
            raise ValueError(f"reward_scale must be positive and finite, got {self.reward_scale}")

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The batch sizes that an episode may have, the largest first."""
        if isinstance(self.batch_size, int):
            return (self.batch_size,)
        smallest, size = self.batch_size
        sizes = [size]
        while size % 2 == 0 and size // 2 >= smallest:
            size //= 2
            sizes.append(size)
        return tuple(sizes)

    def named(self, name: str) -> InnerTask:
        """The same task, which shares its data, by this name."""
        task = copy.copy(self)
        object.__setattr__(task, "name", name)
        return task

    def initial_network(self, seed: int) -> nn.Module:
        """A new network, with the weights that belong to `seed`; global random numbers stay as they are."""
        with seeded(seed):
            network = self.network()
        if not isinstance(network, nn.Module):
            raise TypeError(f"network must make an nn.Module, it made a {type(network).__name__}")
        return network

    def check(self, name: str) -> None:
        """Take a gradient, on data as an episode has them.

        Args:
            name: of the task, for what is told.

        Raises:
            ValueError: network, data and loss do not go together, or the loss has no logarithm before training.
        """
        try:
            points, network = self.source.draw(np.random.default_rng(0)), self.initial_network(0)
            size = self.batch_sizes[0]
            with seeded(0):  # dropout draws as well
                self.loss(network(points.inputs[:size]), points.targets[:size]).backward()
            network.eval()
            with torch.no_grad():
                loss = float(self.loss(network(points.validation_inputs), points.validation_targets))
        except Exception as error:  # of the user's code
            raise ValueError(f"tasks: {name!r} fails on its own data, {type(error).__name__}: {error}") from error
        if not 0 < loss < math.inf:
            raise ValueError(f"tasks: the loss of {name!r} must be positive and finite before training, it is {loss:g}")


# --- Losses of the generated tasks ----------------------------------------------------------------------------------


def next_token_loss(outputs: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of the logits (points, length, vocabulary) for each token's successor in (points, length)."""
    return functional.cross_entropy(outputs[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def multitask_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Of `networks.TwoHeads` on `sources.TeacherMultitask`: cross-entropy plus mean squared error."""
    labels, numbers = targets[:, 0].long(), targets[:, 1]
    return functional.cross_entropy(outputs[:, :-1], labels) + functional.mse_loss(outputs[:, -1], numbers)


def quadratic_loss(terms: Tensor, _: Tensor) -> Tensor:
    """Of `networks.NoisyQuadratic`: the sum of its terms (points, dimension), averaged over the points."""
    return terms.sum(-1).mean()
