"""What a policy sees in a user's loop is what it saw in training: an episode, replayed through the wrapper."""

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from replay import replay

from rlsched import ScheduledOptimizer, SchedulePolicy
from rlsched.actors import Perceptron
from rlsched.base_schedule import BASE_SCHEDULES
from rlsched.control import CONTROL_NAMES
from rlsched.envs import InnerTask, SchedulingVectorEnv, SetupDistribution
from rlsched.envs.networks import MLP, ConvNet
from rlsched.envs.optimizers import OPTIMIZERS
from rlsched.envs.sources import Images, TeacherStudent
from rlsched.signals import OBSERVATION_NAMES

RUNS, SEED, DECISIONS, INTERVAL = 3, 4, 10, 5
EVERY = dict.fromkeys(OPTIMIZERS, 1)


class Recorder(SchedulePolicy):
    """A policy of random but fixed weights that remembers what it was shown; the same names have the same weights."""

    def __init__(self, observations=OBSERVATION_NAMES, controls=CONTROL_NAMES, **options):
        generator = torch.Generator().manual_seed(3)
        columns = {name: 0.2 * torch.randn(len(CONTROL_NAMES), generator=generator) for name in OBSERVATION_NAMES}
        bias = 0.2 * torch.randn(len(CONTROL_NAMES), generator=generator)
        rows = [CONTROL_NAMES.index(name) for name in controls]
        actor = Perceptron(len(observations), len(controls), ())
        weight = torch.stack([columns[name][rows] for name in observations], -1)
        actor.load_state_dict({"layers.0.weight": weight, "layers.0.bias": bias[rows]})
        super().__init__(actor, observations, controls, **options)
        self.seen = []

    def act(self, observation, memory=None):
        self.seen.append(observation.clone())
        return super().act(observation, memory)


def tasks():
    """Tasks by what is special about them, at learning rates at which rounding errors do not grow."""
    rates = {"decisions": (DECISIONS, DECISIONS), "sgd_lr": (1e-4, 3e-3), "adaptive_lr": (1e-4, 3e-3)}
    teacher = TeacherStudent(points=(64, 128), validation_points=8)
    images = Images(points=(64, 128), validation_points=8, size=4)

    def task(network, source, batch_size=16, **setup):
        setup = SetupDistribution(**{**rates, "optimizers": EVERY, "other_momentum": 0.5, **setup})
        return InnerTask(network, source, batch_size=batch_size, interval=INTERVAL, setup=setup)

    perceptron, convolution = partial(MLP, 24, (12,), 8), partial(ConvNet, 1, 4, (3,), 8)
    return {
        **{name: task(perceptron, teacher, optimizers={name: 1}) for name in OPTIMIZERS},
        "SGD without momentum": task(perceptron, teacher, optimizers={"SGD": 1}, no_momentum=1),
        "no loss": task(perceptron, teacher, no_loss=1),
        "validation": task(perceptron, teacher, no_validation=0, decisions=(15, 15)),
        "rare validation": replace(task(perceptron, teacher, no_validation=0), validation_interval=4),
        "no validation": task(perceptron, teacher, no_validation=1),
        "small batches": task(perceptron, teacher, batch_size=(4, 16)),
        # Far too high, so that the safe start has much to do; few decisions, since there rounding errors do grow.
        "bold": task(perceptron, teacher, decisions=(4, 4), sgd_lr=(1, 10), adaptive_lr=(0.1, 0.3)),
        "convolution": task(convolution, images),
        "batch norm": task(partial(convolution, batch_norm=True), images),
    }


@pytest.mark.parametrize("safe_start", [True, False])
@pytest.mark.parametrize("task", [pytest.param(task, id=name) for name, task in tasks().items()])
def test_wrapper_sees_and_decides_what_the_environment_did(task, safe_start):
    """A signal or a control computed differently in a user's loop would make a trained policy worthless there."""
    compare(task, safe_start=safe_start)


FEW = {"observations": ("lr", "grad_cosine", "progress", "loss_vs_first"), "controls": ("clip", "lr")}


@pytest.mark.parametrize("base_schedule", BASE_SCHEDULES)
@pytest.mark.parametrize("names", [{}, FEW], ids=["all names", "a few names"])
def test_so_it_is_under_any_base_schedule_and_with_any_names(names, base_schedule):
    """A policy of a few names would be given the columns of others, or one of a warm-up trained without it."""
    compare(tasks()["SGD"], base_schedule=base_schedule, safe_start=True, **names)


def compare(task, **options):
    """Hold episodes of the environment against the same training in a user's loop, under a policy of such options."""
    env = SchedulingVectorEnv(RUNS, [task], autoreset_mode="Disabled", **options)
    observations, _ = env.reset(seed=SEED)
    policy = Recorder(**options)
    decided = []
    for _ in range(task.setup.decisions[0]):
        actions, _ = policy.act(torch.from_numpy(observations))
        observations, _, terminated, _, infos = env.step(actions.numpy())
        decided.append(np.stack([infos[name] for name in CONTROL_NAMES], -1))
    assert terminated.all()
    assert not infos["diverged"].any(), "there is nothing to compare"

    for run in range(RUNS):
        seen, decisions = through_the_wrapper(replay(task, SEED + run), **options)
        torch.testing.assert_close(seen, torch.stack(policy.seen)[:, run], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(decisions, np.stack(decided)[:, run], rtol=1e-4)


def through_the_wrapper(episode, **options):
    """The observations, and the controls decided on, by a user's optimizer, where a user's loop trains the episode."""
    policy, inner = Recorder(**options), episode.optimizer()
    optimizer = ScheduledOptimizer(
        inner,
        total_steps=episode.total_steps,
        decisions=episode.setup.decisions + 1,
        policy=policy,
        on_divergence=None,  # the environment has no guard
        max_update_ratio=math.inf,
    )
    assert optimizer.controller.run.interval == INTERVAL
    setup, decisions = episode.setup, []
    told, between = setup.loss_reported, INTERVAL * episode.task.validation_interval

    def validate():
        if setup.validation_reported:
            optimizer.observe_validation(setup.loss_scale * episode.validation_loss())
        episode.network.train()

    validate()
    with nullcontext() if told else pytest.warns(UserWarning, match="no loss"):
        for step, loss in enumerate(episode.losses()):
            loss = setup.loss_scale * loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step(loss=loss if told else None)
            if step % INTERVAL == 1:
                group = inner.param_groups[0]
                momentum = group["betas"][0] if "betas" in group else group["momentum"]
                held = {"lr": group["lr"], "momentum": momentum, "clip": optimizer.controller.groups.decided[0]["clip"]}
                decisions.append([held[name] if name in held else group[name] for name in CONTROL_NAMES])
            if step and step % between == 0:
                validate()
    return torch.stack(policy.seen), decisions
