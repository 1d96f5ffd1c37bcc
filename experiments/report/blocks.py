"""What a report is made of, whoever draws it: sections of text, charts and pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice

import matplotlib.figure
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
# Of matplotlib ("tab10"), but for its gray, which says "base": they can be told apart on a light and on a dark page.
PALETTE = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#bcbd22", "#17becf")
GRAY = "#8a8a8a"
DETAILED = 4  # times fewer points of what has details, and columns, than of other curves
SOLID, DASHED, DOTTED = "solid", "dashed", "dotted"


@dataclass(frozen=True)
class Line:
    """A curve."""

    label: str  # of the legend, which shows what has the same one as one
    x: Array  # (n,)
    y: Array  # (n,): NaN where it is not known
    color: str = PALETTE[0]
    dash: str = SOLID
    holds: bool = False  # from a point to the next, as hyperparameters do
    has_marks: bool = False
    # Of a point, beside x and y: by name a number, (n,), or two, (n, 2), what was seen and the part that it had.
    details: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Panel:
    """Curves that share an axis."""

    label: str  # of the y-axis
    lines: Sequence[Line]
    is_log: bool = False
    height: int = 190  # pixels


@dataclass(frozen=True)
class Heat:
    """Numbers as colors, red above zero and blue below: a column for each part of the x-axis, a row for each name."""

    label: str
    edges: Array  # (n + 1,): of the columns
    rows: Sequence[str]
    values: Array  # (rows, n)


@dataclass(frozen=True)
class Chart:
    """Panels one below the other, which share their x-axis."""

    name: str  # of its picture
    title: str
    panels: Sequence[Panel | Heat]
    note: str = ""  # Markdown: how to read it
    x: str = "inner steps"
    is_log: bool = False  # the x-axis


@dataclass(frozen=True)
class Picture:
    """One that is drawn already."""

    name: str
    title: str
    image: matplotlib.figure.Figure | bytes  # or a PNG
    is_folded: bool = False  # shown only when its title is clicked


@dataclass(frozen=True)
class Text:
    """Markdown; with a summary, what is shown only when that is clicked."""

    markdown: str
    summary: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading."""

    title: str
    blocks: Sequence[Text | Chart | Picture]


def looks(number: int) -> list[tuple[str, str]]:
    """Colors and dashes that tell so many curves apart."""
    return list(islice(cycle((color, dash) for dash in (SOLID, DASHED, DOTTED) for color in PALETTE), number))


def file_name(text: str) -> str:
    """What a file can be called."""
    return re.sub(r"[^a-zA-Z0-9]+", "-", text).strip("-").lower()


def one_line(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def colors(number: int) -> list[str]:
    return list(islice(cycle(PALETTE), number))


def fineness(panel: Panel | Heat) -> int:
    """The number of points below which a panel cannot be thinned without a loss."""
    if isinstance(panel, Heat):
        return DETAILED * panel.values.shape[1]
    return max((_fineness(line) for line in panel.lines), default=0)


def thinned(panel: Panel | Heat, most: int) -> Panel | Heat:
    """The panel with at most about so many points in each curve, and a part of it where each point has details.

    Of a curve the lowest and the highest point of each of its parts are kept, so that no spike is lost. What has
    details, or columns, is taken at even distances.
    """
    if isinstance(panel, Panel):
        return replace(panel, lines=[_thinned(line, most) for line in panel.lines])
    if fineness(panel) <= most:
        return panel
    chosen = _evenly(panel.values.shape[1], most // DETAILED)
    return replace(panel, edges=np.append(panel.edges[chosen], panel.edges[-1]), values=panel.values[:, chosen])


def _fineness(line: Line) -> int:
    return DETAILED * len(line.x) if line.details else len(line.x)


def _thinned(line: Line, most: int) -> Line:
    if _fineness(line) <= most:
        return line
    chosen = _evenly(len(line.x), most // DETAILED) if line.details else _extremes(line.y, most)
    details = {name: values[chosen] for name, values in line.details.items()}
    return replace(line, x=line.x[chosen], y=line.y[chosen], details=details)


def _evenly(n: int, most: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, n - 1, most).round().astype(np.int64))


def _extremes(y: Array, most: int) -> NDArray[np.int64]:
    """Places of the first, the last, and of the lowest and the highest in each of `most` / 2 parts."""
    low, high = np.where(np.isnan(y), np.inf, y), np.where(np.isnan(y), -np.inf, y)
    chosen = [0, len(y) - 1]
    for part in np.array_split(np.arange(len(y)), max(1, most // 2)):
        chosen += [int(part[low[part].argmin()]), int(part[high[part].argmax()])]
    return np.unique(chosen)
