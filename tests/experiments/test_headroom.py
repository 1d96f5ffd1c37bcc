"""The search for the best schedule of a cell: it is given no luck, and what it drives is what it says."""

import json
from functools import partial

import pytest
import torch

from rlsched.experiments.benchmark import data
from rlsched.experiments.benchmark import tasks as suites
from rlsched.experiments.benchmark.bases import ADAM, SGD_DECAY, SGD_MOMENTUM, plain
from rlsched.experiments.benchmark.methods import BASELINES
from rlsched.experiments.benchmark.run import trained
from rlsched.experiments.benchmark.tasks import DEVELOPMENT, TASKS, Task
from rlsched.experiments.cell import Cell
from rlsched.experiments.networks import perceptron

pytest.importorskip("optuna")

from rlsched.experiments.headroom import search
from rlsched.experiments.headroom.__main__ import RESULTS, main
from rlsched.experiments.headroom.search import CHOSEN, JUDGED, SEARCHED, Course, Planned, Search

TINY = Task(
    partial(perceptron, 13, 4, 3),
    lambda _: data.wine(),
    suites.CLASSES,
    {"adam": ADAM, "momentum": SGD_MOMENTUM, "decay": SGD_DECAY, "plain": plain(2.0)},
    (6,),
    8,
)


@pytest.fixture
def tiny(monkeypatch):
    """A task of a few milliseconds in the development suite."""
    for place in (DEVELOPMENT, TASKS):
        monkeypatch.setitem(place, "tiny", TINY)


def test_factor_is_what_the_course_says():
    """A search over schedules that are others than the table says would send everybody after the wrong one."""
    course = Course(1.0, warm_up=0.2, plateau=0.6, power=2.0)
    assert [course.factor(x) for x in (0.2, 0.4, 0.6)] == [1, 1, 1]
    assert course.factor(0.0) == 0.01 and course.factor(0.1) == pytest.approx(0.505)
    assert course.factor(0.8) == pytest.approx(0.25) and course.factor(1.0) == 0
    assert [Course(1.0).factor(x) for x in (0.0, 0.25, 1.0)] == [1, 0.75, 0]


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("optimizer", TINY.bases)
def test_plain_course_is_linear_decay(optimizer):
    """The gain of a search that drives another run than the baselines would be that of the driving."""
    cell, base = Cell("tiny", optimizer, 6), TINY.bases[optimizer]
    course = Course(0.5, **search.plain(base))
    made = trained(cell, 3, lambda network: Planned(base.make(network.parameters(), 1.0), course, 6))[0]
    linear = trained(cell, 3, lambda network: BASELINES["linear"].drive(base, network.parameters(), 0.5, 6))[0]
    assert made["loss"] == pytest.approx(linear["loss"], rel=1e-5)
    assert made["curve"]["lr"] == pytest.approx(linear["curve"]["lr"], rel=1e-3)


def test_momentum_moves_without_the_size_of_updates():
    """Where a higher momentum made for longer steps, the search would take the one for the other."""
    optimizer = SGD_DECAY.make([torch.nn.Parameter(torch.zeros(2))], 1.0)
    drive = Planned(optimizer, Course(1.0, plateau=1.0, momentum=2.0, final_momentum=0.5, weight_decay=3.0), 4)
    seen = []
    for _ in range(4):
        group = optimizer.param_groups[0]
        seen.append((group["momentum"], group["lr"] / (1 - group["momentum"]), group["weight_decay"]))
        drive.step(torch.zeros(()))
    assert [each[0] for each in seen] == pytest.approx([1 - 10**-x for x in (2.0, 1.625, 1.25, 0.875)])
    assert [each[1] for each in seen] == pytest.approx([1.0] * 4)
    assert [each[2] for each in seen] == pytest.approx([1.5e-3] * 4)


@pytest.mark.usefixtures("tiny")
def test_what_is_judged_has_chosen_nothing(monkeypatch):
    """The best of forty runs is the luckiest: on its own seed there would be a gain where nothing can be gained."""
    seeds = []

    def recorded(cell, seed, drive_of):
        seeds.append(seed)
        return trained(cell, seed, drive_of)

    monkeypatch.setattr(search, "trained", recorded)
    row = search.search(Search(Cell("tiny", "momentum", 6), 8))
    sweep = len(SGD_MOMENTUM.sweep)
    assert seeds == [SEARCHED] * 8 + [CHOSEN] * 4 + [SEARCHED, CHOSEN] * sweep + [*JUDGED, *JUDGED]
    assert not {SEARCHED, CHOSEN} & set(JUDGED)
    assert row["cosine"] in SGD_MOMENTUM.sweep and len(row["losses"]) == len(row["cosine_losses"]) == 2


@pytest.mark.usefixtures("tiny")
def test_search_is_resumed_and_its_table_shows_the_gain(tmp_path, capsys):
    """An hour of searching would be lost to Ctrl-C, or its table say what was not measured."""
    options = ["--tasks", "tiny", "--trials", "7", "--processes", "1", "--out", str(tmp_path)]
    assert main(options) == 0
    said = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / RESULTS).read_text().splitlines()]
    assert [row["cell"][1] for row in rows] == list(TINY.bases)
    for row in rows:
        gain = f"{search.gain(row):+.3f}".replace("-", "−")
        assert f"| tiny, {row['cell'][1]}, 6 steps | {gain} | × {row['cosine']:.3g} |" in said
    kept = (tmp_path / RESULTS).read_text().splitlines()
    (tmp_path / RESULTS).write_text("\n".join(kept[:1] + kept[2:]) + "\n")
    assert main(options) == 0
    assert capsys.readouterr().out == said
    assert len((tmp_path / RESULTS).read_text().splitlines()) == len(kept)


@pytest.mark.parametrize(("options", "said"), [(["--trials", "5"], "trials must be at least 6")])
def test_too_few_trials_are_refused(options, said, tmp_path, capsys):
    """A search that has not even tried the sweep would pass for one."""
    assert main([*options, "--out", str(tmp_path)]) == 1
    assert said in capsys.readouterr().err
