"""The data are what the sources say they are, and every episode can be drawn again."""

import math
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from rlsched.envs.sequences import Copying, Markov
from rlsched.envs.sources import (
    Generated,
    Images,
    Noise,
    Prototypes,
    Reconstruction,
    TeacherMultitask,
    TeacherRegression,
    TeacherStudent,
)
from rlsched.envs.stored import BUNDLED, Stored, bundled

GENERATED = [
    TeacherStudent(),
    TeacherRegression(),
    TeacherMultitask(),
    Prototypes(),
    Reconstruction(),
    Images(),
    Markov(),
    Copying(),
    Noise(),
]
VECTORS = [s for s in GENERATED if hasattr(s, "spectrum")]
PLAIN = {"spectrum": (0.0, 0.0), "input_scale": (1.0, 1.0), "positive": 0.0}  # vectors that are as easy as can be


def drawn(source, seed=0):
    """A data set."""
    return source.draw(np.random.default_rng(seed))


def kind(source):
    """For the names of the tests."""
    return type(source).__name__


# --- All sources ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [*GENERATED, bundled("digits", points=(100, 1000))], ids=kind)
def test_data_are_drawn_from_their_generator_alone(source):
    """An episode that depends on global state could not be replayed or compared."""
    first, other = drawn(source, 7), drawn(source, 8)
    torch.manual_seed(123)
    np.random.seed(123)
    again = drawn(source, 7)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(first.inputs) != len(other.inputs)
    assert not torch.equal(first.inputs[:50], other.inputs[:50])
    assert not torch.equal(first.validation_inputs, other.validation_inputs)


@pytest.mark.parametrize("source", [*GENERATED, bundled("digits")], ids=kind)
def test_sizes_are_those_that_were_promised(source):
    """More points than promised would spill into the data of the next network."""
    source = replace(source, points=(50, 60), validation_points=9) if isinstance(source, Generated) else source
    counts = set()
    for seed in range(30):
        points = drawn(source, seed)
        counts.add(len(points.inputs))
        assert len(points.inputs) == len(points.targets) <= source.max_points
        assert len(points.validation_inputs) == len(points.validation_targets) == source.validation_points
    assert source.max_points == max(counts)
    if isinstance(source, Generated):
        assert 50 in counts and len(counts) > 5


@pytest.mark.parametrize("source", [Reconstruction(), Markov(), Copying(), Noise()], ids=kind)
def test_inputs_that_are_their_own_targets_are_one_tensor(source):
    """A second copy of the data for every network would double their memory."""
    points = drawn(source)
    assert points.targets is points.inputs
    assert points.validation_targets is points.validation_inputs


# --- Vectors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", VECTORS, ids=kind)
def test_spectrum_keeps_the_scale(source):
    """The exponent of the spectrum must not change the size of the inputs, which has its own range."""
    fixed = {"spectrum": (1.5, 1.5), "input_scale": (2.0, 2.0), "points": (4000, 4000), "positive": 0.0}
    if isinstance(source, Prototypes):
        fixed |= {"classes": 50, "prototypes": (40, 40)}  # so many that a coordinate's own prototypes do not matter
    inputs = drawn(replace(source, inputs=32, **fixed)).inputs
    assert inputs.square().mean().sqrt() == pytest.approx(2.0, rel=0.05)
    deviations = inputs.std(0).sort(descending=True).values
    assert deviations[0] / deviations[15] == pytest.approx(16**1.5, rel=0.1)


@pytest.mark.parametrize("source", VECTORS, ids=kind)
def test_input_scale_is_drawn_from_its_range(source):
    """Inputs of one size only would teach a policy one learning rate only."""
    source = replace(source, points=(500, 500), spectrum=(0.0, 0.0), positive=0.0, input_scale=(0.1, 10.0))
    scales = torch.tensor([drawn(source, seed).inputs.square().mean().sqrt() for seed in range(40)])
    assert 0.09 < scales.min() < 0.3 and 3 < scales.max() < 11
    assert scales.log10().mean() == pytest.approx(0, abs=0.3)


@pytest.mark.parametrize("source", VECTORS, ids=kind)
def test_positive_inputs_are_sparse_and_not_centred(source):
    """Without inputs like pixels the policy never meets the large leading curvature that their mean gives a network."""
    inputs = drawn(replace(source, positive=1.0)).inputs
    assert inputs.min() == 0
    assert 0.1 < (inputs == 0).float().mean() < 0.9
    assert inputs.mean() > 0.2 * inputs.std()
    assert drawn(replace(source, positive=0.0)).inputs.min() < 0
    share = np.mean([drawn(replace(source, positive=0.4, points=(9, 9)), seed).inputs.min() == 0 for seed in range(99)])
    assert share == pytest.approx(0.4, abs=0.2)


def test_prototypes_are_as_far_apart_as_they_say():
    """Classes that overlap more than stated have no loss to reach, and teach a policy to stop early."""
    options = {"prototypes": (1, 1), "separation": (3.0, 3.0), "label_noise": 0.0, "points": (8000, 8000), **PLAIN}
    points = drawn(Prototypes(inputs=200, classes=4, **options))
    means = torch.stack([points.inputs[points.targets == c].mean(0) for c in range(4)])
    noise = (points.inputs - means[points.targets]).square().mean().sqrt()
    assert torch.pdist(means).mean() / 2 / noise == pytest.approx(3.0, rel=0.1)
    assert points.inputs.square().mean().sqrt() == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("prototypes", [1, 3])
def test_classes_are_as_many_prototypes_as_they_say(prototypes):
    """One prototype for a class would make every task linear."""
    options = {"separation": (1e30, 1e30), "label_noise": 0.0, "points": (2000, 2000), **PLAIN}
    points = drawn(Prototypes(inputs=5, classes=4, prototypes=(prototypes, prototypes), **options))
    for c in range(4):
        assert len(points.inputs[points.targets == c].unique(dim=0)) == prototypes


# --- Labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [TeacherStudent(), TeacherMultitask(), Prototypes(), Images()], ids=kind)
def test_label_noise_flips_no_more_labels_than_it_says(source):
    """Without label noise in some episodes the policy would never meet a loss that cannot reach zero."""
    clean = replace(source, classes=10, points=(1500, 1500), label_noise=0.0)
    noisy = replace(clean, label_noise=0.3)

    def labels(source, seed):
        targets = drawn(source, seed).targets
        return targets[:, 0] if targets.dim() > 1 else targets

    flipped = np.array([(labels(clean, s) != labels(noisy, s)).float().mean() for s in range(40)])
    assert 20 <= (flipped == 0).sum() <= 38, "three quarters of the episodes have none"
    assert 0.1 < flipped.max() < 0.33


@pytest.mark.parametrize("source", [TeacherStudent(classes=4), Prototypes(classes=4), Images(classes=4)], ids=kind)
def test_every_class_has_points(source):
    """A class that never comes would make chance another loss than log(classes)."""
    for seed in range(3):
        targets = drawn(source, seed).targets
        assert targets.dtype == torch.int64
        assert targets.unique().tolist() == [0, 1, 2, 3]


# --- Numbers --------------------------------------------------------------------------------------------------------


def left_by_least_squares(points):
    """The targets' variance that a linear function of the inputs does not explain."""
    x, y = torch.cat([points.inputs, points.validation_inputs]), torch.cat([points.targets, points.validation_targets])
    x, y = torch.cat([x, torch.ones(len(x), 1)], 1).double(), y.double()
    return (y - x @ torch.linalg.lstsq(x, y).solution).square().mean()


@pytest.mark.parametrize("noise", [0.05, 0.5])
def test_regression_targets_are_standardised_and_as_noisy_as_they_say(noise):
    """Targets of any other size or noise would move the loss that a good schedule can reach."""
    # A teacher of a tiny gain is linear, so least squares leave the noise alone.
    options = {"teacher_gain": (1e-3, 1e-3), "noise": (noise, noise), "points": (5000, 5000), **PLAIN}
    points = drawn(TeacherRegression(inputs=6, outputs=3, **options))
    assert points.targets.shape == (5000, 3) and points.targets.dtype == torch.float32
    targets = torch.cat([points.targets, points.validation_targets])
    torch.testing.assert_close(targets.mean(0), torch.zeros(3), atol=4 * noise / 5000**0.5, rtol=0)
    torch.testing.assert_close(targets.var(0), torch.full((3,), 1 + noise**2), rtol=0.05, atol=0)
    assert left_by_least_squares(points).sqrt() == pytest.approx(noise, rel=0.02)


def test_regression_teacher_is_not_linear_at_a_large_gain():
    """A teacher that least squares can copy would need no network."""
    options = {"teacher_gain": (4.0, 4.0), "noise": (0.01, 0.01), **PLAIN}
    assert left_by_least_squares(drawn(TeacherRegression(**options))) > 0.1


def test_multitask_targets_are_a_label_and_a_standardised_number():
    """A column out of place would train the wrong head."""
    targets = torch.cat(drawn(TeacherMultitask(classes=5))[1::2])
    assert targets.dtype == torch.float32 and targets.shape[1] == 2
    assert targets[:, 0].unique().tolist() == [0, 1, 2, 3, 4]
    assert targets[:, 1].mean() == pytest.approx(0, abs=1e-4)
    assert targets[:, 1].std() == pytest.approx(1, abs=1e-3)
    assert len(targets[:, 1].unique()) > 100


# --- Images ---------------------------------------------------------------------------------------------------------


def test_images_have_the_scale_and_noise_that_they_say():
    """Pixels of another scale would need another learning rate than the range of scales allows for."""
    source = Images(channels=2, size=6, noise=(0.5, 0.5), input_scale=(2.0, 2.0), classes=40, points=(1500, 1500))
    inputs = drawn(source).inputs
    assert inputs.shape == (1500, 2, 6, 6) and inputs.dtype == torch.float32
    assert inputs.square().mean().sqrt() == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("pictures", [1, 2])
def test_a_class_is_its_pictures_shifted_by_a_pixel(pictures):
    """Without shifts a perceptron would do as well as a convolution."""
    source = Images(
        classes=3, pictures=(pictures, pictures), noise=(1e-30, 1e-30), label_noise=0.0, points=(2000, 2000)
    )
    points = drawn(source)
    for c in range(3):
        images = points.inputs[points.targets == c][:, 0]
        seen = {tuple(image.flatten().tolist()) for image in images}
        assert len(seen) == 9 * pictures
        shifts = [images[:1].roll((i, j), (-2, -1)) for i in range(-2, 3) for j in range(-2, 3)]
        nearest = torch.stack([(images - shifted).abs().amax((-2, -1)) for shifted in shifts]).amin(0)
        assert (nearest < 1e-3).float().mean() == pytest.approx(1 / pictures, abs=0.1)


# --- Sequences ------------------------------------------------------------------------------------------------------


def test_markov_chain_has_the_transitions_of_its_matrix():
    """Sequences without memory would leave nothing to learn but the frequencies."""
    tokens = 6
    source = Markov(tokens=tokens, length=30, concentration=(0.05, 0.05), points=(3000, 3000))
    first = drawn(source)
    assert first.inputs.shape == (3000, 30) and first.inputs.dtype == torch.int64

    def transitions(sequences):
        pairs = (sequences[:, :-1] * tokens + sequences[:, 1:]).flatten()
        counts = torch.bincount(pairs, minlength=tokens**2).view(tokens, tokens).float()
        return counts / counts.sum(-1, keepdim=True).clamp(min=1)

    # The same chain wherever one looks: in one half of the sequences, in the other, and early or late in them.
    everywhere = transitions(first.inputs)
    for part in (first.inputs[:1500], first.inputs[1500:], first.inputs[:, :10], first.inputs[:, 20:]):
        common = torch.bincount(part[:, :-1].flatten(), minlength=tokens) > 1000
        assert common.sum() >= 2
        torch.testing.assert_close(transitions(part)[common], everywhere[common], atol=0.06, rtol=0)
    assert torch.bincount(first.inputs[:, 0], minlength=tokens).min() > 3000 / tokens * 0.8, "it starts anywhere"

    def entropy(concentration):
        source = Markov(tokens=tokens, length=30, concentration=(concentration,) * 2, points=(3000, 3000))
        p = torch.stack([transitions(drawn(source, seed).inputs) for seed in range(20)])
        return -(p * p.clamp(min=1e-9).log()).sum(-1).mean() / math.log(tokens)

    # Of a symmetric Dirichlet distribution: ψ(tokens · concentration + 1) − ψ(concentration + 1).
    for concentration in (0.05, 2.0):
        a = torch.tensor(concentration)
        expected = (torch.digamma(tokens * a + 1) - torch.digamma(a + 1)) / math.log(tokens)
        assert entropy(concentration) == pytest.approx(expected.item(), abs=0.06)


@pytest.mark.parametrize("lag", [2, 3])
def test_copying_follows_its_rule_as_often_as_it_says(lag):
    """A rule that holds more or less often than stated has another loss at its end."""
    noise, tokens = 0.2, 8
    source = Copying(tokens=tokens, length=20, lag=(lag, lag), noise=(noise, noise), points=(2000, 2000))
    sequences = drawn(source).inputs
    assert sequences.shape == (2000, 20) and sequences.dtype == torch.int64

    def follows(lag):
        """The renaming that fits best, and how often it holds."""
        before, after = sequences[:, :-lag].flatten(), sequences[:, lag:].flatten()
        counts = torch.bincount(before * tokens + after, minlength=tokens**2).view(tokens, tokens)
        return counts.argmax(-1), counts.amax(-1).sum() / counts.sum()

    renamed, share = follows(lag)
    assert share == pytest.approx(1 - noise * (1 - 1 / tokens), abs=0.01)
    assert sorted(renamed.tolist()) == list(range(tokens)) != renamed.tolist(), "a permutation"
    assert follows(lag + 1)[1] < 0.5, "at any other lag there is nothing to see"
    frequencies = torch.bincount(sequences.flatten(), minlength=tokens) / sequences.numel()
    torch.testing.assert_close(frequencies, torch.full((tokens,), 1 / tokens), atol=0.02, rtol=0)


def test_noise_has_the_deviation_that_it_says():
    """The noise of the quadratic decides where its loss ends: at half its square."""
    inputs = drawn(Noise(dimension=9, noise=(0.3, 0.3), points=(5000, 5000))).inputs
    assert inputs.shape == (5000, 9)
    assert inputs.std() == pytest.approx(0.3, rel=0.02) and inputs.mean() == pytest.approx(0, abs=0.01)


# --- Stored data ----------------------------------------------------------------------------------------------------


def numbered(count):
    """Inputs (count, 2) and targets (count,) that tell their row."""
    rows = torch.arange(count)
    return torch.stack([rows, -rows], 1).float(), rows


@pytest.mark.parametrize("count", [2, 3, 10, 7000])
def test_stored_split_is_a_partition(count):
    """A point that trains and validates would reward overfitting."""
    source = Stored(*numbered(count))
    expected = max(1, min(1024, count // 5))
    assert source.validation_points == expected and source.max_points == count - expected
    points = drawn(source)
    assert len(points.validation_targets) == expected
    assert torch.cat([points.targets, points.validation_targets]).sort().values.tolist() == list(range(count))
    for inputs, targets in (points[:2], points[2:]):
        torch.testing.assert_close(inputs, torch.stack([targets, -targets], 1).float())
    if count == 10:
        seen = torch.cat([drawn(source, seed).validation_targets for seed in range(200)])
        assert torch.bincount(seen, minlength=10).min() > 20, "every point's turn to validate comes"


def test_stored_points_are_drawn_from_their_range():
    """Options that are accepted and then ignored would train on another amount of data than reported."""
    source = Stored(*numbered(100), points=(4, 9), validation_points=60)
    counts = np.array([len(drawn(source, seed).inputs) for seed in range(200)])
    assert source.max_points == 9 and set(counts) == set(range(4, 10))
    assert np.median(counts) == pytest.approx(6), "log-uniform"
    rows, validation = source.rows(np.random.default_rng(3))
    assert len(validation) == 60 and not set(rows.tolist()) & set(validation.tolist())
    torch.testing.assert_close(drawn(source, 3).inputs, source.inputs[rows])


class Pairs(Dataset):
    """A user's data set of arrays and Python numbers."""

    def __len__(self):
        return 10

    def __getitem__(self, i):
        return np.array([i, -i], np.float64), i


class Endless(Dataset):
    """A data set without a length."""

    def __getitem__(self, i):
        return torch.zeros(2), i


def test_a_data_set_of_pairs_equals_its_tensors():
    """A user's Dataset must be the data that it holds."""
    inputs, targets = numbered(10)
    for data in (Pairs(), TensorDataset(inputs, targets), (inputs, targets), [inputs, targets]):
        source = Stored.of(data, validation_points=3)
        torch.testing.assert_close((source.inputs, source.targets), (inputs, targets), rtol=0, atol=0)
        assert source.validation_points == 3


def test_arrays_become_tensors_of_single_precision():
    """NumPy's float64 would clash with the weights' float32 at the first product."""
    x, y = np.random.default_rng(0).normal(size=(2, 10, 3))
    source = Stored(x, y)
    assert source.inputs.dtype == source.targets.dtype == torch.float32
    np.testing.assert_allclose(source.inputs, x, rtol=1e-6)
    np.testing.assert_allclose(source.targets, y, rtol=1e-6)
    labels = Stored(x.astype(np.float16), np.arange(10))
    assert (labels.inputs.dtype, labels.targets.dtype) == (torch.float16, torch.int64), "what may be meant stays"


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Stored(torch.zeros(3, 2), torch.zeros(4)), ValueError, "^inputs and targets .* 3 and 4"),
        (lambda: Stored.of((torch.zeros(3, 2), torch.zeros(4))), ValueError, "^inputs and targets .* 3 and 4"),
        (lambda: Stored(torch.zeros(1, 2), torch.zeros(1)), ValueError, "^inputs must hold at least 2"),
        (lambda: Stored(*numbered(10), validation_points=0), ValueError, "^validation_points .* 1 and 9, got 0"),
        (lambda: Stored(*numbered(10), validation_points=10), ValueError, "^validation_points .* 1 and 9, got 10"),
        (lambda: Stored(*numbered(10), points=(0, 5)), ValueError, "^points must be a range"),
        (lambda: Stored(*numbered(10), points=(5, 9)), ValueError, "^points must be at most 8"),
        (lambda: Stored.of(Endless()), TypeError, "^data must have a length, got the Endless"),
        (lambda: Stored.of(TensorDataset(torch.zeros(5))), TypeError, "^data must be a pair"),
        (lambda: Stored.of(torch.zeros(2, 5)), TypeError, "^data must be a pair .* got Tensor"),
        (lambda: Stored.of((torch.zeros(5),) * 3), TypeError, "^data must be a pair"),
        (lambda: Stored.of("digits"), TypeError, "^data must be a pair .* got str"),
        (lambda: bundled("mnist"), ValueError, "^name must be one of .* got 'mnist'"),
    ],
)
def test_wrong_data_are_named(make, error, match):
    """What is wrong with the data must be said where they are given, not in the middle of an episode."""
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_data_are_scikit_learns(name):
    """A data set that is scaled or shuffled wrongly would be another one under the same name."""
    import sklearn.datasets

    x, y = getattr(sklearn.datasets, f"load_{name}")(return_X_y=True)
    source = bundled(name)
    assert source.inputs.shape == x.shape and source.inputs.dtype == torch.float32
    if name == "digits":
        np.testing.assert_array_equal(source.inputs * 16, x)
    else:
        np.testing.assert_allclose(source.inputs, (x - x.mean(0)) / x.std(0), rtol=1e-3, atol=1e-5)
    if name == "diabetes":
        assert source.targets.shape == (len(y), 1) and source.targets.dtype == torch.float32
        np.testing.assert_allclose(source.targets[:, 0], (y - y.mean()) / y.std(), rtol=1e-4, atol=1e-5)
    else:
        assert source.targets.dtype == torch.int64
        np.testing.assert_array_equal(source.targets, y)
    assert bundled(name, points=(20, 30)).max_points == 30


# --- Configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: TeacherStudent(points=(0, 10)), "points"),
        (lambda: TeacherStudent(validation_points=0), "validation_points"),
        (lambda: TeacherStudent(inputs=0), "inputs"),
        (lambda: TeacherStudent(classes=1), "classes"),
        (lambda: TeacherStudent(label_noise=2.0), "label_noise"),
        (lambda: TeacherStudent(positive=-0.1), "positive"),
        (lambda: TeacherStudent(input_scale=(2.0, 1.0)), "input_scale"),
        (lambda: TeacherStudent(teacher_width=0), "teacher_width"),
        (lambda: TeacherStudent(teacher_gain=(0.0, 1.0)), "teacher_gain"),
        (lambda: TeacherRegression(outputs=0), "outputs"),
        (lambda: TeacherRegression(noise=(0.0, 1.0)), "noise"),
        (lambda: TeacherRegression(teacher_gain=(0.0, 1.0)), "teacher_gain"),
        (lambda: TeacherMultitask(classes=1), "classes"),
        (lambda: Prototypes(separation=(2.0, 1.0)), "separation"),
        (lambda: Prototypes(prototypes=(0, 1)), "prototypes"),
        (lambda: Images(channels=0), "channels"),
        (lambda: Images(size=3), "size"),
        (lambda: Images(pictures=(0, 1)), "pictures"),
        (lambda: Images(noise=(0.0, 1.0)), "noise"),
        (lambda: Images(classes=1), "classes"),
        (lambda: Markov(tokens=1), "tokens"),
        (lambda: Markov(concentration=(0.0, 1.0)), "concentration"),
        (lambda: Copying(length=1), "length"),
        (lambda: Copying(lag=(0, 1)), "lag"),
        (lambda: Copying(length=6, lag=(1, 6)), "lag"),
        (lambda: Copying(noise=(0.2, 0.1)), "noise"),
        (lambda: Noise(dimension=0), "dimension"),
        (lambda: Noise(noise=(0.0, 0.1)), "noise"),
    ],
)
def test_wrong_configuration_is_named(make, field):
    """An empty range would surface much later, as a NaN in the middle of an episode."""
    with pytest.raises(ValueError, match=rf"^{field}\b"):
        make()


def test_bundled_data_are_read_when_they_are_needed():
    """Whoever imports the environments would wait for scikit-learn and its data, and need them installed."""
    code = "import sys, rlsched.envs; print('sklearn' in sys.modules, 'sklearn.datasets' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_bundled_source_is_sent_to_another_process_and_compared():
    """A worker process would get another data set, or none; two tasks on the same data would differ."""
    source = bundled("wine", points=(20, 30))
    again = pickle.loads(pickle.dumps(source))
    assert again.max_points == 30 and again.validation_points == source.validation_points
    assert torch.equal(again.inputs, source.inputs)
