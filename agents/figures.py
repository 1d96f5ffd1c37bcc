"""Pictures of episodes for TensorBoard."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlsched.agents.evaluation import Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS = (
    ("lr", "learning rate", "log"),
    ("momentum", "momentum", "linear"),
    ("clip", "clip multiple (none: off)", "log"),
    ("validation_loss", "validation loss", "log"),
)
LIMITS = {"momentum": (0.0, 1.0), "clip": (0.4, 12.0)}


def episode_paths(policy: Evaluation, zero: Evaluation, episodes: int = 4) -> Figure:
    """Learning rate, momentum, clip multiple and validation loss of the first episodes, beside the zero policy's."""
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
        for row, (key, label, scale) in zip(axes[:, column], ROWS, strict=True):
            row.plot(policy.paths["inner_steps"][column], policy.paths[key][column], label="policy")
            row.plot(zero.paths["inner_steps"][column], zero.paths[key][column], "--", label="fallback")
            row.set_yscale(scale)
            row.set_ylim(LIMITS.get(key))
            row.tick_params(which="both", labelsize=7)
            if column == 0:
                row.set_ylabel(label)
    axes[0][0].legend()
    return figure
