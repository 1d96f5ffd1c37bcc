"""What is known of the validation losses of a run: by the policy, by a user who would stop, and of the best weights."""

import copy
import math
import pickle

import pytest
import torch
from helpers import FACES, assert_same_weights, lively_policy, network, perceptron, train
from test_resume import saved_and_loaded

from rlsched import ScheduledOptimizer, SchedulePolicy, attach
from rlsched.number import checked_loss
from rlsched.signals import OBSERVATION_NAMES
from rlsched.validation import Validation, agreed, unseen, validated

NAN = math.nan


def after(*losses):
    """What is known after these losses, the first of which came after 10 steps, the second after 20, and so on."""
    known = unseen()
    for i, loss in enumerate(losses, 1):
        known = validated(known, loss, 10 * i)
    return known


def same(one, other):
    """Whether all is the same, NaN included."""
    return one == pytest.approx(other, nan_ok=True, rel=0, abs=0)


def test_best_is_the_lowest_and_the_first_of_equals():
    """Patience would never end with a loss that stays where it is, or weights be kept that are no better."""
    assert same(unseen(), (NAN, NAN, NAN, NAN, 0))
    assert after(3.0) == Validation(3.0, 10, 3.0, 10, 0)
    assert after(3.0, 2.0, 2.0, 2.5) == Validation(2.5, 40, 2.0, 20, 2)
    assert after(-1.0, -2.0, -1.5) == Validation(-1.5, 30, -2.0, 20, 1), "a log-likelihood may be negative"


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_loss_that_is_not_finite_counts_and_is_never_the_best(bad):
    """A NaN would be the best for ever, since no loss is lower; or a run that diverged would never stop."""
    assert same(after(bad), (bad, 10, NAN, NAN, 1))
    assert same(after(bad, 3.0), (3.0, 20, 3.0, 20, 0))
    assert same(after(3.0, bad), (bad, 20, 3.0, 10, 1))


def test_ranks_agree_on_what_one_of_them_or_all_have_heard():
    """Each process would decide by its own part of the data, or only the first one by any, and their weights part."""
    one, other = after(3.0, 2.0, 2.5), after(3.0, 2.0, 3.5)
    assert agreed([one, one, one]) == one, "not even by rounding"
    assert agreed([after(0.1)] * 7) == after(0.1)
    assert agreed([one, unseen()]) == one
    assert agreed([after(3.0), one]) == one, "the others have heard the last agreement"
    assert agreed([one, other]) == Validation(3.0, 30, 2.0, 20, 1)
    assert same(agreed([unseen(), unseen()]), unseen())


@pytest.mark.parametrize(
    "loss", [1, 1.0, torch.tensor(1.0), torch.tensor([1.0], dtype=torch.bfloat16), torch.ones(()).requires_grad_()]
)
def test_number_is_taken_as_a_user_has_it(loss):
    """What `observe` takes, and what a metric returns, would be refused."""
    checked = checked_loss("loss", loss)
    assert checked == 1.0 and (type(checked) is float or (checked.ndim == 0 and not checked.requires_grad))


@pytest.mark.parametrize("loss", ["1.0", None, [1.0], {"loss": 1.0}])
def test_what_is_no_number_is_named(loss):
    """A TypeError from deep inside names no argument."""
    with pytest.raises(TypeError, match=f"loss must be a real number.*, got .* of {type(loss).__name__}"):
        checked_loss("loss", loss)


def test_several_numbers_are_refused():
    """The losses of a batch are not the loss."""
    with pytest.raises(ValueError, match=r"loss must be one number, got a tensor of shape \(3,\)"):
        checked_loss("loss", torch.ones(3))


# --- In a training loop ---------------------------------------------------------------------------------------------

STEPS, WINDOW = 41, 4  # decisions before the inner steps 1, 5, 9 and so on
LOSSES = {8: 2.0, 16: 1.0, 20: 1.5, 24: 1.25, 32: 0.5}  # validation losses, after so many inner steps
SEES = ("validation_age", "validation_vs_best", "validation_gap")
EACH_FACE = pytest.mark.parametrize("face", FACES)


class Watching(SchedulePolicy):
    """Stands still, and remembers what it saw of validation."""

    def __init__(self):
        still = perceptron([(torch.zeros(1, len(SEES)), torch.zeros(1))], SEES, ("lr",))
        super().__init__(still.actor, SEES, ("lr",))
        self.seen = {}

    def act(self, observation, memory=None):
        self.seen[1 + WINDOW * len(self.seen)] = observation.tolist()
        return super().act(observation, memory)


def started(face, policy=None, **options):
    """A model, what steps its weights, and what observes."""
    model = network()
    driver = face(torch.optim.AdamW(model.parameters(), 0.01), **OPTIONS, policy=policy or lively_policy(), **options)
    return model, driver.optimizer if face is attach else driver, driver


OPTIONS = {"total_steps": STEPS, "decisions": 11}


def run(model, optimizer, driver, steps=range(STEPS), losses=LOSSES):
    """Train, and report the validation losses when it is time."""
    lrs = []
    for step in steps:
        if step in losses:
            driver.observe_validation(losses[step])
        lrs += train(model, optimizer, [step])
    return lrs


@EACH_FACE
def test_policy_sees_the_validation_loss(face):
    """A policy that was trained with it would be blind in a user's loop."""
    policy = Watching()
    run(*started(face, policy))
    assert [seen for seen in policy.seen.values()][:2] == [[-1, 0, 0]] * 2, "at the steps 1 and 5 there was none"
    ages = {step: (age, vs_best) for step, (age, vs_best, _) in policy.seen.items()}
    log1p = {n: pytest.approx(math.log1p(n / WINDOW) / 4, abs=1e-6) for n in range(STEPS)}
    assert ages[9] == (log1p[1], 0) and ages[13] == (log1p[5], 0)
    assert ages[21] == (log1p[1], pytest.approx(2 * math.log(1.5), abs=1e-6))
    assert ages[25] == (log1p[1], pytest.approx(2 * math.log(1.25), abs=1e-6))
    assert ages[29] == (log1p[5], pytest.approx(2 * math.log(1.25), abs=1e-6))
    assert ages[37] == (log1p[5], 0)
    assert policy.seen[9][2] > 0 > policy.seen[37][2]


@EACH_FACE
def test_policy_that_does_not_ask_for_it_decides_as_without(face):
    """Whoever validates would get another schedule from the policy that ships than one who does not."""
    names = tuple(name for name in OBSERVATION_NAMES if name not in SEES)
    one, other = (started(face, lively_policy(observations=names), keep_best=True) for _ in range(2))
    assert run(*one) == run(*other, losses={})
    assert_same_weights(one[0], other[0])


@EACH_FACE
def test_run_stops_when_patience_ends(face):
    """Early stopping that comes a validation late, or never, is an epoch or a night of a cluster."""
    model, optimizer, driver = started(face, patience=2)
    said = []
    for step in range(STEPS):
        if step in LOSSES:
            driver.observe_validation(LOSSES[step])
            said.append(driver.should_stop)
        train(model, optimizer, [step])
    assert said == [False, False, False, True, False]
    without = started(face)
    run(*without, losses=dict.fromkeys(range(STEPS), 1.0))
    assert without[2].should_stop is False


@EACH_FACE
def test_best_weights_are_those_of_the_best_validation(face):
    """A user would deploy the weights of the last epoch, or some from between two validations."""
    model, optimizer, driver = started(face, keep_best=True)
    run(model, optimizer, driver, range(16))
    expected = copy.deepcopy(model)
    run(model, optimizer, driver, range(16, 30))
    last = copy.deepcopy(model)
    with driver.best(model):
        assert_same_weights(model, expected)
    assert_same_weights(model, last)
    with pytest.raises(ZeroDivisionError), driver.best(model):
        1 / 0  # noqa: B018
    assert_same_weights(model, last)
    driver.restore_best(model)
    assert_same_weights(model, expected)


@pytest.mark.parametrize("stop", [0, 8, 18, 24, 30, 41])
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_run_goes_on_with_its_validations_and_its_best_weights(way, stop):
    """A job that is preempted would be more patient than another, and have other weights for its best."""
    whole = started(ScheduledOptimizer, patience=2, keep_best=True)
    expected = run(*whole)
    model, optimizer, _ = started(ScheduledOptimizer, patience=2, keep_best=True)
    before = run(model, optimizer, optimizer, range(stop))
    if way == "state_dict":
        saved = saved_and_loaded([model.state_dict(), optimizer.state_dict()])
        model, optimizer, _ = started(ScheduledOptimizer, patience=2, keep_best=True)
        for part, state in zip((model, optimizer), saved, strict=True):
            part.load_state_dict(state)
    elif way == "deepcopy":
        model, optimizer = copy.deepcopy((model, optimizer))
    else:
        model, optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    assert before + run(model, optimizer, optimizer, range(stop, STEPS)) == expected
    assert same(optimizer.controller.validation, whole[1].controller.validation)
    with optimizer.best(model), whole[1].best(whole[0]):
        assert_same_weights(model, whole[0])


def test_copy_of_other_weights_is_refused():
    """The best weights of another network would be found to be so when they are wanted, after a night."""
    model, optimizer, driver = started(ScheduledOptimizer, keep_best=True)
    run(model, optimizer, driver, range(9))
    other = torch.nn.Linear(6, 3)
    fresh = ScheduledOptimizer(
        torch.optim.AdamW(other.parameters(), 0.01), **OPTIONS, policy=lively_policy(), keep_best=True
    )
    with pytest.raises(ValueError, match=r"kept.best must be a copy of weights of \[\(\(3, 6\), .* got \[\(\(8, 6\)"):
        fresh.load_state_dict(optimizer.state_dict())
    assert fresh.controller.step_count == 0


def test_validation_loss_is_logged(tmp_path):
    """The two curves that show overfitting belong into one chart."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, optimizer, driver = started(ScheduledOptimizer, log_dir=tmp_path)
    run(model, optimizer, driver, losses={**LOSSES, 40: math.nan})
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("rlsched/validation_loss")] == list(LOSSES.items())


@pytest.mark.parametrize("patience", [0, -1, 2.5, True, "2"])
def test_patience_that_is_none_is_refused(patience):
    """A run would stop at once, or never."""
    with pytest.raises(ValueError, match="patience must be a positive int, the number of validations, or None, got"):
        started(ScheduledOptimizer, patience=patience)
