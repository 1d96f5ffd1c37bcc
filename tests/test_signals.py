"""From windows to observations, against closed forms on windows made by hand."""

import math

import pytest
import torch
from helpers import run_of

from rlsched import signals
from rlsched.control import CONTROL_NAMES, CONTROLS
from rlsched.moments import Moments
from rlsched.signals import OBSERVATION_NAMES, OBSERVATIONS, TRACES, Observation, Run, observation_table
from rlsched.summary import summarise
from rlsched.validation import Validation, unseen, validated

NAN = math.nan
RUN = Run(total_steps=800, interval=8, adaptive=1, sums_gradients=1)
STATE = dict.fromkeys(CONTROL_NAMES, 0.0) | {"lr": 0.5, "momentum": 1.3, "clip": 2.0}


def window(**fields):
    """A window of which only `fields` were measured."""
    steps = len(next(iter(fields.values())))
    nothing = dict.fromkeys(Moments._fields, [NAN] * steps)
    return Moments(**{name: tuple(values) for name, values in (nothing | fields).items()})


def directions(cosines, momentum_cosines, ratios, decreases):
    """A window of steps with these cosines, sizes of updates, and predicted decreases; the loss is 1."""
    one = [NAN if math.isnan(x) else 1.0 for x in cosines]
    squares = {name: one for name in ("grad_square", "last_grad_square", "momentum_square", "weights_square")}
    products = {"grad_last_grad": cosines, "grad_momentum": momentum_cosines, "grad_update": decreases}
    return window(loss=[1.0] * len(one), grad_norm=[1.0] * len(one), **squares, **products,
                  update_square=[x * x for x in ratios])  # fmt: skip


def observe(*windows, run=RUN, step=400, state=STATE, names=OBSERVATION_NAMES, validation=None):
    """The named observations at the end of the last of `windows`; of the run alone, and of two like it at once."""
    double = {"dtype": torch.float64}
    history, both = signals.start(), signals.start(torch.ones(2, **double))
    runs, steps = Run(*(torch.full((2,), x, **double) for x in run)), torch.full((2,), step, **double)
    states = {name: torch.full((2,), x, **double) for name, x in state.items()}
    validations = validation and Validation(*(torch.full((2,), x, **double) for x in validation))
    for each in windows:
        observation, history = signals.observe(names, summarise(each), run, history, step, state, validation)
        stacked = Moments(*(torch.tensor([series, series], **double) for series in each))
        twice, both = signals.observe(names, summarise(stacked), runs, both, steps, states, validations)
        torch.testing.assert_close(twice.float(), torch.stack([observation, observation]))
    return dict(zip(names, observation.tolist(), strict=True))


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
    long = observe(log_losses(0.0), run=RUN._replace(total_steps=100_000, interval=1000), step=0)
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
        directions(
            [NAN, NAN, 0.2, 0.4],
            [NAN, NAN, -0.2, -0.4],
            [NAN, NAN, math.exp(-4), math.exp(-6)],
            [NAN, NAN, math.exp(-2), math.exp(-6)],
        )
    )
    assert seen["grad_cosine"] == approximately(2 * 0.3)
    assert seen["momentum_cosine"] == approximately(2 * -0.3)
    assert seen["update_ratio"] == approximately((-5 + 5) / 3)
    assert seen["predicted_decrease"] == approximately((-4 + 5) / 3)


def test_updates_of_no_size_have_a_floor():
    """The logarithm of zero, or of a predicted increase, would be the loudest observation of all."""
    seen = observe(directions([0.0], [0.0], [0.0], [-1.0]))
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
    seen = observe(window(clip_coefficient=[1.0, 0.5, 0.5, 0.1]))
    assert seen["clip_fraction"] == approximately(0.75)
    assert seen["lr"] == approximately(0.5 / 5)
    assert seen["momentum"] == approximately(1.3 - 1)
    assert seen["clip"] == approximately(2.0 / 2)
    assert seen["adaptive"] == 1


MEASURED_BY_LOSS = {"loss_vs_fast", "loss_vs_slow", "loss_vs_first", "loss_noise", "loss_trend", "predicted_decrease"}


@pytest.mark.parametrize("loss", [[NAN] * 4, [-1.0, -2.0, -3.0, -4.0], [0.0] * 4, [math.inf] * 4])
def test_loss_that_is_unknown_or_has_no_logarithm_reads_as_what_is_said_of_the_unknown(loss):
    """NaN in one observation would be NaN in every action."""
    seen = observe(window(loss=loss), window(loss=loss))
    unknown = {name: OBSERVATIONS[name].unknown for name in MEASURED_BY_LOSS}
    assert {name: seen[name] for name in MEASURED_BY_LOSS} == unknown == dict.fromkeys(MEASURED_BY_LOSS, 0.0)


@pytest.mark.parametrize("unknown", [0.0, -1.5])
def test_unknown_is_what_the_entry_says(unknown, monkeypatch):
    """Where zero means something, a policy could not tell it from a thing that nobody has measured."""
    name = f"new, {unknown}"
    monkeypatch.setitem(OBSERVATIONS, name, Observation(name, "", -2, 2, lambda r: r.window.loss, unknown=unknown))
    for loss, value in ((NAN, unknown), (math.e, 1.0), (math.exp(9), 2.0)):
        assert observe(window(loss=[loss]), names=(name,)) == {name: approximately(value)}


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


HUGE = [1e-38, 3e38, -3e38, 1e30, -1e30]  # of which sums depend on their order


def extreme_windows(count, batch, steps, generator, huge=HUGE, dtype=torch.float32):
    """Windows of any numbers that floating point can hold, and some that it cannot."""
    special = torch.tensor([NAN, math.inf, -math.inf, 0.0, 1e-30, 1.0, *huge], dtype=dtype)

    def draw():
        tame = torch.randn(batch, steps, generator=generator, dtype=dtype).exp()
        wild = special[torch.randint(len(special), (batch, steps), generator=generator)]
        return torch.where(torch.rand(batch, steps, generator=generator) < 0.5, tame, wild)

    return [Moments(*(draw() for _ in Moments._fields)) for _ in range(count)]


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_observations_are_always_finite_and_within_their_bounds(steps):
    """A value outside the declared space fails Gymnasium's checker, and NaN ends a training run of PPO."""
    low, high = (torch.tensor([getattr(o, side) for o in OBSERVATIONS.values()]) for side in ("low", "high"))
    generator = torch.Generator().manual_seed(0)
    batch = 64
    total = torch.rand(batch, generator=generator).mul(30).exp()
    run = Run(total, total.mul(0.01).clamp(min=1), torch.ones(batch), torch.ones(batch), total)
    history, alone = signals.start(torch.ones(batch)), signals.start()
    for each in extreme_windows(20, batch, steps, generator):
        state = {name: 100 * torch.randn(batch, generator=generator) for name in CONTROLS}
        step = 2 * total * torch.rand(batch, generator=generator)
        losses = extreme_windows(1, batch, 5, generator)[0].loss.unbind(-1)
        validation = Validation(*losses[:2], step * torch.rand(batch, generator=generator), *losses[3:])
        told = state, validation
        observation, history = signals.observe(OBSERVATION_NAMES, summarise(each), run, history, step, *told)
        told = {n: x[0].item() for n, x in state.items()}, Validation(*(x[0].item() for x in validation))
        first = Run(*(x[0].item() for x in run)), alone, step[0].item(), *told
        single, alone = signals.observe(OBSERVATION_NAMES, summarise(run_of(each, 0)), *first)
        for seen, shape in ((observation, (batch,)), (single, ())):
            assert seen.shape == (*shape, len(OBSERVATIONS))
            assert seen.dtype == torch.float32
            assert seen.isfinite().all()
            assert ((seen >= low) & (seen <= high)).all()


def test_batch_of_runs_is_each_run_alone():
    """A policy is trained on batches of runs, in tensors, and used on one run, in floats."""
    generator, double = torch.Generator().manual_seed(1), {"dtype": torch.float64}
    batch = 32
    adaptive, sums = torch.tensor([1.0, -1.0] * 16, **double), torch.tensor([1.0, 1.0, 0.0, 0.0] * 8, **double)
    run = Run(torch.full((batch,), 50.0, **double), 1.0 + torch.arange(batch, **double), adaptive, sums, adaptive.abs())
    state = {name: torch.randn(batch, generator=generator, **double) for name in CONTROLS}
    step = torch.arange(batch, **double)
    together, alone = signals.start(torch.ones(batch, **double)), [signals.start()] * batch
    validation, validations = unseen(torch.zeros(batch, **double)), [unseen()] * batch
    for each in extreme_windows(6, batch, 20, generator, huge=[], **double):
        summary, losses = summarise(each), each.loss[:, 0]
        validation = validated(validation, losses, step / 2)
        observation, together = signals.observe(OBSERVATION_NAMES, summary, run, together, step, state, validation)
        for i in range(batch):
            single = summarise(run_of(each, i))
            assert all(isinstance(value, float) for value in single)
            assert single == pytest.approx([value[i].item() for value in summary], rel=1e-9, abs=1e-9, nan_ok=True)
            validations[i] = validated(validations[i], losses[i].item(), step[i].item() / 2)
            assert validations[i] == pytest.approx([known[i].item() for known in validation], nan_ok=True)
            row = Run(*(x[i].item() for x in run)), alone[i], step[i].item(), {n: s[i].item() for n, s in state.items()}
            seen, alone[i] = signals.observe(OBSERVATION_NAMES, single, *row, validations[i])
            torch.testing.assert_close(seen, observation[i].float())
            kept = {name: value[i].item() for name, value in together.items()}
            assert alone[i] == pytest.approx(kept, rel=1e-9, abs=1e-9, nan_ok=True)


def test_observation_is_made_of_the_names_that_are_asked_for():
    """A policy that asked for a few would be given others, in another order, and act on them with confidence."""
    windows = [log_losses(0.3, 0.1), log_losses(0.2, 0.1)]
    whole, names = observe(*windows), OBSERVATION_NAMES[::-3]
    assert observe(*windows, names=names) == {name: whole[name] for name in names}


def test_history_is_of_every_trace_whoever_looks():
    """A policy that does not look at the loss would leave a run that cannot go on under one that does."""
    _, history = signals.observe(("progress",), summarise(log_losses(0.5)), RUN, signals.start(), 0, STATE)
    assert history.keys() == TRACES.keys()
    assert history["first_loss"] == approximately(0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_observation_is_in_single_precision_whatever_the_default(dtype):
    """Under another default dtype or device a policy would be given what its weights cannot be multiplied with."""
    expected = observe(log_losses(0.3, 0.1))
    summary = summarise(log_losses(0.3, 0.1))
    torch.set_default_dtype(dtype)
    signals._bounds.cache_clear()
    try:
        with torch.device("meta"):
            seen, _ = signals.observe(OBSERVATION_NAMES, summary, RUN, signals.start(), 400, STATE)
    finally:
        torch.set_default_dtype(torch.float32)
        signals._bounds.cache_clear()
    assert seen.dtype == torch.float32 and seen.device.type == "cpu"
    assert dict(zip(OBSERVATION_NAMES, seen.tolist(), strict=True)) == expected


def test_names_are_unique_and_bounds_in_order():
    """Two observations of one name would share a chart, and a column of the table."""
    assert list(OBSERVATIONS) == [o.name for o in OBSERVATIONS.values()] == list(OBSERVATION_NAMES)
    assert all(o.low < o.high for o in OBSERVATIONS.values())
    assert all(o.low <= o.unknown <= o.high for o in OBSERVATIONS.values())


def test_every_control_is_seen_within_its_range():
    """A policy that does not know where its controls stand cannot keep them there."""
    for name, control in CONTROLS.items():
        for state in (control.low, (control.low + control.high) / 2, control.high):
            seen = observe(log_losses(0.0), state={**STATE, name: state})[name]
            assert seen == approximately((state - control.seen.shift) / control.seen.scale)


def test_observation_table_has_a_row_for_each():
    """The documentation would be of another version."""
    header, _, *rows = observation_table(OBSERVATIONS.values()).splitlines()
    assert [row.split("`")[1] for row in rows] == list(OBSERVATION_NAMES)
    assert {row.count("|") for row in (header, *rows)} == {7}


def test_validation_is_compared_with_its_best_and_with_training():
    """A policy could not tell a network that learns from one that learns its data by heart."""
    train = log_losses(math.log(0.05))
    seen = observe(train, validation=falling_and_rising())
    assert seen["validation_vs_best"] == approximately(2 * math.log(0.3 / 0.2))
    assert seen["validation_gap"] == approximately(math.log(0.3 / 0.05) / 2)
    best = observe(train, validation=validated(falling_and_rising(), 0.1, 400))
    assert best["validation_vs_best"] == 0
    assert best["validation_gap"] == approximately(math.log(0.1 / 0.05) / 2)


VALIDATIONS = {  # inner steps before the last validation, in windows of 8, of which the last began at step 392
    "just now": (400, 0.0, True),
    "in the last window": (393, math.log(1 + 7 / 8) / 4, True),
    "seen at the last decision": (392, math.log(2) / 4, False),
    "long ago": (0, math.log(51) / 4, False),
}


@pytest.mark.parametrize("step, age, new", VALIDATIONS.values(), ids=VALIDATIONS)
def test_validation_is_known_as_new_or_old(step, age, new):
    """A policy would take the same news for news at every decision of an epoch."""
    seen = observe(log_losses(0.0), validation=validated(unseen(), 1.0, step))
    assert seen["validation_age"] == approximately(age)
    assert (seen["validation_age"] < 0.173) == new


@pytest.mark.parametrize("loss", [math.nan, math.inf, 0.0, -1.0])
def test_validation_that_was_never_seen_is_told_from_one_that_is_of_no_use(loss):
    """A run that nobody validates would look like one that is at its best, or has just diverged."""
    never = observe(log_losses(0.0))
    useless = observe(log_losses(0.0), validation=validated(unseen(), loss, 400))
    assert (never["validation_age"], useless["validation_age"]) == (-1, 0)
    for seen in (never, useless):
        assert seen["validation_vs_best"] == seen["validation_gap"] == 0


def gradients_of(shared, noise, steps, parameters=400, scale=1.0, seed=0):
    """A window of gradients G + ε with ‖G‖² = `shared` and E‖ε‖² = `noise`, each step's ε anew."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.full((parameters,), (shared / parameters) ** 0.5)
    drawn = torch.randn(steps + 1, parameters, generator=generator) * (noise / parameters) ** 0.5
    grads = scale * (true + drawn)
    last, now = grads[:-1], grads[1:]
    return window(
        grad_norm=now.norm(dim=1).tolist(),
        grad_square=now.square().sum(1).tolist(),
        last_grad_square=last.square().sum(1).tolist(),
        grad_last_grad=(now * last).sum(1).tolist(),
    )


@pytest.mark.parametrize("noise", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("parameters, scale", [(400, 1.0), (40_000, 1.0), (400, 1e-6), (400, 1e6)])
def test_noise_scale_is_that_of_its_definition(noise, parameters, scale):
    """Whether more noise or a smaller gradient is behind bad steps decides between a lower lr and a higher one.

    tr Σ / ‖G‖² in mini-batches (McCandlish et al. 2018), whatever the number of parameters and the scale of the loss.
    """
    windows = [gradients_of(1.0, noise, 8, parameters, scale, seed) for seed in range(30)]
    assert observe(*windows)["noise_scale"] == pytest.approx(math.log(noise) / 4, abs=0.1)


def test_noise_scale_is_bounded_where_gradients_agree_or_do_not():
    """A logarithm of nothing would be NaN in every action, or the loudest observation of all."""
    alike = observe(gradients_of(1.0, 0.0, 8))["noise_scale"]
    opposed = observe(window(grad_norm=[1.0] * 4, grad_square=[1.0] * 4, grad_last_grad=[-1.0] * 4))["noise_scale"]
    assert opposed == -alike == approximately(math.log(99) / 4)
    assert (
        observe(window(grad_square=[0.0], grad_last_grad=[0.0]))["noise_scale"] == OBSERVATIONS["noise_scale"].unknown
    )


@pytest.mark.parametrize("total_steps, interval", [(100, 1), (10_000, 100), (1000, 100)])
@pytest.mark.parametrize("name, fraction", signals.HALF_LIVES.items())
def test_running_averages_have_their_half_lives_in_fractions_of_a_run(name, fraction, total_steps, interval):
    """A run of another length, or with another number of decisions, would look like another run to the policy.

    After a step of the log loss from 0 to −1, what is left of the old loss halves in every half-life.
    """
    run = RUN._replace(total_steps=total_steps, interval=interval)
    since = 3
    windows = [log_losses(0.0)] + [log_losses(-1.0)] * since
    left = 0.5 ** ((since - 1) * interval / (fraction * total_steps))
    assert observe(*windows, run=run)[f"loss_vs_{name}"] == approximately(-left)


def test_agreement_counts_as_the_loss_gets_small():
    """Gradients that agree at the start say nothing of a network that learns its data by heart."""
    first, late = [1.0] * 4, [math.exp(-1.5)] * 4
    agreeing = {"grad_square": [1.0] * 4, "last_grad_square": [1.0] * 4, "grad_last_grad": [0.4] * 4}
    start, end = window(loss=first, **agreeing), window(loss=late, **agreeing)
    assert observe(start)["late_agreement"] == 0
    assert observe(start, end)["late_agreement"] == approximately(2 * 0.4 * 1.5 / 3)
    assert observe(start, window(loss=[1e-9] * 4, **agreeing))["late_agreement"] == approximately(2 * 0.4)
    assert observe(start, window(loss=[5.0] * 4, **agreeing))["late_agreement"] == 0
    assert observe(window(loss=[NAN] * 4, **agreeing))["late_agreement"] == OBSERVATIONS["late_agreement"].unknown


def test_cosines_with_the_weights():
    """Weights that shrink look like progress to a policy that sees their norm alone, or not at all."""
    products = {"grad_square": [4.0], "weights_square": [9.0], "update_square": [0.01]}
    seen = observe(window(**products, grad_weights=[3.0], update_weights=[0.15]))
    assert seen["grad_weights_cosine"] == approximately(2 * 3 / (2 * 3))
    assert seen["update_weights_cosine"] == approximately(-2 * 0.15 / (0.1 * 3)), "weights that shrink"


def drawn_window(seed, loss_scale=1.0, sample=1.0):
    """A window of a network whose loss has a factor, measured on a sample with so many times the parameters.

    The update is an optimizer's that divides by the size of gradients: it does not change with the loss.
    """
    generator = torch.Generator().manual_seed(seed)
    last, grad, momentum, weights, update = torch.randn(5, 8, 50, generator=generator, dtype=torch.float64)
    grad, update = grad + 0.5 * last, 1e-3 * (update + grad)
    last, grad, momentum = loss_scale * last, loss_scale * grad, loss_scale * momentum

    def products(a, b):
        return (sample * (a * b).sum(1)).tolist()

    return Moments(
        loss=tuple((loss_scale * (1 + torch.rand(8, generator=generator, dtype=torch.float64)) / (1 + seed)).tolist()),
        grad_norm=tuple(grad.norm(dim=1).tolist()),
        clip_coefficient=(1.0, 0.5) * 4,
        **{
            name: tuple(products(*pair))
            for name, pair in {
                "grad_square": (grad, grad),
                "last_grad_square": (last, last),
                "momentum_square": (momentum, momentum),
                "weights_square": (weights, weights),
                "update_square": (update, update),
                "grad_last_grad": (grad, last),
                "grad_momentum": (grad, momentum),
                "grad_weights": (grad, weights),
                "grad_update": (grad, update),
                "update_weights": (update, weights),
            }.items()
        },
    )


def falling_and_rising(loss_scale=1.0, sample=1.0):
    """Validation losses of a run in its 400th step: 0.3 after 380 steps, and 0.2 before that."""
    return validated(validated(unseen(), 0.2 * loss_scale, 100), 0.3 * loss_scale, 380)


@pytest.mark.parametrize("other", [{"loss_scale": 1e-4}, {"loss_scale": 1e4}, {"sample": 0.01}, {"sample": 1000.0}])
def test_nothing_depends_on_the_scale_of_the_loss_or_on_the_number_of_parameters(other):
    """A policy from small networks with a loss around one would read another language in larger ones, or in sums."""
    seen = observe(*(drawn_window(seed) for seed in range(5)), validation=falling_and_rising())
    same = observe(*(drawn_window(seed, **other) for seed in range(5)), validation=falling_and_rising(**other))
    assert seen == pytest.approx(same, abs=1e-5)
    inside = [name for name, o in OBSERVATIONS.items() if o.low < seen[name] < o.high and seen[name] != o.unknown]
    assert set(OBSERVATIONS) - set(inside) <= {"adaptive", "weight_decay"}, "a bound hides what it depends on"
