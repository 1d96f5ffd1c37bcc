"""What a policy sees in a user's loop is what it saw in training: an episode, replayed through the wrapper."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.nn.utils import vector_to_parameters

from rlsched import ScheduledOptimizer, SchedulePolicy
from rlsched.control import CLIP, CONTROLS, clip_multiple
from rlsched.envs import SchedulingVectorEnv, SetupDistribution, TeacherStudent
from rlsched.signals import OBSERVATIONS

DECISIONS, INTERVAL, BATCH = 24, 5, 16


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


def replay_batches(training, slot, seed):
    """The mini-batches of an episode, drawn again from its own generator."""
    rng = np.random.default_rng(seed)
    training.task.setup.draw(rng, training.task.episode(rng).loss_scale)
    start, points = slot * training._data.points, int(training.settings.points[slot])
    for steps in [1] + [INTERVAL] * DECISIONS:
        for rows in rng.integers(points, size=(steps, BATCH)):
            yield training._data.inputs[start + rows], training._data.targets[start + rows]


# Learning rates at which training is stable: at its edge, rounding errors grow until two runs have nothing in common.
STABLE = {"decisions": (DECISIONS, DECISIONS), "sgd_lr": (1e-4, 3e-3), "adaptive_lr": (1e-4, 3e-3)}
SETUPS = {
    "SGD": SetupDistribution(**STABLE, adaptive=0, other_momentum=0.5),
    "AdamW": SetupDistribution(**STABLE, adaptive=1, other_momentum=0.5),
    "SGD without momentum": SetupDistribution(**STABLE, adaptive=0, no_momentum=1),
    "no loss": SetupDistribution(**STABLE, no_loss=1),
}


@pytest.mark.parametrize("safe_start", [True, False])
@pytest.mark.parametrize("setup", SETUPS)
def test_wrapper_sees_and_decides_what_the_environment_did(setup, safe_start):
    """A signal or a control computed differently in a user's loop would make a trained policy worthless there."""
    task = TeacherStudent(hidden=(12,), batch_size=BATCH, interval=INTERVAL, points=(64, 128), setup=SETUPS[setup])
    runs, seed = 6, 5
    env = SchedulingVectorEnv(runs, [task], safe_start=safe_start, autoreset=False)
    observations, _ = env.reset(seed=seed)
    training = env._groups[0].training
    initial, settings = training.networks.params.clone(), training.settings
    policy = Recorder(safe_start)
    seen, decided = [observations], []
    for _ in range(DECISIONS):
        actions = policy.act(torch.from_numpy(seen[-1])).numpy()
        observations, _, terminated, _, infos = env.step(actions)
        seen.append(observations)
        decided.append(np.stack([infos["lr"], infos["momentum"], infos["clip"]], -1))
    assert terminated.all()
    assert (training.networks.steps == settings.total_steps).all(), "an episode diverged: nothing to compare"

    # The weights after the probe belong to the environment's reset; go back to those before it.
    for run in range(runs):
        rng = np.random.default_rng(seed + run)
        initial[run] = task.episode(rng).params
        batches = replay_batches(training, run, seed + run)
        network = copy.deepcopy(task.network())
        vector_to_parameters(initial[run], network.parameters())
        lr, momentum = float(settings.lr[run]), float(settings.momentum[run])
        decay = float(settings.weight_decay[run])
        if settings.adaptive[run] > 0:
            inner = torch.optim.AdamW(network.parameters(), lr, (momentum, 0.999), weight_decay=decay)
        else:
            inner = torch.optim.SGD(network.parameters(), lr, momentum, weight_decay=decay)
        total = int(settings.total_steps[run])
        policy = Recorder(safe_start)
        optimizer = ScheduledOptimizer(inner, total_steps=total, decisions=DECISIONS + 1, policy=policy)
        controller = optimizer.controller
        assert controller.interval == INTERVAL
        wrapper_decided = []
        reported = bool(settings.loss_reported[run])
        with nullcontext() if reported else pytest.warns(UserWarning, match="no loss"):
            for step, (x, y) in enumerate(batches):
                optimizer.zero_grad()
                loss = settings.loss_scale[run] * task.loss(network(x), y)
                loss.backward()
                optimizer.step(loss=loss if reported else None)
                if step >= 1 and (step - 1) % INTERVAL == 0:
                    group = inner.param_groups[0]
                    beta = group["betas"][0] if "betas" in group else group["momentum"]
                    clip = float(clip_multiple(controller.control_state[CLIP]))
                    wrapper_decided.append((group["lr"], beta, clip))
        torch.testing.assert_close(
            torch.stack(policy.seen), torch.from_numpy(np.stack(seen[:-1])[:, run]), rtol=1e-4, atol=1e-4
        )
        np.testing.assert_allclose(wrapper_decided, np.stack(decided)[:, run], rtol=1e-4)
