"""Pictures of evaluations for TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rlsched.agents.evaluation import Evaluation
from rlsched.control import CONTROLS
from rlsched.envs.rendering import logarithmic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What each row of a picture shows, by the info that it is of.
ROWS = {
    **{name: name.replace("_", " ") for name in CONTROLS},
    "clip": "clip (× mean norm)",
    "validation_loss": "validation loss",
}
LINEAR = {"momentum": (-0.03, 1.03)}  # the limits of what is not shown on a logarithmic axis
POLICY_STYLE = {"color": "tab:red", "linewidth": 2.0}
BASE_STYLE = {"color": "tab:blue", "linewidth": 1.5, "linestyle": "--"}
TUNED_COLOR = "tab:green"


def samples(families: Sequence[str], optimizers: Sequence[str], number: int = 4) -> list[int]:
    """Episodes to show: of families from all over the mixture, the kinds of optimizers in turn.

    Args:
        families, optimizers: of each episode.
        number: of samples, or as many as there are episodes.
    """
    known, kinds = list(dict.fromkeys(families)), sorted(set(optimizers))
    if len(known) > number:
        known = [known[round(i)] for i in np.linspace(0, len(known) - 1, number)]
    chosen: list[int] = []
    for k in range(min(number, len(families))):
        family, kind = known[k % len(known)], kinds[(k % len(known) + k // len(known)) % len(kinds)]
        left = [i for i in range(len(families)) if i not in chosen]
        chosen.append(min(left, key=lambda i: (families[i] != family, optimizers[i] != kind)))
    return chosen


def episode_picture(policy: Evaluation, zero: Evaluation, episode: int, called: str) -> Figure:
    """All controls and the validation loss of an episode, beside those of the base schedule, one below the other."""
    from matplotlib.figure import Figure

    width, height = 5.2, 1.3 * len(ROWS) + 1.3  # inches
    figure = Figure(figsize=(width, height))  # margins by hand: the layout engines of matplotlib take seconds
    axes = figure.subplots(
        len(ROWS),
        sharex=True,
        gridspec_kw={
            "left": 0.95 / width,
            "right": 1 - 0.12 / width,
            "bottom": 0.5 / height,
            "top": 1 - 0.82 / height,
            "hspace": 0.14,
        },
    )
    outcomes = [f"{what} {_outcome(played, episode)}" for what, played in (("policy", policy), ("base", zero))]
    figure.suptitle(f"{called}\nreturn: {', '.join(outcomes)}", fontsize=11, y=1 - 0.1 / height)
    for axis, (key, label) in zip(axes, ROWS.items(), strict=True):
        for played, name, style in ((policy, "policy", POLICY_STYLE), (zero, "base schedule", BASE_STYLE)):
            axis.plot(played.paths["inner_steps"][episode], played.paths[key][episode], label=name, **style)
        values = np.concatenate([played.paths[key][episode] for played in (policy, zero)])
        values = values[np.isfinite(values)]
        if key in LINEAR:
            axis.set_ylim(LINEAR[key])
        elif values.any():
            logarithmic(axis, values)
        else:
            axis.set_yticks([0])
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="upper center",
        bbox_to_anchor=(0.5, 1 - 0.45 / height),
        ncols=2,
        frameon=False,
    )
    axes[-1].set_xlabel("inner steps")
    figure.align_ylabels()
    return figure


def family_picture(
    policy: NDArray[np.float64], zero: NDArray[np.float64], tuned: NDArray[np.float64], families: Sequence[str]
) -> Figure:
    """Mean returns in each family; on top, where the policy is the furthest below the tuned base schedule.

    A mixture has up to dozens of families: as curves in one chart they could not be told apart.

    Args:
        policy, zero, tuned: returns of each episode, (episodes,).
        families: of each episode.
    """
    from matplotlib.figure import Figure

    def means(returns: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.array([returns[labels == name].mean() for name in known])

    labels, known = np.array(families), np.array(list(dict.fromkeys(families)))
    known = known[np.argsort(means(tuned - policy), kind="stable")]
    width, height, rows = 4.4, 0.2 * len(known) + 1.2, np.arange(len(known))
    figure = Figure(figsize=(width, height))
    axis = figure.add_axes((1.6 / width, 0.5 / height, 1 - 1.75 / width, 1 - 1.05 / height))
    axis.hlines(rows, means(zero), means(tuned), color="lightgray", linewidth=3, zorder=0)
    for returns, name, marker, color, size in (
        (zero, "base schedule", "|", BASE_STYLE["color"], 9),
        (tuned, "tuned", "|", TUNED_COLOR, 9),
        (policy, "policy", "o", POLICY_STYLE["color"], 5),
    ):
        axis.plot(means(returns), rows, marker, color=color, label=name, markersize=size, markeredgewidth=2)
    axis.set_yticks(rows, [str(name) for name in known], fontsize=8)
    axis.set_ylim(-0.6, len(known) - 0.4)
    axis.set_xlabel("return")
    axis.grid(alpha=0.3)
    figure.legend(loc="upper center", bbox_to_anchor=(0.5, 1 - 0.05 / height), ncols=3, frameon=False, fontsize=9)
    return figure


def _outcome(played: Evaluation, episode: int) -> str:
    return "diverged" if played.diverged[episode] else f"{played.returns[episode]:.2f}"
