"""Pictures of episodes for TensorBoard."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlsched.agents.evaluation import Evaluation
from rlsched.control import CONTROLS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What each row of pictures shows, by the info that it is of.
ROWS = {name: name.replace("_", " ") for name in (*CONTROLS, "validation_loss")}
LINEAR = {"momentum": (0.0, 1.0)}  # the limits of what is not shown on a logarithmic axis


def episode_paths(policy: Evaluation, zero: Evaluation, episodes: int = 4) -> Figure:
    """All controls and the validation loss of the first episodes, beside those of the zero policy."""
    from matplotlib.figure import Figure

    episodes = min(episodes, len(policy.returns))
    width, height = 1 + 3 * episodes, 2 * len(ROWS)  # inches
    figure = Figure(figsize=(width, height))  # margins by hand: the layout engines of matplotlib take seconds
    margins = {"left": 0.9 / width, "right": 1 - 0.1 / width, "bottom": 0.5 / height, "top": 1 - 0.4 / height}
    axes = figure.subplots(
        len(ROWS), episodes, sharex="col", squeeze=False, gridspec_kw={**margins, "wspace": 0.28, "hspace": 0.12}
    )
    for column in range(episodes):
        adaptive = policy.paths["adaptive"][column][0] > 0
        axes[0][column].set_title(f"episode {column}, {'adaptive' if adaptive else 'SGD'}")
        axes[-1][column].set_xlabel("inner steps")
        for row, (key, label) in zip(axes[:, column], ROWS.items(), strict=True):
            row.plot(policy.paths["inner_steps"][column], policy.paths[key][column], label="policy")
            row.plot(zero.paths["inner_steps"][column], zero.paths[key][column], "--", label="base schedule")
            if key in LINEAR:
                row.set_ylim(LINEAR[key])
            elif min(policy.paths[key][column].min(), zero.paths[key][column].min()) > 0:
                row.set_yscale("log")
            row.tick_params(which="both", labelsize=7)
            if column == 0:
                row.set_ylabel(label)
    axes[0][0].legend()
    return figure
