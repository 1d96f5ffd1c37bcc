"""What is measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from rlsched.agents.config import TrainConfig
from rlsched.envs import FAMILIES, InnerTask
from rlsched.envs.draws import check_at_least
from rlsched.envs.mixtures import classifier
from rlsched.envs.sources import TeacherStudent

POINTS = 512  # training points of a perceptron: all stacks of a comparison are in memory at once
INTERVAL = 10  # inner steps of a perceptron's window


@dataclass(frozen=True)
class Perceptron:
    """A perceptron with one hidden layer, as an inner task."""

    inputs: int
    hidden: int
    classes: int
    batch_size: int

    @property
    def parameters(self) -> int:
        return (self.inputs + 1) * self.hidden + (self.hidden + 1) * self.classes

    @property
    def flops(self) -> int:
        """Of the matrix products of an inner step: two forward, three backward, since the inputs need no gradient."""
        return 2 * self.batch_size * self.hidden * (2 * self.inputs + 3 * self.classes)

    def task(self) -> InnerTask:
        source = TeacherStudent(inputs=self.inputs, classes=self.classes, points=(POINTS, POINTS))
        return classifier(source, (self.hidden,), batch_size=self.batch_size, interval=INTERVAL)

    def __str__(self) -> str:
        return f"{self.inputs}-{self.hidden}-{self.classes}, batch {self.batch_size}"


SMALL, LARGE = Perceptron(16, 32, 4, 32), Perceptron(784, 32, 10, 64)


@dataclass(frozen=True)
class Measurement:
    """One thing that is measured, in a process of its own."""

    kind: str  # a key of measure.KINDS
    task: Perceptron | str  # a perceptron; or a family, or a mixture, by its name
    size: int = 1  # networks that are trained at once
    compile: bool = False
    rounds: int = 3
    seconds: float = 1.0  # that a round takes at least


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    networks: tuple[Perceptron, ...] = (SMALL, LARGE)
    sizes: tuple[int, ...] = (16, 64, 256, 1024)
    grown_size: int = 64  # networks at once, of those that follow
    hidden: tuple[int, ...] = (8, 32, 128, 256)  # widths of a network that is grown
    batch_sizes: tuple[int, ...] = (8, 32, 128)
    families: tuple[str, ...] = tuple(FAMILIES)
    memory_size: int = 256  # networks at once, for the memory that a family needs
    training: tuple[str, int] = (TrainConfig.tasks, TrainConfig.num_envs)  # for the share of PPO
    square: int = 2048  # side of the large matrix product
    compile: bool = True
    rounds: int = 3
    seconds: float = 1.0

    def __post_init__(self) -> None:
        if len(self.networks) != 2:
            raise ValueError(f"networks must be two, a small and a large one, got {len(self.networks)}")
        if not set(self.families) <= set(FAMILIES):
            raise ValueError(f"families must be some of {list(FAMILIES)}, got {list(self.families)}")
        for name in ("sizes", "hidden", "batch_sizes"):
            if min(getattr(self, name), default=1) < 1:
                raise ValueError(f"{name} must be at least 1, got {list(getattr(self, name))}")
        check_at_least(1, self, "grown_size", "memory_size", "square", "rounds")
        check_at_least(0, self, "seconds")

    def groups(self) -> list[list[Measurement]]:
        """What to measure, in groups: the measurements of a group take turns."""
        networks = [
            [
                self.one("eight", network, 8),
                self.one("loop", network),
                *(self.one("matmul", network, size) for size in self.sizes),
                *(m for size in self.sizes for m in self.environments(network, size)),
            ]
            for network in self.networks
        ]
        tasks: list[Perceptron | str] = [p for network in self.networks for p in self.grown(network)]
        tasks += self.families
        return [
            [self.one("square", "", self.square)],
            *networks,
            *(self.environments(task, self.grown_size) for task in tasks),
            *([self.one("memory", family, self.memory_size)] for family in self.families),
            *([self.one("training", *self.training, compile=compile)] for compile in self.modes),
        ]

    @property
    def modes(self) -> tuple[bool, ...]:
        """Without `torch.compile`, and with it."""
        return (False, True) if self.compile else (False,)

    def grown(self, network: Perceptron) -> Iterator[Perceptron]:
        """The network at other widths and batch sizes."""
        yield from (replace(network, hidden=hidden) for hidden in self.hidden)
        yield from (replace(network, batch_size=size) for size in self.batch_sizes)

    def environments(self, task: Perceptron | str, size: int) -> list[Measurement]:
        return [self.one("environments", task, size, compile=compile) for compile in self.modes]

    def one(self, kind: str, task: Perceptron | str, size: int = 1, *, compile: bool = False) -> Measurement:
        return Measurement(kind, task, size, compile, self.rounds, self.seconds)


QUICK = Plan(
    sizes=(4,),
    grown_size=4,
    hidden=(),
    batch_sizes=(8,),
    families=("mlp",),
    memory_size=8,
    training=("small", 16),
    square=256,
    rounds=2,
    seconds=0.02,
)
