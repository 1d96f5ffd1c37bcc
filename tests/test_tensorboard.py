"""What a run writes for TensorBoard, read back from the event file."""

import copy
import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import lively_policy, network, train

from rlsched import ScheduledOptimizer
from rlsched.figures import FIGURES
from rlsched.tensorboard import LAYOUT

pytest.importorskip("tensorboard")
STEPS, DECISIONS = 21, [1, 6, 11, 16]


def scheduled(model, **log):
    """An optimizer that writes to `log`, with decisions before the inner steps of DECISIONS."""
    inner = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    return ScheduledOptimizer(inner, total_steps=STEPS, decisions=5, policy=lively_policy(), **log)


def read(folder):
    """All that the event files of a folder hold."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def values(events, tag):
    """The values of a scalar, in order."""
    return [event.value for event in events.Scalars(tag)]


def test_every_figure_is_written_at_every_decision(tmp_path):
    """A user who asks why the learning rate fell would look into an empty chart."""
    model = network()
    lrs = [lr for ((lr, _),) in train(model, scheduled(model, log_dir=tmp_path), range(STEPS))]
    events = read(tmp_path)
    tags = set(events.Tags()["scalars"])
    assert tags == set(FIGURES) - {"rlsched_policy/distance"}, "which only a policy has that knows where it was trained"
    for tag in tags:
        assert [event.step for event in events.Scalars(tag)] == DECISIONS, tag
    assert values(events, "rlsched/lr") == pytest.approx([lrs[step] for step in DECISIONS])
    assert values(events, "rlsched/lr_base_schedule") == pytest.approx([0.1 * (1 - step / STEPS) for step in DECISIONS])
    assert all(math.isfinite(value) for tag in tags for value in values(events, tag))


@pytest.mark.parametrize("per_group", [False, True])
def test_charts_of_the_layout_have_their_scalars(tmp_path, per_group):
    """A chart of a tag that was renamed stays empty without a word, and one whose name begins another's has both."""
    model = network()
    optimizer = scheduled(model, log_dir=tmp_path, per_group=per_group)
    train(model, optimizer, range(6))
    optimizer.observe_validation(1.0)
    optimizer.controller.log.close()
    tags = read(tmp_path).Tags()["scalars"]
    found = []
    for _, patterns in (chart for category in LAYOUT.values() for chart in category.values()):
        for pattern in patterns:
            matching = [tag for tag in tags if re.match(pattern, tag)]
            assert len(matching) == 1 or "distance" in pattern, pattern
            found += matching
    assert len(set(found)) == len(found), "two charts of one figure"
    assert {tag for tag in tags if tag.startswith("rlsched/")} <= set(found), "what a run is about is in no chart"


def test_folder_and_writer_get_the_same(tmp_path):
    """Who has a writer already would get a heap of tags without charts, and no word about what they are."""
    from torch.utils.tensorboard.writer import SummaryWriter

    ways = {"folder": {"log_dir": tmp_path / "folder"}, "writer": {"writer": SummaryWriter(str(tmp_path / "writer"))}}
    for options in ways.values():
        model = network()
        train(model, scheduled(model, **options), range(STEPS))
    ways["writer"]["writer"].close()
    one, other = (read(tmp_path / name) for name in ways)
    assert one.Tags() == other.Tags()
    layout = "custom_scalars__config__"
    assert one.Tensors(layout)[0].tensor_proto == other.Tensors(layout)[0].tensor_proto
    (card,) = one.Tensors("rlsched/figures/text_summary")
    text = card.tensor_proto.string_val[0].decode()
    assert [name for name in FIGURES if f"`{name}`" not in text] == []


def test_first_page_is_about_the_run():
    """Tags are sorted by name, and two dozen observations would come before the loss."""
    assert min(FIGURES) == "rlsched/loss"
    groups = [name.partition("/")[0] for name in sorted(FIGURES)]
    assert list(dict.fromkeys(groups)) == ["rlsched", "rlsched_gradients", "rlsched_policy", "rlsched_seen"]
    assert groups.count("rlsched") <= 12, "which TensorBoard shows of a group at once"


def test_users_own_writer_is_used_and_left_open(tmp_path):
    """The curves of a schedule belong beside those of the run; a closed writer would lose what comes after."""
    from torch.utils.tensorboard.writer import SummaryWriter

    model = network()
    with SummaryWriter(str(tmp_path)) as writer:
        train(model, scheduled(model, writer=writer), range(STEPS))
        writer.add_scalar("mine", 1.0, 99)
    tags = read(tmp_path).Tags()["scalars"]
    assert "mine" in tags and "rlsched/lr" in tags


def test_finished_run_is_on_disk(tmp_path):
    """A notebook that never closes its writer would show all but the last minutes of a run."""
    model = network()
    optimizer = scheduled(model, log_dir=tmp_path)
    train(model, optimizer, range(STEPS))
    assert [event.step for event in read(tmp_path).Scalars("rlsched/lr")] == DECISIONS
    del optimizer


def test_intervention_is_written(tmp_path):
    """A learning rate that drops to a tenth without a reason on record would cost its user a day."""
    model = network()
    optimizer = scheduled(model, log_dir=tmp_path)
    train(model, optimizer, range(3))
    optimizer.zero_grad()
    model[0].weight.grad = torch.full_like(model[0].weight, math.nan)
    optimizer.step(loss=math.nan)
    train(model, optimizer, range(4, STEPS))
    events = read(tmp_path).Tensors("rlsched/intervention/text_summary")
    written = [(event.step, event.tensor_proto.string_val[0].decode()) for event in events]
    assert written == optimizer.controller.interventions
    assert written[-1] == (6, "1 of 5 steps without a finite loss and gradient: left out")


def test_logging_does_not_change_the_run(tmp_path):
    """A run that is looked at would not be the run that was asked about."""
    logged, silent = network(), network()
    hyperparameters = train(logged, scheduled(logged, log_dir=tmp_path), range(STEPS))
    assert train(silent, scheduled(silent), range(STEPS)) == hyperparameters


def test_copy_does_not_write_into_the_originals_file(tmp_path):
    """Two runs would draw one zigzag curve; and an open file cannot be pickled."""
    model = network()
    optimizer = scheduled(model, log_dir=tmp_path)
    train(model, optimizer, range(8))
    other_model, other = copy.deepcopy((model, optimizer))
    train(other_model, other, range(8, STEPS))
    train(model, optimizer, range(8, STEPS))
    assert [event.step for event in read(tmp_path).Scalars("rlsched/lr")] == DECISIONS


def test_folder_and_writer_exclude_each_other(tmp_path):
    """One of the two would be ignored."""
    with pytest.raises(ValueError, match="log_dir or writer, not both"):
        writer = SimpleNamespace(add_scalar=print, add_text=print, add_custom_scalars=print, flush=print)
        scheduled(network(), log_dir=tmp_path, writer=writer)


def test_writer_that_is_none_is_refused():
    """It would end a run at its first decision."""
    with pytest.raises(TypeError, match=r"writer must be a SummaryWriter, with .*'add_custom_scalars'.*, got Simple"):
        scheduled(network(), writer=SimpleNamespace(add_scalar=print))


def test_missing_tensorboard_is_named_with_its_remedy(tmp_path, monkeypatch):
    """torch's own error does not say what to install."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(ImportError, match=r"pip install 'rlsched\[tensorboard\]'"):
        scheduled(network(), log_dir=tmp_path)
