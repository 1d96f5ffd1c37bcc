"""Many runs in one process under one policy, which decides for all of them in one call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rlsched import per_group
from rlsched.controller import Controller
from rlsched.optimizer import attach
from rlsched.options import ScheduleOptions, shows_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from rlsched.options import Options


class Population:
    """Steps many optimizers, and has the policy decide for all that are due in one call.

    Each run is what it is alone: its own length, probe, divergence, snapshots and state. What is decided together is,
    to rounding, what is decided one by one. An optimizer may also step by itself, outside of `step`.

    Args:
        controllers: of `rlsched.attach`, of runs of any lengths and options, and under the same policy.

    Raises:
        ValueError: there are none, or one of them twice, or their policies are not the same, or remember no tensor.
    """

    def __init__(self, controllers: Iterable[Controller]) -> None:
        self.controllers = list(controllers)
        if len(set(map(id, self.controllers))) < max(1, len(self.controllers)):
            raise ValueError(f"controllers must be at least one, and each of them once, got {len(self.controllers)}")
        digests = {controller.policy.digest for controller in self.controllers}
        if len(digests) > 1:
            shown = " and ".join(sorted(digest[:12] for digest in digests))
            raise ValueError(f"controllers must have the same policy, they have sha256={shown}")
        self.policy = self.controllers[0].policy
        memory = self.policy.begin()
        if memory is not None and not isinstance(memory, Tensor):
            raise ValueError(
                f"policy has to remember a tensor, or None, to decide for many, not {type(memory).__name__}"
            )

    @torch.compiler.disable
    @torch.no_grad()
    def step(self, losses: Sequence[Tensor | float | None] | None = None) -> None:
        """One inner step of each run.

        Args:
            losses: that the gradients are of, one for each run, 0-d tensors or floats. None for a run that does not
                step this time: it is over, say. Without any, all runs step, by what their `observe` was told.

        Raises:
            ValueError: there are not as many losses as runs.
            DivergenceError, …: what a run raises, once all others have made their step.
        """
        if losses is not None and len(losses) != len(self.controllers):
            raise ValueError(f"losses must be one for each of the {len(self.controllers)} runs, got {len(losses)}")
        given = [(c, None) for c in self.controllers] if losses is None else zip(self.controllers, losses, strict=True)
        work = {c: c.preparing(loss) for c, loss in given if losses is None or loss is not None}
        errors = []
        for controller, error in per_group.together(self.policy, work).items():
            if error is None:
                try:
                    self._step(controller)
                except Exception as raised:
                    error = raised
            if error is not None:
                errors.append(error)
        if errors:
            raise errors[0]

    def _step(self, controller: Controller) -> None:
        controller.is_prepared = True
        try:
            controller.optimizer.step()  # whose hooks do the rest
        finally:
            controller.is_prepared = False

    def detach(self) -> None:
        """Undo `attach_all`; see `Controller.detach`."""
        for controller in self.controllers:
            controller.detach()

    def __len__(self) -> int:
        return len(self.controllers)

    def __getitem__(self, i: int) -> Controller:
        return self.controllers[i]

    def __repr__(self) -> str:
        return f"Population({len(self)} runs, {self.policy!r})"


@shows_options()
def attach_all(optimizers: Iterable[Optimizer], **options: Unpack[Options]) -> Population:
    """Drive the optimizers of an ensemble, a population or a sweep, each as `attach` does, under one policy::

        population = rlsched.attach_all(optimizers, total_steps=1_000)
        for _ in range(1_000):
            losses = [...]  # and backward(), of each network
            population.step(losses)

    Args:
        optimizers: one for each run.
        options: the other arguments of `ScheduledOptimizer`, the same for all of them. In `log_dir` each has a folder,
            by its number. Runs that differ in more than the optimizer: `Population([attach(…), attach(…)])`.

    Returns:
        A `Population`, whose `controllers` have what `attach` returns of each, in their order.

    Raises:
        ValueError: an optimizer is refused, and then none is driven; or an option belongs to one run alone: `model`,
            `writer`.
    """
    given: dict[str, Any] = dict(options)
    for name in ("model", "writer"):
        if given.get(name) is not None:
            raise ValueError(f"{name} is of one run: give Population the controllers of attach(…, {name}=…)")
    driven = list(optimizers)
    given["policy"] = ScheduleOptions(**options).loaded_policy()
    controllers: list[Controller] = []
    try:
        for i, optimizer in enumerate(driven):
            own = given if given.get("log_dir") is None else {**given, "log_dir": Path(given["log_dir"]) / str(i)}
            controllers.append(attach(optimizer, **own))
        return Population(controllers)
    except BaseException:
        for controller in controllers:
            controller.detach()
        raise
