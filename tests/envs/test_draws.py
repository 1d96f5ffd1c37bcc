"""Random draws depend on their seed alone, and are spread as they say."""

import numpy as np
import pytest
import torch

from rlsched.envs.draws import log_uniform, minibatch_rows, seeded


def rows_of(seeds, *, first=0, steps=1, batch=4, own=None, points=1000):
    """Mini-batch rows of networks that share all but the seed, unless lists say otherwise."""
    seeds = torch.tensor(seeds)
    first, own, points = (
        torch.tensor(n) if isinstance(n, list) else torch.full_like(seeds, n) for n in (first, own or batch, points)
    )
    return minibatch_rows(seeds, first, steps, batch, own, points)


def test_log_uniform_is_uniform_in_the_logarithm():
    """A uniform draw would hide the small learning rates."""
    rng = np.random.default_rng(0)
    logs = np.log10([log_uniform(rng, 1e-4, 1.0) for _ in range(2000)])
    np.testing.assert_allclose(np.histogram(logs, 4, (-4, 0))[0] / 2000, 0.25, atol=0.04)


@pytest.mark.parametrize("inside", [0, 2**63 - 1])
def test_seeded_leaves_the_global_numbers_alone(inside):
    """Drawing a network must not shift the user's own random numbers, not even when it fails."""
    torch.manual_seed(5)
    expected = torch.rand(6)

    def drawn_inside():
        with seeded(inside):
            return torch.rand(3)

    def failing():
        with seeded(inside):
            torch.rand(3)
            raise KeyError

    torch.manual_seed(5)
    outside = [torch.rand(2)]
    first = drawn_inside()
    outside.append(torch.rand(2))
    with pytest.raises(KeyError):
        failing()
    outside.append(torch.rand(2))
    assert torch.equal(torch.cat(outside), expected)

    torch.manual_seed(6)
    assert torch.equal(drawn_inside(), first), "what is drawn inside depends on the seed alone"
    assert not torch.equal(first, expected[:3])


def test_mini_batches_are_those_of_splitmix64():
    """A shift of the sign, or another constant, would give rows that nobody else can draw again."""
    mask, seeds, own, batch, points = 2**64 - 1, [0, 5, 2**63 - 1], [4, 2, 4], 4, [1000, 7, 2**31 - 1]

    def splitmix64(z):
        z = (z ^ (z & mask) >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        return z ^ z >> 31

    rows = rows_of(seeds, first=3, steps=5, batch=batch, own=own, points=points)
    for (step, i, column), row in np.ndenumerate(rows.numpy()):
        counter = (3 + step) * batch + column % own[i]
        assert row == (splitmix64(seeds[i] + counter * 0x9E3779B97F4A7C15 & mask) >> 33) % points[i]


@pytest.mark.parametrize("seeds", [range(500), (np.random.default_rng(0).integers(2**63, size=500)).tolist()])
@pytest.mark.parametrize("points", [10, 7])
def test_mini_batches_are_uniform(seeds, points):
    """Points that come more often than others would make another data set of the user's."""
    rows = rows_of(list(seeds), steps=20, batch=10, points=points)
    assert rows.shape == (20, 500, 10)

    def chi_square(values, categories):
        expected = values.numel() / categories
        return ((torch.bincount(values.flatten(), minlength=categories) - expected) ** 2 / expected).sum()

    def most(freedom):
        """Five standard deviations above the mean of a chi-square variable."""
        return freedom + 5 * (2 * freedom) ** 0.5

    assert chi_square(rows, points) < most(points - 1)
    # Consecutive draws of a network, of a step, and of one seed and the next, tell nothing about each other either.
    for one, other in ((rows[1:], rows[:-1]), (rows[..., 1:], rows[..., :-1]), (rows[:, 1:], rows[:, :-1])):
        assert chi_square(one * points + other, points**2) < most(points**2 - 1)


def test_mini_batches_depend_on_seed_and_step_alone():
    """A run's data must not depend on which other runs there are, nor on how its steps are cut into windows."""
    seeds, first, points = [3, 2**63 - 1, 3, 4], [0, 5, 2, 0], [50, 60, 50, 50]
    own = [4, 2, 4, 4]
    together = rows_of(seeds, first=first, steps=6, own=own, points=points)
    for i, seed in enumerate(seeds):
        alone = rows_of([seed], first=[first[i]], steps=6, own=[own[i]], points=[points[i]])
        assert torch.equal(together[:, i], alone[:, 0])
    in_two = [
        rows_of(seeds, first=[n + done for n in first], steps=steps, own=own, points=points)
        for done, steps in ((0, 2), (2, 4))
    ]
    assert torch.equal(torch.cat(in_two), together)
    assert torch.equal(together[2:, 0], together[:-2, 2]), "the same run, two steps later"
    assert not torch.equal(together[:, 0], together[:, 3]), "another seed"
    assert not torch.equal(together[0], together[1])


def test_small_batches_recur_until_they_fill_the_stack():
    """A network with a small batch would otherwise train on more points than its set-up says."""
    rows = rows_of([7, 8, 9], steps=5, batch=8, own=[8, 4, 2])
    assert torch.equal(rows[:, 1, :4], rows[:, 1, 4:])
    assert torch.equal(rows[:, 2], rows[:, 2, :2].repeat(1, 4))
    assert not torch.equal(rows[:, 0, :4], rows[:, 0, 4:])
    assert len(rows[:, 2].unique()) == 10, "two new points at every step"


def test_mini_batch_rows_stay_in_range():
    """A row beyond a network's points would be one of its neighbour's data."""
    rows = rows_of(list(range(100)), steps=50, points=[1, 3] * 50)
    assert (rows[:, ::2] == 0).all()
    assert rows[:, 1::2].unique().tolist() == [0, 1, 2]
