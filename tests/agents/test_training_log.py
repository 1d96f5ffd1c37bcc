"""What a training shows in TensorBoard."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import DEFAULT_SIZE_GUIDANCE, EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from rlsched.agents import evaluate, train
from rlsched.agents.evaluation import tuned
from rlsched.agents.figures import family_picture, samples
from rlsched.agents.tensorboard import (
    ABOUT,
    ACTIONS,
    BASE,
    BETTER,
    BY_FAMILY,
    DIVERGED,
    EPISODES,
    FAMILY,
    GAIN,
    LAYOUT,
    LOG,
    METRICS,
    OBSERVATIONS,
    OPTIMIZER,
    REGRET,
    REGRET_OF,
    RETURN,
    ROLLOUT_FAMILY,
    ROLLOUT_OPTIMIZER,
    SPEED,
    TUNED,
    means,
)
from rlsched.envs import SchedulingVectorEnv
from rlsched.policy import SchedulePolicy

EVERYTHING = dict.fromkeys(DEFAULT_SIZE_GUIDANCE, 0)
EVALUATED, UPDATED = [0, 64, 96], [32, 64, 96]  # timesteps: before the first update, after two, at the end


@pytest.fixture(scope="module")
def runs(trained):
    """The runs that TensorBoard finds in the folder of a training, by the names that it gives them."""
    root, found = Path(trained.config.run_dir), {}
    for folder in {path.parent for path in root.rglob("events.out.tfevents.*")}:
        found[str(folder.relative_to(root))] = log = EventAccumulator(str(folder), EVERYTHING)
        log.Reload()
    return found


def steps(run, tag):
    """Timesteps of training at which a scalar was written."""
    return [event.step for event in run.Scalars(tag)]


def last(run, tag):
    """The latest value of a scalar."""
    return run.Scalars(tag)[-1].value


def test_first_chart_shows_the_policy_beside_both_references(runs, trained, tiny):
    """A return means nothing to whoever has to look for what it is to be compared with, in other charts or by hand."""
    base, reference = f"{LOG}/{BASE}", f"{LOG}/{TUNED}"
    assert runs.keys() == {LOG, base, reference}, "a run that is called '.' says nothing"
    first = min(tag for tag in runs[LOG].Tags()["scalars"])
    assert first == RETURN and all(steps(run, first) == EVALUATED for run in runs.values())
    config, zero = trained.config, SchedulePolicy.zero()
    plays = {"episodes": config.eval_episodes, "seed": config.eval_seed}
    returns = {
        LOG: evaluate(trained.policy, tiny, **plays).returns,
        base: evaluate(zero, tiny, **plays).returns,
        reference: tuned(zero, lambda number, **options: SchedulingVectorEnv(number, tiny, **options), **plays),
    }
    for name, run in runs.items():
        assert last(run, RETURN) == pytest.approx(returns[name].mean(), abs=1e-3)
        for i in range(len(tiny)):
            assert last(run, f"{FAMILY}/task {i}") == pytest.approx(returns[name][i :: len(tiny)].mean(), abs=1e-3)
        assert {tag for tag in run.Tags()["scalars"] if tag.startswith(OPTIMIZER)} <= {
            f"{OPTIMIZER}/SGD",
            f"{OPTIMIZER}/AdamW",
        }
    for i in range(len(tiny)):
        missing = (returns[reference] - returns[LOG])[i :: len(tiny)].mean()
        assert steps(runs[LOG], f"{REGRET_OF}/task {i}") == EVALUATED
        assert last(runs[LOG], f"{REGRET_OF}/task {i}") == pytest.approx(missing, abs=1e-3)
    scores = trained.policy.info["evaluation"]
    for tag, score in ((GAIN, "gain"), (REGRET, "regret"), (BETTER, "share_better"), (DIVERGED, "diverged")):
        assert last(runs[LOG], tag) == pytest.approx(scores[score], abs=1e-4)


def test_figures_of_every_update_are_there(runs):
    """Whether it still learns, and how fast it runs, would show only at evaluations, hours apart."""
    run = runs[LOG]
    for tag in ("value_loss", "approx_kl", "explained_variance", "std", "learning_rate"):
        assert steps(run, f"train/{tag}") == UPDATED  # of each update where it was made, the last one too
    for tag in ("rollout/ep_rew_mean", "rollout/ep_len_mean"):
        assert steps(run, tag) == UPDATED
    assert steps(run, SPEED) == UPDATED[:-1] and min(event.value for event in run.Scalars(SPEED)) > 0
    ended = [tag for tag in run.Tags()["scalars"] if tag.startswith((ROLLOUT_FAMILY, ROLLOUT_OPTIMIZER))]
    assert {f"{ROLLOUT_FAMILY}/task 0", f"{ROLLOUT_FAMILY}/task 1"} <= set(ended)
    assert all(set(steps(run, tag)) <= set(UPDATED) for tag in ended)


def test_histograms_hold_all_that_was_done_and_seen(runs, trained):
    """An observation that never moves, or an action that is always at its bound, shows in no mean."""
    config = trained.config
    names = {*(f"{ACTIONS}/{name}" for name in config.controls)}
    names |= {f"{OBSERVATIONS}/{name}" for name in config.observations}
    assert set(runs[LOG].Tags()["histograms"]) == names
    for name in names:
        events = runs[LOG].Histograms(name)
        assert [event.step for event in events] == UPDATED
        for event in events:
            values = event.histogram_value
            assert values.num == config.num_envs * config.n_steps
            assert -1 <= values.min < values.max <= 1 or not name.startswith(ACTIONS)


def test_pictures_are_of_episodes_and_not_empty(runs):
    """An empty picture would be seen only by whoever waited for the training to end."""
    tags = [tag for tag in runs[LOG].Tags()["images"] if tag.startswith(f"{EPISODES}/")]
    assert len(tags) == 3  # as many as an evaluation has episodes
    assert all(re.fullmatch(rf"{EPISODES}/\d task [01], [A-Za-z]+", tag) for tag in tags)
    assert set(runs[LOG].Tags()["images"]) == {BY_FAMILY, *tags}
    for tag in (BY_FAMILY, *tags):
        events = runs[LOG].Images(tag)
        assert [event.step for event in events] == EVALUATED
        pixels = np.asarray(Image.open(io.BytesIO(events[-1].encoded_image_string)).convert("L"))
        assert 0.01 < (pixels < 200).mean() < 0.5


def test_layout_draws_what_is_there(runs):
    """Charts whose tags nobody writes are empty, and stay so unnoticed."""
    event = runs[LOG].Tensors("custom_scalars__config__")[0]
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == list(LAYOUT)
    tags = runs[LOG].Tags()["scalars"]
    for category in layout.category:
        for chart in category.chart:
            for pattern in chart.multiline.tag:
                assert any(re.match(pattern, tag) for tag in tags), pattern


def test_card_tells_the_configuration_and_how_to_read(runs, trained):
    """Whoever opens the log of another has nobody to ask what its tags mean, or what was trained."""
    (event,) = runs[LOG].Tensors(f"{ABOUT}/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    for name, value in trained.config.hyperparameters().items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else json.dumps(value)
        assert f"| `{name}` | {shown} |" in text
    for tag in (*METRICS, BY_FAMILY, REGRET_OF, EPISODES, FAMILY, OPTIMIZER, ACTIONS, OBSERVATIONS, BASE, TUNED):
        assert f"`{tag}`" in text


def hparams(run):
    """What TensorBoard knows of the hyperparameters of a run: tag -> data."""
    found = run.PluginTagToContent("hparams")
    return {tag: plugin_data_pb2.HParamsPluginData.FromString(content) for tag, content in found.items()}


def test_hyperparameters_are_known_of_a_run_that_was_interrupted(runs, trained, make_config, monkeypatch):
    """Most trainings are stopped by hand, and then are to be compared like those that ended."""
    monkeypatch.setattr("rlsched.agents.callbacks.EvaluationCallback.explore", lambda self: 1 / 0)
    config = make_config()
    with pytest.raises(ZeroDivisionError):
        train(config)
    stopped = EventAccumulator(str(Path(config.run_dir) / LOG))
    stopped.Reload()
    start, end = "_hparams_/session_start_info", "_hparams_/session_end_info"
    assert start in hparams(stopped) and end not in hparams(stopped)
    done = hparams(runs[LOG])
    assert end in done
    for known in (hparams(stopped), done):
        given = known[start].session_start_info.hparams
        assert given["learning_rate"].number_value == trained.config.learning_rate
        assert given["tasks"].string_value == "tiny"
        assert given.keys() == trained.config.hyperparameters().keys()
    metrics = [info.name.tag for info in done["_hparams_/experiment"].experiment.metric_infos]
    assert metrics == list(METRICS) and set(metrics) <= set(runs[LOG].Tags()["scalars"])


def test_mean_of_each_label():
    """A mean over the episodes of another family would tell of the wrong one."""
    values, labels = np.array([1.0, 2.0, 4.0, 8.0]), ["a", "b", "a", "b"]
    assert means("x", values, labels) == {"x/a": 2.5, "x/b": 5.0}


def test_picture_of_families_has_each_where_it_belongs():
    """The family that is in need of training would stand under the name of another."""
    policy, zero = np.array([1.0, 5.0, 2.0, 3.0]), np.array([0.0, 4.0, 0.0, 1.0])
    axis = family_picture(policy, zero, np.array([4.0, 6.0, 6.0, 2.0]), ["a", "b", "a", "c"]).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["c", "b", "a"]  # from the bottom
    shown = {line.get_label(): line.get_xdata().tolist() for line in axis.lines}
    assert shown == {"policy": [3, 5, 1.5], "base schedule": [1, 4, 0], "tuned": [2, 6, 5]}


def test_samples_come_from_all_over_the_mixture():
    """Four pictures of one family, or of SGD alone, would show a quarter of what there is to see."""
    families = [f"family {i % 25}" for i in range(100)]
    optimizers = ["SGD" if i // 25 % 2 else "adaptive" for i in range(100)]
    chosen = samples(families, optimizers)
    assert [families[i] for i in chosen] == ["family 0", "family 8", "family 16", "family 24"]
    assert [optimizers[i] for i in chosen] == ["SGD", "adaptive"] * 2
    assert samples(["one"] * 6, ["SGD"] * 4 + ["adaptive"] * 2) == [0, 4, 1, 5]
    assert samples(["one", "two"], ["SGD", "SGD"]) == [0, 1]
