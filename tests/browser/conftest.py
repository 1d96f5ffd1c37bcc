"""Pages in a real browser: Debian's Chromium, without a window."""

import json
import os
import shutil
import sys
from contextlib import ExitStack
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import torch
from helpers import lively_policy, network, train
from pages import SECONDS, served, wait_until
from tiny import OPTIONS, TINY
from torch import nn

from rlsched import ScheduledOptimizer
from rlsched.agents import TrainConfig
from rlsched.agents import train as train_policy
from rlsched.agents.tensorboard import BASE, LOG, RETURN, TUNED
from rlsched.envs import MIXTURES, InnerTask
from rlsched.experiments.compare.analysis import FINAL, Results, report
from rlsched.experiments.compare.run import TENSORBOARD, Plan, compare
from rlsched.experiments.compare.tasks import FixedSplit

POINTS = torch.linspace(-1, 1, 60).view(20, 3), torch.arange(20) % 4
STEPS = 24


@pytest.fixture(scope="session")
def training(tmp_path_factory):
    """The folder of a training, and how its runs end."""
    folder, end = tmp_path_factory.mktemp("training") / "demo", OPTIONS["timesteps"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MIXTURES, "tiny", TINY)
        config = TrainConfig(run_dir=str(folder), **OPTIONS)
        train_policy(config)
    ends = {LOG: ("train/value_loss", end), f"{LOG}/{BASE}": (RETURN, end), f"{LOG}/{TUNED}": (RETURN, end)}
    return SimpleNamespace(folder=folder, ends=ends, config=config)


@pytest.fixture(scope="session")
def users(tmp_path_factory):
    """The folder of a user's run with an intervention, and how it ends."""
    folder, model = tmp_path_factory.mktemp("users"), network()
    inner = torch.optim.AdamW(model.parameters(), 0.01)
    optimizer = ScheduledOptimizer(
        inner, total_steps=STEPS, decisions=8, policy=lively_policy(), log_dir=folder / "mine"
    )
    train(model, optimizer, range(10))
    optimizer.observe_validation(1.0)
    optimizer.zero_grad()
    model[0].weight.grad = torch.full_like(model[0].weight, torch.nan)
    optimizer.step(loss=torch.nan)
    train(model, optimizer, range(11, STEPS))
    assert optimizer.controller.interventions
    return SimpleNamespace(
        folder=folder,
        ends={"mine": ("rlsched/lr", 22)},
        interventions=optimizer.controller.interventions,
    )


@pytest.fixture(scope="session")
def comparison(tmp_path_factory):
    """The folder of a comparison, its results, and how its runs end."""
    folder, steps = tmp_path_factory.mktemp("comparison") / "demo-compare", 6
    task = InnerTask(lambda: nn.Linear(3, 4), FixedSplit(*POINTS, validation_points=8), batch_size=4)
    compare(Plan({"points": task}, ("sgd", "adam"), (steps,), 2, (1.0,), (0.1, 1.0)), lively_policy(), folder)
    report(folder)
    results = Results(folder)
    last = (f"{list(results.runs)[-1]}/{FINAL}", steps)
    ends = {path.name: last for path in (folder / TENSORBOARD).iterdir()}
    return SimpleNamespace(folder=folder, ends=ends, results=results)


@pytest.fixture(scope="module")
def browser():
    """Chromium, and nothing of it beyond the module: the loop that drives it would be in the way of other tests'."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium (Debian: apt-get install chromium)")
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # which Chromium refuses to make for root
    with playwright.sync_playwright() as driver:
        # Shared memory may be no more than 64 MB in a container.
        arguments = [*sandbox, "--disable-dev-shm-usage"]
        chromium = driver.chromium.launch(executable_path=chromium, args=arguments, timeout=1000 * SECONDS)
        playwright.expect.set_options(timeout=1000 * SECONDS)
        yield chromium
        chromium.close()


@pytest.fixture
def serve(tmp_path):
    """Starts servers that run to the end of the test: `serve(command, address)`, as `pages.served`."""
    with ExitStack() as stack:
        yield lambda *of: stack.enter_context(served(*of, tmp_path / "server.log"))


@pytest.fixture
def page(browser, serve):  # it is closed before its server
    """A page on a large screen, at the end of which nothing may have gone wrong that a user need not even see.

    Attributes:
        requested: addresses of all that it asked for.
    """
    page = browser.new_page(viewport={"width": 1440, "height": 1100})
    page.set_default_timeout(1000 * SECONDS)
    page.requested, wrong = [], []
    page.on("request", lambda request: page.requested.append(request.url))
    page.on("console", lambda message: wrong.append(f"console: {message.text}") if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(f"uncaught: {error}"))
    page.on(
        "response", lambda response: wrong.append(f"{response.status}: {response.url}") if not response.ok else None
    )
    yield page
    page.close()
    assert wrong == []


@pytest.fixture
def tensorboard(serve):
    """Opens a folder in TensorBoard: `tensorboard(folder, ends) -> url`.

    Args:
        folder: of logs.
        ends: (tag, step) of a scalar that is written last, by the run: then TensorBoard is known to have read all.
    """

    def opened(folder, ends):
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", "127.0.0.1"]
        url = serve([*command, "--port", "0"], r"http://[\d.:]+/")

        def is_read(run, tag, step):
            try:
                with urlopen(f"{url}data/plugin/scalars/scalars?{urlencode({'run': run, 'tag': tag})}") as answer:
                    return json.load(answer)[-1][1] == step
            except HTTPError:  # it knows nothing of such a run yet
                return False

        for run, (tag, step) in ends.items():
            wait_until(lambda end=(run, tag, step): is_read(*end))
        return url

    return opened
