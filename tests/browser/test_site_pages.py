"""What a reader of the documentation sees."""

import re
import sys
from pathlib import Path

import pytest

expect = pytest.importorskip("playwright.sync_api").expect
SITE = Path(__file__).parents[2] / "docs" / "_build" / "html"


def test_site_is_found_by_search_and_shows_its_pictures(page, serve):
    """Links and pictures are checked as Sphinx builds the site; its search, and all that scripts do, only here."""
    if not (SITE / "index.html").exists():
        pytest.skip("the site is not built: make site")
    url = serve([sys.executable, "-um", "http.server", "0", "-b", "127.0.0.1", "-d", str(SITE)], r"http://[\d.:]+/")
    page.goto(url)
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    page.locator("input[name=q]:visible").fill("momentum")
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html?q=momentum*")
    expect(page.locator("#search-results ul.search li").first).to_contain_text(re.compile("momentum", re.IGNORECASE))

    shown = 0
    for path in sorted(SITE.rglob("*.html")):
        if "<img" not in path.read_text(encoding="utf-8"):
            continue
        page.goto(f"{url}{path.relative_to(SITE)}")
        for picture in page.locator("article img").all():
            # Furo's wait until they are scrolled to; one that is not there cannot be decoded.
            picture.evaluate("image => { image.loading = 'eager'; return image.decode() }")
            shown += 1
    assert shown > 0
    assert all(request.startswith((url, "data:")) for request in page.requested)
