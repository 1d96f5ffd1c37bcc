"""Named mixtures of inner tasks."""

from __future__ import annotations

from collections.abc import Sequence

from rlsched.envs.tasks import Digits, InnerTask, Prototypes, TeacherStudent

MIXTURES: dict[str, tuple[InnerTask, ...]] = {
    "mlp": (
        TeacherStudent(inputs=24, hidden=(32, 32), classes=8, batch_size=32, interval=10),
        Prototypes(inputs=32, hidden=(32, 32), classes=10, batch_size=16, interval=10),
        TeacherStudent(inputs=16, hidden=(24, 24, 24), classes=5, batch_size=32, interval=10, activation="gelu"),
        Prototypes(inputs=64, hidden=(48, 48), classes=10, batch_size=32, interval=4),
        Prototypes(inputs=24, hidden=(32, 32), classes=8, batch_size=32, interval=5, activation="tanh"),
        Prototypes(inputs=40, hidden=(48, 24), classes=10, batch_size=24, interval=16),
    ),
    "small": (Prototypes(inputs=16, hidden=(32,), classes=6, batch_size=32, interval=8),),
    "digits": (Digits(),),
}


def mixture(tasks: str | Sequence[InnerTask]) -> tuple[InnerTask, ...]:
    """The inner tasks of a mixture that is given by its name or as inner tasks.

    Raises:
        ValueError: there is no mixture of that name, or it has no task.
    """
    if isinstance(tasks, str):
        if tasks not in MIXTURES:
            raise ValueError(f"tasks must be one of {sorted(MIXTURES)} or a sequence of inner tasks, got {tasks!r}")
        return MIXTURES[tasks]
    if not tasks:
        raise ValueError("tasks must name at least one inner task, got none")
    return tuple(tasks)
