"""Results on disk: JSON lines, each with where it comes from; the table and the plot that are made of them."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import rlsched

TABLE, PLOT = "table.md", "plot.png"
CPUINFO = Path("/proc/cpuinfo")  # of Linux


def provenance() -> dict[str, str]:
    """Where a result comes from: versions, commit and machine."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "rlsched": rlsched.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": git.stdout.strip(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "processor": _processor(),
    }


def read(path: Path) -> list[dict[str, Any]]:
    """The results in a file of JSON lines."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}, is not a result ({error}); delete the line and run again"
            ) from None
    return rows


def publish(out: Path, table: str, plot: Figure) -> str:
    """Write `table.md` and `plot.png` beside the results in `out`, and return the table."""
    (out / TABLE).write_text(table + "\n")
    plot.savefig(out / PLOT, dpi=110)
    return table


def _processor() -> str:
    found = re.search(r"model name\s*: (.*)", CPUINFO.read_text()) if CPUINFO.exists() else None
    return found[1] if found else platform.processor()
