"""What the pages of the documentation show can be done as it stands there."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from rlsched import cli

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"```(python|sh)\n(.*?)```", re.DOTALL)
TUTORIALS = sorted(str(path.relative_to(DOCS)) for path in DOCS.glob("tutorials/*.md"))
RUN = ["index.md", "quickstart.md", "environment.md", "explain.md", *TUTORIALS]
BEGINS_WITH = {"explain.md": "tutorials/look.md"}  # whose first block leaves a run to explain
QUICK = "rlsched explain default --run runs/mine --out runs/explain"  # of the commands, which take minutes else


def blocks(page):
    """The language of each block of code, and what is in it."""
    return BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))


def commands(block):
    """The lines of a block that are commands of ours."""
    return re.findall(r"^rlsched .*", block, re.MULTILINE)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, from which modules can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("page", RUN)
def test_page_runs(page, folder):
    """Whoever copies a page block by block must not end in a traceback half-way.

    A block that begins with the name of a file is that file.
    """
    shown = blocks(page)
    if page in BEGINS_WITH:
        shown = blocks(BEGINS_WITH[page])[:1] + [block for block in shown if block[0] == "python"]
    names = {"__name__": "__main__"}
    for language, block in shown:
        if file := re.match(r"# (\w+\.py)\n", block):
            (folder / file[1]).write_text(block, encoding="utf-8")
        elif language == "python":
            exec(compile(block, page, "exec"), names)
        else:
            for command in commands(block):
                if command == QUICK:
                    assert cli.main(shlex.split(command)[1:]) == 0


@pytest.mark.parametrize(
    "command",
    sorted(
        {
            command
            for path in (*DOCS.glob("*.md"), *DOCS.glob("tutorials/*.md"))
            for _, block in blocks(path)
            for command in commands(block)
        }
    ),
)
def test_command_is_understood(command, folder):
    """An option that was renamed would end what a reader pastes with a usage message."""
    cli._parser().parse_args(shlex.split(command, comments=True)[1:])
