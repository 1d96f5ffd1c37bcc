"""The exported policy is the model's own."""

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO

from rlsched.actors import ACTIVATIONS, ACTORS
from rlsched.agents.export import INTERFACE, export, load_checkpoint
from rlsched.agents.ppo import _new_model
from rlsched.agents.vec_env import VectorEnvAdapter
from rlsched.envs import SchedulingVectorEnv
from rlsched.policy import SchedulePolicy

RUNS, DECISIONS = 16, 12


@pytest.fixture
def make_model(make_config):
    """A model as training makes it, with weights large enough to reach the bounds of the actions."""

    def make(**options):
        config = make_config(**options)
        seen = {name: getattr(config, name) for name in ("observations", "controls", "base_schedule")}
        model = _new_model(VectorEnvAdapter(SchedulingVectorEnv(2, config.tasks, **seen)), config)
        with torch.no_grad():
            for parameter in model.policy.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            model.policy.action_net.weight.mul_(4.0)
        return model

    return make


def predictions(model, observations):
    """The model's deterministic actions on sequences of observations, with what it remembers in between."""
    state, actions = None, []
    for step, observation in enumerate(observations):
        starts = np.full(len(observation), step == 0)
        action, state = model.predict(observation, state, episode_start=starts, deterministic=True)
        actions.append(action)
    return np.stack(actions)


def decisions(policy, observations):
    """The same of a policy."""
    memory, actions = policy.begin(observations.shape[1:-1]), []
    for observation in observations:
        action, memory = policy.act(torch.from_numpy(observation), memory)
        actions.append(action.numpy())
    return np.stack(actions)


def sequences(space):
    """Observations of some runs from their first decision on."""
    shape = (DECISIONS, RUNS, *space.shape)
    return np.random.default_rng(0).uniform(space.low, space.high, shape).astype(np.float32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", [(16,), (8, 12)])
@pytest.mark.parametrize("actor", ACTORS)
def test_exported_policy_acts_like_the_model(make_model, tmp_path, actor, hidden, activation):
    """What is shipped must be what was trained, at every decision of a run, and in one run as in many."""
    model = make_model(actor=actor, hidden=hidden, activation=activation)
    observations = sequences(model.observation_space)
    expected = predictions(model, observations)
    exported = export(model, info={"name": "test"}).save(tmp_path / "policy.safetensors")
    model.save(tmp_path / "checkpoint.zip")
    for policy in (SchedulePolicy.load(exported), load_checkpoint(tmp_path)):
        np.testing.assert_allclose(decisions(policy, observations), expected, atol=1e-5)
        for run in range(2):
            np.testing.assert_allclose(decisions(policy, observations[:, run]), expected[:, run], atol=1e-5)
    assert (np.abs(expected) == 1).any() and (np.abs(expected) < 1).any()
    policy = SchedulePolicy.load(exported)
    assert policy.info == {"name": "test"} and policy.safe_start and policy.actor.name == actor


def test_policy_starts_as_it_was_trained_to(make_model, tmp_path):
    """From another learning rate than those that it knows, it would be the policy of other runs."""
    policy = export(make_model(safe_start=0.25))
    assert policy.safe_start == SchedulePolicy.load(policy.save(tmp_path / "quarter.safetensors")).safe_start == 0.25


def test_export_knows_what_the_model_sees_and_moves(make_model, tmp_path):
    """The same numbers under other names, or in another order, are another policy; that fits everywhere."""
    seen = {"observations": ("adaptive", "progress"), "controls": ("clip", "lr")}
    model = make_model(**seen)
    model.save(tmp_path / "checkpoint.zip")
    observations = sequences(model.observation_space)
    for policy in (export(model), load_checkpoint(tmp_path)):
        assert {"observations": policy.observations, "controls": policy.controls} == seen
        assert policy.base_schedule.name == getattr(model, INTERFACE)["base_schedule"]
        np.testing.assert_allclose(decisions(policy, observations), predictions(model, observations), atol=1e-5)


@pytest.mark.parametrize("actor", ACTORS)
def test_later_training_does_not_change_an_export(make_model, actor):
    """An export that shares its weights with the model would change under the one who evaluates it."""
    model = make_model(actor=actor)
    policy = export(model)
    digest = policy.digest
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter.add_(1.0)
    assert policy.digest == digest != export(model).digest


def test_other_models_are_refused(make_model, tiny, tmp_path):
    """An actor that a policy file cannot express must not be exported as if it could."""
    env = VectorEnvAdapter(SchedulingVectorEnv(2, tiny))
    foreign = PPO("MlpPolicy", env, n_steps=8, batch_size=16, device="cpu")
    foreign.save(tmp_path / "checkpoint.zip")
    for refused in (lambda: export(foreign), lambda: load_checkpoint(tmp_path)):
        with pytest.raises(ValueError, match=r"^model: it does not say what it observes and moves"):
            refused()
    for option, value in (("hidden", (8, 8)), ("hidden", (9,)), ("controls", ("lr",)), ("observations", ("lr",))):
        model = make_model(hidden=(8,))
        setattr(model, INTERFACE, {**getattr(model, INTERFACE), option: value})
        with pytest.raises(ValueError, match=r"^model: its network is not the perceptron that it says it is"):
            export(model)


def test_checkpoint_gives_the_policy_of_its_model(make_model, tmp_path):
    """A run that was stopped half-way has only its checkpoint; the policy in it must not be lost or mistaken."""
    model = make_model()
    model.save(tmp_path / "checkpoint.zip")
    for source in (tmp_path, tmp_path / "checkpoint.zip"):
        assert load_checkpoint(source).digest == export(model).digest
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "elsewhere")
    (tmp_path / "checkpoint.zip").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"checkpoint\.zip cannot be read"):
        load_checkpoint(tmp_path)
