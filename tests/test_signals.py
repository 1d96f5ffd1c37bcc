"""From windows to observations, against closed forms on windows made by hand."""

import math

import pytest
import torch

from rlsched import control, signals
from rlsched.moments import Moments
from rlsched.signals import OBSERVATION_NAMES, OBSERVATIONS, Run
from rlsched.spec import observation_table

NAN = math.nan
RUN = Run(torch.tensor(800.0), torch.tensor(8.0), torch.tensor(1.0))
STATE = torch.tensor([0.5, 1.3, 2.0])


def window(**fields):
    """A window of which only `fields` were measured."""
    steps = len(next(iter(fields.values())))
    nothing = dict.fromkeys(Moments._fields, [NAN] * steps)
    return Moments(**{name: torch.tensor(values) for name, values in (nothing | fields).items()})


def observe(*windows, run=RUN, step=400.0, state=STATE):
    """The named observations at the end of the last of `windows`."""
    history = signals.start()
    for each in windows:
        observation, history = signals.observe(each, run, history, torch.tensor(step), state)
    return dict(zip(OBSERVATION_NAMES, observation.tolist(), strict=True))


def approximately(value):
    """Equal but for rounding in float32."""
    return pytest.approx(value, abs=1e-5)


def log_losses(*values):
    """A window with these log losses."""
    return window(loss=[math.exp(x) for x in values])


def test_clock_counts_in_windows_and_fractions_of_a_run():
    """A run of 200 steps and one of 200,000 must look alike to the policy."""
    seen = observe(log_losses(0.0))
    assert seen["progress"] == approximately(0.5)
    assert seen["decisions_left"] == approximately(math.log(50) / 4)
    assert seen["decisions"] == approximately(math.log(100) - 4)
    assert seen["interval"] == approximately(math.log(8) / 3)
    long = observe(log_losses(0.0), run=Run(torch.tensor(1e5), torch.tensor(1e3), torch.tensor(1.0)))
    assert long["decisions"] == approximately(math.log(100) - 4)
    assert long["interval"] == approximately(math.log(32) / 3)


def test_loss_is_compared_with_its_past():
    """These are how the policy sees whether training goes well.

    With windows of log loss 0, −0.1, −0.2 the running averages before the third are w · (−0.1), with w their weight.
    """
    seen = observe(*(log_losses(x, x) for x in (0.0, -0.1, -0.2)))
    assert seen["loss_vs_fast"] == approximately(2 * (-0.2 - 0.4 * -0.1))
    assert seen["loss_vs_slow"] == approximately(-0.2 - 0.1 * -0.1)
    assert seen["loss_vs_first"] == approximately(-0.2 / 2)


def test_first_window_is_its_own_past():
    """The first decision would be taken on numbers that mean nothing."""
    seen = observe(log_losses(3.0, 3.0))
    assert seen["loss_vs_fast"] == seen["loss_vs_slow"] == seen["loss_vs_first"] == 0


def test_noise_and_trend_within_a_window():
    """Noise and progress would be taken for each other."""
    seen = observe(log_losses(0.2, 0.2, 0.1, 0.1))
    assert seen["loss_trend"] == approximately(5 * -0.1)
    assert seen["loss_noise"] == approximately(3 * 0.05)
    odd = observe(log_losses(0.2, 0.1, 0.15))  # the middle step belongs to the second half
    assert odd["loss_trend"] == approximately(5 * (0.125 - 0.2))


def test_loss_has_no_unit():
    """A loss that is summed instead of averaged would give another schedule."""
    raw = torch.rand(3, 4) + 0.5
    seen = [observe(*(window(loss=(scale * row).tolist()) for row in raw)) for scale in (1.0, 1000.0)]
    assert seen[0] == pytest.approx(seen[1], abs=1e-4)


def test_directions_and_updates_are_averaged_over_what_was_measured():
    """Unmeasured steps would count as zero."""
    seen = observe(
        window(
            grad_cosine=[NAN, NAN, 0.2, 0.4],
            momentum_cosine=[NAN, NAN, -0.2, -0.4],
            update_ratio=[NAN, NAN, math.exp(-4), math.exp(-6)],
            predicted_decrease=[NAN, NAN, math.exp(-2), math.exp(-6)],
        )
    )
    assert seen["grad_cosine"] == approximately(2 * 0.3)
    assert seen["momentum_cosine"] == approximately(2 * -0.3)
    assert seen["update_ratio"] == approximately((-5 + 5) / 3)
    assert seen["predicted_decrease"] == approximately((-4 + 5) / 3)


def test_updates_of_no_size_have_a_floor():
    """The logarithm of zero, or of a predicted increase, would be the loudest observation of all."""
    seen = observe(window(update_ratio=[0.0], predicted_decrease=[-1.0]))
    assert seen["update_ratio"] == -4
    assert seen["predicted_decrease"] == approximately((math.log(1e-7) + 5) / 3)


def test_gradient_norm_is_compared_with_the_first_window():
    """The scale of gradients differs by orders of magnitude between networks."""
    e = math.exp
    seen = observe(window(grad_norm=[e(9), e(1)]), window(grad_norm=[e(2), e(3)]))
    assert seen["grad_norm_change"] == approximately(3 - 1)
    assert seen["grad_norm_noise"] == approximately(0.5)


def test_controls_and_family_are_seen():
    """A policy that does not know where its controls stand cannot keep them there."""
    seen = observe(window(clipped=[0.0, 1.0, 1.0, 1.0]))
    assert seen["clip_fraction"] == approximately(0.75)
    assert seen["lr"] == approximately(0.5 / 5)
    assert seen["momentum"] == approximately(1.3 - 1)
    assert seen["clip"] == approximately(2.0 / 2)
    assert seen["adaptive"] == 1


MEASURED_BY_LOSS = {"loss_vs_fast", "loss_vs_slow", "loss_vs_first", "loss_noise", "loss_trend", "predicted_decrease"}


@pytest.mark.parametrize("loss", [[NAN] * 4, [-1.0, -2.0, -3.0, -4.0], [0.0] * 4, [math.inf] * 4])
def test_loss_that_is_unknown_or_has_no_logarithm_reads_as_zero(loss):
    """NaN in one observation would be NaN in every action."""
    seen = observe(window(loss=loss), window(loss=loss))
    assert {name: seen[name] for name in MEASURED_BY_LOSS} == dict.fromkeys(MEASURED_BY_LOSS, 0.0)


def test_loss_that_comes_late_starts_its_history_then():
    """A validation loss that is reported from the second window on would never be compared with anything."""
    seen = observe(log_losses(NAN), log_losses(1.0), log_losses(0.5))
    assert seen["loss_vs_first"] == approximately(-0.25)
    gap = observe(log_losses(1.0), log_losses(NAN), log_losses(0.5))
    assert gap["loss_vs_first"] == approximately(-0.25)
    assert gap["loss_vs_slow"] == approximately(-0.5)


def test_single_bad_step_does_not_hide_the_window():
    """One NaN in a thousand steps would blind the policy."""
    seen = observe(log_losses(0.0, 0.0), log_losses(-0.1, NAN, -0.1, -0.1))
    assert seen["loss_vs_first"] == approximately(-0.05)
    assert seen["loss_noise"] == approximately(0)


def extreme_windows(count, batch, steps, generator):
    """Windows of any numbers that floating point can hold, and some that it cannot."""
    special = torch.tensor([NAN, math.inf, -math.inf, 0.0, 1e-38, 3e38, -3e38, 1e30, -1e30, 1e-30, 1.0])

    def draw():
        tame = torch.randn(batch, steps, generator=generator).exp()
        wild = special[torch.randint(len(special), (batch, steps), generator=generator)]
        return torch.where(torch.rand(batch, steps, generator=generator) < 0.5, tame, wild)

    return [Moments(*(draw() for _ in Moments._fields)) for _ in range(count)]


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_observations_are_always_finite_and_within_their_bounds(steps):
    """A value outside the declared space fails Gymnasium's checker, and NaN ends a training run of PPO."""
    low, high = (torch.tensor([getattr(o, side) for o in OBSERVATIONS]) for side in ("low", "high"))
    generator = torch.Generator().manual_seed(0)
    batch = 64
    total = torch.rand(batch, generator=generator).mul(30).exp()
    run = Run(total, total.mul(0.01).clamp(min=1), torch.ones(batch))
    history = signals.start((batch,))
    for each in extreme_windows(20, batch, steps, generator):
        state = 100 * torch.randn(batch, len(control.CONTROLS), generator=generator)
        step = 2 * total * torch.rand(batch, generator=generator)
        observation, history = signals.observe(each, run, history, step, state)
        assert observation.shape == (batch, len(OBSERVATIONS))
        assert observation.isfinite().all()
        assert ((observation >= low) & (observation <= high)).all()


def test_batch_of_runs_is_each_run_alone():
    """A policy is trained on batches and used on one run."""
    generator = torch.Generator().manual_seed(1)
    batch = 6
    run = Run(torch.full((batch,), 50.0), torch.full((batch,), 5.0), torch.tensor([1.0, -1.0] * 3))
    state = torch.randn(batch, 3, generator=generator)
    step = torch.arange(batch) * 5.0
    together, alone = signals.start((batch,)), [signals.start()] * batch
    for each in extreme_windows(4, batch, 5, generator):
        observation, together = signals.observe(each, run, together, step, state)
        for i in range(batch):
            row = [signals.Run(*(x[i] for x in run)), alone[i], step[i], state[i]]
            single, alone[i] = signals.observe(Moments(*(x[i] for x in each)), *row)
            torch.testing.assert_close(single, observation[i])
        torch.testing.assert_close(
            torch.stack([torch.stack(h) for h in alone], -1), torch.stack(together), equal_nan=True
        )


def test_names_are_unique_and_bounds_in_order():
    """Two observations of one name would share a chart, and a column of the table."""
    assert len(set(OBSERVATION_NAMES)) == len(OBSERVATIONS)
    assert all(o.low < o.high for o in OBSERVATIONS)


def test_observation_table_has_a_row_for_each():
    """The documentation would be of another version."""
    header, _, *rows = observation_table(OBSERVATIONS).splitlines()
    assert [row.split("`")[1] for row in rows] == list(OBSERVATION_NAMES)
    assert {row.count("|") for row in (header, *rows)} == {6}
