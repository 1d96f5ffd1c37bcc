"""The batched inner training is that of torch.optim."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from rlsched import control
from rlsched.envs.training import InnerTraining

RUNS, WINDOWS = 6, 3
RATES = {"sgd_lr": (1e-2, 3e-2), "adaptive_lr": (3e-3, 1e-2), "weight_decay": (0.1, 0.2)}


@pytest.mark.parametrize(
    "setup",
    [
        {"adaptive": 0, "no_momentum": 0, "other_momentum": 0.5},
        {"adaptive": 0, "no_momentum": 1},
        {"adaptive": 1, "other_momentum": 0.5},
    ],
    ids=["SGD", "SGD without momentum", "AdamW"],
)
def test_inner_steps_are_those_of_torch_optim(make_task, setup):
    """An update that is not torch's would train policies for optimizers that nobody uses."""
    task = make_task(decisions=(WINDOWS, WINDOWS), **RATES, **setup)
    training = InnerTraining(task, RUNS)
    rngs = [np.random.default_rng(run) for run in range(RUNS)]
    training.begin(list(range(RUNS)), rngs)
    settings, start = training.settings, training.networks.params.clone()
    assert settings.weight_decay.any() and not settings.weight_decay.all()
    zero_actions = control.initial_state(settings.momentum)
    losses = [training.first_step(list(range(RUNS)), rngs, zero_actions, 1.0).loss / settings.loss_scale[:, None]]
    losses += [training.window(rngs, zero_actions).loss / settings.loss_scale[:, None] for _ in range(WINDOWS)]
    losses = torch.cat(losses, -1)

    for run in range(RUNS):
        rng = np.random.default_rng(run)
        episode = task.episode(rng)
        torch.testing.assert_close(episode.params, start[run], rtol=0, atol=0)
        drawn = task.setup.draw(rng, episode.loss_scale)
        network = deepcopy(task.network())
        vector_to_parameters(episode.params, network.parameters())
        if drawn.adaptive:
            options = {"betas": (drawn.momentum, 0.999), "weight_decay": drawn.weight_decay}
            optimizer = torch.optim.AdamW(network.parameters(), drawn.lr, **options)
        else:
            options = {"momentum": drawn.momentum, "weight_decay": drawn.weight_decay}
            optimizer = torch.optim.SGD(network.parameters(), drawn.lr, **options)
        total = 1 + WINDOWS * task.interval
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 - n / total)  # noqa: B023
        expected = []
        for steps in [1] + [task.interval] * WINDOWS:
            for rows in rng.integers(len(episode.targets), size=(steps, task.batch_size)):
                optimizer.zero_grad()
                loss = task.loss(network(episode.inputs[rows]), episode.targets[rows])
                (episode.loss_scale * loss).backward()
                optimizer.step()
                schedule.step()
                expected.append(loss.item())
        if drawn.loss_reported:
            torch.testing.assert_close(losses[run], torch.tensor(expected), rtol=1e-4, atol=1e-5)
        else:
            assert losses[run].isnan().all()
        trained = parameters_to_vector(network.parameters()).detach()
        moved = training.networks.params[run] - start[run]
        torch.testing.assert_close(moved, trained - start[run], rtol=1e-3, atol=1e-5)
        assert moved.norm() > 1e-3 * start[run].norm(), "nothing was trained"
    assert (training.networks.steps == settings.total_steps).all()


def test_validation_loss_is_without_the_loss_scale(make_task):
    """The reward of a task would depend on a factor that changes nothing about how well it is solved."""
    task = make_task()
    training = InnerTraining(task, 3)
    training.begin([0, 1, 2], [np.random.default_rng(run) for run in range(3)])
    for run in range(3):
        episode = task.episode(np.random.default_rng(run))
        network = deepcopy(task.network())
        vector_to_parameters(episode.params, network.parameters())
        loss = task.loss(network(episode.validation_inputs), episode.validation_targets).detach()
        torch.testing.assert_close(training.validation_loss([run])[0], loss, rtol=1e-5, atol=1e-6)
        assert abs(episode.loss_scale - 1) > 0.05


def test_new_episode_leaves_the_other_networks_alone(make_task):
    """A reset that reached into a neighbour would change its weights in the middle of an episode."""
    task = make_task()
    training = InnerTraining(task, 3)
    rngs = [np.random.default_rng(run) for run in range(3)]
    training.begin([0, 1, 2], rngs)
    states = control.initial_state(training.settings.momentum)
    training.first_step([0, 1, 2], rngs, states, 1.0)
    training.window(rngs, states)
    kept = [tensor[[0, 2]].clone() for tensor in (*training.networks, *training.settings)]
    data = training._data.inputs.view(3, -1)[[0, 2]].clone()
    training.begin([1], [np.random.default_rng(9)])
    training.first_step([1], [np.random.default_rng(9)], states[1:2], 1.0)
    for before, after in zip(kept, (*training.networks, *training.settings), strict=True):
        torch.testing.assert_close(after[[0, 2]], before, rtol=0, atol=0)
    assert torch.equal(training._data.inputs.view(3, -1)[[0, 2]], data)
    assert training.networks.steps.tolist() == [5, 1, 5]


def test_network_of_the_task_is_left_as_it_is(make_task):
    """A user who trains with the task's own network would find that it no longer takes gradients."""
    task = make_task()
    InnerTraining(task, 2)
    assert all(p.requires_grad for p in task.network().parameters())
