"""What happens once in a step, although an optimizer is around another one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

if TYPE_CHECKING:
    from rlsched.controller import Controller


def loss_of(closure: Callable[[], Any]) -> Any:
    """What a closure gives that computes the loss and its gradients.

    Raises:
        TypeError: it is none.
    """
    if not callable(closure):
        raise TypeError(f"closure must be callable, got {closure!r}; a loss is given by its name: step(loss=loss)")
    with torch.enable_grad():
        return closure()


def evaluated_once(closure: Callable[[], Any], loss: Any, controller: Controller) -> Callable[[], Any]:
    """The closure for an optimizer, where it was evaluated already and gave `loss`.

    Most optimizers evaluate it first of all, which is not needed again. Some (SAM) move the weights before that.
    """
    groups = controller.optimizer.param_groups

    def state() -> list[tuple[int, int]]:
        return [(p._version, id(p.grad)) for group in groups for p in group["params"]]

    known: list[Any] = [state()]

    def evaluate() -> Any:
        if known and known.pop() == state():
            return loss
        value = closure()
        controller.zero_nonfinite_grads()
        return value

    return evaluate


def step_hooks(controller: Controller) -> tuple[Callable[..., Any], Callable[..., None]]:
    """Hooks that let a controller drive its optimizer, before and after the step."""

    def before_step(
        _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = dict(kwargs)
        this, *positional = args
        closure = kwargs.pop("closure", positional[0] if positional else None)
        loss = kwargs.pop("loss", None)
        if closure is not None:
            loss = loss_of(closure)
        with torch.no_grad():
            controller.prepare_step(loss)
        if closure is not None:  # known of the weights as they are now, rolled back perhaps
            kwargs["closure"] = evaluated_once(closure, loss, controller)
        return (this,), kwargs

    @torch.no_grad()
    def after_step(*_: Any) -> None:
        controller.finish_step()

    return before_step, after_step


@contextmanager
def no_global_hooks() -> Iterator[None]:
    """Hooks on the steps of all optimizers have been called for the wrapper, and are not for what it wraps."""
    tables: list[dict[int, Any]] = [_global_optimizer_pre_hooks, _global_optimizer_post_hooks]
    hooks = [dict(table) for table in tables]
    for table in tables:
        table.clear()
    try:
        yield
    finally:
        for table, those in zip(tables, hooks, strict=True):
            table.update(those)
