"""What a user sees who opens a report."""

import pytest
from pages import is_drawn, wait_until

from rlsched.cli import main

expect = pytest.importorskip("playwright.sync_api").expect
pytest.importorskip("bokeh")
pytest.importorskip("captum")


def test_report_is_drawn_without_a_network(page, training, users, comparison, tmp_path, capsys):
    """On a train, or in the mail of a colleague, a page that asks for its scripts elsewhere has empty charts."""
    out = tmp_path / "report.html"
    main(["report", str(users.folder / "mine"), str(training.folder), str(comparison.folder), "--out", str(out)])
    assert out.stat().st_size < 5e6, capsys.readouterr().out
    page.goto(out.as_uri())

    for title in ("Overview", "Runs side by side", "Decisions of mine", "Training demo", "Comparison demo-compare"):
        expect(page.get_by_role("heading", name=title, exact=True)).to_be_visible()
    for _, message in users.interventions:
        expect(page.get_by_text(message).first).to_be_visible()
    page.wait_for_function("window.Bokeh && Bokeh.documents.length && Bokeh.documents.every(shown => shown.is_idle)")
    for summary in page.locator("summary").all():
        summary.click()
    charts = page.locator(".bk-Figure")
    assert charts.count() > 10
    for chart in charts.all():
        wait_until(lambda chart=chart: is_drawn(chart))
    for picture in page.locator("img").all():
        assert picture.evaluate("image => image.complete && image.naturalWidth") > 400
    assert {url for url in page.requested if not url.startswith("data:")} == {out.as_uri()}
