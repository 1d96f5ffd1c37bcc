"""A state is saved and resumed, by torch.distributed.checkpoint's helpers too (in test_distributed by two ranks); and
what is none is refused.
"""

import copy
import io
import math
import warnings
from operator import is_

import pytest
import torch
from helpers import assert_finite_weights, assert_same_weights, lively_policy, loss_at, network, train
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from rlsched import ScheduledOptimizer, SchedulePolicy, attach
from rlsched.actors import Recurrent, actor
from rlsched.checkpoint import STATE_KEY
from rlsched.signals import OBSERVATION_NAMES

OPTIONS = {"total_steps": 21, "decisions": 5}
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1),  # without any state of its own
    "SGD, momentum": lambda p: torch.optim.SGD(p, 0.1, 0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "AdamW, tensor lr": lambda p: torch.optim.AdamW(p, torch.tensor(0.01)),
}
WAYS = {
    "tree": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True, cpu_offload=True),
}
FACES = [ScheduledOptimizer, attach]
KINDS = [(kind, way) for kind in OPTIMIZERS for way in WAYS if (kind, way) != ("SGD", "full")]  # which torch refuses


def driven(face, make, **options):
    """A model, the optimizer to step and the controller, for either face."""
    model = network()
    inner = make(model.parameters())
    driver = face(inner, policy=lively_policy(), **OPTIONS, **options)
    return (model, inner, driver) if face is attach else (model, driver, driver.controller)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("kind, way", KINDS)
@pytest.mark.parametrize("face", FACES)
def test_run_from_a_checkpoint_goes_on_bit_equal(kind, way, face, tmp_path):
    """The helpers keep what they know, so that a schedule saved elsewhere would start anew with old weights."""
    make, way = OPTIMIZERS[kind], WAYS[way]
    model, optimizer, controller = driven(face, make)

    def state(model, optimizer, controller):
        weights, state = get_state_dict(model, optimizer, options=way)
        return {"model": weights, "optimizer": state, **({"schedule": controller} if face is attach else {})}

    before = train(model, optimizer, range(9))
    save(state(model, optimizer, controller), checkpoint_id=tmp_path, no_dist=True)
    expected = before + train(model, optimizer, range(9, 21))
    again = driven(face, make)
    loaded = state(*again)
    load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(*again[:2], model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"], options=way)
    assert before + train(*again[:2], range(9, 21)) == expected
    assert_same_weights(again[0], model)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_optimizer_alone_is_set_without_a_template(way):
    """A state in memory, or of torch.save, is set without the fresh optimizer having been asked for its own."""
    model, optimizer, _ = driven(ScheduledOptimizer, OPTIMIZERS["AdamW"])
    train(model, optimizer, range(9))
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=way))
    again, fresh, _ = driven(ScheduledOptimizer, OPTIMIZERS["AdamW"])
    again.load_state_dict(model.state_dict())
    set_optimizer_state_dict(again, fresh, state, options=way)
    assert train(again, fresh, range(9, 21)) == train(model, optimizer, range(9, 21))
    assert_same_weights(again, model)


@pytest.mark.parametrize("steps", [0, 9])
@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_step_that_creates_state_is_no_inner_step(make, face, steps):
    """The helpers make a step with a learning rate of 0 and zeros for gradients. As an inner step it would be the
    probe, or one of a window, and would move the weights at the learning rate of the schedule.
    """
    model, optimizer, controller = driven(face, make)
    train(model, optimizer, range(steps))
    controller.observe(0.5)  # of a step that a GradScaler skipped
    optimizer.zero_grad()
    before, weights = controller.state_dict(), copy.deepcopy(model)
    get_optimizer_state_dict(model, optimizer)
    assert controller.state_dict() == before
    assert_same_weights(model, weights)
    assert bool(optimizer.state) == (make is not OPTIMIZERS["SGD"])


def test_real_step_at_a_learning_rate_of_zero_counts():
    """The first step of a warm-up would be taken for one of the helpers', and the schedule would be late by a step."""
    model, optimizer, controller = driven(ScheduledOptimizer, OPTIMIZERS["AdamW"], follow_scheduler=True)
    optimizer.param_groups[0]["lr"] = 0.0
    loss_at(model, 0).backward()
    optimizer.observe(0.5)
    optimizer.step()
    assert controller.step_count == 1


# --- What cannot be is refused --------------------------------------------------------------------------------------


def contents(state_dict):
    """All that is in a controller's state, as nested containers."""
    return torch.load(io.BytesIO(state_dict[STATE_KEY]), weights_only=True)


def forged(state_dict, change):
    """A state_dict with something changed in the controller's state."""
    plain = contents(state_dict)
    change(plain)
    file = io.BytesIO()
    torch.save(plain, file)
    return {**state_dict, STATE_KEY: file.getvalue()}


def running(steps, face=ScheduledOptimizer):
    """A run of some steps that is rolled back if need be, as `driven` gives it."""
    parts = driven(face, OPTIMIZERS["SGD, momentum"], on_divergence="rollback")
    train(*parts[:2], range(steps))
    return parts


def everything(model, optimizer, controller):
    """All that a load could change, to the last bit."""
    inner = getattr(optimizer, "optimizer", optimizer)
    live = (
        [p.detach().tolist() for p in model.parameters()],
        str(inner.state_dict()),
        id(inner.state),
        id(inner.param_groups),
    )
    guard, meter = controller.guard, controller.meter
    return repr(
        (live, contents(controller.state_dict()), id(guard.snapshot), id(meter.records), controller.groups.decided)
    )


FORGED = {
    "NaN for a control": (["schedule", 0, "control", "lr"], math.nan, r"schedule\[0\].control.lr must be finite"),
    "control out of range": (
        ["schedule", 0, "control", "lr"],
        11.0,
        r"schedule\[0\].control.lr must be in \[-7, 9\], got 11.0",
    ),
    "number as text": (["schedule", 0, "lr_offset"], "0", r"schedule\[0\].lr_offset must be a number, got '0'"),
    "truth for a number": (["schedule", 0, "control", "clip"], True, r"schedule\[0\].control.clip must be a number"),
    "step that is none": (["schedule", 0, "step"], 3.0, r"window_start|schedule\[0\].step must be an int"),
    "negative step": (["schedule", 0, "step"], -1, r"schedule\[0\].step must be finite and in \[0, "),
    "step of another window": (
        ["schedule", 0, "step"],
        12,
        r"schedule\[0\].step must be at most the end of its window, 11",
    ),
    "window that never ends": (["schedule", 0, "window_end"], 3, r"schedule\[0\].window_end must be behind its start"),
    "another base": (
        ["schedule", 0, "base", "momentum"],
        2.0,
        r"schedule\[0\].base.momentum must be 1.0*, the base value's",
    ),
    "infinite history": (
        ["schedule", 0, "history", "slow_loss"],
        math.inf,
        r"schedule\[0\].history.slow_loss must be finite",
    ),
    "guard with a key": (["guard", "wings"], 1, r"another version of rlsched: guard has an unknown 'wings'"),
    "guard of numbers": (["guard"], 3, r"guard must be a dict, got 3"),
    "ceiling": (["schedule", 0, "bound"], math.nan, r"schedule\[0\].bound must be finite and in \[-7, 9\]"),
    "count": (["guard", "nonfinite"], "many", r"guard.nonfinite must be an int, got 'many'"),
    "interventions": (
        ["guard", "interventions"],
        [{"step": 1, "message": 2}],
        r"interventions\[0\].message must be a str",
    ),
    "shape of records": (
        ["meter", "records"],
        torch.zeros(3, 3),
        r"meter.records must be a float32 tensor of shape \(rows, 28\), with 5 to 1024 rows",
    ),
    "type of records": (["meter", "records"], [1.0], r"meter.records must be a Tensor, got \[1.0\]"),
    "gradient": (
        ["meter", "last_grads"],
        [torch.zeros(3, dtype=torch.int64)],
        r"meter.last_grads\[0\] must be a float32 tensor",
    ),
    "average norm": (["meter", "average_norm"], -1.0, r"meter.average_norm must be finite and in \[0, inf\]"),
    "flag": (["meter", "loss_was_reported"], 1, r"meter.loss_was_reported must be a bool, got 1"),
    "losses": (["meter", "losses"], ["1"], r"meter.losses\[0\] must be a number"),
    "base lr": (["bases", 0, "lr"], math.nan, r"bases\[0\].lr must be finite and not negative, got nan"),
    "base momentum": (["bases", 0, "momentum"], 1.0, r"bases\[0\].momentum must be in \[0, 1\)"),
    "no groups": (["bases"], [], r"bases must be those of at least one parameter group"),
    "too many groups": (
        ["bases"],
        [{"lr": 1.0, "momentum": 0.9, "clip": 1.0, "weight_decay": 0.1}] * 2,
        r"exponents|base",
    ),
    "ceiling of the schedule": (
        ["schedule", 0, "ceiling"],
        10.0,
        r"schedule\[0\].ceiling must be finite and in \[-7, 9.25\], got 10.0",
    ),
    "noise": (["guard", "noise"], -1.0, r"guard.noise must be finite and in \[0, inf\], got -1.0"),
    "loss beyond floats": (["guard", "first"], 1e300, r"guard.first must be finite and in \[-104, 89\]"),
    "windows lost": (["guard", "lost"], 1.5, r"guard.lost must be an int, got 1.5"),
    "windows dead": (["guard", "dead"], -2, r"guard.dead must be finite and in \[-1, "),
    "on trial": (["guard", "on_trial"], 1, r"guard.on_trial must be a bool, got 1"),
    "validation to come": (["validation", "step"], 10, r"validation.step must be at most the step, 9, got 10"),
    "best validation": (["validation", "best"], math.inf, r"validation.best must be finite"),
    "length": (["total_steps"], 22, r"total_steps must be 21, as in the last of the windows, or None, got 22"),
    "length as text": (["total_steps"], "21", r"total_steps must be an int, got '21'"),
    "length of a window": (["windows", 1, "total_steps"], 0, r"windows\[1\].total_steps must be finite and in \[1, "),
    "knots": (["windows", 1, "knots"], [[0.5, 1.0], [1.0, 0.0]], r"windows\[1\].knots must be pairs of a fraction"),
    "three of a pair": (["windows", 1, "knots"], [[0.0, 1.0, 1.0], [1.0, 0.0]], r"windows\[1\].knots must be pairs"),
    "factor": (
        ["windows", 1, "knots"],
        [[0.0, 2.0], [1.0, 0.0]],
        r"windows\[1\].knots\[0\]\[1\] must be finite and in",
    ),
    "kept": (["kept"], {"best": None}, r"kept lacks 'average'"),
    "kept weights": (["kept", "best"], {"step": 3, "tensors": [1.0]}, r"kept.best.tensors\[0\] must be a Tensor"),
    "other weights": (["kept", "average"], {"step": 3, "tensors": [torch.ones(1)]}, r"kept.average must be a copy of"),
    "skipped": (["skipped"], 2.5, r"skipped must be an int, got 2.5"),
    "huge count": (["skipped"], 10**400, r"skipped must be finite"),
    "windows": (["windows"], [], r"windows must be in their order from the first step on, got \[\]"),
    "exponents": (["exponents"], [1, 2], r"exponents must be one for each group, or none"),
    "exponent": (["exponents"], [5000], r"exponents\[0\] must be finite and in \[-64, 64\]"),
    "snapshot": (["snapshot"], {"tensors": []}, r"snapshot lacks "),
}


@pytest.mark.parametrize("path, value, message", FORGED.values(), ids=FORGED)
@pytest.mark.parametrize("face", FACES)
def test_forged_state_is_refused_and_nothing_is_changed(face, path, value, message):
    """It would load, and end the run in the middle, or train at a learning rate of NaN; or be loaded by halves."""
    saved, parts = running(9, face), running(13, face)

    def change(plain):
        *way, last = path
        for key in way:
            plain = plain[key]
        plain[last] = value

    state = forged(saved[2].state_dict() if face is attach else saved[1].state_dict(), change)
    before = everything(*parts)
    with pytest.raises(ValueError, match=f"state_dict.*({message})"):
        (parts[2] if face is attach else parts[1]).load_state_dict(state)
    assert everything(*parts) == before
    assert train(*parts[:2], range(13, 21)) == train(*running(13, face)[:2], range(13, 21))


@pytest.mark.parametrize("face", FACES)
def test_refused_state_leaves_length_and_kept_weights(face):
    """The best weights of one run would be those of another, or its learning rate decay to another end."""
    options = {"keep_best": True, "averaging": True, "patience": 3}

    def validated(steps, loss):
        parts = driven(face, OPTIMIZERS["SGD, momentum"], **options)
        train(*parts[:2], range(steps))
        parts[2].observe_validation(loss)
        return parts

    saved, parts = validated(13, 0.5), validated(9, 0.7)
    parts[2].extend(11)
    saved, into = (each[2 if face is attach else 1] for each in (saved, parts))
    before, best = (everything(*parts), parts[2].length, parts[2].run), list(parts[2].kept.best.tensors)
    state = saved.state_dict()
    for broken in (state, forged(state, lambda plain: plain["kept"]["average"]["tensors"].reverse())):
        with pytest.raises(ValueError, match=r"has done 13 steps, this one has total_steps=11|kept.average must be"):
            into.load_state_dict(broken)
        assert (everything(*parts), parts[2].length, parts[2].run) == before
        assert all(map(is_, parts[2].kept.best.tensors, best))
    parts[2].extend(30)
    into.load_state_dict(state)
    assert (parts[2].total_steps, parts[2].validation.best) == (30, 0.5)
    for mine, others in zip(parts[2].kept.best.tensors, contents(state)["kept"]["best"]["tensors"], strict=True):
        assert torch.equal(mine, others)


@pytest.mark.parametrize("memory", [None, 3, torch.zeros(3), torch.full((2 * Recurrent.UNITS,), math.nan)], ids=repr)
def test_forged_memory_is_refused(memory):
    """A policy would remember what nobody has seen, and act on it, or fail in the next decision."""
    torch.manual_seed(0)
    policy = SchedulePolicy(actor("recurrent", 4, 2), OBSERVATION_NAMES[:4], ["lr", "momentum"])

    def started():
        model = network()
        return model, ScheduledOptimizer(OPTIMIZERS["AdamW"](model.parameters()), policy=policy, **OPTIONS)

    model, optimizer = started()
    train(model, optimizer, range(9))
    state = optimizer.state_dict()
    _, other = started()
    other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"schedule\[0\]\.memory must be finite, and like what the policy begins with"):
        other.load_state_dict(forged(state, lambda plain: plain["schedule"][0].update(memory=memory)))


@pytest.mark.parametrize("part, index", [("tensors", 1), ("optimizer_state", 2), ("schedule", None), ("guard", None)])
def test_forged_snapshot_is_refused(part, index):
    """It would be found out when the run has to go back to it."""
    parts = running(1)
    state = parts[1].state_dict()
    for value in (torch.zeros(1), "x", {"step": 1}):

        def change(plain, value=value):
            if index is None:
                plain["snapshot"][part] = value
            else:
                plain["snapshot"][part][index] = value

        if (part, value) == ("optimizer_state", {"step": 1}):
            continue
        with pytest.raises(ValueError, match=f"snapshot.{part}"):
            parts[1].load_state_dict(forged(state, change))


@pytest.mark.parametrize("state", [b"", b"PK", b"\x80\x02.", None, 3, "text", {}, bytes(1000)])
def test_bytes_that_are_none_of_a_state_are_refused(state):
    """A file that was cut would be an error of zip archives or pickles."""
    parts = running(3)
    before = everything(*parts)
    with pytest.raises(ValueError, match="state_dict"):
        parts[1].load_state_dict({**parts[1].state_dict(), STATE_KEY: state})
    with pytest.raises(ValueError, match="state_dict"):
        parts[2].load_state_dict({STATE_KEY: state})
    assert everything(*parts) == before


def test_state_that_the_optimizer_refuses_leaves_the_schedule_as_it_was():
    """The schedule of one run would go on with the buffers of another one."""
    parts, other = running(9), running(13)

    class Failing(torch.optim.SGD):
        def __setstate__(self, state):
            super().__setstate__(state)
            if hasattr(self, "fails"):
                raise RuntimeError("after all")

    state = parts[1].state_dict()
    groups = {"param_groups": [{**state["param_groups"][0], "params": [0, 1]}]}
    before = everything(*other)
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        other[1].load_state_dict({**state, **groups})
    assert everything(*other) == before
    late = driven(ScheduledOptimizer, lambda p: Failing(p, 0.1, 0.9))
    train(*late[:2], range(5))
    late[1].optimizer.fails = True
    before = everything(*late)
    for broken in (state, {key: value for key, value in state.items() if key != STATE_KEY}):
        with pytest.raises(RuntimeError, match="after all"):
            late[1].load_state_dict(broken)
        assert everything(*late) == before


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 7, 10**30, 0.0, -0.0, 1e-300, 1e300, math.nan, math.inf, -math.inf, "", "lr", b"x"]),
    st.integers(),
    st.floats(),
    st.sampled_from(
        [[], {}, (), [1.0], {"lr": 1.0}, [{}], torch.zeros(0), torch.full((5, 28), math.nan), torch.ones(2, 2)]
    ),
)


def places(value, path=()):
    """The ways to all that is in nested containers."""
    found = [path] if path else []
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, each in entries:
        found += places(each, (*path, key))
    return found


def mutated(value, path, new, action):
    """Nested containers in which what is at the end of a way is replaced, left out, or has company."""
    (key, *rest), whole = path, type(value)(value)
    entries = list(whole) if isinstance(whole, tuple) else whole
    if rest:
        entries[key] = mutated(entries[key], rest, new, action)
    elif action == "replace":
        entries[key] = new
    elif action == "remove":
        del entries[key]
    elif isinstance(entries, dict):
        entries["more"] = new
    else:
        entries.insert(key, new)
    return type(value)(entries)


mutations = st.lists(
    st.tuples(st.integers(0, 10**6), ODD, st.sampled_from(["replace", "remove", "add"])), min_size=1, max_size=2
)
mutating = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def with_mutations(plain, mutations):
    """Nested containers after each of these."""
    for where, new, action in mutations:
        ways = places(plain)
        plain = mutated(plain, ways[where % len(ways)], new, action)
    return plain


@mutating
@given(stop=st.sampled_from([1, 4, 7, 21]), mutations=mutations)
def test_mutated_state_loads_and_trains_or_is_refused(stop, mutations):
    """The one that nobody thought of."""
    saved = running(stop)
    state = saved[1].state_dict()
    plain = with_mutations(contents(state), mutations)
    file = io.BytesIO()
    torch.save(plain, file)
    parts = running(2)
    before = everything(*parts)
    try:
        parts[1].load_state_dict({**state, STATE_KEY: file.getvalue()})
    except ValueError as error:
        assert "state_dict" in str(error)
        assert everything(*parts) == before
        return
    assert contents(parts[1].state_dict()).keys() == plain.keys()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for ((lr, momentum),) in train(*parts[:2], range(12)):
            assert 0 <= lr < 0.1 * math.exp(7) * 100
            assert 0 <= momentum < 1
    assert_finite_weights(parts[0])


@mutating
@given(mutations=mutations)
@pytest.mark.filterwarnings("ignore:rlsched. state_dict has no 'rlsched'")
def test_mutated_state_of_the_optimizer_is_loaded_whole_or_not_at_all(mutations):
    """Whatever torch says of it, or a framework's hook: the run goes on if that is caught."""
    state = with_mutations(running(9)[1].state_dict(), mutations)
    parts = running(2)
    before = everything(*parts)
    try:
        parts[1].load_state_dict(state)
    except Exception:
        assert everything(*parts) == before
        train(*parts[:2], range(2, 4))


@pytest.mark.parametrize("stop", [0, 1, 15])
def test_run_that_starts_at_a_part_of_what_is_safe_is_resumed(stop):
    """The part was taken for a yes or a no, and no checkpoint of such a run could be loaded."""

    def optimizer(model):
        inner = torch.optim.SGD(model.parameters(), 0.1, 0.9)
        return ScheduledOptimizer(inner, total_steps=30, policy=lively_policy(safe_start=0.3))

    model, other = network(), network()
    one = optimizer(model)
    train(model, one, range(stop))
    other.load_state_dict(model.state_dict())
    again = optimizer(other)
    again.load_state_dict(copy.deepcopy(one.state_dict()))
    assert train(model, one, range(stop, 30)) == train(other, again, range(stop, 30))
    assert_same_weights(model, other)
