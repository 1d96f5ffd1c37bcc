"""The documentation agrees with the code."""

import ast
import re
import runpy
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlsched import actors, base_schedule, cli, control, signals
from rlsched.actors import ACTORS
from rlsched.base_schedule import BASE_SCHEDULES
from rlsched.control import CONTROLS
from rlsched.envs import mixtures
from rlsched.policy import SchedulePolicy
from rlsched.signals import OBSERVATIONS

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("rlsched/pretrained/*.md")]
}
README, SUPPORT = PAGES["README.md"], PAGES["docs/support.md"]
COMMANDS = sorted(
    {
        command
        for text in PAGES.values()
        for block in re.findall(r"^ *```sh\n(.*?)```", text, re.DOTALL | re.MULTILINE)
        for command in re.findall(r"^ *((?:\.venv/bin/)?rlsched .*)", block, re.MULTILINE)
    }
)
OTHERS = {"--logdir", "--version", "--head", "--population"}  # of TensorBoard, the command itself, Ray, and a study
LINK = re.compile(r"\]\((?!http)([^)# ]*)(?:#([^) ]+))?(?: \".*?\")?\)")


@pytest.mark.parametrize("name", ["spec.md", "tasks.md", "figures.md", "environment.md", "config.md"])
def test_page_is_the_one_that_the_code_generates(name):
    """A table that somebody forgot to generate again would describe observations or tasks that are not there."""
    page = runpy.run_path(str(ROOT / "docs" / "generate.py"))["PAGES"][name]()
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == page, "run `make docs`"


def test_page_of_stable_baselines_runs(tmp_path, monkeypatch):
    """Whoever comes with an algorithm of their own follows this page line by line."""
    monkeypatch.chdir(tmp_path)
    (digits,) = mixtures.MIXTURES["digits"]
    short = replace(digits, setup=replace(digits.setup, decisions=(2, 3)))
    monkeypatch.setitem(mixtures.MIXTURES, "digits", (short,))
    names = {}
    few = {"num_envs": 4, "n_steps": 4, "total_timesteps": 16, "learning_starts": 8, "batch_size": 16, "episodes": 4}
    for block in re.findall(r"```python\n(.*?)```", PAGES["docs/stable-baselines3.md"], re.DOTALL):
        for option, value in few.items():
            block = re.sub(rf"\b{option}=[\d_]+", f"{option}={value}", block)
        exec(compile(block, "stable-baselines3.md", "exec"), names)
    for name in ("ppo", "a2c"):
        SchedulePolicy.load(tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"^model: the actor of SAC cannot be exported"):
        names["export"](names["model"])


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_understood(command):
    """An option that was renamed would end what a newcomer pastes with a usage message."""
    cli._parser().parse_args(shlex.split(command, comments=True)[1:])


def test_options_exist():
    """In the middle of a sentence too, an option has to be one."""
    verbs = cli._parser()._subparsers._group_actions[0].choices.values()
    for verb in verbs:
        verb.fill(verb)
    options = {name for verb in verbs for action in verb._actions for name in action.option_strings} | OTHERS
    texts = {page: text for page, text in PAGES.items() if page != "CHANGELOG.md"}  # which tells of former ones
    named = {page: set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)) - options for page, text in texts.items()}
    assert {page: unknown for page, unknown in named.items() if unknown} == {}


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_figures_on_mnist_are_those_of_the_runs(page):
    """A figure that is copied by hand may be another row's, or that of an older run."""
    published = {_label(row): row for row in _rows((ROOT / "docs/results/mnist/table.md").read_text(encoding="utf-8"))}
    rows = [row for row in _rows(PAGES[page]) if "±" in row[1]]
    assert len(rows) >= 6
    for row in rows:
        cells = [re.sub(r" \(.*\)", "", cell).replace("-", "−") for cell in published[_label(row)][2:]]
        told = [cell.strip("*") for cell in row[1:]]
        assert [there for there, cell in zip(cells, told, strict=True) if cell != "diverged"] == [
            cell for cell in told if cell != "diverged"
        ]


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_figures_of_the_development_suite_are_those_of_the_runs(page):
    """The suite is run again for every policy that might ship, and its figures here would be forgotten."""
    rows = _rows((ROOT / "docs/results/benchmark/development/table.md").read_text(encoding="utf-8"))
    summary = [row for row in rows if len(row) == 10 and row[0].startswith(("**policy default", "cosine"))]
    figures = [row[3] for row in summary if row[0] != "cosine" or row[1] == "× 1"]
    assert len(figures) == 6
    assert [figure for figure in figures if figure not in PAGES[page]] == []


def _rows(text):
    """The rows of all tables of a page, a list of cells each."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", text, re.MULTILINE)
    ]


def _label(row):
    """What a row of the comparison is called in its table."""
    words = {"a tenth of the default lr": "lr × 0.1", "ten times the default lr": "lr × 10", "the default lr": "lr × 1"}
    label = row[0].strip("*").replace("best of five lr", "best of 5").replace("from ", "")
    label = re.sub(r"\bdefault lr$", "the default lr", label) if label.endswith(", default lr") else label
    return next((label.replace(said, name) for said, name in words.items() if said in label), label)


@pytest.mark.parametrize(
    "page, path, place", sorted({(name, *link) for name, text in PAGES.items() for link in LINK.findall(text)})
)
def test_link_leads_somewhere(page, path, place):
    """A dead link or a missing picture is the first thing that a reader sees."""
    target = (ROOT / page).parent / path if path else ROOT / page
    assert target.exists()
    if place:
        headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE)
        assert place in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    """A reader would look for a file that was moved long ago."""
    named = re.findall(r"`((?:rlsched|envs|agents|experiments|docs|tests)/[\w./-]*(?:/|\.\w+))`", PAGES[page])
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_entry_is_in_the_tables():
    """What can be chosen by name has to be found by name."""
    entries = [*OBSERVATIONS, *CONTROLS, *BASE_SCHEDULES, *ACTORS]
    assert [name for name in entries if f"| `{name}` |" not in PAGES["docs/spec.md"]] == []


def test_what_is_to_be_added_can_be(monkeypatch):
    """Directions that were right for another version cost more than none.

    Each example is run where it belongs: its classes, and its last line, which is the new entry.
    """
    made = []
    blocks = re.findall(r"```python\n(.*?)```", PAGES["docs/architecture.md"], re.DOTALL)
    for home, block in zip((signals, control, base_schedule, actors, mixtures), blocks, strict=True):
        names, tree = dict(vars(home)), ast.parse(block)
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                exec(ast.unparse(node), names)
                made.append(names[node.name])
        if isinstance(tree.body[-1], ast.Expr):
            made.append(eval(ast.unparse(tree.body[-1]), names))
    observation, _, new_control, schedule, new_actor, task = made
    assert observation.low < observation.high
    new_control.decide(values := {new_control.name: 0.3}, 0.3, 0.0, 1)
    assert values == {new_control.name: 0.3}
    assert max(schedule.factor(n, 100) for n in range(100)) == 1
    monkeypatch.setitem(ACTORS, new_actor.name, new_actor)
    act = actors.actor(new_actor.name, 3, 2, (4, 5))
    action, memory = act(torch.ones(6, 3), act.begin((6,)))
    assert action.shape == (6, 2) and memory.shape == act.begin((6,)).shape
    assert task.loss(task.network()(torch.ones(2, 24)), torch.ones(2, 1)).shape == ()


@pytest.mark.parametrize("path, name", sorted(set(re.findall(r"\]\((\S+?)(?: \"(.*?)\")?\)", SUPPORT))))
def test_support_is_shown_by_a_test(path, name):
    """A claim would outlive its test, or never have had one."""
    tests = (ROOT / "docs" / path).read_text(encoding="utf-8")
    assert re.search(rf"^def {name or 'no name given'}\(", tests, re.MULTILINE)


def test_every_framework_has_every_feature():
    """An empty cell leaves a reader to guess; what does not work has to say so."""
    table = re.search(r"\n((?:\|.*\n)+)", SUPPORT)[1].splitlines()
    head, _, *rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table]
    assert [row[0] for row in rows] == ["`ScheduledOptimizer`", "`attach`", "Lightning", "Transformers", "Accelerate"]
    for row in rows:
        assert len(row) == len(head)
        assert all("../tests/" in cell for cell in row[1:]), row[0]
