"""The documentation agrees with the code."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SUPPORT = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("name", ["spec.md", "tasks.md"])
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


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_readme_links_lead_somewhere(path):
    """A dead link or a missing picture is the first thing that a reader sees."""
    assert (ROOT / path).exists()


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
