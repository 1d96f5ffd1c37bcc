"""Training on a Ray cluster: two nodes on this machine, of which one, a worker, or the driver is killed.

All of it on one cluster, which is old when it comes to the last test: a node is gone then.
"""

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing

import numpy as np
import pytest

from rlsched.agents import TrainConfig
from rlsched.cli import main
from rlsched.envs import FAMILIES
from rlsched.envs.sharding import Processes, ShardedVectorEnv

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of the pipes of the cluster's processes
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: rlsched[ray]"),
]
RUNS = 4
TASKS = [FAMILIES["mlp-dropout"], FAMILIES["mlp"]]  # a shard each; masks are drawn from the process's own generator
SIZES = [
    "--tasks",
    "small",
    "--num-envs",
    4,
    "--n-steps",
    4,
    "--batch-size",
    8,
    "--eval-episodes",
    1,
    "--eval-every",
    9999,
]


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of two cores, so that each can take the workers of both."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 # not the last of all, where other tests run as well
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    made.other = made.add_node(num_cpus=2)
    yield made
    made.shutdown()


@pytest.fixture
def told():
    """What the workers told."""
    return []


@pytest.fixture
def workers(cluster, told):
    """Two workers on the cluster, one on each node as long as there are two."""
    from rlsched.envs.cluster import Workers

    with Workers(2, address=cluster.address, patience=5, tell=told.append) as made:
        yield made


def played(env, steps, before=None):
    """What a reset and some steps with random actions return; `before` is called with the number of each step."""
    actions = np.random.default_rng(0).uniform(-1, 1, (steps, *env.action_space.shape))
    found = [env.reset(seed=2)]
    for step, action in enumerate(actions):
        if before is not None:
            before(step)
        found.append(env.step(action))
    return found


def first_cut(env):
    """What the step gives in which a loss shows, since a worker may outlive its node for a moment."""
    for _ in range(600):
        found = env.step(np.zeros(env.action_space.shape, np.float32))
        if found[3].any():
            return found
        time.sleep(0.1)
    raise AssertionError("no loss shows within a minute")


def pid(workers, number):
    """The process of a worker of this machine."""
    import ray

    return ray.get(workers.actor(number).__ray_call__.remote(lambda _: os.getpid()))


def test_experience_is_that_of_processes_and_a_lost_worker_costs_its_episodes_alone(workers, told):
    """What is learned on a cluster could not be had without one; a lost worker would end the run, or taint it."""
    with closing(ShardedVectorEnv(RUNS, TASKS, transport=Processes)) as env:
        wanted = played(env, 4)

    def evaluate(step):
        if step == 2:  # between two steps, in the same workers
            with closing(ShardedVectorEnv(RUNS, TASKS, transport=workers.transport)) as other:
                other.reset(seed=9)

    with closing(ShardedVectorEnv(RUNS, TASKS, transport=workers.transport)) as env:
        for one, other in zip(played(env, 4, evaluate), wanted, strict=True):
            np.testing.assert_equal(one, other)
    with closing(ShardedVectorEnv(RUNS, TASKS, transport=workers.transport)) as env:
        cut = played(env, 4, lambda step: step == 1 and os.kill(pid(workers, 1), signal.SIGKILL))
    for one, other in zip(cut, wanted, strict=True):
        np.testing.assert_array_equal(one[0][::2], other[0][::2])
    assert [step[3].tolist() for step in cut[1:]] == [[False] * 4, [False, True] * 2, [False] * 4, [False] * 4]
    np.testing.assert_array_equal(np.stack(cut[2][-1]["final_obs"][1::2]), cut[1][0][1::2])
    assert len(told) == 1 and re.match(r"worker 1 was lost on [\d.]+ \(.*\) and is started again on [\d.]+; ", told[0])


def command(cluster, run_dir, *more):
    """A training by two workers of the cluster."""
    return [
        *(sys.executable, "-m", "rlsched", "train", "--run-dir", str(run_dir), *map(str, SIZES)),
        *("--engine", "ray", "--address", cluster.address, "--workers", "2", *map(str, more)),
    ]


def test_killed_driver_is_resumed_by_the_other_engine(cluster, tmp_path):
    """A batch system that kills the driver would leave the cores of the cluster taken, or the run lost."""
    run_dir = tmp_path / "run"
    driver = subprocess.Popen(command(cluster, run_dir, "--timesteps", 112), stderr=subprocess.PIPE, text=True)
    checkpoint, seen = run_dir / "checkpoint.zip", set()
    while len(seen) < 2:
        assert driver.poll() is None, driver.communicate()[1]
        if checkpoint.exists():
            seen.add(checkpoint.stat().st_mtime_ns)
        time.sleep(0.02)
    driver.kill()
    driver.communicate()
    assert {"engine", "address", "processes"}.isdisjoint(json.loads((run_dir / "config.json").read_text()))
    assert not (run_dir / "policy.safetensors").exists()
    options = [*map(str, SIZES), "--timesteps", "112", "--processes", "1"]
    assert main(["train", "--run-dir", str(run_dir), *options]) == 0
    import ray

    ray.init(cluster.address, logging_level="critical")
    try:
        assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"], "its cores are free again"
    finally:
        ray.shutdown()


def test_fewer_cores_than_workers_are_told(cluster):
    """Ray itself waits for ever."""
    from rlsched.envs.cluster import Workers

    with pytest.raises(ValueError, match="processes must be at most 4, the CPUs of the Ray cluster, got 5"):
        Workers(5, address=cluster.address)
    with Workers(3, address=cluster.address), pytest.raises(ValueError, match=r"at most 1, .*\(others use 3\), got 2"):
        Workers(2, address=cluster.address, patience=0.5)


def test_lost_node_costs_the_episodes_of_its_workers_alone(cluster, workers, told):
    """A machine that goes down would end a run of days."""
    import ray

    nodes = [
        ray.get(workers.actor(i).__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())) for i in (0, 1)
    ]
    lost = [node == cluster.other.node_id for node in nodes]  # one of them, or both
    assert any(lost)
    with closing(ShardedVectorEnv(RUNS, TASKS, transport=workers.transport)) as env:
        env.reset(seed=2)
        cluster.remove_node(cluster.other, allow_graceful=False)
        assert first_cut(env)[3].tolist() == [lost[i % 2] for i in range(RUNS)]
        assert not any(env.step(np.zeros(env.action_space.shape, np.float32))[3].any() for _ in range(3))
    assert [line[: len("worker 0 was lost")] for line in told] == [f"worker {i} was lost" for i in (0, 1) if lost[i]]


def test_worker_shares_a_core_where_none_is_free(cluster, told):
    """A run that lost a machine for good would wait for it for ever."""
    from rlsched.envs.cluster import Workers

    other = cluster.add_node(num_cpus=1)
    with (
        Workers(3, address=cluster.address, patience=1, tell=told.append) as workers,
        closing(ShardedVectorEnv(RUNS, TASKS * 2, processes=3, transport=workers.transport)) as env,
    ):
        env.reset(seed=2)
        cluster.remove_node(other, allow_graceful=False)
        first_cut(env)
        assert not env.step(np.zeros(env.action_space.shape, np.float32))[3].any()
    assert "no core of the cluster is free" in told[0] and "and is started again" in told[1] and len(told) == 2


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("nowhere", "address must be 'local', 'auto' or host:port of a Ray cluster, got 'nowhere'"),
        ("ray://127.0.0.1:10001", "address must be 'local', 'auto' or host:port"),
        ("127.0.0.1:1", "address: there is no Ray cluster at '127.0.0.1:1': Connection refused"),
        ("listening", "address: what answers at '127.0.0.1:"),
    ],
)
def test_unreachable_cluster_is_told_at_once(address, said, tmp_path, capsys):
    """Ray tries for minutes, and prints two lines of its insides for each attempt."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        if address == "listening":
            address = f"127.0.0.1:{server.getsockname()[1]}"
            server.settimeout(30)

            def answer():
                connection, _ = server.accept()
                connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
                connection.close()

            threading.Thread(target=answer, daemon=True).start()
        start = time.monotonic()
        options = [*map(str, SIZES), "--timesteps", "16", "--engine", "ray", "--address", address]
        assert main(["train", "--run-dir", str(tmp_path / "run"), *options]) == 1
        assert time.monotonic() - start < 20
    assert said in capsys.readouterr().err


def test_what_does_not_go_together_is_refused():
    """An address that is not used would be believed to be."""
    with pytest.raises(ValueError, match="address is for engine='ray', and engine is 'processes', got 'auto'"):
        TrainConfig(address="auto")
    with pytest.raises(ValueError, match="engine must be one of"):
        TrainConfig(engine="dask")


def test_without_ray_the_extra_is_named(monkeypatch, tmp_path, capsys):
    """A traceback from an import does not say what to install."""
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "rlsched.envs.cluster", raising=False)
    options = [*map(str, SIZES), "--timesteps", "16", "--engine", "ray"]
    assert main(["train", "--run-dir", str(tmp_path / "run"), *options]) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1] == "rlsched train needs ray: pip install 'rlsched[ray]'"
