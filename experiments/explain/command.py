"""The verb `explain`: what it takes, where it finds decisions, what it writes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rlsched.agents.config import COUNT, SEED

NEEDS = ("torch", "rlsched.agents.evaluation", "rlsched.experiments.explain.explanation")
EXPLAIN = """\
Why a policy decides as it does: what each action owes to each observation (integrated gradients), how it follows each
of them (response curves), what matters when in a run, and rules that say nearly the same, with how nearly. Of
decisions in episodes of a mixture of inner tasks, or of your own runs: give --run the log_dir of a run under this
policy. Rules are held against runs that they were not made of, so that --run needs at least two for them.

Writes explanation.md and .json, CSV tables and pictures to the folder --out, and prints the story. docs/explain.md says
how to read it. Actions are explained as they are before they are clipped to [−1, 1].

examples:
  rlsched explain default
  rlsched explain default --run runs/mine
  rlsched explain runs/mine/policy.safetensors --tasks broad --episodes 100 --out runs/mine/explain
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    from rlsched.policy import available

    shipped = ", ".join(available()) or "none"
    parser.description = EXPLAIN
    parser.add_argument("policy", help=f"policy file, or a shipped policy ({shipped})")
    parser.add_argument(
        "--run", dest="runs", nargs="+", type=Path, metavar="RUN", help="explain these runs instead: their log_dir"
    )
    parser.add_argument("--tasks", help="mixture of inner tasks to play: a key of rlsched.envs.MIXTURES (default: mlp)")
    parser.add_argument("--episodes", type=int, help="to play (default: 48)")
    parser.add_argument("--seed", type=int, help="of the first episode (default: 1000000)")
    parser.add_argument("--out", type=Path, default=Path("runs/explain"), help="(default: runs/explain)")


def run(options: argparse.Namespace) -> None:
    """Explain as the options say, write it down, and print the story."""
    from rlsched.experiments.explain.explanation import explanation
    from rlsched.files import make_folder
    from rlsched.policy import SchedulePolicy

    policy = SchedulePolicy.load(options.policy)
    make_folder(options.out)  # one that cannot be made is better known before the first episode
    decisions, source = _decisions(policy, options)
    print(explanation(policy, str(options.policy), decisions, source, show=True).publish(options.out))


def _decisions(policy: Any, options: argparse.Namespace) -> tuple[Any, str]:
    """What is to be explained, and where it comes from in words."""
    import torch

    from rlsched.agents.evaluation import evaluate
    from rlsched.agents.explain.decisions import of_episodes, of_runs

    played = {name: getattr(options, name) for name in ("tasks", "episodes", "seed")}
    given = [name for name, value in played.items() if value is not None]
    if options.runs:
        if given:
            raise ValueError(f"--{given[0]} is of episodes to be played, and --run of runs that were: give one of them")
        return of_runs(policy, options.runs), "of " + ", ".join(map(str, options.runs))
    tasks, episodes, seed = played["tasks"] or "mlp", played["episodes"], played["seed"]
    episodes, seed = 48 if episodes is None else episodes, 1_000_000 if seed is None else seed
    for name, value, within in (("episodes", episodes, COUNT), ("seed", seed, SEED)):
        if value not in within:
            raise ValueError(f"--{name} must be a whole number, {within}, got {value}")
    torch.set_num_threads(min(2, torch.get_num_threads()))  # the networks are small: more cost more than they give
    evaluation = evaluate(policy, tasks, episodes=episodes, seed=seed, show=True)
    return of_episodes(policy, evaluation), f"in {episodes} episodes of the mixture {tasks}, from seed {seed}"
