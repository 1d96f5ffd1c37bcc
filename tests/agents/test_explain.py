"""What is said of why a policy decided so is so."""

import math
import re

import numpy as np
import pytest
import torch
from helpers import lively_policy, network, perceptron, train

from rlsched import ScheduledOptimizer
from rlsched.actors import Recurrent
from rlsched.agents import evaluate
from rlsched.agents.explain.decisions import Course, decided, of_episodes, of_runs
from rlsched.agents.explain.figures import decisions_figure, fidelity_figure, importance_figure, response_figure
from rlsched.agents.explain.response import responses
from rlsched.agents.explain.surrogate import SparseLinear, Tree, fidelity, surrogates
from rlsched.control import CONTROL_NAMES, EARLY
from rlsched.decisions import NAME
from rlsched.domain import Domain
from rlsched.policy import SchedulePolicy
from rlsched.signals import OBSERVATION_NAMES

pytest.importorskip("captum")
from rlsched.agents.explain.attribution import MEMORY, attribute, importance_over_run

SEEN, CONTROLS = ("progress", "grad_cosine", "update_ratio"), ("lr", "momentum")
RUNS, LENGTH = 6, 20


def courses(names=SEEN, runs=RUNS, length=LENGTH):
    """Runs of made-up observations, within [−1, 1] but for the progress."""
    generator = torch.Generator().manual_seed(5)
    progress = np.arange(length) / length
    made = []
    for run in range(runs):
        seen = torch.rand(length, len(names), generator=generator) * 2 - 1
        if "progress" in names:
            seen[:, names.index("progress")] = torch.from_numpy(progress)
        made.append(Course(f"run {run}", run, seen, np.arange(length), progress))
    return made


def linear(weights, bias, observations=SEEN, controls=CONTROLS, **options):
    """The policy whose actions are these sums."""
    return perceptron([(torch.tensor(weights), torch.tensor(bias))], observations, controls, **options)


def recurrent(seed=0):
    """A policy that remembers, of random weights."""
    torch.manual_seed(seed)
    actor = Recurrent(len(SEEN), len(CONTROLS), (8,))
    actor.load_state_dict({key: torch.randn_like(tensor) / 3 for key, tensor in actor.state_dict().items()})
    return SchedulePolicy(actor, SEEN, CONTROLS)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_attributions_sum_to_the_action(activation):
    """What an action owes to each observation would not be what it owes to all: the axiom of completeness.

    A kink within the way of integration costs ReLU some digits.
    """
    policy = lively_policy(activation=activation)
    decisions = decided(policy, courses(OBSERVATION_NAMES, runs=2))
    found = attribute(policy, decisions)
    rise = decisions.actions.double().numpy() - found.baseline_action
    within = {"tanh": 1e-6, "relu": 5e-3}[activation]
    np.testing.assert_allclose(found.values.sum(-1), rise, atol=within)
    assert found.error < within and np.abs(rise).mean() > 0.1
    assert found.features == OBSERVATION_NAMES


def test_attributions_of_a_sum_are_its_terms():
    """Integrated gradients of a linear function are weight × (value − baseline), whatever the way of integration."""
    policy = linear([[1.0, -2.0, 0.0], [0.0, 0.0, 3.0]], [0.5, 0.0])
    decisions = decided(policy, courses())
    found = attribute(policy, decisions)
    away = (decisions.observations - decisions.observations.mean(0)).double().numpy()
    np.testing.assert_allclose(found.values[:, 0], away * [1.0, -2.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(found.values[:, 1], away * [0.0, 0.0, 3.0], atol=1e-6)


def test_action_is_explained_before_it_is_clipped_and_without_the_influence():
    """What is clipped has no slope: a decision at the bound would owe nothing to anything."""
    domain = Domain(torch.zeros(3), 100 * torch.eye(3), torch.tensor(1.0))
    policy = linear([[9.0, 0.0, 0.0], [0.0, 0.0, 1.0]], [5.0, 0.0], domain=domain)
    decisions = decided(policy, courses())
    assert (decisions.actions[:, 0] > 1).all() and (decisions.influence < 1).all()
    seen = decisions.observations
    np.testing.assert_allclose(attribute(policy, decisions).values[:, 0, 0], 9 * seen[:, 0], atol=1e-6)
    torch.testing.assert_close(decisions.applied, policy.act(seen)[0])


def test_typical_is_what_the_policy_was_trained_on():
    """With the mean of one run for a baseline, what never changes in it would never matter: the optimizer, for one."""
    policy = linear([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [0.0, 0.0])
    decisions = decided(policy, courses())
    assert attribute(policy, decisions).baseline == pytest.approx(decisions.observations.mean(0).numpy())
    trained = SchedulePolicy(
        policy.actor, SEEN, CONTROLS, domain=Domain(torch.tensor([0.1, 0.2, 0.3]), torch.eye(3), torch.ones(()))
    )
    found = attribute(trained, decided(trained, courses()))
    assert found.baseline == pytest.approx([0.1, 0.2, 0.3]) and found.baseline_action == pytest.approx([0.1, 0.2])


def test_memory_is_a_feature_of_its_own():
    """What a policy remembers decides as well, and what it owes to that would be laid on what it sees."""
    policy = recurrent()
    decisions = decided(policy, courses())
    memory = policy.begin()
    for n, observation in enumerate(decisions.observations[:LENGTH]):
        torch.testing.assert_close(decisions.memory[n], memory)
        action, memory = policy.actor(observation, memory)
        torch.testing.assert_close(decisions.actions[n], action)
    found = attribute(policy, decisions)
    assert found.features == (*SEEN, MEMORY)
    np.testing.assert_allclose(
        found.values.sum(-1), decisions.actions.double().numpy() - found.baseline_action, atol=1e-5
    )
    assert not found.values[::LENGTH, :, -1].any(), "there is nothing to remember at a run's first decision"
    assert np.abs(found.values[1:LENGTH, :, -1]).min() > 0


def test_importance_over_a_run_is_that_of_its_parts():
    """What matters at the end would be shown at the beginning."""
    policy = linear([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], [0.0, 0.0])
    decisions = decided(policy, courses())
    found = attribute(policy, decisions)
    progress = np.where(decisions.progress < 0.5, decisions.progress, 1.0)
    parts = importance_over_run(found, progress, 4)
    sizes = np.abs(found.values)
    np.testing.assert_allclose(parts[0], sizes[decisions.progress < 0.25].mean(0))
    np.testing.assert_allclose(parts[3], sizes[decisions.progress >= 0.5].mean(0))
    assert np.isnan(parts[2]).all()


def test_response_is_the_mean_over_the_decisions():
    """Of a linear policy, partial dependence is a line of its weight through the mean of the rest."""
    policy = linear([[1.0, -2.0, 0.0], [0.0, 0.0, 3.0]], [0.5, 0.0])
    decisions = decided(policy, courses())
    found = responses(policy, decisions)
    mean = decisions.observations.double().mean(0)
    curve = found["grad_cosine"]
    np.testing.assert_allclose(curve.mean[:, 0], 0.5 + float(mean[0]) - 2 * curve.values, atol=1e-5)
    np.testing.assert_allclose(curve.typical, curve.mean, atol=1e-5)
    assert (curve.low[:, 0] < curve.mean[:, 0]).all() and (curve.mean[:, 0] < curve.high[:, 0]).all()
    assert [curve.direction(i) for i in (0, 1)] == ["lowers", "little"]
    assert found["update_ratio"].direction(1) == "raises"


def test_response_that_turns_has_no_direction():
    """ "Raises" would be said of what lowers as well."""
    tent = [(torch.tensor([[0.0, 1.0, 0.0], [0.0, -1.0, 0.0]]), torch.zeros(2)), (torch.ones(2, 2), torch.zeros(2))]
    policy = perceptron(tent, SEEN, CONTROLS, activation="relu")
    assert responses(policy, decided(policy, courses()))["grad_cosine"].direction(0) == "both ways"


def test_observation_that_never_changes_has_no_response():
    """A curve of nothing seen would be shown as if it were known; and a memory is held as it was."""
    policy, made = recurrent(), courses()
    for course in made:
        course.observations[:, 1] = 0.25
    assert responses(policy, decided(policy, made)).keys() == {"progress", "update_ratio"}


def test_tree_finds_a_tree():
    """A surrogate that misses what it can say exactly is no measure of what cannot be said so.

    The policy is a steep step: its action is 1 where the cosine is above 0.3, else 0.
    """
    steep = [
        (torch.tensor([[0.0, 1e4, 0.0]] * 2), torch.tensor([-3e3, -3e3 - 1])),
        (torch.tensor([[1.0, -1.0]] * 2), torch.zeros(2)),
    ]
    policy = perceptron(steep, SEEN, CONTROLS, activation="relu")
    decisions = decided(policy, courses(runs=12, length=60))
    best, other, *_ = surrogates(CONTROLS, SEEN, decisions)
    assert (best.control, best.kind) == ("lr", "tree")
    assert best.fidelity.r2 > 0.95 and best.fidelity.same_sign > 0.95 and other.fidelity.r2 < 0.9
    one = Tree()
    one.LEAVES = 2
    seen = decisions.observations.double().numpy()
    low, high = one.fit(seen, decisions.progress, decisions.actions[:, 0].double().numpy()).rules(SEEN)
    assert low.startswith("+0.00 in ") and "grad_cosine ≤ 0.3" in low
    assert high.startswith("+1.00 in ") and "grad_cosine > 0.3" in high


def test_sparse_linear_finds_a_sum_of_few_terms():
    """As above; the two parts of a run have the weights of each, and what does not matter has none."""
    seen = courses(OBSERVATION_NAMES, length=100)
    weights = torch.zeros(1, len(OBSERVATION_NAMES))
    named = {"grad_cosine": 0.8, "update_ratio": -0.5, "loss_vs_slow": 0.3}
    for name, weight in named.items():
        weights[0, OBSERVATION_NAMES.index(name)] = weight
    policy = perceptron([(weights, torch.tensor([0.2]))], OBSERVATION_NAMES, ("lr",))
    decisions = decided(policy, seen)
    best, tree = surrogates(("lr",), OBSERVATION_NAMES, decisions)
    assert best.kind == "linear" and best.fidelity.r2 > 0.99 and best.fidelity.same_sign > 0.95
    assert tree.fidelity.r2 < best.fidelity.r2
    first, later = best.lines
    for line in (first, later):
        words = line.replace("− ", "-").replace("+ ", "").partition(": ")[2].split()
        found = dict(zip(words[2::2], map(float, words[1::2]), strict=True))
        assert list(found)[:3] == list(named)
        assert [found[name] for name in named] == pytest.approx(list(named.values()), abs=0.04)
    assert first.startswith(f"first {EARLY:.0%} of the run: ") and later.startswith("later: ")


def test_linear_weights_of_a_part_are_its_own():
    """One sum for the whole run would be called two."""
    observations = np.random.default_rng(0).uniform(-1, 1, (400, 2))
    progress = np.linspace(0, 1, 400)
    actions = np.where(progress < EARLY, observations[:, 0], -observations[:, 1])
    model = SparseLinear().fit(observations, progress, actions)
    np.testing.assert_allclose(model.models[0][0], [1, 0], atol=0.1)
    np.testing.assert_allclose(model.models[1][0], [0, -1], atol=0.1)
    assert np.corrcoef(model.predict(observations, progress), actions)[0, 1] > 0.99


def test_fidelity_is_that_on_runs_held_out():
    """What a surrogate knows by heart would pass for what the policy does.

    Each run has an action of its own, which shows in nothing that holds for other runs.
    """
    rng = np.random.default_rng(0)
    run = np.repeat(np.arange(8), 50)
    observations = np.stack([run + rng.uniform(0, 0.1, 400), rng.uniform(-1, 1, 400)], 1)
    actions = rng.choice([-1.0, 1.0], 8)[run] * (1 + 0.1 * run)
    tree = Tree().fit(observations, np.zeros(400), actions)
    assert np.corrcoef(tree.predict(observations, np.zeros(400)), actions)[0, 1] > 0.99
    assert fidelity(Tree, observations, np.zeros(400), actions, run).r2 < 0.5
    with pytest.raises(ValueError, match="only one run"):
        fidelity(Tree, observations, np.zeros(400), actions, 0 * run)


def test_actions_that_never_change_have_no_r2():
    """A division by zero would be a fidelity."""
    policy = linear([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], [0.4, 0.0])
    still, *_ = surrogates(CONTROLS, SEEN, decided(policy, courses()))
    assert math.isnan(still.fidelity.r2) and still.fidelity.same_sign == 1


def test_episodes_are_told_apart(tiny):
    """Decisions of several runs in one row would be a run that never was."""
    policy = lively_policy(safe_start=1.0)
    evaluation = evaluate(policy, tiny, episodes=3, seed=7)
    decisions = of_episodes(policy, evaluation)
    assert decisions.courses == ("episode 0", "episode 1", "episode 2")
    for episode in range(3):
        alone = evaluate(policy, [tiny[episode % 2]], episodes=1, seed=7 + episode)
        here = decisions.course == episode
        torch.testing.assert_close(
            decisions.observations[here], torch.from_numpy(alone.observations), rtol=0.01, atol=1e-3
        )
        assert decisions.steps[here].tolist() == [1, *alone.paths["inner_steps"][0][:-1]]
        assert decisions.progress[here] == pytest.approx(
            decisions.observations[here][:, OBSERVATION_NAMES.index("progress")]
        )


STEPS = 21


@pytest.fixture
def run(tmp_path):
    """Makes the folder of a finished run, and tells which it is."""
    pytest.importorskip("tensorboard")

    def make(policy, name="run", **options):
        model = network()
        groups = [{"params": layer.parameters()} for layer in (model[0], model[2])]
        options = {"decisions": 5, "log_dir": tmp_path / name, **options}
        train(
            model,
            ScheduledOptimizer(torch.optim.SGD(groups, 0.1, 0.9), total_steps=STEPS, policy=policy, **options),
            range(STEPS),
        )
        return tmp_path / name

    return make


def test_decisions_of_a_run_are_those_that_it_made(run):
    """An explanation of other decisions is none."""
    policy = recurrent()
    folders = [run(policy, "one"), run(policy, "two", per_group=True)]
    decisions = of_runs(policy, folders)
    assert decisions.courses == (str(folders[0]), f"{folders[1]}, 0", f"{folders[1]}, 1")
    assert decisions.steps.tolist() == [1, 6, 11, 16] * 3
    assert decisions.run.tolist() == [0] * 4 + [1] * 8, "groups of one run are no runs of their own"
    assert decisions.progress == pytest.approx(decisions.steps / STEPS)


def test_run_of_another_policy_is_refused(run):
    """Its decisions would be explained by what never saw them."""
    folder = run(lively_policy())
    with pytest.raises(
        ValueError, match=rf"run is a run of another policy, sha256={lively_policy().digest[:12]}; the one"
    ):
        of_runs(recurrent(), [folder])


def test_run_without_its_beginning_is_refused_where_it_was_remembered(run):
    """What a policy remembered then is nowhere, and would be taken for nothing."""
    for policy, refused in ((recurrent(), True), (lively_policy(), False)):
        folder = run(policy, policy.actor.name)
        head, _, *rest = (folder / NAME).read_text().splitlines(keepends=True)
        (folder / NAME).write_text("".join([head, *rest]))
        if refused:
            with pytest.raises(
                ValueError, match=r"recurrent: at step 6 the policy remembered what .* lacks the run's beginning"
            ):
                of_runs(policy, [folder])
        else:
            assert of_runs(policy, [folder]).steps.tolist() == [6, 11, 16]


@pytest.mark.parametrize(
    "old, new, message",
    [
        (
            r'"action": {"lr": [^,]*',
            '"action": {"lr": 0.5',
            "at step 1 the policy would have decided otherwise than .* altered",
        ),
        ('{"progress": ', '{"advance": ', "at step 1 decisions.jsonl has other observations than the policy"),
    ],
)
def test_run_that_was_altered_is_refused(old, new, message, run):
    """A file that was edited would be explained as if the policy had decided that."""
    policy = lively_policy(observations=SEEN)
    folder = run(policy)
    (folder / NAME).write_text(re.sub(old, new, (folder / NAME).read_text()))
    with pytest.raises(ValueError, match=message):
        of_runs(policy, [folder])


def test_nothing_to_explain_is_an_error():
    """A mean of nothing is NaN, all over the tables."""
    with pytest.raises(ValueError, match="no decisions to explain"):
        decided(lively_policy(), [])


def test_pictures_show_every_control_and_feature():
    """A figure of another order, or with a panel that stays empty, shows a policy that is not there."""
    policy = recurrent()
    decisions = decided(policy, courses())
    found, curves = attribute(policy, decisions), responses(policy, decisions)
    bars = importance_figure(CONTROLS, found, decisions).axes[0]
    order = [label.get_text() for label in bars.get_yticklabels()]
    widths = [bar.get_width() for bar in bars.patches]
    assert sorted(order) == sorted(found.features) and widths == sorted(widths, reverse=True)
    axes = decisions_figure(CONTROLS, found, decisions, 2).axes
    assert axes[0].get_title("left").startswith("run 2") and len(axes) >= 4 * len(CONTROLS)
    figure = response_figure("momentum", 1, curves, list(SEEN), decisions, SEEN)
    lines = {axis.get_xlabel(): axis.lines for axis in figure.axes if axis.get_xlabel()}
    assert lines.keys() == set(SEEN)
    np.testing.assert_allclose(lines["grad_cosine"][1].get_ydata(), curves["grad_cosine"].mean[:, 1])
    titles = [
        axis.get_title() for axis in fidelity_figure(CONTROLS, surrogates(CONTROLS, SEEN, decisions), decisions).axes
    ]
    assert [title.split(":")[0] for title in titles] == ["lr, linear", "momentum, linear", "lr, tree", "momentum, tree"]


def test_controls_have_names_of_their_own():
    """The tests above take two controls of all: the names must be there."""
    assert set(CONTROLS) <= set(CONTROL_NAMES) and set(SEEN) <= set(OBSERVATION_NAMES)
