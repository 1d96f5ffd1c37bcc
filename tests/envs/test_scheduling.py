"""The environments: one implementation for one run and for many, replayable, rewarded for the final loss."""

import gymnasium
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import DictInfoToList
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import rlsched.envs
from rlsched import control
from rlsched.envs import SchedulingEnv, SchedulingVectorEnv
from rlsched.signals import OBSERVATION_NAMES

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def zeros(runs):
    """The actions that stand still."""
    return np.zeros((runs, len(control.CONTROLS)), np.float32)


def assert_same(one, other, **tolerance):
    """Two histories hold the same observations, rewards, ends and infos."""
    for (o, r, d, i), (p, s, e, j) in zip(one, other, strict=True):
        np.testing.assert_allclose(o, p, **tolerance)
        np.testing.assert_allclose(r, s, **tolerance)
        np.testing.assert_array_equal(d, e)
        for key in j:
            if not key.startswith(("_", "final")):
                np.testing.assert_allclose(i[key], j[key], **tolerance, err_msg=key)


def test_made_by_name(make_task):
    """The registered names are what the documentation, and users' scripts, rely on."""
    tasks = [make_task(), make_task(hidden=())]
    env = gymnasium.make("rlsched/Scheduling-v0", tasks=tasks)
    assert isinstance(env.unwrapped, SchedulingEnv)
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    vector = gymnasium.make_vec("rlsched/Scheduling-v0", num_envs=5, tasks=tasks)
    assert isinstance(vector.unwrapped, SchedulingVectorEnv)
    observations, _ = vector.reset(seed=0)
    assert vector.observation_space.contains(observations)
    np.testing.assert_allclose(observations[0], observation, **CLOSE)
    assert gymnasium.make("rlsched/Scheduling-v0").spec.id == rlsched.envs.ID


def test_gymnasium_checks_the_environment(make_task):
    """An environment that breaks Gymnasium's rules breaks the wrappers and algorithms built on them."""
    gymnasium_check_env(SchedulingEnv([make_task()]), skip_render_check=True)


def test_stable_baselines_checks_the_environment(make_task):
    """PPO trusts the declared spaces; a wrong one is silently clipped or scaled."""
    sb3_check_env(SchedulingEnv([make_task()]))


def test_observations_stay_within_their_space(make_task, play):
    """An entry beyond its bounds would be one the policy never saw in training."""
    env = SchedulingVectorEnv(6, [make_task(sgd_lr=(1e-5, 1e5), adaptive_lr=(1e-5, 1e5), no_loss=0.3)])
    for observations, *_ in play(env, seed=0, steps=20):
        assert observations.dtype == np.float32
        assert env.observation_space.contains(observations)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_each_run_equals_the_single_environment(make_task, play, optimizer):
    """If runs in a batch could feel each other, the policy would learn from an environment that does not exist."""
    tasks = [make_task(adaptive=float(optimizer == "AdamW"), hidden=hidden) for hidden in ((8,), (5, 4))]
    runs, seed, steps = 5, 40, 4
    together = play(SchedulingVectorEnv(runs, tasks), seed=seed, steps=steps)
    for run in range(runs):
        alone = play(SchedulingVectorEnv(1, [tasks[run % 2]]), seed=seed + run, steps=steps, runs=[run])
        own = [(o[[run]], r[[run]], d[[run]], {k: i[k][[run]] for k in alone[0][3]}) for o, r, d, i in together]
        # The last step may have begun another episode, from the same generator: compared as well.
        assert_same(own, [(*rest, {k: i[k] for k in alone[0][3]}) for *rest, i in alone], **CLOSE)


def test_single_environment_is_a_vector_environment_of_one(make_task, play):
    """Two implementations would drift apart."""
    tasks = [make_task(decisions=(4, 4), no_loss=0)]
    vector = play(SchedulingVectorEnv(1, tasks, autoreset=False), seed=3, steps=4)
    env = SchedulingEnv(tasks)
    drawn = np.random.default_rng(0).uniform(-1, 1, (4, 3)).astype(np.float32)
    for step, (observations, rewards, ended, infos) in enumerate(vector):
        if step == 0:
            observation, info = env.reset(seed=3)
        else:
            observation, reward, terminated, truncated, info = env.step(drawn[step - 1])
            assert (reward, terminated, truncated) == (rewards[0], ended[0], False)
            assert type(reward) is float and type(terminated) is bool
        np.testing.assert_array_equal(observation, observations[0])
        assert info == {key: values[0] for key, values in infos.items()}
    assert terminated


def test_seed_determines_everything(make_task, play):
    """A trajectory that cannot be replayed cannot be debugged, resumed or compared; autoreset is part of it."""
    tasks = [make_task(), make_task(hidden=())]
    one, other = (play(SchedulingVectorEnv(4, tasks), seed=5, steps=16) for _ in range(2))
    assert sum(d.sum() for _, _, d, _ in one) >= 8, "no autoreset was seen"
    assert_same(one, other, rtol=0, atol=0)
    env = SchedulingVectorEnv(4, tasks)
    play(env, seed=99, steps=3)
    assert_same(one, play(env, seed=5, steps=16), rtol=0, atol=0)
    differing, _ = env.reset(seed=6)
    assert not np.isclose(one[0][0], differing).all(-1).any()


def test_reset_without_a_seed_goes_on(make_task):
    """A reset that began the same episode again would train on one episode for ever."""
    env = SchedulingVectorEnv(2, [make_task()])
    first, _ = env.reset(seed=1)
    second, _ = env.reset()
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(env.reset(seed=[1, 2])[0], first)
    half = env.reset(seed=[1, None])[0]
    np.testing.assert_array_equal(half[0], first[0])
    assert not np.allclose(half[1], first[1])
    with pytest.raises(ValueError, match="seed must be an int or 2 seeds, got 3"):
        env.reset(seed=[1, 2, 3])


def test_rewards_sum_to_the_drop_of_the_log_loss(make_task, play):
    """Rewards that do not add up to the final loss make the policy solve another problem."""
    runs, steps = 4, 24
    env = SchedulingVectorEnv(runs, [make_task()])
    history = play(env, seed=0, steps=steps)
    first, total, episodes = history[0][3]["validation_loss"].astype(float), np.zeros(runs), 0
    for _, rewards, ended, infos in history[1:]:
        total += rewards
        for run in np.flatnonzero(ended):
            last = infos["final_info"]["validation_loss"][run]
            assert total[run] == pytest.approx(np.log(first[run] / last), abs=1e-5)
            first[run], total[run] = infos["validation_loss"][run], 0
            episodes += 1
    assert episodes >= 8


def test_episode_terminates_at_its_horizon(make_task):
    """A truncation would make PPO bootstrap past the end of training, where nothing is to be gained."""
    task = make_task(decisions=(3, 9))
    env = SchedulingVectorEnv(6, [task])
    _, infos = env.reset(seed=0)
    horizons = infos["total_steps"]
    assert (infos["inner_steps"] == 1).all() and len(set(horizons)) > 1
    for decision in range(1, 4):
        _, _, terminated, truncated, infos = env.step(zeros(6))
        np.testing.assert_array_equal(terminated, horizons == 1 + decision * task.interval)
        assert not truncated.any()
        np.testing.assert_array_equal(infos["inner_steps"], np.where(terminated, 1, 1 + decision * task.interval))


def test_autoreset_gives_the_end_and_the_new_start(make_task, play):
    """PPO takes the value of the last observation from final_obs; mixing it up with the new one corrupts advantages."""
    tasks, runs, steps = [make_task(decisions=(3, 3)), make_task(decisions=(9, 9), hidden=())], 6, 3
    env = SchedulingVectorEnv(runs, tasks)
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    plain = SchedulingVectorEnv(runs, tasks, autoreset=False)
    assert plain.metadata["autoreset_mode"] == AutoresetMode.DISABLED
    observations, _, ended, infos = play(env, seed=0, steps=steps)[-1]
    expected, _, _, expected_infos = play(plain, seed=0, steps=steps)[-1]
    assert ended.any() and not ended.all()
    for mask in ("_final_obs", "_final_info"):
        np.testing.assert_array_equal(infos[mask], ended)
    progress = OBSERVATION_NAMES.index("progress")
    for run in range(runs):
        if ended[run]:
            np.testing.assert_array_equal(infos["final_obs"][run], expected[run])
            assert infos["final_obs"][run][progress] == 1 and observations[run][progress] < 0.1
        else:
            assert infos["final_obs"][run] is None
            np.testing.assert_array_equal(observations[run], expected[run])
    for key, values in expected_infos.items():
        np.testing.assert_array_equal(infos["final_info"][key][ended], values[ended])
        np.testing.assert_array_equal(infos["final_info"][f"_{key}"], ended)
        np.testing.assert_array_equal(infos[key][~ended], values[~ended])
    listed = DictInfoToList(env)._convert_info_to_list(infos)
    assert ["final_info" in info for info in listed] == ended.tolist()


@pytest.mark.parametrize("adaptive", [0, 1])
def test_divergence_ends_the_episode_at_its_worst_return(make_task, adaptive):
    """A NaN that was not an end, or was cheap, would teach the policy to gamble or poison PPO's gradients."""
    task = make_task(adaptive=adaptive, sgd_lr=(1e38, 1e38), adaptive_lr=(1e38, 1e38), decisions=(9, 9))
    env = SchedulingVectorEnv(4, [task], safe_start=False)
    env.reset(seed=0)
    observations, rewards, terminated, truncated, infos = env.step(zeros(4))
    assert terminated.all() and not truncated.any()
    assert (rewards == -2).all()
    assert (infos["final_info"]["inner_steps"] < infos["final_info"]["total_steps"]).all()
    assert env.observation_space.contains(observations)
    assert env.observation_space.contains(np.stack(infos["final_obs"]))


def test_late_divergence_takes_back_what_was_earned(make_task):
    """If gains survived a divergence, a run that ends in NaN could be worth more than one that ends well."""
    env = SchedulingVectorEnv(2, [make_task(decisions=(9, 9), adaptive=1, adaptive_lr=(1e-2, 1e-2))], autoreset=False)
    env.reset(seed=0)
    total = sum(env.step(zeros(2))[1] for _ in range(5))
    assert (total > 0).all()
    env._groups[0].training.settings.lr[0] = 1e38
    _, rewards, terminated, _, _ = env.step(zeros(2))
    np.testing.assert_array_equal(terminated, [True, False])
    assert total[0] + rewards[0] == pytest.approx(-2, abs=1e-6)
    assert total[1] + rewards[1] > -1


def test_divergence_stays_within_its_run(make_task, play):
    """One run's NaN in the weights of its neighbours would end a whole batch."""
    runs, steps = 5, 8
    clean, poisoned = (SchedulingVectorEnv(runs, [make_task()], safe_start=False) for _ in range(2))
    training = poisoned._groups[0].training
    begin = training.begin

    def begin_poisoned(slots, rngs):
        begin(slots, rngs)
        training.settings.lr[2] = 1e38

    training.begin = begin_poisoned
    expected, history = play(clean, seed=0, steps=steps), play(poisoned, seed=0, steps=steps)
    assert all(d[2] and r[2] == -2 for _, r, d, _ in history[1:])
    others = [0, 1, 3, 4]

    def without_it(history):
        return [
            (o[others], r[others], d[others], {k: v[others] for k, v in i.items() if "final" not in k})
            for o, r, d, i in history
        ]

    assert_same(without_it(history), without_it(expected), rtol=0, atol=0)


def test_zero_actions_are_the_fallback_schedule(make_task):
    """The policy's actions are corrections to this schedule; were it another, so would a user's fallback be."""
    task = make_task(decisions=(7, 7), other_momentum=0.5, no_momentum=0.3)
    runs = 8
    env = SchedulingVectorEnv(runs, [task], safe_start=False, autoreset=False)
    _, infos = env.reset(seed=0)
    setups = []
    for run in range(runs):
        rng = np.random.default_rng(run)
        setups.append(task.setup.draw(rng, task.episode(rng).loss_scale))
    base = np.array([s.lr for s in setups])
    assert len({(s.adaptive, s.momentum > 0) for s in setups}) == 3, "a kind of optimizer is missing"
    np.testing.assert_array_equal(infos["adaptive"] > 0, [s.adaptive for s in setups])
    total = 1 + 7 * task.interval
    np.testing.assert_allclose(infos["lr"], base, rtol=1e-5)
    for decision in range(7):
        _, _, _, _, infos = env.step(zeros(runs))
        np.testing.assert_allclose(infos["lr"], base * (1 - (1 + decision * task.interval) / total), rtol=1e-5)
        np.testing.assert_allclose(infos["momentum"], [s.momentum for s in setups], rtol=1e-6)
        assert np.isinf(infos["clip"]).all()


def test_safe_start_lowers_absurd_learning_rates_and_keeps_sane_ones(make_task):
    """A start that is too careful wastes short runs; one that is too bold loses the run before the first decision."""
    runs = 12
    for lr, check in {1e-4: lambda ratio: ratio > 0.98, 1e3: lambda ratio: ratio < 0.1}.items():
        task = make_task(sgd_lr=(lr, lr), adaptive_lr=(lr, lr))
        chosen, base = (
            SchedulingVectorEnv(runs, [task], safe_start=safe).reset(seed=0)[1]["lr"] for safe in (True, False)
        )
        assert (chosen <= base * (1 + 1e-5)).all()
        assert check(chosen / base).all(), chosen / base


def test_probe_hardly_moves_the_weights(make_task):
    """A probe at the full learning rate would be the very step that it is there to prevent."""
    task = make_task(adaptive=1, adaptive_lr=(1e-2, 1e-2))
    moved = []
    for safe in (True, False):
        env = SchedulingVectorEnv(1, [task], safe_start=safe)
        env.reset(seed=0)
        moved.append((env._groups[0].training.networks.params - task.episode(np.random.default_rng(0)).params).norm())
    assert moved[0] / moved[1] == pytest.approx(control.PROBE, rel=1e-2)


def test_no_momentum_control_without_momentum(make_task):
    """SGD without momentum has no buffer; an action on it would be noise that the policy is blamed for."""
    task = make_task(adaptive=0, no_momentum=1, decisions=(4, 4))

    def observations(momentum_action):
        env = SchedulingVectorEnv(3, [task], autoreset=False)
        env.reset(seed=0)
        actions = np.full((3, 3), 0.3, np.float32)
        actions[:, control.MOMENTUM] = momentum_action
        return np.stack([env.step(actions)[0] for _ in range(4)]), env._infos()["momentum"]

    (up, momentum), (down, _) = observations(1), observations(-1)
    np.testing.assert_array_equal(up, down)
    assert (momentum == 0).all()


def test_unreported_loss_is_not_seen_but_rewarded(make_task, play):
    """A policy must work for a user who never passes the loss, and learns to only if it is hidden from it."""
    env = SchedulingVectorEnv(3, [make_task(no_loss=1.0)])
    hidden = [i for i, name in enumerate(OBSERVATION_NAMES) if name.startswith("loss") or name == "predicted_decrease"]
    assert len(hidden) == 6
    for observations, rewards, _, infos in play(env, seed=0, steps=6)[1:]:
        assert (observations[:, hidden] == 0).all()
        assert (rewards != 0).any() and np.isfinite(infos["validation_loss"]).all()


def test_caller_keeps_its_actions(make_task):
    """An environment that wrote into the actions would falsify the buffer that PPO learns from."""
    env = SchedulingVectorEnv(2, [make_task(adaptive=0, no_momentum=1)])
    env.reset(seed=0)
    actions = np.full((2, 3), 0.5, np.float32)
    actions.flags.writeable = False
    env.step(actions)
    assert (actions == 0.5).all()


def test_results_are_the_callers_own(make_task):
    """An observation that changes after it was returned would rewrite a rollout buffer that only refers to it."""
    env = SchedulingVectorEnv(3, [make_task()])
    env.reset(seed=0)
    actions = zeros(3)
    returned = [env.step(actions)]
    kept = [part.copy() for part in returned[0][:4]]
    for _ in range(10):
        env.step(actions + 1)
    for part, copy in zip(returned[0][:4], kept, strict=True):
        np.testing.assert_array_equal(part, copy)


def test_misuse_is_named(make_task):
    """A wrong action or a forgotten reset must not look like a training run that went badly."""
    with pytest.raises(ValueError, match="num_envs"):
        SchedulingVectorEnv(0)
    with pytest.raises(ValueError, match="tasks"):
        SchedulingVectorEnv(1, "nothing")
    env = SchedulingVectorEnv(2, [make_task()])
    with pytest.raises(ResetNeeded, match="reset"):
        env.step(zeros(2))
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"shape \(2, 3\), got \(3,\)"):
        env.step(np.zeros(3))
    with pytest.raises(ValueError, match="finite"):
        env.step(np.full((2, 3), np.nan))
    single = SchedulingEnv([make_task(decisions=(1, 1))])
    single.reset(seed=0)
    assert single.step(np.zeros(3))[2]
    with pytest.raises(ResetNeeded, match="reset"):
        single.step(np.zeros(3))


def test_documentation_lists_every_observation_and_control():
    """The table in the documentation is what a user reads to understand TensorBoard."""
    for name in (*OBSERVATION_NAMES, *control.CONTROL_NAMES):
        assert f"`{name}`" in SchedulingVectorEnv.__doc__
