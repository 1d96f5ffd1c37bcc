"""A run's schedule, frozen: plain numbers that replay it without a policy, and without rlsched."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import lively_policy, loss_at, network, train
from test_resume import saved_and_loaded
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR

from rlsched import FrozenSchedule, ScheduledOptimizer, SchedulePolicy, attach
from rlsched.control import LR
from rlsched.schedule import PROBE, with_lr

pytestmark = pytest.mark.filterwarnings("ignore:rlsched. the run moved momentum")  # as most policies here do

STEPS, DECISIONS = 60, 20  # windows of 3 after the probe, a last one of 2
OPTIONS = {"total_steps": STEPS, "decisions": DECISIONS}

# The replay as one would write it in a project without rlsched; torch and numpy are all that it finds.
REPLAY = """
import json, sys
sys.modules["rlsched"] = None
import numpy as np
import torch

def replay(name, options):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.003}]
    optimizer = getattr(torch.optim, name)(groups, **options)
    schedule = json.load(open(f"{name}.json"))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: float(np.interp(step, schedule["steps"], schedule["lr_factors"]))
    )
    lrs = []
    for step in range(schedule["total_steps"]):
        generator = torch.Generator().manual_seed(1000 + step)
        inputs = torch.randn(16, 6, generator=generator)
        loss = torch.nn.functional.cross_entropy(model(inputs), inputs[:, :3].argmax(-1))
        optimizer.zero_grad()
        loss.backward()
        lrs.append(scheduler.get_last_lr())
        optimizer.step()
        scheduler.step()
    torch.save((lrs, model.state_dict()), f"{name}.pt")

torch.set_num_threads(1)
for name, options in json.loads(sys.argv[1]).items():
    replay(name, options)
"""
RUNS = {"SGD": {"lr": 0.1, "momentum": 0.9}, "AdamW": {"lr": 0.01}}


def scheduled(model, name="SGD", lr=None, **options):
    """A scheduled optimizer whose second layer has a learning rate of its own."""
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.003}]
    inner = getattr(torch.optim, name)(groups, **{**RUNS[name], "lr": lr or RUNS[name]["lr"]})
    return ScheduledOptimizer(inner, **{**OPTIONS, **options})


def test_json_replays_the_run_without_rlsched(tmp_path):
    """Whoever ships the schedule to a machine without rlsched would train another network there."""
    runs = {}
    for name in RUNS:
        runs[name] = model, optimizer, hyperparameters = (
            (model := network()),
            scheduled(model, name, controls=["lr"]),
            [],
        )
        hyperparameters += train(model, optimizer, range(STEPS))
        optimizer.freeze().save(tmp_path / f"{name}.json")
    subprocess.run([sys.executable, "-c", REPLAY, json.dumps(RUNS)], cwd=tmp_path, check=True)
    for name, (model, _, hyperparameters) in runs.items():
        lrs, weights = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        expected = np.array([[lr for lr, _ in groups] for groups in hyperparameters])
        np.testing.assert_allclose(lrs, expected, rtol=1e-12)
        offsets = np.log(expected[:, 0] / expected[0, 0] * PROBE / (1 - np.arange(STEPS) / STEPS))
        assert np.ptp(offsets[1:]) > 0.5, "a policy that does not move proves nothing"
        torch.testing.assert_close(weights, dict(model.state_dict()), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "lr"), [("SGD", 0.1), ("AdamW", 0.01), pytest.param("SGD", 1e9, id="SGD that is probed again")]
)
def test_all_controls_are_those_of_the_run(name, lr):
    """A replay of momentum and clipping by hand would follow another run than the one that was good."""
    model = network()
    optimizer = scheduled(model, name, lr, policy=lively_policy())
    hyperparameters, multiples = [], []
    for step in range(STEPS):
        hyperparameters += train(model, optimizer, [step])
        multiples.append(optimizer.controller.groups.decided[0]["clip"])
    schedule = optimizer.freeze()
    windows = np.searchsorted(schedule.steps, range(STEPS), side="right") - 1
    momenta = np.array(schedule.values["momentum"])[windows]
    assert momenta.tolist() == [groups[0][1] for groups in hyperparameters]
    assert np.array(schedule.values["clip"])[windows].tolist() == multiples
    assert len(set(multiples)) > 3
    growth = (1 - momenta) / (1 - 0.9) if name == "SGD" else 1
    lrs = lr * np.array([schedule(step) for step in range(STEPS)]) * growth
    np.testing.assert_allclose(lrs, [groups[0][0] for groups in hyperparameters], rtol=1e-12)
    assert (optimizer.controller.state.lr_offset < 0) == (lr == 1e9)


@pytest.mark.parametrize("total_steps", [1, 2, 7, 250])
def test_zero_policy_freezes_to_linear_decay(total_steps):
    """A knot that is off by one step would bend every schedule a little."""
    model = network()
    optimizer = ScheduledOptimizer(
        torch.optim.SGD(model.parameters(), 0.1), total_steps=total_steps, policy=SchedulePolicy.zero(), decisions=5
    )
    train(model, optimizer, range(total_steps))
    schedule = optimizer.freeze()
    steps = range(total_steps)
    assert [schedule(n) for n in steps] == pytest.approx([1 - n / total_steps for n in steps], rel=1e-12)
    assert schedule(total_steps + 5) == schedule(total_steps - 1)
    assert set(schedule.values["momentum"]) == {0}


@pytest.mark.parametrize(("stop", "lr"), [(0, 0.1), (1, 0.1), (59, 0.1), (20, 1e9)])
def test_resumed_run_freezes_whole(stop, lr):
    """The schedule of a job that was preempted would lack all that came before, or what a second probe found."""
    model = network()
    whole = scheduled(model, lr=lr, policy=lively_policy())
    train(model, whole, range(STEPS))
    model = network()
    optimizer = scheduled(model, lr=lr, policy=lively_policy())
    train(model, optimizer, range(stop))
    state = saved_and_loaded(optimizer.state_dict())
    optimizer = scheduled(model, lr=lr, policy=lively_policy())
    optimizer.load_state_dict(state)
    train(model, optimizer, range(stop, STEPS))
    assert optimizer.freeze() == whole.freeze()


def test_cut_that_the_control_cannot_reach_is_frozen():
    """A run that only survived since its learning rate was cut would diverge when replayed."""
    model = network()
    optimizer = scheduled(model, policy=SchedulePolicy.zero())
    controller = optimizer.controller
    controller.states = [with_lr(controller.state, LR.low + 1)]  # taken up at the first decision, before step 1
    hyperparameters = train(model, optimizer, range(4))
    for _ in range(4, 7):
        for p in model.parameters():
            p.grad = torch.full_like(p, math.nan)
        optimizer.step(loss=math.nan)
    hyperparameters += train(model, optimizer, range(7, STEPS))
    schedule = optimizer.freeze()
    cut = math.exp(LR.low + 1) / 10
    assert [schedule(n) for n in range(7, STEPS)] == pytest.approx([cut * (1 - n / STEPS) for n in range(7, STEPS)])
    lrs = [groups[0][0] for groups in hyperparameters]
    assert [0.1 * schedule(n) for n in (*range(4), *range(7, STEPS))] == pytest.approx(lrs, rel=1e-12)


def test_unfinished_run_holds_its_last_decision():
    """The rest of the schedule would be made up without a word."""
    model = network()
    controller = attach(torch.optim.SGD(model.parameters(), 0.1, 0.9), policy=lively_policy(), **OPTIONS)
    for step in range(12):
        controller.optimizer.zero_grad()
        loss_at(model, step).backward()
        controller.observe(1.0)
        controller.optimizer.step()
    with pytest.warns(UserWarning, match="step 12 of 60: its last decision is held"):
        schedule = controller.freeze()
    held = math.exp(controller.state.control["lr"])
    steps = range(10, STEPS)
    assert [schedule(n) for n in steps] == pytest.approx([(1 - n / STEPS) * held for n in steps], rel=1e-12)


def test_scheduler_that_is_followed_is_not_frozen():
    """A warm-up that the schedule lacks would be missed at the first step of the replay."""
    model = network()
    optimizer = scheduled(model, follow_scheduler=True)
    scheduler = ExponentialLR(optimizer, 0.9)
    train(model, optimizer, range(3))
    scheduler.step()
    with pytest.raises(ValueError, match="follow_scheduler=True"):
        optimizer.freeze()


def test_run_in_shadow_mode_is_not_frozen():
    """Proposals that nobody followed would pass for a schedule that was good."""
    with pytest.raises(ValueError, match="shadow=True"):
        scheduled(network(), shadow=True).freeze()


@pytest.fixture
def schedule():
    """The frozen schedule of a short run with every control on the move."""
    model = network()
    optimizer = scheduled(model, policy=lively_policy())
    train(model, optimizer, range(STEPS))
    return optimizer.freeze()


def test_file_holds_the_same_schedule_in_plain_json(schedule, tmp_path):
    """A schedule that changes on disk, or that only Python's own JSON can read, is of no use elsewhere."""
    path = schedule.save(tmp_path / "new folder" / "schedule.json")
    assert FrozenSchedule.load(path) == schedule
    values = json.loads(path.read_text(), parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert values["base_lrs"] == [0.1, 0.003]


def test_lambda_lr_goes_on_from_its_state(schedule):
    """A replay that is preempted would go on with another learning rate."""

    def replay():
        optimizer = torch.optim.SGD(network().parameters(), 0.1)
        return optimizer, LambdaLR(optimizer, schedule)

    def lrs(optimizer, scheduler, steps):
        found = []
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
            found.append(optimizer.param_groups[0]["lr"])
        return found

    expected = lrs(*replay(), STEPS)
    assert expected == [0.1 * schedule(n + 1) for n in range(STEPS)]
    first = replay()
    before = lrs(*first, 20)
    second = replay()
    for part, saved in zip(second, saved_and_loaded([part.state_dict() for part in first]), strict=True):
        part.load_state_dict(saved)
    assert before + lrs(*second, STEPS - 20) == expected


DAMAGES = {
    "truncated": (lambda text: text[:100], "holds no schedule"),
    "no object": (lambda text: "[1, 2]", "version 2"),
    "another version": (lambda text: text.replace('"version": 2', '"version": 1'), "version 2"),
    "unknown field": (lambda text: text.replace('"steps"', '"knots"'), "knots"),
    "late beginning": (
        lambda text: text.replace('"steps": [0, ', '"steps": ['),
        r"steps must rise from 0 on, got \[1, 3, 4, 6, …\]",
    ),
    "another end": (lambda text: text.replace('"total_steps": 60', '"total_steps": 50'), "steps − 1 = 49.* got 59"),
    "one value more": (
        lambda text: text.replace('"lr_factors": [', '"lr_factors": [1, '),
        "lr_factors.*41 steps, got 42",
    ),
    "negative lr": (lambda text: text.replace('"lr_factors": [', '"lr_factors": [-'), "lr_factors must be finite and"),
    "momentum of 1": (
        lambda text: text.replace('"momentum": [0.9', '"momentum": [1.0'),
        r"values\['momentum'\].*in \[0, 1\), got \[1.0",
    ),
    "no clipping": (
        lambda text: text.replace('"clip": [', '"clip": [-'),
        r"values\['clip'\] must be finite and positive",
    ),
    "one momentum more": (
        lambda text: text.replace('"momentum": [', '"momentum": [0.5, '),
        r"values\['momentum'\] must have a value for each of the 41 steps, got 42",
    ),
    "unknown control": (lambda text: text.replace('"clip"', '"warp"'), r"some of the controls .*got \['warp'\]"),
    "unknown base schedule": (lambda text: text.replace('"linear"', '"cosine"'), "base_schedule must be one of"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGES.values(), ids=DAMAGES)
def test_file_that_is_no_schedule_is_refused(schedule, tmp_path, change, message):
    """A damaged file would train at a learning rate that nobody chose."""
    path = schedule.save(tmp_path / "schedule.json")
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=f"schedule.json.*{message}"):
        FrozenSchedule.load(path)


def test_replay_of_the_learning_rate_alone_warns_where_momentum_moved():
    """Half of a schedule is another schedule: with momentum summed up, its learning rate alone is too large."""
    one = FrozenSchedule(9, "linear", (0.1,), (0, 8), (1.0, 0.1), {"momentum": (0.9, 0.9)})
    two = FrozenSchedule(9, "linear", (0.1,), (0, 8), (1.0, 0.1), {"momentum": (0.9, 0.5)})
    assert one(4) == pytest.approx(0.55)
    with pytest.warns(UserWarning, match=r"momentum, between 0.5 and 0.9") as caught:
        assert two(4) == two(4) == pytest.approx(0.55)
    assert len(caught) == 1
