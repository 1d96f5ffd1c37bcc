"""The environment in shards is the environment as a whole, wherever the shards live."""

import importlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.error import ClosedEnvironmentError, ResetNeeded
from gymnasium.vector import AutoresetMode
from helpers import Losing
from torch import nn

from rlsched.envs import FAMILIES, SchedulingVectorEnv, sharding
from rlsched.envs.sharding import Inline, Processes, Shard, ShardedVectorEnv, Workers, join, split

RUNS = 5


@pytest.fixture
def tasks(make_task):
    """Three architectures, so that no shard has a whole number of mixtures."""
    task = make_task(decisions=(2, 3))
    return [task, *(replace(FAMILIES[name], setup=task.setup) for name in ("conv-batch-norm", "recurrent"))]


def returns(env, steps=5):
    """All that a reset and some steps with random actions return."""
    actions = np.random.default_rng(0).uniform(-1, 1, (steps, *env.action_space.shape))
    return [env.reset(seed=2), *(env.step(a) for a in actions)]


def assert_same(got, wanted, tolerance=0.0, valid=slice(None)):
    """Entries with a mask beside them are compared where it is set."""
    assert type(got) is type(wanted)
    if isinstance(wanted, tuple):
        for one, other in zip(got, wanted, strict=True):
            assert_same(one, other, tolerance)
    elif isinstance(wanted, dict):
        assert got.keys() == wanted.keys()
        for key, value in wanted.items():
            within = slice(None) if key.startswith("_") else wanted.get(f"_{key}", valid)
            assert_same(got[key], value, tolerance, within)
    else:
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        one, other = list(got[valid]), list(wanted[valid])
        if one and isinstance(one[0], str):
            assert one == other
        else:
            np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)
        if isinstance(valid, np.ndarray) and all(x is None for x in wanted[~valid]):
            assert all(x is None for x in got[~valid])


def of_shard(whole, shard):
    """What a shard would have returned: its runs, and nothing of final things where none of them ended."""
    if isinstance(whole, tuple):
        return tuple(of_shard(value, shard) for value in whole)
    if isinstance(whole, dict):
        absent = {key for key in whole if f"_{key}" in whole and not whole[f"_{key}"][shard].any()}
        return {k: of_shard(v, shard) for k, v in whole.items() if k not in absent and k[1:] not in absent}
    return whole[shard]


@pytest.mark.parametrize(
    "shards", [[[0, 1, 2, 3, 4]], [[0, 1], [2, 3, 4]], [[0, 2, 4], [1, 3]], [[4], [3], [2], [1], [0]]]
)
def test_shards_of_a_whole_join_to_the_whole(tasks, shards):
    """A run's numbers must not reach another run, nor get lost because no episode ended in the first shard."""
    shards = [np.array(shard) for shard in shards]
    ended = set()
    for whole in returns(SchedulingVectorEnv(RUNS, tasks)):
        for info in (whole[-1], whole[-1].get("final_info", {})):
            info["nested"] = {"deeper": {"run": np.arange(RUNS)}}
        parts = [of_shard(whole, shard) for shard in shards]
        ended.add(sum("final_info" in part[-1] for part in parts))
        assert_same(join(parts, shards), whole)
    assert 0 in ended and max(ended) > 0
    assert len(shards) == 1 or ended & set(range(1, len(shards)))  # some shards had ended episodes, and some had none


def test_entry_of_one_shard_is_blank_for_the_others():
    """Runs that have no such entry must not be given another's, nor a mask that says that it is theirs."""
    yes, no = np.array([True]), np.array([False, False])
    told = np.array([None], dtype=object)
    told[0] = "told"
    inner = {"loss": np.array([[7.0, 8.0]]), "_loss": yes, "deeper": {"note": told}}
    parts = [{"lr": np.array([1.0, 2.0])}, {"lr": np.array([3.0]), "inner": inner, "_inner": yes}]
    joined = join(parts, [np.array([0, 1]), np.array([2])])
    np.testing.assert_equal(
        joined,
        {
            "lr": np.array([1.0, 2.0, 3.0]),
            "inner": {
                "loss": np.array([[0.0, 0.0], [0.0, 0.0], [7.0, 8.0]]),
                "_loss": np.append(no, yes),
                "deeper": {"note": np.array([None, None, "told"], dtype=object)},
            },
            "_inner": np.append(no, yes),
        },
    )
    assert joined["_inner"].dtype == joined["inner"]["_loss"].dtype == bool


def test_what_is_split_joins_again():
    """An action or a seed must reach its own run, and only that."""
    shards = [np.array([0, 3]), np.array([4, 1, 2])]
    actions = np.arange(10.0).reshape(5, 2)
    np.testing.assert_array_equal(join(split(actions, shards), shards), actions)
    assert [part.tolist() for part in split(np.array([3, None, 5, 6, 7]), shards)] == [[3, 6], [7, None, 5]]


@pytest.mark.parametrize("transport", [Inline, Processes])
def test_shards_give_the_same_episodes_and_their_mistakes_are_told(tasks, transport):
    """Another number of processes must not mean other episodes; and a mistake must not leave answers behind.

    A worker killed for want of memory must not leave training waiting for ever.
    """
    before = set(active_children())
    single = SchedulingVectorEnv(RUNS, tasks, reward="best")
    whole = returns(single)
    env = ShardedVectorEnv(RUNS, tasks, processes=2, transport=transport, reward="best")
    try:
        for name in ("observation_space", "action_space", "single_observation_space", "single_action_space"):
            assert getattr(env, name) == getattr(single, name)
        assert env.metadata == single.metadata
        for sharded, wanted in zip(returns(env), whole, strict=True):
            assert_same(sharded, wanted, tolerance=1e-4)
        with pytest.raises(ValueError, match="shape"):
            env.step(np.zeros((RUNS + 1, *env.single_action_space.shape)))
        with pytest.raises(ValueError, match="seed must be non-negative, got -2"):
            env.reset(seed=-2)
        for wrong in ([0.5] * RUNS, [0.5] + [0] * (RUNS - 1), [0] * (RUNS - 1) + [0.5]):  # all shards refuse; one
            with pytest.raises(TypeError, match="SeedSequence"):
                env.reset(seed=wrong)
            assert_same(env.reset(seed=2), whole[0], tolerance=1e-4)
        workers = {worker.name: worker for worker in set(active_children()) - before}
        assert len(workers) == (2 if transport is Processes else 0)
        if workers:
            os.kill(workers["rlsched-worker-1"].pid, signal.SIGKILL)
            for _ in range(2):
                with pytest.raises(ChildProcessError, match=r"worker process rlsched-worker-1 died \(exit code -9\)"):
                    env.reset(seed=0)
    finally:
        env.close()
    assert set(active_children()) == before
    env.close()
    with pytest.raises(ClosedEnvironmentError, match=r"reset\(\) was called after close\(\)"):
        env.reset()


@pytest.mark.parametrize("transport", [Inline, Processes])
def test_mistake_in_a_shard_is_told_when_it_starts(tasks, transport):
    """An option that only the shards can refuse would otherwise show as a death without a cause."""
    before = set(active_children())
    with pytest.raises(TypeError, match="unheard_of"):
        ShardedVectorEnv(2, tasks[:2], processes=1, transport=transport, unheard_of=1)
    assert set(active_children()) == before


@pytest.mark.parametrize("mode", AutoresetMode)
def test_shards_go_on_after_an_episode_as_the_whole_does(make_task, mode):
    """A mode that a shard did not know, or a mask that reached other runs, would mix up episodes without an error."""
    tasks = [make_task(hidden=hidden, decisions=(2, 3)) for hidden in ((8,), (5,))]
    shards = ShardedVectorEnv(RUNS, tasks, transport=Inline, autoreset_mode=mode)
    whole = SchedulingVectorEnv(RUNS, tasks, autoreset_mode=mode.value)
    assert shards.metadata["autoreset_mode"] is whole.metadata["autoreset_mode"] is mode
    for env in (shards, whole):
        with pytest.raises(ResetNeeded, match="step"):
            env.step(np.zeros(env.action_space.shape))
    assert_same(shards.reset(seed=2), whole.reset(seed=2), tolerance=1e-4)
    for step, actions in enumerate(np.random.default_rng(0).uniform(-1, 1, (4, *whole.action_space.shape))):
        got, wanted = shards.step(actions), whole.step(actions)
        assert_same(got, wanted, tolerance=1e-4)
        over = wanted[2]
        if mode is AutoresetMode.DISABLED and over.any():
            for env in (shards, whole):
                with pytest.raises(ResetNeeded, match=re.escape(f"{np.flatnonzero(over).tolist()} have no episode")):
                    env.step(actions)
            again = {"seed": [10 * step + run for run in range(RUNS)], "options": {"reset_mask": over}}
            assert_same(shards.reset(**again), whole.reset(**again), tolerance=1e-4)


def test_shards_name_their_families(make_task):
    """A shard that counted its own tasks would call each of them the first."""
    tasks = [make_task(hidden=(4 + i,)) for i in range(4)] + [FAMILIES["mlp"]]
    for processes in (2, 3):
        env = ShardedVectorEnv(5, tasks, processes=processes, transport=Inline)
        assert env.reset(seed=0)[1]["family"].tolist() == ["task 0", "task 1", "task 2", "task 3", "mlp"]


def test_shards_render_their_runs(make_task):
    """A picture of another run than that of its place would be believed."""
    tasks = [make_task(hidden=hidden) for hidden in ((8,), (5,))]
    shards = ShardedVectorEnv(RUNS, tasks, processes=2, transport=Inline, render_mode="ansi")
    whole = SchedulingVectorEnv(RUNS, tasks, render_mode="ansi")
    for env in (shards, whole):
        env.reset(seed=1)
    assert [text.splitlines()[0] for text in shards.render()] == [text.splitlines()[0] for text in whole.render()]


@pytest.mark.parametrize("processes", [2, 4])
def test_tasks_that_have_no_runs_are_named_once(make_task, processes):
    """A worker that warned of tasks that another worker has would raise a false alarm."""
    tasks = [make_task(hidden=(4 + i,)) for i in range(3)]
    with pytest.warns(UserWarning, match=r"num_envs: for 3 tasks there are 2 runs .*, and none of task 2$") as said:
        ShardedVectorEnv(2, tasks, processes=2, transport=Inline)
    assert len(said) == 1
    ShardedVectorEnv(5, tasks, processes=processes, transport=Inline)


class TwoPartError(Exception):
    """Can be pickled but not unpickled, as errors of torch's compiler."""

    def __init__(self, what, why):
        super().__init__(f"{what}: {why}")


class Unloadable:
    """Can be pickled; but where it is unpickled, the module that it needs is not there."""

    def __reduce__(self):
        return importlib.import_module, ("no_such_module",)


def test_what_a_worker_cannot_import_is_told():
    """A user's own module that only the parent finds would show as a worker that died, and a traceback from it."""
    transport = Processes([partial(refuse, Unloadable())])
    try:
        (answer,) = transport.ask([("open", None)])
    finally:
        transport.close()
    assert isinstance(answer, ModuleNotFoundError) and answer.name == "no_such_module"


class Sleeper:
    """An environment that is never done with what it is asked for."""

    single_observation_space = single_action_space = None
    metadata = {}

    def reset(self, seed, options):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)


@pytest.mark.parametrize("state", ["idle", "busy", "stopped"])
def test_workers_end_at_once_whatever_they_do(state):
    """Ctrl-C that waits for a worker which is stopped, or in a long computation, waits for ever."""
    transport = Processes([Sleeper, Sleeper])
    try:
        assert all(answer.metadata == {} for answer in transport.ask([("open", None)] * 2))
        workers = list(transport._workers._workers)
        if state == "busy":
            transport._workers.send([(0, ("reset", (0, None)), None)] * 2)
        if state == "stopped":
            os.kill(workers[0].pid, signal.SIGSTOP)
        time.sleep(0.2)
    finally:
        start = time.perf_counter()
        transport.close()
    assert time.perf_counter() - start < 3
    assert not any(worker.is_alive() for worker in workers)
    transport.close()


def test_environments_share_workers(tasks):
    """Each would import torch anew, and hold its memory; or take the answers to another for its own.

    An environment that is closed leaves the others their workers; an interrupt leaves nobody unread answers.
    """
    before = set(active_children())
    single = SchedulingVectorEnv(RUNS, tasks)
    whole = returns(single)
    actions = np.random.default_rng(0).uniform(-1, 1, single.action_space.shape)
    with Workers(2) as workers:
        envs = [ShardedVectorEnv(RUNS, tasks, processes=n, transport=workers.transport) for n in (2, 1, 2)]
        assert len(set(active_children()) - before) == 2
        assert_same(envs[0].reset(seed=2), whole[0], 1e-4)
        assert_same(tuple(returns(envs[1])), tuple(whole), 1e-4)
        envs[1].close()
        assert_same(envs[0].step(actions), whole[1], 1e-4)
        with pytest.raises(ValueError, match="processes must be at most the 2 workers, got 3"):
            ShardedVectorEnv(RUNS, tasks, processes=3, transport=workers.transport)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(sharding, "_answer", interrupted)
            envs[0].reset(seed=0)
        with pytest.raises(ClosedEnvironmentError, match="workers were closed, or interrupted"):
            envs[2].reset(seed=0)
    assert set(active_children()) == before


def interrupted(*_):
    """Ctrl-C while an answer is awaited."""
    raise KeyboardInterrupt


def test_workers_are_deaf_to_interrupts_from_their_first_moment():
    """Ctrl-C while they import torch would bury the one line of their parent under a traceback from each of them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    transport = Processes([Sleeper])
    try:
        status = Path(f"/proc/{transport._workers._workers[0].pid}/status").read_text(encoding="utf-8")
        (blocked,) = re.findall(r"SigBlk:\s*(\w+)", status)
        assert int(blocked, 16) >> (signal.SIGINT - 1) & 1
    finally:
        transport.close()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


UNGUARDED = """
from rlsched.envs.sharding import ShardedVectorEnv
env = ShardedVectorEnv(2, "small", processes=2)
"""


@pytest.mark.parametrize("source", ["script", "pipe"])
def test_script_without_a_guard_is_told_in_a_line(source, tmp_path):
    """Each worker would start workers of its own, and Python say so in a page for each of them."""
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED)
    command = [sys.executable, script] if source == "script" else [sys.executable, "-"]
    text = UNGUARDED if source == "pipe" else None
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    remedy = "`if __name__ == '__main__':`, or use one process" if source == "script" else "save it, or use one process"
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: processes: each worker process imports this script") and last.endswith(remedy)


def refuse(_=None):
    """An environment that cannot be made."""
    raise TwoPartError("compiler", "not there")


def test_error_that_cannot_travel_is_told_in_words():
    """The error would break up the parent's reading of answers, and a later question would get an earlier answer."""
    transport = Processes([refuse])
    try:
        (answer,) = transport.ask([("open", None)])
    finally:
        transport.close()
    assert isinstance(answer, RuntimeError) and str(answer) == "TwoPartError: compiler: not there"


def test_interrupted_environment_is_closed(tasks):
    """In a notebook, the next reset would take the answers to the interrupted step for its own."""

    class Interrupted(Inline):
        def ask(self, requests):
            if requests[0][0] == "step":
                raise KeyboardInterrupt
            return super().ask(requests)

    env = ShardedVectorEnv(2, tasks[:2], transport=Interrupted)
    env.reset(seed=0)
    with pytest.raises(KeyboardInterrupt):
        env.step(np.zeros(env.action_space.shape))
    with pytest.raises(ClosedEnvironmentError, match="interrupt"):
        env.reset(seed=0)


@pytest.mark.parametrize("part", ["network", "loss"])
def test_task_that_cannot_travel_is_refused(make_task, part):
    """A message from inside pickle names neither the task nor the remedy."""
    before = set(active_children())
    options = {"network": lambda: nn.Linear(6, 3), "loss": lambda outputs, targets: outputs.square().mean()}
    mixed = [make_task(), replace(make_task(), **{part: options[part]})]
    with pytest.raises(ValueError, match=r"^tasks: .* must be importable, not lambdas; or use one process"):
        ShardedVectorEnv(4, mixed, processes=2)
    assert set(active_children()) == before
    ShardedVectorEnv(4, mixed, processes=2, transport=Inline).close()  # which sends nothing


def test_refusal_leaves_no_worker_behind():
    """A worker that had started before another shard was refused would wait for ever."""
    before = set(active_children())
    with pytest.raises(ValueError, match="cannot be sent"):
        Processes([refuse, lambda: None])
    assert set(active_children()) == before


def test_lost_shard_costs_its_episodes_and_nothing_else(make_task):
    """A machine that goes down would end a training of days, or leave a learner with episodes that never were.

    The runs of other shards feel nothing; those of the lost one are cut short where they were last seen.
    """
    tasks = [make_task(hidden=hidden, decisions=(3, 4)) for hidden in ((8,), (5,))]
    env, whole = (ShardedVectorEnv(RUNS, tasks, transport=kind) for kind in (Losing, Inline))
    others, its = [0, 2, 4], [1, 3]
    before = env.reset(seed=2)
    begun, _ = whole.reset(seed=2)
    for step, actions in enumerate(np.random.default_rng(0).uniform(-1, 1, (6, *env.action_space.shape))):
        env._transport.times = int(step == 1)
        got, wanted = env.step(actions), whole.step(actions)
        for one, other in zip(got[:4], wanted[:4], strict=True):
            np.testing.assert_array_equal(one[others], other[others])
        if step == 1:
            observations, rewards, terminated, truncated, infos = got
            assert truncated.tolist() == [False, True, False, True, False] and not terminated.any()
            assert not rewards[its].any() and rewards.dtype == wanted[1].dtype
            np.testing.assert_array_equal(np.stack(infos["final_obs"][its]), before[0][its])
            np.testing.assert_array_equal(infos["final_info"]["inner_steps"][its], before[-1]["inner_steps"][its])
            assert infos["_final_obs"].tolist() == infos["_final_info"].tolist() == truncated.tolist()
            assert not infos["return"][its].any() and (observations[its] != begun[its]).any(1).all()
        before = got


@pytest.mark.parametrize("method", ["open", "reset"])
def test_shard_that_is_lost_as_it_begins_begins_again(tasks, method):
    """A loss there costs nothing at all: not even another episode."""

    class Weak(Losing):
        times = 2

    Weak.method = method
    assert_same(
        returns(ShardedVectorEnv(RUNS, tasks, transport=Weak))[1], returns(SchedulingVectorEnv(RUNS, tasks))[1], 1e-4
    )


def test_loss_that_cannot_be_told_as_an_end_is_raised(tasks):
    """Runs that were not to be reset would have begun anew without a word."""
    env = ShardedVectorEnv(RUNS, tasks, transport=Losing, autoreset_mode="Disabled")
    env.reset(seed=0)
    env._transport.times = 1
    with pytest.raises(ChildProcessError, match="out of memory"):
        env.step(np.zeros(env.action_space.shape))
    env._transport.times, env._transport.method = 1, "reset"
    with pytest.raises(ChildProcessError, match="out of memory"):
        env.reset(options={"reset_mask": np.arange(RUNS) == 1})


def test_shard_draws_for_itself():
    """Dropout would be other where two shards share a process, and an evaluation change what is trained."""

    class Drawing:
        single_observation_space = single_action_space = None
        metadata = {}

        def step(self, _):
            return torch.rand(2).tolist()

    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    one, two = Shard(Drawing), Shard(Drawing)
    first = [one.answer("step", None), two.answer("step", None)]
    assert first[0] == first[1] != one.answer("step", None)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("processes", [0, 3])
def test_wrong_number_of_processes_is_refused(tasks, processes):
    """A worker without runs would fail far from the cause."""
    with pytest.raises(ValueError, match=r"processes must be between 1 and num_envs \(2\)"):
        ShardedVectorEnv(2, tasks, processes=processes)


def test_other_wrong_arguments_are_refused(tasks):
    """Each would fail far from the cause, or in a process whose traceback nobody sees."""
    with pytest.raises(ValueError, match="num_envs must be at least 1, got 0"):
        ShardedVectorEnv(0, tasks)
    with pytest.raises(ValueError, match="tasks"):
        ShardedVectorEnv(2, "nothing", processes=1)
    with pytest.raises(ValueError, match=r"transport must be Processes, Inline .*, got 'inline'"):
        ShardedVectorEnv(2, tasks, transport="inline")
