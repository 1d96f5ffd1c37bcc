"""Two processes that train one network with DistributedDataParallel."""

import math

import torch
import torch.distributed as dist
from helpers import lively_policy, loss_at, network
from torch.nn.parallel import DistributedDataParallel

from rlsched import ScheduledOptimizer
from rlsched.moments import Moments

STEPS = 30


def train_rank(rank, folder):
    """One of two ranks: its own data, and once a loss that is infinite here only."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = DistributedDataParallel(network())
    inner = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    optimizer = ScheduledOptimizer(inner, total_steps=STEPS, policy=lively_policy())
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_at(model, 100 * rank + step)
        loss.backward()
        optimizer.step(loss=math.inf if (rank, step) == (1, 20) else loss)
    seen = optimizer.controller.window[Moments._fields.index("loss"), 0]
    torch.save([model.module.state_dict(), optimizer.controller.control_state, loss.detach(), seen], f"{folder}/{rank}")
    dist.destroy_process_group()


def test_ranks_decide_alike(tmp_path):
    """Each rank sees another loss; with learning rates of their own, their copies of the network would part."""
    torch.multiprocessing.spawn(train_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2)]
    weights, states, losses, seen = zip(*ranks, strict=True)
    assert torch.equal(*states)
    assert torch.equal(*seen)
    torch.testing.assert_close(seen[0], sum(losses) / 2)
    for one, other in zip(*(w.values() for w in weights), strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()
