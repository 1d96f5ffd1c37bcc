"""Training leaves a policy, a log and, whenever it stops, something to go on from."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from stable_baselines3 import PPO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlsched.agents import evaluate, train
from rlsched.agents.export import export
from rlsched.envs import SchedulingVectorEnv
from rlsched.policy import SchedulePolicy


@pytest.fixture
def _no_pictures(monkeypatch):
    """Drawing them takes longer than the training."""
    monkeypatch.setattr("rlsched.agents.ppo.episode_paths", lambda policy, zero: Figure((1, 1)))


def events_of(run_dir):
    """The scalars and images of all event files, and the names of the plugins' data: tag -> [steps]."""
    tags, plugins = {}, set()
    for path in sorted(Path(run_dir).rglob("events.out.tfevents.*")):
        log = EventAccumulator(str(path))
        log.Reload()
        for kind, read in (("scalars", log.Scalars), ("images", log.Images)):
            for tag in log.Tags()[kind]:
                tags.setdefault(tag, []).extend(event.step for event in read(tag))
        plugins |= set(log.summary_metadata)
    return tags, plugins


def interrupt_in(monkeypatch, update):
    """Let Ctrl-C arrive in the middle of an update, counted from 1 within one call of `train`."""
    original, calls = PPO.train, []

    def interrupted(model):
        calls.append(model.num_timesteps)
        if len(calls) == update:
            raise KeyboardInterrupt
        original(model)

    monkeypatch.setattr(PPO, "train", interrupted)


def test_run_leaves_everything_it_promises(make_config, tiny, capsys):
    """Hours of training whose policy, scores or log are missing are hours lost."""
    config = make_config()
    run_dir = Path(config.run_dir)
    policy = train(config)
    assert {p.name for p in run_dir.iterdir() if "tfevents" not in p.name and p.is_file()} == {
        "config.json",
        "checkpoint.zip",
        "policy.safetensors",
    }
    assert json.loads((run_dir / "config.json").read_text()) == config.hyperparameters()
    assert policy.digest == SchedulePolicy.load(run_dir / "policy.safetensors").digest
    assert policy.info == SchedulePolicy.load(run_dir / "policy.safetensors").info
    assert policy.info["training"]["decisions_done"] == config.decisions
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

    tags, plugins = events_of(run_dir)
    assert tags["rollout/ep_rew_mean"] == tags["rollout/ep_len_mean"] == [32, 64, 96]
    for name in ("return", "return_of_zero_policy", "gain", "median_gain", "share_better", "diverged"):
        # Before the first update, after two and at the end; the end again as the metric of the hyperparameters.
        assert sorted(set(tags[f"eval/{name}"])) == [0, 64, 96]
    assert tags["eval/episodes"] == [0, 64, 96]
    assert tags["train/learning_rate"]
    assert any("hparams" in plugin for plugin in plugins)
    shown = capsys.readouterr().err
    assert "training" in shown and "evaluated=" in shown and "fallback=" in shown and "96.0/96.0" in shown


@pytest.mark.usefixtures("_no_pictures")
def test_finished_run_is_not_trained_again(make_config, monkeypatch):
    """A command given twice must not overwrite the first result, or take as long again."""
    config = make_config(decisions=32)
    policy = train(config)
    before = {path: path.stat().st_mtime_ns for path in Path(config.run_dir).iterdir()}
    monkeypatch.setattr("rlsched.agents.ppo._vector_env", None)
    again = train(config)
    assert again.digest == policy.digest and again.info == policy.info
    assert {path: path.stat().st_mtime_ns for path in Path(config.run_dir).iterdir()} == before


@pytest.mark.usefixtures("_no_pictures")
def test_finished_run_is_trained_further_when_more_is_asked_for(make_config):
    """Whoever finds a policy still improving must not have to start over, and one who asks for less keeps it all."""
    first = train(make_config(decisions=32))
    longer = train(make_config(decisions=64))
    assert longer.digest != first.digest
    assert longer.info["training"]["decisions_done"] == 64
    with pytest.raises(ValueError, match="decisions"):
        train(make_config(decisions=32))


@pytest.mark.usefixtures("_no_pictures")
def test_interrupted_run_goes_on(make_config, monkeypatch):
    """A machine that goes away must cost no more than the update it was in."""
    config = make_config()
    checkpoint = Path(config.run_dir) / "checkpoint.zip"
    with monkeypatch.context() as patch:
        interrupt_in(patch, update=2)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert not (checkpoint.parent / "policy.safetensors").exists()
    saved = PPO.load(checkpoint, device="cpu")
    assert saved.num_timesteps == 32  # the second update was lost
    (checkpoint.parent / "checkpoint.partial.zip").write_bytes(b"a kill while this was written")

    started = []

    def recorded(model, *args, _learn=PPO.learn, **kwargs):
        started.append((model.num_timesteps, export(model).digest, model.seed))
        return _learn(model, *args, **kwargs)

    monkeypatch.setattr(PPO, "learn", recorded)
    policy = train(config)
    assert [(steps, digest) for steps, digest, _ in started] == [(32, export(saved).digest)]
    assert policy.info["training"]["decisions_done"] == config.decisions
    rates = events_of(config.run_dir)[0]
    assert sorted(set(rates["rollout/ep_rew_mean"])) == [32, 64, 96]
    final = PPO.load(checkpoint, device="cpu")
    assert final.num_timesteps == config.decisions
    # The learning rate goes on falling where it stopped: at the last update all of the way is behind it.
    assert final.policy.optimizer.param_groups[0]["lr"] == pytest.approx(config.final_learning_rate)


@pytest.mark.usefixtures("_no_pictures")
def test_killed_in_the_last_evaluation_loses_no_update(make_config, monkeypatch):
    """Everything is trained by then: going on must finish the run, and train nothing."""
    config = make_config(decisions=64)
    with monkeypatch.context() as patch:
        patch.setattr("rlsched.agents.ppo._EvaluationCallback.finish", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config)
    saved = export(PPO.load(Path(config.run_dir) / "checkpoint.zip", device="cpu"))
    monkeypatch.setattr(PPO, "train", lambda model: 1 / 0)
    policy = train(config)
    for one, other in zip(policy.weights, saved.weights, strict=True):
        assert all(map(torch.equal, one, other))
    assert policy.info["training"]["decisions_done"] == 64


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
    policy = train(make_config(decisions=32))
    with pytest.raises(ValueError, match=r"n_epochs \(there 1, now 2\)") as error:
        train(make_config(decisions=32, n_epochs=2))
    assert "seed" not in str(error.value)
    with pytest.raises(ValueError, match=r"reward \(there 'validation', now 'best'\)"):
        train(make_config(decisions=32, reward="best"))
    assert train(make_config(decisions=32, device="cpu:0", processes=2)).digest == policy.digest
    assert train(make_config(decisions=64, device="cpu:0")).info["training"]["decisions_done"] == 64


@pytest.mark.usefixtures("_no_pictures")
def test_reward_is_for_training_and_the_validation_loss_for_the_score(make_config, tiny, tmp_path):
    """Policies that were trained on different rewards could not be compared by scores of different kinds."""
    policies = {}
    for reward in ("validation", "training"):
        config = make_config(run_dir=str(tmp_path / reward), decisions=32, reward=reward)
        policies[reward] = policy = train(config)
        assert policy.info["training"]["reward"] == reward
        again = evaluate(policy, tiny, episodes=config.eval_episodes, seed=config.eval_seed)
        losses = np.array([path[-1] for path in again.paths["validation_loss"]])
        first = SchedulingVectorEnv(config.eval_episodes, tiny).reset(seed=config.eval_seed)[1]["validation_loss"]
        scores = policy.info["evaluation"]
        assert scores["return"] == pytest.approx(np.log(first / losses).mean(), abs=1e-3)
    assert policies["validation"].digest != policies["training"].digest


@pytest.mark.usefixtures("_no_pictures")
def test_damaged_checkpoint_is_named(make_config, monkeypatch):
    """A message from inside a zip file does not tell anybody what to delete."""
    config = make_config(decisions=64)
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
    assert train(config).info["training"]["decisions_done"] == 64


@pytest.mark.usefixtures("_no_pictures")
def test_same_seed_gives_the_same_policy(make_config, tmp_path):
    """A result that nobody can make again is none."""
    one, other, third = (
        train(make_config(run_dir=str(tmp_path / name), decisions=32, seed=seed))
        for name, seed in (("one", 3), ("other", 3), ("third", 4))
    )
    assert one.digest != third.digest
    for (w, b), (v, c) in zip(one.weights, other.weights, strict=True):
        torch.testing.assert_close((w, b), (v, c))
