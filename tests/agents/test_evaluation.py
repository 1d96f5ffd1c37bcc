"""An evaluation is worth what its episodes were worth."""

from contextlib import closing
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from helpers import Losing, always, lively_policy

from rlsched.actors import Perceptron
from rlsched.agents import evaluate
from rlsched.agents.evaluation import SWEEP, environment_options, tuned
from rlsched.agents.figures import ROWS, episode_picture
from rlsched.base_schedule import BASE_SCHEDULES
from rlsched.control import CONTROL_NAMES, CONTROLS
from rlsched.domain import Domain
from rlsched.envs import SchedulingVectorEnv, SetupDistribution
from rlsched.envs.sharding import Inline, ShardedVectorEnv
from rlsched.policy import Policy, SchedulePolicy
from rlsched.signals import OBSERVATION_NAMES

EPISODES, SEED = 5, 70


def test_zero_policy_scores_what_zero_actions_earn(tiny):
    """The base schedule's score is what every policy is measured against; an error in it is an error in every claim."""
    evaluation = evaluate(SchedulePolicy.zero(), tiny, episodes=EPISODES, seed=SEED)
    for episode in range(EPISODES):
        env = SchedulingVectorEnv(1, [tiny[episode % 2]], safe_start=False, autoreset_mode="Disabled")
        _, infos = env.reset(seed=SEED + episode)
        total, terminated, path = 0.0, False, []
        while not terminated:
            _, rewards, (terminated,), _, infos = env.step(np.zeros((1, len(CONTROLS)), np.float32))
            total += float(rewards[0])
            path.append(infos["validation_loss"][0])
        assert evaluation.returns[episode] == pytest.approx(total, abs=1e-4)
        np.testing.assert_allclose(evaluation.paths["validation_loss"][episode], path, rtol=1e-4)
        assert evaluation.paths["inner_steps"][episode][-1] == infos["total_steps"][0]
    assert evaluation.mean_return == pytest.approx(evaluation.returns.mean())
    assert not evaluation.diverged.any()


def test_every_policy_meets_the_same_episodes(tiny):
    """Two policies on different episodes would be compared by luck; also when one environment serves twice."""
    still, up = always(), always(**dict.fromkeys(CONTROLS, 1.0))
    env = SchedulingVectorEnv(EPISODES, tiny, **environment_options(still))
    first = evaluate(still, seed=SEED, env=env)
    other = evaluate(up, seed=SEED, env=env)
    for one, two in zip(first.paths["total_steps"], other.paths["total_steps"], strict=True):
        np.testing.assert_array_equal(one, two)
    assert (first.returns != other.returns).all()
    np.testing.assert_array_equal(evaluate(still, seed=SEED, env=env).returns, first.returns)


def test_tuned_return_is_the_best_of_the_sweep(tiny):
    """Regret to a reference that is not the best, or on other episodes, would flatter the policy."""
    zero = SchedulePolicy.zero()
    best = tuned(zero, partial(SchedulingVectorEnv, tasks=tiny), episodes=EPISODES, seed=SEED)
    each = []
    for quantile in SWEEP:
        tasks = []
        for task in tiny:
            ranges = {name: getattr(task.setup, name) for name in ("sgd_lr", "adaptive_lr")}
            lrs = {name: (low ** (1 - quantile) * high**quantile,) * 2 for name, (low, high) in ranges.items()}
            tasks.append(replace(task, setup=replace(task.setup, **lrs)))
        each.append(evaluate(zero, tasks, episodes=EPISODES, seed=SEED).returns)
    np.testing.assert_allclose(best, np.max(each, 0), atol=1e-4)


def assert_same_episodes(one, other):
    """Two evaluations are the same, but for what the policies saw of them."""
    np.testing.assert_array_equal(one.returns, other.returns)
    assert one.paths.keys() == other.paths.keys()
    for key, paths in one.paths.items():
        for path, expected in zip(paths, other.paths[key], strict=True):
            np.testing.assert_array_equal(path, expected, err_msg=key)


@pytest.mark.parametrize("base_schedule", BASE_SCHEDULES)
def test_policy_that_is_nowhere_trusted_plays_the_base_schedule(tiny, base_schedule):
    """Scores without the influence would be those of a policy that nobody gets: users' runs have it."""
    lively = lively_policy(base_schedule=base_schedule)
    names = lively.observations, lively.controls
    still = SchedulePolicy(Perceptron(*map(len, names)), *names, base_schedule=base_schedule)
    size = len(lively.observations)
    nowhere = Domain(torch.zeros(size), torch.eye(size), torch.tensor(1e-9))
    untrusted = lively_policy(base_schedule=base_schedule, domain=nowhere)
    assert lively.safe_start and still.safe_start and untrusted.safe_start  # all of them begin alike
    plays = {"tasks": tiny, "episodes": EPISODES, "seed": SEED}
    expected = evaluate(still, **plays)
    assert_same_episodes(evaluate(untrusted, **plays), expected)
    assert (evaluate(lively, **plays).returns != expected.returns).all()


class Counting:
    """Raises the learning rate at the first decisions of a run, which it counts."""

    observations, controls, safe_start = ("progress",), ("lr",), False
    base_schedule = BASE_SCHEDULES["linear"]
    digest = "counting"
    raised = 2  # decisions

    def begin(self, batch=()):
        return torch.zeros(batch)

    def act(self, observation, memory=None):
        return (memory < self.raised).float().unsqueeze(-1), memory + 1


def test_memory_is_passed_on_and_begins_anew(tiny):
    """A policy that remembers would be judged by its first decision alone, or by what it remembers of other runs."""
    policy = Counting()
    assert isinstance(policy, Policy)
    env = SchedulingVectorEnv(EPISODES, tiny, **environment_options(policy))
    for _ in range(2):
        evaluation = evaluate(policy, seed=SEED, env=env)
        for run in range(EPISODES):
            alone = SchedulingVectorEnv(
                1, [tiny[run % len(tiny)]], **environment_options(policy), autoreset_mode="Disabled"
            )
            alone.reset(seed=SEED + run)
            actions = [1.0] * policy.raised + [0.0] * (len(evaluation.paths["lr"][run]) - policy.raised)
            lr = [alone.step(np.full((1, 1), action, np.float32))[-1]["lr"][0] for action in actions]
            np.testing.assert_allclose(evaluation.paths["lr"][run], lr, rtol=1e-6)
            assert len(lr) > policy.raised + 1 and lr[policy.raised - 1] > lr[0]


@pytest.mark.parametrize("name, value", [
    ("observations", ("progress",)), ("observations", OBSERVATION_NAMES[::-1]),
    ("controls", ("lr",)), ("controls", CONTROL_NAMES[::-1]), ("base_schedule", "constant"),
])  # fmt: skip
@pytest.mark.parametrize("make", [SchedulingVectorEnv, partial(ShardedVectorEnv, processes=1, transport=Inline)])
def test_environment_of_another_policy_is_refused(tiny, name, value, make):
    """Columns of another number, or of other names, would be taken for those that the policy was trained on."""
    policy = lively_policy()
    env = make(2, tiny, **{**environment_options(policy), name: value})
    message = rf"^env has {name} .*, the policy .*: make it with environment_options\(policy\)"
    with closing(env), pytest.raises(ValueError, match=message):
        evaluate(policy, env=env)


def test_evaluation_does_not_feel_that_a_worker_was_lost(tiny):
    """The score of a policy would be that of other episodes, which began where the lost ones ended."""

    class Lossy(Losing):
        times, after = 1, 2

    policy = lively_policy()
    wanted, got = (
        evaluate(policy, seed=SEED, env=ShardedVectorEnv(4, tiny, transport=kind, **environment_options(policy)))
        for kind in (Inline, Lossy)
    )
    np.testing.assert_array_equal(got.returns, wanted.returns)
    np.testing.assert_array_equal(got.observations, wanted.observations)


def wild(task, decisions=(6, 6)):
    """The task at learning rates at which every run diverges."""
    return replace(task, setup=SetupDistribution(decisions=decisions, sgd_lr=(1e38, 1e38), adaptive_lr=(1e38, 1e38)))


@pytest.mark.parametrize("validation_interval", [1, 4])
@pytest.mark.parametrize("decisions", [1, 6])
def test_divergence_is_counted(tiny, decisions, validation_interval):
    """A policy that diverges in some runs must not hide it in a mean, be it at the end or between validations."""
    task = replace(wild(tiny[0], (decisions, decisions)), validation_interval=validation_interval)
    evaluation = evaluate(SchedulePolicy.zero(), [task], episodes=3, seed=0)
    assert evaluation.diverged.all()
    assert (evaluation.returns == -2).all()


def test_early_stopping_is_no_divergence(tiny):
    """A run that its task's patience has ended went as planned; counted as diverged it would condemn the policy."""
    task = replace(
        tiny[0], patience=1, setup=SetupDistribution(decisions=(20, 20), sgd_lr=(0.5, 3), adaptive_lr=(0.1, 1))
    )
    evaluation = evaluate(SchedulePolicy.zero(), [task], episodes=8, seed=0)
    last = [path[-1] for path in evaluation.paths["inner_steps"]]
    assert (np.array(last) < 1 + 20 * task.interval).any()
    assert not evaluation.diverged.any()
    losses = [path[-1] for path in evaluation.paths["validation_loss"]]
    env = SchedulingVectorEnv(8, [task], safe_start=False)
    first = env.reset(seed=0)[1]["validation_loss"]
    np.testing.assert_allclose(evaluation.returns, np.log(first / losses).clip(min=-2), atol=1e-4)


def test_figure_is_drawn_whatever_the_episodes_were(tiny):
    """A picture that fails on a diverged run, or on few episodes, would end a night of training."""
    for tasks, episodes in ((tiny, 6), (tiny, 1), ([wild(tiny[0])], 2)):
        evaluation = evaluate(SchedulePolicy.zero(), tasks, episodes=episodes, seed=0)
        figure = episode_picture(evaluation, evaluation, 0, "mlp, SGD")
        figure.canvas.draw()
        assert len(figure.axes) == len(ROWS)
