"""ScheduledOptimizer in a training loop: what it reduces to, what it takes, what it survives."""

import inspect
import math
import sys

import pytest
import torch
from helpers import (
    FACES,
    always,
    assert_finite_weights,
    assert_same_weights,
    departures,
    driven,
    lively_policy,
    loss_at,
    network,
    train,
)
from torch import nn

from rlsched import ScheduledOptimizer, SchedulePolicy, attach, parameter_sample
from rlsched.control import CONTROLS, moved_by
from rlsched.parameter_sample import GRAD_NORM, moments_of
from rlsched.schedule import PROBE

STEPS = 40
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1),
    "SGD, momentum": lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.01),
    "SGD, nesterov": lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, 0.01, (0.8, 0.99), weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5),
}
KINDS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and kind is not torch.optim.Optimizer
}
FLAGS = [
    (kind, flag)
    for kind in KINDS.values()
    for flag in ("foreach", "fused", "capturable")
    if flag in inspect.signature(kind).parameters
]
STAND_STILL = {
    "zero policy": {"policy": SchedulePolicy.zero()},
    "no controls": {"policy": lively_policy(), "controls": ()},
}


def train_plainly(model, optimizer, steps=STEPS):
    """Train with torch alone: linear decay to zero by LambdaLR."""
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 - n / steps)
    for step in range(steps):
        optimizer.zero_grad()
        loss_at(model, step).backward()
        optimizer.step()
        scheduler.step()


# --- What it reduces to ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", STAND_STILL.values(), ids=STAND_STILL)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_standing_still_is_the_plain_optimizer_with_linear_decay(make, options):
    """A user who turns the policy off would still get something else than torch's own optimizer."""
    plain, scheduled = network(), network()
    train_plainly(plain, make(plain.parameters()))
    train(scheduled, ScheduledOptimizer(make(scheduled.parameters()), total_steps=STEPS, **options), range(STEPS))
    assert_same_weights(scheduled, plain)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("kind, flag", FLAGS, ids=lambda x: getattr(x, "__name__", x))
def test_standing_still_is_the_plain_optimizer_of_every_kind(kind, flag, face, monkeypatch):
    """Fused and capturable optimizers keep their hyperparameters and state in other places than the rest."""
    if flag == "capturable":  # torch wants an accelerator for CUDA graphs; the arithmetic is the same anywhere
        module = sys.modules[kind.step.__module__]
        monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda *_, **__: ["cpu"])
    plain, scheduled, steps = network(), network(), 10
    train_plainly(plain, kind(plain.parameters(), **{flag: True}), steps)
    inner = kind(scheduled.parameters(), **{flag: True})
    optimizer, _ = driven(face, inner, total_steps=steps, policy=SchedulePolicy.zero())
    train(scheduled, optimizer, range(steps))
    assert_same_weights(scheduled, plain)
    assert not torch.equal(plain[0].weight, network()[0].weight)


def test_learned_decisions_move_every_control():
    """All tests with a lively policy would pass on a wrapper that does nothing."""
    model = network()
    optimizer = ScheduledOptimizer(OPTIMIZERS["AdamW"](model.parameters()), total_steps=STEPS, policy=lively_policy())
    hyperparameters = train(model, optimizer, range(STEPS))
    fallback = [0.01 * (1 - n / STEPS) for n in range(STEPS)]
    assert any(abs(lr / plain - 1) > 0.1 for ((lr, _),), plain in zip(hyperparameters, fallback, strict=True))
    assert len({momentum for ((_, momentum),) in hyperparameters}) > 2
    windows, base = optimizer.controller.windows, optimizer.controller.state.base
    assert all(any(window.control[name] != base[name] for window in windows) for name in base)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_momentum_can_move_without_changing_the_size_of_updates(nesterov):
    """Raising momentum from 0.9 to 0.99 would make steps ten times as large, and a run diverge.

    The reference keeps an average of gradients, m ← βm + (1 − β)g, and steps by lr / (1 − β_0) times it. Torch's
    first buffer is g, a sum of one gradient, so that the first average is (1 − β_0) g.
    """
    model = network().double()
    inner = torch.optim.SGD(model.parameters(), 0.1, 0.8, nesterov=nesterov)
    optimizer = ScheduledOptimizer(inner, total_steps=STEPS, decisions=8, policy=always(momentum=0.6))
    state = base = -math.log10(1 - 0.8)
    action = float(torch.tensor(0.6))  # a policy's actions are in single precision
    reference = [p.detach().clone() for p in model.parameters()]
    average = [torch.zeros_like(p) for p in reference]
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_at(model, step, torch.float64)
        loss.backward()
        if step >= 1 and (step - 1) % 5 == 0:
            state = moved_by(CONTROLS["momentum"], state, action, step / STEPS, base)
        beta = 1 - 10**-state
        lr = 0.1 * (1 - step / STEPS) / (1 - 0.8)
        for i, p in enumerate(model.parameters()):
            average[i] = beta * average[i] + (1 - beta) * p.grad
            reference[i] -= lr * (beta * average[i] + (1 - beta) * p.grad if nesterov else average[i])
        optimizer.step(loss=loss)
    assert inner.param_groups[0]["momentum"] > 0.95
    for p, expected in zip(model.parameters(), reference, strict=True):
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-9)


def test_constant_action_follows_the_documented_learning_rate():
    """The formula in the docstring is what a user checks a surprising learning rate against."""
    model = network()
    inner = torch.optim.AdamW(model.parameters(), 0.01)
    optimizer = ScheduledOptimizer(inner, total_steps=20, decisions=4, policy=always(lr=1.0), controls=["lr"])
    lrs = [lr for ((lr, _),) in train(model, optimizer, range(20))]
    # Decisions before the inner steps 1, 6, 11 and 16; only the first lies in the first fifth of the run.
    offsets = [0.0] * 1 + [0.7] * 5 + [0.95] * 5 + [1.2] * 5 + [1.45] * 4
    expected = [0.01 * (1 - n / 20) * math.exp(c) for n, c in enumerate(offsets)]
    assert lrs == pytest.approx(expected, rel=1e-6)


def test_unlisted_controls_are_left_alone():
    """A user whose momentum and clipping are not to be scheduled would find them changed."""
    model = network()
    inner = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    optimizer = ScheduledOptimizer(inner, total_steps=STEPS, policy=lively_policy(), controls=["lr"])
    assert {momentum for ((_, momentum),) in train(model, optimizer, range(STEPS))} == {0.9}
    moved = departures(optimizer.controller)
    assert moved["momentum"] == moved["clip"] == 0 != moved["lr"]


def test_optimizer_without_momentum_keeps_it_that_way():
    """SGD would start a momentum buffer in the middle of a run, and its steps would grow."""
    model = network()
    inner = torch.optim.SGD(model.parameters(), 0.1)
    optimizer = ScheduledOptimizer(inner, total_steps=STEPS, policy=always(momentum=1.0))
    plain = network()
    train(model, optimizer, range(STEPS))
    train_plainly(plain, torch.optim.SGD(plain.parameters(), 0.1))
    assert_same_weights(model, plain)


@pytest.mark.parametrize("face", FACES)
def test_parameter_groups_keep_their_ratios(face):
    """Layer-wise learning rates and the momenta of different groups would be lost at the first decision."""
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 1e-4, "betas": (0.99, 0.9)}]
    inner = torch.optim.AdamW(groups, 0.01, (0.9, 0.999))
    optimizer, _ = driven(face, inner, total_steps=STEPS)
    for (lr, momentum), (other_lr, other_momentum) in train(model, optimizer, range(STEPS)):
        assert other_lr / lr == pytest.approx(0.01)
        assert (1 - other_momentum) / (1 - momentum) == pytest.approx(0.1)
    assert inner.param_groups[1]["betas"][1] == 0.9


@pytest.mark.parametrize("face", FACES)
def test_parameter_group_that_comes_later_joins_the_schedule(face):
    """Layers that are unfrozen in the middle of a run would train at the full base learning rate to its end."""
    model = network()
    optimizer, _ = driven(face, torch.optim.SGD(model[0].parameters(), 0.1), total_steps=STEPS)
    train(model, optimizer, range(STEPS // 2))
    before = model[2].weight.clone()
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.02})
    for (lr, _), (other_lr, _) in train(model, optimizer, range(STEPS // 2, STEPS)):
        assert other_lr / lr == pytest.approx(0.2)
    assert not torch.equal(model[2].weight, before)


def test_max_grad_norm_is_that_of_torch():
    """A user who replaces clip_grad_norm_ by the argument would train something else."""
    clipped, scheduled = network(), network()
    inner = torch.optim.SGD(scheduled.parameters(), 0.1)
    optimizer = ScheduledOptimizer(inner, total_steps=9, policy=SchedulePolicy.zero(), max_grad_norm=0.1)
    plain = torch.optim.SGD(clipped.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(plain, lambda n: 1 - n / 9)
    for step in range(9):
        plain.zero_grad()
        loss_at(clipped, step).backward()
        assert nn.utils.clip_grad_norm_(clipped.parameters(), 0.1) > 0.1
        plain.step()
        scheduler.step()
    train(scheduled, optimizer, range(9))
    for p, q in zip(scheduled.parameters(), clipped.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("face", FACES)
def test_clipping_of_ones_own_comes_first(face):
    """A clip_grad_norm_ that is left in the loop would be undone, or the policy see gradients that were not stepped."""
    clipped, scheduled = network(), network()
    plain = torch.optim.AdamW(clipped.parameters(), 0.01)
    inner = torch.optim.AdamW(scheduled.parameters(), 0.01)
    optimizer, controller = driven(face, inner, total_steps=STEPS, decisions=1, policy=SchedulePolicy.zero())
    for step in range(STEPS):
        plain.param_groups[0]["lr"] = 0.01 * (1 - step / STEPS)
        for model, it in ((clipped, plain), (scheduled, optimizer)):
            it.zero_grad()
            loss = loss_at(model, step)
            loss.backward()
            assert nn.utils.clip_grad_norm_(model.parameters(), 0.1) > 0.1
            it.step(**({} if it is plain else {"loss": loss}))
    assert_same_weights(scheduled, clipped)
    torch.testing.assert_close(controller.meter.records[: STEPS - 1, GRAD_NORM], torch.full((STEPS - 1,), 0.1))


def test_clip_control_clips_to_its_multiple_of_the_average_norm():
    """The policy was trained with clipping; without it a spike would reach the weights."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = ScheduledOptimizer(
        torch.optim.SGD(model.parameters(), 0.1), total_steps=100, policy=always(clip=-1.0), controls=["clip"]
    )
    for _ in range(10):  # one decision at each step from the second on: at the minimum after six
        model.weight.grad = torch.ones(1, 1)
        optimizer.step(loss=1.0)
    model.weight.grad = torch.full((1, 1), 100.0)
    before = model.weight.item()
    optimizer.step(loss=1.0)
    # The running average of the norm is that of the gradients as they came, clipped or not: 1.
    assert before - model.weight.item() == pytest.approx(0.1 * (1 - 10 / 100) * math.exp(0 - 0.7), rel=1e-5)


# --- What it takes --------------------------------------------------------------------------------------------------

EVERY_OPTIMIZER = {
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
    "Adagrad": lambda p: torch.optim.Adagrad(p),
    "Adam, tensor lr": lambda p: torch.optim.Adam(p, torch.tensor(1e-3)),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True),
    "AdamW, no momentum": lambda p: torch.optim.AdamW(p, betas=(0.0, 0.999)),
    "Adamax": lambda p: torch.optim.Adamax(p),
    "ASGD": lambda p: torch.optim.ASGD(p),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3),
    "Muon": lambda p: torch.optim.Muon([q for q in p if q.ndim == 2]),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "RAdam": lambda p: torch.optim.RAdam(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p),
    "RMSprop, centered": lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.9),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "SGD, dampening": lambda p: torch.optim.SGD(p, 0.1, 0.9, dampening=0.5),
    "SGD, maximize": lambda p: torch.optim.SGD(p, 0.01, 0.9, maximize=True),
}


def test_every_optimizer_of_torch_is_tried():
    """A new optimizer in torch would be claimed as supported without ever having run."""
    tried = {name.split(",")[0] for name in EVERY_OPTIMIZER | OPTIMIZERS}
    assert KINDS.keys() <= tried | {"SparseAdam"}, "SparseAdam is in test_sparse_gradients_count_as_dense_ones"
    assert len(FLAGS) > 20


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("make", EVERY_OPTIMIZER.values(), ids=EVERY_OPTIMIZER)
def test_optimizer_trains_under_a_lively_policy(make, face):
    """`any torch.optim.Optimizer` would be a promise broken by the first unusual one."""
    model, initial = network(), network()
    inner = make(list(model.parameters()))
    optimizer, controller = driven(face, inner, total_steps=STEPS)
    moved = 0  # of the steps: a loss that is maximised is a divergence, from which a run goes back
    for step in range(12):

        def closure(step=step):
            optimizer.zero_grad()
            loss = loss_at(model, step)
            loss.backward()
            return loss

        assert optimizer.step(closure).item() > 0
        assert 0 < float(inner.param_groups[0]["lr"]) < math.inf
        moved += not torch.equal(model[0].weight, initial[0].weight)
    assert controller.step_count == 12
    assert_finite_weights(model)
    assert moved > 5


class Words(nn.Module):
    """The mean embedding of some words, of which each batch has a few, some of them twice."""

    def __init__(self, sparse):
        super().__init__()
        torch.manual_seed(1)
        # In double precision, for the rounding of a sum in another order to be less than what is measured.
        self.embedding = nn.EmbeddingBag(4000, 4, sparse=sparse, dtype=torch.float64)

    def forward(self, step):
        words = torch.randint(40, (16, 8), generator=torch.Generator().manual_seed(step))
        return (self.embedding(words) - 1).square().mean()


SPARSE = {
    "SGD": lambda p: torch.optim.SGD(p, 5.0),
    "SGD, momentum": lambda p: torch.optim.SGD(p, 1.0, 0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
    "SparseAdam": lambda p: torch.optim.SparseAdam(list(p), 0.1),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # of torch's own doing
@pytest.mark.parametrize("size", [2**20, 2**12], ids=["whole", "sampled"])
@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize("face", FACES)
def test_sparse_gradients_count_as_dense_ones(face, kind, size, monkeypatch):
    """Embeddings with sparse gradients would be scheduled by something else than what the policy was trained on."""
    monkeypatch.setattr(parameter_sample, "SIZE", size)

    def run(sparse):
        model = Words(sparse)
        make = SPARSE["Adagrad" if kind == "SparseAdam" and not sparse else kind]
        optimizer, controller = driven(face, make(model.parameters()), total_steps=30, max_grad_norm=0.01)
        path = []
        for step in range(30):
            optimizer.zero_grad()
            loss = model(step)
            loss.backward()
            assert model.embedding.weight.grad.is_sparse == sparse
            optimizer.step(loss=loss)
            path.append([float(optimizer.param_groups[0]["lr"]), *controller.state.control.values()])
        assert_finite_weights(model)
        return torch.tensor(path), controller

    (sparse, controller), (dense, other) = run(True), run(False)
    assert controller.meter.last_grads[0].count_nonzero() > 20
    if kind != "SparseAdam":
        torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(controller.meter.last_grads[0], other.meter.last_grads[0], rtol=1e-3, atol=1e-6)
    assert sparse[:, 1].std() > 0.1


@pytest.mark.parametrize("face", FACES)
def test_bad_values_of_sparse_gradients_do_not_reach_the_weights(face):
    """What guards dense gradients would not look at them."""
    model = Words(sparse=True)
    optimizer, _ = driven(face, torch.optim.SGD(model.parameters(), 1.0), total_steps=30)
    for step in range(6):
        optimizer.zero_grad()
        loss = model(step)
        loss.backward()
        if step == 3:
            model.embedding.weight.grad._values()[0] = math.nan
        optimizer.step(loss=loss)
        assert_finite_weights(model)


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.parametrize("size", [2**12, 20], ids=["whole", "sampled"])
def test_complex_parameters_are_measured_as_real_ones(size, kind, monkeypatch):
    """The policy would see other norms and cosines of them, or none."""
    monkeypatch.setattr(parameter_sample, "SIZE", size)

    def run(is_complex):
        torch.manual_seed(1)
        layers = [torch.randn(9, 7, dtype=torch.complex64), torch.randn(7, 9, dtype=torch.complex64).T]
        params = [(p if is_complex else torch.view_as_real(p)).requires_grad_() for p in layers]
        optimizer, controller = driven(ScheduledOptimizer, OPTIMIZERS[kind](params), total_steps=30)
        path = []
        for step in range(30):
            optimizer.zero_grad()
            one, other = params if is_complex else map(torch.view_as_complex, params)
            x = torch.randn(16, 7, dtype=torch.complex64, generator=torch.Generator().manual_seed(step))
            loss = (x @ one.mT @ other - x).abs().square().mean()
            loss.backward()
            optimizer.step(loss=loss)
            path.append([optimizer.param_groups[0]["lr"], *controller.state.control.values()])
        return torch.tensor(path), controller.meter.last_grads[0]

    (path, grad), (expected, expected_grad) = run(True), run(False)
    torch.testing.assert_close(path, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-5)
    assert path[:, 1].std() > 0.1


def test_subclass_of_an_optimizer_counts_as_its_kind():
    """A user's own Muon would have its averaged momentum rescaled, as if it summed gradients."""

    class Mine(torch.optim.Muon):
        pass

    def run(kind):
        model = nn.Linear(6, 3, bias=False)
        nn.init.ones_(model.weight)
        optimizer = ScheduledOptimizer(kind(model.parameters()), total_steps=STEPS, policy=lively_policy())
        train(model, optimizer, range(STEPS))
        return model

    assert_same_weights(run(Mine), run(torch.optim.Muon))


def test_lbfgs_needs_a_closure():
    """LBFGS would fail inside torch, after the step was counted."""
    model = network()
    optimizer = ScheduledOptimizer(torch.optim.LBFGS(model.parameters()), total_steps=9, policy=lively_policy())
    with pytest.raises(ValueError, match="closure: LBFGS"):
        optimizer.step(loss=1.0)


def run_reporting(report):
    """Train under a lively policy, each step done by `report(optimizer, model, step)`; returns the model."""
    model = network()
    optimizer = ScheduledOptimizer(
        torch.optim.SGD(model.parameters(), 0.1, 0.9), total_steps=STEPS, policy=lively_policy()
    )
    for step in range(STEPS):
        optimizer.zero_grad()
        report(optimizer, model, step)
    return model


def by_keyword(optimizer, model, step):
    """step(loss=tensor)."""
    loss = loss_at(model, step)
    loss.backward()
    assert optimizer.step(loss=loss) is loss


def by_float(optimizer, model, step):
    """step(loss=float)."""
    loss = loss_at(model, step)
    loss.backward()
    optimizer.step(loss=loss.item())


def by_vector(optimizer, model, step):
    """A loss of shape (1,), as DataParallel gathers it."""
    loss = loss_at(model, step)
    loss.backward()
    optimizer.step(loss=loss.reshape(1))


def by_observe(optimizer, model, step):
    """observe(loss), then step()."""
    loss = loss_at(model, step)
    loss.backward()
    optimizer.observe(loss)
    assert optimizer.step() is None


def by_micro_batches(optimizer, model, step):
    """Two reports whose mean is the loss, to the last bit."""
    loss = loss_at(model, step)
    loss.backward()
    optimizer.observe(2 * loss)
    optimizer.observe(0.0)
    optimizer.step()


def by_closure(optimizer, model, step):
    """step(closure)."""

    def closure():
        loss = loss_at(model, step)
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad


WAYS = [by_float, by_vector, by_observe, by_micro_batches, by_closure]


@pytest.mark.parametrize("report", WAYS)
def test_every_way_to_report_the_loss_is_the_same_run(report):
    """How a loop happens to pass its loss would change what it trains."""
    assert_same_weights(run_reporting(report), run_reporting(by_keyword))


@pytest.mark.parametrize("face", FACES)
def test_accumulated_batches_are_one_step(face):
    """Gradients that add up over two batches would be seen, or stepped, as something else than their sum."""

    def run(accumulate):
        model = network()
        optimizer, controller = driven(face, torch.optim.AdamW(model.parameters(), 0.01), total_steps=STEPS)
        for step in range(STEPS):
            optimizer.zero_grad()
            losses = [loss_at(model, step), loss_at(model, 100 + step)]
            if accumulate:
                for loss in losses:
                    (loss / 2).backward()
                    controller.observe(loss)
                optimizer.step()
            else:
                loss = torch.stack(losses).mean()
                loss.backward()
                optimizer.step(loss=loss)
        assert controller.step_count == STEPS
        return model

    assert_same_weights(run(True), run(False))


def test_training_without_any_loss_works_and_says_so_once():
    """A user who forgot the loss would get a worse schedule and never know."""

    def silent(optimizer, model, step):
        loss_at(model, step).backward()
        optimizer.step()

    with pytest.warns(UserWarning, match=r"no loss was reported.*pass step\(loss=loss\)") as caught:
        model = run_reporting(silent)
    assert len(caught) == 1
    assert_finite_weights(model)


def test_negative_loss_counts_as_no_loss():
    """A loss that has no logarithm would turn observations into NaN, or switch the safe start off."""

    def shifted(offset):
        def report(optimizer, model, step):
            loss = loss_at(model, step)
            loss.backward()
            optimizer.step(loss=None if offset is None else loss - offset)

        return report

    with pytest.warns(UserWarning, match="no loss"):
        silent = run_reporting(shifted(None))
    with pytest.warns(UserWarning, match="zero or negative"):
        assert_same_weights(run_reporting(shifted(100.0)), silent)


def test_it_is_an_optimizer():
    """Frameworks that ask isinstance, and code that reads groups, state or repr, would not know it."""
    model = network()
    inner = torch.optim.AdamW(model.parameters(), 0.01)
    optimizer = ScheduledOptimizer(inner, total_steps=STEPS, policy=lively_policy())
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is inner.param_groups and optimizer.state is inner.state
    assert optimizer.defaults["lr"] == 0.01
    train(model, optimizer, range(2))
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    loss_at(model, 2).backward()
    optimizer.zero_grad(set_to_none=False)
    assert all((p.grad == 0).all() for p in model.parameters())
    assert "AdamW" in repr(optimizer) and f"of {STEPS}" in repr(optimizer)
    inner.load_state_dict(inner.state_dict())  # rebinds groups and state
    assert optimizer.param_groups is inner.param_groups and optimizer.state is inner.state


def test_step_hooks_are_called():
    """Profilers and frameworks hook into step."""
    model, called = network(), []
    optimizer = ScheduledOptimizer(OPTIMIZERS["Adam"](model.parameters()), total_steps=9, policy=lively_policy())
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    train(model, optimizer, range(1))
    assert called == ["before", "after"]


@pytest.mark.parametrize("face", FACES)
def test_gradients_may_be_zeroed_in_place(face):
    """With set_to_none=False gradients stay where they are, and the last one would be overwritten with the next."""

    def run(set_to_none):
        model = network()
        optimizer, _ = driven(face, torch.optim.SGD(model.parameters(), 0.1, 0.9), total_steps=STEPS)
        for step in range(STEPS):
            optimizer.zero_grad(set_to_none=set_to_none)
            loss = loss_at(model, step)
            loss.backward()
            optimizer.step(loss=loss)
        return model

    assert_same_weights(run(False), run(True))


def run_under_scheduler(face, schedule, scheduled_first=False, **options):
    """Train with a torch scheduler that is stepped after each step; returns the model and the lr of each step."""
    model = network()
    inner = OPTIMIZERS["Adam"](model.parameters())
    scheduler = schedule(inner) if schedule and scheduled_first else None
    optimizer, _ = driven(face, inner, total_steps=STEPS, **options)
    scheduler = schedule(optimizer) if schedule and not scheduled_first else scheduler
    lrs = []
    inner.register_step_pre_hook(lambda *_: lrs.append(float(inner.param_groups[0]["lr"])))
    for step in range(STEPS):
        train(model, optimizer, [step])
        if scheduler is not None:
            scheduler.step()
    return model, lrs


def warm_up(optimizer):
    """Ten steps up from zero, then a cosine down to zero: a recursive scheduler after one in closed form."""
    up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: n / 10)
    down = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS - 10)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [up, down], milestones=[10])


HARMLESS = {
    "constant": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda _: 1.0),
    "the base schedule": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1 - n / STEPS),
}


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("schedule", HARMLESS.values(), ids=HARMLESS)
def test_schedulers_that_frameworks_build_do_no_harm(schedule, face):
    """Frameworks build a scheduler around every optimizer, wanted or not; the learned schedule prevails."""
    model, lrs = run_under_scheduler(face, schedule)
    alone, expected = run_under_scheduler(face, None)
    assert lrs == expected
    assert_same_weights(model, alone)


def test_scheduler_beside_repeated_probes_does_no_harm():
    """A probe is not decayed: a framework's scheduler that comes beside it would be warned of, with a wrong remedy."""
    model = network()
    optimizer = ScheduledOptimizer(torch.optim.Adam(model.parameters(), 1e6), total_steps=STEPS, policy=lively_policy())
    scheduler = HARMLESS["the base schedule"](optimizer)
    for step in range(8):
        train(model, optimizer, [step])
        scheduler.step()
    assert sum("undone" in message for _, message in optimizer.controller.interventions) >= 1


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("scheduled_first", [False, True])
def test_scheduler_by_mistake_is_warned_of(scheduled_first, face):
    """A user would tune a warm-up that never happens; or train at zero, if it had begun before."""
    with pytest.warns(UserWarning, match=r"scheduler.*has no effect.*follow_scheduler=True") as caught:
        model, lrs = run_under_scheduler(face, warm_up, scheduled_first)
    assert len(caught) == 1
    alone, expected = run_under_scheduler(face, None)
    assert lrs == pytest.approx(expected, rel=1e-12)
    assert_same_weights(model, alone)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("scheduled_first", [False, True])
def test_scheduler_on_purpose_is_modulated(scheduled_first, tensor_lr, face):
    """A warm-up would be lost; or, left with a learning rate that it did not set, a scheduler would compound it."""

    def make(optimizer):
        if tensor_lr:
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
        return warm_up(optimizer)

    plain = torch.optim.Adam(network().parameters(), 0.01)
    scheduler, expected = warm_up(plain), []
    for _ in range(STEPS):
        expected.append(plain.param_groups[0]["lr"])
        plain.step()
        scheduler.step()
    _, lrs = run_under_scheduler(face, make, scheduled_first, follow_scheduler=True, policy=SchedulePolicy.zero())
    assert lrs == pytest.approx(expected, rel=1e-6, abs=1e-12)
    _, lrs = run_under_scheduler(face, make, scheduled_first, follow_scheduler=True, policy=always(lr=1.0), decisions=4)
    offsets = [0.0] + [0.7] * 10 + [0.95] * 10 + [1.2] * 10 + [1.45] * 9
    assert lrs == pytest.approx(
        [lr * math.exp(c) for lr, c in zip(expected, offsets, strict=True)], rel=1e-5, abs=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_default_dtype_is_the_users_own_business(dtype):
    """Under another default dtype the policy would meet observations that its weights cannot be multiplied with."""
    expected, policy = run_reporting(by_float), lively_policy()
    model = network()
    torch.set_default_dtype(dtype)
    try:
        optimizer = ScheduledOptimizer(torch.optim.SGD(model.parameters(), 0.1, 0.9), total_steps=STEPS, policy=policy)
        torch.set_default_dtype(torch.float32)  # the data come from helpers
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = loss_at(model, step)
            loss.backward()
            torch.set_default_dtype(dtype)
            optimizer.step(loss=loss.item())
            torch.set_default_dtype(torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_weights(model, expected)


def test_default_device_is_the_users_own_business():
    """Under another default device the policy would decide on tensors that its weights cannot be multiplied with."""
    expected = run_reporting(by_float)

    def under_another_device(optimizer, model, step):
        loss = loss_at(model, step)
        loss.backward()
        with torch.device("meta"):  # whatever is made here has no values
            optimizer.step(loss=loss.item())

    assert_same_weights(run_reporting(under_another_device), expected)


@pytest.mark.filterwarnings("ignore:rlsched. a loss is zero")  # in the end it is, in half precision
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_other_dtypes_train(dtype):
    """Models in half or double precision, whole or in part, would fail in the arithmetic of the wrapper."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3, dtype=dtype))
    optimizer = ScheduledOptimizer(
        torch.optim.SGD(model.parameters(), 0.1, 0.9), total_steps=STEPS, policy=lively_policy(), max_grad_norm=1.0
    )
    inputs = torch.randn(16, 6)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model[1](model[0](inputs).to(dtype)).float(), inputs[:, :3].argmax(-1))
        loss.backward()
        optimizer.step(loss=loss)
    assert_finite_weights(model)
    assert loss < 1
    assert [p.dtype for p in model.parameters()] == [torch.float32] * 2 + [dtype] * 2


# --- What it refuses ------------------------------------------------------------------------------------------------

WRONG_ARGUMENTS = {
    "no steps": ({"total_steps": 0}, "total_steps must be a positive int"),
    "negative": ({"total_steps": -5}, "total_steps must be a positive int.*got -5"),
    "float": ({"total_steps": 1e4}, "total_steps must be a positive int.*got 10000.0"),
    "bool": ({"total_steps": True}, "total_steps must be a positive int.*got True"),
    "decisions": ({"decisions": 0}, "decisions must be a positive int"),
    "max_grad_norm": ({"max_grad_norm": 0.0}, "max_grad_norm must be a number above 0"),
    "max_grad_norm, nan": ({"max_grad_norm": math.nan}, "max_grad_norm must be a number above 0"),
    "unknown control": ({"controls": ["lr", "dropout"]}, r"controls must be some of .*got \['lr', 'dropout'\]"),
    "one control as a string": ({"controls": "lr"}, "controls must be some of .*got 'lr'"),
}


@pytest.mark.parametrize("options, message", WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS)
def test_wrong_argument_is_named(options, message):
    """A slip in a call would show as a strange schedule, hours later."""
    inner = torch.optim.SGD(network().parameters(), 0.1)
    with pytest.raises(ValueError, match=message):
        ScheduledOptimizer(inner, **{"total_steps": 9, "policy": lively_policy(), **options})


@pytest.mark.parametrize("momentum", [1.0, 1.5])
@pytest.mark.parametrize("face", FACES)
def test_momentum_of_one_is_refused(face, momentum):
    """Gradients of which none is forgotten have no average; the error would be a division by zero."""
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "momentum": momentum}]
    with pytest.raises(ValueError, match=f"group 1 has a momentum of {momentum:g}; it must be below 1"):
        face(torch.optim.SGD(groups, 0.1), total_steps=9)


class Unusual(torch.optim.SGD):
    """Has hyperparameters in forms that some optimizers know."""

    def __init__(self, params, betas):
        super().__init__(params, torch.tensor([0.1]))
        for group in self.param_groups:
            group["betas"] = betas


BETAS = {"none": (None, 0.999), "tensors": (torch.tensor([[0.9]]), torch.tensor(0.99)), "list": [0.9, 0.99]}


@pytest.mark.parametrize("betas", BETAS.values(), ids=BETAS)
@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize("face", FACES)
def test_hyperparameters_in_unusual_forms(face, follow, betas):
    """Adafactor has None for the beta that it does not use; torch takes tensors of one number, whatever their shape."""
    model = network()
    optimizer, _ = driven(face, Unusual(model.parameters(), betas), total_steps=STEPS, follow_scheduler=follow)
    path = train(model, optimizer, range(STEPS))
    assert optimizer.param_groups[0]["lr"].shape == (1,)
    beta, other = optimizer.param_groups[0]["betas"]
    assert type(beta) is type(betas[0])
    assert other == betas[1]
    assert (len({str(momentum) for ((_, momentum),) in path}) > 1) == (beta is not None)


@pytest.mark.parametrize("face", FACES)
def test_tensor_that_two_optimizers_share_is_not_written_to(face):
    """The second one would take what the first one's schedule had made of its learning rate for the user's own."""
    lr = torch.tensor(0.01)
    model = network()
    optimizer, _ = driven(face, torch.optim.AdamW(model.parameters(), lr), total_steps=STEPS)
    train(model, optimizer, range(3))
    assert lr == torch.tensor(0.01)
    assert optimizer.param_groups[0]["lr"] != lr


def test_what_is_no_optimizer_with_a_learning_rate_is_refused():
    """There would be nothing to schedule, or it would be scheduled twice."""

    class NoRate(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

    options = {"total_steps": 9, "policy": lively_policy()}
    with pytest.raises(ValueError, match="NoRate has parameter groups without 'lr'"):
        ScheduledOptimizer(NoRate(network().parameters()), **options)
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer, got generator"):
        ScheduledOptimizer(network().parameters(), **options)
    scheduled = ScheduledOptimizer(torch.optim.SGD(network().parameters(), 0.1), **options)
    for wrap in (ScheduledOptimizer, attach):
        with pytest.raises(ValueError, match="ScheduledOptimizer already"):
            wrap(scheduled, **options)


@pytest.mark.parametrize("loss", [torch.ones(2), torch.ones(0), torch.ones(2, 2)])
def test_loss_of_many_numbers_is_refused(loss):
    """An unreduced loss would be taken for its first entry, or fail later and elsewhere."""
    optimizer = ScheduledOptimizer(torch.optim.SGD(network().parameters(), 0.1), total_steps=9, policy=lively_policy())
    with pytest.raises(ValueError, match="loss must be one number, got a tensor of shape"):
        optimizer.step(loss=loss)


# --- What it survives -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("face", FACES)
def test_steps_without_gradients_are_passed_on_and_do_not_count(face):
    """A loop that forgot backward() would use up its schedule, without a word."""
    model, initial = network(), network()
    optimizer, controller = driven(face, torch.optim.SGD(model.parameters(), 0.1), total_steps=9)
    with pytest.warns(UserWarning, match=r"no parameter has a gradient.*backward\(\)") as caught:
        for _ in range(3):
            optimizer.step(loss=1.0)
    assert len(caught) == 1
    assert controller.step_count == 0
    assert controller.skipped == 3
    assert_same_weights(model, initial)
    train(model, optimizer, range(9))
    assert controller.step_count == 9


@pytest.mark.parametrize("face", FACES)
def test_frozen_parameters_are_left_alone(face):
    """Layers that are not trained would break the measuring, or be moved."""
    model, initial = network(), network()
    model[0].requires_grad_(False)
    optimizer, _ = driven(face, torch.optim.SGD(model.parameters(), 0.1, 0.9), total_steps=STEPS)
    train(model, optimizer, range(STEPS))
    assert torch.equal(model[0].weight, initial[0].weight)
    assert not torch.equal(model[2].weight, initial[2].weight)
    assert_finite_weights(model)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("face", FACES)
def test_heads_take_turns(face, set_to_none):
    """Parameters that a batch does not use have no gradient in its step: an old one would be measured for it."""

    def run(policy, schedule=True):
        torch.manual_seed(1)
        trunk, heads = nn.Linear(6, 8), [nn.Linear(8, 1), nn.Linear(8, 1)]
        parameters = [p for module in (trunk, *heads) for p in module.parameters()]
        inner = optimizer = torch.optim.AdamW(parameters, 0.01)
        if schedule:
            optimizer, controller = driven(face, inner, total_steps=STEPS, policy=policy, decisions=8)
        for step in range(STEPS):
            if not schedule:
                inner.param_groups[0]["lr"] = 0.01 * (1 - step / STEPS)
            optimizer.zero_grad(set_to_none=set_to_none)
            inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
            loss = (heads[step % 2](trunk(inputs)) - inputs[:, :1]).square().mean()
            loss.backward()
            optimizer.step(**({"loss": loss} if schedule else {}))
        if schedule:
            assert all(map(math.isfinite, controller.state.control.values()))
            assert controller.skipped == 0
        return nn.ModuleList([trunk, *heads])

    assert_same_weights(run(SchedulePolicy.zero()), run(None, schedule=False))
    assert_finite_weights(run(lively_policy()))


@pytest.mark.parametrize("policy", [always(lr=1.0), lively_policy()], ids=["without a probe", "with a probe"])
@pytest.mark.parametrize("total", [1, 2, 12])
def test_training_past_the_end_keeps_the_last_learning_rate(total, policy):
    """A run that is extended would train at a learning rate of zero, or below."""
    model = network()
    optimizer = ScheduledOptimizer(torch.optim.SGD(model.parameters(), 0.1), total_steps=total, policy=policy)
    *_, ((last, _),) = train(model, optimizer, range(total))
    with pytest.warns(UserWarning, match=f"after total_steps={total}") as caught:
        later = train(model, optimizer, range(total, total + 15))
    assert len(caught) == 1
    assert last > 0
    assert {lr for ((lr, _),) in later} == {last}


BAD_LOSSES = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("bad", BAD_LOSSES)
def test_loss_that_is_not_finite_does_not_reach_the_weights(bad):
    """One bad batch would end a run of days."""
    model = network()
    optimizer = ScheduledOptimizer(torch.optim.SGD(model.parameters(), 0.1), total_steps=100, policy=always())
    before = train(model, optimizer, range(4))
    weights = [p.clone() for p in model.parameters()]
    optimizer.zero_grad()
    (loss_at(model, 4) * bad).backward()
    optimizer.step(loss=bad)
    for p, q in zip(model.parameters(), weights, strict=True):
        assert torch.equal(p, q)
    after = train(model, optimizer, range(5, 9))
    assert_finite_weights(model)
    assert not torch.equal(model[0].weight, weights[0]), "training does not go on"
    (((first, _),), ((lr, _),)) = before[0], after[0]
    assert lr == pytest.approx(first * (1 - 5 / 100), rel=1e-5), "one bad batch is no divergence"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradient_that_is_not_finite_does_not_reach_the_weights(bad):
    """A loss can be finite and its gradient not (√x at 0), and Adam would keep it in its state forever."""
    model = network()
    optimizer = ScheduledOptimizer(torch.optim.AdamW(model.parameters(), 0.01), total_steps=100, policy=lively_policy())
    train(model, optimizer, range(12))
    average = optimizer.controller.meter.average_norm
    loss = loss_at(model, 12)
    loss.backward()
    model[0].weight.grad[0, 0] = bad
    optimizer.step(loss=loss)
    shown = moments_of(optimizer.controller.meter.records[:1])
    assert all(math.isnan(value) for (value,) in shown), "it is shown to the policy"
    assert optimizer.controller.meter.average_norm == average
    train(model, optimizer, [13])
    assert math.isfinite(optimizer.controller.meter.average_norm)
    train(model, optimizer, range(14, 30))
    assert_finite_weights(model)
    assert all(value.isfinite().all() for state in optimizer.state.values() for value in state.values())
    assert all(map(math.isfinite, optimizer.controller.state.control.values()))


def test_no_cut_without_control_of_the_learning_rate():
    """A user whose learning rate is not to be scheduled would find it cut."""
    model = network()
    optimizer = ScheduledOptimizer(
        torch.optim.SGD(model.parameters(), 0.1), total_steps=10, policy=lively_policy(), controls=["clip"]
    )
    train(model, optimizer, range(3))
    optimizer.zero_grad()
    (loss_at(model, 3) * math.nan).backward()
    optimizer.step(loss=math.nan)
    lrs = [lr for ((lr, _),) in train(model, optimizer, range(4, 10))]
    assert lrs == [0.1 * (1 - n / 10) for n in range(4, 10)]


def test_base_learning_rate_that_would_diverge_is_not_taken():
    """From a learning rate a thousand times too large the first step would throw the network away."""

    def final_loss(policy, **options):
        model = nn.Linear(20, 1)
        torch.manual_seed(3)
        inputs = torch.randn(64, 20)
        optimizer = ScheduledOptimizer(
            torch.optim.SGD(model.parameters(), 100.0), total_steps=60, policy=policy, **options
        )
        for _ in range(60):
            optimizer.zero_grad()
            loss = (model(inputs) - inputs[:, :1]).square().mean()
            loss.backward()
            optimizer.step(loss=loss)
        return loss.item()

    zero = SchedulePolicy.zero()
    assert final_loss(always(safe_start=True)) < 0.5
    assert not final_loss(zero, on_divergence=None, max_update_ratio=math.inf) < 1e3


def test_probe_is_taken_at_a_thousandth_of_the_learning_rate():
    """A probe at the full learning rate would do the harm that it is to prevent."""
    model = network()
    optimizer = ScheduledOptimizer(torch.optim.SGD(model.parameters(), 0.1), total_steps=9, policy=lively_policy())
    (((lr, _),),) = train(model, optimizer, range(1))
    assert lr == 0.1 * PROBE
