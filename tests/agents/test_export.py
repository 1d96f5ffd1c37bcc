"""The exported policy is the model's own."""

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO

from rlsched.agents.export import export, load_checkpoint
from rlsched.agents.vec_env import VectorEnvAdapter
from rlsched.envs import SchedulingVectorEnv
from rlsched.policy import SchedulePolicy


def model_of(tasks, **policy_kwargs):
    """A PPO model with weights large enough to reach the bounds of the actions."""
    env = VectorEnvAdapter(SchedulingVectorEnv(2, tasks))
    model = PPO("MlpPolicy", env, n_steps=8, batch_size=16, policy_kwargs=policy_kwargs, device="cpu", seed=0)
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


@pytest.mark.parametrize("activation", [torch.nn.Tanh, torch.nn.ReLU])
@pytest.mark.parametrize("hidden", [(16,), (8, 12)])
def test_exported_policy_acts_like_the_model(tiny, tmp_path, activation, hidden):
    """What is shipped must be what was trained."""
    model = model_of(tiny, activation_fn=activation, net_arch={"pi": list(hidden), "vf": [4]})
    space = model.observation_space
    observations = np.random.default_rng(0).uniform(space.low, space.high, (256, *space.shape)).astype(np.float32)
    expected, _ = model.predict(observations, deterministic=True)
    policy = SchedulePolicy.load(export(model, info={"name": "test"}).save(tmp_path / "policy.safetensors"))
    actions = policy.act(torch.from_numpy(observations)).numpy()
    np.testing.assert_allclose(actions, expected, atol=1e-5)
    assert (np.abs(expected) == 1).any() and (np.abs(expected) < 1).any()
    assert policy.info == {"name": "test"} and policy.safe_start


def test_later_training_does_not_change_an_export(tiny):
    """An export that shares its weights with the model would change under the one who evaluates it."""
    model = model_of(tiny, net_arch={"pi": [8], "vf": [4]})
    policy = export(model)
    digest = policy.digest
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter.add_(1.0)
    assert policy.digest == digest


def test_other_networks_are_refused(tiny):
    """An actor that a policy file cannot express must not be exported as if it could."""
    model = model_of(tiny, activation_fn=torch.nn.GELU, net_arch={"pi": [8], "vf": [4]})
    with pytest.raises(ValueError, match="GELU"):
        export(model)


def test_checkpoint_gives_the_policy_of_its_model(tiny, tmp_path):
    """A run that was stopped half-way has only its checkpoint; the policy in it must not be lost or mistaken."""
    model = model_of(tiny, net_arch={"pi": [8], "vf": [4]})
    model.save(tmp_path / "checkpoint.zip")
    for source in (tmp_path, tmp_path / "checkpoint.zip"):
        assert load_checkpoint(source).digest == export(model).digest
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "elsewhere")
    (tmp_path / "checkpoint.zip").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"checkpoint\.zip cannot be read"):
        load_checkpoint(tmp_path)
