"""Copies of weights in the place of those in training: whole, with batch norm, and with nothing left behind."""

import copy

import pytest
import torch
from helpers import FACES, always, assert_finite_weights, assert_same_weights, lively_policy, loss_at, network, train
from torch import nn

from rlsched import ScheduledOptimizer
from rlsched.weights import WeightAverage, WeightCopy

BATCHES = [(torch.randn(16, 6, generator=torch.Generator().manual_seed(i)), None) for i in range(4)]


def with_batch_norm():
    """A model whose running averages belong to its weights."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def trained(model=None, face=ScheduledOptimizer, **options):
    """A model after a few steps, of which the best was in the middle; and what drives its optimizer."""
    model = network() if model is None else model
    inner = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    driver = face(inner, total_steps=20, decisions=5, policy=lively_policy(), **{"keep_best": True, **options})
    optimizer = driver if face is ScheduledOptimizer else inner
    for step in range(8):
        if step == 4:
            driver.observe_validation(1.0)
            best = copy.deepcopy(model)
        optimizer.zero_grad()
        loss = loss_at(model, step)
        loss.backward()
        optimizer.step(loss=loss)
    driver.observe_validation(2.0)
    return model, driver, best


def everything(model):
    """Weights, buffers, modes and the momentum of batch norm."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return tensors, [(m.training, getattr(m, "momentum", None)) for m in model.modules()]


def assert_untouched(model, before):
    """All of that is what it was, to the last bit."""
    tensors, modes = everything(model)
    assert modes == before[1]
    for name, tensor in before[0].items():
        assert torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize("face", FACES)
def test_nothing_is_trained_while_other_weights_are_in_place(face):
    """The step would be lost with the block, or the best weights be trained on and called the best."""
    model, driver, _ = trained(face=face)
    optimizer = driver if face is ScheduledOptimizer else driver.optimizer
    before = everything(model)
    with driver.best(model), pytest.raises(RuntimeError, match="train after it"):
        optimizer.step(loss=1.0)
    assert_untouched(model, before)
    loss_at(model, 8).backward()
    optimizer.step(loss=1.0)


def test_blocks_may_stand_in_each_other():
    """A function that evaluates would leave other weights behind than it found."""
    model, driver, best = trained()
    before = everything(model)
    with driver.best(model):
        with driver.best(model):
            assert_same_weights(model, best)
        assert_same_weights(model, best)
        with pytest.raises(RuntimeError):
            driver.step(loss=1.0)
    assert_untouched(model, before)


def test_batch_norm_without_batches_is_refused():
    """The best weights would be judged with running averages of others: often worse than no training at all."""
    model, driver, _ = trained(with_batch_norm())
    before = everything(model)
    for use in (lambda: driver.best(model).__enter__(), lambda: driver.restore_best(model)):
        with pytest.raises(ValueError, match="batches: the model has batch norm"):
            use()
        assert_untouched(model, before)


def test_running_averages_are_computed_anew_and_put_back():
    """What is evaluated would be of one model in half, and training go on with the other half."""
    model, driver, best = trained(with_batch_norm())
    model[1].eval()  # a mode of its own
    before = everything(model)
    with driver.best(model, BATCHES):
        assert_same_weights(model, best)
        hidden = torch.stack([best[0](inputs) for inputs, _ in BATCHES])
        torch.testing.assert_close(model[1].running_mean, hidden.mean((0, 1)))
        torch.testing.assert_close(model[1].running_var, hidden.var(1).mean(0))
        assert [m.training for m in model] == [True, False, True, True]
    assert_untouched(model, before)
    driver.restore_best(model, BATCHES)
    assert_same_weights(model, best)
    torch.testing.assert_close(model[1].running_mean, hidden.mean((0, 1)))


def failing():
    """Batches of which the second cannot be read."""
    yield BATCHES[0]
    raise OSError("no such disk")


@pytest.mark.parametrize("batches, error", [(failing, OSError), (lambda: [], ValueError)], ids=["failing", "empty"])
def test_batches_that_fail_leave_everything_as_it_was(batches, error):
    """After an error in a notebook the run would go on with other weights, and batch norm without a memory."""
    model, driver, _ = trained(with_batch_norm())
    before = everything(model)
    for use in (lambda: driver.best(model, batches()).__enter__(), lambda: driver.restore_best(model, batches())):
        with pytest.raises(error):
            use()
        assert_untouched(model, before)
    loss_at(model, 8).backward()
    driver.step(loss=1.0)


def test_layers_without_running_averages_need_no_batches():
    """A model that normalizes by its inputs alone would be refused for nothing."""
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.LayerNorm(8), nn.Linear(8, 3)
    )
    model, driver, best = trained(model)
    with driver.best(model):
        assert_same_weights(model, best)


def test_misuse_is_named():
    """An error from deep inside would name nothing of what the user wrote."""
    model, driver, _ = trained(keep_best=False)
    with pytest.raises(ValueError, match="keep_best=True keeps the weights of the best validation; it was not given"):
        driver.restore_best(model)
    with pytest.raises(ValueError, match="averaging=True averages the weights; it was not given"):
        driver.averaged(model).__enter__()
    model, driver, _ = trained()
    with pytest.raises(TypeError, match=r"model must be the torch.nn.Module that is trained, got list"):
        driver.restore_best(BATCHES)
    fresh = ScheduledOptimizer(torch.optim.SGD(model.parameters(), 0.1), total_steps=9, keep_best=True)
    fresh.observe_validation(float("nan"))
    with pytest.raises(ValueError, match="no finite validation loss was observed on this rank"):
        fresh.restore_best(model)


def test_layer_that_was_added_later_is_in_the_next_copy():
    """Layers that are unfrozen one after the other would be of another time than the rest."""
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    kept = WeightCopy()
    kept.take(list(one.parameters()), 1)
    with torch.no_grad():
        one.weight += 1
    kept.take([*one.parameters(), *other.parameters()], 2)
    assert kept.step == 2
    for copied, p in zip(kept.tensors, [*one.parameters(), *other.parameters()], strict=True):
        assert torch.equal(copied, p) and not copied.requires_grad


# --- Averages -------------------------------------------------------------------------------------------------------


def averages_of(path, dtype=torch.float64):
    """The average after each step along a path of weights (steps, weights)."""
    average, weights, seen = WeightAverage(), torch.zeros_like(path[0], dtype=dtype), []
    for step in path:
        weights.copy_(step)
        average.move([weights])
        seen.append(average.tensors[0].clone())
    return torch.stack(seen)


def test_average_is_that_of_its_formula():
    """An average that forgets too fast is the last weights, and one that does not is of the beginning of the run.

    Unrolled, step s of t has the weight (η + 1)/(s + η) · Π (1 − (η + 1)/(r + η)) for s < r ≤ t.
    """
    path = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    power, seen = WeightAverage.POWER, averages_of(path)
    for t in (1, 2, 9, 40):
        share = torch.ones(t, dtype=torch.float64)
        for s in range(1, t + 1):
            share[s - 1] = (power + 1) / (s + power)
            for r in range(s + 1, t + 1):
                share[s - 1] *= 1 - (power + 1) / (r + power)
        assert share.sum() == pytest.approx(1)
        torch.testing.assert_close(seen[t - 1], share @ path[:t])
    share = torch.eye(10_000, dtype=torch.float64)[:, [9_000]]  # one weight, which is 1 in one step and else 0
    share = averages_of((torch.arange(10_000) >= 9_259).double()[:, None])[-1]
    assert share.item() == pytest.approx(0.5, abs=0.01), "half of the weight is on the last 7.4 %"


def test_average_of_noise_is_better_than_the_last_weights():
    """What an average is for: with the learning rate up, the weights go around what they look for."""
    noise = torch.randn(2_000, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    last = averages_of(noise)[-1]
    assert last.square().mean() < 0.01 < 0.5 < noise[-1].square().mean()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_average_of_half_precision_keeps_small_steps(half):
    """A step of a thousandth of the way is nothing in half precision: the average would stand still for ever."""
    path = torch.cat([torch.zeros(5_000, 1), torch.ones(5_000, 1)])
    assert averages_of(path, half)[-1].item() == pytest.approx(averages_of(path)[-1].item(), abs=1e-3)


@pytest.mark.parametrize("face", FACES)
def test_averaged_weights_are_in_place_for_a_block(face):
    """The average would be judged by other weights, or training go on from it."""
    model, driver, _ = trained(face=face, averaging=True)
    reference, before = driver.kept if hasattr(driver, "kept") else driver.controller.kept, everything(model)
    with driver.averaged(model):
        for p, average in zip(model.parameters(), reference.average.tensors, strict=True):
            assert torch.equal(p, average)
        with pytest.raises(RuntimeError, match="train after it"):
            train(model, driver if face is ScheduledOptimizer else driver.optimizer, [8])
        driver.observe_validation(0.5)
        averaged = copy.deepcopy(model)
        model.zero_grad()
    assert_untouched(model, before)
    driver.restore_best(model)
    assert_same_weights(model, averaged)


def test_averaging_changes_nothing_else():
    """Whoever looks at the average would train another network."""
    one, other = trained(averaging=True), trained()
    assert_same_weights(one[0], other[0])


def test_batch_norm_of_the_average_is_refused_or_computed_anew():
    """Running averages of other weights make of a good average a bad model."""
    model, driver, _ = trained(with_batch_norm(), averaging=True)
    before = everything(model)
    with pytest.raises(ValueError, match="batches: the model has batch norm"):
        driver.averaged(model).__enter__()
    with driver.averaged(model, BATCHES):
        hidden = torch.stack([model[0](inputs) for inputs, _ in BATCHES])
        torch.testing.assert_close(model[1].running_mean, hidden.mean((0, 1)))
    assert_untouched(model, before)


def test_average_begins_anew_with_weights_that_were_taken_back():
    """Weights of 10¹⁰, long since undone, would be in the average for the rest of the run."""
    model = network()
    inner = torch.optim.SGD(model.parameters(), 0.01)
    options = {"policy": always(lr=0.0), "total_steps": 60, "decisions": 15, "on_divergence": "rollback"}
    optimizer = ScheduledOptimizer(inner, averaging=True, **options)
    train(model, optimizer, range(20))
    with torch.no_grad():
        for p in model.parameters():
            p *= -1e10
    train(model, optimizer, range(20, 59))
    assert any("rolled back" in message for _, message in optimizer.controller.interventions)
    with optimizer.averaged(model):
        assert_finite_weights(model)
        assert all(p.abs().max() < 10 for p in model.parameters())


def test_average_before_the_first_step_is_the_weights():
    """A script that validates first would fail there."""
    model = network()
    optimizer = ScheduledOptimizer(torch.optim.SGD(model.parameters(), 0.1), total_steps=9, averaging=True)
    before = everything(model)
    with optimizer.averaged(model):
        assert_untouched(model, before)
