"""The exported policy is the model's own."""

from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.wrappers import RescaleAction
from sb3_contrib import RecurrentPPO
from stable_baselines3 import A2C, PPO, SAC
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize
from torch import nn

from rlsched.actors import ACTIVATIONS, ACTORS
from rlsched.agents import export
from rlsched.agents.exporting import INTERFACE, load_checkpoint
from rlsched.agents.ppo import _new_model
from rlsched.agents.vec_env import VectorEnvAdapter
from rlsched.domain import Domain
from rlsched.envs import ID, SchedulingVectorEnv
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


SEEN = {"observations": ("progress", "lr", "loss_trend"), "controls": ("momentum", "lr")}


@pytest.fixture
def make_own(tiny):
    """A user's own model, on an environment that only Stable-Baselines3's name for it is known of."""

    def make(algorithm=PPO, policy="MlpPolicy", wrap=None, vector=True, model=None, **options):
        options = {**SEEN, "base_schedule": "constant", "safe_start": 0.5, **options}
        if vector:
            env = VectorEnvAdapter(SchedulingVectorEnv(2, tiny, **options))
        else:
            single = gymnasium.make(ID, tasks=tiny, **options)
            env = DummyVecEnv([lambda: single if wrap is None else wrap(single)])
        if wrap is not None and vector:
            env = wrap(env)
        made = algorithm(policy, env, device="cpu", seed=0, **(model or {}))
        with torch.no_grad():
            for parameter in made.policy.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        return made

    return make


RELU = {"policy_kwargs": {"activation_fn": nn.ReLU, "net_arch": [8, 5]}}
LSTM = {"policy_kwargs": {"lstm_hidden_size": 64}}


@pytest.mark.parametrize(
    ("algorithm", "policy", "vector", "model"),
    [
        (PPO, "MlpPolicy", True, {}),
        (PPO, "MlpPolicy", False, {"use_sde": True}),
        (A2C, "MlpPolicy", True, RELU),
        (A2C, "MlpPolicy", False, {"policy_kwargs": {"net_arch": {"pi": [6], "vf": [4]}}}),
        (RecurrentPPO, "MlpLstmPolicy", True, LSTM),
    ],
    ids=["PPO", "PPO, one run", "A2C", "A2C, one run", "RecurrentPPO"],
)
def test_own_model_is_exported_as_it_decides(make_own, tmp_path, algorithm, policy, vector, model):
    """Whoever trains with an algorithm of their own must get its policy, under the names that it was trained with."""
    own = make_own(algorithm, policy, vector=vector, model=model)
    observations = sequences(own.observation_space)
    expected = predictions(own, observations)
    exported = export(own, info={"name": "own"})
    np.testing.assert_allclose(decisions(exported, observations), expected, atol=1e-5)
    assert {"observations": exported.observations, "controls": exported.controls} == SEEN
    assert (exported.base_schedule.name, exported.safe_start) == ("constant", 0.5)
    own.save(tmp_path / "own.zip")
    loaded = algorithm.load(tmp_path / "own.zip")
    with pytest.raises(ValueError, match=r"^model: it does not say .* give \['observations', 'controls', 'base_sched"):
        export(loaded)
    assert export(loaded, **SEEN, base_schedule="constant", safe_start=0.5).digest == exported.digest


def test_own_model_keeps_its_domain(make_own):
    """A policy that is trusted where it was never played does there what nobody has seen."""
    own = make_own()
    domain = Domain.of(torch.rand(50, 3))
    assert export(own).domain is None
    np.testing.assert_array_equal(export(own, domain=domain).domain.mean, domain.mean)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"algorithm": SAC}, "^model: the actor of SAC cannot be exported"),
        ({"model": {"policy_kwargs": {"activation_fn": nn.GELU}}}, r"activation_fn must be .*Tanh', 'ReLU'.* got GELU"),
        (
            {"model": {"use_sde": True, "policy_kwargs": {"squash_output": True}}},
            "^model: it does not decide what a perceptron of its weights decides",
        ),
        ({"wrap": VecNormalize}, "^model: its environment is in VecNormalize"),
        ({"wrap": partial(VecFrameStack, n_stack=2)}, r"^observations: the model was trained on .*\(6,\)"),
        (
            {"wrap": partial(RescaleAction, min_action=np.float32(0), max_action=np.float32(1)), "vector": False},
            "^controls: the model was trained on ",
        ),
        (
            {"algorithm": RecurrentPPO, "policy": "MlpLstmPolicy", "model": {"policy_kwargs": {"lstm_hidden_size": 8}}},
            "^model: its network is no recurrent from 3 observations",
        ),
    ],
    ids=["SAC", "activation", "squashed", "normalised", "stacked", "rescaled", "LSTM"],
)
def test_what_no_policy_file_holds_is_refused(make_own, options, match):
    """An actor that a policy file cannot express must not be exported as if it could."""
    with pytest.raises(ValueError, match=match):
        export(make_own(**options))


def test_own_model_under_wrong_names_is_refused(make_own):
    """The right numbers under other names are another policy, which fits everywhere."""
    for name, wrong in (("observations", ("lr", "progress", "loss_trend")), ("controls", ("lr",))):
        with pytest.raises(ValueError, match=rf"^{name}: the model was trained on Box"):
            export(make_own(), **{name: wrong})
    with pytest.raises(ValueError, match="observations"):
        export(make_own(), observations=("no", "such", "names"))


@pytest.mark.parametrize(
    ("option", "value"), [("hidden", (8, 8)), ("hidden", (9,)), ("controls", ("lr",)), ("observations", ("lr",))]
)
def test_model_that_says_something_else_is_refused(make_model, option, value):
    """A checkpoint that was altered must not become the policy that it claims to be."""
    model = make_model(hidden=(8,))
    setattr(model, INTERFACE, {**getattr(model, INTERFACE), option: value})
    with pytest.raises(ValueError, match=r"^model: its network is no perceptron from \d+ observations"):
        export(model)


def test_foreign_checkpoint_is_refused(make_own, tmp_path):
    """Without its environment, nobody knows what its numbers are of."""
    make_own().save(tmp_path / "checkpoint.zip")
    with pytest.raises(ValueError, match=r"^model: it does not say what it observes and moves"):
        load_checkpoint(tmp_path)


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
