"""The inner tasks are learnable, varied and well-formed; otherwise a policy would learn from noise."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from rlsched.envs import Digits, Episode, Prototypes, SchedulingVectorEnv, SetupDistribution, TeacherStudent
from rlsched.envs.mixtures import MIXTURES, mixture
from rlsched.envs.tasks import log_uniform

GENERATED = {"inputs": 8, "hidden": (24,), "classes": 4, "points": (512, 512), "label_noise": 0.0}
TASKS = {
    "teacher": TeacherStudent(**GENERATED, spectrum=(1.5, 1.5), teacher_gain=(1.0, 1.0)),
    "prototypes": Prototypes(**GENERATED, separation=(4.0, 4.0)),
    "digits": Digits(hidden=(24,)),
}


def play_zero(task, setup, runs=4):
    """Validation losses at the start and the end of runs under the fallback schedule."""
    task = replace(task, gain=(1.0, 1.0), setup=setup)
    env = SchedulingVectorEnv(runs, [task], safe_start=False, autoreset=False)
    _, infos = env.reset(seed=0)
    first, total = infos["validation_loss"], np.zeros(runs)
    terminated = np.zeros(runs, bool)
    while not terminated.any():
        _, rewards, terminated, _, infos = env.step(np.zeros((runs, 3), np.float32))
        total += rewards
    return first, infos["validation_loss"], total


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("adaptive", [0, 1])
def test_sane_learning_rate_learns(name, adaptive):
    """A task that no learning rate solves would teach nothing, and nobody would notice."""
    task = TASKS[name]
    setup = SetupDistribution(
        decisions=(30, 30), adaptive=adaptive, sgd_lr=(0.1, 0.1), adaptive_lr=(1e-2, 1e-2), no_momentum=0
    )
    _, last, _ = play_zero(task, setup)
    chance = math.log(10 if name == "digits" else task.classes)
    assert (last < 0.5 * chance).all(), (last, chance)
    assert last.mean() < 0.3 * chance


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("adaptive", [0, 1])
def test_absurd_learning_rate_diverges(name, adaptive):
    """If every learning rate worked, the policy would have no reason to look for one."""
    setup = SetupDistribution(decisions=(5, 5), adaptive=adaptive, sgd_lr=(1e3, 1e3), adaptive_lr=(1e3, 1e3))
    _, _, total = play_zero(TASKS[name], setup)
    assert total.mean() < -1.5
    assert (total < 0.1).all()


def test_prototypes_are_as_far_apart_as_they_say():
    """Classes that overlap more than stated have no loss to reach, and teach a policy to stop early."""
    flat = {
        "spectrum": (0.0, 0.0),
        "input_scale": (1.0, 1.0),
        "positive": 0.0,
        "label_noise": 0.0,
        "points": (8000, 8000),
    }
    task = Prototypes(inputs=200, classes=4, prototypes=(1, 1), separation=(3.0, 3.0), **flat)
    e = task.episode(np.random.default_rng(0))
    means = torch.stack([e.inputs[e.targets == c].mean(0) for c in range(4)])
    noise = (e.inputs - means[e.targets]).square().mean().sqrt()
    assert torch.pdist(means).mean() / 2 / noise == pytest.approx(3.0, rel=0.1)
    assert e.inputs.square().mean().sqrt() == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("family", [TeacherStudent, Prototypes])
def test_positive_inputs_are_sparse_and_not_centred(family):
    """Without inputs like pixels the policy never meets the large leading curvature that their mean gives a network."""
    inputs = family(positive=1.0).episode(np.random.default_rng(0)).inputs
    assert inputs.min() == 0
    assert 0.1 < (inputs == 0).float().mean() < 0.9
    assert inputs.mean() > 0.2 * inputs.std()
    assert family(positive=0.0).episode(np.random.default_rng(0)).inputs.min() < 0


@pytest.mark.parametrize("task", [*MIXTURES["mlp"], *MIXTURES["small"], *MIXTURES["digits"]])
def test_episode_is_well_formed(task):
    """A shape, a type or a label out of place would train every network of the mixture on garbage."""
    network = task.network()
    for seed in range(3):
        e = task.episode(np.random.default_rng(seed))
        assert e.params.shape == (sum(p.numel() for p in network.parameters()),)
        assert len(e.inputs) == len(e.targets) <= task.max_points
        assert len(e.validation_inputs) == len(e.validation_targets) > 0
        for inputs, targets in ((e.inputs, e.targets), (e.validation_inputs, e.validation_targets)):
            assert inputs.dtype == torch.float32 and inputs.isfinite().all()
            outputs = network(inputs)
            assert targets.min() >= 0 and targets.max() < outputs.shape[-1]
            assert task.loss(outputs, targets).shape == ()


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_episode_is_drawn_from_its_generator_alone(task):
    """An episode that depends on global state could not be replayed or compared."""
    first, other = task.episode(np.random.default_rng(7)), task.episode(np.random.default_rng(8))
    torch.manual_seed(123)
    np.random.seed(123)
    again = task.episode(np.random.default_rng(7))
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not torch.equal(first.params, other.params) and first.loss_scale != other.loss_scale


def test_digits_split_is_a_partition():
    """A digit that trains and validates would reward overfitting."""
    from sklearn.datasets import load_digits

    e = Digits().episode(np.random.default_rng(0))
    assert len(e.validation_targets) == 1797 // 5
    rows = torch.cat([torch.cat([e.inputs, e.validation_inputs]).round(decimals=4) * 16, torch.zeros(1797, 1)], 1)
    rows[:, -1] = torch.cat([e.targets, e.validation_targets])
    data = load_digits()
    expected = np.concatenate([data.data, data.target[:, None]], 1)
    np.testing.assert_array_equal(sorted(rows.tolist()), sorted(expected.tolist()))


def test_label_noise_flips_no_more_labels_than_it_says():
    """Without label noise in some episodes the policy would never meet a loss that cannot reach zero."""
    clean = TeacherStudent(inputs=6, classes=10, hidden=(4,), points=(2000, 2000), label_noise=0.0)
    noisy = replace(clean, label_noise=0.3)
    flipped = np.array(
        [
            (clean.episode(np.random.default_rng(s)).targets != noisy.episode(np.random.default_rng(s)).targets)
            .float()
            .mean()
            for s in range(40)
        ]
    )
    assert 20 <= (flipped == 0).sum() <= 38, "three quarters of the episodes have none"
    assert flipped.max() < 0.33
    assert flipped.max() > 0.15


def test_input_spectrum_keeps_the_scale():
    """The exponent of the spectrum must not change the size of the inputs, which has its own range."""
    fixed = {"spectrum": (1.5, 1.5), "input_scale": (2.0, 2.0), "points": (4000, 4000), "positive": 0.0}
    task = TeacherStudent(inputs=32, **fixed)
    inputs = task.episode(np.random.default_rng(0)).inputs
    assert inputs.square().mean().sqrt() == pytest.approx(2.0, rel=0.05)
    deviations = inputs.std(0).sort(descending=True).values
    assert deviations[0] / deviations[15] == pytest.approx(16**1.5, rel=0.1)


def test_setup_is_drawn_within_its_ranges():
    """A learning rate outside the stated range would make the reported range of robustness untrue."""
    setup = SetupDistribution()
    rng = np.random.default_rng(0)
    drawn = [(scale, setup.draw(rng, scale)) for scale in (0.1, 1.0, 10.0) for _ in range(400)]
    for scale, s in drawn:
        assert setup.decisions[0] <= s.decisions <= setup.decisions[1]
        low, high = setup.adaptive_lr if s.adaptive else setup.sgd_lr
        # One step of SGD at momentum β is worth 1 / (1 - β) steps without.
        lr = s.lr if s.adaptive else s.lr * scale * 0.1 / (1 - s.momentum)
        assert low * 0.999 <= lr <= high * 1.001
        assert s.momentum == 0 or 0.5 <= s.momentum <= 0.98
        assert s.momentum > 0 or not s.adaptive
        assert s.weight_decay == 0 or setup.weight_decay[0] <= s.weight_decay <= setup.weight_decay[1]
    share = {
        "adaptive": np.mean([s.adaptive for _, s in drawn]),
        "weight decay": np.mean([s.weight_decay > 0 for _, s in drawn]),
        "no loss": np.mean([not s.loss_reported for _, s in drawn]),
        "no momentum": np.mean([s.momentum == 0 for _, s in drawn if not s.adaptive]),
        "usual momentum": np.mean([s.momentum == 0.9 for _, s in drawn if s.adaptive]),
    }
    expected = {"adaptive": 0.5, "weight decay": 0.5, "no loss": 0.05, "no momentum": 0.05, "usual momentum": 0.7}
    assert share == pytest.approx(expected, abs=0.06)


def test_log_uniform_is_uniform_in_the_logarithm():
    """A uniform draw would hide the small learning rates."""
    rng = np.random.default_rng(0)
    logs = np.log10([log_uniform(rng, 1e-4, 1.0) for _ in range(2000)])
    np.testing.assert_allclose(np.histogram(logs, 4, (-4, 0))[0] / 2000, 0.25, atol=0.04)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: SetupDistribution(decisions=(0, 5)), "decisions"),
        (lambda: SetupDistribution(sgd_lr=(1.0, 0.1)), "sgd_lr"),
        (lambda: SetupDistribution(adaptive_lr=(-1.0, 0.1)), "adaptive_lr"),
        (lambda: SetupDistribution(weight_decay=(0.0, 0.1)), "weight_decay"),
        (lambda: SetupDistribution(adaptive=1.5), "adaptive"),
        (lambda: SetupDistribution(no_loss=-0.1), "no_loss"),
        (lambda: Digits(activation="swish"), "activation"),
        (lambda: Digits(batch_size=0), "batch_size"),
        (lambda: Digits(interval=0), "interval"),
        (lambda: Digits(hidden=(8, 0)), "hidden"),
        (lambda: Digits(gain=(0.0, 1.0)), "gain"),
        (lambda: TeacherStudent(loss_scale=(2.0, 1.0)), "loss_scale"),
        (lambda: TeacherStudent(points=(0, 10)), "points"),
        (lambda: TeacherStudent(classes=0), "classes"),
        (lambda: TeacherStudent(label_noise=2.0), "label_noise"),
        (lambda: TeacherStudent(teacher_width=0), "teacher_width"),
        (lambda: Prototypes(separation=(2.0, 1.0)), "separation"),
        (lambda: Prototypes(prototypes=(0, 1)), "prototypes"),
        (lambda: mixture("mnist"), "tasks"),
        (lambda: mixture([]), "tasks"),
    ],
)
def test_wrong_configuration_is_named(make, field):
    """An empty range would surface much later, as a NaN in the middle of an episode."""
    with pytest.raises(ValueError, match=rf"^{field}\b"):
        make()


class Regression:
    """A user's own inner task: linear regression, with targets that are vectors of floats."""

    batch_size, interval, max_points = 8, 3, 20
    setup = SetupDistribution(decisions=(40, 40), adaptive=1, adaptive_lr=(0.1, 0.1), other_momentum=0)

    def network(self):
        return nn.Linear(3, 2, bias=False)

    def loss(self, outputs, targets):
        return nn.functional.mse_loss(outputs, targets)

    def episode(self, rng):
        x = torch.from_numpy(rng.standard_normal((28, 3), dtype=np.float32))
        y = x @ torch.from_numpy(rng.standard_normal((3, 2), dtype=np.float32))
        return Episode(torch.zeros(6), x[:20], y[:20], x[20:], y[20:], 1.0)


def test_own_task_with_real_targets_learns():
    """Targets that are cut down to whole numbers would turn a user's regression into another problem."""
    env = SchedulingVectorEnv(2, [Regression()], safe_start=False)
    _, infos = env.reset(seed=0)
    first, terminated = infos["validation_loss"], [False]
    while not any(terminated):
        _, _, terminated, _, infos = env.step(np.zeros((2, 3), np.float32))
    assert (infos["final_info"]["validation_loss"] < 1e-3 * first).all()


def test_own_task_that_breaks_its_promise_is_refused():
    """More points than promised would spill into the data of the next network."""
    task = Regression()
    task.max_points = 10
    with pytest.raises(ValueError, match="max_points"):
        SchedulingVectorEnv(2, [task]).reset()
