"""Mixtures are found by the name that is given, and every task in one is well-formed."""

import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from rlsched.envs import FAMILIES, MIXTURES, InnerTask, SchedulingVectorEnv
from rlsched.envs.mixtures import BY_HEART, SINCE_SHIPPED, digits, mixture

TASKS = {
    f"{name}-{i}": task
    for name, tasks in MIXTURES.items()
    if name in ("mlp", "small", "digits")
    for i, task in enumerate(tasks)
}


@pytest.mark.parametrize("task", [*TASKS.values(), *FAMILIES.values()], ids=[*TASKS, *FAMILIES])
def test_episode_is_well_formed(task):
    """A shape, a type or a label out of place would train every network of the mixture on garbage."""
    network = task.initial_network(0).eval()
    for seed in range(2):
        e = task.source.draw(np.random.default_rng(seed))
        assert len(e.inputs) == len(e.targets) <= task.source.max_points
        assert len(e.validation_inputs) == len(e.validation_targets) > 0
        for inputs, targets in (e[:2], e[2:]):
            assert inputs.isfinite().all() and targets.isfinite().all()
            outputs = network(inputs)
            if task.loss is nn.functional.cross_entropy:
                assert targets.dtype == torch.int64 and outputs.shape[0] == len(targets)
                classes = outputs.shape[-1]
                assert targets.min() >= 0 and targets.max() < classes
                assert len(targets) < 500 or len(targets.unique()) > classes / 2, "a teacher may give a label to none"
            elif task.loss is nn.functional.mse_loss:
                assert outputs.shape == targets.shape, "or it would be broadcast"
            loss = task.loss(outputs, targets)
            assert loss.shape == () and 0 < loss < 1e3


def test_broad_mixture_is_all_families():
    """A family that is in no mixture would never be trained on."""
    assert mixture("broad") == tuple(FAMILIES.values())


def test_short_runs_are_of_families_with_enough_points():
    """In a longer run, or with few points, a network overfits, and the policy learns to stop early everywhere."""
    short = {task.name: task for task in mixture("short")}
    assert short.keys() == FAMILIES.keys() - {*BY_HEART, *SINCE_SHIPPED}
    assert set(BY_HEART) == {name for name, task in FAMILIES.items() if task.source.max_points < 1500}
    assert all(task.interval < FAMILIES[name].interval for name, task in short.items())


def test_mixtures_go_by_their_names():
    """Every name that the documentation lists must lead to its tasks."""
    for name, tasks in MIXTURES.items():
        assert mixture(name) == tasks
    own = [digits(), FAMILIES["mlp"]]
    assert mixture(own) == mixture(iter(own)) == tuple(own)
    assert mixture(own[0]) == (own[0],)


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A user's module on the path; its name."""
    source = """
from torch import nn, zeros
from rlsched.envs import InnerTask

TASK = InnerTask(nn.Identity, (zeros(4, 2), zeros(4)), batch_size=3)
TASKS = [TASK, TASK]
ALIAS = "small"
ITSELF = "users_own_tasks:ITSELF"
EMPTY = ()
WRONG = ["mlp"]
"""
    broken = {
        "broken": "1 / 0",
        "leaving": "import sys; sys.exit(3)",
        "network": source.replace("nn.Identity,", "nn.Identity(),"),
    }
    for name, text in {"users_own": source, **broken}.items():
        (tmp_path / f"{name}_tasks.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield "users_own_tasks"
    sys.modules.pop("users_own_tasks", None)


def test_own_mixture_is_imported(own_module):
    """A user's tasks must be reachable from the command line, where there are only strings."""
    assert [task.batch_size for task in mixture(f"{own_module}:TASK")] == [3]
    assert [task.batch_size for task in mixture(f"{own_module}:TASKS")] == [3, 3]
    assert mixture(f"{own_module}:ALIAS") == MIXTURES["small"]


@pytest.mark.parametrize(
    ("tasks", "match"),
    [
        ("mnist", "^tasks must be one of .*'digits'.* 'module:NAME' .* got 'mnist'"),
        ([], "^tasks must be at least one InnerTask, got none"),
        ([digits(), "mlp"], r"^tasks must be at least one InnerTask, got \['mlp'\]"),
        ([nn.Linear(2, 2)], "^tasks must be at least one InnerTask, got .*Linear"),
        (
            "no_such_module:TASKS",
            "^tasks='no_such_module:TASKS' cannot be imported, .*No module named 'no_such_module'",
        ),
        ("users_own_tasks:NONE", "^tasks='users_own_tasks:NONE' cannot be imported, AttributeError: .*NONE"),
        ("users_own_tasks:", "^tasks='users_own_tasks:' cannot be imported"),
        ("users_own_tasks:EMPTY", "^'users_own_tasks:EMPTY': tasks must be at least one InnerTask, got none"),
        ("users_own_tasks:WRONG", r"^'users_own_tasks:WRONG': tasks must be at least one InnerTask, got \['mlp'\]"),
        ("users_own_tasks:ITSELF", "^'users_own_tasks:ITSELF': tasks must be tasks, .*, got 'users_own_tasks:ITSELF'"),
        ("json:dumps", "^'json:dumps': tasks must be an InnerTask or a sequence of them, got <function dumps"),
        ("broken_tasks:TASK", "^tasks='broken_tasks:TASK' cannot be imported, ZeroDivisionError: division by zero"),
        ("leaving_tasks:TASK", "^tasks='leaving_tasks:TASK' cannot be imported, SystemExit: 3"),
        ("network_tasks:TASK", "^tasks='network_tasks:TASK' cannot be imported, TypeError: network must be what makes"),
        (".relative:TASK", "^tasks='.relative:TASK' cannot be imported, TypeError"),
        (":TASKS", "^tasks=':TASKS' cannot be imported"),
    ],
)
def test_wrong_mixture_is_named(own_module, tasks, match):
    """A mistyped name must be said with the names that there are."""
    with pytest.raises(ValueError, match=match):
        mixture(tasks)


def test_environment_takes_one_task_as_it_is():
    """A user who has one task must not need to know about mixtures."""
    task = InnerTask(lambda: nn.Linear(2, 3), TensorDataset(torch.randn(20, 2), torch.randint(3, (20,))))
    observations, _ = SchedulingVectorEnv(2, task).reset(seed=0)
    assert len(observations) == 2
