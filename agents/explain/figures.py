"""Pictures of why a policy decided so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from rlsched.agents.explain.attribution import Attribution, importance, importance_over_run
from rlsched.agents.explain.decisions import Decisions
from rlsched.agents.explain.response import Response
from rlsched.agents.explain.surrogate import Rules

MOST_ROWS = 12  # of features in a heat map
COLUMNS = 4  # of response curves
BINS = 40  # of a histogram of what was seen


def importance_figure(controls: Sequence[str], attribution: Attribution, decisions: Decisions) -> Figure:
    """Of each control, what moves it most: over all decisions, and in each tenth of a run."""
    over_run = importance_over_run(attribution, decisions.progress)
    whole = importance(attribution)
    rows = min(MOST_ROWS, len(attribution.features))
    figure = Figure(figsize=(10.5, (0.26 * rows + 0.9) * len(controls)), layout="constrained")
    axes = figure.subplots(len(controls), 2, squeeze=False, gridspec_kw={"width_ratios": (2, 3)})
    for i, (control, (bars, heat)) in enumerate(zip(controls, axes, strict=True)):
        order = np.argsort(-whole[i])[:rows]
        bars.barh(range(rows), whole[i][order], color="tab:blue")
        bars.set_yticks(range(rows), [attribution.features[k] for k in order])
        bars.invert_yaxis()
        bars.set_title(f"{control}: mean size of the attribution", fontsize="medium")
        image = heat.imshow(
            over_run[:, i, order].T, aspect="auto", cmap="viridis", vmin=0, extent=(0, 100, rows - 0.5, -0.5)
        )
        heat.set_yticks([])
        heat.set_title("the same, in each tenth of a run", fontsize="medium")
        figure.colorbar(image, ax=heat, pad=0.01)
    axes[-1][0].set_xlabel("action, before it is clipped")
    axes[-1][1].set_xlabel("done of the run, %")
    return figure


def decisions_figure(controls: Sequence[str], attribution: Attribution, decisions: Decisions, course: int) -> Figure:
    """The decisions of one course: the action, as it was and as it was applied, and what it owes to each feature."""
    here = decisions.course == course
    steps, values = decisions.steps[here], attribution.values[here]
    rows = min(MOST_ROWS, len(attribution.features))
    count = len(controls)
    figure = Figure(figsize=(11, (0.22 * rows + 2.2) * count), layout="constrained")
    axes = figure.subplots(
        2 * count,
        2,
        squeeze=False,
        sharex="col",
        gridspec_kw={"height_ratios": [1.2, 0.2 * rows] * count, "width_ratios": (60, 1)},
    )
    edges = np.concatenate([steps, steps[-1:] + (steps[-1:] - steps[-2:-1] if len(steps) > 1 else 1)])
    for i, control in enumerate(controls):
        line, heat = axes[2 * i][0], axes[2 * i + 1][0]
        line.axhline(attribution.baseline_action[i], color="tab:gray", linestyle=":", label="at a typical observation")
        for name, style, actions in (("applied", "-", decisions.applied), ("before clipping", "--", decisions.actions)):
            series = actions[here, i].numpy()
            line.step(edges, np.append(series, series[-1]), style, where="post", label=name)
        line.set_ylabel(f"{control}\naction")
        line.grid(alpha=0.3)
        order = np.argsort(-np.abs(values[:, i]).mean(0))[:rows]
        most = float(np.abs(values[:, i]).max()) or 1.0
        mesh = heat.pcolormesh(
            edges, np.arange(rows + 1), values[:, i][:, order].T, cmap="RdBu_r", norm=TwoSlopeNorm(0.0, -most, most)
        )
        heat.set_yticks(np.arange(rows) + 0.5, [attribution.features[k] for k in order], fontsize="small")
        heat.invert_yaxis()
        axes[2 * i][1].axis("off")
        figure.colorbar(mesh, cax=axes[2 * i + 1][1], label="attribution")
    axes[0][0].legend(fontsize="small", ncols=3, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    axes[0][0].set_title(
        f"{decisions.courses[course]}: red raises the action, blue lowers it", loc="left", fontsize="medium"
    )
    axes[-1][0].set_xlabel("inner steps")
    return figure


def response_figure(
    control: str,
    place: int,
    found: Mapping[str, Response],
    order: Sequence[str],
    decisions: Decisions,
    names: Sequence[str],
) -> Figure:
    """The response of a control to each observation, most important first, above how often it was seen.

    Args:
        control: the control, which is the one at `place` of the policy's.
        place: see above.
        found: the responses.
        order: their names, as they are to be shown.
        decisions: they are of these.
        names: of the policy's observations.
    """
    rows = -(-len(order) // COLUMNS)
    width, height = 3.0 * COLUMNS, 2.1 * rows + 0.9  # inches
    figure = Figure(figsize=(width, height))  # margins by hand: the layout engine takes seconds for so many panels
    margins = {"left": 0.45 / width, "right": 1 - 0.1 / width, "bottom": 0.85 / height, "top": 1 - 0.4 / height}
    grid = {**margins, "wspace": 0.12, "hspace": 0.35}
    axes = figure.subplots(rows, COLUMNS, squeeze=False, sharey=True, gridspec_kw=grid).ravel()
    for axis, name in zip(axes, order, strict=False):
        response = found[name]
        values = response.values
        seen = decisions.observations[:, names.index(name)].numpy()
        density = axis.twinx()
        density.hist(seen, BINS, range=(values[0], values[-1]), color="tab:gray", alpha=0.3)
        density.set_yticks([])
        density.set_ylim(0, 2.5 * density.get_ylim()[1])
        axis.axhline(0, color="black", linewidth=0.6)
        axis.fill_between(values, response.low[:, place], response.high[:, place], color="tab:blue", alpha=0.2)
        axis.plot(values, response.mean[:, place], color="tab:blue", label="mean over the decisions")
        axis.plot(values, response.typical[:, place], "--", color="tab:orange", label="all else typical")
        axis.set_xlabel(name, fontsize="small", labelpad=1)
        axis.tick_params(labelsize="small")
        axis.set_zorder(density.get_zorder() + 1)
        axis.patch.set_visible(False)
    for axis in axes[len(order) :]:
        axis.axis("off")
    handles, labels = axes[0].get_legend_handles_labels()
    title = (
        f"{control}: action before clipping, by what is seen (band: the middle 80 % of the decisions; gray: how often)"
    )
    figure.suptitle(title, fontsize="medium", y=1 - 0.1 / height, va="top")
    figure.legend(handles, labels, loc="lower center", ncols=2, fontsize="small", frameon=False)
    return figure


def fidelity_figure(controls: Sequence[str], rules: Sequence[Rules], decisions: Decisions) -> Figure:
    """What surrogates predict for runs that they have not met, against what the policy decided."""
    kinds = sorted({each.kind for each in rules})
    figure = Figure(figsize=(3.1 * len(controls), 3.1 * len(kinds)), layout="constrained")
    axes = figure.subplots(len(kinds), len(controls), squeeze=False)
    for each in rules:
        place = controls.index(each.control)
        axis = axes[kinds.index(each.kind)][place]
        actions = decisions.actions[:, place].numpy()
        ends = _range(actions)
        axis.plot(ends, ends, color="black", linewidth=0.8)
        axis.scatter(actions, each.fidelity.predicted, s=4, alpha=0.25, linewidths=0)
        axis.set(xlim=ends, ylim=ends)
        axis.set_title(f"{each.control}, {each.kind}: R² = {each.fidelity.r2:.2f}", fontsize="medium")
        axis.set_xlabel("the policy's action")
    for row in axes:
        row[0].set_ylabel("predicted, of runs held out")
    return figure


def _range(actions: NDArray[np.float32]) -> tuple[float, float]:
    low, high = float(actions.min()), float(actions.max())
    margin = 0.05 * (high - low) or 0.1
    return low - margin, high + margin
