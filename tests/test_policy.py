"""The frozen policy: what it computes, and which files it refuses."""

import json
import pickle

import pytest
import torch
from helpers import lively_policy
from safetensors import safe_open
from safetensors.torch import save_file

from rlsched import SchedulePolicy
from rlsched.control import CONTROLS
from rlsched.policy import DIGEST, INFO, SPEC, PolicyFileError, _digest
from rlsched.safety import Domain
from rlsched.signals import OBSERVATION_NAMES, OBSERVATIONS

N, M = len(OBSERVATIONS), len(CONTROLS)


@pytest.fixture
def file(tmp_path):
    """A policy file as `save` writes it."""
    return lively_policy().save(tmp_path / "policy.safetensors")


def forged(file, **changes):
    """The file with entries of its spec changed, and a checksum that fits."""
    with safe_open(file, framework="pt") as f:
        metadata = f.metadata()
        tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    metadata[SPEC] = json.dumps(json.loads(metadata[SPEC]) | changes)
    metadata[DIGEST] = _digest(tensors, metadata)
    save_file(tensors, file, metadata)
    return file


# --- What it computes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation, function", [("tanh", torch.tanh), ("relu", lambda x: x.clamp(min=0))])
def test_action_is_that_of_the_formula(activation, function):
    """A policy that computes something else than what was trained would be worthless."""
    w, b, v, c = torch.randn(5, N), torch.randn(5), 0.3 * torch.randn(M, 5), 0.3 * torch.randn(M)
    policy = SchedulePolicy([(w, b), (v, c)], activation=activation)
    observations = torch.randn(7, N)
    expected = (function(observations @ w.T + b) @ v.T + c).clamp(-1, 1)
    torch.testing.assert_close(policy.act(observations), expected)
    assert (expected.abs() == 1).any() and (expected.abs() < 1).any()


@pytest.mark.parametrize("batch", [(), (1,), (4,), (2, 3), (0,)])
def test_any_batch_of_observations_gives_its_actions(batch):
    """One run in a user's loop and thousands in an evaluation ask the same policy."""
    observations = torch.randn(*batch, N)
    actions = lively_policy().act(observations)
    assert actions.shape == (*batch, M)
    for i in torch.cartesian_prod(*(torch.arange(n) for n in batch)).view(-1, len(batch)) if batch else []:
        torch.testing.assert_close(actions[tuple(i)], lively_policy().act(observations[tuple(i)]))


def test_file_keeps_the_domain(tmp_path):
    """A policy that forgot where it was trained would be trusted everywhere, and would go by the name of the other."""
    policy = lively_policy()
    plain = policy.digest
    assert (policy.influence(1e3 * torch.randn(5, N)) == 1).all()
    policy.domain = Domain.of(torch.randn(200, N))
    loaded = SchedulePolicy.load(policy.save(tmp_path / "policy.safetensors"))
    assert loaded.digest == policy.digest != plain
    observations = 5 * torch.randn(7, N)
    assert torch.equal(loaded.influence(observations), policy.influence(observations))
    assert (loaded.influence(observations) < 1).all()
    for one, other in zip(loaded.weights, policy.weights, strict=True):
        assert all(map(torch.equal, one, other))


def test_zero_policy_stands_still_without_a_probe():
    """The baseline of every comparison would not be the fallback schedule."""
    zero = SchedulePolicy.zero()
    assert (zero.act(torch.randn(9, N)) == 0).all()
    assert not zero.safe_start


def test_policy_is_frozen():
    """A policy whose weights are still those of the network in training would change under its user."""
    weight, bias = torch.randn(M, N, requires_grad=True), torch.zeros(M, requires_grad=True)
    policy = SchedulePolicy([(weight, bias)])
    assert not policy.act(torch.randn(N)).requires_grad


@pytest.mark.parametrize("weights, message", {
    "inputs": ([(torch.zeros(M, N + 1), torch.zeros(M))], f"does not take the {N} values"),
    "outputs": ([(torch.zeros(M + 1, N), torch.zeros(M + 1))], f"gives {M + 1} actions"),
    "bias": ([(torch.zeros(M, N), torch.zeros(M + 1))], "a layer of shapes"),
    "chain": ([(torch.zeros(5, N), torch.zeros(5)), (torch.zeros(M, 6), torch.zeros(M))], "the 5 values"),
    "none": ([], f"gives {N} actions"),
}.values())  # fmt: skip
def test_weights_that_do_not_fit_are_refused(weights, message):
    """They would fail at the first decision, in the middle of a user's run."""
    with pytest.raises(ValueError, match=message):
        SchedulePolicy(weights)


def test_unknown_activation_is_refused():
    """It would fail at the first decision."""
    with pytest.raises(ValueError, match=r"activation must be one of \['relu', 'tanh'\], got 'gelu'"):
        SchedulePolicy(lively_policy().weights, activation="gelu")


# --- Files ----------------------------------------------------------------------------------------------------------


def test_loaded_policy_is_the_saved_one(tmp_path):
    """A shipped policy would act otherwise than the one that was scored."""
    info = {"training": {"steps": 12}, "scores": [0.5, None], "name": "größer"}
    saved = SchedulePolicy(lively_policy().weights, activation="relu", safe_start=False, info=info)
    path = saved.save(tmp_path / "new" / "folder" / "p.safetensors")
    assert [p.name for p in path.parent.iterdir()] == ["p.safetensors"]
    loaded = SchedulePolicy.load(str(path))
    observations = torch.randn(9, N)
    assert torch.equal(loaded.act(observations), saved.act(observations))
    assert (loaded.activation, loaded.safe_start, loaded.info) == ("relu", False, info)
    assert loaded.digest == saved.digest
    assert repr(loaded) == repr(saved)


def test_digest_is_of_the_weights_alone(tmp_path):
    """Results are filed under the digest: it must not depend on where and how often a policy was saved."""
    policy, same, other = lively_policy(), lively_policy(), lively_policy(seed=12)
    transposed = [(w.T.contiguous().T, b) for w, b in policy.weights]
    assert policy.digest == same.digest == SchedulePolicy(transposed, info={"a": 1}).digest
    assert policy.digest != other.digest
    twice = SchedulePolicy.load(
        SchedulePolicy.load(policy.save(tmp_path / "a.safetensors")).save(tmp_path / "b.safetensors")
    )
    assert twice.digest == policy.digest


def test_other_suffix_is_refused(tmp_path):
    """It could be saved, but not loaded again."""
    with pytest.raises(ValueError, match=r"must end in .safetensors"):
        lively_policy().save(tmp_path / "policy.pt")


@pytest.mark.parametrize("name", ["no-such-policy", "missing.safetensors", "missing/policy.safetensors", ""])
def test_policy_that_is_not_there_is_named(name):
    """A misspelt name would be searched for in the user's own code."""
    with pytest.raises(FileNotFoundError, match=f"policy: .*{name}"):
        SchedulePolicy.load(name)


def test_truncated_file_is_refused(file):
    """A copy that broke off would act with whatever weights had arrived."""
    content = file.read_bytes()
    for length in (0, 1, 8, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(PolicyFileError, match="not a whole policy file"):
            SchedulePolicy.load(file)


def test_file_with_any_byte_altered_is_refused(tmp_path):
    """A policy that was tampered with, or that rotted on a disk, would drive training runs."""
    file = SchedulePolicy.zero().save(tmp_path / "policy.safetensors")
    content = file.read_bytes()
    for i in range(len(content)):
        altered = content[i] ^ 15  # which turns the data type F32 into I32
        file.write_bytes(content[:i] + bytes([altered]) + content[i + 1 :])
        with pytest.raises(PolicyFileError):
            SchedulePolicy.load(file)
    file.write_bytes(content + b"\0")
    with pytest.raises(PolicyFileError):
        SchedulePolicy.load(file)


def test_file_that_is_not_safetensors_is_refused_unread(file):
    """Unpickling a policy file from the internet would run its code."""

    class Bomb:
        def __reduce__(self):
            return pytest.fail, ("the file was unpickled",)

    file.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(PolicyFileError, match="not a whole policy file"):
        SchedulePolicy.load(file)


def test_safetensors_file_of_something_else_is_refused(file):
    """The weights of some model would be taken for a policy."""
    for metadata in (None, {"format": "pt"}, {SPEC: "{}", INFO: "{}"}):
        save_file({"weight": torch.zeros(3)}, file, metadata)
        with pytest.raises(PolicyFileError, match=r"not one written by SchedulePolicy.save"):
            SchedulePolicy.load(file)


@pytest.mark.parametrize("changes, message", [
    ({"version": 99}, "version 99 .* this rlsched has version 1: train the policy again"),
    ({"observations": ["x", *OBSERVATION_NAMES[1:]]}, r"other observations than this rlsched: \['progress', 'x'\]"),
    ({"observations": OBSERVATION_NAMES[::-1]}, "other observations than this rlsched: their order"),
    ({"controls": ["lr"]}, r"other controls than this rlsched: \['clip', 'momentum'\]"),
])  # fmt: skip
def test_file_for_another_spec_is_refused(file, changes, message):
    """Old weights would be fed with numbers that mean something else, and act with confidence."""
    with pytest.raises(PolicyFileError, match=message):
        SchedulePolicy.load(forged(file, **changes))


def test_forging_nothing_is_accepted(file):
    """The tests above would pass on a helper that writes broken files."""
    assert SchedulePolicy.load(forged(file)).digest == lively_policy().digest
