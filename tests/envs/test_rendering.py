"""A run can be looked at: what is drawn is what happened."""

import importlib.util

import gymnasium
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.wrappers import RecordVideo

from rlsched.envs import ID, SchedulingEnv, SchedulingVectorEnv
from rlsched.envs.rendering import BARS, KEPT, RENDER_MODES, Renderer, picture, text


def episode(**series):
    """The infos of an episode in which these take their values one after the other."""
    rows = [dict(zip(series, values, strict=True)) for values in zip(*series.values(), strict=True)]
    fixed = {"family": "mine", "optimizer": "SGD", "total_steps": 41.0, "return": 0.5}
    return [{**fixed, "momentum": 0.9, "inner_steps": 1.0 + 10 * i, **row} for i, row in enumerate(rows)]


FALLING = {"lr": [1e-3, 1e-2, 1e-1], "train_loss": [4.0, 2.0, 1.0], "validation_loss": [1.0, np.inf, np.nan]}


def drawn(image):
    """Where an image is in colour: lines are, and axes and text are not."""
    return np.ptp(image.astype(int), axis=2) > 60


def test_frames_show_the_schedule_so_far():
    """A picture that showed another part of the run, or nothing, would be believed."""
    frames = [picture(episode(**FALLING)[:n]) for n in (1, 3)]
    assert all(frame.shape == (480, 640, 3) and frame.dtype == np.uint8 for frame in frames)
    marked = [np.flatnonzero(drawn(frame[40:170]).any(0)) for frame in frames]  # the learning rate's panel
    assert marked[0].size and np.ptp(marked[0]) < 20, "one decision is a dot"
    left, right = 0.13 * 640, 0.97 * 640  # of the axis, which ends at the end of the run
    assert marked[1].max() == pytest.approx(left + (right - left) * 21 / 41, abs=4)
    rows = [drawn(frames[1][40:170])[:, column].argmax() for column in (marked[1][2], marked[1][-3])]
    assert rows[1] < rows[0] - 40, "and it rises, on a logarithmic axis"


def test_text_shows_the_same():
    """Who has no screen must not be told something else."""
    first, lr, momentum, train, validation = text(episode(**FALLING)).splitlines()
    assert first == "mine, SGD – inner step 21 of 41 – return 0.50"
    assert lr.split() == ["lr", "0.1", f"{BARS[0]}{BARS[4]}{BARS[7]}"]
    assert momentum.split() == ["momentum", "0.9", BARS[0] * 3]
    assert train.split() == ["training", "loss", "1", f"{BARS[7]}{BARS[4]}{BARS[0]}"]
    assert validation.split() == ["validation", "loss", "nan", f"{BARS[0]}··"]
    assert len(text(episode(**{key: values * 100 for key, values in FALLING.items()})).splitlines()[1]) < 80


@pytest.mark.parametrize("draw", [picture, text])
def test_anything_can_be_drawn(draw):
    """A run whose numbers are out of bounds is the one that one wants to look at."""
    for value in (0.0, np.nan, np.inf, 1e-30):
        draw(episode(**dict.fromkeys(FALLING, [value] * 2)))


@pytest.mark.parametrize("mode", ["SameStep", "NextStep", "Disabled"])
def test_frames_begin_anew_with_each_episode(make_task, mode):
    """Two episodes in one picture would be a schedule that no run had."""
    env = SchedulingVectorEnv(2, make_task(decisions=(2, 2)), autoreset_mode=mode, render_mode="ansi")
    with pytest.raises(ResetNeeded, match=r"^render\(\) was called where the runs have no episode"):
        env.render()
    env.reset(seed=0)
    told = []
    for step in range(5):
        told.append([frame.partition("inner step ")[2].split()[0] for frame in env.render()])
        if mode == "Disabled" and step == 2:
            env.reset(options={"reset_mask": np.array([True, False])})
            told.append([frame.partition("inner step ")[2].split()[0] for frame in env.render()])
            break
        env.step(np.zeros(env.action_space.shape))
    wanted = {"SameStep": ["1", "5", "1", "5", "1"], "NextStep": ["1", "5", "9", "1", "5"]}
    if mode == "Disabled":
        assert told == [["1"] * 2, ["5"] * 2, ["9"] * 2, ["1", "9"]]
    else:
        assert told == [[number] * 2 for number in wanted[mode]]


def test_render_mode_is_asked_for(make_task):
    """A frame that is None is an error in a script far away; that of another mode is garbage in a video."""
    with pytest.raises(ValueError, match=r"render_mode must be None or one of \['rgb_array', 'ansi'\], got 'human'"):
        SchedulingEnv(make_task(), render_mode="human")
    for env in (SchedulingEnv(make_task()), SchedulingVectorEnv(1, make_task())):
        env.reset(seed=0)
        with pytest.warns(UserWarning, match="without a render_mode"):
            assert env.render() is None
    env = gymnasium.make(ID, tasks=make_task(), render_mode="ansi")
    env.reset(seed=0)
    assert env.render().startswith("task 0, ")
    assert env.metadata["render_modes"] == RENDER_MODES and env.metadata["render_fps"] > 0


def test_only_those_who_look_keep_what_is_drawn(make_task):
    """A training of hours would collect the infos of every run for nobody."""
    env = SchedulingVectorEnv(1, make_task())
    assert env._renderer is None
    renderer = Renderer("ansi", 2)
    infos = {key: np.zeros(2) for key in KEPT}
    renderer.record(infos, np.array([True, True]))
    renderer.record(infos, np.array([False, False]), runs=np.array([True, False]))
    assert [len(each) for each in renderer._episodes] == [2, 1]


@pytest.mark.skipif(importlib.util.find_spec("moviepy") is None, reason="moviepy writes videos")
def test_video_is_recorded(make_task, tmp_path):
    """Gymnasium's own wrapper is how people look at an episode."""
    env = gymnasium.make(ID, tasks=make_task(decisions=(1, 1)), render_mode="rgb_array")
    with RecordVideo(env, str(tmp_path / "videos")) as recorded:
        recorded.reset(seed=0)
        recorded.step(np.zeros(env.action_space.shape, np.float32))
    (video,) = (tmp_path / "videos").glob("*.mp4")
    assert video.stat().st_size > 1000
