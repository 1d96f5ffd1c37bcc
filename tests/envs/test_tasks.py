"""The inner tasks are learnable, varied and well-formed; otherwise a policy would learn from noise."""

import hashlib
import math
import multiprocessing
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import Dataset

from rlsched.envs import FAMILIES, InnerTask, SchedulingVectorEnv, SetupDistribution
from rlsched.envs.mixtures import digits
from rlsched.envs.networks import MLP
from rlsched.envs.optimizers import OPTIMIZERS
from rlsched.envs.sources import Generated, Points
from rlsched.envs.tasks import multitask_loss, next_token_loss, quadratic_loss

TASKS = {**FAMILIES, "digits": digits()}

# The loss of a network that knows nothing of the inputs: of labels and tokens it knows how many there are, of numbers
# their mean, where their variance is 1. Of the quadratic, whose noise is small here, it is the one at the start.
CHANCE = {
    "quadratic": 0.5,
    "mlp": math.log(8),
    "mlp-deep": math.log(5),
    "mlp-wide": math.log(10),
    "mlp-tanh": math.log(8),
    "mlp-layer-norm": math.log(10),
    "mlp-dropout": math.log(10),
    "mlp-rescaled": math.log(6),
    "mlp-long": math.log(8),
    "mlp-by-heart": math.log(8),
    "mlp-few-points": math.log(3),
    "regression": 1.0,
    "regression-tanh": 1.0,
    "regression-by-heart": 1.0,
    "two-heads": math.log(6) + 1,
    "autoencoder": 1.0,
    "autoencoder-tanh": 1.0,
    "conv": math.log(8),
    "conv-batch-norm": math.log(8),
    "recurrent": math.log(8),
    "recurrent-many-tokens": math.log(160),
    "recurrent-source-code": math.log(48),
    "recurrent-plain": math.log(64),
    "attention-plain": math.log(64),
    "attention": math.log(12),
    "attention-copying": math.log(12),
    "attention-source-code": math.log(48),
    "digits": math.log(10),
}
# The most that is left of that in any run, where it is not a half, and in the mean, where it is not 0.35.
LEFT = {
    "mlp-rescaled": (0.6, 0.35),
    "recurrent-many-tokens": (0.95, 0.85),
    "recurrent-source-code": (0.9, 0.85),
    "attention-source-code": (0.9, 0.85),
    "recurrent-plain": (0.9, 0.85),
    "attention-plain": (0.9, 0.85),
    "regression-by-heart": (0.8, 0.6),
}
BY_HEART = {
    "mlp-by-heart",
    "mlp-few-points",
    "regression-by-heart",
}  # of which a network may learn no more than its own points

# Base learning rates of SGD that anyone would try, where it is not 0.03; that of AdamW is 0.02 throughout.
SGD_LR = {
    "regression": 0.01,
    "two-heads": 0.01,
    "autoencoder": 0.01,
    "attention-copying": 0.3,
    "recurrent-many-tokens": 1.0,
}
# Data that are as easy as a source has them.
EASY = {
    "spectrum": (1.0, 1.0),
    "input_scale": (1.0, 1.0),
    "positive": 0.0,
    "label_noise": 0.0,
    "teacher_gain": (1.0, 1.0),
    "separation": (4.0, 4.0),
    "prototypes": (1, 1),
    "pictures": (1, 1),
    "noise": (0.05, 0.05),
    "concentration": (0.03, 0.03),
    "lag": (2, 2),
}


def play_zero(task, *, decisions, sgd_lr, adaptive_lr, runs=6):
    """Infos at the end of runs of SGD and AdamW under the base schedule, and their returns."""
    setup = SetupDistribution(
        decisions=(decisions, decisions),
        sgd_lr=(sgd_lr, sgd_lr),
        adaptive_lr=(adaptive_lr, adaptive_lr),
        weight_decay=(1e-6, 1e-6),
        no_momentum=0,
        other_momentum=0,
        loss_scale=(1, 1),
        gain=(1, 1),
    )
    env = SchedulingVectorEnv(runs, [replace(task, setup=setup)], safe_start=False)
    env.reset(seed=0)
    ends = [{}] * runs
    while not all(ends):
        *_, done, _, infos = env.step(np.zeros(env.action_space.shape, np.float32))
        for i in np.flatnonzero(done):
            ends[i] = ends[i] or {key: values[i] for key, values in infos["final_info"].items()}
    infos = {key: np.array([end[key] for end in ends]) for key in ends[0]}
    assert set(infos["adaptive"]) == {-1, 1}, "both optimizers"
    return infos, infos["return"]


# --- Learnable ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_sane_learning_rate_learns(name):
    """A task that no learning rate solves would teach nothing, and nobody would notice."""
    task = TASKS[name]
    if isinstance(task.source, Generated):
        easy = {knob: value for knob, value in EASY.items() if hasattr(task.source, knob)}
        easy["points"] = (task.source.max_points,) * 2
        task = replace(task, data=replace(task.source, **easy))
    infos, _ = play_zero(task, decisions=25, sgd_lr=SGD_LR.get(name, 0.03), adaptive_lr=0.02)
    left = infos["train_loss" if name in BY_HEART else "validation_loss"] / CHANCE[name]
    most, mean = LEFT.get(name, (0.5, 0.35))
    assert (left < most).all(), left
    assert left.mean() < mean


@pytest.mark.parametrize("name", TASKS)
def test_absurd_learning_rate_diverges(name):
    """If every learning rate worked, the policy would have no reason to look for one."""
    _, total = play_zero(TASKS[name], decisions=4, sgd_lr=1e3, adaptive_lr=1e3)
    np.testing.assert_allclose(total, -2, atol=1e-5)


def test_own_task_with_real_targets_learns():
    """Targets that are cut down to whole numbers would turn a user's regression into another problem."""
    x = torch.randn(60, 3)
    task = InnerTask(lambda: nn.Linear(3, 2, bias=False), (x, x @ torch.randn(3, 2)), mse_loss, batch_size=8)
    infos, total = play_zero(task, decisions=30, sgd_lr=0.1, adaptive_lr=0.1)
    assert (infos["validation_loss"] < 1e-3).all() and (total > 4).all()


# --- Reproducible ---------------------------------------------------------------------------------------------------


def digest(name):
    """Of everything that comes back from runs of a family, in which episodes end and begin."""
    setup = SetupDistribution(decisions=(2, 4), optimizers=dict.fromkeys(OPTIMIZERS, 1.0))
    env = SchedulingVectorEnv(3, [replace(FAMILIES[name], setup=setup)])
    actions = np.random.default_rng(0).uniform(-1, 1, (8, *env.action_space.shape)).astype(np.float32)
    everything = [env.reset(seed=11)[0], *(array for a in actions for array in env.step(a)[:3])]
    return hashlib.sha256(b"".join(array.tobytes() for array in everything)).hexdigest()


def test_same_seed_gives_the_same_episodes():
    """Episodes with noise of their own, as of dropout, must come back with their seed, or no result can be checked."""
    expected = {name: digest(name) for name in ("mlp-dropout", "conv-batch-norm")}
    torch.manual_seed(123)
    np.random.seed(123)
    assert {name: digest(name) for name in expected} == expected
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(digest, ("mlp-dropout",)) == expected["mlp-dropout"], "in another process"


def test_initial_weights_belong_to_their_seed():
    """Weights that depend on global state could not be drawn again, and drawing them would disturb the user's."""
    task = FAMILIES["mlp-dropout"]
    torch.manual_seed(0)
    expected, numbers = task.initial_network(3).state_dict(), torch.rand(2)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(2), numbers), "global random numbers go on as if nothing had been"
    again, other = task.initial_network(3).state_dict(), task.initial_network(4).state_dict()
    assert all(torch.equal(again[key], expected[key]) for key in expected)
    assert not torch.equal(other["0.weight"], expected["0.weight"])


# --- Set-ups --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setups():
    """Many draws of a distribution of all optimizers, and that distribution."""
    distribution = SetupDistribution(optimizers=dict.fromkeys(OPTIMIZERS, 1))
    rng = np.random.default_rng(0)
    return distribution, [distribution.draw(rng, (32, 16, 8)) for _ in range(4000)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_setup_is_drawn_within_its_ranges(setups, optimizer):
    """A learning rate outside the stated range would make the reported range of robustness untrue."""
    distribution, drawn = setups
    drawn = [s for s in drawn if s.optimizer == optimizer]
    adaptive = optimizer in ("Adam", "AdamW", "RMSprop")
    # Momentum that sums gradients makes 1 / (1 - β) steps of one, so the range is of lr / (1 - β): of RMSprop as it
    # is, of SGD times the loss scale and at a momentum of 0.9.
    worth = [1 if optimizer in ("Adam", "AdamW") else 1 - s.momentum for s in drawn]
    lrs = [s.lr / w if adaptive else s.lr / w * 0.1 * s.loss_scale for s, w in zip(drawn, worth, strict=True)]
    ranges = {
        "lr": (lrs, distribution.adaptive_lr if adaptive else distribution.sgd_lr),
        "decisions": ([s.decisions for s in drawn], distribution.decisions),
        "weight_decay": ([s.weight_decay for s in drawn if s.weight_decay], distribution.weight_decay),
        "loss_scale": ([s.loss_scale for s in drawn], distribution.loss_scale),
        "gain": ([s.gain for s in drawn], distribution.gain),
        "1 - momentum": ([1 - s.momentum for s in drawn if s.momentum not in (0, 0.9)], (0.02, 0.5)),
    }
    for name, (values, (low, high)) in ranges.items():
        assert low * 0.999 <= min(values) and max(values) <= high * 1.001, name
        # Log-uniform: a mean in the middle, and values up to both ends.
        assert np.log(values).mean() == pytest.approx(math.log(low * high) / 2, abs=0.08 * math.log(high / low)), name
        assert math.log(max(values) / min(values)) > 0.9 * math.log(high / low), name


def test_setup_shares_are_those_that_it_says(setups):
    """An option that is accepted and then ignored would train a policy for other optimizers than reported."""
    _, drawn = setups

    def share(which, among=lambda s: True):
        return np.mean([which(s) for s in drawn if among(s)])

    def of(*optimizers):
        return lambda s: s.optimizer in optimizers

    no_momentum, usual_momentum = lambda s: s.momentum == 0, lambda s: s.momentum == 0.9
    shares = {
        **{optimizer: share(of(optimizer)) for optimizer in OPTIMIZERS},
        "weight decay": share(lambda s: s.weight_decay > 0),
        "no loss": share(lambda s: not s.loss_reported),
        "a loss, no validation": share(lambda s: not s.validation_reported, lambda s: s.loss_reported),
        "validation, no loss": share(lambda s: s.validation_reported, lambda s: not s.loss_reported),
        "SGD without momentum": share(no_momentum, of("SGD")),
        "RMSprop without momentum": share(no_momentum, of("RMSprop")),
        "others without momentum": share(no_momentum, of("Nesterov", "Adam", "AdamW")),
        "usual momentum": share(usual_momentum, of("Nesterov", "Adam", "AdamW")),
        "largest batch": share(lambda s: s.batch_size == 32),
        "smallest batch": share(lambda s: s.batch_size == 8),
    }
    expected = {
        **dict.fromkeys(OPTIMIZERS, 0.2),
        "weight decay": 0.5,
        "no loss": 0.05,
        "a loss, no validation": 0.5,
        "validation, no loss": 0.0,
        "SGD without momentum": 0.05,
        "RMSprop without momentum": 0.5,
        "others without momentum": 0.0,
        "usual momentum": 0.7,
        "largest batch": 1 / 3,
        "smallest batch": 1 / 3,
    }
    assert shares == pytest.approx(expected, abs=0.05)
    assert shares["others without momentum"] == 0
    assert {s.batch_size for s in drawn} == {8, 16, 32}


def test_optimizers_are_drawn_by_their_weights():
    """A weight of zero must exclude, and the others count by their ratio."""
    distribution = SetupDistribution(optimizers={"SGD": 6, "RMSprop": 2, "Adam": 0})
    rng = np.random.default_rng(0)
    drawn = [distribution.draw(rng, (8,)).optimizer for _ in range(1000)]
    assert set(drawn) == {"SGD", "RMSprop"}
    assert drawn.count("SGD") / 1000 == pytest.approx(0.75, abs=0.05)


@pytest.mark.parametrize(
    ("batch_size", "sizes"),
    [(5, (5,)), ((8, 32), (32, 16, 8)), ((10, 32), (32, 16)), ((1, 6), (6, 3)), ((7, 7), (7,)), ((1, 4), (4, 2, 1))],
)
def test_batch_sizes_are_halves_of_the_largest(batch_size, sizes):
    """A size that does not divide the largest could not recur in a stack's batch a whole number of times."""
    assert replace(digits(), batch_size=batch_size).batch_sizes == sizes


# --- Losses ---------------------------------------------------------------------------------------------------------


def test_next_token_loss_is_that_of_each_tokens_successor():
    """A shift by one in the wrong direction would train a network to repeat itself."""
    logits, tokens = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    expected = [cross_entropy(logits[:, i], tokens[:, i + 1]) for i in range(4)]
    torch.testing.assert_close(next_token_loss(logits, tokens), torch.stack(expected).mean())


def test_multitask_loss_is_the_sum_of_both():
    """A head whose loss is left out would not be trained."""
    outputs, labels, numbers = torch.randn(9, 4), torch.randint(3, (9,)), torch.randn(9)
    expected = cross_entropy(outputs[:, :3], labels) + (outputs[:, 3] - numbers).square().mean()
    torch.testing.assert_close(multitask_loss(outputs, torch.stack([labels, numbers], 1)), expected)


def test_quadratic_loss_is_the_sum_of_its_terms():
    """A mean over the coordinates in place of a sum would be another learning rate."""
    torch.testing.assert_close(quadratic_loss(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), None), torch.tensor(5.0))


# --- Bad input ------------------------------------------------------------------------------------------------------


class Endless(Dataset):
    """A data set without a length."""

    def __getitem__(self, i):
        return torch.zeros(4), 0


class Broken(Generated):
    """A source that breaks its promise of at most so many points."""

    def draw(self, rng):
        points = self.max_points + 1
        return Points(torch.zeros(points, 4), torch.zeros(points).long(), torch.zeros(2, 4), torch.zeros(2).long())


def linear():
    """Of 4 inputs and 3 classes."""
    return nn.Linear(4, 3)


DATA = torch.randn(20, 4), torch.randint(3, (20,))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"data": (torch.zeros(5, 4), torch.zeros(6).long())}, ValueError, "^inputs and targets .* 5 and 6"),
        ({"data": Endless()}, TypeError, "^data must have a length"),
        ({"data": torch.zeros(5, 4)}, TypeError, "^data must be a pair"),
        ({"data": Broken(points=(10, 10))}, ValueError, "^max_points .* 10, .* 11"),
        ({"network": linear()}, TypeError, r"^network must be what makes a new network, .* got Linear\(in_features=4"),
        ({"network": "linear"}, TypeError, "^network must be what makes a new network, .* got 'linear'"),
        ({"network": lambda: "linear"}, TypeError, "^network must make an nn.Module, it made a str"),
        ({"network": lambda: linear().double()}, ValueError, "^network must have trainable weights, of torch.float32"),
        ({"network": nn.Flatten}, ValueError, "^network must have trainable weights"),
        ({"network": lambda: nn.Linear(5, 3)}, RuntimeError, "shapes cannot be multiplied"),
        ({"loss": nn.CrossEntropyLoss(reduction="none")}, ValueError, r"^loss must .* shape \(16,\)"),
    ],
    ids=[
        "lengths",
        "endless",
        "no pair",
        "promise",
        "a module",
        "no factory",
        "no module",
        "float64",
        "no weights",
        "shape",
        "loss",
    ],
)
def test_bad_input_is_named(options, error, match):
    """A user's mistake must be said in the user's terms, before training begins."""
    with pytest.raises(error, match=match):
        SchedulingVectorEnv(2, [InnerTask(**{"network": linear, "data": DATA, **options})]).reset()


def negative(outputs, _):
    """A loss without a logarithm."""
    return -outputs.square().mean()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"network": lambda: nn.Linear(5, 3)}, "^tasks: 'mine' fails on its own data, RuntimeError: mat1 and mat2"),
        ({"network": lambda: 1 / 0}, "^tasks: 'mine' fails on its own data, ZeroDivisionError: division by zero"),
        ({"network": nn.Flatten}, "^tasks: 'mine' fails on its own data, RuntimeError"),
        ({"loss": nn.CrossEntropyLoss(reduction="none")}, "^tasks: 'mine' fails on its own data, RuntimeError"),
        ({"loss": negative}, "^tasks: the loss of 'mine' must be positive and finite before training, it is -"),
    ],
    ids=["shape", "network", "no weights", "loss", "negative"],
)
def test_task_that_cannot_be_trained_is_found_before_training(options, match):
    """It would show in a worker process, minutes later, or as a training in which every return is the worst."""
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=match):
        InnerTask(**{"network": linear, "data": DATA, **options}).check("mine")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_pass_their_check(name):
    """A check that is too strict would keep good tasks out."""
    before = torch.get_rng_state()
    FAMILIES[name].check(name)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: SetupDistribution(decisions=(0, 5)), "decisions"),
        (lambda: SetupDistribution(sgd_lr=(1.0, 0.1)), "sgd_lr"),
        (lambda: SetupDistribution(adaptive_lr=(-1.0, 0.1)), "adaptive_lr"),
        (lambda: SetupDistribution(weight_decay=(0.0, 0.1)), "weight_decay"),
        (lambda: SetupDistribution(loss_scale=(2.0, 1.0)), "loss_scale"),
        (lambda: SetupDistribution(gain=(0.0, 1.0)), "gain"),
        (lambda: SetupDistribution(no_loss=-0.1), "no_loss"),
        (lambda: SetupDistribution(no_validation=1.1), "no_validation"),
        (lambda: SetupDistribution(no_momentum=1.5), "no_momentum"),
        (lambda: SetupDistribution(other_momentum=1.5), "other_momentum"),
        (lambda: SetupDistribution(optimizers={"Lion": 1}), "optimizers"),
        (lambda: SetupDistribution(optimizers={}), "optimizers"),
        (lambda: SetupDistribution(optimizers={"SGD": 0}), "optimizers"),
        (lambda: SetupDistribution(optimizers={"SGD": 2, "Adam": -1}), "optimizers"),
        (lambda: digits(batch_size=0), "batch_size"),
        (lambda: digits(batch_size=(0, 8)), "batch_size"),
        (lambda: digits(batch_size=(16, 8)), "batch_size"),
        (lambda: digits(interval=0), "interval"),
        (lambda: digits(validation_interval=0), "validation_interval"),
        (lambda: digits(patience=0), "patience"),
    ],
)
def test_wrong_configuration_is_named(make, field):
    """An empty range would surface much later, as a NaN in the middle of an episode."""
    with pytest.raises(ValueError, match=rf"^{field}\b"):
        make()


def test_networks_own_configuration_is_checked_before_training():
    """A wrong option of a network must not wait for the first episode."""
    with pytest.raises(ValueError, match=r"^activation\b"):
        SchedulingVectorEnv(1, [InnerTask(lambda: MLP(4, (8,), 3, activation="swish"), DATA)])
