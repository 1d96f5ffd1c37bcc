"""What a user sees who opens a log in TensorBoard."""

import re
from shutil import copytree

import numpy as np
import pytest
from pages import is_drawn, wait_until

from rlsched.agents.tensorboard import LAYOUT, LOG, METRICS, RETURN
from rlsched.experiments.compare.analysis import FINAL, LOG_LOSS, counted
from rlsched.experiments.compare.run import TENSORBOARD
from rlsched.figures import FIGURES
from rlsched.tensorboard import LAYOUT as USERS_LAYOUT

expect = pytest.importorskip("playwright.sync_api").expect


def assert_runs(page, names):
    """The page of Time Series lists these runs, and draws them all: from about forty on it would tick none."""
    rows = page.locator("runs-data-table tb-data-table-content-row")
    expect(rows).to_have_count(len(names))
    assert {row.inner_text().strip(): row.locator("input").is_checked() for row in rows.all()} == dict.fromkeys(
        names, True
    )


def assert_first_chart(page, tag, runs):
    """The first chart is of this tag, and these runs are drawn in it."""
    card = page.locator("card-view").first
    expect(card.locator("tb-truncated-path")).to_have_attribute("title", tag)
    expect(card.locator("scalar-card-data-table tb-data-table-content-row")).to_have_text(
        [re.compile(rf"^\s*{re.escape(run)}\s*-?\d") for run in runs]
    )
    wait_until(lambda: is_drawn(card.locator("line-chart")))


def assert_laid_out(page, *layouts):
    """The charts of layouts are there, and each has curves: none has "Matches (0)", which is all that would be said."""
    titles = sorted(title for layout in layouts for charts in layout.values() for title in charts)
    cards = page.locator("tf-custom-scalar-multi-line-chart-card")
    expect(cards).to_have_count(len(titles))
    expect(cards.filter(has_text=re.compile(r"Matches \([1-9]\d*\)"))).to_have_count(len(titles))
    assert sorted(cards.locator("tf-card-heading .name").all_inner_texts()) == titles
    # Of the two points of a short curve TensorBoard takes both for outliers, and leaves the chart empty.
    page.locator("paper-checkbox:visible", has_text="Ignore outliers").click()
    for card in cards.all():  # they are drawn when they are scrolled to; one of TensorBoard's colors is gray
        card.scroll_into_view_if_needed()
        expect(card.locator("#chartdiv path.line").first).to_have_attribute("d", re.compile("^M"))


def table_of(page, columns, runs):
    """The table of HParams: of each run, the text in each column; fails if it has others."""
    head = ["Trial ID", "Show Metrics", *columns]
    size = len(head) + len(runs) * (1 + len(columns))
    grid = page.locator("vaadin-grid#sessionGroupsTable")
    grid.wait_for()
    lines = wait_until(lambda: (found := re.split(r"\s*\n\s*", grid.inner_text().strip()))[size - 1 :] and found)
    assert lines[: len(head)] == head
    rest = lines[len(head) :]
    rows = [rest[i : i + 1 + len(columns)] for i in range(0, len(rest), 1 + len(columns))]
    table = {name: dict(zip(columns, cells, strict=True)) for name, *cells in rows}
    assert table.keys() == set(runs)
    return table


def assert_pictures(page, number):
    """So many pictures are there, and of a size at which they can be read."""
    pictures = page.locator("tf-image-loader #main-image-container img")
    expect(pictures).to_have_count(number)
    for picture in pictures.all():
        wait_until(lambda picture=picture: picture.evaluate("image => image.complete && image.naturalWidth") > 400)


def test_training_tells_its_story(tensorboard, page, training):
    """A log that is all there, read back from its file, may still be shown as empty charts and unticked runs."""
    url = tensorboard(training.folder, training.ends)
    page.goto(url)
    assert_runs(page, training.ends)
    assert_first_chart(page, RETURN, sorted(training.ends))

    page.goto(f"{url}#custom_scalars")
    assert_laid_out(page, LAYOUT)

    page.goto(f"{url}#hparams")
    given = training.config.hyperparameters()
    first = sorted(given)[:5]  # TensorBoard shows no more unasked
    row = table_of(page, [*first, *METRICS], [LOG])[LOG]
    for name in first:
        assert row[name] == given[name] if isinstance(given[name], str) else float(row[name]) == given[name]
    assert all(np.isfinite(float(row[name])) for name in METRICS)

    page.goto(f"{url}#images")
    assert_pictures(page, 1 + training.config.eval_episodes)

    page.goto(f"{url}#text")
    card = page.locator("tf-text-loader")
    for title in ("How to read this page", "Configuration"):
        expect(card.get_by_role("heading", name=title)).to_be_visible()
    for name in (RETURN, *training.config.hyperparameters()):
        expect(card.get_by_role("cell", name=name, exact=True)).to_have_count(1)


def test_users_run_tells_its_story(tensorboard, page, users):
    """Who plugs a schedule in for the first time looks here for what it does, and why it held the lr down."""
    url = tensorboard(users.folder, users.ends)
    page.goto(url)
    assert_runs(page, users.ends)
    assert_first_chart(page, min(FIGURES), users.ends)

    page.goto(f"{url}#custom_scalars")
    assert_laid_out(page, USERS_LAYOUT)

    page.goto(f"{url}#text")
    cards = page.locator("tf-text-loader")
    expect(cards).to_have_count(2)
    for name in FIGURES:
        expect(cards.first.get_by_role("cell", name=name, exact=True)).to_have_count(1)
    for _, message in users.interventions:
        expect(cards.last.get_by_text(message)).to_be_visible()


def test_comparison_can_be_sorted_by(tensorboard, page, comparison):
    """Which schedule is the best, a user would have to find out in a chart of a dozen curves of like colors."""
    url = tensorboard(comparison.folder / TENSORBOARD, comparison.ends)
    page.goto(url)
    assert_runs(page, comparison.ends)
    settings = list(comparison.results.runs)
    assert_first_chart(page, f"{min(map(str, settings))}/{LOG_LOSS}", sorted(comparison.ends))

    page.goto(f"{url}#hparams")
    columns = ["base learning rate", "schedule", *(f"{setting}/{FINAL}" for setting in settings)]
    rows = list(table_of(page, columns, comparison.ends).values())
    for method in comparison.results.methods():
        at = "tuned" if method.factor is None else f"× {method.factor:g}"
        (row,) = [r for r in rows if [*r.values()][:2] == [at, comparison.results.label(method.contender)]]
        for setting in settings:
            final = np.mean([counted(run) for run in comparison.results.of(method, setting)])
            assert float(row[f"{setting}/{FINAL}"]) == pytest.approx(final, rel=1e-3)


def test_logs_of_all_kinds_are_shown_side_by_side(tensorboard, page, training, users, comparison, tmp_path):
    """Whoever opens the folder of all runs would find the charts of some, and those of others unticked."""
    runs, ends = tmp_path / "runs", {}
    for kind in (training, users, comparison):
        copytree(kind.folder, runs / kind.folder.name)
        below = f"{TENSORBOARD}/" if kind is comparison else ""
        ends |= {f"{kind.folder.name}/{below}{run}": end for run, end in kind.ends.items()}
    url = tensorboard(runs, ends)
    page.goto(url)
    assert_runs(page, ends)

    page.goto(f"{url}#custom_scalars")
    assert_laid_out(page, LAYOUT, USERS_LAYOUT)
