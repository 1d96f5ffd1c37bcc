"""The benchmark of what a step costs."""

import json

import pytest
import torch
from torch import nn

from rlsched.experiments.cost.__main__ import main
from rlsched.experiments.cost.loops import NETWORKS, OPTIMIZERS, PLAIN, UNMEASURED, loop, loops, memory
from rlsched.experiments.cost.run import RUNS, measure
from rlsched.experiments.table import PLOT, TABLE


def test_quick_run_writes_table_and_plot_and_goes_on(tmp_path):
    """A benchmark that only its author can run would not be repeated; nor one that begins anew after Ctrl-C."""
    for _ in range(2):
        assert main(["--quick", "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / RUNS).read_text().splitlines()]
    assert [(r["case"]["optimizer"], r["case"]["loop"]) for r in rows] == [(o, k) for o in OPTIMIZERS for k in loops(o)]
    assert all(row["ratio"] == 1 and row["bytes_ratio"] == 1 for row in rows if row["case"]["loop"] == PLAIN)
    assert all(row["rounds"] == 3 and row["provenance"]["torch"] == torch.__version__ for row in rows)
    text = (tmp_path / TABLE).read_text()
    assert UNMEASURED in text and "9,674" in text
    assert (tmp_path / PLOT).stat().st_size > 10_000


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_have_the_size_that_their_name_says(name):
    """A target for a million parameters would be met, or missed, by another network."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in NETWORKS[name].make().parameters())
    amount, unit = name.split(", ")[1].split()
    assert parameters == pytest.approx(float(amount) * {"thousand": 1e3, "million": 1e6}[unit], rel=0.12)


def test_memory_is_that_of_the_tensors_that_a_loop_keeps():
    """An optimizer that hides a copy of the network would look as if it took no memory."""
    name = "MLP, 10 thousand"
    with torch.device("meta"):
        weights = 4 * sum(p.numel() for p in NETWORKS[name].make().parameters())
    batch = 4 * 64 * 64 + 8 * 64
    plain = memory(loop(PLAIN, NETWORKS[name], "SGD"))
    assert plain == pytest.approx(3 * weights + batch, rel=0.01)  # and gradients, and momentum
    adamw = memory(loop(PLAIN, NETWORKS[name], "AdamW"))
    assert adamw == pytest.approx(4 * weights + batch, rel=0.01)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_loop_trains(optimizer, monkeypatch):
    """A loop that raises no loss down, or that skips its step, would be the fastest of all."""
    losses = []
    entropy = nn.functional.cross_entropy
    monkeypatch.setattr(nn.functional, "cross_entropy", lambda *args: losses.append(entropy(*args)) or losses[-1])
    for kind in loops(optimizer):
        losses.clear()
        step = loop(kind, NETWORKS["MLP, 10 thousand"], optimizer)
        for _ in range(30):
            step()
        assert losses[-1] < losses[0], kind


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"networks": ("MLP",)}, "networks must be some of .*'MLP, 10 thousand'.*, got"),
        ({"networks": ()}, "networks must be some of"),
        ({"seconds": -1.0}, "seconds must be .*, got -1"),
        ({"max_rounds": 1}, "max_rounds must be at least 3, got 1"),
    ],
)
def test_wrong_argument_is_named(options, message, tmp_path):
    """A typing mistake should not cost more than a second."""
    with pytest.raises(ValueError, match=message):
        measure(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--networks", "MLP"], "networks must be"), (["--threads", "0"], "threads must be")]
)
def test_wrong_option_is_one_clear_line(arguments, message, tmp_path, capsys):
    """A traceback hides which option was wrong."""
    assert main([*arguments, "--out", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err
