"""What a policy sees in a user's loop is what it saw in training: an episode, replayed through the wrapper."""

import math
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from replay import replay

from rlsched import ScheduledOptimizer, SchedulePolicy
from rlsched.control import CLIP, CONTROLS, clip_multiple
from rlsched.envs import InnerTask, SchedulingVectorEnv, SetupDistribution
from rlsched.envs.networks import MLP, ConvNet
from rlsched.envs.sources import Images, TeacherStudent
from rlsched.envs.tasks import OPTIMIZERS
from rlsched.signals import OBSERVATIONS

RUNS, SEED, DECISIONS, INTERVAL = 3, 4, 10, 5
EVERY = dict.fromkeys(OPTIMIZERS, 1)


class Recorder(SchedulePolicy):
    """A policy of random but fixed weights that remembers what it was shown."""

    def __init__(self, safe_start=True):
        generator = torch.Generator().manual_seed(3)
        weight = 0.2 * torch.randn(len(CONTROLS), len(OBSERVATIONS), generator=generator)
        super().__init__([(weight, 0.2 * torch.randn(len(CONTROLS), generator=generator))], safe_start=safe_start)
        self.seen = []

    def act(self, observation):
        self.seen.append(observation.clone())
        return super().act(observation)


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
    env = SchedulingVectorEnv(RUNS, [task], safe_start=safe_start, autoreset=False)
    observations, _ = env.reset(seed=SEED)
    policy = Recorder(safe_start)
    decided = []
    for _ in range(task.setup.decisions[0]):
        actions = policy.act(torch.from_numpy(observations)).numpy()
        observations, _, terminated, _, infos = env.step(actions)
        decided.append(np.stack([infos["lr"], infos["momentum"], infos["clip"]], -1))
    assert terminated.all()
    assert not infos["diverged"].any(), "there is nothing to compare"

    for run in range(RUNS):
        seen, decisions = through_the_wrapper(replay(task, SEED + run), safe_start)
        torch.testing.assert_close(seen, torch.stack(policy.seen)[:, run], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(decisions, np.stack(decided)[:, run], rtol=1e-4)


def through_the_wrapper(episode, safe_start):
    """The observations, and the (lr, momentum, clip) decided on, where a user's loop trains the episode."""
    policy, inner = Recorder(safe_start), episode.optimizer()
    optimizer = ScheduledOptimizer(
        inner,
        total_steps=episode.total_steps,
        decisions=episode.setup.decisions + 1,
        policy=policy,
        on_divergence=None,  # the environment has no guard
        max_update_ratio=math.inf,
    )
    assert optimizer.controller.interval == INTERVAL
    told, decisions = episode.setup.loss_reported, []
    with nullcontext() if told else pytest.warns(UserWarning, match="no loss"):
        for step, loss in enumerate(episode.losses()):
            loss = episode.setup.loss_scale * loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step(loss=loss if told else None)
            if step % INTERVAL == 1:
                group = inner.param_groups[0]
                momentum = group["betas"][0] if "betas" in group else group["momentum"]
                decisions.append(
                    (group["lr"], momentum, float(clip_multiple(optimizer.controller.control_state[CLIP])))
                )
    return torch.stack(policy.seen), decisions
