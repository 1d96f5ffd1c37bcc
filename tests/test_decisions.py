"""The file of decisions that a run leaves, written by a run and read back."""

import copy
import json
import math

import pytest
import torch
from helpers import FACES, driven, lively_policy, network, train

from rlsched import ScheduledOptimizer, attach
from rlsched.decisions import HEAD, NAME, VERSION, read

pytest.importorskip("tensorboard")
STEPS, DECISIONS = 21, [1, 6, 11, 16]


def scheduled(folder, model, **options):
    """An optimizer with decisions before the inner steps of DECISIONS, which are written to a folder."""
    inner = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    options = {"total_steps": STEPS, "decisions": 5, "policy": lively_policy(), "log_dir": folder, **options}
    return ScheduledOptimizer(inner, **options)


@pytest.fixture
def finished(tmp_path):
    """The folder of a finished run."""
    train(model := network(), scheduled(tmp_path, model), range(STEPS))
    return tmp_path


def steps(folder):
    """When the run of a folder decided, by group."""
    return {name: [decision.step for decision in decisions] for name, decisions in read(folder).groups.items()}


@pytest.mark.parametrize("face", FACES)
def test_what_is_read_is_what_was_decided(face, tmp_path):
    """An explanation would be of other decisions than those that were made.

    To the bit: the policy, asked again what it saw, answers what it answered.
    """
    policy, model = lively_policy(), network()
    inner = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    optimizer, controller = driven(face, inner, total_steps=STEPS, decisions=5, policy=policy, log_dir=tmp_path)
    hyperparameters = []
    for step in range(STEPS):
        if face is attach:
            controller.observe(1.0)
            model(torch.ones(2, 6)).square().mean().backward()
            optimizer.step()
        else:
            train(model, optimizer, [step])
        hyperparameters.append(inner.param_groups[0]["lr"])
    run = read(tmp_path)
    assert run.policy == policy.digest and list(run.groups) == [""]
    assert [decision.step for decision in run.groups[""]] == DECISIONS
    for decision in run.groups[""]:
        action, _ = policy.act(torch.tensor(list(decision.observation.values())))
        assert list(decision.observation) == list(policy.observations)
        assert decision.action == pytest.approx(dict(zip(policy.controls, action.tolist(), strict=True)), rel=1e-8)
        assert decision.total_steps == STEPS and decision.influence == 1
        assert decision.proposed["lr"] == pytest.approx(hyperparameters[decision.step], rel=1e-6)
        assert math.isfinite(decision.loss)


def test_groups_have_their_own(tmp_path):
    """The decisions of two groups, mixed up, are those of neither."""
    model = network()
    inner = torch.optim.SGD([{"params": layer.parameters()} for layer in (model[0], model[2])], 0.1)
    optimizer = ScheduledOptimizer(
        inner, total_steps=STEPS, decisions=5, policy=lively_policy(), log_dir=tmp_path, per_group=True
    )
    train(model, optimizer, range(STEPS))
    assert steps(tmp_path) == dict.fromkeys(optimizer.controller.groups.names, DECISIONS)


def test_loss_that_was_not_reported_is_not_known(tmp_path):
    """JSON has no NaN: a file with one cannot be read by other programs, and a 0 would be a claim."""
    model = network()
    optimizer = scheduled(tmp_path, model)
    with pytest.warns(UserWarning, match="no loss was reported"):
        for _ in range(3):
            model(torch.ones(2, 6)).square().mean().backward()
            optimizer.step()
    (line,) = (tmp_path / NAME).read_text().splitlines()[1:]
    assert json.loads(line)["loss"] is None and math.isnan(read(tmp_path).groups[""][0].loss)


def test_resumed_run_goes_on_in_its_file(tmp_path):
    """What was decided after the checkpoint, and was lost, would be explained beside what took its place."""
    model = network()
    optimizer = scheduled(tmp_path, model)
    train(model, optimizer, range(8))
    state, weights = optimizer.state_dict(), copy.deepcopy(model.state_dict())
    train(model, optimizer, range(8, 18))
    with (tmp_path / NAME).open("ab") as file:
        file.write(b'{"step": 18, "obs')  # as a kill leaves it
    resumed = network()
    resumed.load_state_dict(weights)
    again = scheduled(tmp_path, resumed)
    again.load_state_dict(state)
    train(resumed, again, range(8, 13))
    assert steps(tmp_path) == {"": [1, 6, 11]}
    train(resumed, again, range(13, STEPS))
    assert steps(tmp_path) == {"": DECISIONS}


def test_new_run_takes_the_place_of_the_old_one(finished):
    """Two runs in one folder would be explained as one that decides everything twice; another policy's are no error."""
    other = lively_policy(seed=3)
    train(model := network(), scheduled(finished, model, policy=other), range(8))
    assert steps(finished) == {"": [1, 6]} and read(finished).policy == other.digest


def test_run_that_goes_back_in_place_decides_anew(tmp_path):
    """As above, where the same optimizer loads an earlier state."""
    model = network()
    optimizer = scheduled(tmp_path, model)
    train(model, optimizer, range(7))
    state = optimizer.state_dict()
    train(model, optimizer, range(7, 18))
    optimizer.load_state_dict(state)
    train(model, optimizer, range(7, 13))
    assert steps(tmp_path) == {"": [1, 6, 11]}


def test_new_run_of_other_groups_takes_the_place_of_the_old_one(finished):
    """A group that is no more would stay with a single decision."""
    model = network()
    inner = torch.optim.SGD([{"params": layer.parameters()} for layer in (model[0], model[2])], 0.1)
    options = {"total_steps": STEPS, "decisions": 5, "policy": lively_policy(), "log_dir": finished}
    optimizer = ScheduledOptimizer(inner, per_group=True, **options)
    train(model, optimizer, range(8))
    assert steps(finished) == {name: [1, 6] for name in optimizer.controller.groups.names}


def test_copy_does_not_write_into_the_originals_file(tmp_path):
    """Two runs would be taken for one that was resumed."""
    model = network()
    optimizer = scheduled(tmp_path, model)
    train(model, optimizer, range(8))
    train(*copy.deepcopy((model, optimizer)), range(8, STEPS))
    assert steps(tmp_path) == {"": [1, 6]}


def test_line_that_was_cut_off_is_left_out_with_a_note(finished):
    """A run that was killed is the one whose decisions are asked for."""
    path = finished / NAME
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.warns(UserWarning, match=rf"{NAME}, line 5, was cut off"):
        assert steps(finished) == {"": DECISIONS[:-1]}


HEADER = json.dumps(dict(zip(HEAD, (VERSION, "0" * 64), strict=True)))
ROW = {"step": 3, "total_steps": 9, "group": "", "loss": 1, "influence": 1}
ROW |= {"observation": {"progress": 0.1}, "action": {"lr": 0.1}, "proposed": {"lr": 0.1}}


@pytest.mark.parametrize(
    "content, message",
    [
        (None, f"has no {NAME}: it must be the log_dir of a scheduled run"),
        ("", "holds no decision yet"),
        (HEADER + "\n", "holds no decision yet"),
        ("step,loss\n1,2\n", "line 1, is no decision of a scheduled run"),
        ("[1]\n", "line 1, is no decision of a scheduled run"),
        ("\x00\xff\n", "line 1, is no decision of a scheduled run"),
        (json.dumps(ROW) + "\n", "line 1, .*: no line before it says of which policy"),
        (f"{HEADER}\n" + json.dumps(ROW | {"step": 10}) + "\n", "line 2, .*at most total_steps, got 10 of 9"),
        (f"{HEADER}\n" + json.dumps(ROW | {"action": 3}) + "\n", "line 2, is no decision"),
        (f"{HEADER}\n" + json.dumps(ROW | {"more": 3}) + "\n", "line 2, .*: it must have"),
        (HEADER.replace(f": {VERSION}", ": 99") + "\n", f"is of version 99 .* reads version {VERSION}"),
        (
            f"{HEADER}\n{json.dumps(ROW)}\n{HEADER.replace('0', '1')}\n{json.dumps(ROW | {'step': 5})}\n",
            "of several policies, sha256=0+ and 1+",
        ),
    ],
)
def test_what_is_no_record_of_a_run_is_refused(content, message, tmp_path):
    """A wrong folder would be explained, or end in a traceback from deep inside."""
    if content is not None:
        (tmp_path / NAME).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_missing_folder_is_named(tmp_path):
    """A slip of the keyboard in a path."""
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such folder"):
        read(tmp_path / "nowhere")


def test_another_file_of_that_name_is_left_alone(tmp_path):
    """What is somebody else's would be cut and added to."""
    (tmp_path / NAME).write_text("mine")
    with pytest.raises(ValueError, match="is not a file of decisions"):
        scheduled(tmp_path, network())
    assert (tmp_path / NAME).read_text() == "mine"
