"""The recipes: training scripts by hand, and with rlsched in them."""

import json
from dataclasses import replace

import pytest
import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from rlsched.experiments import text
from rlsched.experiments.journal import read
from rlsched.experiments.recipes import analysis, data
from rlsched.experiments.recipes import run as runs
from rlsched.experiments.recipes.__main__ import main
from rlsched.experiments.recipes.recipes import RECIPES
from rlsched.experiments.recipes.run import BY_HAND, RUNS, WRAPPED, Plan, Trial, perform, train
from rlsched.experiments.table import TABLE

EACH_RECIPE = pytest.mark.parametrize("name", RECIPES)
FIRST = next(iter(RECIPES))


@EACH_RECIPE
def test_wrapped_run_is_the_script_but_for_the_schedule(name):
    """A script that draws other batches, clips elsewhere or takes another number of steps would be judged instead."""
    steps = 5
    linear = replace(
        RECIPES[name], steps=steps, epoch=1, schedule=lambda o: LambdaLR(o, lambda n: 1 - min(n, steps - 1) / steps)
    )
    results = []
    for options in (None, {"controls": ()}):
        torch.manual_seed(0)
        results.append(train(linear, linear.lr, options))
    by_hand, wrapped = results
    said = [message for _, message in wrapped.pop("interventions")]
    assert all(message.startswith("losses are quotients") for message in said), "that of the loss is all"
    assert by_hand.pop("interventions") == [] and by_hand["loss"] > 0 and by_hand == wrapped
    assert len(results[0]["curve"]) == steps + linear.takes_one_more


@EACH_RECIPE
def test_policy_takes_part_in_a_wrapped_run(name):
    """A wrapper that is not in force would never be worse than the script, nor better."""
    few = replace(RECIPES[name], steps=5, takes_one_more=False, schedule=None)
    torch.manual_seed(0)
    result = train(few, few.lr, {})
    assert result["loss"] > 0 and len({lr for _, _, lr in result["curve"]}) == 5


@EACH_RECIPE
def test_validation_leaves_no_trace(name):
    """Runs that validate more often would see other batches, or go on without dropout."""
    torch.manual_seed(0)
    problem = RECIPES[name].problem()
    state = torch.random.get_rng_state()
    assert problem.validation_loss() == problem.validation_loss()
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(module.training for module in problem.model.modules())


def test_schedules_of_the_scripts():
    """A recipe that is worse by hand than people's scripts makes the wrapper look good."""
    optimizer = RECIPES["gpt"].optimizer(RECIPES["gpt"].problem().model, 1.0)
    assert isinstance(optimizer, AdamW) and [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    assert all(p.ndim == 2 for p in optimizer.param_groups[0]["params"])
    factor = RECIPES["gpt"].schedule(optimizer).lr_lambdas[0]
    assert factor(0) == pytest.approx(1 / 26) and factor(25) == 1 and factor(500) == pytest.approx(0.1)
    problem = RECIPES["lstm"].problem()
    optimizer = RECIPES["lstm"].optimizer(problem.model, 1.0)
    plateau = RECIPES["lstm"].schedule(optimizer)
    for loss in (3.0, 2.0, 2.1, 1.9):
        plateau.step(loss)
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert len(list(problem._losses(problem.training))) == RECIPES["lstm"].epoch


def test_plateau_is_told_the_validation_loss(monkeypatch):
    """The learning rate would be kept for ever, or cut at every epoch."""
    recipe = replace(RECIPES["lstm"], steps=4, epoch=2)
    problem = recipe.problem()
    monkeypatch.setattr(problem, "validation_loss", iter([2.0, 2.0, 2.0]).__next__)
    result = train(replace(recipe, problem=lambda: problem), 1.0)
    assert [lr for _, _, lr in result["curve"]] == [1.0] * 4
    monkeypatch.setattr(problem, "validation_loss", iter([2.0, 2.0, 2.0, 2.0]).__next__)
    result = train(replace(recipe, problem=lambda: problem, steps=6), 1.0)
    assert [lr for _, _, lr in result["curve"]] == [1.0] * 4 + [0.25] * 2


def test_validation_data_are_not_trained_on():
    """Learning by heart would pass for learning."""
    training, validation = text.reference()
    assert not set(training.split("\n\n")) & set(validation.split("\n\n"))
    images, _, others, _ = data.digits()
    assert len(images) + len(others) == 1797 and len(data.noisy_validation_digits()[0]) == 5 * len(others)


def test_a_tenth_of_sorted_sequences_is_wrong():
    """A loss near zero makes nonsense of a percentage."""
    inputs, targets = data.sequences(2000, 10, 10, 0.1, torch.Generator().manual_seed(0))
    wrong = (inputs.sort(-1).values != targets).float().mean()
    assert wrong == pytest.approx(0.1 * 9 / 10, abs=0.01)


def test_command_keeps_what_is_there_and_shows_all_options(tmp_path, monkeypatch, capsys):
    """Half an hour would be lost to Ctrl-C, or two settings taken for one."""
    monkeypatch.setitem(RECIPES, "sorting", replace(RECIPES["sorting"], steps=2))
    command = ["--recipes", "sorting", "--seeds", "1", "--processes", "1", "--out", str(tmp_path)]
    assert main([*command, "--base-lrs", "10"]) == 0
    rows = [json.loads(line)["run"] for line in (tmp_path / RUNS).read_text().splitlines()]
    assert [(row["way"], row["lr_factor"]) for row in rows] == [(BY_HAND, 1.0), (BY_HAND, 10.0), (WRAPPED, 10.0)]
    assert main([*command, "--base-lrs", "10", "--option", "on_divergence=rollback", "--option", "decisions=2"]) == 0
    rows = [json.loads(line)["run"] for line in (tmp_path / RUNS).read_text().splitlines()]
    assert len(rows) == 4 and json.loads(rows[-1]["options"]) == {"on_divergence": "rollback", "decisions": 2}
    text = (tmp_path / TABLE).read_text()
    assert "wrapped, lr × 10" in text and "wrapped with decisions=2, on_divergence='rollback', lr × 10" in text
    assert text.strip() in capsys.readouterr().out
    monkeypatch.setattr(runs, "perform", None)
    assert main([*command, "--base-lrs", "10"]) == 0


def test_processes_give_the_results_of_one(tmp_path):
    """A table would depend on how many cores it was made with."""
    plan = Plan(("vae",), seeds=1, lr_factors=(1.0,))
    runs.run(plan, tmp_path)
    rows = read(tmp_path / RUNS, runs.key)
    assert set(rows) == set(plan.trials())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = perform(Trial("vae", BY_HAND, 1.0, 0))
    finally:
        torch.set_num_threads(threads)
    assert rows[Trial("vae", BY_HAND, 1.0, 0)]["curve"] == alone["curve"]
    losses = [rows[trial]["loss"] for trial in rows]
    assert all(loss < 30 for loss in losses)  # of a prior that ignores the image: above 30


def rows_of(*entries):
    """Rows of these (recipe, way, factor on the lr, seed, loss, number of interventions)."""
    facts = {
        "a": {"title": "A", "optimizer": "SGD", "lr": 20.0, "clip": 0.25},
        "b": {"title": "B", "optimizer": "Adam", "lr": 1e-3, "clip": None},
    }
    return {
        Trial(recipe, way, factor, seed): {"recipe": facts[recipe], "loss": loss, "interventions": [[1, ""]] * number}
        for recipe, way, factor, seed, loss, number in entries
    }


ROWS = rows_of(
    ("a", BY_HAND, 1.0, 0, 2.0, 0),
    ("a", BY_HAND, 1.0, 1, 4.0, 0),
    ("a", BY_HAND, 10.0, 0, None, 0),
    ("a", BY_HAND, 10.0, 1, 5.0, 0),
    ("a", WRAPPED, 1.0, 0, 3.0, 1),
    ("a", WRAPPED, 1.0, 1, 3.0, 2),
    ("a", WRAPPED, 10.0, 0, 3.1, 0),
    ("a", WRAPPED, 10.0, 1, 4.2, 1),
    ("b", BY_HAND, 1.0, 0, 1.0, 0),
    ("b", WRAPPED, 1.0, 0, None, 3),
)


def test_table_from_closed_form():
    """A reader would see another run's excess, or a mean over runs of which one was ruined."""
    head, _, a, b, *caption = analysis.table(ROWS).splitlines()
    hand, wrapped = ("by hand, lr × 1 | by hand, lr × 10", "wrapped, lr × 1 | wrapped, lr × 10")
    assert head == f"| recipe | optimizer | {hand} | {wrapped} |"
    assert a == "| A | SGD, lr 20, clip 0.25 | 3 | not finite | 3 (+12%, 1.5) | 3.65 (+30%, 0.5) |"
    assert b == "| B | Adam, lr 0.001 | 1 |  | not finite (–, 3) |  |"
    assert "mean over 2 seeds" in " ".join(caption)


def test_verdict_from_closed_form():
    """A wreck would pass for a run that is a little worse, or hide behind the other seeds."""
    wrecked, worse = analysis.verdict(ROWS).splitlines()
    assert wrecked.endswith(": 2 of 5 runs: A × 10, seed 0 (+55%); B × 1, seed 0 (–)")
    assert worse.endswith(": 1 of 5 runs: A × 1, seed 0 (+50%)")
    assert (
        analysis.verdict({t: row for t, row in ROWS.items() if t.seed == 1}).splitlines()[0].endswith(": 0 of 2 runs")
    )


def test_excess_is_told_as_far_as_it_says_something():
    """A table would be as wide as the loss of a ruined run has digits."""
    rows = rows_of(("b", BY_HAND, 1.0, 0, 2.0, 0), ("b", WRAPPED, 1.0, 0, 2e9, 0), ("b", WRAPPED, 0.1, 0, 1.9, 0))
    assert "| 1.9 (−5%, 0) | 2e+09 (over 1000%, 0) |" in analysis.table(rows)


def test_run_without_its_recipe_is_not_judged():
    """A table of an interrupted study would be a traceback."""
    rows = rows_of(("a", WRAPPED, 1.0, 0, 3.0, 1))
    assert "| 3 (–, 1) |" in analysis.table(rows) and "0 of 1 runs" in analysis.verdict(rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipes": ("LSTM",)}, "recipes must be some of .*'lstm-clipped'.*, got"),
        ({"recipes": ()}, "recipes must be some of"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"lr_factors": (0.0,)}, "base learning rates must be .*, got .0.0"),
        ({"lr_factors": (float("nan"),)}, "base learning rates must be .*, got .nan"),
        ({"options": {"on_divergance": "cut"}}, "options must be some of .*'on_divergence'.*, got .'on_divergance"),
        ({"options": {"total_steps": 5}}, "options must be some of"),
        ({"options": {"on_divergence": "wait"}}, "on_divergence must be"),
    ],
)
def test_wrong_plan_is_refused(options, message):
    """A typing mistake should not cost more than a second."""
    with pytest.raises(ValueError, match=message):
        Plan(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--recipes", "LSTM"], "recipes must be"), (["--processes", "0"], "processes must be at least 1, got 0")],
)
def test_wrong_option_is_one_clear_line(arguments, message, tmp_path, capsys):
    """A traceback hides which option was wrong."""
    assert main([*arguments, "--out", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_option_without_a_value_is_refused(capsys):
    """It would be a name that the wrapper never heard of."""
    with pytest.raises(SystemExit):
        main(["--option", "shadow"])
    assert "must be NAME=VALUE, got 'shadow'" in capsys.readouterr().err
