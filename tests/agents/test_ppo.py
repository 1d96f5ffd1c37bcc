"""Training leaves a policy, a log and, whenever it stops, something to go on from."""

import errno
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import lively_policy
from matplotlib.figure import Figure
from stable_baselines3 import PPO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from rlsched.actors import ACTORS
from rlsched.agents import evaluate, train
from rlsched.agents.exporting import actor_weights, export, learner, load_checkpoint
from rlsched.agents.ppo import _vector_env
from rlsched.agents.tensorboard import BASE, LOG, RETURN
from rlsched.base_schedule import BASE_SCHEDULES, named_base_schedule
from rlsched.envs import MIXTURES, InnerTask, SchedulingVectorEnv
from rlsched.files import locked
from rlsched.policy import SchedulePolicy


@pytest.fixture
def _no_pictures(monkeypatch):
    """Drawing them takes longer than the training."""
    monkeypatch.setattr("rlsched.agents.tensorboard.episode_picture", lambda *_: Figure((1, 1)))


def steps_of(run_dir):
    """Where the scalars of a training's own run are: tag -> steps, of all its event files."""
    tags = {}
    for path in sorted((Path(run_dir) / LOG).glob("events.out.tfevents.*")):
        log = EventAccumulator(str(path))
        log.Reload()
        for tag in log.Tags()["scalars"]:
            tags.setdefault(tag, []).extend(event.step for event in log.Scalars(tag))
    return tags


def assert_close_weights(one, other, **tolerance):
    """The actors of two policies have the same weights, whatever their domains."""
    torch.testing.assert_close(one.actor.state_dict(), other.actor.state_dict(), **tolerance)


def evaluate_again(policy, config):
    """The mean return in the episodes of a configuration's evaluations."""
    return evaluate(policy, config.tasks, episodes=config.eval_episodes, seed=config.eval_seed).mean_return


def interrupt_in(monkeypatch, update, algorithm=PPO):
    """Let Ctrl-C arrive in the middle of an update, counted from 1 within one call of `train`."""
    original, calls = algorithm.train, []

    def interrupted(model):
        calls.append(model.num_timesteps)
        if len(calls) == update:
            raise KeyboardInterrupt
        original(model)

    monkeypatch.setattr(algorithm, "train", interrupted)


def test_run_leaves_everything_it_promises(trained, tiny):
    """Hours of training whose policy, scores or log are missing are hours lost."""
    config, policy, run_dir = trained.config, trained.policy, Path(trained.config.run_dir)
    files = {".lock", "config.json", "checkpoint.zip", "policy.safetensors"}
    assert {path.name for path in run_dir.iterdir()} == {*files, LOG}
    assert json.loads((run_dir / "config.json").read_text()) == config.hyperparameters()
    assert policy.digest == SchedulePolicy.load(run_dir / "policy.safetensors").digest
    assert policy.info == SchedulePolicy.load(run_dir / "policy.safetensors").info
    assert policy.info["training"]["timesteps_done"] == config.timesteps
    # The checkpoint is that of the last update, and the scores are those of the policy.
    assert export(PPO.load(run_dir / "checkpoint.zip", device="cpu")).digest == policy.digest
    scores = policy.info["evaluation"]
    again = evaluate(policy, tiny, episodes=config.eval_episodes, seed=config.eval_seed)
    zero = evaluate(SchedulePolicy.zero(), tiny, episodes=config.eval_episodes, seed=config.eval_seed)
    assert scores["return"] == pytest.approx(again.mean_return, abs=1e-3)
    # Its domain is where these observations lie.
    influence = policy.influence(torch.from_numpy(again.observations))
    assert (influence == 1).float().mean() > 0.9
    assert (policy.influence(torch.from_numpy(again.observations) + 50) < 0.1).all()
    assert scores["return_of_zero_policy"] == pytest.approx(zero.mean_return, abs=1e-3)
    assert scores["gain"] == pytest.approx(again.mean_return - zero.mean_return, abs=2e-3)
    assert "training" in trained.shown and "evaluated=" in trained.shown
    assert "base schedule=" in trained.shown and "96.0/96.0" in trained.shown


@pytest.mark.usefixtures("_no_pictures")
def test_finished_run_is_not_trained_again(make_config, monkeypatch):
    """A command given twice must not overwrite the first result, or take as long again."""
    config = make_config(timesteps=32)
    policy = train(config)
    before = {path: path.stat().st_mtime_ns for path in Path(config.run_dir).iterdir()}
    monkeypatch.setattr("rlsched.agents.ppo._vector_env", None)
    again = train(config)
    assert again.digest == policy.digest and again.info == policy.info
    assert {path: path.stat().st_mtime_ns for path in Path(config.run_dir).iterdir()} == before


@pytest.mark.usefixtures("_no_pictures")
def test_finished_run_is_trained_further_when_more_is_asked_for(make_config):
    """Whoever finds a policy still improving must not have to start over, and one who asks for less keeps it all."""
    first = train(make_config(timesteps=32))
    longer = train(make_config(timesteps=64))
    assert longer.digest != first.digest
    assert longer.info["training"]["timesteps_done"] == 64
    with pytest.raises(ValueError, match="timesteps"):
        train(make_config(timesteps=32))


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.parametrize("actor", ACTORS)
def test_interrupted_run_goes_on(make_config, monkeypatch, actor):
    """A machine that goes away must cost no more than the update it was in."""
    config, algorithm = make_config(actor=actor), learner(actor)
    checkpoint = Path(config.run_dir) / "checkpoint.zip"
    with monkeypatch.context() as patch:
        interrupt_in(patch, 2, algorithm)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert not (checkpoint.parent / "policy.safetensors").exists()
    saved = algorithm.load(checkpoint, device="cpu")
    assert saved.num_timesteps == 32  # the second update was lost
    assert load_checkpoint(config.run_dir).digest == export(saved).digest
    (checkpoint.parent / "checkpoint.partial.zip").write_bytes(b"a kill while this was written")

    started = []

    def recorded(model, *args, _learn=algorithm.learn, **kwargs):
        started.append((model.num_timesteps, export(model).digest, model.seed))
        return _learn(model, *args, **kwargs)

    monkeypatch.setattr(algorithm, "learn", recorded)
    policy = train(config)
    assert [(steps, digest) for steps, digest, _ in started] == [(32, export(saved).digest)]
    assert policy.info["training"]["timesteps_done"] == config.timesteps
    # And so does the log.
    steps = steps_of(config.run_dir)
    assert sorted(set(steps["rollout/ep_rew_mean"])) == [32, 64, 96]
    assert sorted(set(steps[RETURN])) == [0, 32, 96]
    assert (checkpoint.parent / LOG / BASE).is_dir()
    final = algorithm.load(checkpoint, device="cpu")
    assert final.num_timesteps == config.timesteps
    # The learning rate goes on falling where it stopped: at the last update all of the way is behind it.
    assert final.policy.optimizer.param_groups[0]["lr"] == pytest.approx(config.final_learning_rate)
    assert load_checkpoint(config.run_dir).digest == policy.digest != export(saved).digest
    assert policy.actor.name == actor


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.parametrize("base_schedule", BASE_SCHEDULES)
def test_policy_sees_moves_and_modulates_what_was_asked_for(make_config, monkeypatch, base_schedule):
    """Weights under the names of other observations, or scores over another base schedule, are a policy for nobody."""
    asked = {"observations": ("loss_vs_first", "progress"), "controls": ("clip", "lr")}
    config = make_config(timesteps=32, base_schedule=base_schedule, **asked)
    made = []

    def recorded(config, transport, num_envs, **options):
        made.append(options)
        return _vector_env(config, transport, num_envs, **options)

    monkeypatch.setattr("rlsched.agents.ppo._vector_env", recorded)
    policy = train(config)
    assert len(made) == 4  # to train in, and to play the policy and the zero policy in, once from several base lrs
    assert all(named_base_schedule(options["base_schedule"]).name == base_schedule for options in made)
    assert {"observations": policy.observations, "controls": policy.controls} == asked
    assert policy.base_schedule == BASE_SCHEDULES[base_schedule]
    scores = policy.info["evaluation"]
    assert scores["return"] == pytest.approx(evaluate_again(policy, config), abs=1e-3)
    zero = evaluate_again(SchedulePolicy.zero(base_schedule), config)
    assert scores["return_of_zero_policy"] == pytest.approx(zero, abs=1e-3)


@pytest.mark.usefixtures("_no_pictures")
def test_scores_are_those_of_the_policy_with_its_domain(make_config, monkeypatch):
    """A domain that an older one helped to find would narrow with each evaluation; and a score must be the policy's."""
    played = []

    def recorded(policy, **options):
        played.append(policy)
        return evaluate(policy, **options)

    monkeypatch.setattr("rlsched.agents.callbacks.evaluate", recorded)
    policy = train(make_config())
    *explored, final = played
    assert len(explored) == 3 and all(explorer.domain is None for explorer in explored)
    assert final.digest == policy.digest and policy.domain is not None
    assert policy.info["evaluation"]["return"] == pytest.approx(evaluate_again(policy, make_config()), abs=1e-3)


@pytest.mark.usefixtures("_no_pictures")
def test_killed_in_the_last_evaluation_loses_no_update(make_config, monkeypatch):
    """Everything is trained by then: going on must finish the run, and train nothing."""
    config = make_config(timesteps=64)
    with monkeypatch.context() as patch:
        patch.setattr("rlsched.agents.callbacks.EvaluationCallback.finish", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config)
    saved = export(PPO.load(Path(config.run_dir) / "checkpoint.zip", device="cpu"))
    monkeypatch.setattr(PPO, "train", lambda model: 1 / 0)
    policy = train(config)
    assert_close_weights(policy, saved, rtol=0, atol=0)
    assert policy.info["training"]["timesteps_done"] == 64


@pytest.mark.usefixtures("_no_pictures")
def test_resumed_run_meets_new_episodes(make_config, monkeypatch):
    """Going on with the episodes it began with would train on them twice."""
    config, seeds = make_config(), []
    with monkeypatch.context() as patch:
        interrupt_in(patch, update=2)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    from rlsched.agents.vec_env import VectorEnvAdapter

    reset = VectorEnvAdapter.reset
    monkeypatch.setattr(VectorEnvAdapter, "reset", lambda env: (seeds.append(list(env._seeds)), reset(env))[1])
    train(config)
    assert seeds[-1] == [config.seed + 32 + run for run in range(config.num_envs)]


@pytest.mark.usefixtures("_no_pictures")
def test_other_hyperparameters_are_refused(make_config):
    """Half a run with one configuration and half with another is a run of neither; another machine is no other run."""
    policy = train(make_config(timesteps=32))
    with pytest.raises(ValueError, match=r"n_epochs \(there 1, now 2\)") as error:
        train(make_config(timesteps=32, n_epochs=2))
    assert "seed" not in str(error.value)
    with pytest.raises(ValueError, match=r"reward \(there 'validation', now 'best'\)"):
        train(make_config(timesteps=32, reward="best"))
    assert train(make_config(timesteps=32, device="cpu:0", processes=2)).digest == policy.digest
    assert train(make_config(timesteps=64, device="cpu:0")).info["training"]["timesteps_done"] == 64


@pytest.mark.usefixtures("_no_pictures")
def test_reward_is_for_training_and_the_validation_loss_for_the_score(make_config, tiny, tmp_path):
    """Policies that were trained on different rewards could not be compared by scores of different kinds."""
    policies = {}
    for reward in ("validation", "training"):
        config = make_config(run_dir=str(tmp_path / reward), timesteps=32, reward=reward)
        policies[reward] = policy = train(config)
        assert policy.info["training"]["reward"] == reward
        again = evaluate(policy, tiny, episodes=config.eval_episodes, seed=config.eval_seed)
        losses = np.array([path[-1] for path in again.paths["validation_loss"]])
        first = SchedulingVectorEnv(config.eval_episodes, tiny).reset(seed=config.eval_seed)[1]["validation_loss"]
        scores = policy.info["evaluation"]
        assert scores["return"] == pytest.approx(np.log(first / losses).mean(), abs=1e-3)
    assert policies["validation"].digest != policies["training"].digest


@pytest.mark.usefixtures("_no_pictures")
def test_advantages_are_centred_on_sets_of_clones(make_config, monkeypatch):
    """What is common to clones is luck, and to learn from luck takes many more episodes."""
    seen = []
    train_once = PPO.train

    def spy(model):
        buffer = model.rollout_buffer
        seen.append((buffer.advantages.copy(), buffer.returns - buffer.values))
        train_once(model)

    monkeypatch.setattr(PPO, "train", spy)
    train(make_config(clones=2))
    for advantages, whole in seen:
        sets, of_whole = (x.reshape(len(x), -1, 2) for x in (advantages, whole))
        np.testing.assert_allclose(sets.sum(-1), 0, atol=1e-5)
        np.testing.assert_allclose(sets, of_whole - of_whole.mean(-1, keepdims=True), atol=1e-5)
        assert np.abs(whole).max() > 0.01, "and the critic learns of what was not centred"


@pytest.mark.usefixtures("_no_pictures")
def test_average_of_the_actor_is_exported_and_kept(make_config, monkeypatch):
    """An average that an interruption loses begins anew from an actor that wanders about."""
    actors = []
    train_once = PPO.train

    def spy(model):
        if len(actors) == 3:
            actors.append(None)
            raise KeyboardInterrupt
        actors.extend([] if actors else [actor_weights(model)])
        train_once(model)
        actors.append(actor_weights(model))

    monkeypatch.setattr(PPO, "train", spy)
    with pytest.raises(KeyboardInterrupt):
        train(make_config(averaging=1.0))
    policy = train(make_config(averaging=1.0))
    expected, *updated = [actor for actor in actors if actor is not None]
    for now in updated:
        expected = {name: (average + now[name]) / 2 for name, average in expected.items()}
    assert len(updated) == 3
    torch.testing.assert_close(policy.actor.state_dict(), expected)


@pytest.mark.usefixtures("_no_pictures")
def test_damaged_checkpoint_is_named(make_config, monkeypatch):
    """A message from inside a zip file does not tell anybody what to delete."""
    config = make_config(timesteps=64)
    with monkeypatch.context() as patch:
        interrupt_in(patch, update=2)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    checkpoint = Path(config.run_dir) / "checkpoint.zip"
    whole = checkpoint.read_bytes()
    for damaged in (whole[: len(whole) // 2], b""):
        checkpoint.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checkpoint\.zip cannot be read: .*Delete it to start over"):
            train(config)
    checkpoint.unlink()
    assert train(config).info["training"]["timesteps_done"] == 64


@pytest.mark.usefixtures("_no_pictures")
def test_folder_of_another_training_is_refused(make_config):
    """Two trainings would take turns in writing one checkpoint, and both come to nothing, without a word."""
    config = make_config(timesteps=32)
    with (
        locked(config.run_dir),
        pytest.raises(BlockingIOError, match=f"in use by process {os.getpid()} on .*: '.*run'"),
    ):
        train(config)
    assert [path.name for path in Path(config.run_dir).iterdir()] == [".lock"]
    policy = train(config)
    with locked(config.run_dir):
        assert train(config).digest == policy.digest, "to load what is finished disturbs nobody"


@pytest.mark.usefixtures("_no_pictures")
def test_broken_configuration_is_named(make_config):
    """A power cut leaves such files. A traceback from a JSON parser does not tell which one, or what to do."""
    config = make_config(timesteps=32)
    path = Path(config.run_dir) / "config.json"
    train(config)
    for text in ("", '{"timesteps": ', "[3]", '{"timesteps": "many"}', "\0\0", "[" * 10**5):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"^run_dir: .*config\.json cannot be read: .*\. Delete it to go on with"):
            train(config)
        assert path.read_text() == text
    path.unlink()
    assert train(make_config(timesteps=64)).info["training"]["timesteps_done"] == 64
    assert json.loads(path.read_text())["timesteps"] == 64


@pytest.mark.usefixtures("_no_pictures")
def test_training_begins_with_the_initial_policy(make_config, tmp_path):
    """Hours of training that were to be built upon would be thrown away, and nobody would notice."""
    initial = lively_policy()
    path = initial.save(tmp_path / "initial.safetensors")
    still = {"learning_rate": 1e-30, "final_learning_rate": 1e-30}
    policy = train(make_config(initial_policy=str(path), timesteps=32, **still))
    assert_close_weights(policy, initial, rtol=0, atol=0)
    assert (policy.observations, policy.controls) == (initial.observations, initial.controls)


@pytest.mark.usefixtures("_no_pictures")
def test_coherent_noise_is_a_function_of_what_is_observed(make_config):
    """Noise that is drawn for each action averages out over a run, and says little of a learning rate kept higher."""
    config = make_config(exploration="coherent", log_std_init=-2.0, timesteps=64)
    train(config)
    policy = PPO.load(Path(config.run_dir) / "checkpoint.zip", device="cpu").policy
    seen = torch.rand(256, policy.observation_space.shape[0])
    noises = []
    with torch.no_grad():
        mean = policy._predict(seen, deterministic=True)
        for _ in range(2):
            policy.reset_noise(len(seen))
            noises.append(policy(seen)[0] - mean)
            torch.testing.assert_close(policy(seen)[0] - mean, noises[-1], rtol=0, atol=0)
    assert not torch.equal(*noises)
    assert 0 < noises[0].std() < 1.2 * math.exp(-2.0), "at most what was asked for, where features are of size 1"


@pytest.mark.usefixtures("_no_pictures")
def test_run_that_never_began_binds_nobody(make_config, monkeypatch):
    """Whoever corrects a mistake in the first try would have to choose another folder, or delete this one."""
    config = make_config(timesteps=32)
    with monkeypatch.context() as patch:
        patch.setattr("rlsched.agents.ppo._new_model", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config)
    assert [path.name for path in Path(config.run_dir).iterdir()] == [".lock"]
    (Path(config.run_dir) / "config.json").write_text('{"timesteps": 1, "seed": 9}')  # and then the power went
    assert train(config).info["training"]["timesteps_done"] == 32


@pytest.mark.usefixtures("_no_pictures")
def test_full_disk_costs_no_more_than_the_update(make_config, monkeypatch):
    """A checkpoint that broke off over the last whole one would be hours lost, for want of a few bytes."""
    config, synced = make_config(), []

    def sync(_):
        synced.append(1)
        if len(synced) > 3:  # the configuration, and two checkpoints
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", sync)
        with pytest.raises(OSError, match=r"No space left on device: '.*checkpoint\.zip'"):
            train(config)
    run_dir = Path(config.run_dir)
    assert {p.name for p in run_dir.iterdir()} == {".lock", "config.json", "checkpoint.zip", LOG}
    assert PPO.load(run_dir / "checkpoint.zip", device="cpu").num_timesteps == 32
    assert train(config).info["training"]["timesteps_done"] == config.timesteps


def test_tasks_that_cannot_be_trained_claim_no_folder(make_config, monkeypatch):
    """A mistake in the last of ten tasks would show in a worker's traceback, and leave a folder that is taken."""
    task = InnerTask(lambda: nn.Linear(2, 4), (torch.ones(20, 3), torch.arange(20) % 4))
    monkeypatch.setitem(MIXTURES, "tiny", (task,))
    config = make_config()
    with pytest.raises(ValueError, match=r"^tasks: 'tiny\[0\]' fails on its own data, RuntimeError"):
        train(config)
    assert not Path(config.run_dir).exists()


@pytest.mark.usefixtures("_no_pictures")
def test_export_in_the_folder_is_no_finished_run(make_config, monkeypatch):
    """A policy that was exported from the checkpoint, and not evaluated, would end the run before its end."""
    config = make_config(timesteps=32)
    with monkeypatch.context() as patch:
        patch.setattr("rlsched.agents.callbacks.EvaluationCallback.finish", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config)
    load_checkpoint(config.run_dir).save(Path(config.run_dir) / "policy.safetensors")
    assert "evaluation" in train(config).info


@pytest.mark.usefixtures("_no_pictures")
def test_same_seed_gives_the_same_policy(make_config, tmp_path):
    """A result that nobody can make again is none."""
    one, other, third = (
        train(make_config(run_dir=str(tmp_path / name), timesteps=32, seed=seed))
        for name, seed in (("one", 3), ("other", 3), ("third", 4))
    )
    assert one.digest != third.digest
    assert_close_weights(one, other)
