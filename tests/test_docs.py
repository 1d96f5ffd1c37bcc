"""The documentation agrees with the code."""

import ast
import re
import runpy
import shlex
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from rlsched import actors, base_schedule, cli, control, signals
from rlsched.actors import ACTORS
from rlsched.agents import TrainConfig
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
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(
    r"^(?:\.venv/bin/)?rlsched .*", "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL)), re.MULTILINE
)
LINK = re.compile(r"\]\((?!http)([^)# ]*)(?:#([^) ]+))?(?: \".*?\")?\)")


@pytest.mark.parametrize("name", ["spec.md", "tasks.md", "figures.md", "environment.md", "config.md"])
def test_page_is_the_one_that_the_code_generates(name):
    """A table that somebody forgot to generate again would describe observations or tasks that are not there."""
    page = runpy.run_path(str(ROOT / "docs" / "generate.py"))["PAGES"][name]()
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == page, "run `make docs`"


def test_readme_loop_runs(tmp_path, monkeypatch):
    """The first thing that a newcomer copies must work."""
    monkeypatch.chdir(tmp_path)
    (snippet,) = [s for s in SNIPPETS if "for step in range" in s]
    exec(compile(snippet, "README.md", "exec"), {})


def test_readme_environment_runs(tmp_path):
    """The environment's ids and arguments in the README must exist."""
    snippets = [s for s in SNIPPETS if "make_vec" in s]
    assert len(snippets) == 2
    for snippet in snippets:
        names = {}
        exec(compile(re.sub(r"num_envs=\d+", "num_envs=4", snippet), "README.md", "exec"), names)
        names["envs"].reset(seed=0)


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
def test_readme_command_is_understood(command):
    """An option that was renamed would end what a newcomer pastes with a usage message."""
    cli._parser().parse_args(shlex.split(command, comments=True)[1:])


def test_readme_options_and_settings_exist():
    """In the middle of a sentence too, an option has to be one."""
    verbs = cli._parser()._subparsers._group_actions[0].choices.values()
    for verb in verbs:
        verb.fill(verb)
    options = {name for verb in verbs for action in verb._actions for name in action.option_strings}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README)) <= options | {"--logdir"}  # of TensorBoard
    calls = [node for snippet in SNIPPETS for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Call)]
    settings = [k.arg for call in calls if ast.unparse(call.func) == "TrainConfig" for k in call.keywords]
    assert settings and set(settings) <= {field.name for field in fields(TrainConfig)}


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
