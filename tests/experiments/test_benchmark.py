"""The benchmark of policies."""

import json
import math
import pickle
import re
from dataclasses import replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from helpers import always, lively_policy
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LinearLR, OneCycleLR, ReduceLROnPlateau, SequentialLR, StepLR

from rlsched import ScheduledOptimizer, SchedulePolicy
from rlsched.cli import main
from rlsched.envs import FAMILIES
from rlsched.envs.sources import Points
from rlsched.experiments.benchmark import data, statistics
from rlsched.experiments.benchmark import run as runs
from rlsched.experiments.benchmark import tasks as suites
from rlsched.experiments.benchmark.analysis import report
from rlsched.experiments.benchmark.bases import ADADELTA, ADAM, ADAMW_GPT, SGD_MOMENTUM, plain
from rlsched.experiments.benchmark.methods import BASELINES, Ignorant, ablations
from rlsched.experiments.benchmark.plots import BASE_LR, PROFILE, TENSORBOARD
from rlsched.experiments.benchmark.results import REFERENCE, TUNED, Condition, Contender, Results
from rlsched.experiments.benchmark.run import RUNS, Job, Plan, Trial, evaluate, key, perform, run
from rlsched.experiments.benchmark.tasks import CODES, DEVELOPMENT, NUMBERS, PLATEAUS, TASKS, TEST, Task, cells
from rlsched.experiments.journal import read
from rlsched.experiments.networks import perceptron
from rlsched.experiments.schedules import SCHEDULES
from rlsched.experiments.table import TABLE
from rlsched.formats import FORMATS
from rlsched.policy import Policy
from rlsched.signals import OBSERVATIONS

ZERO = SchedulePolicy.zero()
LIVELY = lively_policy()
EACH_TASK = pytest.mark.parametrize("name", TASKS)
TINY = Task(
    partial(perceptron, 13, 4, 3), lambda _: data.wine(), suites.CLASSES, {"adam": ADAM, "plain": plain(2.0)}, (6,), 8
)
TRAINING_DATA = {"digits", "diabetes"}  # of the mixtures, beside what is generated


@pytest.fixture
def tiny(monkeypatch):
    """A task of a few milliseconds in the development suite."""
    for place in (DEVELOPMENT, TASKS):
        monkeypatch.setitem(place, "tiny", TINY)


def rows(out):
    """What a file of results holds."""
    return [json.loads(line) for line in (out / RUNS).read_text().splitlines()]


# --- Suites -----------------------------------------------------------------------------------------------------------


def signature(network):
    """What an architecture is: its modules, and the shapes of its weights."""
    modules = tuple(type(module).__name__ for module in network.modules())
    return modules, tuple(tuple(p.shape) for p in network.parameters())


def source(task):
    """The first name of a task says its data: one of these sets stands in `benchmark.data`."""
    return next(name for name, task_ in TASKS.items() if task_ is task).partition("-")[0]


def test_circles_share_no_data_and_no_architecture():
    """What a policy was chosen on, or trained on, would be what it is praised for."""
    chosen_on = {**DEVELOPMENT, **PLATEAUS}
    development, test = ({source(task) for task in suite.values()} for suite in (chosen_on, TEST))
    assert development == {"patches", "topics", "cancer", "wine", "waves", "shapes"}
    assert test == {"mnist", "docstrings", "names", "friedman", "pendulum"}
    assert development.isdisjoint(test) and (development | test).isdisjoint(TRAINING_DATA)
    circles = [
        {signature(task.network()) for task in chosen_on.values()},
        {signature(task.network()) for task in TEST.values()},
        {signature(task.network()) for task in FAMILIES.values()},
    ]
    assert len(set.union(*circles)) == sum(map(len, circles))


def test_each_optimizer_is_met_by_several_tasks():
    """A policy that fails with one of them would be one odd cell among many."""
    met = [
        type(base.make([nn.Parameter(torch.zeros(2, 2))], 1.0))
        for task in TASKS.values()
        for base in task.bases.values()
    ]
    assert {kind.__name__ for kind in met} == {"SGD", "Adam", "AdamW", "RMSprop", "Adadelta", "Muon"}
    assert all(met.count(kind) >= 2 for kind in met)
    assert 16 <= sum(len(task.bases) for task in TEST.values()) <= 24
    plains = [b for task in (*DEVELOPMENT.values(), *TEST.values()) for b in task.bases.values() if b.kind is SGD]
    plains = [base for base in plains if not base.options]
    assert len(plains) >= 5 and all(1 <= base.lr <= 30 for base in plains)


def test_development_suite_is_small():
    """It has to answer in minutes, or nobody asks it."""
    quick = [*DEVELOPMENT.values(), *PLATEAUS.values()]
    assert all(sum(p.numel() for p in task.network().parameters()) <= 50_000 for task in quick)
    assert all(max(task.steps) <= (800 if task in DEVELOPMENT.values() else 2000) for task in quick)


def test_waves_and_shapes_can_be_told():
    """A regression on noise, or classes that are one another's mirror, would be a plateau for ever."""
    waves = TASKS["waves-perceptron"].data(None)
    again = torch.stack(
        [
            (4 * waves.inputs[:, 0]).sin() * waves.inputs[:, 1],
            (3 * waves.inputs[:, 1] + 2 * waves.inputs[:, 2]).cos() * waves.inputs[:, 0],
        ],
        1,
    )
    assert torch.corrcoef(torch.cat([again, waves.targets], 1).T)[:2, 2:].diagonal().min() > 0.999
    shapes = TASKS["shapes-cnn"].data(None)
    assert shapes.inputs.shape[1:] == (1, 48) and shapes.targets.bincount().min() > 400
    spectra = torch.fft.rfft(shapes.inputs[:, 0]).abs()
    means = torch.stack([spectra[shapes.targets == k].mean(0) for k in range(8)])
    different = torch.cdist(means, means) > 1.0
    mirrored = {(2, 3), (3, 2)}  # saw teeth, up and down, which differ in phase alone
    assert all(different[i, j] or (i, j) in mirrored for i in range(8) for j in range(8) if i != j)


def prototypes(_):
    """As many classes and pixels as MNIST has."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 10
    images = torch.randn(10, 1, 28, 28, generator=generator)[labels] + torch.randn(600, 1, 28, 28, generator=generator)
    return Points(images[100:], labels[100:], images[:100], labels[:100])


@EACH_TASK
def test_task_is_learnt(name, monkeypatch):
    """A task that stays near chance compares nothing."""
    monkeypatch.setattr(data, "mnist", prototypes)  # what it has otherwise is a user's own
    monkeypatch.setattr(runs, "EVALUATIONS", 2)
    task = TASKS[name]
    optimizer, base = max(task.bases.items(), key=lambda item: item[1].kind is not SGD)
    factor = 0.3 if base.options.get("momentum") else 1.0 if base.kind is SGD else 10.0
    result = perform(Job(Trial(name, optimizer, 100, "cosine", factor, 0), data=Path()))
    first, chance = result["first_loss"], result["chance"]  # which of words takes some hundred steps to reach
    assert result["loss"] < (chance + 0.1 * (first - chance) if "words" in name else 0.99 * chance)
    assert result["curve"]["step"] == [50, 100]


@EACH_TASK
def test_split_is_clean_and_the_same_at_every_call(name, monkeypatch):
    """Learning by heart would pass for learning, and two runs would differ in their data."""
    monkeypatch.setattr(data, "mnist", prototypes)
    points = TASKS[name].data(Path())
    assert all(torch.equal(a, b) for a, b in zip(points, TASKS[name].data(Path()), strict=True))
    if not points.inputs.dtype.is_floating_point:
        return  # short pieces of text come again
    training = {tuple(row) for row in points.inputs.flatten(1).tolist()}
    assert training.isdisjoint(tuple(row) for row in points.validation_inputs.flatten(1).tolist())


def test_validation_patches_show_no_pixel_that_trains():
    """Two patches of one roof are nearly one point."""
    height, width = 427 // data.BANDS, 640 // data.STRIPS
    edge = round(data.EDGE * width)
    assert edge - data.REGION > 0 and width - edge > data.REGION and height > data.REGION


def test_sequences_of_mnist_1d_are_those_of_the_paper():
    """Another data set of the same name could not be compared with what others report."""
    points = data.mnist_1d()
    everything = torch.cat([points.inputs, points.validation_inputs])
    assert everything.shape == (5000, 40)
    assert everything.mean() == pytest.approx(0, abs=1e-5) and everything.std() == pytest.approx(1, abs=1e-3)
    assert torch.cat([points.targets, points.validation_targets]).bincount().tolist() == [500] * 10


def test_pendulum_loses_energy_as_it_should():
    """A regression on a wrong integrator is noise."""
    fine, coarse = data.pendulum(steps=600), data.pendulum(steps=300)
    assert torch.allclose(fine.targets, coarse.targets, atol=1e-2)


def test_chance_is_the_loss_of_the_best_constant():
    """Cells that learnt nothing would pass for cells that did."""
    labels = torch.tensor([0, 0, 1])
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert suites.CLASSES.chance(labels) == pytest.approx(entropy)
    assert suites.CLASSES.loss(torch.tensor([2.0, 1.0]).log().expand(3, 2), labels) == pytest.approx(entropy)
    numbers = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    assert NUMBERS.chance(numbers) == 0.5 == NUMBERS.loss(numbers.mean(0).expand(2, 2), numbers)
    ignorant = numbers.mean(0).expand(2, 2), torch.zeros(2, 3), torch.zeros(2, 3)
    assert CODES.loss(ignorant, numbers) == pytest.approx(CODES.chance(numbers))


# --- Runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "optimizer"), [(n, o) for n, task in DEVELOPMENT.items() for o in task.bases])
def test_zero_policy_does_the_work_of_the_linear_schedule(task, optimizer):
    """Unequal work, weights or data between policies and baselines would make the comparison a lie."""
    led = perform(Job(Trial(task, optimizer, 4, "base-schedule", 0.1, 3), ZERO, "linear"))
    linear = perform(Job(Trial(task, optimizer, 4, "linear", 0.1, 3)))
    assert led["curve"] == linear["curve"] and led["loss"] == linear["loss"]
    assert led["interventions"] == []


def test_seed_decides_everything_but_the_method():
    """Methods would be compared on other weights, or noise of chance would be taken for a gain."""
    first, again = (perform(Job(Trial("patches-vae", "adam", 4, "cosine", 1.0, 0))) for _ in range(2))
    other = perform(Job(Trial("patches-vae", "adam", 4, "constant", 1.0, 0)))
    another = perform(Job(Trial("patches-vae", "adam", 4, "cosine", 1.0, 1)))
    assert first["curve"] == again["curve"] and first["first_loss"] == other["first_loss"] != another["first_loss"]


def test_validation_leaves_no_trace():
    """Runs that validate more often would see other noise, or go on without dropout."""
    task = TASKS["patches-vae"]
    network, points = task.network(), task.data(None)
    state = torch.random.get_rng_state()
    assert evaluate(network, task, points) == evaluate(network, task, points)
    assert torch.equal(state, torch.random.get_rng_state()) and network.training


def test_validation_losses_reach_a_policy_unless_they_are_to_be_left_out(monkeypatch):
    """An ablation would be the thing itself."""
    heard = []
    monkeypatch.setattr(ScheduledOptimizer, "observe_validation", lambda self, loss: heard.append(loss))
    result = perform(Job(Trial("wine-by-heart", "adam", 4, "policy", 1.0, 0), ZERO, "zero"))
    assert heard == pytest.approx(result["curve"]["loss"], rel=1e-4)
    heard.clear()
    perform(Job(Trial("wine-by-heart", "adam", 4, "policy", 1.0, 0, told=False), ZERO, "zero"))
    assert heard == []


def lrs(schedule, steps, step=lambda scheduler: scheduler.step()):
    """The learning rates of SGD from 2.0 under a schedule, at each step."""
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=2.0, momentum=0.9)
    scheduler, found = schedule(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        step(scheduler)
    return found


def test_schedules_are_those_of_torch():
    """A baseline whose schedule is off by one step or one factor is a straw man."""
    n, warm, cool = 40, 2, 8
    ours = {name: lrs(lambda o, name=name: SCHEDULES[name](o, n), n) for name in SCHEDULES}
    down = partial(LinearLR, start_factor=1.0, end_factor=0.0)
    up = partial(LinearLR, start_factor=0.01, end_factor=1.0, total_iters=warm)
    flat = partial(LinearLR, start_factor=1.0, end_factor=1.0, total_iters=1)
    assert ours["constant"] == [2.0] * n
    assert ours["linear"] == pytest.approx(lrs(lambda o: down(o, total_iters=n), n))
    assert ours["cosine"] == pytest.approx([1 + math.cos(math.pi * i / n) for i in range(n)])
    assert ours["warm-up-linear"] == pytest.approx(
        lrs(lambda o: SequentialLR(o, [up(o), down(o, total_iters=n - warm)], [warm]), n)
    )
    stages = lambda o: SequentialLR(o, [up(o), flat(o), down(o, total_iters=cool)], [warm, n - cool])  # noqa: E731
    assert ours["wsd"] == pytest.approx(lrs(stages, n))
    assert ours["one-cycle"] == pytest.approx(lrs(lambda o: OneCycleLR(o, 2.0, total_steps=n + 1), n))


def driven(name, base, steps, losses=None):
    """The learning rates of a baseline that hears a validation loss after each step."""
    parameter = nn.Parameter(torch.ones(2, 2))
    drive, found = BASELINES[name].drive(base, [parameter], 1.0, steps), []
    for i in range(steps):
        parameter.grad = torch.ones(2, 2)
        found.append(drive.step(torch.tensor(1.0)))
        drive.validated(losses[i] if losses else 1.0)
    return found


def test_recipes_follow_their_scripts():
    """A recipe that is worse than people's scripts makes everything beside it look good."""
    assert driven("recipe", ADADELTA, 40) == pytest.approx([lr / 2 for lr in lrs(lambda o: StepLR(o, 2, 0.7), 40)])
    falling = [3.0, 2.5, 2.6, 2.0] + [2.1] * 36  # two steps an epoch: told 2.5, 2.0, 2.1 …
    assert driven("recipe", plain(20.0), 40, falling)[:8] == [20.0] * 6 + [5.0] * 2
    warm = driven("recipe", ADAMW_GPT, 100)
    assert warm[0] == pytest.approx(1e-3 / 6) and warm[5] == pytest.approx(1e-3) == max(warm)


def test_plateau_is_that_of_torch():
    """The learning rate would be kept for ever, or cut at every evaluation."""
    told = iter([1.0] * 10)
    expected = lrs(lambda o: ReduceLROnPlateau(o, factor=0.3, patience=3), 10, lambda s: s.step(next(told)))
    assert driven("plateau", replace(SGD_MOMENTUM, lr=2.0), 10) == pytest.approx(expected)
    assert expected[-1] < expected[0]


@pytest.mark.parametrize("name", BASELINES)
def test_each_baseline_learns(name):
    """A baseline that stays near chance is a bug of the benchmark."""
    task, optimizer = ("patches-perceptron", "adadelta") if name == "recipe" else ("wine-by-heart", "adam")
    result = perform(Job(Trial(task, optimizer, 200, name, 1.0, 0)))
    assert result["loss"] < 0.8 * result["chance"]


def test_schedule_free_is_judged_at_its_average(monkeypatch):
    """Batch norm with the statistics of other weights would be near chance."""
    result = perform(Job(Trial("patches-resnet", "sgd", 60, "schedule-free", 0.1, 0)))
    assert result["loss"] < 0.9 * result["chance"]


def test_ignorant_policy_sees_what_is_not_known():
    """The observation that is left out would be told all the same."""
    policy = Ignorant(LIVELY, "validation_age")
    assert isinstance(policy, Policy) and policy.digest != LIVELY.digest
    seen = torch.rand(len(LIVELY.observations))
    place = LIVELY.observations.index("validation_age")
    unknown = seen.clone()
    unknown[place] = OBSERVATIONS["validation_age"].unknown
    assert torch.equal(policy.act(seen)[0], LIVELY.act(unknown)[0])
    assert not torch.equal(policy.act(seen)[0], LIVELY.act(seen)[0]) and seen[place] != unknown[place]


def test_each_ablation_runs_and_is_what_it_says(tiny, tmp_path):
    """What a part is worth would be told of a run that has it."""
    methods = ["policy", "base-schedule", "replay", "only-lr", "without-update_ratio"]
    plan = Plan("development", ["tiny"], 2, methods, base_lrs=(1.0,), sweep=(1.0,))
    run(plan, {"mine": LIVELY, "other": always(lr=0.5)}, tmp_path, 1)
    by = {
        (row["run"]["method"], row["policy"], row["run"]["optimizer"], row["run"]["seed"]): row
        for row in rows(tmp_path)
    }
    curves = {
        method: by[method, LIVELY.digest, "adam", 0]["curve"]["lr"] for method in methods if method != "base-schedule"
    }
    assert curves["policy"] not in (curves["only-lr"], curves["without-update_ratio"])
    linear = perform(Job(Trial("tiny", "adam", 6, "linear", 1.0, 0)))["curve"]["lr"]
    assert by["base-schedule", ZERO.digest, "adam", 0]["curve"]["lr"] == linear
    assert sum(method == "base-schedule" for method, *_ in by) == 4, "both policies stand on one base schedule"
    fixed = always(lr=0.5).digest  # does the same in all runs, so that a replay does as well
    replayed, followed = (by[method, fixed, "adam", 0]["curve"]["lr"] for method in ("replay", "policy"))
    assert replayed == pytest.approx(followed, rel=1e-2)


def test_plan_keeps_to_what_a_recipe_can_be_wrong_by():
    """Nobody gives a language model a hundred times its learning rate, and a sixth value would cost a sixth more."""
    jobs = list(Plan("development", seeds=1).jobs({"mine": LIVELY}))
    tried = {}
    for job in jobs:
        tried.setdefault((job.trial.cell, job.trial.method), []).append(job.trial.lr_factor)
    for (cell, method), factors in tried.items():
        base = DEVELOPMENT[cell.task].bases[cell.optimizer]
        if method == "cosine":
            assert len(factors) == 6 and 1.0 in factors
            assert all(b / a == pytest.approx(10**0.5, rel=0.01) for a, b in pairwise(factors))
        else:
            assert factors == [0.1, 1.0, 10.0] if base.reach == 10 else len(factors) == 5
    assert {cell for cell, _ in tried} == {cell for name in DEVELOPMENT for cell in cells(name)}


def test_interrupted_benchmark_goes_on(tiny, tmp_path, monkeypatch):
    """An hour would be lost to Ctrl-C; a policy that comes later would have everything done again."""
    plan = Plan("development", ["tiny"], 1, base_lrs=(1.0,), sweep=(0.1, 1.0))
    done, real = [], runs.perform

    def interrupted(job):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(job)
        return real(job)

    monkeypatch.setattr(runs, "perform", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(plan, {"zero": ZERO}, tmp_path, 1)
    assert len(rows(tmp_path)) == 3
    monkeypatch.setattr(runs, "perform", real)
    run(plan, {"zero": ZERO}, tmp_path, 1)
    assert len(rows(tmp_path)) == 6 == len(read(tmp_path / RUNS, key))
    run(plan, {"zero": ZERO, "mine": LIVELY}, tmp_path, 1)
    assert [row["run"]["method"] for row in rows(tmp_path)[6:]] == ["policy"] * 2
    assert rows(tmp_path)[-1]["policy_name"] == "mine"


def test_job_reaches_another_process_whole():
    """A table would depend on how many processes it was made with."""
    job = Job(Trial("wine-by-heart", "adam", 6, "policy", 1.0, 0), LIVELY, "mine")
    first, again = perform(job), perform(pickle.loads(pickle.dumps(job)))
    assert first["curve"] == again["curve"] and first["policy"] == again["policy"] == LIVELY.digest


def test_guard_says_nothing_to_the_terminal(tiny, tmp_path, capfd):
    """A progress bar would be torn to pieces by what the table tells anyway."""
    run(Plan("development", ["tiny"], 1, base_lrs=(1e4,), sweep=(1.0,)), {"mine": LIVELY}, tmp_path, 1)
    assert "rlsched" not in "".join(capfd.readouterr())


# --- Results ----------------------------------------------------------------------------------------------------------


def made(out, entries):
    """A file of these (method, digest, factor, seed, loss), on one cell of classification that begins at 2.0."""
    lines = []
    for method, digest, factor, seed, loss in entries:
        trial = {
            "task": "wine-by-heart",
            "optimizer": "adam",
            "steps": 4,
            "method": method,
            "lr_factor": factor,
            "seed": seed,
        }
        curve = {"step": [2, 4], "loss": [1.5, loss], "accuracy": [0.1, 0.5], "lr": [0.1, 0.05]}
        row = {"run": trial, "policy": digest, "policy_name": digest, "loss": loss, "first_loss": 2.0, "chance": 1.9}
        lines.append(json.dumps({**row, "accuracy": 0.5 if loss else 0.1, "seconds": 1.0, "curve": curve}))
    out.mkdir(exist_ok=True)
    (out / RUNS).write_text("\n".join(lines) + "\n")
    return Results(out)


TWO_SEEDS = [("cosine", None, f, s, loss) for (f, loss), s in product(((0.1, 1.0), (1.0, 0.5)), (0, 1))]


def test_score_from_closed_form(tmp_path):
    """A figure that is quoted would be another's."""
    policy = [("policy", "p", 1.0, 0, 0.25), ("policy", "p", 1.0, 1, None), ("policy", "p", 0.1, 0, 0.5)]
    results = made(tmp_path, [*TWO_SEEDS, *policy])
    mine = Contender("policy", "p")
    (cell,) = results.runs
    score = results.score(Condition(mine, 1.0))
    ratios = [math.log(0.25 / 0.5), math.log(2.0 / 0.5)]  # a run without a number counts as the untrained network
    assert results.ratios(cell, Condition(mine, 1.0)) == pytest.approx(ratios)
    assert score.ratio.value == pytest.approx(sum(ratios) / 2) and score.ratio.low == pytest.approx(ratios[0])
    assert (score.diverged, score.runs, score.cells, score.improvement) == (1, 2, 1, 0.5)
    assert score.worst == (pytest.approx(sum(ratios) / 2), cell) and score.accuracy == pytest.approx(-20)
    untuned = results.score(Condition(REFERENCE, 1.0))
    assert results.best(cell, REFERENCE) == 1.0 and untuned.ratio.value == 0 and untuned.speed_up == 1
    assert results.score(Condition(REFERENCE, TUNED)).improvement == 0.5
    assert results.at_the_edge() == [cell] and results.not_learnt() == []


def test_learning_rate_that_is_meant_to_be_wrong_tunes_nothing(tmp_path):
    """The reference would be the better for what was run to show how bad it can be, and every figure another one."""
    untuned = [("cosine", None, f, s, loss) for (f, loss), s in product(((0.01, 0.1), (100.0, None)), (0, 1))]
    results = made(tmp_path, [*TWO_SEEDS, *untuned, ("cosine", None, 10.0, 0, 0.7)])
    (cell,) = results.runs
    assert results.best(cell, REFERENCE) == 1.0 and results.tried(cell, REFERENCE) == [0.1, 1.0, 10.0]
    assert [c.factor for c in results.conditions(REFERENCE)][1:] == [0.01, 0.1, 1.0, 10.0, 100.0]
    assert results.score(Condition(REFERENCE, 0.01)).ratio.value == pytest.approx(math.log(0.1 / 0.5))
    assert results.score(Condition(REFERENCE, 100.0)).diverged == 2
    assert results.at_the_edge() == []


def test_plan_has_baselines_from_wrong_learning_rates(tiny):
    """A picture of what a wrong learning rate costs would have points in it that are of some tasks alone."""
    plan = Plan("development", ["tiny"], 1, ["prodigy"], untuned=True)
    tried = {(job.trial.optimizer, job.trial.method): [] for job in plan.jobs({})}
    for job in plan.jobs({}):
        tried[job.trial.optimizer, job.trial.method].append(job.trial.lr_factor)
    assert set(tried) == {("adam", "cosine"), ("adam", "prodigy"), ("plain", "cosine")}
    assert sorted(tried["adam", "cosine"]) == [0.01, 0.1, 0.316, 1.0, 3.16, 10.0, 31.6, 100.0]
    assert sorted(tried["plain", "cosine"]) == [0.01, 0.0316, 0.1, 0.316, 1.0, 3.16, 10.0]


def test_cell_that_did_not_learn_is_named(tmp_path):
    """A difference between two failures would count as one between methods."""
    results = made(tmp_path, [("cosine", None, 1.0, 0, 1.95)])
    assert results.not_learnt() == list(results.runs)


def test_policies_are_compared_in_pairs(tmp_path):
    """Policies would be chosen by the noise of the tasks."""
    entries = [
        ("policy", p, f, s, loss * (1 + s)) for (p, loss), f, s in product((("p", 0.2), ("q", 0.4)), (0.1, 1.0), (0, 1))
    ]
    made(tmp_path, [*TWO_SEEDS, *entries])
    results = Results(tmp_path)
    p, q = results.policies()
    count, difference = results.difference(p, q, [0.1, 1.0])
    assert (count, difference.value) == (1, pytest.approx(math.log(0.5)))
    text = report(tmp_path)
    assert "| policy p (p) − policy q (q) | mean of them | 1 | −0.693 |" in text


def test_report_is_made_of_the_file_alone(tiny, tmp_path, capsys):
    """A table could not be made again from what is published."""
    plan = Plan("development", ["tiny"], 1, ["all"], base_lrs=(1.0,), sweep=(0.1, 1.0))
    run(plan, {"mine": LIVELY}, tmp_path, 1)
    text = report(tmp_path)
    for name in (TABLE, BASE_LR, PROFILE, "lr.png", TENSORBOARD):
        assert (tmp_path / name).exists()
    methods = [line.split(" | ")[0].strip("| *") for line in text.split("\n\n")[0].splitlines()[2:]]
    assert methods[0] == "policy" and set(methods) == {"policy", *(method.title for method in BASELINES.values())}
    assert "| cosine | best of 2 | 2 | +0.000 |" in text and "the edge of the sweep: 2 cells" in text
    for cell in ("tiny-adam-6", "tiny-plain-6"):
        shown = [path.parent.name for path in (tmp_path / TENSORBOARD / cell).rglob("events*")]
        assert len(set(shown)) == len(shown) and {"policy-x1", "cosine-x1"} <= set(shown)


def test_stratified_bootstrap_from_closed_form():
    """An interval that is too narrow makes chance a finding."""
    estimate = statistics.stratified([[0.0, 1.0]])
    assert estimate == (0.5, 0.0, 1.0), "a quarter of the resamples are both low, and a quarter both high"
    many = statistics.stratified([[0.0, 1.0]] * 100)  # the mean of 50 of 100 medians, each of variance 1/8
    assert many.value == 0.5 and 0.05 < many.high - many.low < 0.4
    certain = statistics.stratified([[1.0, 1.0], [2.0, 2.0]])
    assert certain == (1.5, 1.5, 1.5)
    assert statistics.stratified([[1.0], [2.0]]).value == 1.5 and math.isnan(statistics.stratified([[1.0]]).low)


def test_interquartile_mean_is_of_the_middle_half():
    """One cell of forty would decide."""
    assert statistics.interquartile_mean([1e9, 1.0, 2.0, -1e9]) == 1.5
    assert statistics.paired([1.0, 1.0, 1.0, 1.0]) == (1.0, 1.0, 1.0)
    low, high = statistics.paired([-1.0, 1.0] * 8)[1:]
    assert low < 0 < high


def test_probability_of_improvement_counts_pairs():
    """Ties would count as wins."""
    assert statistics.probability_of_improvement([1.0, 3.0], [2.0, 3.0]) == (1 + 1 + 0 + 0.5) / 4


@pytest.mark.parametrize(
    ("losses", "reference", "expected"),
    [
        ([4, 2, 1, 1], [4, 3, 2.5, 2], 2.0),  # there after half of the steps
        ([1, 1, 1, 1], [4, 3, 2, 1], 4.0),
        ([0.5] * 4, [4, 3, 2, 1], 4.0),
        ([4, 3, 2, 1], [4, 3, 2, 1], 1.0),
        ([4, 4, 3, 2.5], [4, 3, 2.4, 2], 0.75),  # the reference was there after three quarters
        ([math.nan] * 4, [4, 3, 2, 1], 0.25),
        ([9, 9, 9, 9], [4, 3, 2, 1], 0.25),
    ],
)
def test_speed_up_from_closed_form(losses, reference, expected):
    """A run that is late would pass for one that is early."""
    assert statistics.speed_up([1, 2, 3, 4], losses, reference) == expected


def test_profile_from_closed_form():
    """A method that is best nowhere would lead, and one would lose in cells that it was not run in."""
    part = statistics.profile([[1.0, 3.0, 1.0], [2.0, 2.0, math.nan]], [1.0, 1.5, 2.0])
    assert part.tolist() == [[2 / 3, 1.0, 1.0], [1 / 2, 1 / 2, 1.0]]


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suite": "train"}, r"suite must be one of \['development', 'plateaus', 'test'\], got 'train'"),
        ({"tasks": ["mnist-cnn"]}, "tasks must be some of .*'wine-by-heart'.*, got .'mnist-cnn"),
        ({"tasks": []}, "tasks must be some of"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"methods": ["cosin"]}, "methods must be some of .*'cosine'.*, got .'cosin'"),
        ({"methods": []}, "methods must be some of .*, got none"),
        ({"base_lrs": (0.0,)}, "base_lrs must be positive and finite factors, got .0.0"),
        ({"sweep": ()}, r"sweep must be positive and finite factors, got \[\]"),
        ({"suite": "test", "tasks": ["mnist-cnn"]}, "task mnist-cnn: it needs --data FOLDER"),
        ({"suite": "test", "data": Path("nowhere")}, "task mnist-perceptron: --data: .*nowhere"),
    ],
)
def test_wrong_plan_is_refused(options, message):
    """A typing mistake should not cost more than a second."""
    with pytest.raises(ValueError, match=message):
        Plan(**{"suite": "development", **options})


def test_what_is_not_there_is_skipped_and_said(monkeypatch):
    """Whoever has no MNIST could run nothing at all."""
    monkeypatch.setitem(BASELINES, "prodigy", replace(BASELINES["prodigy"], package="no_such_package"))
    plan = Plan("test", methods=["all"])
    assert set(plan.skipped) == {"mnist-perceptron", "mnist-cnn", "prodigy"}
    assert "needs --data" in plan.skipped["mnist-cnn"] and "no_such_package" in plan.skipped["prodigy"]
    assert {job.trial.method for job in plan.jobs({"mine": LIVELY})} == {"policy", *BASELINES} - {"prodigy"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "only-lrr"], r"methods must be some of a policy's, .*'only-lr'.*, got \['only-lrr'\]"),
        (["--policy", "nothing"], "'nothing' is neither"),
        (["--processes", "0"], "processes must be at least 1, got 0"),
        (["--tasks", "wine"], "tasks must be some of"),
    ],
)
def test_wrong_option_is_one_clear_line(arguments, message, tmp_path, capsys, tiny):
    """A traceback hides which option was wrong."""
    command = ["benchmark", "--suite", "development", "--tasks", "tiny", "--processes", "1", "--out", str(tmp_path)]
    assert main([*command, *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_exported_policy_is_measured_as_any_other(tiny, tmp_path, capsys):
    """What a compressed policy loses could not be told on the suite by which policies are chosen."""
    pytest.importorskip("onnxruntime")
    file = FORMATS["onnx"].save(LIVELY, tmp_path / "small.onnx")
    command = ["benchmark", "--suite", "development", "--tasks", "tiny", "--seeds", "1", "--processes", "1"]
    assert main([*command, "--base-lrs", "1", "--policy", str(file), "--out", str(tmp_path / "out")]) == 0
    led = [row for row in rows(tmp_path / "out") if row["policy"]]
    assert {(row["policy_name"], row["policy"]) for row in led} == {("small", LIVELY.digest)}
    with_torch = perform(Job(Trial(**led[0]["run"]), LIVELY))
    assert led[0]["loss"] == pytest.approx(with_torch["loss"], rel=1e-4)


def test_command_measures_and_says_where_it_is(tiny, tmp_path, capsys):
    """The verb is what policies are chosen by."""
    command = ["benchmark", "--suite", "development", "--tasks", "tiny", "--seeds", "1", "--processes", "1"]
    assert main([*command, "--base-lrs", "1", "--no-validation", "--ablations", "only-lr", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "policy, not told of validation" in printed and "lr alone, not told" in printed and str(tmp_path) in printed
    assert ablations(SchedulePolicy.load("default"))[:3] == ["base-schedule", "replay", "only-lr"]
