"""Table and plot of the costs, from their `runs.jsonl` and nothing else."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from rlsched.experiments.cost.loops import PLAIN
from rlsched.experiments.cost.run import RUNS, key
from rlsched.experiments.journal import Row, read
from rlsched.experiments.table import markdown, publish


def report(out: Path) -> str:
    """Write `table.md` and `plot.png` beside the `runs.jsonl` in `out`, and return the table."""
    rows = list(read(out / RUNS, key).values())
    return publish(out, table(rows), plot(rows))


def table(rows: list[Row]) -> str:
    """Time per step and memory over those of the plain loop, as a Markdown table."""
    kinds = list(dict.fromkeys(row["case"]["loop"] for row in rows))
    cells = {(r["case"]["network"], r["case"]["optimizer"], r["case"]["loop"]): r for r in rows}
    lines = []
    for network, optimizer in dict.fromkeys((network, optimizer) for network, optimizer, _ in cells):
        plain = cells[network, optimizer, PLAIN]
        line = [network, optimizer, f"{plain['parameters']:,}", f"{plain['milliseconds']:.3g}"]
        lines.append([*line, *(_cell(cells.get((network, optimizer, kind))) for kind in kinds[1:])])
    rounds = [row["rounds"] for row in rows]
    caption = (
        f"Time per step over that of the same loop with {PLAIN}, median of {min(rounds)} to {max(rounds)} interleaved "
        "rounds [quartiles]; memory that the loop keeps (weights, gradients, state), over that of the same. "
        f"{rows[0]['threads']} threads."
    )
    head = ["network", "optimizer", "parameters", "ms per step", *kinds[1:]]
    return f"{markdown(head, lines, labels=2)}\n\n{caption}"


def plot(rows: list[Row]) -> Figure:
    """Time per step over that of the plain loop by the size of the network, for each optimizer."""
    optimizers = list(dict.fromkeys(row["case"]["optimizer"] for row in rows))
    figure = Figure(figsize=(6 * len(optimizers), 4.5), layout="constrained")
    for axis, optimizer in zip(figure.subplots(1, len(optimizers), squeeze=False)[0], optimizers, strict=True):
        for kind in dict.fromkeys(row["case"]["loop"] for row in rows):
            mine = [r for r in rows if (r["case"]["optimizer"], r["case"]["loop"]) == (optimizer, kind)]
            mine.sort(key=lambda row: row["parameters"])
            if mine and kind != PLAIN:
                sizes, ratios = [r["parameters"] for r in mine], [r["ratio"] for r in mine]
                spread = [[abs(r["ratio"] - r["quartiles"][i]) for r in mine] for i in (0, 1)]
                axis.errorbar(sizes, ratios, spread, fmt="o-", capsize=3, label=kind)
        axis.axhline(1.0, color="black", linewidth=0.8, label=PLAIN)
        axis.set(xscale="log", xlabel="parameters", ylabel="time per step, ratio", title=optimizer)
        axis.legend(fontsize="small")
    return figure


def _cell(row: Row | None) -> str:
    if row is None:
        return "–"
    low, high = row["quartiles"]
    return f"{row['ratio']:.3f} [{low:.3f}, {high:.3f}], memory {row['bytes_ratio']:.3f}"
