"""Optimizers of other packages, and what is built around optimizers: hooks, compiled steps."""

import warnings

import pytest
import torch
from helpers import FACES, assert_finite_weights, assert_same_weights, driven, lively_policy, loss_at, network

from rlsched import ScheduledOptimizer, SchedulePolicy, attach

STEPS = 20


def train_by_closure(model, optimizer, steps=range(STEPS)):
    """Train with closures, which some optimizers need; returns the losses of all evaluations."""
    losses = []
    for step in steps:

        def closure(step=step):
            optimizer.zero_grad()
            loss = loss_at(model, step)
            loss.backward()
            losses.append(loss.item())
            return loss

        optimizer.step(closure)
    return losses


# --- schedulefree ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("kind", ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"])
def test_schedulefree_trains_and_evaluates_at_its_own_weights(kind, face):
    """Without train() and eval() on the wrapper, a user would evaluate at the weights that are trained at."""
    schedulefree = pytest.importorskip("schedulefree")
    model, initial = network(), network()
    inner = getattr(schedulefree, kind)(model.parameters(), lr=0.01)
    optimizer, _ = driven(face, inner, total_steps=STEPS)
    optimizer.train()
    train_by_closure(model, optimizer)
    at_training = model[0].weight.clone()
    optimizer.eval()
    assert not torch.equal(model[0].weight, at_training)
    optimizer.train()
    torch.testing.assert_close(model[0].weight, at_training)
    assert not torch.equal(model[0].weight, initial[0].weight)
    assert_finite_weights(model)


def test_momentum_of_schedulefree_is_no_sum_of_gradients():
    """Its momentum mixes two sets of weights: learning rates scaled for a sum would be ten times too small."""
    schedulefree = pytest.importorskip("schedulefree")
    inner = schedulefree.SGDScheduleFree(network().parameters(), lr=0.01)
    optimizer = ScheduledOptimizer(inner, total_steps=9, policy=lively_policy())
    assert not optimizer.controller.groups.traits.sums_gradients


def test_optimizers_without_modes_ignore_them():
    """Frameworks call train() and eval() on every optimizer that has them."""
    model = network()
    optimizer = ScheduledOptimizer(torch.optim.SGD(model.parameters(), 0.1), total_steps=9, policy=lively_policy())
    optimizer.eval()
    optimizer.train()
    assert_same_weights(model, network())


# --- pytorch_optimizer and prodigyopt -------------------------------------------------------------------------------

NAMES = ["adabelief", "adafactor", "adan", "came", "lamb", "lars", "lion", "madgrad", "ranger", "schedulefreeadamw"]
NAMES += ["sgdp", "shampoo", "soap", "stableadamw", "tiger"]


def of_package(name, model):
    """An optimizer of pytorch_optimizer."""
    package = pytest.importorskip("pytorch_optimizer")
    if name == "SAM":  # evaluates the closure twice
        return package.SAM(model.parameters(), base_optimizer=torch.optim.SGD, lr=0.05, momentum=0.9)
    if name == "Lookahead":
        return package.Lookahead(torch.optim.AdamW(model.parameters(), 0.01))
    return package.load_optimizer(name)(model.parameters(), lr=1e-3)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("name", [*NAMES, "SAM", "Lookahead"])
def test_optimizer_of_another_package_trains(name, face):
    """`any torch.optim.Optimizer` would be a promise for torch's own ones only."""
    model, initial = network(), network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of those packages
        inner = of_package(name, model)
        optimizer, controller = driven(face, inner, total_steps=STEPS)
        if hasattr(optimizer, "train"):
            optimizer.train()
        train_by_closure(model, optimizer)
    assert controller.step_count == STEPS
    assert_finite_weights(model)
    assert not torch.equal(model[0].weight, initial[0].weight)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("name", ["lion", "SAM"])
def test_standing_still_is_the_other_package_with_linear_decay(name, face):
    """A closure evaluated once too often or too seldom would train something else."""

    def run(wrap):
        model = network()
        inner = of_package(name, model)
        if wrap:
            optimizer, _ = driven(face, inner, total_steps=STEPS, policy=SchedulePolicy.zero())
            return model, train_by_closure(model, optimizer)
        losses, lr = [], inner.param_groups[0]["lr"]
        for step in range(STEPS):
            inner.param_groups[0]["lr"] = lr * (1 - step / STEPS)
            if name == "SAM":  # alone it wants the gradients before the closure
                inner.zero_grad()
                losses.append(loss_at(model, step))
                losses[-1].backward()
                losses[-1] = losses[-1].item()
            losses += train_by_closure(model, inner, [step])
        return model, losses

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (model, losses), (plain, expected) = run(True), run(False)
    assert losses == expected
    assert_same_weights(model, plain)


@pytest.mark.parametrize("face", FACES)
def test_prodigy_trains(face):
    """Its learning rate of 1 is a factor on its own estimate, and would be taken for one that diverges."""
    prodigyopt = pytest.importorskip("prodigyopt")
    model = network()
    inner = prodigyopt.Prodigy(model.parameters(), lr=1.0)
    optimizer, controller = driven(face, inner, total_steps=STEPS)
    train_by_closure(model, optimizer)
    assert controller.step_count == STEPS
    assert_finite_weights(model)


# --- Hooks and compilers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("face", [ScheduledOptimizer, attach])
def test_hooks_run_once_per_step(face, closure):
    """A profiler would count, and an averaging hook would average, every step twice."""
    model, called = network(), []
    inner = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    inner.register_step_pre_hook(lambda *_: called.append("inner, before"))
    inner.register_step_post_hook(lambda *_: called.append("inner, after"))
    driver = face(inner, total_steps=9, policy=lively_policy())
    expected = ["inner, before", "inner, after"]
    if face is ScheduledOptimizer:
        driver.register_step_pre_hook(lambda *_: called.append("outer, before"))
        driver.register_step_post_hook(lambda *_: called.append("outer, after"))
        expected = ["outer, before", *expected, "outer, after"]
    optimizer = inner if face is attach else driver
    if closure:
        train_by_closure(model, optimizer, range(3))
    else:
        for step in range(3):
            loss_at(model, step).backward()
            optimizer.step(loss=1.0)
    assert called == 3 * expected


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.parametrize("face", [ScheduledOptimizer, attach])
def test_compiled_step_trains_as_an_eager_one(face):
    """Traced, the controller would freeze its decisions into a graph, or break it at every line."""
    counters = torch._dynamo.utils.counters

    def run(compiled):
        model = network()
        inner = torch.optim.SGD(model.parameters(), 0.1, 0.9)
        driver = face(inner, total_steps=STEPS, policy=lively_policy())
        optimizer = inner if face is attach else driver

        def train_step(x, y):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step(loss=loss)

        step = torch.compile(train_step, backend="eager") if compiled else train_step
        generator = torch.Generator().manual_seed(1)
        for _ in range(STEPS):
            step(torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator))
        return model

    torch._dynamo.reset()
    counters.clear()
    assert_same_weights(run(True), run(False))
    ours = [reason for reason in counters["graph_break"] if "Controller." in reason]
    assert 1 <= len(ours) <= 2, "the graph is broken before the step and after it, and nowhere else"
    assert all("Controller.prepare_step" in reason or "Controller.finish_step" in reason for reason in ours)
    torch._dynamo.reset()


@pytest.mark.parametrize("face", FACES)
def test_compiled_model_trains(face):
    """Its parameters are those of the model inside, under other names."""
    model, plain = network(), network()
    compiled = torch.compile(model, backend="eager")
    for m in (compiled, plain):
        optimizer, _ = driven(face, torch.optim.AdamW(m.parameters(), 0.01), total_steps=STEPS)
        train_by_closure(m, optimizer)
    assert_same_weights(model, plain)
    torch._dynamo.reset()
