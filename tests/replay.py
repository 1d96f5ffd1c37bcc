"""Episodes of the environment, drawn again for plain torch: what the batched inner training is compared with."""

from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from rlsched.envs.draws import minibatch_rows
from rlsched.envs.optimizers import OPTIMIZERS
from rlsched.envs.sources import Points
from rlsched.envs.tasks import InnerTask, TrainingSetup


class Episode(NamedTuple):
    """One episode of a task."""

    task: InnerTask
    setup: TrainingSetup
    network: nn.Module  # with the weights that it begins with
    points: Points
    seed: int  # of the mini-batches

    @property
    def total_steps(self):
        """Inner steps: the first on its own, then whole windows."""
        return 1 + self.setup.decisions * self.task.interval

    def optimizer(self):
        """The optimizer of the set-up, from torch.optim."""
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        setup = self.setup
        return OPTIMIZERS[setup.optimizer].make(parameters, setup.lr, setup.momentum, setup.weight_decay)

    def losses(self):
        """The loss of each inner step, without the loss scale; the caller trains on it before it asks for the next."""
        largest = max(self.task.batch_sizes)
        seed, points, batch = (torch.tensor([n]) for n in (self.seed, len(self.points.inputs), largest))
        self.network.train()
        for step in range(self.total_steps):
            rows = minibatch_rows(seed, torch.tensor([step]), 1, largest, batch, points)[0, 0]
            rows = rows[: self.setup.batch_size]
            yield self.task.loss(self.network(self.points.inputs[rows]), self.points.targets[rows])

    def validation_loss(self):
        """That of the network as it is now."""
        self.network.eval()
        with torch.no_grad():
            return self.task.loss(self.network(self.points.validation_inputs), self.points.validation_targets)


def replay(task, seed):
    """The episode that a run of `task` begins after `reset(seed=seed)`."""
    rng = np.random.default_rng(seed)
    setup = task.setup.draw(rng, task.batch_sizes)
    batches, weights = rng.integers(2**63, size=2).tolist()
    network = task.initial_network(weights)
    with torch.no_grad():
        for p in network.parameters():
            if p.requires_grad and p.dim() > 1:
                p.mul_(setup.gain)
    return Episode(task, setup, network, task.source.draw(rng), batches)
