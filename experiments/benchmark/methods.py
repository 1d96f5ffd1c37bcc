"""What sets the learning rate of a run: the baselines, a policy, and a policy without one of its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import update_bn

from rlsched import ScheduledOptimizer
from rlsched.experiments.benchmark.bases import Base
from rlsched.experiments.schedules import SCHEDULES
from rlsched.policy import Policy
from rlsched.signals import OBSERVATIONS

# --- What takes the steps of a run ------------------------------------------------------------------------------------


class Drive:
    """An optimizer at a constant learning rate."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def step(self, loss: Tensor) -> float:
        """Take a step, and return the learning rate that it had."""
        lr = self.lr
        self.optimizer.step()
        return lr

    @contextmanager
    def evaluating(self, network: nn.Module, inputs: Tensor) -> Iterator[None]:
        """Inside, the network is the one to judge. `inputs` are some that it trains on."""
        yield

    def validated(self, loss: float) -> None:
        """Hear of a validation loss."""


class Scheduled(Drive):
    """A scheduler of torch, which steps with the optimizer, or `every` so many times in the run."""

    def __init__(self, optimizer: Optimizer, scheduler: LRScheduler, steps: int, every: int | None = None) -> None:
        super().__init__(optimizer)
        self.scheduler = scheduler
        self.ends = _ends(steps, every or steps)
        self.taken = 0

    def step(self, loss: Tensor) -> float:
        lr = super().step(loss)
        self.taken += 1
        if self.taken in self.ends:
            self.scheduler.step()
        return lr


class Plateau(Drive):
    """A scheduler that hears of validation losses: of each, or of the first behind each `every`-th part of the run."""

    def __init__(
        self, optimizer: Optimizer, scheduler: ReduceLROnPlateau, steps: int, every: int | None = None
    ) -> None:
        super().__init__(optimizer)
        self.scheduler = scheduler
        self.ends = _ends(steps, every or steps)
        self.taken, self.is_due = 0, False

    def step(self, loss: Tensor) -> float:
        self.taken += 1
        self.is_due |= self.taken in self.ends
        return super().step(loss)

    def validated(self, loss: float) -> None:
        if self.is_due:
            self.scheduler.step(loss)
            self.is_due = False


def _ends(steps: int, parts: int) -> set[int]:
    return {round(steps * i / parts) for i in range(1, parts + 1)}


class Greedy(Drive):
    """GreedyLR of Transformers, which hears of every training loss, as its authors have it."""

    def __init__(self, optimizer: Optimizer) -> None:
        from transformers.optimization import GreedyLR

        super().__init__(optimizer)
        self.scheduler = GreedyLR(optimizer, smooth=True, min_lr=self.lr / 100, max_lr=self.lr * 10)

    def step(self, loss: Tensor) -> float:
        lr = super().step(loss)
        self.scheduler.step(loss.detach())
        return lr


class Averaged(Drive):
    """A Schedule-Free optimizer, whose weights to judge are not those to train."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self.schedule_free = optimizer
        optimizer.train()

    @contextmanager
    def evaluating(self, network: nn.Module, inputs: Tensor) -> Iterator[None]:
        """The statistics of batch norm are taken anew, as the package asks for."""
        self.schedule_free.eval()
        update_bn([inputs], network)
        yield
        self.schedule_free.train()


class Led(Drive):
    """A `ScheduledOptimizer`."""

    def __init__(self, optimizer: Optimizer, told: bool, **options: Any) -> None:
        super().__init__(optimizer)
        self.scheduled = ScheduledOptimizer(optimizer, **options)
        self.told = told  # of validation losses

    def step(self, loss: Tensor) -> float:
        self.scheduled.step(loss=loss)
        return self.lr

    def validated(self, loss: float) -> None:
        if self.told:
            self.scheduled.observe_validation(loss)


# --- Baselines --------------------------------------------------------------------------------------------------------

Parameters = Iterator[nn.Parameter]
WARM_UP = 0.05  # part of a run


@dataclass(frozen=True)
class Method:
    """A baseline.

    Args:
        title: what it is, in a few words.
        drive: of a base optimizer, the parameters, the factor on the usual learning rate, and the number of steps.
        of: whether it is one with this base optimizer.
        package: that it needs, beside torch.
    """

    title: str
    drive: Callable[[Base, Parameters, float, int], Drive]
    of: Callable[[Base], bool] = lambda base: True
    package: str | None = None

    @property
    def is_there(self) -> bool:
        return self.package is None or find_spec(self.package) is not None


def _scheduled(name: str) -> Callable[[Base, Parameters, float, int], Drive]:
    def drive(base: Base, parameters: Parameters, factor: float, steps: int) -> Drive:
        optimizer = base.make(parameters, factor)
        return Scheduled(optimizer, SCHEDULES[name](optimizer, steps), steps)

    return drive


def _plateau(base: Base, parameters: Parameters, factor: float, steps: int) -> Drive:
    optimizer = base.make(parameters, factor)
    return Plateau(optimizer, ReduceLROnPlateau(optimizer, factor=0.3, patience=3), steps)


def _greedy(base: Base, parameters: Parameters, factor: float, steps: int) -> Drive:
    return Greedy(base.make(parameters, factor))


def _recipe(base: Base, parameters: Parameters, factor: float, steps: int) -> Drive:
    assert base.recipe is not None
    optimizer = base.make(parameters, factor)
    scheduler = base.recipe.schedule(optimizer, steps)
    if isinstance(scheduler, ReduceLROnPlateau):
        return Plateau(optimizer, scheduler, steps, base.recipe.every)
    return Scheduled(optimizer, scheduler, steps, base.recipe.every)


def _schedule_free(base: Base, parameters: Parameters, factor: float, steps: int) -> Drive:
    import schedulefree

    options = dict(base.options)
    lr, warm_up = base.lr * factor, round(WARM_UP * steps)
    if base.kind is SGD:
        momentum = options.pop("momentum", 0.0)  # its own takes another place; here a step is as long without
        return Averaged(
            schedulefree.SGDScheduleFree(parameters, lr=lr / (1 - momentum), warmup_steps=warm_up, **options)
        )
    return Averaged(schedulefree.AdamWScheduleFree(parameters, lr=lr, warmup_steps=warm_up, **options))


def _prodigy(base: Base, parameters: Parameters, factor: float, steps: int) -> Drive:
    from prodigyopt import Prodigy

    optimizer = Prodigy(parameters, lr=factor, safeguard_warmup=True, use_bias_correction=True, **base.options)
    return Scheduled(optimizer, CosineAnnealingLR(optimizer, steps), steps)  # as its authors advise


COSINE = "cosine"
BASELINES: Mapping[str, Method] = {
    COSINE: Method("cosine", _scheduled("cosine")),
    "constant": Method("constant", _scheduled("constant")),
    "linear": Method("linear to zero", _scheduled("linear")),
    "warm-up-linear": Method("warm-up, linear to zero", _scheduled("warm-up-linear")),
    "wsd": Method("warm-up, stable, decay", _scheduled("wsd")),
    "one-cycle": Method("OneCycle", _scheduled("one-cycle")),
    "plateau": Method("ReduceLROnPlateau", _plateau),
    "greedy": Method("GreedyLR", _greedy, package="transformers"),
    "schedule-free": Method(
        "Schedule-Free", _schedule_free, lambda base: base.kind in (SGD, Adam, AdamW), package="schedulefree"
    ),
    "prodigy": Method("Prodigy", _prodigy, lambda base: base.kind in (Adam, AdamW), package="prodigyopt"),
    "recipe": Method("the script's own", _recipe, lambda base: base.recipe is not None),
}

# --- Policies ---------------------------------------------------------------------------------------------------------

POLICY, REPLAY, BASE_SCHEDULE = "policy", "replay", "base-schedule"
ONLY, WITHOUT = "only-", "without-"  # the name of a control, and of an observation


def ablations(policy: Policy) -> list[str]:
    """The methods that a policy's runs stand beside, to tell what each of its parts is worth."""
    only = [f"{ONLY}{name}" for name in policy.controls if len(policy.controls) > 1]
    return [BASE_SCHEDULE, REPLAY, *only, *(f"{WITHOUT}{name}" for name in policy.observations)]


def leads(method: str) -> bool:
    """Whether it is a policy, or what is left of one."""
    return method in (POLICY, REPLAY, BASE_SCHEDULE) or method.startswith((ONLY, WITHOUT))


class Ignorant:
    """A policy that is never told one of its observations: it sees what it would where that is not known.

    Args:
        policy: to decide.
        observation: the name of one of its observations.
    """

    def __init__(self, policy: Policy, observation: str) -> None:
        self.policy, self.observation = policy, observation
        self.observations, self.controls = policy.observations, policy.controls
        self.safe_start, self.base_schedule = policy.safe_start, policy.base_schedule
        self._place = policy.observations.index(observation)

    @property
    def digest(self) -> str:
        """Never that of the policy."""
        return f"{self.policy.digest} without {self.observation}"

    def begin(self, batch: tuple[int, ...] = ()) -> Any:
        return self.policy.begin(batch)

    def act(self, observation: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        observation = observation.clone()
        observation[..., self._place] = OBSERVATIONS[self.observation].unknown
        return self.policy.act(observation, memory)
