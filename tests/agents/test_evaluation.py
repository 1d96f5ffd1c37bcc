"""An evaluation is worth what its episodes were worth."""

import numpy as np
import pytest

from rlsched.agents import evaluate
from rlsched.agents.figures import episode_paths
from rlsched.control import CONTROLS
from rlsched.envs import SchedulingVectorEnv, SetupDistribution, TeacherStudent
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


@pytest.mark.parametrize("decisions", [1, 6])
def test_divergence_is_counted(decisions):
    """A policy that diverges in some runs must not hide it in a mean; the last window counts like any other."""
    setup = SetupDistribution(decisions=(decisions, decisions), sgd_lr=(1e38, 1e38), adaptive_lr=(1e38, 1e38))
    task = TeacherStudent(inputs=6, hidden=(8,), points=(32, 64), setup=setup)
    evaluation = evaluate(SchedulePolicy.zero(), [task], episodes=3, seed=0)
    assert evaluation.diverged.all()
    assert (evaluation.returns == -2).all()


def test_figure_is_drawn_whatever_the_episodes_were(tiny):
    """A picture that fails on a diverged run, or on few episodes, would end a night of training."""
    setup = SetupDistribution(sgd_lr=(1e38, 1e38), adaptive_lr=(1e38, 1e38))
    wild = TeacherStudent(inputs=6, hidden=(8,), points=(32, 64), setup=setup)
    for tasks, episodes in ((tiny, 6), (tiny, 1), ([wild], 2)):
        evaluation = evaluate(SchedulePolicy.zero(), tasks, episodes=episodes, seed=0)
        figure = episode_paths(evaluation, evaluation)
        figure.canvas.draw()
        assert len(figure.axes) == 4 * min(episodes, 4)
