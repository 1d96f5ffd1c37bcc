"""Pages in a real browser: Debian's Chromium, without a window."""

import json
import os
import shutil
import sys
from contextlib import ExitStack
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
from pages import SECONDS, served, wait_until


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
