"""A network that learns its data by heart is taken back to where its validation loss was lowest."""

import math

import pytest
import torch
from helpers import assert_same_weights, network, train
from test_resume import saved_and_loaded

from rlsched import ScheduledOptimizer, SchedulePolicy, schedule
from rlsched.control import LR
from rlsched.signals import Run
from rlsched.validation import Validation, unseen, validated
from rlsched.verdict import LEAST_OVERFIT, OVERFIT, GuardState, is_above_best, judge_validation

STEPS, WINDOW = 100, 5
RUN = Run(total_steps=STEPS, interval=WINDOW, adaptive=-1, sums_gradients=1)
BEST, BACK = 20, 31  # the step of the lowest validation loss; that of the second decision after which it is far above


def run_of(model, **options):
    """A run that decides at steps 1, 6, 11, ..., under a policy that stands still."""
    sgd = torch.optim.SGD(model.parameters(), 0.01, 0.9)
    options = {"total_steps": STEPS, "decisions": STEPS // WINDOW, "policy": SchedulePolicy.zero(), **options}
    return ScheduledOptimizer(sgd, **options)


def train_and_validate(model, optimizer, steps, after=lambda step: None):
    """Steps, with a validation every ten: its loss falls until `BEST`, and is three times as high from then on."""
    for step in steps:
        train(model, optimizer, [step])
        after(step + 1)
        if (step + 1) % WINDOW == 0:
            optimizer.observe_validation(1 - step / 50 if step < BEST else 3 * (1 - (BEST - 1) / 50))


def messages(optimizer):
    """What was done, without the steps."""
    return [message for _, message in optimizer.controller.interventions]


def verdicts(losses, validated_every=1):
    """Steps at which there is an alarm, of validation losses at the ends of windows."""
    known, guard, steps = unseen(), GuardState(), []
    state = schedule.begin(RUN, {name: 0.1 for name in schedule.CONTROLS}, probing=0)
    for i, loss in enumerate(losses):
        state = state._replace(window_start=i * WINDOW, step=(i + 1) * WINDOW)
        if i % validated_every == 0:
            known = validated(known, loss, state.step)
        guard, alarm = judge_validation(guard, RUN, state, known)
        steps += [state.step] if alarm else []
    return steps


def test_more_is_allowed_the_more_is_to_come():
    """A loss that comes down as the lr does would be taken back; one that stays up at the end would be kept."""
    by_a_half = [1.0] + [1.5] * 19
    assert math.exp(LEAST_OVERFIT + OVERFIT * (1 - 0.40)) > 1.5 > math.exp(LEAST_OVERFIT + OVERFIT * (1 - 0.45))
    assert verdicts(by_a_half) == [50], "the second in a row, and no more until it has come down"
    assert verdicts([1.0] + [1.01] * 19) == []
    assert verdicts([1.0] * 18 + [1.1] * 2) == [STEPS]


def test_one_bad_validation_is_none():
    """Losses of a high lr go up and down."""
    assert verdicts([1.0, 1.0, 9.0, 1.0, 9.0, 1.0] * 3) == []
    assert verdicts([1.0, 9.0, 9.0, 1.0, 9.0, 9.0]) == [15, 30], "and it is heard again after it has come down"


def test_old_validation_is_heard_once():
    """A validation at the end of an epoch would count at every decision of the next one."""
    assert verdicts([1.0, 0, 0, 9.0, 0, 0, 1.0, 0, 0], validated_every=3) == []


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (unseen(), False),
        (Validation(math.inf, 10, 1.0, 5, 1), True),
        (Validation(math.nan, 10, 1.0, 5, 1), True),
        (Validation(math.nan, 10, math.nan, math.nan, 2), False),
        (Validation(-1.0, 10, -2.0, 5, 1), False),  # of a log-likelihood there is no factor
        (Validation(1.0, 10, 0.0, 5, 1), False),
    ],
)
def test_what_has_no_factor_is_not_judged(known, expected):
    """A run would be thrown back by a loss that is not known."""
    assert is_above_best(known) == expected


def test_run_goes_back_to_the_weights_of_the_best_validation():
    """What was learnt in general would be lost to what is learnt by heart."""
    model, weights = network(), {}
    optimizer = run_of(model)

    def note(step):
        weights[step] = [p.detach().clone() for p in model.parameters()]

    train_and_validate(model, optimizer, range(BACK), note)
    assert not messages(optimizer)
    lr = optimizer.controller.state.control[LR.name]
    train_and_validate(model, optimizer, [BACK], note)
    (message,) = messages(optimizer)
    assert message == "the validation loss has risen from 0.62 to 1.86: rolled back and lr cut to a tenth"
    snapshot = BEST + 1  # the decision after it
    for p, then in zip(model.parameters(), weights[snapshot], strict=True):
        assert torch.equal(p, then)
    assert optimizer.controller.state.control[LR.name] == pytest.approx(lr - math.log(10))
    train_and_validate(model, optimizer, range(BACK + 1, STEPS))
    assert len(messages(optimizer)) == 1, "weights that are no better would be fetched for ever"


@pytest.mark.parametrize("options", [{"undo_overfitting": False}, {"on_divergence": "cut"}, {"on_divergence": None}])
def test_who_does_not_want_it_has_a_run_without(options):
    """A training loss may be all that counts; and a snapshot costs memory."""
    alone, heard = network(), network()
    optimizers = [run_of(model, **options) for model in (alone, heard)]
    train(alone, optimizers[0], range(STEPS))
    train_and_validate(heard, optimizers[1], range(STEPS))
    assert_same_weights(alone, heard)
    assert not messages(optimizers[1])


def test_saved_run_goes_back_as_one_that_was_never_interrupted():
    """Resumed between the rise and the answer, it would have weights of after the rise to go back to."""
    model, again = network(), network()
    optimizer = run_of(model)
    train_and_validate(model, optimizer, range(BACK - 3))
    state = saved_and_loaded(optimizer.state_dict()), saved_and_loaded(model.state_dict())
    resumed = run_of(again)
    again.load_state_dict(state[1])
    resumed.load_state_dict(state[0])
    for one, its in ((model, optimizer), (again, resumed)):
        train_and_validate(one, its, range(BACK - 3, STEPS))
    assert messages(resumed) == messages(optimizer) != []
    assert_same_weights(model, again)


def test_best_validation_of_weights_that_are_lost_is_nothing_to_go_back_to():
    """A snapshot of weights that had blown up since the validation would be what every rollback brings."""
    model = network()
    optimizer = run_of(model)
    train_and_validate(model, optimizer, range(WINDOW))
    guard, state = optimizer.controller.guard, optimizer.controller.state
    known, before = validated(optimizer.controller.validation, 0.1, WINDOW), guard.snapshot
    for loss in (math.nan, math.inf):
        guard.consider_snapshot(RUN, [state], loss, known)
        assert guard.snapshot is before
    guard.consider_snapshot(RUN, [state], 9.0, known)
    assert guard.snapshot is not before, "whatever the training loss is otherwise"
