"""An evaluation is worth what its episodes were worth."""

from dataclasses import replace

import numpy as np
import pytest

from rlsched.agents import evaluate
from rlsched.agents.figures import episode_paths
from rlsched.control import CONTROLS
from rlsched.envs import SchedulingVectorEnv, SetupDistribution
from rlsched.policy import SchedulePolicy

EPISODES, SEED = 5, 70


def test_zero_policy_scores_what_zero_actions_earn(tiny):
    """The fallback's score is what every policy is measured against; an error in it is an error in every claim."""
    evaluation = evaluate(SchedulePolicy.zero(), tiny, episodes=EPISODES, seed=SEED)
    for episode in range(EPISODES):
        env = SchedulingVectorEnv(1, [tiny[episode % 2]], safe_start=False, autoreset=False)
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
    policy = SchedulePolicy.zero()
    env = SchedulingVectorEnv(EPISODES, tiny, safe_start=False)
    first = evaluate(policy, seed=SEED, env=env)
    policy.weights[0][1][:] = 1.0  # always up
    other = evaluate(policy, seed=SEED, env=env)
    for one, two in zip(first.paths["total_steps"], other.paths["total_steps"], strict=True):
        np.testing.assert_array_equal(one, two)
    assert (first.returns != other.returns).all()
    policy.weights[0][1][:] = 0.0
    np.testing.assert_array_equal(evaluate(policy, seed=SEED, env=env).returns, first.returns)


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
        figure = episode_paths(evaluation, evaluation)
        figure.canvas.draw()
        assert len(figure.axes) == 4 * min(episodes, 4)
