"""Policy files from anywhere: damaged, forged, or nonsense with a checksum that fits."""

import copy
import json
import math
import random
import struct
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import lively_policy
from safetensors import safe_open
from safetensors.torch import save

from rlsched import SchedulePolicy
from rlsched.actors import ACTORS, Perceptron, actor
from rlsched.control import CONTROL_NAMES
from rlsched.domain import Domain
from rlsched.policy import DIGEST, INFO, SPEC, PolicyFileError, _digest
from rlsched.signals import OBSERVATION_NAMES

N, M = len(OBSERVATION_NAMES), len(CONTROL_NAMES)
DOMAIN = Domain(torch.zeros(N), torch.eye(N), torch.tensor(3.0))


def drawn(kind):
    """An actor of this kind with weights, and a policy of it with a domain."""
    made = actor(kind, N, M, (3,))
    made.load_state_dict({name: torch.randn_like(tensor) for name, tensor in made.state_dict().items()})
    return SchedulePolicy(made, OBSERVATION_NAMES, CONTROL_NAMES, domain=DOMAIN, info={"scores": [0.5, None]})


# --- What is not finite ---------------------------------------------------------------------------------------------

PARTS = {
    **{f"actor: {name}": name for name in Perceptron(N, M, (8,)).state_dict()},
    **{f"domain: {name}": f"domain.{name}" for name in Domain._fields},
}


def contents(policy):
    """The tensors and the metadata of a policy's file."""
    with tempfile.TemporaryDirectory() as folder:
        path = policy.save(Path(folder) / "policy.safetensors")
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key).clone() for key in file.keys()}, file.metadata()  # noqa: SIM118


def signed(tensors, metadata):
    """A policy file of these, with a checksum that fits, as far as these are what has one."""
    has_digest = all(tensor.dtype == torch.float32 for tensor in tensors.values())
    return save(tensors, {**metadata, DIGEST: _digest(tensors, metadata) if has_digest else "0" * 64})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part, key", PARTS.items(), ids=PARTS)
def test_policy_that_is_not_finite_is_refused(part, key, value, tmp_path):
    """One NaN in it, and all that a run's learning rate is held in bounds by would be a comparison with NaN."""
    tensors, metadata = contents(lively_policy(domain=DOMAIN))
    tensors[key].view(-1)[-1] = value
    file = tmp_path / "policy.safetensors"
    file.write_bytes(signed(tensors, metadata))
    with pytest.raises(PolicyFileError, match=f"{part} must be finite, it has {value}"):
        SchedulePolicy.load(file)
    domain = Domain(*(tensors.pop(f"domain.{name}") for name in Domain._fields))
    made = Perceptron(N, M, (8,))
    made.load_state_dict(tensors)
    with pytest.raises(ValueError, match=f"^{part} must be finite, it has {value}"):
        SchedulePolicy(made, OBSERVATION_NAMES, CONTROL_NAMES, domain=domain)


@pytest.mark.parametrize("domain, message", [
    (DOMAIN._replace(limit=torch.tensor(0.0)), "domain: limit must be positive, it is 0"),
    (DOMAIN._replace(limit=torch.tensor(-1.0)), "domain: limit must be positive, it is -1"),
    (DOMAIN._replace(mean=torch.zeros(N + 1)), rf"domain: mean must have the shape \({N},\), it has \({N + 1},\)"),
    (DOMAIN._replace(whitening=torch.eye(N)[:1]), rf"domain: whitening must have the shape \({N}, {N}\)"),
    (DOMAIN._replace(limit=torch.ones(1)), r"domain: limit must have the shape \(\), it has \(1,\)"),
    (DOMAIN._replace(mean=torch.full((N,), 1e39, dtype=torch.float64)), "domain: mean must be finite, it has inf"),
])  # fmt: skip
def test_domain_that_is_none_is_refused(domain, message):
    """Everything, or nothing, would be taken for what the policy was trained on."""
    with pytest.raises(ValueError, match=message):
        lively_policy(domain=domain)


@pytest.mark.parametrize("options, message", [
    ({"safe_start": 1.5}, "safe_start must be a number between 0 and 1, got 1.5"),
    ({"safe_start": math.nan}, "safe_start must be a number between 0 and 1, got nan"),
    ({"info": ["trained"]}, "info must be a dict, got list"),
    ({"observations": 3}, "observations must be some of .*, got 3"),
    ({"observations": (["lr"],)}, "observations must be some of "),
])  # fmt: skip
def test_argument_of_another_type_is_refused(options, message):
    """It could be saved, and never be loaded again."""
    arguments = {"observations": OBSERVATION_NAMES, "controls": CONTROL_NAMES, **options}
    with pytest.raises(ValueError, match=message):
        SchedulePolicy(Perceptron(N, M, (4,)), **arguments)


def test_observations_that_are_all_the_same_make_a_domain():
    """A limit of zero would have the policy trusted nowhere, not even there."""
    observations = torch.full((50, N), 0.3)
    domain = Domain.of(observations)
    assert (domain.influence(observations) == 1).all()
    assert lively_policy(domain=domain).influence(observations[0]) == 1


@pytest.mark.parametrize("kind", ACTORS)
def test_products_that_overflow_are_no_action(kind):
    """Finite weights of 1e38 give ∞ − ∞, and so a learning rate of NaN."""
    made = actor(kind, N, M, (4, 4), "relu")
    made.load_state_dict({name: 3e38 * torch.randn_like(p).sign() for name, p in made.state_dict().items()})
    policy = SchedulePolicy(
        made, OBSERVATION_NAMES, CONTROL_NAMES, domain=DOMAIN._replace(whitening=3e38 * torch.eye(N))
    )
    for observations in (torch.randn(9, N), torch.randn(N)):
        action, _ = policy.act(observations)
        assert (action.abs() <= 1).all()
        assert (torch.as_tensor(policy.influence(observations)) == 0).all()


# --- What is malformed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, message", [
    ({SPEC: "[1"}, "rlsched.spec is not JSON"),
    ({SPEC: "[" * 10**5}, "rlsched.spec is not JSON: maximum recursion depth"),
    ({SPEC: "[]"}, "rlsched.spec must be a JSON object, got list"),
    ({SPEC: "{}"}, "is of version None of policy files"),
    ({SPEC: '{"version": 2}'}, r"rlsched.spec must have .*'actor'.*, it has \('version',\)"),
    ({INFO: "null"}, "rlsched.info must be a JSON object, got NoneType"),
    ({"safe_start": "yes"}, "safe_start must be a number between 0 and 1, got 'yes'"),
    ({"controls": [["lr"]]}, r"controls must be some of .*, got \[\['lr'\]\]"),
    ({"observations": [], "controls": []}, "inputs and outputs must be at least 1, got 0 and 0"),
    ({"actor": ["perceptron"]}, r"actor must be one of .*, got \['perceptron'\]"),
    ({"actor_options": {"hidden": [10**12], "activation": "tanh"}}, "hidden must come to at most 10,000,000 weights"),
    ({"actor_options": {"hidden": [1] * 10**5, "activation": "tanh"}}, "hidden must hold .* at most 64, got .* …$"),
    ({"domain.limit": None}, r"domain must have .*, it has \('mean', 'whitening'\)"),
    ({"layers.1.bias": None}, "(?s)can use: .*Missing key.*layers.1.bias"),
    ({"layers.1.bias": torch.zeros(M, dtype=torch.float64)}, "other numbers than float32"),
    ({"layers.1.bias": torch.zeros(10**12, 0)}, "(?s)can use: .*size mismatch for layers.1.bias"),
    ({"domain.mean": torch.zeros((1,) * 99)}, "domain: mean must have the shape"),
])  # fmt: skip
def test_malformed_file_is_told_from_a_damaged_one(changes, message, tmp_path):
    """Its checksum fits, so that somebody wrote it like this: what is wrong with it has to be said."""
    tensors, metadata = contents(lively_policy(domain=DOMAIN))
    spec = json.loads(metadata[SPEC])
    for key, value in changes.items():
        if key in spec:
            metadata[SPEC] = json.dumps(json.loads(metadata[SPEC]) | {key: value})
        elif key in metadata:
            metadata[key] = value
        elif value is None:
            del tensors[key]
        else:
            tensors[key] = value
    file = tmp_path / "policy.safetensors"
    file.write_bytes(signed(tensors, metadata))
    with pytest.raises(PolicyFileError, match=message):
        SchedulePolicy.load(file)


JUNK = [
    *(None, True, False, 0, 1, -1, 2, 10**12, -(10**12), 10**400, 0.5, math.nan, math.inf, -0.0),
    *("", "lr", "progress", "tanh", "perceptron", "\0", "ü" * 300),
    *([], [[]], ["lr"], ["lr", "lr"], [64, 64], [1] * 70, [10**12], [-1], [0], [True], [None], [1.5], {}, {"lr": {}}),
    *([1] * 10**5, {"hidden": [10**9, 10**9]}, {"inputs": 3}, {"name": "perceptron"}),
]
TEXTS = [
    *("", " ", "null", "[]", "{", "NaN", '"lr"', "\ufeff{}"),
    *("[" * 10**5, '{"a":' * 10**5, "[" * 500 + "]" * 500, "1" * 10**4),
]
SHAPES = [[], [0], [1], [10**12], [10**12, 0], [-1], [2**63], [2**64 - 1], [1] * 100, [2**32, 2**32], None, "4", [1.5]]


def nodes(tree, path=()):
    """The paths to all nodes of a JSON tree."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items)[:50]:
        yield from nodes(value, (*path, key))


def mutated(tree, draw):
    """A JSON tree with some of its nodes replaced, dropped, repeated or nested."""
    tree = {"": copy.deepcopy(tree)}
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        *above, last = draw.choice(list(nodes(tree))[1:])
        parent = tree
        for key in above:
            parent = parent[key]
        match draw.randrange(5):
            case 0 if above:
                del parent[last]
            case 1 if isinstance(parent, list):
                parent.insert(last, copy.deepcopy(parent[draw.randrange(len(parent))]))
            case 2 if isinstance(parent, dict):
                parent[draw.choice(["version", "name", "device", "hidden", "limit", ""])] = copy.deepcopy(
                    draw.choice(JUNK)
                )
            case 3:
                parent[last] = draw.choice([[parent[last]], {"": parent[last]}])
            case _:
                parent[last] = copy.deepcopy(draw.choice(JUNK))
        if not isinstance(tree.get(""), dict | list):
            break
    return tree.get("")


def said(text, draw):
    """Another text in place of JSON."""
    if draw.random() < 0.2:
        return draw.choice(TEXTS)
    if draw.random() < 0.1:
        return text.replace('"version"', '"version": 2, "version"', 1)
    return json.dumps(mutated(json.loads(text), draw))


def changed(tensors, draw):
    """Other tensors in place of a policy's."""
    tensors = dict(tensors)
    for _ in range(draw.choice([1, 1, 2])):
        name = draw.choice(list(tensors))
        tensor, other = tensors[name], tensors[draw.choice(list(tensors))]
        match draw.randrange(10):
            case 0 if len(tensors) > 1:
                del tensors[name]
            case 1:
                tensors[draw.choice([f"{name}.", "layers.9.weight", "domain.", "domain.mean", ""])] = tensor.clone()
            case 2:
                tensors[name] = other.clone()
            case 3:
                tensors[name] = tensor[None].clone()
            case 4:
                tensors[name] = tensor.reshape(-1)[: draw.randrange(tensor.numel() + 1)].clone()
            case 5:
                kinds = [torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.bool, torch.float8_e5m2]
                tensors[name] = tensor.to(draw.choice(kinds))
            case 6:
                tensors[name] = torch.zeros(draw.choice([(0,), (10**12, 0), (0, 0), (), (1,) * 30]))
            case 7 if tensor.numel() and tensor.dtype == torch.float32:
                value = draw.choice([math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-45, 0.0, -1.0])
                tensors[name] = tensor.clone()
                tensors[name].view(-1)[draw.randrange(tensor.numel())] = value
            case 8:
                for key in draw.sample(list(tensors), draw.randrange(len(tensors))):
                    if key.startswith("domain."):
                        del tensors[key]
            case _:
                tensors[name] = tensor * draw.choice([1e30, -1.0, 0.0]) if tensor.dtype == torch.float32 else tensor
    return tensors or {"": torch.zeros(())}


def rewritten(content, draw):
    """A file whose header of shapes, types and places says something else; its checksum is that of before."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = draw.choice(list(header))
    entry = header[name]
    if name == "__metadata__":
        header[name] = draw.choice([mutated(entry, draw), None, [], {**entry, DIGEST: draw.choice(["", "0" * 64])}])
    else:
        match draw.randrange(6):
            case 0:
                entry["shape"] = draw.choice(SHAPES)
            case 1:
                entry["dtype"] = draw.choice(["F64", "I32", "F16", "F8_E5M2", "F4", "C64", "U64", "F99", "", None, 1])
            case 2:
                entry["data_offsets"] = draw.choice([[0, 0], [0, 10**12], [-4, 0], [8, 4], [0], None, [0, 2**64]])
            case 3:
                header[draw.choice(["copy", "domain.mean", ""])] = entry
            case 4:
                del header[name]
            case _:
                header[name] = mutated(entry, draw)
    text = json.dumps(header).encode()
    if draw.random() < 0.1:
        text = draw.choice(
            [b"{" * 10**5, text[:-1], text + b"x", text.replace(b'"dtype"', b'"dtype":"F32","dtype"'), b""]
        )
    return struct.pack("<Q", len(text) if draw.random() < 0.9 else draw.choice([0, 1, 2**63, 10**9])) + text + data


def damaged(content, draw):
    """A file with bytes that are others, gone, or too many."""
    start, size = draw.randrange(len(content)), draw.choice([1, 2, 8, 100, 10**5])
    match draw.randrange(5):
        case 0:
            return content[:start]
        case 1:
            return content[:start] + content[start + size :]
        case 2:
            return content[:start] + content[start : start + size] + content[start:]
        case 3:
            return content[:start] + bytes(min(size, len(content) - start)) + content[start + size :]
        case _:
            altered = bytearray(content)
            for place in [draw.randrange(len(content)) for _ in range(draw.choice([1, 1, 2, 8]))]:
                altered[place] ^= 1 << draw.randrange(8)
            return bytes(altered)


def mutant(policies, draw):
    """The name of a way to spoil a policy file, and a file that is spoilt in that way."""
    tensors, metadata = draw.choice(policies)
    way = draw.choice(["spec", "info", "tensors", "header", "bytes", "all"])
    if way == "header":
        return way, rewritten(signed(tensors, metadata), draw)
    if way == "bytes":
        return way, damaged(signed(tensors, metadata), draw)
    if way in ("spec", "all"):
        metadata = {**metadata, SPEC: said(metadata[SPEC], draw)}
    if way in ("info", "all"):
        metadata = {**metadata, INFO: said(metadata[INFO], draw)}
    return way, signed(changed(tensors, draw) if way in ("tensors", "all") else tensors, metadata)


def fuzz(count, seed=0):
    """Load so many mutated files; how many of each kind were refused, and how many are policies still.

    A file is refused with PolicyFileError, or it is a policy whose actions are actions. Anything else is raised.
    """
    draw = random.Random(seed)
    torch.manual_seed(seed)
    made = SchedulePolicy.zero(), lively_policy(), *map(drawn, ACTORS)
    policies, digests = [contents(policy) for policy in made], {policy.digest for policy in made}
    outcomes = Counter()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        file = Path(folder) / "policy.safetensors"
        for _ in range(count):
            way, content = mutant(policies, draw)
            file.write_bytes(content)
            try:
                policy = SchedulePolicy.load(file)
            except PolicyFileError:
                outcomes[way, "refused"] += 1
                continue
            outcomes[way, "accepted"] += 1
            assert repr(policy)
            assert way not in ("header", "bytes") or policy.digest in digests, "damage that nobody has noticed"
            memory = policy.begin((3,))
            for scale in (0.0, 1.0, 1e6):
                action, memory = policy.act(scale * torch.randn(3, len(policy.observations)), memory)
                assert (action.abs() <= 1).all()
    return outcomes


def test_no_file_ends_in_an_undocumented_exception():
    """Whoever catches what `load` documents would be brought down by a file from the internet all the same.

    (`python tests/test_policy_files.py 100000` tries more of them.)
    """
    outcomes = fuzz(300)
    assert {way for way, _ in outcomes} == {"spec", "info", "tensors", "header", "bytes", "all"}
    assert outcomes["info", "accepted"] and outcomes["tensors", "accepted"], "who refuses all proves nothing"


if __name__ == "__main__":
    for outcome, number in sorted(fuzz(int(sys.argv[1])).items()):
        print(*outcome, number)
