"""The tables and the plot that are made of results."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from rlsched.files import write

TABLE, PLOT = "table.md", "plot.png"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], labels: int = 1) -> str:
    """A Markdown table. Rows may end early; the first `labels` columns are words, and the others numbers."""
    lines = [head, ["---"] * labels + ["--:"] * (len(head) - labels)]
    lines += [[*row, *[""] * (len(head) - len(row))] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def signed(value: float, digits: int = 3) -> str:
    """A number with its sign, which is a minus and no hyphen."""
    return f"{value:+.{digits}f}".replace("-", "−")


def publish(out: Path, table: str, plot: Figure) -> str:
    """Write `table.md` and `plot.png` beside the results in `out`, and return the table."""
    write(out / TABLE, f"{table}\n".encode())
    save(plot, out / PLOT)
    return table


def save(figure: Figure, path: Path) -> Path:
    """Write a picture, in one move; returns its path."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return write(path, picture.getvalue())
