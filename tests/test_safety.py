"""What keeps a run alive: gradients that are not finite, divergence, and inputs that the policy was not trained on."""

import copy
import logging
import math

import pytest
import torch
from helpers import always, assert_finite_weights, assert_same_weights, lively_policy, loss_at, network, train
from torch import nn

from rlsched import DivergenceError, ScheduledOptimizer, SchedulePolicy, attach, safety, schedule
from rlsched.control import CONTROL_NAMES, LR, OUTLIER
from rlsched.meter import Meter
from rlsched.moments import Moments
from rlsched.policy import Domain
from rlsched.safety import EASE, Guard, GuardState
from rlsched.schedule import PROBE
from rlsched.signals import OBSERVATION_NAMES, Run
from rlsched.snapshots import SNAPSHOTS, WEIGHTS, Snapshot
from rlsched.summary import summarise
from rlsched.tensorboard import RunLog
from rlsched.traits import OWN_SCALE
from rlsched.validation import unseen

STEPS, DECISIONS = 100, 20
WINDOW = STEPS // DECISIONS
BAD = 31  # an inner step after the decision before 31, the seventh
OPTIMIZERS = {
    "SGD": lambda p, lr: torch.optim.SGD(p, lr, 0.9),
    "AdamW": lambda p, lr: torch.optim.AdamW(p, lr),
}


class Standing(SchedulePolicy):
    """The zero policy, as a class to derive from."""

    def __init__(self):
        zero = SchedulePolicy.zero()
        super().__init__(zero.actor, zero.observations, zero.controls, safe_start=False)


def scheduled(model, policy=None, lr=0.01, make=OPTIMIZERS["SGD"], **options):
    """A run of twenty windows, under the zero policy if no other is given."""
    options = {"total_steps": STEPS, "decisions": DECISIONS, **options}
    return ScheduledOptimizer(make(model.parameters(), lr), policy=policy or SchedulePolicy.zero(), **options)


def messages(optimizer):
    """What was done, without the steps."""
    return [message for _, message in optimizer.controller.interventions]


@pytest.mark.parametrize("face", [ScheduledOptimizer, attach])
def test_nan_in_the_midst_of_a_step_does_not_reach_the_weights(face):
    """LBFGS evaluates the loss many times in a step, at weights that nobody has seen before."""
    model, evaluations = network(), []
    optimizer = torch.optim.LBFGS(model.parameters(), 0.5, max_iter=6)
    driver = face(optimizer, total_steps=9, policy=SchedulePolicy.zero())

    def closure():
        evaluations.append(len(evaluations))
        model.zero_grad()
        loss = loss_at(model, 0) * (math.nan if evaluations[-1] in (3, 5) else 1)
        loss.backward()
        return loss

    for _ in range(3):
        (optimizer if face is attach else driver).step(closure)
    assert len(evaluations) > 6
    assert_finite_weights(model)


# --- Divergence: when it is seen ------------------------------------------------------------------------------------


RUN = Run(total_steps=STEPS, interval=WINDOW, adaptive=-1, sums_gradients=1)


def guard_of(model, on_divergence="cut", moves_lr=True):
    """A guard by itself, and the state that its run begins with."""
    meter = Meter(WINDOW, has_momentum=True)
    options = {"on_divergence": on_divergence, "max_update_ratio": 3.0, "moves_lr": moves_lr, "log": RunLog()}
    guard = Guard(torch.optim.SGD(model.parameters(), 0.1, 0.9), meter, **options)
    base = dict.fromkeys(CONTROL_NAMES, math.nan) | {"lr": 0.1, "momentum": 0.9}
    return guard, schedule.begin(RUN, base, probing=False)


def window_of(losses):
    """A window with such losses, and gradient norms, and whatever else there is."""
    return Moments(*[tuple(losses)] * len(Moments._fields))


def verdicts(losses, interval=4):
    """What a guard says of each window of a run with such losses."""
    guard, state = guard_of(network())
    windows = [window_of(losses[i : i + interval]) for i in range(0, len(losses), interval)]
    run = RUN._replace(total_steps=len(losses), interval=interval)
    return [guard.alarm(run, state, [window], summarise(window)) for window in windows]


def test_noise_is_no_divergence():
    """A learning rate that is cut by a false alarm costs a good run its end."""
    generator = torch.Generator().manual_seed(0)
    for interval in (1, 10):
        trend = torch.linspace(1, -5, 400)
        losses = (trend + 0.5 * torch.randn(400, generator=generator)).exp().tolist()
        assert verdicts(losses, interval) == [None] * (400 // interval)


def test_divergence_is_seen_when_half_of_the_gain_is_lost():
    """A run that has blown up would go on to burn its budget."""
    falling, lowest = [2.0] * 8 + [0.5] * 8 + [0.1] * 32, 0.1
    said = verdicts(falling + [20.0] * 8)
    assert said[:-1] == [None] * 13
    assert "risen from" in said[-1]
    recovering = verdicts(falling + [3.5 * lowest] * 80)
    assert recovering == [None] * 32, "at most half of 1.9 was lost"
    lost = verdicts(falling + [1.2] * 80)
    assert sum(reason is not None for reason in lost) == 1, "told once, not at each decision"


def test_bad_batches_are_no_divergence_and_a_run_of_them_is():
    """A corrupt record in the data would cut the learning rate each time it comes up."""
    assert verdicts([1.0, math.nan, math.nan, 1.0] * 20) == [None] * 20
    for interval in (1, 2, 4):
        said = verdicts([1.0] * 4 + [math.nan] * 4, interval)
        (reason,) = [reason for reason in said if reason is not None]
        assert "not finite" in reason


def test_cut_is_a_tenth_wherever_the_control_stands():
    """At its lower bound a cut would do nothing, and the run would go on to diverge."""
    for lr in (3.0, 0.0, LR.low + 1, LR.low):
        guard, state = guard_of(network())
        before = schedule.with_lr(state, lr)._replace(lr_offset=-0.5)
        window = window_of([math.nan] * WINDOW)
        (after,), _, diverges = guard.answer_divergence(RUN, [before], [before], [window], summarise(window), unseen())
        assert diverges
        assert after.control["lr"] >= LR.low
        assert math.exp(after.control["lr"] + after.lr_offset - lr + 0.5) == pytest.approx(0.1)
        assert after.bound == pytest.approx(max(LR.low, lr - math.log(2)))


# --- Divergence: what is done ---------------------------------------------------------------------------------------


def throw_away(model):
    """What a step does that is far too large."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(300 * torch.randn_like(p))


def diverging(on_divergence, policy=None, make=OPTIMIZERS["SGD"], **options):
    """A run whose weights are thrown away after step BAD; the model, the optimizer, and the lr of each step."""
    model = network()
    optimizer = scheduled(model, policy, make=make, on_divergence=on_divergence, **options)
    rates = train(model, optimizer, range(BAD))
    throw_away(model)
    rates += train(model, optimizer, range(BAD, STEPS))
    return model, optimizer, [lr for ((lr, _),) in rates]


def test_divergence_cuts_the_learning_rate():
    """At the learning rate that diverged the run would only diverge further."""
    _, optimizer, rates = diverging("cut")
    (message,) = messages(optimizer)
    assert "risen" in message and message.endswith("lr cut to a tenth")
    factors = [lr / (0.01 * (1 - n / STEPS)) for n, lr in enumerate(rates)]
    assert factors == pytest.approx([1.0] * (BAD + WINDOW) + [0.1] * (STEPS - BAD - WINDOW))


def test_learning_rate_that_diverged_is_out_of_reach():
    """A policy that raises the learning rate again, as it did before, would diverge again."""
    # +1 raises it by 0.7 a decision for four of them, and by 0.25 then.
    _, optimizer, rates = diverging("cut", always(lr=1), lr=1e-5)
    ceiling = rates[BAD + WINDOW - 1] / (1 - (BAD + WINDOW - 1) / STEPS) / 2
    factors = [lr / (1 - n / STEPS) for n, lr in enumerate(rates)]
    assert len(messages(optimizer)) == 1
    assert factors[BAD + WINDOW] == pytest.approx(ceiling / 5)
    eased = math.exp(EASE * (DECISIONS - BAD // WINDOW - 2))  # by each of the windows since, at most
    assert ceiling <= max(factors[BAD + WINDOW :]) <= ceiling * eased * 1.001


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_rollback_brings_the_weights_back(make):
    """A cut comes too late for weights that are thrown away already."""
    cut, _, _ = diverging("cut", make=make)
    model, optimizer, rates = diverging("rollback", make=make)
    (message,) = messages(optimizer)
    assert message.endswith("rolled back and lr cut to a tenth")
    assert rates[-1] == pytest.approx(0.001 / STEPS)
    assert loss_at(model, 0) < 1.2 < 10 < loss_at(cut, 0)


TAKEN = WINDOW * safety.SNAPSHOT_INTERVAL + 1  # step at which a snapshot is taken; the next one at 2 * TAKEN - 1


@pytest.mark.parametrize("bad", [BAD, 2 * TAKEN - 1], ids=["between snapshots", "when the next one is due"])
def test_rollback_goes_back_to_weights_that_were_well(bad):
    """A snapshot that was taken when the loss had begun to rise would bring back a run that is lost."""
    model = network()
    optimizer = scheduled(model, on_divergence="rollback")
    controller, weights, norms = optimizer.controller, [], []
    for step in range(bad):
        weights.append([p.detach().clone() for p in model.parameters()])
        norms.append(controller.meter.average_norm)
        train(model, optimizer, [step])
    throw_away(model)
    while not controller.interventions:
        optimizer.zero_grad()
        loss = loss_at(model, 77)
        loss.backward()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step(loss=loss)
    for p, old, lost in zip(model.parameters(), weights[TAKEN], before, strict=True):
        assert torch.equal(p, old), "the gradients of that step are of the weights that were lost"
        assert not torch.allclose(p, lost)
    assert controller.meter.average_norm == norms[TAKEN], "gradients would be clipped to what was lost"


def test_rollback_goes_back_to_the_beginning_while_nothing_is_gained():
    """The weights of an LSTM had grown while its loss stood still; brought back to those, it never learnt."""
    model = network()
    optimizer = scheduled(model, on_divergence="rollback")
    taken = []
    for step in range(12 * WINDOW):
        optimizer.zero_grad()
        loss_at(model, step).backward()
        optimizer.step(loss=4.0 if step < 8 * WINDOW else 3.0)
        taken.append(optimizer.controller.guard.snapshot.schedule[0].step)
    assert set(taken[: 8 * WINDOW]) == {0}
    assert taken[-1] > 8 * WINDOW, "something is gained at last"


def test_rollback_brings_back_what_the_policy_remembers():
    """A policy that remembers steps which are no more would take the loss that was lost for its own doing."""

    class Counting(Standing):
        def begin(self, batch=()):
            return 0

        def act(self, observation, memory=None):
            return super().act(observation)[0], memory + 1

    model = network()
    optimizer = scheduled(model, Counting(), on_divergence="rollback")
    controller, states = optimizer.controller, []
    for step in range(BAD):
        train(model, optimizer, [step])
        states.append(controller.state)
    throw_away(model)
    while not controller.interventions:
        states.append(controller.state)
        train(model, optimizer, [77])
    assert controller.state.memory == states[TAKEN].memory < states[-1].memory
    assert controller.state.history == states[TAKEN].history != states[-1].history


def test_rollback_rescales_the_momentum_that_it_brings_back():
    """Momentum that has moved since would make updates of another size of what was summed up before."""
    model = network()
    optimizer = scheduled(model, always(momentum=-0.3), on_divergence="rollback", controls=["momentum"])
    train(model, optimizer, range(TAKEN))
    group = optimizer.param_groups[0]
    averages = [(1 - group["momentum"]) * optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    train(model, optimizer, range(TAKEN, BAD))
    before = group["momentum"]
    throw_away(model)
    step = BAD
    while not optimizer.controller.interventions:
        train(model, optimizer, [step])
        step += 1
    assert group["momentum"] < before - 0.01
    for p, average in zip(model.parameters(), averages, strict=True):
        torch.testing.assert_close((1 - group["momentum"]) * optimizer.state[p]["momentum_buffer"], average)


def test_raise_stops_before_the_weights_are_touched():
    """A sweep that is to give up lost runs needs to be told, and the user's last weights to look at."""
    model = network()
    optimizer = scheduled(model, on_divergence="raise")
    train(model, optimizer, range(BAD))
    throw_away(model)
    with pytest.raises(DivergenceError, match=rf"step {BAD + WINDOW}, the loss has risen"):
        while True:
            weights = copy.deepcopy(model)
            train(model, optimizer, [5])
    assert_same_weights(model, weights)


def test_divergence_is_the_users_own_business_on_demand():
    """A loss that rises by itself (a curriculum, a changing weight of a penalty) is no reason to cut."""
    _, optimizer, rates = diverging(None)
    assert [m.endswith("nothing is done about it") for m in messages(optimizer)] == [True]
    assert rates == pytest.approx([0.01 * (1 - n / STEPS) for n in range(STEPS)])


def test_learning_rate_that_is_not_to_be_touched_is_not_cut():
    """`controls=()` promises the base schedule, exactly."""
    _, optimizer, rates = diverging("cut", controls=())
    assert [m.endswith("lr is not among the controls") for m in messages(optimizer)] == [True]
    assert rates == pytest.approx([0.01 * (1 - n / STEPS) for n in range(STEPS)])


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_snapshot_brings_all_back(make):
    """Moments of gradients that were lost would throw the weights away again."""
    model = network()
    optimizer = make(model.parameters(), 0.1)
    snapshot_of = lambda: Snapshot.of(optimizer, None, GuardState(), math.nan)  # noqa: E731
    fresh = snapshot_of()
    for step in range(3):
        loss_at(model, step).backward()
        optimizer.step()
    weights, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    buffers = [t for s in optimizer.state.values() for t in s.values()]
    snapshot = snapshot_of()
    optimizer.step()
    assert not torch.equal(model[0].weight, weights[0].weight)
    snapshot.restore(optimizer)
    assert_same_weights(model, weights)
    torch.testing.assert_close(optimizer.state_dict()["state"], state["state"], rtol=0, atol=0)
    assert [id(t) for s in optimizer.state.values() for t in s.values()] == [id(t) for t in buffers], "not in place"
    fresh.restore(optimizer)
    assert_same_weights(model, network())
    assert not optimizer.state_dict()["state"]


# --- A learning rate that explodes at once --------------------------------------------------------------------------


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("lr", [1e2, 1e6, 1e20])
def test_any_base_learning_rate_is_survived(make, lr):
    """A learning rate in other units, or with a slip in its exponent, would lose the run in its first step."""
    model = network()
    optimizer = scheduled(model, always(safe_start=True), lr, make)
    with torch.no_grad():
        at_first = loss_at(model, 0).item()
    train(model, optimizer, range(STEPS))
    assert_finite_weights(model)
    assert loss_at(model, 0) < 0.9 * at_first
    assert all("undone" in message or "scaled by" in message for message in messages(optimizer))


@pytest.mark.parametrize("total_steps", [3, 5, 7])
def test_absurd_learning_rate_is_survived_in_a_run_too_short_to_probe(total_steps):
    """Weight decay times what the probes had no time to take off would throw the weights away, a little later."""
    model = network()
    optimizer = scheduled(model, lively_policy(), 1e10, OPTIMIZERS["AdamW"], total_steps=total_steps)
    train(model, optimizer, range(total_steps))
    norm = nn.utils.parameters_to_vector(model.parameters()).norm()
    assert norm < 2 * nn.utils.parameters_to_vector(network().parameters()).norm()


def test_probe_that_goes_too_far_is_undone():
    """At a learning rate that is wrong by a million even the probe throws the weights away."""
    model = network()
    optimizer = scheduled(model, lively_policy(), 1e6)
    lr = [train(model, optimizer, [step])[0][0][0] for step in range(2)]
    assert_same_weights(model, network())
    assert lr == pytest.approx([1e6 * PROBE, 1e6 * PROBE**2])


# --- Bounds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_lr", [float, torch.tensor], ids=["float", "tensor"])
def test_learning_rate_stays_in_its_bounds(as_lr):
    """A policy that is wrong would be wrong without measure."""
    for direction in (1, -1):
        model = network()
        make = lambda p, lr: torch.optim.AdamW(p, as_lr(lr))  # noqa: E731
        optimizer = scheduled(model, always(lr=direction), make=make, lr_bounds=(0.001, 0.03))
        rates = [lr for ((lr, _),) in train(model, optimizer, range(STEPS))]
        assert min(rates) >= 0.001 - 1e-9 and max(rates) <= 0.03 + 1e-9
        assert any(lr == pytest.approx(0.03 if direction > 0 else 0.001) for lr in rates)
        assert any(0.0011 < lr < 0.029 for lr in rates)


def test_updates_stay_in_their_bound():
    """A policy that raises the learning rate without end would replace the weights in place of training them."""

    def largest(**options):
        model = network()
        optimizer = scheduled(model, always(lr=1), 0.01, OPTIMIZERS["AdamW"], on_divergence=None, **options)
        ratios = []
        for step in range(STEPS):
            before = nn.utils.parameters_to_vector(model.parameters()).detach()
            train(model, optimizer, [step])
            after = nn.utils.parameters_to_vector(model.parameters()).detach()
            ratios.append(float((after - before).norm() / before.norm()))
        return max(ratios[30:])

    bound = 0.02
    assert largest(max_update_ratio=bound) < 2 * bound < 4 * bound < largest()


def test_outlier_is_clipped_to_a_multiple_of_the_average_norm():
    """One gradient that is a million times too large would be a million steps in one."""
    model = network()
    optimizer = scheduled(model, controls=())
    train(model, optimizer, range(20))
    average = optimizer.controller.meter.average_norm
    optimizer.zero_grad()
    (1e6 * loss_at(model, 20)).backward()
    optimizer.step(loss=1.0)
    norm = float(nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    assert norm == pytest.approx(OUTLIER * average, rel=1e-4)


# --- What the policy was not trained on -----------------------------------------------------------------------------


def test_distance_is_that_of_mahalanobis():
    """Entries that always move together would count twice, and those of small range not at all."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator) + 2 * torch.eye(6)
    x = torch.randn(4000, 6, generator=generator) @ mixing.T + 3
    domain = Domain.of(x)
    covariance = torch.cov(x.double().T) + 0.01 * torch.eye(6)
    centred = x.double() - x.double().mean(0)
    expected = (centred * torch.linalg.solve(covariance, centred.T).T).sum(-1).sqrt()
    torch.testing.assert_close(domain.distance(x).double(), expected, rtol=1e-3, atol=1e-3)
    assert (domain.distance(x) > domain.limit).sum() == 4


def test_influence_falls_with_the_square_of_the_distance():
    """Inside its domain a policy that was held back would not be the policy that was trained."""
    domain = Domain(torch.ones(2), torch.eye(2) / 2, torch.tensor(3.0))
    points = 1 + torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, 12.0], [60.0, 0.0]])
    torch.testing.assert_close(domain.influence(points), torch.tensor([1.0, 1.0, 0.25, 0.01]))


def test_policy_out_of_its_depth_gives_way_to_the_base_schedule():
    """A policy that was trained on perceptrons may do anything on what it has never seen."""

    def rates(limit):
        model, policy = network(), always(lr=1)
        if limit is not None:
            policy.domain = Domain(torch.zeros(n), torch.eye(n), torch.tensor(limit))
        return [lr for ((lr, _),) in train(model, scheduled(model, policy), range(STEPS))]

    n = len(OBSERVATION_NAMES)
    base_schedule = pytest.approx([0.01 * (1 - k / STEPS) for k in range(STEPS)], rel=1e-3)
    assert rates(1e-3) == base_schedule
    assert rates(1e3) == rates(None) != base_schedule


# --- On record ------------------------------------------------------------------------------------------------------


def test_interventions_are_logged_and_saved(caplog):
    """A learning rate that drops to a tenth without a reason on record would cost its user a day."""
    with caplog.at_level(logging.INFO, "rlsched"):
        _, optimizer, _ = diverging("cut")
    ((step, message),) = optimizer.controller.interventions
    assert step == BAD + WINDOW
    assert [record.getMessage() for record in caplog.records] == [f"rlsched: step {step}: {message}"]
    other = scheduled(network())
    other.load_state_dict(optimizer.state_dict())
    assert other.controller.interventions == optimizer.controller.interventions
    assert other.controller.state.bound == optimizer.controller.state.bound < LR.high


def test_bad_batches_are_counted():
    """A user has to know that part of the data is not used."""
    model = network()
    optimizer = scheduled(model)
    for step in range(12):
        optimizer.zero_grad()
        (loss_at(model, step) * (math.nan if step in (7, 9) else 1)).backward()
        optimizer.step(loss=1.0)
    assert optimizer.controller.interventions == [(11, "2 of 5 steps without a finite loss and gradient: left out")]


@pytest.mark.parametrize("option", [
    {"on_divergence": "stop"}, {"lr_bounds": (1.0, 0.1)}, {"lr_bounds": (-1.0, 1.0)}, {"lr_bounds": (0.1,)},
    {"max_update_ratio": 0.0}, {"max_update_ratio": math.nan},
])  # fmt: skip
def test_options_out_of_range_are_named(option):
    """A typo that turns a guard off would be found out by the run that it loses."""
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=name) as caught:
        scheduled(network(), **option)
    assert repr(value) in str(caught.value)


# --- A wreck that comes slowly --------------------------------------------------------------------------------------


def alarms(levels, noise=0.01):
    """The decisions, by number, at which a guard gives alarm in a run of a hundred windows with these mean losses."""
    guard, state = guard_of(network())
    run = RUN._replace(total_steps=100 * WINDOW)
    generator = torch.Generator().manual_seed(0)
    heard = {}
    for k, level in enumerate(levels):
        window = window_of((level * (noise * torch.randn(WINDOW, generator=generator)).exp()).tolist())
        alarm = guard.alarm(run, state, [window], summarise(window))
        if alarm is not None:
            heard[k] = alarm
    return heard


def test_loss_that_stays_far_above_its_best_is_a_wreck():
    """A language model thrown back to the frequencies of its letters would stay there: no loss of its triples."""
    falling = [4.0 - 0.05 * k for k in range(30)]  # to 2.55
    ((k, alarm),) = alarms([*falling, *[3.5] * 40]).items()
    assert 38 < k < 44 and "risen" in alarm
    assert not alarms([*falling, *[3.5] * 6, *[2.6] * 34]), "it came back by itself"
    assert not alarms([*falling, *[3.0] * 40]), "less than half of the gain is lost"


def test_loss_above_that_of_the_untrained_network_is_a_wreck_sooner():
    """Nothing that a training does there is worth waiting for."""
    ((k, _),) = alarms([2.0, *[2.0 - 0.01 * k for k in range(9)], *[3.0] * 20]).items()
    assert 10 < k < 16


def test_lucky_first_batch_is_no_loss_to_be_thrown_back_from():
    """A regression whose first mini-batch was easy was rolled back on the plateau that it began on, time after time."""
    lucky = alarms([0.7, *[1.0] * 40], noise=0.2)
    assert not lucky
    ((k, alarm),) = alarms([2.0, *[3.0] * 20]).items()
    assert k < 8 and "risen" in alarm, "mini-batches of equal losses do not differ by luck"
    assert alarms([0.7, *[2.5] * 40], noise=0.5), "nor by so much"


@pytest.mark.parametrize("is_validated", [False, True])
def test_network_without_a_gradient_goes_back(is_validated):
    """Whose units are all off learns nothing at any learning rate; its loss is that of the frequencies of classes.

    Which may be its best validation loss so far: weights that were kept for it are dead as well.
    """
    model = nn.Sequential(nn.Linear(80, 80), nn.ReLU(), nn.Linear(80, 3))
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(64, 80, generator=generator).abs(), torch.randint(3, (64,), generator=generator)
    optimizer = ScheduledOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), total_steps=500)
    for step in range(60):
        if step == 10:
            with torch.no_grad():
                model[0].weight.copy_(-model[0].weight.abs())
                model[0].bias.fill_(-1.0)
        if is_validated and step % 5 == 0:
            optimizer.observe_validation(1.0 - step / 1000)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step(loss=loss)
    ((step, message),) = optimizer.controller.interventions
    assert 10 + 2 * 5 < step <= 10 + 4 * 5 and "gradient any more: rolled back and lr cut to a tenth" in message
    assert model[0].weight.grad.count_nonzero() > 0


def with_gradients(guard, shares):
    """Whether there is an alarm after windows in which so many of eight steps have a gradient, at one loss."""
    run, state = RUN._replace(total_steps=800, interval=8), guard_of(network())[1]
    heard = []
    for share in shares:
        window = window_of([2.0] * 8)._replace(grad_square=[1.0] * share + [0.0] * (8 - share))
        heard.append(guard.alarm(run, state, [window], summarise(window)) is not None)
    return heard


def test_gradient_that_is_gone_is_told_once():
    """Weights that are brought back may be dead as well: each alarm would cut the learning rate again, to nothing."""
    guard, _ = guard_of(network())
    assert with_gradients(guard, [8, 8, 0, 0, 0, 0, 0, 0, 0]) == [False] * 4 + [True] + [False] * 4
    assert with_gradients(guard, [8, 4, 4, 3]) == [False] * 3 + [True], "once it is alive again"
    assert with_gradients(guard, [8, 5, 7, 5, 7, 5, 8]) == [False] * 7


def test_embeddings_that_are_rarely_seen_are_not_dead():
    """A recommender's tables have a gradient in a few rows of a million: its sample is zero in most steps."""
    guard, _ = guard_of(network())
    assert not any(with_gradients(guard, [1, 0, 2, 0, 0, 0, 0, 1, 0, 0, 0, 0, 7, 0, 0, 0, 0]))


def test_network_that_has_learnt_all_may_have_no_gradient():
    """A hinge loss that is satisfied by all points is no wreck."""
    heard = []
    guard, state = guard_of(network())
    run = RUN._replace(total_steps=100 * WINDOW)
    for level in [2.0, *[2.0 / (k + 1) for k in range(10)], *[0.1] * 20]:
        window = window_of([level] * WINDOW)
        if level == 0.1:
            window = window._replace(grad_square=[0.0] * WINDOW)
        heard.append(guard.alarm(run, state, [window], summarise(window)))
    assert heard == [None] * len(heard)


def test_pinned_learning_rate_comes_free_again():
    """One divergence, of a bad stretch of data perhaps, would hold the learning rate down to the end of a long run."""
    guard, state = guard_of(network())
    run = RUN._replace(total_steps=100 * WINDOW)

    def feed(loss):
        nonlocal state
        window = window_of([loss] * WINDOW)
        (after,), _, _ = guard.answer_divergence(run, [state], [state], [window], summarise(window), unseen())
        state = state._replace(bound=after.bound)

    feed(1.0)
    feed(100.0)
    held = state.bound
    assert held < LR.high
    for k in range(50):
        feed(100.0 * 0.99**k)
    assert state.bound == pytest.approx(held + 50 * EASE)
    for _ in range(3):
        feed(130.0)
    assert state.bound < held + 53 * EASE, "a window that is not good earns nothing"


def test_data_that_have_changed_are_no_divergence():
    """A curriculum would be rolled back at each of its steps, for ever."""
    model = network()
    optimizer = scheduled(model, on_divergence="rollback")
    train(model, optimizer, range(BAD))

    def harder(step):
        optimizer.zero_grad()
        loss = 30 * loss_at(model, step)
        loss.backward()
        optimizer.step(loss=loss)

    for step in range(BAD, STEPS):
        harder(step)
    (message,) = messages(optimizer)
    assert "rolled back" in message
    assert optimizer.controller.guard.state.first > 0, "judged by what the loss was after the change"


# --- What is kept ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [*OPTIMIZERS.values(), torch.optim.Adagrad], ids=[*OPTIMIZERS, "Adagrad"])
@pytest.mark.parametrize("kind", SNAPSHOTS)
def test_snapshot_of_any_kind_saves_a_run(kind, make):
    """Whoever has no memory for a second copy of the optimizer's state would have to do without a way back."""
    model, optimizer, _ = diverging("rollback", make=make, snapshots=kind)
    (message,) = messages(optimizer)
    assert "rolled back" in message
    assert loss_at(model, 0) < 1.2
    snapshot = optimizer.controller.guard.snapshot
    assert all(tensor.device == saved.device for tensor, saved in snapshot.tensors)
    if kind == WEIGHTS and make is not torch.optim.Adagrad:
        assert not snapshot.optimizer_state


def test_rollback_is_what_happens_by_default():
    """Weights that are destroyed stay so, however low the learning rate is set then."""
    model = network()
    optimizer = scheduled(model)
    train(model, optimizer, range(BAD))
    throw_away(model)
    train(model, optimizer, range(BAD, STEPS))
    assert "rolled back" in messages(optimizer)[0] and loss_at(model, 0) < 1.2


def test_buffers_of_the_model_go_back_as_well():
    """Statistics of batch norm that are of lost weights would make good ones fail in evaluation."""

    def buffers_after_rollback(given):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        inner = torch.optim.SGD(model.parameters(), 0.01, 0.9)
        zero = SchedulePolicy.zero()
        optimizer = ScheduledOptimizer(
            inner, total_steps=STEPS, decisions=DECISIONS, policy=zero, model=model if given else None
        )
        train(model, optimizer, range(BAD))
        with torch.no_grad():
            model[0].weight.mul_(1e6)
            model[2].weight.mul_(1e6)
        for step in range(BAD, STEPS):
            train(model, optimizer, [step])
            if messages(optimizer):
                return model[1].running_var.max()

    assert buffers_after_rollback(given=True) < 100 < buffers_after_rollback(given=False)


# --- What the policy may do -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", [1, -1])
def test_trust_bounds_the_policy(direction):
    """Fine-tuning at a learning rate that a policy has raised tenfold destroys what was learned before."""
    model = network()
    optimizer = scheduled(model, always(lr=direction), trust=2, controls=["lr"])
    factors = [lr / (0.01 * (1 - n / STEPS)) for n, ((lr, _),) in enumerate(train(model, optimizer, range(STEPS)))]
    assert min(factors) >= 0.5 - 1e-9 and max(factors) <= 2 + 1e-9
    assert factors[-1] == pytest.approx(2.0**direction)


def test_what_the_probe_has_told_stands_until_the_loss_falls():
    """The first decision would raise the learning rate above what the probe has just found to go too far."""
    model = network()
    optimizer = scheduled(model, always(safe_start=True, lr=1), 20.0, controls=["lr"])
    states = []
    for step in range(40):
        optimizer.zero_grad()
        loss_at(model, step).backward()
        optimizer.step(loss=1.0)  # whatever happens, it does not fall
        states.append(optimizer.controller.state.control["lr"])
    allowed = states[1]
    assert allowed < 0, "this learning rate goes too far"
    assert max(states[1:]) == allowed
    for step in range(40, 60):
        optimizer.zero_grad()
        loss_at(model, step).backward()
        optimizer.step(loss=0.97 ** (step - 39))
    assert optimizer.controller.state.control["lr"] > allowed


@pytest.mark.parametrize("make", [torch.optim.Adadelta, torch.optim.Rprop])
def test_optimizers_with_a_scale_of_their_own_start_at_their_learning_rate(make):
    """The first, small step is not like those to come: Rprop would keep its size, Adadelta has hardly begun."""
    model = network()
    optimizer = scheduled(model, always(safe_start=True, lr=1), 1.0, make=make)
    rates = [lr for ((lr, _),) in train(model, optimizer, range(STEPS))]
    assert rates[0] == 1.0
    assert 2 < max(lr / (1 - n / STEPS) for n, lr in enumerate(rates)) <= OWN_SCALE[make.__name__] * (1 + 1e-9)


def test_learning_rate_of_a_scheduler_that_is_no_number_does_not_reach_the_weights():
    """min(max(nan, low), high) is NaN: a bound that lets the worst through is none."""
    rates = []
    for value in (math.nan, math.inf):
        model = network()
        inner = torch.optim.SGD(model.parameters(), 0.1)
        optimizer = ScheduledOptimizer(inner, total_steps=STEPS, follow_scheduler=True, lr_bounds=(1e-4, 1.0))
        train(model, optimizer, range(3))
        inner.param_groups[0]["lr"] = value
        loss_at(model, 3).backward()
        inner.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
        optimizer.step(loss=1.0)
        assert rates[-1] == 1e-4
        assert_finite_weights(model)


def test_run_without_controls_is_never_taken_back():
    """`controls=()` promises the base schedule exactly, and to try the same again would diverge again."""
    _, optimizer, _ = diverging("rollback", controls=())
    assert optimizer.controller.guard.snapshot is None
    assert [message.endswith("lr is not among the controls") for message in messages(optimizer)] == [True]


def test_rollback_passes_over_what_is_no_parameters_state():
    """A hook that keeps a counter in the optimizer's state would end the run that is to be saved."""
    model = network()
    optimizer = OPTIMIZERS["SGD"](model.parameters(), 0.1)
    optimizer.state["counter"] = 3
    snapshot = Snapshot.of(optimizer, None, GuardState(), math.nan)
    loss_at(model, 0).backward()
    optimizer.step()
    snapshot.restore(optimizer)
    assert_same_weights(model, network())
    assert dict(optimizer.state) == {"counter": 3}
