"""A study of trainings: what it searches, that nothing of it is lost, and that its best is what it says."""

import errno
import json
import multiprocessing
import os
import signal
import time
from itertools import product
from math import log
from pathlib import Path

import pytest
from optuna.trial import TrialState

from rlsched.agents import TrainConfig, train
from rlsched.agents.ppo import POLICY
from rlsched.cli import main
from rlsched.envs import SetupDistribution
from rlsched.envs.mixtures import classifier
from rlsched.envs.sources import TeacherStudent
from rlsched.experiments.tune import workers
from rlsched.experiments.tune.analysis import FRESH, Report
from rlsched.experiments.tune.run import tune
from rlsched.experiments.tune.space import DEFAULT, Space, read_space
from rlsched.experiments.tune.study import JOURNAL, Plan, Study
from rlsched.files import locked
from rlsched.policy import SchedulePolicy

SOURCE = TeacherStudent(inputs=6, classes=3, points=(32, 64), validation_points=16)
SETUP = SetupDistribution(decisions=(3, 5))
TASK = classifier(SOURCE, (4,), batch_size=8, interval=2, setup=SETUP)

COMMON = {
    "tasks": f"{__name__}:TASK",
    "timesteps": 96,  # three updates
    "num_envs": 4,
    "n_steps": 8,
    "batch_size": 16,
    "n_epochs": 1,
    "hidden": (4,),
    "eval_episodes": 3,
    "processes": 1,
}
LEARNING_RATE = {"low": 1e-4, "high": 1e-2, "log": True}
WIDTHS = {"choices": [[4], [5], [6]]}
SEARCHED = {"learning_rate": LEARNING_RATE, "hidden": WIDTHS}


def make_plan(searched=None, config=None, **options):
    """A plan of trials that take no time."""
    return Plan(TrainConfig(**{**COMMON, **(config or {})}), Space({}, searched or SEARCHED), **options)


def regret(config):
    """A made-up one, whose minimum is known."""
    return abs(log(config.learning_rate / 1e-3)) + config.hidden[0] / 10


def drive(study, most=10**6):
    """Do up to so many trials without a training."""
    while most > 0 and (number := study.begin()) is not None:
        config = study.config(number)
        study.done(number, {"regret": regret(config), "return": -regret(config)})
        most -= 1


def states(study):
    """How each trial ended."""
    return [trial.state.name for trial in study.trials]


@pytest.fixture
def forked(monkeypatch):
    """Workers begin as copies of this process: at once, and with what is patched here."""
    monkeypatch.setattr(workers, "START", "fork")


@pytest.fixture
def pretended(forked, monkeypatch):
    """Trainings that take no time: `pretended(so)` has `so(config)` called in the midst of each."""

    def pretend(so=lambda config: None):
        def training(config, *, on_evaluation, show):
            on_evaluation(0, {"regret": 9.0, "return": 0.0})
            so(config)
            scores = {"regret": regret(config), "return": 0.0}
            on_evaluation(config.timesteps, scores)
            policy = SchedulePolicy.zero()
            policy.info = {"evaluation": scores}
            policy.save(Path(config.run_dir) / POLICY)
            return policy

        monkeypatch.setattr("rlsched.agents.ppo.train", training)

    monkeypatch.setattr("rlsched.experiments.tune.run._play_again", lambda *_: None)
    return pretend


# --- With real trainings ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("forked")
def test_tune_and_train_work_on_each_others_output(tmp_path, capsys, monkeypatch):
    """The best settings are worth something if whoever trains with them gets the policy that was found."""
    space, out = tmp_path / "space.toml", tmp_path / "study"
    text = [
        f"{name} = {json.dumps(value)}" for name, value in COMMON.items() if name != "processes" and name != "hidden"
    ]
    space.write_text("\n".join([*text, "learning_rate = { low = 1e-4, high = 1e-2, log = true }", "hidden = [4]"]))
    command = ["tune", "--space", str(space), "--preset", "default", "--pruner", "none", "--best", "1"]
    command += ["--trials", "2", "--out", str(out)]
    assert main(command) == 0
    printed, said = capsys.readouterr()
    assert "2 trials: 2 trained to the end" in printed and f"rlsched train --preset {out / 'best.toml'}" in printed
    assert "trial 0: regret " in said and "trial 1: regret " in said
    for name in ("best.toml", "table.md", "history.png", "settings.png"):
        assert str(out / name) in printed and (out / name).exists()
    best = int(printed.splitlines()[3].split()[0])

    assert (
        main(["train", "--preset", str(out / "best.toml"), "--run-dir", str(tmp_path / "run"), "--processes", "1"]) == 0
    )
    again, found = (SchedulePolicy.load(p / POLICY) for p in (tmp_path / "run", out / "trials" / f"{best:04}"))
    assert again.digest == found.digest
    capsys.readouterr()

    monkeypatch.setattr(workers.Workers, "begin", None)  # nothing is left to be trained
    assert main(command) == 0
    assert capsys.readouterr().out == printed
    assert main([*command, "--objective", "return"]) == 1
    assert "holds another study: --objective (there 'regret', now 'return')." in capsys.readouterr().err


@pytest.mark.usefixtures("forked")
def test_killed_worker_costs_no_more_than_the_update(tmp_path, monkeypatch, capsys):
    """The system kills what takes too much memory; hours of the other trials must not go with it, nor of this one."""
    steps = tmp_path / "steps"

    def killed_once(config, *, on_evaluation, show):
        def evaluated(timesteps, scores):
            with steps.open("a") as file:
                file.write(f"{timesteps}\n")
            on_evaluation(timesteps, scores)
            if timesteps == 32 and steps.read_text() == "0\n32\n":
                os.kill(os.getpid(), signal.SIGKILL)

        return train(config, on_evaluation=evaluated, show=show)

    monkeypatch.setattr("rlsched.agents.ppo.train", killed_once)
    report = tune(make_plan(trials=1), tmp_path / "study", 1)
    assert steps.read_text().split() == ["0", "32", "32", "64", "96"]
    assert states(report.study) == ["COMPLETE"]
    said = capsys.readouterr().err
    assert "trial 0: its process died with the exit code -9; another one goes on from the checkpoint" in said
    trial = report.study.trials[0]
    assert trial.value == SchedulePolicy.load(report.study.folder(0) / POLICY).info["evaluation"]["regret"]
    assert list(trial.intermediate_values) == [0, 32, 64, 96]


# --- What happens to trials, with trainings that are made up ----------------------------------------------------------


def test_killed_command_leaves_nobody_behind_and_its_trials_are_taken_up(pretended, tmp_path, capsys):
    """A training that went on alone would hold its folder against the command that takes it up, for hours."""
    plan, out, pids = make_plan(trials=3), tmp_path / "study", tmp_path / "pids"

    def sleep(config):
        with pids.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(100)

    pretended(sleep)
    command = multiprocessing.get_context("fork").Process(target=tune, args=(plan, out, 2))
    command.start()
    wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    command.kill()
    command.join()
    wait_until(lambda: not any(map(is_running, pids.read_text().split())))
    with locked(out):
        before = [dict(trial.params) for trial in Study(plan, out).trials]
    pretended()
    study = tune(plan, out, 2).study
    assert "2 trials were interrupted, and go on from their checkpoints" in capsys.readouterr().err
    assert states(study) == ["COMPLETE"] * 3
    assert [trial.params for trial in study.trials[:2]] == before and all(before)


def is_running(pid):
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(what):
    """Come back when it is so."""
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_training_that_fails_costs_its_trial_alone(pretended, tmp_path, capsys):
    """One bad combination would end a study of a night in its first hour."""

    def fail(config):
        if config.hidden == (5,):
            raise RuntimeError("no such\nluck")

    pretended(fail)
    # The 4 × 8 timesteps of a rollout are fewer than a mini-batch of 64.
    searched = {"hidden": {"choices": [[4], [5]]}, "num_envs": {"choices": [4, 8]}, "batch_size": {"choices": [16, 64]}}
    report = tune(make_plan(searched, {"num_envs": 8}, sampler="grid"), tmp_path / "study", 2)
    names = list(searched)
    fates = {tuple(trial.params[name] for name in names): trial.state.name for trial in report.study.trials}
    expected = {
        (hidden, envs, batch): "FAIL" if hidden == "[5]" or (envs, batch) == (4, 64) else "COMPLETE"
        for hidden, envs, batch in product(("[4]", "[5]"), (4, 8), (16, 64))
    }
    assert fates == expected
    said = capsys.readouterr().err
    assert "failed, RuntimeError: no such luck (hidden [5], num_envs 4, batch_size 16)" in said
    assert "failed, ValueError: batch_size must be at most num_envs × n_steps = 32, got 64" in said
    assert "failed: RuntimeError: no such luck" in (tmp_path / "study" / "table.md").read_text()
    (number,) = (t.number for t in report.study.trials if tuple(t.params.values()) == ("[5]", 8, 64))
    assert "Traceback" in (report.study.folder(number) / "error.txt").read_text()


def test_full_disk_ends_the_study_and_no_trial(pretended, tmp_path):
    """Each trial after it would fail too, and all would have to be told from those that failed by their own fault."""

    def fill(config):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "there")

    pretended(fill)
    plan = make_plan(trials=2)
    with pytest.raises(OSError, match="No space left on device: 'there'"):
        tune(plan, tmp_path, 1)
    with locked(tmp_path):
        assert states(Study(plan, tmp_path)) == ["RUNNING"]
    pretended()
    assert states(tune(plan, tmp_path, 1).study) == ["COMPLETE"] * 2


def test_trial_whose_processes_die_again_and_again_is_given_up(pretended, tmp_path):
    """What needs more memory than there is would be begun anew for ever."""

    def die(config):
        if "0001" in config.run_dir:
            os.kill(os.getpid(), signal.SIGKILL)

    pretended(die)
    study = tune(make_plan(trials=3), tmp_path, 1).study
    assert states(study) == ["COMPLETE", "FAIL", "COMPLETE"]
    assert study.trials[1].user_attrs["error"] == "3 processes died of it, the last one with the exit code -9"


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_study_that_was_interrupted_is_the_one_that_never_was(sampler, tmp_path):
    """A sampler that begins anew with its seed tries what it has tried, for as many trials as there were before."""
    plan, (whole, parts) = make_plan(trials=14, sampler=sampler), (tmp_path / "whole", tmp_path / "parts")
    found = {}
    for out, most in ((whole, 14), (parts, 1)):
        for _ in range(0, 14, most):
            with locked(out):
                study = Study(plan, out)
                drive(study, most)
        found[out] = [trial.params for trial in study.trials]
    assert found[whole] == found[parts]
    assert len({params["learning_rate"] for params in found[whole]}) == 14
    assert found[whole][0] == {"learning_rate": TrainConfig().learning_rate, "hidden": "[4]"}, "as the preset has them"


def test_more_trials_continue_a_study(tmp_path):
    """Whoever has found that twenty are too few would have to begin again."""
    drive(Study(make_plan(trials=2), tmp_path))
    study = Study(make_plan(trials=5), tmp_path)
    drive(study)
    assert states(study) == ["COMPLETE"] * 5
    drive(Study(make_plan(trials=1), tmp_path))


def test_grid_has_each_combination_once(tmp_path):
    """A grid with a hole, or with something twice, is none."""
    searched = {"n_epochs": {"low": 1, "high": 7, "step": 3}, "gae_lambda": {"low": 0.7, "high": 1.0, "step": 0.1}}
    study = Study(make_plan({**searched, "hidden": WIDTHS}, sampler="grid"), tmp_path)
    drive(study)
    found = [(t.params["n_epochs"], round(t.params["gae_lambda"], 9), t.params["hidden"]) for t in study.trials]
    assert found == list(product((1, 4, 7), (0.7, 0.8, 0.9, 1.0), ("[4]", "[5]", "[6]")))


def test_settings_get_better_by_trial(tmp_path):
    """A sampler that is told nothing of what was found is no better than chance."""
    study = Study(make_plan({"learning_rate": LEARNING_RATE}, trials=40), tmp_path)
    drive(study)
    values = [trial.value - 0.4 for trial in study.trials]  # how far the logarithm is from the best one
    assert sum(values[20:]) / 20 < 0.6 * log(10) / 2, "of what it is by chance, in a range from −log 10 to log 10"
    assert study.complete()[0].value - 0.4 == min(values)


@pytest.mark.parametrize("pruner, stopped", [("asha", True), ("none", False)])
def test_trial_that_falls_behind_is_stopped_and_no_other(pruner, stopped, tmp_path):
    """Most of a study's time would go into what cannot win; or the one that wins would be stopped."""
    study = Study(make_plan(trials=6, pruner=pruner), tmp_path)
    first = 32  # the first evaluation of a training of three updates
    for _ in range(3):
        number = study.begin()
        assert study.evaluated(number, 0, {"regret": 9.0})
        assert study.evaluated(number, first, {"regret": 1.0 - number / 10}), "the best so far"
        study.done(number, {"regret": 0.5})
    number = study.begin()
    assert study.config(number).eval_every == 1
    assert study.evaluated(number, first, {"regret": 2.0}) != stopped
    if stopped:
        study.pruned(number)
        assert study.trials[number].state == TrialState.PRUNED and study.trials[number].value == 2.0
        number = study.begin()
    assert study.evaluated(number, 96, {"regret": 99.0}), "what is done need not be stopped"


def test_return_is_maximised(tmp_path):
    """The worst settings would be found, and called the best."""
    study = Study(make_plan(trials=4, objective="return"), tmp_path)
    drive(study)
    assert study.complete()[0].value == max(trial.value for trial in study.trials)


def test_journal_that_was_cut_off_is_read(tmp_path):
    """A power cut in the midst of a line would cost all trials before it."""
    plan = make_plan(trials=3)
    drive(Study(plan, tmp_path), 2)
    journal = tmp_path / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-9])
    study = Study(plan, tmp_path)
    assert states(study) == ["COMPLETE", "RUNNING"] and study.taken_up == 1
    drive(study)
    assert states(Study(plan, tmp_path)) == ["COMPLETE"] * 3


# --- What it says -----------------------------------------------------------------------------------------------------


def test_best_is_chosen_by_episodes_that_it_was_not_found_by(tmp_path):
    """The best of many is the luckiest too: by the same episodes, luck would count twice."""
    plan = make_plan(trials=8, pruner="none")
    study = Study(plan, tmp_path)
    drive(study)
    best = study.complete()[:3]
    for trial, value in zip(best, (3.0, 1.0, 2.0), strict=True):
        study.annotate(trial.number, FRESH, {"regret": value})
    report = Report(Study(plan, tmp_path), best)
    assert report.best.number == best[1].number
    report.publish()
    rows = (tmp_path / "table.md").read_text().splitlines()[2:]
    order = [int(row.split("|")[1]) for row in rows]
    assert order == [best[i].number for i in (1, 2, 0)] + [trial.number for trial in study.complete()[3:]]
    assert f"Trial {best[1].number} of a study" in (tmp_path / "best.toml").read_text()
    assert (tmp_path / "importance.png").exists()
    shares = report.story().splitlines()[-1]
    assert "fANOVA, a guess with few trials): " in shares and "learning_rate" in shares and "hidden" in shares


def test_study_without_a_result_says_why(tmp_path):
    """An empty table does not tell what is to be mended."""
    study = Study(make_plan(trials=2), tmp_path)
    while (number := study.begin()) is not None:
        study.failed(number, "ValueError: no such luck")
    report = Report(study, [])
    report.publish()
    assert "no trial was trained to its end\nValueError: no such luck" in report.story()
    assert not (tmp_path / "best.toml").exists()


# --- What is refused --------------------------------------------------------------------------------------------------


def test_other_study_is_refused_by_its_difference(tmp_path):
    """Trials of two kinds in one table would be compared as if they were of one."""
    drive(Study(make_plan(trials=1), tmp_path))
    narrower = {**SEARCHED, "learning_rate": {**LEARNING_RATE, "low": 2e-4}}
    for plan, difference in (
        (make_plan(seed=3), "--seed (there 0, now 3)"),
        (make_plan(config={"gae_lambda": 0.5}), "gae_lambda (there 0.97, now 0.5)"),
        (make_plan(narrower), "space.learning_rate (there {'low': 0.0001, "),
        (make_plan({"hidden": WIDTHS}), "learning_rate (there None, now 0.0007), space.learning_rate (there {"),
    ):
        with pytest.raises(ValueError) as refused:
            Study(plan, tmp_path)
        assert difference in str(refused.value) and "Choose another --out" in str(refused.value)
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(ValueError, match=r"study\.json cannot be read: .*\. Delete it to go on"):
        Study(make_plan(), tmp_path)


@pytest.mark.parametrize(
    "entry, message",
    [
        ("learning_rat = { low = 1, high = 2 }", "'learning_rat' is no setting of a training: did you mean lear"),
        ("n_steps = 8", "has nothing to search"),
        ("n_steps = { low = 8, hihg = 9 }", "n_steps must be { low = …, high = … }"),
        ("n_steps = { low = 8.5, high = 9 }", "n_steps must have whole numbers"),
        ("n_steps = { low = 9, high = 8 }", "n_steps must have low below high"),
        ("gae_lambda = { low = 0.0, high = 1.0, log = true }", "gae_lambda must have low below high, and above 0"),
        ("gae_lambda = { low = 0.0, high = 1.0, step = 0.3 }", "gae_lambda must reach high from low in whole steps"),
        ("gae_lambda = { low = 0.5, high = 1.5 }", "gae_lambda = 1.5: gae_lambda must be between 0 and 1, got 1.5"),
        ("gae_lambda = { low = nan, high = 1.0 }", "gae_lambda must have numbers"),
        ("actor = { low = 0, high = 1 }", "actor must be { choices = [ … ] }, for it is no number"),
        ("actor = { choices = ['perceptron', 'oracle'] }", "actor = \"oracle\": actor must be one of"),
        ("hidden = { choices = [[4], [4]] }", "hidden has a choice twice"),
        ("hidden = { choices = [4] }", "hidden = 4: "),
        ("hidden = { choices = [] }", "hidden must have a list of choices"),
        ("run_dir = 'here'", "run_dir is no entry of a space: each trial has a folder of its own"),
        ("tasks = { choices = ['mlp', 'small'] }", "tasks is the same for all trials: give it one value"),
        ("base_schedule = { choices = ['linear', 'constant'] }", "base_schedule cannot be searched by the regret"),
        ("hidden = 3", "hidden must be a list, got 3"),
        ("hidden = [", "is no TOML file"),
    ],
)  # fmt: skip
def test_space_that_is_none_is_told_in_a_line(entry, message, tmp_path, monkeypatch, capsys):
    """A misspelt entry would be left out of the search, or fail in each trial of a night."""
    monkeypatch.chdir(tmp_path)
    Path("space.toml").write_text(entry)
    assert main(["tune", "--space", "space.toml"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rlsched tune: error: space.toml") and message in line
    assert [path.name for path in tmp_path.iterdir()] == ["space.toml"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--suite", "test"], "suite must be 'development', got 'test': nothing is chosen by the tasks of another one"),
        (["--sampler", "grid"], "a grid needs learning_rate in choices or in steps"),
        (["--sampler", "luck"], "sampler must be one of ['tpe', 'grid', 'random'], got 'luck'"),
        (["--pruner", "luck"], "pruner must be one of"),
        (["--objective", "luck"], "objective must be one of"),
        (["--trials", "0"], "trials must be a whole number, at least 1, got 0"),
        (["--jobs", "0"], "jobs must be a whole number, at least 1, got 0"),
        (["--best", "0"], "best must be a whole number, at least 1, got 0"),
        (["--seed", "-1"], "seed must be"),
        (["--timesteps", "5"], "timesteps must be at least num_envs × n_steps"),
        (["--preset", "luck"], "--preset must be one of"),
        (["--space", "nowhere.toml"], "nowhere.toml: No such file or directory"),
        (["--out", "/proc/study"], "/proc/study: No such file or directory"),
    ],
)
def test_wrong_option_is_told_in_a_line(arguments, message, tmp_path, monkeypatch, capsys):
    """A study that begins with a mistake ends with it, after hours."""
    monkeypatch.chdir(tmp_path)
    assert main(["tune", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rlsched tune: error: ") and message in line
    assert list(tmp_path.iterdir()) == []


def test_shipped_space_holds_what_presets_have():
    """The first trial, which says what the others are better than, would not be the preset."""
    space = read_space(DEFAULT)
    config = TrainConfig(**COMMON)
    space.check(TrainConfig())
    assert space.params(TrainConfig()) is not None
    assert space.params(config) is None, "which has another width"
    assert space.settings(space.params(TrainConfig())) == {
        name: getattr(TrainConfig(), name) for name in space.searched
    }
