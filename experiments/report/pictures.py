"""The charts of a report as PNG."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from rlsched.envs.rendering import logarithmic
from rlsched.experiments.report.blocks import Chart, Heat, Panel, Picture

WIDTH = 10.0  # inches
PER_PIXEL = 1 / 95  # inches of height for a pixel on the page
DPI = 110
LEGEND_COLUMNS = 4


def png(block: Chart | Picture, dpi: int = DPI) -> bytes:
    """The block as a picture."""
    if isinstance(block, Picture) and isinstance(block.image, bytes):
        return block.image
    figure = drawn(block) if isinstance(block, Chart) else block.image
    assert isinstance(figure, Figure)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=dpi)
    return picture.getvalue()


def drawn(chart: Chart) -> Figure:
    """A chart, drawn by matplotlib."""
    heights = [height_of(panel) * PER_PIXEL for panel in chart.panels]
    gap, bottom, top = 0.5, 0.5, 0.65  # inches: between panels, and beside them; the layout engine takes seconds
    labels = {line.label for panel in chart.panels if isinstance(panel, Panel) for line in panel.lines}
    bottom += 0.22 * -(-len(labels) // LEGEND_COLUMNS) if len(labels) > 1 else 0
    height = sum(heights) + gap * (len(heights) - 1) + bottom + top
    figure = Figure(figsize=(WIDTH, height))
    margins = {"left": 1.5 / WIDTH, "right": 1 - 0.2 / WIDTH, "bottom": bottom / height, "top": 1 - top / height}
    grid = {**margins, "height_ratios": heights, "hspace": gap / np.mean(heights)}
    axes = figure.subplots(len(chart.panels), squeeze=False, sharex=True, gridspec_kw=grid)[:, 0]
    shown: dict[str, Artist] = {}
    for axis, panel in zip(axes, chart.panels, strict=True):
        if isinstance(panel, Heat):
            _heat(axis, panel)
        else:
            _lines(axis, panel, shown)
        axis.set_title(title_of(panel), fontsize="small", loc="left")
        axis.tick_params(labelsize="small")
    if chart.is_log:
        axes[-1].set_xscale("log")
    axes[-1].set_xlabel(chart.x)
    figure.suptitle(chart.title, y=1 - 0.15 / height)
    if len(shown) > 1:
        look: dict[str, Any] = {"ncols": LEGEND_COLUMNS, "fontsize": "small", "frameon": False}
        figure.legend(shown.values(), shown.keys(), loc="lower center", **look)
    return figure


def title_of(panel: Panel | Heat) -> str:
    return panel.label if isinstance(panel, Panel) else f"{panel.label} (darkest: ±{largest(panel):.2g})"


def largest(panel: Heat) -> float:
    """The size of the number with the darkest color."""
    return float(np.abs(panel.values).max()) or 1.0


def height_of(panel: Panel | Heat) -> int:
    """In pixels of the page."""
    return panel.height if isinstance(panel, Panel) else 40 + 16 * len(panel.rows)


def _lines(axis: Axes, panel: Panel, shown: dict[str, Artist]) -> None:
    for line in panel.lines:
        (handle,) = axis.plot(
            line.x,
            line.y,
            linestyle=line.dash,
            color=line.color,
            linewidth=1.4,
            drawstyle="steps-post" if line.holds else "default",
            marker="o" if line.has_marks else None,
            markersize=3,
        )
        shown.setdefault(line.label, handle)
    if panel.is_log:
        logarithmic(axis, np.concatenate([line.y for line in panel.lines]))
    axis.grid(alpha=0.3)


def _heat(axis: Axes, panel: Heat) -> None:
    most = largest(panel)
    rows = np.arange(len(panel.rows) + 1)
    axis.pcolormesh(panel.edges, rows, panel.values, cmap="RdBu_r", norm=TwoSlopeNorm(0.0, -most, most))
    axis.set_yticks(rows[:-1] + 0.5, panel.rows)
    axis.invert_yaxis()
