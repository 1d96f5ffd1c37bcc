"""The environments: one implementation for one run and for many, replayable, rewarded for the final loss."""

from dataclasses import replace
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import DictInfoToList
from replay import replay
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.optim.lr_scheduler import LambdaLR

import rlsched.envs
from rlsched import control, schedule
from rlsched.base_schedule import BASE_SCHEDULES
from rlsched.control import CONTROL_NAMES
from rlsched.envs import FAMILIES, InnerTask, SchedulingEnv, SchedulingVectorEnv
from rlsched.envs.groups import REWARDS
from rlsched.envs.mixtures import mixture
from rlsched.envs.optimizers import OPTIMIZERS
from rlsched.envs.sharding import Inline, ShardedVectorEnv
from rlsched.envs.training import InnerTraining
from rlsched.signals import OBSERVATION_NAMES, OBSERVATIONS

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
EVERY = dict.fromkeys(OPTIMIZERS, 1)
INFOS = {
    *CONTROL_NAMES,
    "train_loss",
    "validation_loss",
    "best_validation_loss",
    "best_inner_steps",
    "since_best",
    "inner_steps",
    "total_steps",
    "adaptive",
    "diverged",
    "return",
    "family",
    "optimizer",
}
SUBSETS = [  # of observations and controls
    (OBSERVATION_NAMES, CONTROL_NAMES[:1]),
    (OBSERVATION_NAMES[:1], CONTROL_NAMES),
    (OBSERVATION_NAMES[::-3], CONTROL_NAMES[:0:-1]),
]
# Learning rates at which the loss goes down and up again, but not to infinity.
BOLD = {"sgd_lr": (0.1, 3), "adaptive_lr": (0.01, 0.3)}


@pytest.fixture
def family(make_task):
    """A family of rlsched.envs.FAMILIES, with few decisions and learning rates at which rounding errors do not grow."""
    return lambda name, **setup: replace(FAMILIES[name], setup=make_task(optimizers=EVERY, **setup).setup)


def zeros(runs):
    """The actions that stand still."""
    return np.zeros((runs, len(CONTROL_NAMES)), np.float32)


def assert_same(one, other, **tolerance):
    """Two histories hold the same observations, rewards, ends and infos."""
    for (o, r, d, i), (p, s, e, j) in zip(one, other, strict=True):
        np.testing.assert_allclose(o, p, **tolerance)
        np.testing.assert_allclose(r, s, **tolerance)
        np.testing.assert_array_equal(d, e)
        keys = {key for key in i if "final" not in key}
        assert keys == {key for key in j if "final" not in key}
        for key in keys:
            numbers = i[key].dtype != object
            (np.testing.assert_allclose if numbers else np.testing.assert_array_equal)(
                i[key], j[key], **(tolerance if numbers else {}), err_msg=key
            )


def part(history, runs):
    """What happened to some of the runs, other than the last observations of ended ones."""
    kept = []
    for observations, rewards, ended, infos in history:
        own = {key: values[runs] for key, values in infos.items() if "final" not in key}
        kept.append((observations[runs], rewards[runs], ended[runs], own))
    return kept


def test_made_by_name(make_task):
    """The registered names are what the documentation, and users' scripts, rely on."""
    tasks = [make_task(), make_task(hidden=())]
    env = gymnasium.make("rlsched/Scheduling-v0", tasks=tasks[:1], reward="training", device="cpu")
    assert isinstance(env.unwrapped, SchedulingEnv)
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    vector = gymnasium.make_vec("rlsched/Scheduling-v0", num_envs=5, tasks=tasks, reward="training", device="cpu")
    assert isinstance(vector.unwrapped, SchedulingVectorEnv)
    observations, _ = vector.reset(seed=0)
    assert vector.observation_space.contains(observations)
    np.testing.assert_allclose(observations[0], observation, **CLOSE)
    assert env.step(zeros(1)[0])[1] == pytest.approx(vector.step(zeros(5))[1][0], abs=1e-4)
    assert env.spec.id == rlsched.envs.ID


@pytest.mark.parametrize(("observations", "controls"), [(OBSERVATION_NAMES, CONTROL_NAMES), *SUBSETS])
def test_gymnasium_checks_the_environment(make_task, observations, controls):
    """An environment that breaks Gymnasium's rules breaks the wrappers and algorithms built on them."""
    tasks = [make_task(), make_task(hidden=())]
    env = gymnasium.make(rlsched.envs.ID, tasks=tasks, observations=observations, controls=controls)
    gymnasium_check_env(env.unwrapped)


def test_stable_baselines_checks_the_environment(make_task, family):
    """PPO trusts the declared spaces; a wrong one is silently clipped or scaled."""
    sb3_check_env(SchedulingEnv([make_task(), family("recurrent")]))


def test_observations_stay_within_their_space(make_task, play):
    """An entry beyond its bounds would be one the policy never saw in training."""
    env = SchedulingVectorEnv(6, [make_task(sgd_lr=(1e-5, 1e5), adaptive_lr=(1e-5, 1e5), no_loss=0.3)])
    for observations, *_ in play(env, seed=0, steps=20):
        assert observations.dtype == np.float32
        assert env.observation_space.contains(observations)


# Dropout is left out: one stream of random numbers serves a stack, so a run's masks depend on its neighbours. That they
# are drawn anew, and are the same when the same runs are trained again, is tested in the mixture and in test_training.
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"mlp-dropout"}))
def test_each_run_equals_the_single_environment(family, play, name):
    """If runs in a batch could feel each other, the policy would learn from an environment that does not exist."""
    runs, seed, steps = 3, 40, 3
    task = family(name)
    together = play(SchedulingVectorEnv(runs, [task]), seed=seed, steps=steps)
    for run in range(runs):
        alone = play(SchedulingVectorEnv(1, [task]), seed=seed + run, steps=steps, runs=[run])
        assert_same(part(together, [run]), alone, **CLOSE)


def test_families_mix_in_one_environment(family, play):
    """A network that met another architecture's data, actions or seed would be trained on nonsense without an error."""
    tasks, seed, steps = [family(name, decisions=(1, 2)) for name in FAMILIES], 7, 2
    env = SchedulingVectorEnv(2 * len(tasks), tasks)
    history = play(env, seed=seed, steps=steps)
    assert sum(ended.sum() for _, _, ended, _ in history) >= len(tasks), "no new episode was begun"
    assert_same(history, play(env, seed=seed, steps=steps), rtol=0, atol=0)
    for first, task in enumerate(tasks):
        runs = [first, first + len(tasks)]
        own = play(SchedulingVectorEnv(2, [task]), seed=[seed + run for run in runs], steps=steps, runs=runs)
        assert_same(part(history, runs), own, **CLOSE)


def test_single_environment_is_a_vector_environment_of_one(make_task, play):
    """Two implementations would drift apart."""
    tasks = [make_task(decisions=(4, 4), no_loss=0)]
    vector = play(SchedulingVectorEnv(1, tasks, autoreset_mode="Disabled"), seed=3, steps=4)
    env = SchedulingEnv(tasks)
    drawn = np.random.default_rng(0).uniform(-1, 1, (4, len(CONTROL_NAMES))).astype(np.float32)
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


@pytest.mark.parametrize("reward", REWARDS)
def test_rewards_sum_to_the_drop_of_the_log_loss(make_task, play, reward):
    """Rewards that do not add up to the final loss make the policy solve another problem."""
    runs, steps = 4, 24
    env = SchedulingVectorEnv(runs, [make_task(optimizers=EVERY, **BOLD)], reward=reward)
    history = play(env, seed=0, steps=steps)
    key = {"validation": "validation_loss", "best": "best_validation_loss", "training": "train_loss"}[reward]
    first, total, rose, episodes = history[0][3][key].astype(float), np.zeros(runs), 0, 0
    for _, rewards, ended, infos in history[1:]:
        total += rewards
        rose += (rewards < 0).sum()
        for run in np.flatnonzero(ended):
            last = infos["final_info"][key][run]
            assert total[run] == pytest.approx(max(-2, np.log(first[run] / last)), abs=1e-5)
            first[run], total[run] = infos[key][run], 0
            episodes += 1
    assert episodes >= 8
    assert (rose == 0) == (reward == "best")


def test_best_loss_is_the_lowest_so_far(make_task, play):
    """Who keeps the best checkpoint has this loss, and is rewarded for no other."""
    env = SchedulingVectorEnv(6, [make_task(optimizers=EVERY, decisions=(12, 12), **BOLD)], autoreset_mode="Disabled")
    history = play(env, seed=1, steps=12)
    losses = np.stack([infos["validation_loss"] for *_, infos in history])
    steps = np.stack([infos["inner_steps"] for *_, infos in history])
    steps[0] = 0  # the first was measured before the first step
    for n, (*_, infos) in enumerate(history):
        best = losses[: n + 1].argmin(0)
        assert (infos["best_validation_loss"] == losses[best, range(6)]).all()
        assert (infos["best_inner_steps"] == steps[best, range(6)]).all()
        assert (infos["since_best"] == n - best).all()
    assert (infos["since_best"] > 0).any() and (infos["best_inner_steps"] > 0).any()


@pytest.mark.parametrize("told", [True, False], ids=["told", "not told"])
def test_training_reward_is_the_mean_loss_of_the_window(make_task, told):
    """A reward from one mini-batch is mostly noise; and it must be there for a policy that is not told the loss."""
    task, runs = make_task(decisions=(4, 4), optimizers=EVERY, no_loss=float(not told)), 6
    env = SchedulingVectorEnv(runs, [task], reward="training", safe_start=False, autoreset_mode="Disabled")
    _, infos = env.reset(seed=3)
    seen, rewards = [infos["train_loss"]], [np.zeros(runs)]
    for _ in range(4):
        _, reward, _, _, infos = env.step(zeros(runs))
        seen.append(infos["train_loss"])
        rewards.append(reward)
    for run in range(runs):
        losses = base_schedule_losses(replay(task, 3 + run))
        means = np.array([losses[0], *np.reshape(losses[1:], (4, task.interval)).mean(1)])
        np.testing.assert_allclose(np.stack(seen)[:, run], means, rtol=1e-4)
        np.testing.assert_allclose(np.cumsum(rewards, 0)[:, run], np.log(means[0] / means), atol=1e-4)


def base_schedule_losses(episode):
    """The loss at each step of a run under the base schedule, trained by torch."""
    optimizer, losses = episode.optimizer(), []
    schedule = LambdaLR(optimizer, lambda n: 1 - n / episode.total_steps)
    for loss in episode.losses():
        optimizer.zero_grad()
        (episode.setup.loss_scale * loss).backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def first_episode(history, run):
    """The rewards and infos of a run's first episode, from its reset to its end."""
    _, _, _, infos = history[0]
    episode = [(0.0, {key: infos[key][run] for key in INFOS})]
    for _, rewards, ended, infos in history[1:]:
        final = infos["final_info"] if ended[run] else infos
        episode.append((rewards[run], {key: final[key][run] for key in INFOS}))
        if ended[run]:
            return episode
    raise AssertionError(f"the first episode of run {run} did not end")


@pytest.mark.parametrize(("interval", "patience"), [(1, 2), (3, None), (3, 1), (2, 2)])
def test_validations_are_as_rare_and_the_run_as_patient_as_the_task_says(make_task, play, interval, patience):
    """A run that ends too early or too late is another early stopping than the one that a user has."""
    task, runs, seed, most = make_task(optimizers=EVERY, decisions=(9, 18), **BOLD), 12, 2, 18
    every = play(SchedulingVectorEnv(runs, [task], safe_start=False), seed=seed, steps=most)
    rare = replace(task, validation_interval=interval, patience=patience)
    rare = SchedulingVectorEnv(runs, [rare], safe_start=False)
    history = play(rare, seed=seed, steps=most)
    ended_early = set()
    for run in range(runs):
        losses = [infos["validation_loss"] for _, infos in first_episode(every, run)]
        episode = first_episode(history, run)
        shown = best = losses[0]
        best_steps = since = drop = 0
        for window, (reward, infos) in enumerate(episode[1:], 1):
            steps = infos["inner_steps"]
            assert steps == 1 + window * task.interval
            due = window % interval == 0 or steps == infos["total_steps"]
            if due:
                shown, since = losses[window], since + 1
                if shown < best:
                    best, best_steps, since = shown, steps, 0
            before, drop = drop, np.clip(np.log(losses[0] / shown), -2, 20)
            assert reward == (pytest.approx(drop - before, abs=1e-4) if due else 0)
            assert infos["validation_loss"] == pytest.approx(shown, rel=1e-4)
            assert infos["best_validation_loss"] == pytest.approx(best, rel=1e-4)
            assert (infos["best_inner_steps"], infos["since_best"]) == (best_steps, since)
            at_the_end = steps == infos["total_steps"] or since == patience
            assert at_the_end == (window == len(episode) - 1)
        ended_early.add(steps < infos["total_steps"])
        assert infos["diverged"] == 0
    assert ended_early == ({True, False} if patience else {False})


def test_validation_is_paid_for_only_where_it_is_due(make_task, monkeypatch):
    """Whoever validates rarely does so because it is dear."""
    original, networks = InnerTraining.validation_loss, []

    def counted(training, slots=None):
        networks.append(training.size if slots is None else len(slots))
        return original(training, slots)

    monkeypatch.setattr(InnerTraining, "validation_loss", counted)
    task = replace(make_task(decisions=(5, 5)), validation_interval=3)
    env = SchedulingVectorEnv(4, [task])
    env.reset(seed=0)
    measured = [sum(networks)]
    for _ in range(10):
        env.step(zeros(4))
        measured.append(sum(networks) - sum(measured))
    # At the start, after three windows, and at the end, where the next episode starts.
    assert measured == [4, 0, 0, 4, 0, 8, 0, 0, 4, 0, 8]


def test_single_environment_meets_every_task(make_task):
    """Who trains with one environment at a time would otherwise train on the first task of a mixture only."""
    tasks = [replace(make_task(decisions=(1, 1)), interval=interval) for interval in (2, 3, 4)]
    env = SchedulingEnv(tasks)
    env.reset(seed=0)
    met = [env.reset()[1]["total_steps"] for _ in range(30)]
    assert set(met) == {3, 4, 5}
    env.reset(seed=0)
    assert [env.reset()[1]["total_steps"] for _ in range(30)] == met
    assert len({env.reset(seed=seed)[1]["total_steps"] for seed in range(30)}) == 3


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
    plain = SchedulingVectorEnv(runs, tasks, autoreset_mode="Disabled")
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


@pytest.mark.parametrize("mode", AutoresetMode)
def test_autoreset_is_gymnasiums_own(make_task, mode):
    """A loop that is written for Gymnasium's environments must get of this one what it gets of those.

    The reference is its `SyncVectorEnv` around single environments.
    """
    tasks, runs = [make_task(decisions=(2, 2)), make_task(decisions=(3, 3), hidden=())], 2
    env = SchedulingVectorEnv(runs, tasks, autoreset_mode=mode)
    makes = [partial(SchedulingEnv, [task.named(f"task {i}")]) for i, task in enumerate(tasks)]
    sync = gymnasium.vector.SyncVectorEnv(makes, autoreset_mode=mode)
    assert env.metadata["autoreset_mode"] is sync.metadata["autoreset_mode"]
    seeds = [5, 6]
    (first, _), (wanted, _) = env.reset(seed=seeds), sync.reset(seed=seeds)
    np.testing.assert_allclose(first, wanted, **CLOSE)
    compared = np.ones(runs, bool)  # later episodes are others: they are drawn in another order
    for actions in np.random.default_rng(0).uniform(-1, 1, (6, *env.action_space.shape)).astype(np.float32):
        one, other = env.step(actions), sync.step(actions)
        ended = one[2]
        begun = ended & (mode is AutoresetMode.SAME_STEP)
        np.testing.assert_allclose(one[0][compared & ~begun], other[0][compared & ~begun], **CLOSE)
        np.testing.assert_allclose(one[1][compared], other[1][compared], **CLOSE)
        assert_ends_as(one, other)
        compared &= ~ended | (mode is AutoresetMode.DISABLED)
        if mode is AutoresetMode.DISABLED and ended.any():
            seeds = [seed + 10 for seed in seeds]
            (first, infos), (wanted, _) = (
                each.reset(seed=seeds, options={"reset_mask": ended.copy()}) for each in (env, sync)
            )
            np.testing.assert_allclose(first, wanted, **CLOSE)
            np.testing.assert_array_equal(infos["inner_steps"] == 1, ended)


def assert_ends_as(one, other):
    """Two vector environments returned the same ends of episodes, and tell them in the same way."""
    np.testing.assert_array_equal(one[2], other[2])
    np.testing.assert_array_equal(one[3], other[3])
    infos, wanted = one[4], other[4]
    assert infos.keys() >= {key for key in wanted if not key.startswith("_")}
    assert ("final_info" in infos) == ("final_info" in wanted)
    np.testing.assert_array_equal(infos["inner_steps"], wanted["inner_steps"])
    np.testing.assert_array_equal(infos["family"], wanted["family"])
    if "final_obs" in infos:
        np.testing.assert_array_equal(infos["_final_obs"], wanted["_final_obs"])
        for run in np.flatnonzero(infos["_final_obs"]):
            assert infos["final_obs"][run].shape == wanted["final_obs"][run].shape
            assert infos["final_info"]["total_steps"][run] == wanted["final_info"]["total_steps"][run]


def test_next_step_begins_without_a_reward_and_whatever_the_action(make_task):
    """A first reward of an action that nobody took would be credited to the last one of the old episode."""
    task = make_task(decisions=(2, 2))
    same, following = (SchedulingVectorEnv(3, task, autoreset_mode=mode) for mode in ("SameStep", "NextStep"))
    same.reset(seed=4), following.reset(seed=4)
    for _ in range(2):
        last, *_, infos = same.step(zeros(3))
        observations, _, ended, _, told = following.step(zeros(3))
    assert ended.all()
    np.testing.assert_array_equal(np.stack(infos["final_obs"]), observations)
    np.testing.assert_array_equal(infos["final_info"]["return"], told["return"])
    for actions in (zeros(3) + 1,):
        observations, rewards, ended, _, told = following.step(actions)
    assert not ended.any() and (rewards == 0).all() and "final_obs" not in told
    np.testing.assert_array_equal(observations, last)
    np.testing.assert_array_equal(told["inner_steps"], 1)


def test_reset_mask_leaves_the_others_alone(make_task):
    """A run that a reset of another one touched would go on in an episode that nobody played."""
    task = make_task(decisions=(6, 6))
    env, untouched = (SchedulingVectorEnv(4, task, clones=2, autoreset_mode="Disabled") for _ in range(2))
    for each in (env, untouched):
        each.reset(seed=1), each.step(zeros(4))
    mask = np.array([True, True, False, False])
    observations, infos = env.reset(seed=9, options={"reset_mask": mask})
    np.testing.assert_array_equal(infos["inner_steps"], [1, 1, 5, 5])
    np.testing.assert_array_equal(observations[:2], SchedulingVectorEnv(4, task, clones=2).reset(seed=9)[0][:2])
    one, other = env.step(zeros(4)), untouched.step(zeros(4))
    np.testing.assert_array_equal(one[0][2:], other[0][2:])
    np.testing.assert_array_equal(one[1][2:], other[1][2:])


def test_autoreset_that_cannot_be_is_refused(make_task):
    """A mask that was not understood would begin other runs anew than those that are over."""
    env = SchedulingVectorEnv(4, make_task(), clones=2)
    for mask in ([True] * 4, np.ones(3, bool), np.ones(4)):
        with pytest.raises(ValueError, match="reset_mask must be an array of 4 bools"):
            env.reset(options={"reset_mask": mask})
    with pytest.raises(ValueError, match="reset_mask must be the same for all 2 clones"):
        env.reset(options={"reset_mask": np.array([True, False, False, False])})
    with pytest.raises(ValueError, match=r"options may have a 'reset_mask', got \['mask'\]"):
        env.reset(options={"mask": np.ones(4, bool)})
    with pytest.raises(ValueError, match=r"autoreset_mode must be .* \['NextStep', 'SameStep', 'Disabled'\], got True"):
        SchedulingVectorEnv(1, make_task(), autoreset_mode=True)
    with pytest.raises(TypeError, match="autoreset_mode"):
        SchedulingEnv(make_task(), autoreset_mode="NextStep")


@pytest.mark.parametrize("reward", REWARDS)
def test_divergence_ends_the_episode_at_its_worst_return(make_task, reward):
    """A NaN that was not an end, or was cheap, would teach the policy to gamble or poison PPO's gradients."""
    wild = {"sgd_lr": (1e38, 1e38), "adaptive_lr": (1e38, 1e38), "decisions": (9, 9)}
    tasks = [make_task(optimizers={optimizer: 1}, **wild) for optimizer in OPTIMIZERS]
    runs = 2 * len(tasks)
    env = SchedulingVectorEnv(runs, tasks, safe_start=False, reward=reward)
    env.reset(seed=0)
    observations, rewards, terminated, truncated, infos = env.step(zeros(runs))
    assert terminated.all() and not truncated.any()
    assert (rewards == -2).all()
    assert (infos["final_info"]["diverged"] == 1).all() and (infos["diverged"] == 0).all()
    assert (infos["final_info"]["inner_steps"] < infos["final_info"]["total_steps"]).all()
    assert env.observation_space.contains(observations)
    assert env.observation_space.contains(np.stack(infos["final_obs"]))


class Alarmed(nn.Linear):
    """Says in a last output whether it is in training."""

    def forward(self, x):
        outputs = super().forward(x)
        return torch.cat([outputs, torch.full_like(outputs[:, :1], float(self.training))], -1)


def infinite_in_training(outputs, targets):
    """Cross-entropy with its own gradients, whatever its value."""
    return nn.functional.cross_entropy(outputs[:, :-1], targets) + torch.where(outputs[0, -1] > 0, torch.inf, 0.0)


def test_infinite_training_loss_is_a_divergence(make_task):
    """A loss can overflow where its gradients do not; a user's run would be over all the same."""
    task = replace(make_task(), network=partial(Alarmed, 6, 3), loss=infinite_in_training)
    env = SchedulingVectorEnv(2, [task], autoreset_mode="Disabled")
    env.reset(seed=0)
    _, rewards, terminated, _, infos = env.step(zeros(2))
    assert terminated.all() and (infos["diverged"] == 1).all() and (rewards == -2).all()
    assert np.isfinite(infos["validation_loss"]).all()


@pytest.mark.parametrize("reward", REWARDS)
def test_return_has_a_floor_without_divergence(make_task, reward):
    """A loss that rises by many decades, and falls as fast, would drown what all other episodes have to tell."""
    task = make_task(optimizers={"AdamW": 1}, adaptive_lr=(10, 10), decisions=(9, 9))
    env = SchedulingVectorEnv(4, [task], reward=reward, safe_start=False, autoreset_mode="Disabled")
    _, infos = env.reset(seed=0)
    first, highest, total, lowest = infos["validation_loss"], np.zeros(4), np.zeros(4), np.zeros(4)
    for _ in range(9):
        _, rewards, _, _, infos = env.step(zeros(4))
        total += rewards
        lowest, highest = np.minimum(total, lowest), np.maximum(infos["validation_loss"], highest)
    assert (infos["diverged"] == 0).all() and (highest > 10 * np.exp(2) * first).any()
    assert lowest.min() == pytest.approx(0 if reward == "best" else -2, abs=1e-5)


def hinge(outputs, targets):
    """A loss that is zero, to the last bit, where the outputs are small."""
    return (outputs.square().mean() - 1e-3).clamp(min=0)


def below_zero(outputs, targets):
    """A loss that becomes negative."""
    return outputs.square().mean() - 1e-3


@pytest.mark.parametrize("loss", [hinge, below_zero])
@pytest.mark.parametrize("reward", REWARDS)
def test_return_has_a_ceiling(make_task, reward, loss):
    """A loss that underflows has an infinite logarithm: one such episode would outweigh all others of a batch.

    Ten times the loss is the same return: what is bounded is the fall, and not the loss.
    """
    task = make_task(optimizers={"AdamW": 1}, adaptive_lr=(0.03, 0.03), decisions=(30, 30), loss_scale=(1, 1))
    totals = []
    for scale in (1, 10):
        scaled = replace(task, loss=lambda *given, scale=scale: scale * loss(*given))
        env = SchedulingVectorEnv(4, [scaled], reward=reward, safe_start=False, autoreset_mode="Disabled")
        env.reset(seed=0)
        total = most = np.zeros(4)
        for _ in range(30):
            _, rewards, _, _, infos = env.step(zeros(4))
            assert np.isfinite(rewards).all()
            total = total + rewards
            most = np.maximum(total, most)
        assert (infos["diverged"] == 0).all()
        assert most.max() == pytest.approx(20, abs=1e-4) and (most <= 20 + 1e-4).all()
        totals.append(total)
    np.testing.assert_allclose(*totals, atol=0.05)


def test_late_divergence_takes_back_what_was_earned(make_task):
    """If gains survived a divergence, a run that ends in NaN could be worth more than one that ends well."""
    env = SchedulingVectorEnv(
        2, [make_task(decisions=(9, 9), optimizers={"AdamW": 1}, adaptive_lr=(1e-2, 1e-2))], autoreset_mode="Disabled"
    )
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

    def begin_poisoned(slots, *drawn):
        begin(slots, *drawn)
        training.settings.lr[2] = 1e38

    training.begin = begin_poisoned
    expected, history = play(clean, seed=0, steps=steps), play(poisoned, seed=0, steps=steps)
    assert all(d[2] and r[2] == -2 for _, r, d, _ in history[1:])
    others = [0, 1, 3, 4]
    # Episodes that begin in one step begin as one stack, and stacks of other sizes round otherwise.
    assert_same(part(history, others), part(expected, others), rtol=1e-5, atol=1e-5)


def test_zero_actions_are_the_base_schedule(make_task):
    """The policy's actions are corrections to this schedule; were it another, so would what a user falls back on be."""
    task = make_task(decisions=(7, 7), optimizers=EVERY, other_momentum=0.5, no_momentum=0.3)
    runs, seed = 24, 17
    env = SchedulingVectorEnv(runs, [task], safe_start=False, autoreset_mode="Disabled")
    _, infos = env.reset(seed=seed)
    setups = [replay(task, seed + run).setup for run in range(runs)]
    base = np.array([s.lr for s in setups])
    assert len({(s.optimizer, s.momentum > 0) for s in setups}) == 7, "a kind of optimizer is missing"
    adaptive = [s.optimizer in ("Adam", "AdamW", "RMSprop") for s in setups]
    np.testing.assert_array_equal(infos["adaptive"], np.where(adaptive, 1, -1))
    total = 1 + 7 * task.interval
    np.testing.assert_allclose(infos["lr"], base, rtol=1e-5)
    for decision in range(7):
        _, _, _, _, infos = env.step(zeros(runs))
        np.testing.assert_allclose(infos["lr"], base * (1 - (1 + decision * task.interval) / total), rtol=1e-5)
        np.testing.assert_allclose(infos["momentum"], [s.momentum for s in setups], rtol=1e-6)
        np.testing.assert_array_equal(infos["clip"], control.OUTLIER)


@pytest.mark.parametrize("name", BASE_SCHEDULES)
def test_zero_actions_are_the_base_schedule_that_was_asked_for(make_task, name):
    """A policy that was trained over another schedule than its users run it over would correct what is not there."""
    task = make_task(decisions=(7, 7), optimizers=EVERY, no_momentum=0.3)
    runs, total = 8, 1 + 7 * task.interval
    env = SchedulingVectorEnv(runs, [task], base_schedule=name, safe_start=False, autoreset_mode="Disabled")
    _, infos = env.reset(seed=3)
    base = env._groups[0].training.settings.lr.numpy()
    seen = [infos["lr"]] + [env.step(zeros(runs))[-1]["lr"] for _ in range(7)]
    starts = np.array([0, *range(1, total, task.interval)])  # of windows, in inner steps
    fractions, factors = zip(*BASE_SCHEDULES[name].knots, strict=True)
    expected = np.interp(starts / total, fractions, factors)[:, None] * base
    np.testing.assert_allclose(np.stack(seen), expected, rtol=2e-6)


@pytest.mark.parametrize(("observations", "controls"), SUBSETS)
def test_fewer_observations_and_controls_are_a_part_of_all(make_task, play, observations, controls):
    """Under its own names a policy would be shown, and move, what it was not trained on; columns have no names."""
    tasks, runs, steps = [make_task(), make_task(hidden=(), no_loss=1.0)], 4, 9
    part_of = SchedulingVectorEnv(runs, tasks, observations=observations, controls=controls)
    assert part_of.single_observation_space.shape == (len(observations),)
    assert part_of.single_action_space.shape == (len(controls),)
    history = play(part_of, seed=3, steps=steps)
    drawn = np.stack([np.random.default_rng(run).uniform(-1, 1, (steps, len(controls))) for run in range(runs)], 1)
    env = SchedulingVectorEnv(runs, tasks)
    seen, moved = (
        [all_names.index(name) for name in names]
        for all_names, names in ((OBSERVATION_NAMES, observations), (CONTROL_NAMES, controls))
    )
    expected, infos = env.reset(seed=3)
    whole = [(expected[:, seen], np.zeros(runs), np.zeros(runs, bool), infos)]
    for row in drawn.astype(np.float32):
        actions = zeros(runs)
        actions[:, moved] = row
        expected, rewards, ended, _, infos = env.step(actions)
        whole.append((expected[:, seen], rewards, ended, infos))
    assert_same(history, whole, rtol=0, atol=0)
    assert sum(ended.sum() for _, _, ended, _ in whole) >= runs
    for (*_, one), (*_, other) in zip(history, whole, strict=True):
        for observation, full in zip(one.get("final_obs", []), other.get("final_obs", []), strict=True):
            assert (observation is None) == (full is None)
            if full is not None:
                np.testing.assert_array_equal(observation, full[seen])


@pytest.mark.parametrize("given", [("progress", "mood"), ("lr", "lr"), "lr", (), (1,)])
@pytest.mark.parametrize(("argument", "allowed"), [("observations", OBSERVATION_NAMES), ("controls", CONTROL_NAMES)])
def test_wrong_names_are_refused(make_task, argument, allowed, given):
    """A misspelt name would be missed when the policy is deployed, or in a message about tensors."""
    for make in (SchedulingVectorEnv, partial(ShardedVectorEnv, processes=1, transport=Inline)):
        with pytest.raises(ValueError) as error:
            make(2, [make_task()], **{argument: given})
        assert str(error.value).startswith(f"{argument} must be ")
        assert str(allowed) in str(error.value) and str(error.value).endswith(f"got {given!r}")
    with pytest.raises(ValueError, match=f"^{argument} must be"):
        SchedulingEnv([make_task()], **{argument: given})


def test_wrong_base_schedule_is_refused(make_task):
    """Another schedule in its place would be found by nobody."""
    with pytest.raises(ValueError, match=r"^base_schedule must be one of \[.*'linear'.*\], got 'mood'"):
        SchedulingVectorEnv(2, [make_task()], base_schedule="mood")


def test_safe_start_lowers_absurd_learning_rates_and_keeps_sane_ones(make_task):
    """A start that is too careful wastes short runs; one that is too bold loses the run before the first decision."""
    runs = 12
    for lr, check in {1e-4: lambda ratio: ratio > 0.98, 1e3: lambda ratio: ratio < 0.1}.items():
        task = make_task(optimizers=EVERY, sgd_lr=(lr, lr), adaptive_lr=(lr, lr))
        chosen, base = (
            SchedulingVectorEnv(runs, [task], safe_start=safe).reset(seed=0)[1]["lr"] for safe in (True, False)
        )
        assert (chosen <= base * (1 + 1e-5)).all()
        assert check(chosen / base).all(), chosen / base


def test_probe_hardly_moves_the_weights(make_task):
    """A probe at the full learning rate would be the very step that it is there to prevent."""
    task = make_task(optimizers={"AdamW": 1}, adaptive_lr=(1e-2, 1e-2))
    start = parameters_to_vector(replay(task, 0).network.parameters()).detach()
    moved = []
    for safe in (True, False):
        env = SchedulingVectorEnv(1, [task], safe_start=safe)
        env.reset(seed=0)
        moved.append((env._groups[0].training.networks.params - start).norm())
    assert moved[0] / moved[1] == pytest.approx(schedule.PROBE, rel=1e-2)


def test_no_momentum_control_without_momentum(make_task):
    """SGD without momentum has no buffer; an action on it would be noise that the policy is blamed for."""
    task = make_task(optimizers={"SGD": 1}, no_momentum=1, decisions=(4, 4))

    def observations(momentum_action):
        env = SchedulingVectorEnv(3, [task], autoreset_mode="Disabled")
        env.reset(seed=0)
        actions = zeros(3) + 0.3
        actions[:, CONTROL_NAMES.index("momentum")] = momentum_action
        return np.stack([env.step(actions)[0] for _ in range(4)]), env._infos()["momentum"]

    (up, momentum), (down, _) = observations(1), observations(-1)
    np.testing.assert_array_equal(up, down)
    assert (momentum == 0).all()


def test_unreported_loss_is_not_seen_but_rewarded(make_task, play):
    """A policy must work for a user who never passes the loss, and learns to only if it is hidden from it."""
    env = SchedulingVectorEnv(3, [make_task(no_loss=1.0)])
    names = [name for name in OBSERVATION_NAMES if name.startswith("loss") or name == "predicted_decrease"]
    assert {"loss_vs_fast", "loss_vs_slow", "loss_vs_first", "loss_noise", "loss_trend"} < set(names)
    hidden = [OBSERVATION_NAMES.index(name) for name in names]
    for observations, rewards, _, infos in play(env, seed=0, steps=6)[1:]:
        assert (observations[:, hidden] == [OBSERVATIONS[name].unknown for name in names]).all()
        assert (rewards != 0).any() and np.isfinite(infos["validation_loss"]).all()


VALIDATION = [OBSERVATION_NAMES.index(f"validation_{what}") for what in ("age", "vs_best", "gap")]


def test_validation_is_seen_as_it_is_measured(make_task, play):
    """A policy must know news from what it has seen before, and learns to only if there is both."""
    told = {"no_loss": 0.0, "no_validation": 0.0, "decisions": (7, 7), "loss_scale": (10.0, 10.0)}
    task = replace(make_task(**told), validation_interval=3)
    env = SchedulingVectorEnv(4, [task], autoreset_mode="Disabled")
    for window, (observations, _, _, infos) in enumerate(play(env, seed=0, steps=7)):
        age, vs_best, gap = observations[:, VALIDATION].T
        windows = (1 / task.interval if window < 3 else 0) + window % 3 if window < 7 else 0
        np.testing.assert_allclose(age, np.log1p(windows) / 4, atol=1e-6)
        ratio = infos["validation_loss"] / infos["best_validation_loss"]
        np.testing.assert_allclose(vs_best, np.clip(2 * np.log(ratio), 0, 4), atol=1e-5)
        np.testing.assert_allclose(gap, np.log(infos["validation_loss"] / infos["train_loss"]) / 2, atol=0.2)


@pytest.mark.parametrize("told", [{"no_loss": 1.0}, {"no_validation": 1.0}], ids=["no loss", "no validation"])
def test_validation_that_is_not_told_is_not_seen(make_task, play, told):
    """A policy must work for a user who never validates, and learns to only if it is hidden from it."""
    env = SchedulingVectorEnv(3, [make_task(**told)])
    for observations, rewards, _, infos in play(env, seed=0, steps=6)[1:]:
        assert (observations[:, VALIDATION] == [-1, 0, 0]).all()
        assert (rewards != 0).any() and np.isfinite(infos["validation_loss"]).all()


def test_caller_keeps_its_actions(make_task):
    """An environment that wrote into the actions would falsify the buffer that PPO learns from."""
    env = SchedulingVectorEnv(2, [make_task(optimizers={"SGD": 1}, no_momentum=1)])
    env.reset(seed=0)
    actions = zeros(2) + 0.5
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
    with pytest.raises(ValueError, match=r"reward must be one of \('validation', 'best', 'training'\), got 'loss'"):
        SchedulingVectorEnv(1, [make_task()], reward="loss")
    with pytest.raises(ValueError, match=r"device must be .*, got 'nowhere'"):
        SchedulingEnv([make_task()], device="nowhere")
    env = SchedulingVectorEnv(2, [make_task()])
    with pytest.raises(ResetNeeded, match="reset"):
        env.step(zeros(2))
    env.reset(seed=0)
    with pytest.raises(ValueError, match=rf"shape \(2, {len(CONTROL_NAMES)}\), got \({len(CONTROL_NAMES)},\)"):
        env.step(zeros(1)[0])
    with pytest.raises(ValueError, match="finite"):
        env.step(zeros(2) + np.nan)
    single = SchedulingEnv([make_task(decisions=(1, 1))])
    single.reset(seed=0)
    assert single.step(zeros(1)[0])[2]
    with pytest.raises(ResetNeeded, match="reset"):
        single.step(zeros(1)[0])


def test_clones_differ_in_their_actions_alone(make_task, play):
    """What tells clones apart must be what they did: a set with equal actions is one run, many times."""
    tasks = [make_task(), make_task(hidden=(5,))]
    single = play(SchedulingVectorEnv(4, tasks), seed=3, steps=12)
    clones = play(SchedulingVectorEnv(12, tasks, clones=3), seed=3, steps=12, runs=np.repeat(range(4), 3))
    for first in range(3):
        assert_same(part(single, [0, 1, 2, 3]), part(clones, [first, first + 3, first + 6, first + 9]), **CLOSE)


def test_clones_end_together(make_task):
    """The next episodes of clones that did not begin together would no longer be the same."""
    task = make_task(decisions=(6, 6), sgd_lr=(1, 1), optimizers={"SGD": 1})
    env = SchedulingVectorEnv(4, task, clones=2, safe_start=False)
    env.reset(seed=0)
    actions = zeros(4)
    actions[0, 0] = 1.0  # its learning rate rises until it diverges
    env._groups[0].training.networks.params[0] = torch.nan
    total, ends, later = np.zeros(4), [], []
    for _ in range(6):
        _, rewards, done, _, infos = env.step(actions)
        total, ends = total + rewards, [*ends, done.tolist()]
    assert ends == [[False] * 4] * 5 + [[True] * 4]
    assert infos["final_info"]["diverged"].tolist() == [1, 0, 0, 0]
    assert total[0] == infos["final_info"]["return"][0] == -2, "and nothing is earned while it waits"
    for _ in range(3):
        observations = env.step(zeros(4))[0]
        later.append(observations)
    np.testing.assert_array_equal(later[-1][0], later[-1][1])
    assert not np.array_equal(later[-1][0], later[-1][2])


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_sets_of_clones_stay_whole_in_shards(make_task, play, processes):
    """A set that two shards share would be no set."""
    tasks = [make_task(), make_task(hidden=(5,))]
    whole = SchedulingVectorEnv(6, tasks, clones=2)
    shards = ShardedVectorEnv(6, tasks, clones=2, processes=processes, transport=Inline)
    assert_same(play(whole, seed=3, steps=12), play(shards, seed=3, steps=12), **CLOSE)


@pytest.mark.parametrize(("num_envs", "clones"), [(6, 4), (6, 0), (2, 4)])
def test_sets_that_do_not_fit_are_refused(make_task, num_envs, clones):
    """A set that is not whole has another mean than the others."""
    with pytest.raises(
        ValueError, match=rf"clones must be at least 1 and divide num_envs \({num_envs}\), got {clones}"
    ):
        SchedulingVectorEnv(num_envs, make_task(), clones=clones)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_run_gets_another_length_in_its_course(make_task, factor):
    """People extend runs and cut them short: a policy that never met that would be at a loss."""
    task = make_task(decisions=(10, 10), other_length=1.0, length_change=(factor, factor))
    env = SchedulingVectorEnv(6, task, autoreset_mode="Disabled")
    env.reset(seed=0)
    after = env._groups[0].training.settings.told_after.clone().numpy()
    last = np.maximum(after + 1, 10 * factor)
    running, decisions = np.ones(6, bool), 0
    while running.any():
        observations, _, done, _, infos = env.step(zeros(6))
        progress = observations[:, OBSERVATION_NAMES.index("progress")]
        np.testing.assert_allclose(progress, np.minimum(infos["inner_steps"] / infos["total_steps"], 1), rtol=1e-5)
        length = 1 + task.interval * np.where(decisions >= after, last, 10)
        np.testing.assert_array_equal(infos["total_steps"][running], length[running])
        decisions += 1
        np.testing.assert_array_equal(done[running], (decisions == last)[running])
        running &= ~done
        env.reset(options={"reset_mask": done})
    assert set(after) <= set(range(2, 9)) and len(set(after)) > 1


def test_sweep_changes_the_learning_rate_alone(make_task):
    """A tuned reference on other episodes, or at other momenta, would be no reference."""
    lr = (1e-3, 1e-1)
    task = make_task(optimizers=EVERY, sgd_lr=lr, adaptive_lr=lr)
    plain = SchedulingVectorEnv(4, task)
    swept = SchedulingVectorEnv(12, task, clones=3, sweep=(0.0, 0.5, 1.0))
    plain.reset(seed=5), swept.reset(seed=5)
    one, other = (env._groups[0].training.settings for env in (plain, swept))
    for name, values in one._asdict().items():
        if name != "lr":
            np.testing.assert_array_equal(values.repeat_interleave(3), getattr(other, name), err_msg=name)
    lrs = other.lr.unflatten(0, (4, 3))
    torch.testing.assert_close(lrs / lrs[:, 1:2], torch.tensor([[0.1, 1.0, 10.0]]).expand(4, 3))
    with pytest.raises(ValueError, match=r"sweep must hold 2 quantiles in \[0, 1\], .* got \[0, 2\]"):
        SchedulingVectorEnv(4, task, clones=2, sweep=[0, 2])


def test_scaled_rewards_are_a_part_of_the_return(make_task, play):
    """Families are weighed by their scale, in what is learned; what is reported stays a log ratio of losses."""
    task = make_task()
    plain, scaled = (play(SchedulingVectorEnv(2, replace(task, reward_scale=s)), seed=0, steps=5) for s in (1.0, 4.0))
    for (_, one, _, infos), (_, other, _, infos_too) in zip(plain, scaled, strict=True):
        np.testing.assert_allclose(one, 4 * other, rtol=1e-5)
        np.testing.assert_array_equal(infos["return"], infos_too["return"])


def test_own_clipping_comes_before_what_is_measured(make_task):
    """In deployment the script clips first, so that a policy sees norms of at most its threshold."""
    clipped = make_task(clipping=1.0, max_grad_norm=(0.01, 0.01), loss_scale=(2.0, 2.0), optimizers={"SGD": 1})
    env = SchedulingVectorEnv(3, clipped)
    env.reset(seed=0)
    window = env._groups[0].training.window
    norms = []

    def spy(*arguments):
        moments = window(*arguments)
        norms.append(moments.grad_norm)
        return moments

    env._groups[0].training.window = spy
    env.step(zeros(3))
    np.testing.assert_allclose(norms[0], 0.02, rtol=1e-4)


def test_documentation_lists_what_there_is(make_task):
    """The tables in the documentation are what a user reads to understand TensorBoard."""
    _, infos = SchedulingVectorEnv(2, [make_task()]).reset(seed=0)
    assert infos.keys() == INFOS
    for name in (*OBSERVATION_NAMES, *CONTROL_NAMES, *INFOS, *REWARDS):
        assert f"`{name}`" in SchedulingVectorEnv.__doc__ or f'"{name}"' in SchedulingVectorEnv.__doc__


@pytest.mark.parametrize("direction", [1, -1])
def test_trust_is_part_of_the_environment(direction):
    """A policy that is deployed under a trust that it was not trained under would run into a wall unawares."""
    env = SchedulingVectorEnv(6, "mlp", controls=["lr"], trust=3, safe_start=False, base_schedule="constant")
    _, infos = env.reset(seed=0)
    first = infos["lr"]
    for _ in range(8):
        *_, infos = env.step(np.full((6, 1), direction, np.float32))
    np.testing.assert_allclose(infos["lr"] / first, 3.0**direction, rtol=1e-4)
    with pytest.raises(ValueError, match="trust must be a number above 1"):
        SchedulingVectorEnv(6, trust=1)


def test_run_says_what_it_trains(make_task):
    """A return that cannot be told by family and optimizer hides the one that a policy ruins."""
    named = InnerTask(nn.Identity, (torch.zeros(9, 2), torch.zeros(9)), name="mine")
    assert [task.name for task in mixture([make_task(), FAMILIES["conv"], named])] == ["task 0", "conv", "mine"]
    tasks = [make_task(optimizers={"RMSprop": 1}), replace(FAMILIES["mlp"], setup=make_task(optimizers=EVERY).setup)]
    env = SchedulingVectorEnv(12, tasks)
    _, infos = env.reset(seed=0)
    assert infos["family"].tolist() == ["task 0", "mlp"] * 6
    assert set(infos["optimizer"][::2]) == {"RMSprop"} and set(infos["optimizer"][1::2]) <= set(OPTIMIZERS)
    drawn = [tasks[1].setup.draw(np.random.default_rng(run), tasks[1].batch_sizes).optimizer for run in range(1, 12, 2)]
    assert infos["optimizer"][1::2].tolist() == drawn and len(set(drawn)) > 1
    _, info = SchedulingEnv(tasks[:1]).reset(seed=0)
    assert (info["family"], info["optimizer"]) == ("task 0", "RMSprop")


def test_tasks_without_a_run_are_named(make_task):
    """A policy that was never trained on a part of its mixture would be thought to have seen it all."""
    tasks = [make_task(), FAMILIES["conv"], make_task(hidden=())]
    with pytest.warns(
        UserWarning, match=r"num_envs: for 3 tasks there are 1 runs .*, and none of conv, task 2"
    ) as said:
        gymnasium.make_vec(rlsched.envs.ID, num_envs=4, tasks=tasks, clones=4)
    assert [warning.filename for warning in said] == [__file__]
    SchedulingEnv(tasks)
