"""The frozen policy: what it computes, and which files it refuses; and policies of one's own."""

import io
import json
import math
import pickle
from dataclasses import replace

import pytest
import torch
from helpers import FACES, assert_same_weights, driven, lively_policy, network, perceptron, train
from safetensors import safe_open
from safetensors.torch import save_file

from rlsched import SchedulePolicy, attach
from rlsched.actors import ACTORS, Perceptron, actor
from rlsched.base_schedule import BASE_SCHEDULES, BaseSchedule
from rlsched.control import CONTROL_NAMES, CONTROLS
from rlsched.domain import Domain
from rlsched.policy import DIGEST, INFO, SPEC, Policy, PolicyFileError, _digest, available
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


def actions(policy, observations):
    """The actions alone."""
    return policy.act(observations, policy.begin(observations.shape[:-1]))[0]


# --- What it computes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation, function", [("tanh", torch.tanh), ("relu", lambda x: x.clamp(min=0))])
def test_action_is_that_of_the_formula(activation, function):
    """A policy that computes something else than what was trained would be worthless."""
    w, b, v, c = torch.randn(5, N), torch.randn(5), 0.5 * torch.randn(M, 5), 0.3 * torch.randn(M)
    policy = perceptron([(w, b), (v, c)], activation=activation)
    observations = torch.randn(200, N)
    expected = (function(observations @ w.T + b) @ v.T + c).clamp(-1, 1)
    torch.testing.assert_close(actions(policy, observations), expected)
    assert (expected.abs() == 1).any() and (expected.abs() < 1).any()


@pytest.mark.parametrize("batch", [(), (1,), (4,), (2, 3), (0,)])
def test_any_batch_of_observations_gives_its_actions(batch):
    """One run in a user's loop and thousands in an evaluation ask the same policy."""
    observations = torch.randn(*batch, N)
    together = actions(lively_policy(), observations)
    assert together.shape == (*batch, M)
    for i in torch.cartesian_prod(*(torch.arange(n) for n in batch)).view(-1, len(batch)) if batch else []:
        torch.testing.assert_close(together[tuple(i)], actions(lively_policy(), observations[tuple(i)]))


def test_actions_shrink_where_the_policy_was_not_trained():
    """Far from all that it has seen, a policy would act with the confidence of one that knows."""
    plain, careful = lively_policy(), lively_policy(domain=Domain.of(torch.randn(200, N)))
    observations = 5 * torch.randn(7, N)
    influence = careful.influence(observations)
    assert (influence < 1).all()
    assert torch.equal(actions(careful, observations), actions(plain, observations) * influence.unsqueeze(-1))


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
    weights = policy.actor.state_dict()
    assert loaded.actor.state_dict().keys() == weights.keys()
    for name, values in loaded.actor.state_dict().items():
        assert torch.equal(values, weights[name])


def test_zero_policy_stands_still_without_a_probe():
    """The baseline of every comparison would not be the base schedule."""
    zero = SchedulePolicy.zero()
    assert (actions(zero, torch.randn(9, len(zero.observations))) == 0).all()
    assert not zero.safe_start


def test_policy_is_frozen():
    """A policy whose weights are still those of the network in training would change under its user."""
    made = Perceptron(N, M, (4,))
    assert all(p.requires_grad for p in made.parameters())
    policy = SchedulePolicy(made.double(), OBSERVATION_NAMES, CONTROL_NAMES)
    action = actions(policy, torch.randn(N))
    assert not action.requires_grad and action.dtype == torch.float32
    assert not any(p.requires_grad for p in policy.actor.parameters())


@pytest.mark.parametrize("names, message", {
    "inputs": ({"observations": OBSERVATION_NAMES[1:]}, f"takes {N} observations.*for {N - 1} observations"),
    "outputs": ({"controls": CONTROL_NAMES[1:]}, f"gives {M} actions, .* and {M - 1} controls"),
    "unknown observation": ({"observations": ("x", *OBSERVATION_NAMES[1:])}, r"observations must be some of .*'x'"),
    "unknown control": ({"controls": ("x", *CONTROL_NAMES[1:])}, r"controls must be some of .*'x'"),
    "twice": ({"controls": (*CONTROL_NAMES[1:], CONTROL_NAMES[1])}, "controls must be some of .*each once"),
    "a string": ({"controls": "lr"}, "controls must be some of .*got 'lr'"),
    "base schedule": ({"base_schedule": "cosine"}, "base_schedule must be one of .*got 'cosine'"),
}.values())  # fmt: skip
def test_what_does_not_fit_is_refused(names, message):
    """It would fail at the first decision, in the middle of a user's run, or act on the wrong numbers."""
    arguments = {"observations": OBSERVATION_NAMES, "controls": CONTROL_NAMES, **names}
    with pytest.raises(ValueError, match=message):
        SchedulePolicy(Perceptron(N, M, (4,)), **arguments)


# --- Files ----------------------------------------------------------------------------------------------------------


def test_loaded_policy_is_the_saved_one(tmp_path):
    """A shipped policy would act otherwise than the one that was scored."""
    info = {"training": {"steps": 12}, "scores": [0.5, None], "name": "größer"}
    saved = lively_policy(activation="relu", safe_start=False, info=info)
    path = saved.save(tmp_path / "new" / "folder" / "p.safetensors")
    assert [p.name for p in path.parent.iterdir()] == ["p.safetensors"]
    loaded = SchedulePolicy.load(str(path))
    observations = torch.randn(9, N)
    assert torch.equal(actions(loaded, observations), actions(saved, observations))
    assert (loaded.actor.activation, loaded.safe_start, loaded.info) == ("relu", False, info)
    assert (loaded.observations, loaded.controls) == (OBSERVATION_NAMES, CONTROL_NAMES)
    assert loaded.digest == saved.digest
    assert repr(loaded) == repr(saved)


@pytest.mark.parametrize("name", ACTORS)
def test_every_actor_is_kept_in_a_file(name, tmp_path):
    """A kind of network that can be trained, and not shipped, would be found out after the training."""
    made = actor(name, N, M, hidden=(5, 4), activation="relu")
    made.load_state_dict({key: torch.randn_like(value) for key, value in made.state_dict().items()})
    saved = SchedulePolicy(made, OBSERVATION_NAMES, CONTROL_NAMES)
    loaded = SchedulePolicy.load(saved.save(tmp_path / "policy.safetensors"))
    assert loaded.digest == saved.digest
    one, other = saved.begin((3,)), loaded.begin((3,))
    for _ in range(4):
        observations = torch.randn(3, N)
        action, one = saved.act(observations, one)
        again, other = loaded.act(observations, other)
        assert torch.equal(action, again)


def test_digest_is_the_same_for_the_same_policy(tmp_path):
    """Results are filed under the digest: it must not depend on where and how often a policy was saved."""
    policy, same = lively_policy(), lively_policy(info={"a": 1})
    assert policy.digest == same.digest
    transposed = lively_policy()
    for p in transposed.actor.parameters():
        p.data = p.data.t().contiguous().t()
    assert transposed.digest == policy.digest
    twice = SchedulePolicy.load(
        SchedulePolicy.load(policy.save(tmp_path / "a.safetensors")).save(tmp_path / "b.safetensors")
    )
    assert twice.digest == policy.digest


def test_digest_differs_for_all_that_decides_the_actions(monkeypatch):
    """The results of one policy would be taken for another's, and a run go on under the wrong one."""
    monkeypatch.setitem(BASE_SCHEDULES, "flat", BaseSchedule("flat", "", ((0.0, 1.0), (1.0, 1.0))))
    domain = Domain(torch.zeros(N), torch.eye(N), torch.tensor(3.0))
    policies = {
        "itself": lively_policy(),
        "weights": lively_policy(seed=12),
        "activation": lively_policy(activation="relu"),
        "probe": lively_policy(safe_start=False),
        "domain": lively_policy(domain=domain),
        "limit": lively_policy(domain=domain._replace(limit=torch.tensor(4.0))),
        "base schedule": lively_policy(base_schedule="flat"),
        "order": perceptron(
            [(layer.weight, layer.bias) for layer in lively_policy().actor.layers], OBSERVATION_NAMES[::-1]
        ),
        "controls": perceptron(
            [(layer.weight, layer.bias) for layer in lively_policy().actor.layers], controls=CONTROL_NAMES[::-1]
        ),
    }
    assert len({policy.digest for policy in policies.values()}) == len(policies)


FEW = ("loss_trend", "progress", "lr", "grad_cosine")


@pytest.fixture
def learn():
    """Lets rlsched see and control more: what it is called with comes first in its table, for the test."""
    tables = {id(table): (table, dict(table)) for table in (OBSERVATIONS, CONTROLS)}

    def learn(table, entry):
        rest = dict(table)
        table.clear()
        table.update({entry.name: entry} | rest)

    yield learn
    for table, before in tables.values():  # in their order
        table.clear()
        table.update(before)


def test_policy_of_a_few_names_lives_on_when_there_are_more(tmp_path, learn):
    """Every policy would have to be trained again, or act on shifted columns, whenever rlsched learns to see more."""
    policy = lively_policy(observations=FEW, controls=("clip", "lr"))
    path = policy.save(tmp_path / "policy.safetensors")

    def run():
        loaded, model = SchedulePolicy.load(path), network()
        optimizer, controller = driven(
            attach, torch.optim.AdamW(model.parameters(), 0.01), total_steps=40, policy=loaded
        )
        return model, train(model, optimizer, range(40)), controller, loaded.digest

    model, lrs, controller, digest = run()
    learn(OBSERVATIONS, replace(OBSERVATIONS["loss_vs_fast"], name="more"))
    learn(CONTROLS, replace(CONTROLS["clip"], name="more"))
    again, others, later, same = run()
    assert others == lrs and same == digest
    assert_same_weights(again, model)
    assert {name: later.state.control[name] for name in CONTROL_NAMES} == controller.state.control
    assert list(later.proposal) == ["clip", "lr"]
    assert len({lr for ((lr, _),) in lrs}) > 30, "a policy that does not move proves nothing"


MAKING = {
    "zero": SchedulePolicy.zero,
    "shipped": lambda: SchedulePolicy.load("default"),
    **{name: lambda name=name: SchedulePolicy(actor(name, N, M), OBSERVATION_NAMES, CONTROL_NAMES) for name in ACTORS},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("make", MAKING.values(), ids=MAKING)
def test_making_a_policy_draws_no_random_numbers(make, device, dtype):
    """A user's network would begin with other weights, and no run compare, since a policy was loaded before.

    Nor does the default dtype or device of the user's own change what the policy is.
    """
    expected = make()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            before = torch.get_rng_state()
            made = make()
            assert torch.equal(torch.get_rng_state(), before)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {(p.dtype, p.device.type) for p in made.actor.parameters()} == {(torch.float32, "cpu")}
    assert made.digest == expected.digest


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
    ({"version": 99}, "version 99 of policy files, this rlsched reads version 2: train the policy again"),
    ({"observations": ["x", *OBSERVATION_NAMES[1:]]}, "no policy that this rlsched .* can use: observations.*'x'"),
    ({"observations": OBSERVATION_NAMES[1:]}, "can use: .*size mismatch"),
    ({"observations": [*OBSERVATION_NAMES[1:], OBSERVATION_NAMES[1]]}, "can use: observations.*each once"),
    ({"controls": ["x", *CONTROL_NAMES[1:]]}, "can use: controls.*'x'"),
    ({"controls": ["lr"]}, "can use: .*size mismatch"),
    ({"base_schedule": "cosine"}, "can use: base_schedule must be one of .*'cosine'"),
    ({"actor": "transformer"}, "can use: actor must be one of .*'transformer'"),
    ({"actor_options": {"hidden": [8], "activation": "gelu"}}, "can use: activation must be one of"),
    ({"actor_options": {"hidden": [8], "heads": 4}}, "can use: .*heads"),
    ({"actor_options": {"hidden": [9], "activation": "tanh"}}, "can use: .*size mismatch"),
])  # fmt: skip
def test_file_for_another_spec_is_refused(file, changes, message):
    """Old weights would be fed with numbers that mean something else, and act with confidence."""
    with pytest.raises(PolicyFileError, match=f"(?s){message}"):
        SchedulePolicy.load(forged(file, **changes))


def test_forging_nothing_is_accepted(file):
    """The tests above would pass on a helper that writes broken files."""
    assert SchedulePolicy.load(forged(file)).digest == lively_policy().digest


def test_shipped_policies_are_read_by_their_names():
    """The name in a user's script would lead nowhere."""
    assert available() and all(SchedulePolicy.load(name).digest for name in available())


# --- A policy of one's own ------------------------------------------------------------------------------------------


class Counting:
    """A policy of no class of rlsched's: its memory counts the decisions, and the actions follow the count.

    Args:
        wrap, unwrap: what the memory is, for a count (*batch,), and the count in it.
    """

    observations = ("progress",)
    controls = ("momentum", "lr")
    safe_start = False
    base_schedule = BASE_SCHEDULES["linear"]
    digest = "counting"

    def __init__(self, wrap=lambda count: count, unwrap=lambda memory: memory):
        self.wrap, self.unwrap = wrap, unwrap

    def begin(self, batch=()):
        return self.wrap(torch.zeros(batch))

    def act(self, observation, memory=None):
        assert observation.shape[-1] == 1
        count = self.unwrap(memory)
        return torch.stack([0.3 * (2 * count).cos(), count.sin()], -1), self.wrap(count + 1)


MEMORIES = {
    "tensor": (),
    "nested": (lambda count: {"counts": [count, "kept"]}, lambda memory: memory["counts"][0]),
    "number": (lambda count: int(count), lambda memory: torch.tensor(float(memory))),
}


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
@pytest.mark.parametrize("face", FACES)
def test_any_policy_drives_a_run_and_keeps_its_memory(face, memory, tmp_path):
    """Who writes a policy by hand could not use it; or it would forget all at the first preemption.

    Decisions come before the inner steps 1, 6, 11 and 16; the run is saved inside of a window.
    """
    policy = Counting(*memory)
    assert isinstance(policy, Policy)

    def start():
        model = network()
        inner = torch.optim.SGD(model.parameters(), 0.1, 0.9)
        optimizer, controller = driven(face, inner, total_steps=21, decisions=5, policy=policy, log_dir=tmp_path)
        return model, optimizer, controller

    model, optimizer, controller = start()
    before = train(model, optimizer, range(13))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (model, optimizer, controller)], file)
    expected = before + train(model, optimizer, range(13, 21))
    file.seek(0)
    again, fresh, resumed = start()
    for part, saved in zip((again, fresh, resumed), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(saved)
    assert policy.unwrap(resumed.state.memory) == 3
    assert before + train(again, fresh, range(13, 21)) == expected
    assert_same_weights(again, model)
    assert policy.unwrap(resumed.state.memory) == policy.unwrap(controller.state.memory) == 4
    offsets = [sum((0.7, 0.25, 0.25, 0.25)[k] * math.sin(k) for k in range(n)) for n in (0, 1, 2, 3, 4)]
    growth = [(1 - momentum) / (1 - 0.9) for ((_, momentum),) in expected]
    lrs = [0.1 * (1 - n / 21) * math.exp(offsets[(n + 4) // 5]) * growth[n] for n in range(21)]
    assert [lr for ((lr, _),) in expected] == pytest.approx(lrs, rel=1e-5)
    assert len({momentum for ((_, momentum),) in expected}) == 5
    assert list(controller.proposal) == ["momentum", "lr"]


def test_run_goes_on_under_the_same_policy_only():
    """The memory of one policy would be handed to another, which makes something else of it."""
    model = network()
    options = {"total_steps": 21, "decisions": 5}
    controller = attach(torch.optim.SGD(model.parameters(), 0.1, 0.9), policy=Counting(), **options)
    train(model, controller.optimizer, range(13))
    other = attach(torch.optim.SGD(model.parameters(), 0.1, 0.9), policy=lively_policy(), **options)
    with pytest.raises(ValueError, match="policy='counting'"):
        other.load_state_dict(controller.state_dict())


@pytest.mark.parametrize("policy", [None, 3, Perceptron(N, M), SchedulePolicy], ids=str)
def test_what_is_no_policy_is_refused(policy):
    """It would fail at the first decision, in the middle of a user's run."""
    with pytest.raises(TypeError, match="policy must be the name of a shipped policy"):
        attach(torch.optim.SGD(network().parameters(), 0.1), total_steps=9, policy=policy)
