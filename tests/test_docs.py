"""The documentation agrees with the code."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_spec_page_is_the_one_that_the_code_generates():
    """A table that somebody forgot to generate again would describe observations that are not there."""
    page = runpy.run_path(str(ROOT / "docs" / "generate.py"))["page"]()
    assert (ROOT / "docs" / "spec.md").read_text(encoding="utf-8") == page, "run `make docs`"


def test_readme_loop_runs(tmp_path, monkeypatch):
    """The first thing that a newcomer copies must work."""
    monkeypatch.chdir(tmp_path)
    (snippet,) = [s for s in SNIPPETS if "for step in range" in s]
    exec(compile(snippet, "README.md", "exec"), {})


def test_readme_environment_runs(tmp_path):
    """The environment's ids and arguments in the README must exist."""
    (snippet,) = [s for s in SNIPPETS if "make_vec" in s]
    exec(compile(snippet.replace("num_envs=256", "num_envs=4"), "README.md", "exec"), {})


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_readme_links_lead_somewhere(path):
    """A dead link or a missing picture is the first thing that a reader sees."""
    assert (ROOT / path).exists()
