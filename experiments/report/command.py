"""The verb `report`: what it takes, and where it writes the page."""

from __future__ import annotations

import argparse
from pathlib import Path

NEEDS = ("torch", "matplotlib.figure", "bokeh.plotting", "rlsched.experiments.report.report")
SUFFIX = ".html"
REPORT = """\
One page from one or several runs, to look at without TensorBoard: a single HTML file, below 5 MB, which needs no
network. A run is a folder: of a training (rlsched train), of a comparison or a benchmark, or the log_dir of a scheduled
run, also as a callback or another writer of TensorBoard logged it. It shows schedules side by side, losses, decisions
and why they were made, what was done to keep runs alive, the story of a training, and the tables of a comparison. What
is still being written is shown as far as it goes. docs/report.md says how to read it.

Decisions are explained where the policy is known: shipped, given by --policy, or of a training that is reported too.

examples:
  rlsched report runs/mine
  rlsched report runs/first runs/second --out both.html --png pictures
  rlsched report runs/demo runs/demo-compare
  rlsched report runs/mine --policy runs/demo/policy.safetensors
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give the verb's parser its description and its options."""
    parser.description = REPORT
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, see above")
    add("--out", type=Path, default=Path("runs/report.html"), help="file to write (default: runs/report.html)")
    add("--png", type=Path, metavar="FOLDER", help="write each chart as a picture, too, to this folder")
    add(
        "--policy",
        action="append",
        default=[],
        metavar="POLICY",
        help="policy file, or a shipped policy, that decided in some of the runs; may be given again",
    )


def run(options: argparse.Namespace) -> None:
    """Write the page, and say where it is.

    Raises:
        FileNotFoundError, ValueError, OSError: there is no such run, or it cannot be read; an option is wrong.
    """
    import torch

    from rlsched.experiments.report.report import publish, sections
    from rlsched.files import make_folder

    if options.out.suffix != SUFFIX:
        raise ValueError(f"--out must end in {SUFFIX}, got {str(options.out)!r}")
    torch.set_num_threads(min(2, torch.get_num_threads()))  # the networks are small: more cost more than they give
    parts = sections(options.runs, options.policy, show=True)
    make_folder(options.out.parent)
    title = "Report of " + ", ".join(path.resolve().name for path in options.runs)
    page, *pictures = publish(parts, title, options.out, options.png)
    print(f"page       {page} ({page.stat().st_size / 1e6:.1f} MB)")
    if pictures:
        print(f"pictures   {len(pictures)} in {options.png}")
