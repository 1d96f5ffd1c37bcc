"""Pictures of inner training runs: the schedule and the loss so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RENDER_MODES = ["rgb_array", "ansi"]
FPS = 10  # decisions in a second of video
SIZE, DPI = (6.4, 4.8), 100  # inches and dots in one: 640 × 480 pixels, even as video encoders want them
NO_MODE = f"render() was called without a render_mode: make the environment with one of {RENDER_MODES}"
BARS, WIDTH = "▁▂▃▄▅▆▇█", 48  # of a line of text
# Of each panel its label and whether it has a logarithmic axis, and the infos that it shows with their names.
PANELS: Mapping[tuple[str, bool], Mapping[str, str]] = {
    ("lr", True): {"lr": "lr"},
    ("momentum", False): {"momentum": "momentum"},
    ("loss", True): {"train_loss": "training", "validation_loss": "validation"},
}
KEPT = {"family", "optimizer", "inner_steps", "total_steps", "return"}.union(*PANELS.values())  # of the infos

Array = NDArray[Any]
Frame = Array | str


class Renderer:
    """The current episodes of some runs, and frames of them.

    Args:
        mode: "rgb_array", of which a frame is an image (480, 640, 3), uint8; or "ansi", of which it is text.
        runs: their number.

    Raises:
        ValueError: there is no such mode.
    """

    def __init__(self, mode: str, runs: int) -> None:
        if mode not in RENDER_MODES:
            raise ValueError(f"render_mode must be None or one of {RENDER_MODES}, got {mode!r}")
        self._draw = picture if mode == "rgb_array" else text
        self._episodes: list[list[dict[str, Any]]] = [[] for _ in range(runs)]  # the infos of each decision

    def record(self, infos: Mapping[str, Array], new: Array, runs: Array | None = None) -> None:
        """Keep what is drawn of the infos of a step.

        Args:
            infos: each (runs,).
            new: mask of the runs in which they begin an episode.
            runs: mask of the runs that they are news of, by default all.
        """
        for i in range(len(self._episodes)) if runs is None else np.flatnonzero(runs):
            if new[i]:
                self._episodes[i] = []
            self._episodes[i].append({key: infos[key][i] for key in KEPT})

    @property
    def empty(self) -> Array:
        """Mask of the runs that have no episode, (runs,)."""
        return np.array([not episode for episode in self._episodes])

    def frames(self) -> tuple[Frame, ...]:
        """One for each run."""
        return tuple(map(self._draw, self._episodes))


def picture(episode: list[dict[str, Any]]) -> Array:
    """Learning rate, momentum and losses over the inner steps so far, as an image (480, 640, 3), uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(SIZE, DPI)  # margins by hand: the layout engines of matplotlib take seconds
    margins = {"left": 0.13, "right": 0.97, "bottom": 0.11, "top": 0.92, "hspace": 0.12}
    column: Array = figure.subplots(len(PANELS), 1, sharex=True, gridspec_kw={**margins, "height_ratios": (3, 2, 3)})
    steps = [info["inner_steps"] for info in episode]
    for axes, ((label, is_log), shown) in zip(column, PANELS.items(), strict=True):
        for key, name in shown.items():
            axes.plot(steps, [info[key] for info in episode], label=name, marker="." if len(steps) == 1 else None)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if is_log:
            logarithmic(axes, np.array([[info[key] for key in shown] for info in episode], float))
        else:
            axes.set_ylim(0, 1.05)
        if len(shown) > 1:
            axes.legend(loc="upper right", fontsize="small")
    figure.align_ylabels(column)
    column[0].set_title(_title(episode[-1]), fontsize="medium")
    column[-1].set_xlabel("inner steps")
    column[-1].set_xlim(0, float(episode[-1]["total_steps"]))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3].copy()


def logarithmic(axes: Axes, values: Array) -> None:
    """A logarithmic y-axis of at least a decade, with a few plain numbers; as it was where no value has a logarithm."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    values = values[np.isfinite(values) & (values > 0)]
    if not len(values):
        return
    low, high = float(values.min()), float(values.max())
    middle = np.sqrt(low) * np.sqrt(high)
    low, high = min(low / 1.25, middle / 3.3), max(1.25 * high, 3.3 * middle)
    axes.set_yscale("log", nonpositive="mask")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,), numticks=6))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(low, high)


def text(episode: list[dict[str, Any]]) -> str:
    """The same as lines of bars: of what has a logarithmic axis, of the logarithm."""
    lines = [_title(episode[-1])]
    for (label, is_log), shown in PANELS.items():
        for key, name in shown.items():
            values = np.array([info[key] for info in episode], float)
            title = name if name == label else f"{name} {label}"
            lines.append(f"{title:<16}{values[-1]:>10.3g}  {_bars(values, is_log)}")
    return "\n".join(lines)


def _bars(values: Array, is_log: bool) -> str:
    """At most `WIDTH` of the values, evenly spread, between the lowest and the highest; what is not finite is a dot."""
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.log(values) if is_log else values
    values = values[np.linspace(0, len(values) - 1, min(WIDTH, len(values))).round().astype(int)]
    known = np.isfinite(values)
    low, high = (values[known].min(), values[known].max()) if known.any() else (0.0, 0.0)
    heights = np.where(known, values - low, 0.0) / max(high - low, 1e-6) * (len(BARS) - 1)
    return "".join(BARS[round(height)] if is_known else "·" for height, is_known in zip(heights, known, strict=True))


def _title(info: Mapping[str, Any]) -> str:
    steps = f"inner step {info['inner_steps']:.0f} of {info['total_steps']:.0f}"
    return f"{info['family']}, {info['optimizer']} – {steps} – return {info['return']:.2f}"
