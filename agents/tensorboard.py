"""What a training writes for TensorBoard, and how to read it.

The folder `training` in that of the run holds its event files, and so gives it its name in TensorBoard. The returns of
the base schedule lie below it, as runs of their own: TensorBoard then draws them in the same charts as the policy's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat
from torch.utils.tensorboard.summary import hparams
from torch.utils.tensorboard.writer import SummaryWriter

from rlsched.agents.config import TrainConfig
from rlsched.agents.evaluation import Evaluation, scores
from rlsched.agents.figures import episode_picture, family_picture, samples

Array = NDArray[np.float32] | NDArray[np.float64]

LOG = "training"  # folder of the event files, in that of the run
BASE, TUNED = "base_schedule", "tuned"  # runs below it

# Tags are numbered in the order in which they are to be read, for TensorBoard sorts them.
RETURN = "1 return/all episodes"
BY_FAMILY = "1 return/by family"
GAIN = "1 return/gain over base"
REGRET = "1 return/regret to tuned"
BETTER = "1 return/share better than base"
DIVERGED = "1 return/share diverged"
SCORES = {"gain": GAIN, "regret": REGRET, "share_better": BETTER, "diverged": DIVERGED}
METRICS = (RETURN, *SCORES.values())
REGRET_OF = "2 regret by family"
EPISODES = "3 episodes"
FAMILY, OPTIMIZER = "4 return by family", "5 return by optimizer"
ACTIONS, OBSERVATIONS = "6 actions", "7 observations"
ROLLOUT_FAMILY, ROLLOUT_OPTIMIZER = "rollout/return by family", "rollout/return by optimizer"
SPEED = "time/timesteps per second"
ABOUT = "about/this training"

LAYOUT = {
    "1 The story": {
        "return: of the policy (training), of the base schedule, of the base schedule at the best lr (tuned)": [
            "Multiline",
            [f"{RETURN}$"],
        ],
        "gain over the base schedule, and regret: what is missing to tuned": ["Multiline", [f"{GAIN}$", f"{REGRET}$"]],
        "speed: timesteps per second": ["Multiline", [f"{SPEED}$"]],
    },
    "2 While it explores": {
        "return": ["Multiline", ["rollout/ep_rew_mean$"]],
        "return by optimizer": ["Multiline", [f"{ROLLOUT_OPTIMIZER}/.*"]],
        "standard deviation of the actions": ["Multiline", ["train/std$"]],
    },
    "3 PPO": {
        "value loss": ["Multiline", ["train/value_loss$"]],
        "explained variance of the critic (1 is perfect)": ["Multiline", ["train/explained_variance$"]],
        "KL divergence of an update": ["Multiline", ["train/approx_kl$"]],
        "share of clipped ratios": ["Multiline", ["train/clip_fraction$"]],
    },
}

# What the text card says of each of them.
MEANINGS = {
    f"`{RETURN}`": f"mean return of the policy (run `{LOG}`) and of both references. The policy should rise above "
    f"`{BASE}`, and come near `{TUNED}` or surpass it",
    f"`{BY_FAMILY}`": "the same in each family of tasks, as a picture; on top, where the most is missing to "
    f"`{TUNED}`. Click at it to see it in full size",
    f"`{GAIN}`": "return of the policy − return of the base schedule, mean",
    f"`{REGRET}`": f"return of `{TUNED}` − return of the policy, interquartile mean; below 0 the policy is better than "
    "tuning",
    f"`{BETTER}`": "share of the episodes in which the policy is better than the base schedule",
    f"`{DIVERGED}`": "share of the episodes in which the policy diverged",
    f"`{REGRET_OF}`": "the regret in each family of tasks, mean: where there is still to learn",
    f"`{EPISODES}`": "what the policy made of lr, momentum, clipping and weight decay in a few episodes, beside the "
    "base schedule. Click at a picture to see it in full size",
    f"`{FAMILY}`, `{OPTIMIZER}`": "mean returns in each family, and with each optimizer",
    f"`{ACTIONS}`, `{OBSERVATIONS}`": "all that was done and seen between two updates. The action 0 stays on the "
    "course of the base schedule; many at −1 or 1 would go faster than they can",
    "`rollout`": "the episodes that it trains on: others each time, and it explores",
    "`time`": "speed, without evaluations (`time/fps`: with them)",
    "`train`": "of PPO. `train/approx_kl` far above `target_kl`, or a `train/explained_variance` that stays near 0, "
    "are signs of trouble",
}
HOW_TO_READ = f"""\
# How to read this page

Each *episode* is the training of a small network. Its **return** is log(first / last validation loss): a return that \
is higher by 0.7 is a final loss that is half as high. Every so often the policy plays the same episodes as before. It \
is compared with two references in these, which are runs of their own: so TensorBoard draws them in the same charts.

- `{BASE}`: the base schedule, from the same base learning rates, without a policy;
- `{TUNED}`: the base schedule from the best of several base learning rates, chosen for each episode in hindsight. It \
is what a user has who tunes the learning rate of each task.

**Time Series** is numbered in the order in which to read it. **Custom Scalars** tells the story in three charts. \
**HParams** has the configuration and the latest scores, to compare trainings by; beside the log of a comparison \
TensorBoard shows the columns of one of both, so give it a folder of trainings alone.
"""


class TrainingLog:
    """The event files of a training; one that is resumed goes on with the same.

    Args:
        run_dir: folder of the training.
        config: its configuration.
        pictures: whether it has pictures of episodes, which take seconds.
    """

    def __init__(self, run_dir: Path, config: TrainConfig, pictures: bool = True) -> None:
        self.config, self.pictures = config, pictures
        folder = run_dir / LOG
        output = TensorBoardOutputFormat(str(folder))
        self.logger = Logger(str(folder), [output])  # of Stable-Baselines3's own figures
        self.writers = {name: SummaryWriter(str(folder / name)) for name in (BASE, TUNED)}
        self.writers[LOG] = output.writer

    def begin(self, step: int) -> None:
        """Write what is known before the first update: the layout, the text card, the hyperparameters."""
        writer = self.writers[LOG]
        writer.add_custom_scalars(LAYOUT)
        writer.add_text(ABOUT, _about(self.config), step)
        for summary in self._hparams()[:2]:
            self._summary(summary)
        self.flush()

    def evaluation(self, policy: Evaluation, zero: Evaluation, tuned: NDArray[np.float64], step: int) -> None:
        """Write an evaluation.

        Args:
            policy, zero: of the policy and of the base schedule.
            tuned: return of the base schedule from the best base learning rate, (episodes,).
            step: timesteps of training before it.
        """
        families, optimizers = ([str(path[0]) for path in policy.paths[what]] for what in ("family", "optimizer"))
        for run, returns in ((LOG, policy.returns), (BASE, zero.returns), (TUNED, tuned)):
            self.scalars({RETURN: float(returns.mean())}, step, run)
            self.scalars(means(FAMILY, returns, families), step, run)
            self.scalars(means(OPTIMIZER, returns, optimizers), step, run)
        found = scores(policy, zero, tuned)
        self.scalars({tag: found[name] for name, tag in SCORES.items()}, step)
        self.scalars(means(REGRET_OF, tuned - policy.returns, families), step)
        if self.pictures:
            picture = family_picture(policy.returns, zero.returns, tuned, families)
            self.writers[LOG].add_figure(BY_FAMILY, picture, step)
        for rank, i in enumerate(samples(families, optimizers) if self.pictures else (), 1):
            called = f"{families[i]}, {optimizers[i]}"
            picture = episode_picture(policy, zero, i, called)
            self.writers[LOG].add_figure(f"{EPISODES}/{rank} {called}", picture, step)
        self.flush()

    def scalars(self, values: Mapping[str, float], step: int, run: str = LOG) -> None:
        for tag, value in values.items():
            self.writers[run].add_scalar(tag, value, step)

    def histograms(self, tags: str, columns: Mapping[str, Array], step: int) -> None:
        for name, values in columns.items():
            self.writers[LOG].add_histogram(f"{tags}/{name}", values, step)

    def finish(self) -> None:
        """Write that the training is done."""
        self._summary(self._hparams()[2])

    def flush(self) -> None:
        for writer in self.writers.values():
            writer.flush()

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()

    def _hparams(self) -> Sequence[object]:
        """What the metrics are worth TensorBoard takes from the latest of the scalars that they name."""
        given = {k: v if type(v) in (int, float, str) else str(v) for k, v in self.config.hyperparameters().items()}
        summaries: Sequence[object] = hparams(given, dict.fromkeys(METRICS, 0.0))
        return summaries

    def _summary(self, summary: object) -> None:
        writer = self.writers[LOG].file_writer
        assert writer is not None
        writer.add_summary(summary)


def means(tags: str, values: Array, labels: Sequence[str]) -> dict[str, float]:
    """The mean of the values of each label, by its tag."""
    return {
        f"{tags}/{label}": float(np.mean([v for v, other in zip(values, labels, strict=True) if other == label]))
        for label in dict.fromkeys(labels)
    }


def _about(config: TrainConfig) -> str:
    """The text card, in Markdown."""
    rows = []
    for field in fields(config):
        value = getattr(config, field.name)
        shown = ", ".join(map(str, value)) if isinstance(value, tuple) else json.dumps(value)
        rows.append((f"`{field.name}`", shown, field.metadata["help"]))
    return "\n".join(
        [
            HOW_TO_READ,
            *_table(("tags", "what they are"), MEANINGS.items()),
            "\n# Configuration\n",
            *_table(("field", "value", "meaning"), rows),
        ]
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]
