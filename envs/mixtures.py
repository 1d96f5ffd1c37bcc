"""Named mixtures of inner tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

from torch import nn
from torch.nn.functional import mse_loss

from rlsched.envs.networks import MLP, ConvNet, NoisyQuadratic, Recurrent, Transformer, TwoHeads
from rlsched.envs.sequences import Copying, Markov
from rlsched.envs.sources import (
    Images,
    Noise,
    Prototypes,
    Reconstruction,
    TeacherMultitask,
    TeacherRegression,
    TeacherStudent,
)
from rlsched.envs.stored import SourceCode, bundled
from rlsched.envs.tasks import InnerTask, SetupDistribution, multitask_loss, next_token_loss, quadratic_loss


def classifier(source: Prototypes | TeacherStudent, hidden: tuple[int, ...], **options: Any) -> InnerTask:
    """A perceptron with `hidden` units on a source of labelled vectors. Options are those of `MLP` and `InnerTask`."""
    shape = {key: options.pop(key) for key in ("activation", "layer_norm", "dropout", "rescaled") if key in options}
    return InnerTask(partial(MLP, source.inputs, hidden, source.classes, **shape), source, **options)


def digits(hidden: tuple[int, ...] = (32, 32), *, points: tuple[int, int] | None = None, **options: Any) -> InnerTask:
    """A perceptron on scikit-learn's 1,797 handwritten digits, a fifth of which, drawn anew, validates."""
    return InnerTask(partial(MLP, 64, hidden, 10), bundled("digits", points=points), **options)


def language_model(
    network: Callable[..., nn.Module], source: Markov | Copying | SourceCode, **options: Any
) -> InnerTask:
    """A network of 16 units that predicts the next token of sequences from a source."""
    shape: dict[str, Any] = {"length": source.length} if network is Transformer else {}
    return InnerTask(partial(network, source.tokens, width=16, **shape), source, next_token_loss, **options)


_every = SetupDistribution(
    optimizers={"SGD": 4, "Nesterov": 1, "Adam": 1, "AdamW": 3, "RMSprop": 1},
    no_momentum=0.25,
    clipping=0.2,
    other_length=0.1,
    no_validation=0.3,
)
# Language models are often trained without momentum, at high learning rates that a clip keeps in check.
_language = replace(_every, no_momentum=0.4, clipping=0.4)
_plain = replace(_every, optimizers={"SGD": 1}, no_momentum=1.0, clipping=0.7)

_families: dict[str, InnerTask] = {
    "quadratic": InnerTask(
        partial(NoisyQuadratic, 32), Noise(), quadratic_loss, (4, 32), setup=_every, reward_scale=1.2
    ),
    "mlp": classifier(TeacherStudent(inputs=24), (32, 32), batch_size=(4, 32), setup=_every, reward_scale=0.7),
    "mlp-deep": classifier(TeacherStudent(inputs=16, classes=5), (24, 24, 24), activation="gelu", setup=_every),
    "mlp-wide": classifier(
        Prototypes(inputs=64, classes=10), (48, 48), interval=4, validation_interval=8, setup=_every
    ),
    "mlp-tanh": classifier(
        Prototypes(inputs=24), (32, 32), activation="tanh", interval=5, validation_interval=5, setup=_every
    ),
    "mlp-layer-norm": classifier(
        Prototypes(inputs=40, classes=10), (48, 24), layer_norm=True, batch_size=24, interval=16, setup=_every
    ),
    "mlp-dropout": classifier(Prototypes(inputs=32, classes=10), (48, 48), dropout=0.4, setup=_every),
    "mlp-rescaled": classifier(
        TeacherStudent(inputs=20, classes=6),
        (32, 32),
        rescaled=True,
        batch_size=(4, 32),
        setup=_every,
        reward_scale=0.8,
    ),
    "mlp-long": classifier(
        Prototypes(inputs=24), (24, 24), rescaled=True, batch_size=8, interval=40, setup=_every, reward_scale=1.2
    ),
    "mlp-by-heart": classifier(
        TeacherStudent(points=(64, 512), inputs=24), (64, 64), batch_size=(4, 16), interval=12, setup=_every
    ),
    "mlp-few-points": classifier(
        Prototypes((64, 512), inputs=16, classes=3, separation=(1.5, 5.0)),
        (96,),
        batch_size=(8, 16),
        interval=6,
        setup=_every,
        reward_scale=1.5,
    ),
    "digits": digits((48, 32), points=(128, 1437), batch_size=(8, 32), interval=12, setup=_every, reward_scale=2),
    "regression": InnerTask(
        partial(MLP, 24, (32, 32), 1), TeacherRegression(), mse_loss, batch_size=(8, 32), setup=_every
    ),
    "regression-tanh": InnerTask(
        partial(MLP, 12, (24, 24), 3, activation="tanh", rescaled=True),
        TeacherRegression(inputs=12, outputs=3),
        mse_loss,
        interval=6,
        setup=_every,
        reward_scale=1.3,
    ),
    "regression-by-heart": InnerTask(
        partial(MLP, 10, (48, 48), 1),
        bundled("diabetes", points=(32, 354)),
        mse_loss,
        batch_size=(8, 16),
        setup=_every,
    ),
    "two-heads": InnerTask(
        partial(TwoHeads, 24, (32, 32), 6),
        TeacherMultitask(classes=6),
        multitask_loss,
        interval=8,
        setup=_every,
        reward_scale=0.8,
    ),
    "autoencoder": InnerTask(
        partial(MLP, 32, (24, 8, 24), 32),
        Reconstruction(inputs=32),
        mse_loss,
        batch_size=16,
        setup=_every,
        reward_scale=2,
    ),
    "autoencoder-tanh": InnerTask(
        partial(MLP, 48, (32, 6, 32), 48, activation="tanh"),
        Reconstruction(inputs=48, separation=(4.0, 20.0)),
        mse_loss,
        batch_size=16,
        interval=16,
        setup=_every,
        reward_scale=2,
    ),
    "conv": InnerTask(
        partial(ConvNet, 1, 8, (8, 16), 8),
        Images(),
        batch_size=16,
        interval=6,
        validation_interval=3,
        setup=_every,
        reward_scale=2,
    ),
    "conv-batch-norm": InnerTask(
        partial(ConvNet, 3, 8, (8, 16), 8, batch_norm=True),
        Images(channels=3),
        batch_size=16,
        interval=6,
        setup=_every,
        reward_scale=2.5,
    ),
    "recurrent": language_model(
        Recurrent, Markov(tokens=8, length=10), batch_size=8, interval=6, setup=_language, reward_scale=0.3
    ),
    "recurrent-many-tokens": language_model(
        Recurrent,
        Markov(tokens=160, length=10, concentration=(0.01, 0.1)),
        batch_size=8,
        interval=6,
        setup=_language,
        reward_scale=0.4,
    ),
    "recurrent-source-code": language_model(
        Recurrent,
        SourceCode(length=12, symbols=48, validation_points=96),
        batch_size=8,
        interval=6,
        setup=_language,
        reward_scale=0.5,
    ),
    "recurrent-plain": language_model(
        partial(Recurrent, cell="rnn"),
        SourceCode(length=16, symbols=64, validation_points=96),
        batch_size=8,
        interval=16,
        setup=_plain,
        reward_scale=0.3,
    ),
    "attention-plain": language_model(
        Transformer,
        SourceCode(length=16, symbols=64, validation_points=96),
        batch_size=8,
        interval=16,
        setup=_plain,
        reward_scale=0.3,
    ),
    "attention": language_model(
        Transformer, Markov(length=12), batch_size=8, interval=8, setup=_language, reward_scale=0.2
    ),
    "attention-copying": language_model(
        Transformer, Copying(length=12), batch_size=8, interval=10, setup=_language, reward_scale=0.8
    ),
    "attention-source-code": language_model(
        Transformer,
        SourceCode(length=12, symbols=48, validation_points=96),
        batch_size=8,
        interval=8,
        setup=_language,
        reward_scale=0.4,
    ),
}

FAMILIES = {name: task.named(name) for name, task in _families.items()}

BY_HEART = ("mlp-by-heart", "mlp-few-points", "digits", "regression-by-heart")  # with the points that these have
SINCE_SHIPPED = ("autoencoder-tanh", "recurrent-plain", "attention-plain")  # no part of what that policy was trained on

MIXTURES: dict[str, tuple[InnerTask, ...]] = {
    "mlp": (
        classifier(TeacherStudent(inputs=24), (32, 32)).named("teacher"),
        classifier(Prototypes(inputs=32, classes=10), (32, 32), batch_size=16).named("prototypes"),
        classifier(TeacherStudent(inputs=16, classes=5), (24, 24, 24), activation="gelu").named("teacher-deep"),
        classifier(Prototypes(inputs=64, classes=10), (48, 48), interval=4).named("prototypes-wide"),
        classifier(Prototypes(inputs=24), (32, 32), activation="tanh", interval=5).named("prototypes-tanh"),
        classifier(Prototypes(inputs=40, classes=10), (48, 24), batch_size=24, interval=16).named("prototypes-long"),
    ),
    "small": (classifier(Prototypes(inputs=16, classes=6), (32,), interval=8).named("small"),),
    "digits": (digits().named("digits"),),
    "broad": tuple(FAMILIES.values()),
    # Runs that end long before the network has learnt all that it can, as most of users' do; none that overfits.
    "short": tuple(
        replace(task, interval=max(2, round(0.4 * task.interval)))
        for name, task in FAMILIES.items()
        if name not in (*BY_HEART, *SINCE_SHIPPED)
    ),
}


def numbered(tasks: Iterable[InnerTask]) -> tuple[InnerTask, ...]:
    """The tasks, with their number for a name where they have none."""
    return tuple(task if task.name else task.named(f"task {i}") for i, task in enumerate(tasks))


def names(tasks: Iterable[InnerTask]) -> list[str]:
    """What the tasks are called."""
    return [str(task.name) for task in numbered(tasks)]


def mixture(tasks: str | InnerTask | Sequence[InnerTask]) -> tuple[InnerTask, ...]:
    """The inner tasks of a mixture that is given by its name, by "module:NAME", or as one or several inner tasks.

    Each of them has a name.

    Raises:
        ValueError: there is no mixture of that name, or it has no task.
    """
    if isinstance(tasks, str):
        if ":" in tasks:
            return _imported(tasks)
        if tasks not in MIXTURES:
            raise ValueError(
                f"tasks must be one of {sorted(MIXTURES)}, 'module:NAME' or a sequence of inner tasks, got {tasks!r}"
            )
        return numbered(MIXTURES[tasks])
    if isinstance(tasks, InnerTask):
        return numbered([tasks])
    if not isinstance(tasks, Iterable):
        raise ValueError(f"tasks must be an InnerTask or a sequence of them, got {tasks!r}")
    found = list(tasks)
    wrong = [task for task in found if not isinstance(task, InnerTask)]
    if wrong or not found:
        raise ValueError(f"tasks must be at least one InnerTask, got {wrong or 'none'}")
    return numbered(found)


def _imported(name: str) -> tuple[InnerTask, ...]:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (Exception, SystemExit) as error:  # whatever the user's module raises
        raise ValueError(f"tasks={name!r} cannot be imported, {type(error).__name__}: {error}") from error
    try:
        if isinstance(found, str) and ":" in found:
            raise ValueError(f"tasks must be tasks, or the name of a mixture, got {found!r}")  # which may lead here
        return mixture(found)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from None
