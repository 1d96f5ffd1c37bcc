"""A policy in other formats decides the same, and what is no policy's file is refused."""

import copy
import io
import itertools
import json
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import driven, lively_policy, network, train
from torch import nn

import rlsched.formats
from rlsched import OnnxPolicy, SchedulePolicy, attach
from rlsched.actors import ACTORS, actor
from rlsched.agents.evaluation import evaluate
from rlsched.control import CONTROL_NAMES
from rlsched.domain import Domain
from rlsched.envs import SetupDistribution
from rlsched.envs.mixtures import classifier
from rlsched.envs.sources import TeacherStudent
from rlsched.formats import INPUTS, difference, onnx_bytes, save_onnx, torchscript_bytes
from rlsched.onnx_policy import OnnxSpec, sealed
from rlsched.policy import DIGEST, SPEC, Policy, PolicyFileError
from rlsched.signals import OBSERVATION_NAMES

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

ROOT = Path(rlsched.formats.__file__).parent.parent
N, M = len(OBSERVATION_NAMES), len(CONTROL_NAMES)
SOURCE = TeacherStudent(inputs=6, classes=3, points=(32, 64), validation_points=16)
TASK = classifier(SOURCE, (8,), batch_size=8, interval=4, setup=SetupDistribution(decisions=(6, 9)))


def policy_of(kind):
    """A policy with an actor of this kind: weights as of a trained one, some actions clipped, some far from home."""
    torch.manual_seed(3)
    made = actor(kind, N, M)
    for parameter in made.parameters():
        if parameter.dim() > 1:
            nn.init.orthogonal_(parameter, 1.5)
        else:
            nn.init.uniform_(parameter, -0.3, 0.3)
    parameter.data[0] = 1.5  # the last layer's bias: an action that is clipped
    domain = Domain.of(0.4 * torch.randn(4000, N))
    return SchedulePolicy(made, OBSERVATION_NAMES, CONTROL_NAMES, domain=domain, safe_start=0.3, info={"name": kind})


@pytest.fixture(scope="module")
def exported():
    """The policy of each actor, and its ONNX file."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return {kind: (policy := policy_of(kind), onnx_bytes(policy)) for kind in ACTORS}


def runs_of(policy, other, observations):
    """The actions and influences of two policies in runs (decisions, runs, observations), each with its own memory."""
    memories, actions = [policy.begin(observations.shape[1:2]), other.begin(observations.shape[1:2])], [[], []]
    for observation in observations:
        for i, each in enumerate((policy, other)):
            action, memories[i] = each.act(observation, memories[i])
            actions[i].append(action)
    return torch.stack(actions[0]), torch.stack(actions[1])


# --- Decisions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ACTORS)
def test_onnx_decides_what_torch_decides(exported, kind):
    """A server that decides otherwise than what was trained and evaluated serves another policy."""
    policy, content = exported[kind]
    other = OnnxPolicy(content)
    played = evaluate(policy, TASK, episodes=6, seed=5)  # recorded, each in its order
    for episode in range(6):
        seen = torch.from_numpy(played.observations[played.episodes == episode]).unsqueeze(1)
        actions, answers = runs_of(policy, other, seen)
        torch.testing.assert_close(answers, actions, rtol=0, atol=1e-6)
    wide = torch.randn(12, 64, N) * torch.linspace(0.1, 1.5, 64).unsqueeze(1)  # at home, and ever further from there
    actions, answers = runs_of(policy, other, wide)
    torch.testing.assert_close(answers, actions, rtol=0, atol=1e-6)
    influence = policy.influence(wide[0])
    torch.testing.assert_close(other.influence(wide[0]), influence, rtol=0, atol=1e-6)
    assert (influence < 1).any() and (influence == 1).any() and (actions.abs() == 1).any()


@pytest.mark.parametrize("kind", ACTORS)
def test_any_batch_gives_each_run_its_own_decision(exported, kind):
    """On a server a run would be decided otherwise when others ask at the same time."""
    policy, content = exported[kind]
    other, seen = OnnxPolicy(content), torch.randn(2, 3, N)
    memory = None if policy.begin() is None else torch.rand(2, 3, policy.begin().shape[-1])
    together, later = other.act(seen, memory)
    assert together.shape == (2, 3, M)
    for i, j in itertools.product(range(2), range(3)):
        alone, after = other.act(seen[i, j], None if memory is None else memory[i, j])
        torch.testing.assert_close(alone, together[i, j], rtol=0, atol=1e-6)
        if memory is not None:
            torch.testing.assert_close(after, later[i, j], rtol=0, atol=1e-6)
    assert other.act(torch.empty(0, N))[0].shape == (0, M)


@pytest.mark.parametrize("kind", ACTORS)
def test_what_is_not_finite_moves_nothing(exported, kind):
    """A loss that overflowed would reach the learning rate as NaN, through the one format that nobody checked."""
    policy, content = exported[kind]
    seen = torch.full((3, N), torch.nan)
    seen[1] = torch.inf
    for each in (policy, OnnxPolicy(content)):
        action, _ = each.act(seen, each.begin((3,)))
        assert (action == 0).all()


@pytest.mark.parametrize("kind", ACTORS)
def test_torchscript_decides_what_torch_decides(kind):
    """What runs in C++ must be what was trained; and how to feed it has to be in the file."""
    policy = policy_of(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        content = torchscript_bytes(policy)
    assert str(ROOT).encode() not in content, "paths of the machine that made it"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit
        extra = {SPEC: ""}
        module = torch.jit.load(io.BytesIO(content), _extra_files=extra)
    memory = policy.begin((5,))
    for observation in torch.randn(4, 5, N):
        action, expected = module(observation, *([] if memory is None else [memory])), policy.act(observation, memory)
        torch.testing.assert_close(action[0], expected[0])
        torch.testing.assert_close(action[1], policy.influence(observation))
        memory = expected[1]
        if memory is not None:
            torch.testing.assert_close(action[2], memory)
    assert json.loads(extra[SPEC])["observations"] == list(policy.observations)


def test_difference_is_found(exported):
    """The check before a file is written would pass everything."""
    policy, content = exported["recurrent"]
    assert difference(policy, OnnxPolicy(content)) <= 2e-6
    assert difference(policy, policy_of("perceptron")) > 0.1


# --- In use ---------------------------------------------------------------------------------------------------------


def test_onnx_file_says_all_that_a_run_needs(exported, tmp_path):
    """Without the policy file beside it nobody would know what its numbers mean."""
    policy, content = exported["recurrent"]
    (tmp_path / "mine.onnx").write_bytes(content)
    loaded = OnnxPolicy.load(tmp_path / "mine.onnx")
    assert isinstance(loaded, Policy)
    for name in ("observations", "controls", "safe_start", "base_schedule", "digest", "info"):
        assert getattr(loaded, name) == getattr(policy, name), name
    assert loaded.memory == policy.begin().shape[-1]
    model = onnx.load_from_string(content)
    onnx.checker.check_model(model, full_check=True)
    assert {entry.key for entry in model.metadata_props} >= {SPEC, DIGEST}
    assert [each.name for each in model.graph.input] == list(INPUTS)
    assert str(ROOT).encode() not in content, "paths of the machine that made it"


def test_onnx_policy_drives_an_optimizer(exported, tmp_path):
    """`policy="mine.onnx"` would train otherwise than the policy that it was made of."""
    policy, content = exported["perceptron"]
    (tmp_path / "mine.onnx").write_bytes(content)
    paths = []
    for each in (policy, str(tmp_path / "mine.onnx")):
        model = network()
        optimizer, _ = driven(attach, torch.optim.SGD(model.parameters(), 0.1, 0.9), policy=each, total_steps=12)
        paths.append(train(model, optimizer, range(12)))
    assert np.ptp([step[0][0] for step in paths[0]]) > 0
    np.testing.assert_allclose(paths[1], paths[0], rtol=1e-4)


def test_schedule_under_an_onnx_policy_can_be_copied(exported):
    """A trainer that copies its optimizer, or sends it to a process, would stop at a session that cannot be pickled."""
    policy = OnnxPolicy(exported["recurrent"][1])
    seen = torch.randn(3, N)
    for again in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert again.digest == policy.digest
        assert torch.equal(again.act(seen, again.begin((3,)))[0], policy.act(seen, policy.begin((3,)))[0])


# --- What is refused ------------------------------------------------------------------------------------------------


def identity(name, shape, out):
    """An ONNX model that gives back what it is given."""
    value = onnx.helper.make_tensor_value_info
    nodes = [onnx.helper.make_node("Identity", [name], [out])]
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(nodes, "graph", [value(name, kind, shape)], [value(out, kind, shape)])
    opset = [onnx.helper.make_opsetid("", 20)]
    return onnx.helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()


def test_foreign_onnx_file_is_refused(tmp_path):
    """Somebody else's network would decide over learning rates, or its error be one of ONNX Runtime's insides."""
    path = tmp_path / "foreign.onnx"
    path.write_bytes(identity("observation", ["batch", N], "action"))
    with pytest.raises(PolicyFileError, match=r"^\S*foreign.onnx is no policy: not an ONNX file that `rlsched export"):
        OnnxPolicy.load(path)
    with pytest.raises(PolicyFileError, match=r"foreign\.onnx is no policy"):
        attach(torch.optim.SGD(network().parameters(), 0.1), total_steps=10, policy=str(path))
    with pytest.raises(ValueError, match=r"^policy: '\S*foreign.onnx' is an ONNX file, which rlsched.OnnxPolicy.load"):
        SchedulePolicy.load(path)
    with pytest.raises(FileNotFoundError, match=r"^policy: there is no file 'nothing.onnx'"):
        OnnxPolicy.load("nothing.onnx")


def test_altered_or_truncated_onnx_file_is_refused(exported):
    """A weight that was changed on the way would decide unnoticed."""
    content = exported["perceptron"][1]
    for place in (100, len(content) // 2, len(content) - 150):
        altered = bytearray(content)
        altered[place] ^= 1
        with pytest.raises(PolicyFileError, match="was altered after it was written"):
            OnnxPolicy(bytes(altered))
    for size in (0, 10, len(content) // 2, len(content) - 1):
        with pytest.raises(PolicyFileError, match="is no policy"):
            OnnxPolicy(content[:size])


SPECIFIED = OnnxSpec(2, ("progress",), ("lr",), 0.0, "linear", 0, "")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"version": 1}, "it is of version 1 of policy files"),
        ({"observations": ("mood",)}, "observations must be some of"),
        ({"controls": "lr"}, "controls must be some of"),
        ({"safe_start": 2.0}, "safe_start must be a number between 0 and 1"),
        ({"base_schedule": "mood"}, "base_schedule must be one of"),
        ({}, "no policy that this rlsched can use"),  # it lacks an influence
        ({"observations": ("progress", "lr")}, "no policy that this rlsched can use"),  # and takes one number
    ],
)
def test_onnx_file_that_says_nonsense_is_refused(changes, message):
    """A file with a checksum that fits, made by hand or by another version, would fail in the midst of a run."""
    forged = sealed(identity("observation", ["batch", 1], "action"), SPECIFIED._replace(**changes), {})
    with pytest.raises(PolicyFileError, match=message):
        OnnxPolicy(forged)


def test_wrong_conversion_is_not_written(exported, monkeypatch, tmp_path):
    """A converter of another version may get an operation wrong, and a file would say nothing of it."""
    wrong = exported["perceptron"][1]
    monkeypatch.setattr("rlsched.formats.onnx_bytes", lambda policy: wrong)
    with pytest.raises(ValueError, match=r"^policy: ONNX Runtime decides otherwise by it, by up to \d.*nothing was wr"):
        save_onnx(lively_policy(), tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()
