"""The trials of a study, trained side by side, and the best of them played again."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial
from tqdm import tqdm

from rlsched.agents.config import COUNT, TrainConfig
from rlsched.agents.evaluation import environment_options, evaluate, references, scores
from rlsched.agents.ppo import POLICY, check_tasks
from rlsched.envs import SchedulingVectorEnv
from rlsched.envs.mixtures import mixture
from rlsched.experiments.benchmark.analysis import report as benchmark_report
from rlsched.experiments.benchmark.run import Plan as BenchmarkPlan
from rlsched.experiments.benchmark.run import run as benchmark
from rlsched.experiments.tune.analysis import FRESH, Report, in_words
from rlsched.experiments.tune.study import Plan, Study
from rlsched.experiments.tune.workers import Died, Done, Evaluated, Failed, Message, Stopped, Workers
from rlsched.files import locked
from rlsched.policy import SchedulePolicy

DEVELOPMENT = "development"
SHORT = (0.1, 1.0, 10.0)  # base learning rates of the benchmark, as factors on the usual ones
MORE = 2  # times as many episodes, when the best few are played again


def tune(plan: Plan, out: Path, jobs: int = 2, *, few: int = 3, suite: str | None = None) -> Report:
    """Train the trials of a plan that are not there yet, play the best few again, and write the report.

    The folder gets `study.json`, Optuna's journal, a folder for each trial, and what `Report.publish` writes.

    Args:
        plan: what to do.
        out: folder of the study, which is this command's alone meanwhile.
        jobs: trials that are trained side by side, in a process of one thread each.
        few: so many of the best are played again, in other episodes, by which the best one is chosen.
        suite: "development", to have these few do the benchmark's development suite in a short form too.

    Raises:
        ValueError: a value is out of its range; the folder holds another study; the tasks cannot be trained on.
        OSError: the folder is in use by another process, or cannot be written to.
    """
    for name, value in (("jobs", jobs), ("best", few)):
        if value not in COUNT:
            raise ValueError(f"{name} must be a whole number, {COUNT}, got {value}")
    if suite not in (None, DEVELOPMENT):
        raise ValueError(f"suite must be {DEVELOPMENT!r}, got {suite!r}: nothing is chosen by the tasks of another one")
    check_tasks(plan.config)
    with locked(out):
        study = Study(plan, out)
        if study.taken_up:
            print(f"{study.taken_up} trials were interrupted, and go on from their checkpoints", file=sys.stderr)
        with Workers(jobs) as workers, _progress(study) as progress:
            while True:
                while len(workers.busy) < jobs and (begun := study.begin()) is not None:
                    _begin(study, workers, progress, begun)
                if not workers.busy:
                    break
                for number, message in workers.wait():
                    _settle(study, workers, progress, number, message)
        best = study.complete()[:few]
        _play_again(study, best)
        report = Report(study, best)
        report.publish()
        if suite is not None and best:
            _benchmark(study, best, jobs)
    return report


def _begin(study: Study, workers: Workers, progress: _Progress, number: int) -> None:
    try:
        config = study.config(number)
    except ValueError as error:
        study.failed(number, f"{type(error).__name__}: {error}")
        progress.ended(number)
    else:
        workers.begin(number, config)


def _settle(study: Study, workers: Workers, progress: _Progress, number: int, message: Message) -> None:
    """Write down what was said of a trial, answer it, and tell it to whoever watches."""
    if isinstance(message, Evaluated):
        workers.answer(number, study.evaluated(number, message.timesteps, message.scores))
        progress.heard(number, message.timesteps / study.plan.config.timesteps)
        return
    if isinstance(message, Died):
        how = f"with the exit code {message.exit_code}"
        if study.died(number, how):
            progress.tell(f"trial {number}: its process died {how}; another one goes on from the checkpoint")
            workers.begin(number, study.config(number))
            return
    elif isinstance(message, Done):
        study.done(number, message.scores)
    elif isinstance(message, Stopped):
        study.pruned(number)
    elif isinstance(message, Failed):
        study.failed(number, message.reason)
    else:
        raise message.error  # of this machine, not of the trial, which goes on when the command does
    progress.ended(number)


class _Progress:
    """A bar over all trials, and a line for each that has ended."""

    def __init__(self, study: Study, bar: Any) -> None:
        self.study, self.bar = study, bar
        self.parts: dict[int, float] = {}  # of running trials: how far they are
        self.show()

    def heard(self, number: int, part: float) -> None:
        self.parts[number] = min(part, 1.0)
        self.show()

    def ended(self, number: int) -> None:
        self.parts.pop(number, None)
        self.tell(f"trial {number}: {in_words(self.study, self.study.trials[number])}")
        self.show()

    def tell(self, line: str) -> None:
        self.bar.write(line, file=sys.stderr)

    def show(self) -> None:
        study = self.study
        ended = sum(trial.state.is_finished() for trial in study.trials)
        best = study.complete()[:1]
        said = f", best {study.plan.objective} {best[0].value:.3f} (trial {best[0].number})" if best else ""
        self.bar.set_description_str(f"{ended} of {study.plan.number} trials{said}", refresh=False)
        self.bar.n = min(self.bar.total, ended + sum(self.parts.values()))
        self.bar.refresh()


@contextmanager
def _progress(study: Study) -> Iterator[_Progress]:
    shown = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(total=max(study.plan.number, len(study.trials)), bar_format=shown, file=sys.stderr) as bar:
        yield _Progress(study, bar)


def _play_again(study: Study, best: Sequence[FrozenTrial]) -> None:
    """Give each of these trials its scores in other episodes than it was chosen by, if it has none yet."""
    against: dict[str, Any] = {}
    for trial in best:
        if study.noted(trial.number, FRESH) is not None:
            continue
        config = study.config(trial.number)
        episodes = {"episodes": MORE * config.eval_episodes, "seed": config.eval_seed + config.eval_episodes}
        print(f"trial {trial.number} plays {episodes['episodes']} other episodes", file=sys.stderr)

        def make(num_envs: int, config: TrainConfig = config, **options: Any) -> SchedulingVectorEnv:
            tasks = mixture(config.tasks)[: num_envs // options.get("clones", 1)]
            return SchedulingVectorEnv(num_envs, tasks, device=config.device, **options)

        if config.base_schedule not in against:
            against[config.base_schedule] = references(config.base_schedule, make, **episodes)
        policy = SchedulePolicy.load(study.folder(trial.number) / POLICY)
        options = {**environment_options(policy), "trust": config.trust}
        with closing(make(episodes["episodes"], **options)) as env:
            played = evaluate(policy, seed=episodes["seed"], env=env, show=True)
        study.annotate(trial.number, FRESH, scores(played, *against[config.base_schedule]))


def _benchmark(study: Study, best: Sequence[FrozenTrial], jobs: int) -> None:
    """The development suite in a short form: one seed, three base learning rates."""
    policies = {f"trial-{trial.number}": SchedulePolicy.load(study.folder(trial.number) / POLICY) for trial in best}
    out = study.out / DEVELOPMENT
    benchmark(BenchmarkPlan(DEVELOPMENT, seeds=1, base_lrs=SHORT), policies, out, jobs)
    benchmark_report(out)
