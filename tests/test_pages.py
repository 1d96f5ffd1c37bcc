"""What the README and the pages show can be done as it stands there: what a reader copies is what is run here."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rlsched import cli

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```", re.DOTALL | re.MULTILINE)
NAMED = re.compile(r"# (\w+\.py)\n")
ELSEWHERE = {  # pages whose blocks another test runs, since they are no program by themselves
    "architecture.md": "tests/test_docs.py, each where it belongs",
    "stable-baselines3.md": "tests/test_docs.py, with fewer timesteps",
}
BEGINS_WITH = {"docs/explain.md": "docs/tutorials/look.md"}  # whose first block leaves a run to explain
ALONE = {"docs/frameworks.md": ("lightning", "transformers", "accelerate")}  # whose imports warn
QUICK = {  # commands, while others take minutes, or need what a reader has
    "rlsched explain default --run runs/mine --out runs/explain",
    "rlsched export default --format onnx --out default.onnx",
}


def blocks(page):
    """The language of each block of code, and what is in it."""
    return BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))


README = [block for language, block in blocks("README.md") if language == "python"]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "docs").rglob("*.md")
    if path.name not in ELSEWHERE and "_build" not in path.parts and "python" in dict(blocks(path))
)


def run(code, folder):
    """What a program prints, both ways, that a user saves and starts in an empty folder."""
    name = NAMED.match(code)
    script = folder / (name[1] if name else "example.py")
    script.write_text(code, encoding="utf-8")
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # of the sources, where they are not installed
    done = subprocess.run(
        [sys.executable, script.name], cwd=folder, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, from which modules can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("block", README, ids=lambda block: block.splitlines()[-1].strip())
def test_block_of_the_readme_runs(block, tmp_path):
    """The first thing that a newcomer copies ends in a traceback, and so does their interest."""
    said = run(block, tmp_path)
    assert "Warning" not in said, "nor does it begin with a warning"


@pytest.mark.parametrize("page", PAGES)
def test_page_runs_from_top_to_bottom(page, folder):
    """Whoever copies a page block by block must not end in a traceback half-way.

    A block that begins with a comment such as `# train_mine.py` is in a file of that name. Blocks in `py`, not
    `python`, ask the network, and are not run.
    """
    shown = blocks(page)
    if page in BEGINS_WITH:
        shown = blocks(BEGINS_WITH[page])[:1] + [block for block in shown if block[0] == "python"]
    program = ""
    names = {"__name__": "__main__"}
    for language, block in shown:
        if file := NAMED.match(block):
            (folder / file[1]).write_text(block, encoding="utf-8")
        elif language == "sh":
            for command in QUICK.intersection(block.splitlines()):
                assert cli.main(shlex.split(command)[1:]) == 0
        elif language == "python" and page in ALONE:
            program += block
        elif language == "python":
            exec(compile(block, page, "exec"), names)
    if page in ALONE:
        for package in ALONE[page]:
            pytest.importorskip(package)
        run(program, folder)


def test_readme_is_short():
    """Who has to read for a quarter of an hour what it is leaves before they know."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1200
