"""The Python of the README and of the pages runs as it stands there: what a reader copies is what is run here.

Each block of the README is a file of its own, and all blocks of a page, in their order, are one; a fresh Python runs it
in an empty folder. A block that begins with a comment such as `# train_mine.py` is in a file of that name.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"# (\w+\.py)\n")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
ELSEWHERE = {  # pages whose blocks another test runs, since they are no program by themselves
    "architecture.md": "tests/test_docs.py, each where it belongs",
    "explain.md": "it goes on with a run that a reader has",
    "stable-baselines3.md": "tests/test_docs.py, with fewer timesteps",
}
NEEDS = {"frameworks.md": ("lightning", "transformers", "accelerate")}


def blocks(page):
    """The Python of a page, given relative to the root."""
    return BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))


README = blocks("README.md")
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "docs").rglob("*.md")
    if path.name not in ELSEWHERE and blocks(path.relative_to(ROOT))
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


@pytest.mark.parametrize("block", README, ids=lambda block: block.splitlines()[-1].strip())
def test_block_of_the_readme_runs(block, tmp_path):
    """The first thing that a newcomer copies ends in a traceback, and so does their interest."""
    said = run(block, tmp_path)
    assert "Warning" not in said, "nor does it begin with a warning"


@pytest.mark.parametrize("page", PAGES)
def test_page_runs_from_top_to_bottom(page, tmp_path):
    """A name that is defined nowhere, or an argument that was renamed, is found by the reader."""
    for package in NEEDS.get(Path(page).name, ()):
        pytest.importorskip(package)
    found = [block for block in blocks(page) if block not in README]  # which have been run
    whole = "\n\n".join(block for block in found if not NAMED.match(block))
    for program in filter(None, [*filter(NAMED.match, found), whole]):
        run(program, tmp_path)


def test_readme_is_short():
    """Who has to read for a quarter of an hour what it is leaves before they know."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1200
