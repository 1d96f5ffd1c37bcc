"""Take the pictures of the site: a training and a user's run in TensorBoard and in a report, an explanation, a frame.

    python docs/pictures.py [FOLDER]

What was trained is kept in FOLDER (runs/pictures), and not trained again. Needs Chromium, and playwright for Python.
"""

import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gymnasium
import numpy as np
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from rlsched import cli
from rlsched.agents import PRESETS, TrainConfig, train

DOCS = Path(__file__).resolve().parent
PICTURES = DOCS / "pictures"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SIZE = {"width": 1400, "height": 900}
COLORS = 128  # of a picture, so that it stays small
SECONDS = 300  # that a page may take on a busy machine


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    PICTURES.mkdir(exist_ok=True)
    os.chdir(folder)
    save(Image.fromarray(frame()), "frame")
    train(shortened_demo("training-run"))
    if not Path("runs/mine").exists():
        tutorial = (DOCS / "tutorials" / "look.md").read_text(encoding="utf-8")
        exec(re.findall(r"```python\n(.*?)```", tutorial, re.DOTALL)[0], {})
    if cli.main(["explain", "default", "--run", "runs/mine", "--out", "runs/explain"]):
        raise SystemExit("the run cannot be explained")
    save(Image.open("runs/explain/decisions-1.png"), "run-decisions")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE)
        for name, logs in (("training", "training-run"), ("run", "runs")):
            with tensorboard(logs) as address:
                views(page, address, name)
        report(page)
        browser.close()


def frame() -> np.ndarray:
    """An episode under random actions, when it is over."""
    env = gymnasium.make("rlsched.envs:rlsched/Scheduling-v0", tasks="digits", render_mode="rgb_array")
    env.action_space.seed(0)
    env.reset(seed=3)
    terminated = False
    while not terminated:
        terminated = env.step(0.3 * env.action_space.sample())[2]
    return env.render()


def shortened_demo(run_dir: str) -> TrainConfig:
    short = {"num_envs": 64, "n_steps": 32, "timesteps": 40_960, "batch_size": 1024, "eval_every": 5}
    return TrainConfig(**{**PRESETS["demo"], **short, "eval_episodes": 8, "processes": 1, "run_dir": run_dir})


@contextmanager
def tensorboard(logs: str) -> Iterator[str]:
    """A TensorBoard over these logs, on a port of this machine alone; gives its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", logs, "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            lines = iter(process.stderr or ())
            yield next(found[0] for line in lines if (found := re.search(r"http://127\.0\.0\.1:\d+/", line)))
        finally:
            process.terminate()


def views(page: Page, address: str, name: str) -> None:
    """The tabs that a reader opens first."""
    tabs = {"custom_scalars": "svg, canvas", "text": "table"}
    if name == "training":
        tabs |= {"timeseries": "card-view", "images": "img", "hparams": "text=Hyperparameters"}
    for tab, seen in tabs.items():
        page.goto("about:blank")
        page.goto(f"{address}#{tab}")
        page.locator(seen).locator("visible=true").first.wait_for(timeout=1000 * SECONDS)
        page.wait_for_timeout(30_000)  # for what is drawn when it has been loaded
        save(Image.open(io.BytesIO(page.screenshot())), f"{name}-{tab.replace('_', '-')}")


def report(page: Page) -> None:
    """The page of a run and a training."""
    if cli.main(["report", "runs/mine", "training-run", "--out", "report.html"]):
        raise SystemExit("there is no report of the runs")
    page.goto(Path("report.html").absolute().as_uri())
    page.locator(".bk-Figure").first.wait_for(timeout=1000 * SECONDS)
    page.wait_for_timeout(10_000)
    save(Image.open(io.BytesIO(page.screenshot())), "report")


def save(picture: Image.Image, name: str) -> None:
    """In few colors, of which charts need no more."""
    small = picture.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
    small.save(PICTURES / f"{name}.png", optimize=True)
    print(f"{name}.png: {(PICTURES / f'{name}.png').stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/pictures"))
