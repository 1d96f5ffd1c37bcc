"""The environment over several processes is the environment in one."""

import multiprocessing
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
from torch import nn

from rlsched.envs import FAMILIES, SchedulingVectorEnv
from rlsched.envs.sharding import ShardedVectorEnv

RUNS = 5


@pytest.fixture
def tasks(make_task):
    """Three architectures, so that no shard has a whole number of mixtures."""
    task = make_task(decisions=(2, 3))
    return [task, *(replace(FAMILIES[name], setup=task.setup) for name in ("conv-batch-norm", "recurrent"))]


def test_processes_give_the_same_episodes_and_their_death_is_told(tasks, play):
    """Another number of processes must not mean other episodes; and a mistake must not leave answers behind.

    A worker killed for want of memory must not leave training waiting for ever.
    """
    whole = play(SchedulingVectorEnv(RUNS, tasks, reward="best"), seed=2, steps=5)
    env = ShardedVectorEnv(RUNS, tasks, processes=2, reward="best")
    workers = env._workers
    try:
        sharded = play(env, seed=2, steps=5)
        with pytest.raises(ValueError, match="shape"):
            env.step(np.zeros((RUNS + 1, 3)))
        with pytest.raises(ValueError, match="non-negative"):  # raised by every worker
            env.reset(seed=-RUNS)
        again, _ = env.reset(seed=2)
        os.kill(workers[1].pid, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"worker process .* died \(exit code -9\)"):
                env.reset(seed=0)
    finally:
        env.close()
    assert not any(worker.is_alive() for worker in workers)
    env.close()

    np.testing.assert_allclose(again, whole[0][0], rtol=1e-4, atol=1e-4)
    alone = 0  # steps in which an episode ended in one shard only
    for (o, r, d, i), (p, s, e, j) in zip(sharded, whole, strict=True):
        np.testing.assert_allclose(o, p, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(r, s, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(d, e)
        assert (i.keys(), o.dtype, r.dtype, d.dtype) == (j.keys(), p.dtype, s.dtype, e.dtype)
        for key in j.keys() - {"final_obs", "final_info"}:
            np.testing.assert_allclose(i[key], j[key], rtol=1e-4, atol=1e-4)
        if d.any():
            alone += d[:2].any() != d[2:].any()
            np.testing.assert_allclose(np.stack(i["final_obs"][d]), np.stack(j["final_obs"][d]), rtol=1e-4, atol=1e-4)
            assert i["final_info"].keys() == j["final_info"].keys()
            assert all(obs is None for obs in i["final_obs"][~d])
            for key, values in j["final_info"].items():
                np.testing.assert_allclose(i["final_info"][key][d], values[d], rtol=1e-4, atol=1e-4)
                if key.startswith("_"):
                    np.testing.assert_array_equal(i["final_info"][key], d)
    assert alone


def test_mistake_in_a_worker_is_told_when_it_starts(tasks):
    """An option that only the workers can refuse would otherwise show as a death without a cause."""
    with pytest.raises(TypeError, match="unheard_of"):
        ShardedVectorEnv(2, tasks, processes=1, unheard_of=1)


@pytest.mark.parametrize("part", ["network", "loss"])
def test_task_that_cannot_travel_is_refused(make_task, part):
    """A message from inside pickle names neither the task nor the remedy; a worker left behind would wait for ever."""
    before = multiprocessing.active_children()
    options = {"network": lambda: nn.Linear(6, 3), "loss": lambda outputs, targets: outputs.square().mean()}
    with pytest.raises(ValueError, match=r"^tasks: .* must be importable, not lambdas; or use one process"):
        ShardedVectorEnv(4, [make_task(), replace(make_task(), **{part: options[part]})], processes=2)
    assert multiprocessing.active_children() == before


@pytest.mark.parametrize("processes", [0, 3])
def test_wrong_number_of_processes_is_refused(tasks, processes):
    """A worker without runs would fail far from the cause."""
    with pytest.raises(ValueError, match=r"processes must be between 1 and num_envs \(2\)"):
        ShardedVectorEnv(2, tasks, processes=processes)
    with pytest.raises(ValueError, match="tasks"):
        ShardedVectorEnv(2, "nothing", processes=1)
