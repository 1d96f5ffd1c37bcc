"""The report of some folders: what each of them is, what is told of it, and the files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from rlsched.experiments.report import explained, scheduled, studies, training
from rlsched.experiments.report.blocks import Chart, Picture, Section, Text
from rlsched.experiments.report.explained import Known
from rlsched.experiments.report.page import page
from rlsched.experiments.report.pictures import png
from rlsched.experiments.report.scheduled import ScheduledRun
from rlsched.experiments.report.studies import Study
from rlsched.experiments.report.training import TrainingRun
from rlsched.files import write
from rlsched.policy import SchedulePolicy, available

KINDS = (training, studies, scheduled)  # in the order in which a folder is asked whether it is one
MOST_NAMED = 5  # folders in an error
Run = TrainingRun | Study | ScheduledRun


def read(folder: Path) -> Run:
    """What is in a folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds nothing that can be reported, or what cannot be read.
        OSError: it cannot be read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder")
    for kind in KINDS:
        if kind.is_here(folder):
            return kind.read(folder)
    inside: list[Path] = []
    for path in sorted(path for path in folder.rglob("*") if path.is_dir()):  # a folder comes before those in it
        if _is_run(path) and not any(run in path.parents for run in inside):
            inside.append(path)
    if not inside:
        what = "is empty" if not any(folder.iterdir()) else "holds no run that can be reported"
        raise ValueError(
            f"{folder} {what}: it must be the folder of a training or a comparison, or the log_dir of a scheduled run"
        )
    shown = " ".join(map(str, inside[:MOST_NAMED])) + (" …" if len(inside) > MOST_NAMED else "")
    raise ValueError(f"{folder} is no run, but there are runs below it: report {shown}")


def _is_run(folder: Path) -> bool:
    return any(kind.is_here(folder) for kind in KINDS)


def named(folders: Sequence[Path]) -> dict[str, Path]:
    """The folders by names as short as they can be told apart by. Each is there once."""
    folders = list(dict.fromkeys(folders))
    for parts in range(1, max(len(folder.resolve().parts) for folder in folders) + 1):
        names = ["/".join(folder.resolve().parts[-parts:]) for folder in folders]
        if len(set(names)) == len(folders):
            return dict(zip(names, folders, strict=True))
    return {str(folder): folder for folder in folders}


def known(runs: Iterable[Run], given: Sequence[str]) -> dict[str, Known]:
    """Policies that runs may be of, by their digests: those that were given, of the trainings, and shipped ones."""
    found = {}
    for name in available():
        policy = SchedulePolicy.load(name)
        found[policy.digest] = Known(name, policy)
    for run in runs:
        if isinstance(run, TrainingRun) and run.policy is not None:
            found[run.policy.digest] = Known(run.folder.name, run.policy)
    for name in given:
        policy = SchedulePolicy.load(name)
        found[policy.digest] = Known(Path(name).stem, policy)
    return found


def sections(folders: Sequence[Path], policies: Sequence[str] = (), *, show: bool = False) -> list[Section]:
    """What there is to tell of the runs in these folders.

    Args:
        folders: of runs of any kind.
        policies: files or names of policies that runs may be of, beside shipped ones and those of trainings.
        show: progress bars.

    Raises:
        FileNotFoundError, ValueError, OSError: see `read`; or a policy is of none of the runs.
    """
    runs = {name: read(folder) for name, folder in named(folders).items()}
    of_users = {name: run for name, run in runs.items() if isinstance(run, ScheduledRun)}
    of_trainings = {name: run for name, run in runs.items() if isinstance(run, TrainingRun)}
    of_studies = {name: run for name, run in runs.items() if isinstance(run, Study)}
    found = known(runs.values(), policies)
    _check(policies, of_users)
    notes = [f"- `{name}`: {note}" for name, run in runs.items() for note in run.notes]
    overview = []
    if of_users:
        overview.append(Text(scheduled.overview(of_users, {digest: each.name for digest, each in found.items()})))
    if of_trainings:
        overview.append(Text(training.overview(of_trainings)))
    if of_studies:
        overview.append(Text("Studies: " + ", ".join(f"`{name}`" for name in of_studies)))
    if notes:
        overview.append(Text("**As far as it goes**\n\n" + "\n".join(notes)))
    parts = [Section("Overview", overview)]
    if of_users:
        parts += scheduled.sections(of_users)
        parts += explained.sections(of_users, found, show=show)
    if of_trainings:
        parts += training.sections(of_trainings)
    parts += [studies.section(name, study) for name, study in of_studies.items()]
    return parts


def _check(policies: Sequence[str], runs: dict[str, ScheduledRun]) -> None:
    """Raise ValueError if a policy was given that decided in none of the runs."""
    digests = {run.digest for run in runs.values()} - {None}
    for name in policies:
        digest = SchedulePolicy.load(name).digest
        if digest not in digests:
            of = " and ".join(sorted(f"sha256={other[:12]}" for other in digests if other)) or "none that is recorded"
            raise ValueError(f"--policy {name}, sha256={digest[:12]}, decided in none of the runs: they are of {of}")


def publish(parts: Sequence[Section], title: str, out: Path, pictures: Path | None = None) -> list[Path]:
    """Write the page, and the pictures to a folder if there is one to be; returns what was written.

    Raises:
        ValueError: the page would be too large.
        OSError: something cannot be written.
    """
    written = [write(out, page(title, parts))]
    if pictures is not None:
        names: Counter[str] = Counter()
        for block in (block for part in parts for block in part.blocks if isinstance(block, Chart | Picture)):
            names[block.name] += 1
            number = f"-{names[block.name]}" if names[block.name] > 1 else ""
            written.append(write(pictures / f"{block.name}{number}.png", png(block)))
    return written
