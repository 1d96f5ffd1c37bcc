"""A run that is stopped, copied or pickled goes on as if it had not been, to the last bit."""

import copy
import io
import math
import pickle

import pytest
import torch
from helpers import assert_same_weights, lively_policy, loss_at, network, train

from rlsched import ScheduledOptimizer, SchedulePolicy, attach

# Windows of 5: decisions before the inner steps 1, 6, 11 and 16; the rest belongs to the last window.
STEPS, DECISIONS = 21, 5
OPTIONS = {"total_steps": STEPS, "decisions": DECISIONS}
STOPS = {
    "before the first step": 0,
    "after the probe": 1,
    "inside a window": 4,
    "at a decision": 6,
    "just after a decision": 7,
    "at the last decision": 16,
    "after the last decision": 19,
    "at the end": 21,
}
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01),
}


def saved_and_loaded(state):
    """The state after a trip through a file, read without pickle's dangers."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def whole_run(make):
    """The model and the hyperparameters of a run that never stopped."""
    model = network()
    optimizer = ScheduledOptimizer(make(model.parameters()), policy=lively_policy(), **OPTIONS)
    return model, train(model, optimizer, range(STEPS)), optimizer


def through_state_dict(make, model, optimizer):
    """A new process: new model, new optimizer, and the state from a file."""
    state = saved_and_loaded({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    model = network()
    optimizer = ScheduledOptimizer(make(model.parameters()), policy=lively_policy(), **OPTIONS)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return model, optimizer


def through_deepcopy(_, model, optimizer):
    """A copy, with the original trained on to other weights."""
    copies = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(50, 50 + STEPS - optimizer.controller.step_count))
    return copies


def through_pickle(_, model, optimizer):
    """What multiprocessing and older checkpoints do."""
    return pickle.loads(pickle.dumps((model, optimizer)))


@pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS)
@pytest.mark.parametrize("way", [through_state_dict, through_deepcopy, through_pickle])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_run_goes_on_bit_equal(make, way, stop):
    """A job that is preempted would train another network than one that is not."""
    expected, hyperparameters, end = whole_run(make)
    model = network()
    optimizer = ScheduledOptimizer(make(model.parameters()), policy=lively_policy(), **OPTIONS)
    before = train(model, optimizer, range(stop))
    model, optimizer = way(make, model, optimizer)
    assert before + train(model, optimizer, range(stop, STEPS)) == hyperparameters
    assert_same_weights(model, expected)
    assert repr(optimizer.controller.state) == repr(end.controller.state)  # of which NaN may be a part


@pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS)
def test_attached_controller_goes_on_bit_equal(stop):
    """A framework's own checkpoint of the optimizer, beside the controller's, would not resume the schedule."""
    make = OPTIMIZERS["AdamW"]
    expected, hyperparameters, _ = whole_run(make)
    model = network()
    inner = make(model.parameters())
    controller = attach(inner, policy=lively_policy(), **OPTIONS)
    before = train(model, inner, range(stop))
    state = saved_and_loaded([model.state_dict(), inner.state_dict(), controller.state_dict()])
    model = network()
    inner = make(model.parameters())
    controller = attach(inner, policy=lively_policy(), **OPTIONS)
    for part, saved in zip((model, inner, controller), state, strict=True):
        part.load_state_dict(saved)
    assert before + train(model, inner, range(stop, STEPS)) == hyperparameters
    assert_same_weights(model, expected)


@pytest.mark.parametrize("face", [ScheduledOptimizer, attach])
def test_run_saved_after_a_skipped_step_goes_on_bit_equal(face):
    """A step that GradScaler skips leaves its loss to the next one; the run that resumed would see another loss."""

    def start():
        model = network()
        inner = OPTIMIZERS["AdamW"](model.parameters())
        driver = face(inner, policy=lively_policy(), **OPTIONS)
        return model, inner, torch.amp.GradScaler("cpu", init_scale=2.0**16), driver

    def run(model, inner, scaler, driver, steps):
        optimizer, hyperparameters = inner if face is attach else driver, []
        for step in steps:
            optimizer.zero_grad()
            loss = loss_at(model, step)
            driver.observe(loss)
            scaler.scale(loss * (math.inf if step == 8 else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
            hyperparameters.append(inner.param_groups[0]["lr"])
        return hyperparameters

    parts, again = start(), start()
    before = run(*parts, range(9))
    assert (parts[3] if face is attach else parts[3].controller).step_count == 8
    state = saved_and_loaded([part.state_dict() for part in parts])
    after = run(*parts, range(9, STEPS))
    for part, saved in zip(again, state, strict=True):
        part.load_state_dict(saved)
    assert run(*again, range(9, STEPS)) == after
    assert_same_weights(again[0], parts[0])
    without = start()
    assert run(*without, range(8)) + run(*without, range(9, 15)) != before[:8] + after[:6]


def test_state_dict_is_a_snapshot():
    """A state kept in memory, to go back to, would change while training goes on."""
    model = network()
    optimizer = ScheduledOptimizer(OPTIMIZERS["SGD"](model.parameters()), policy=lively_policy(), **OPTIONS)
    train(model, optimizer, range(4))
    state = optimizer.controller.state_dict()
    before = copy.deepcopy(state)
    train(model, optimizer, range(4, STEPS))
    assert state == before
    assert state != optimizer.controller.state_dict()


def test_groups_that_came_later_are_in_the_state():
    """The base learning rate of a layer that was unfrozen before the stop would be the scheduled one after it."""
    model = network()
    optimizer = ScheduledOptimizer(OPTIMIZERS["SGD"](model[0].parameters()), policy=lively_policy(), **OPTIONS)
    train(model, optimizer, range(7))
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.02})
    train(model, optimizer, range(7, 9))
    resumed = network()
    resumed.load_state_dict(model.state_dict())
    groups = [{"params": resumed[0].parameters()}, {"params": resumed[2].parameters()}]
    fresh = ScheduledOptimizer(OPTIMIZERS["SGD"](groups), policy=lively_policy(), **OPTIONS)
    fresh.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert train(resumed, fresh, range(9, STEPS)) == train(model, optimizer, range(9, STEPS))
    assert_same_weights(resumed, model)


MISMATCHES = {
    "total_steps": ({"total_steps": 3}, "has done 4 steps, this one has total_steps=3"),
    "decisions": ({"decisions": 10}, "decisions=5, this one has 10"),
    "controls": ({"controls": ("lr",)}, "controls=.*momentum.*this one has \\['lr'\\]"),
    "policy": ({"policy": SchedulePolicy.zero()}, "policy="),
}


@pytest.mark.parametrize("options, message", MISMATCHES.values(), ids=MISMATCHES)
def test_state_of_another_kind_of_run_is_refused(options, message):
    """The second half of the run would follow another schedule than the first, or fail in the middle."""
    model = network()
    optimizer = ScheduledOptimizer(OPTIMIZERS["SGD"](model.parameters()), policy=lively_policy(), **OPTIONS)
    train(model, optimizer, range(4))
    other = ScheduledOptimizer(
        OPTIMIZERS["SGD"](network().parameters()), **{"policy": lively_policy(), **OPTIONS, **options}
    )
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(optimizer.state_dict())
    assert other.controller.step_count == 0
