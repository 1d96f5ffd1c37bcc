"""The controller as an object to look at: what it says of a run, and what it says of itself."""

import re

import pytest
import torch
from helpers import FACES, always, driven, lively_policy, loss_at, network, train

from rlsched import Controller, ScheduledOptimizer, attach


def controller(**options):
    """A controller at the start of a run of 21 steps, with decisions before the inner steps 1, 6, 11 and 16."""
    model = network()
    inner = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    return model, attach(inner, **{"total_steps": 21, "decisions": 5, "policy": lively_policy(), **options})


def test_repr_says_how_the_run_stands():
    """Who prints it in a notebook would see an address in memory, and look for the learning rate elsewhere."""
    model, it = controller()
    assert repr(it) == f"Controller(step 0 of 21, probing, 0 decisions, 0 interventions, {it.policy!r})"
    train(model, it.optimizer, range(13))
    text = repr(it)
    assert text.startswith("Controller(step 13 of 21, 3 decisions: ") and text.endswith(f"{it.policy!r})")
    for name, value in it.proposal.items():
        assert f"{name}={value:.4g}" in text
    assert f"{len(it.interventions)} interventions" in text
    assert len(text.splitlines()) == 1


def test_repr_says_that_a_run_is_only_looked_at():
    """A shadow would be taken for a schedule that is in force."""
    model, it = controller(shadow=True)
    train(model, it.optimizer, range(3))
    assert repr(it).startswith("Controller(step 3 of 21, shadow, 1 decisions: lr=")


def test_repr_of_the_wrapper_shows_both_parts():
    """Which optimizer it is, and how its schedule stands, are the two things that one prints it for."""
    wrapper = ScheduledOptimizer(torch.optim.AdamW(network().parameters(), 0.01), total_steps=21, policy=always())
    assert repr(wrapper.optimizer) in repr(wrapper) and repr(wrapper.controller) in repr(wrapper)


def test_docstring_names_every_public_attribute():
    """An attribute that is not documented is used all the same, and missed when it goes."""
    _, it = controller()
    section = re.search(r"\n    Attributes:\n((?:        .*\n)+)", Controller.__doc__)[1]
    named = set(re.findall(r"^        (\w+): \S", section, re.MULTILINE))
    assert named == {name for name in vars(it) if not name.startswith("_")}
    properties = [name for name, member in vars(Controller).items() if isinstance(member, property)]
    assert all(vars(Controller)[name].__doc__ for name in properties)


def test_attributes_tell_a_run_by_the_names_of_its_parts():
    """What is documented of the parts has to be what they hold."""
    model, it = controller()
    train(model, it.optimizer, range(13))
    assert (it.step_count, it.total_steps, it.run.interval, it.state.window_end) == (13, 21, 5, 16)
    assert [window.start for window in it.windows] == [0, 1, 6, 11]
    assert it.windows[-1].control == it.state.control
    assert it.proposal["momentum"] == it.optimizer.param_groups[0]["momentum"]
    assert it.groups.bases[0]["lr"] == 0.1
    assert it.skipped == 0
    with pytest.warns(UserWarning, match="no parameter has a gradient"):
        it.optimizer.zero_grad()
        it.optimizer.step()
    assert it.skipped == 1


# --- What is shown --------------------------------------------------------------------------------------------------


def test_learning_rate_explains_itself():
    """A learning rate of a tenth alarms whoever does not know that momentum has moved as well."""
    model = network()
    optimizer = ScheduledOptimizer(
        torch.optim.SGD(model.parameters(), 0.1, 0.9), total_steps=100, policy=always(momentum=1), decisions=20
    )
    train(model, optimizer, range(31))
    controller, (group,) = optimizer.controller, optimizer.param_groups
    assert group["momentum"] > 0.95
    assert controller.equivalent_lr == pytest.approx(0.1 * (1 - 31 / 100))
    assert controller.equivalent_lr == pytest.approx(group["lr"] * (1 - 0.9) / (1 - group["momentum"]), rel=0.02)
    assert f"as lr={controller.equivalent_lr:.4g} is at a momentum of 0.9" in repr(controller)


@pytest.mark.parametrize("face", FACES)
def test_warnings_point_at_the_users_line(face):
    """A warning that points into torch is searched for there, and not in the training loop."""
    model = network()
    stepped, _ = driven(face, torch.optim.SGD(model.parameters(), 0.1), total_steps=9)
    with pytest.warns(UserWarning, match="no parameter has a gradient") as caught:
        stepped.step()
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("face", FACES)
def test_loss_in_place_of_a_closure_is_refused(face):
    """step(loss) is what one types; to call it would end in an error about a float that is not callable."""
    model = network()
    stepped, _ = driven(face, torch.optim.SGD(model.parameters(), 0.1), total_steps=9)
    loss_at(model, 0).backward()
    with pytest.raises(TypeError, match=r"closure must be callable, got 1.0; a loss is given by its name"):
        stepped.step(1.0)
