"""The file of results that all studies go on from."""

import json

import pytest
import torch

from rlsched.experiments.journal import Journal, read

ROWS = [{"case": name, "value": value} for name, value in (("a", 1.5), ("b", None), ("c", float("inf")))]


def name(row):
    """What a row is the result of."""
    return row["case"]


@pytest.fixture
def path(tmp_path):
    """A file with three results, in a folder that did not exist."""
    journal = Journal(tmp_path / "new" / "runs.jsonl", name)
    for row in ROWS:
        journal.add(row)
    return journal.path


def test_results_are_there_as_soon_as_they_are_added(tmp_path):
    """A result that waits in a buffer is lost with the process."""
    journal = Journal(tmp_path / "runs.jsonl", name)
    for i, row in enumerate(ROWS):
        assert row["case"] not in journal
        journal.add(row)
        assert row["case"] in journal
        assert list(read(journal.path, name)) == [r["case"] for r in ROWS[: i + 1]]
    assert read(journal.path, name) == journal.rows == Journal(journal.path, name).rows


def test_every_result_says_where_it_comes_from(path):
    """Figures of another version or machine in the same file would pass for one experiment."""
    for row, written in zip(ROWS, read(path, name).values(), strict=True):
        assert written == {**row, "provenance": written["provenance"]}
        assert written["provenance"].keys() == {"rlsched", "torch", "python", "commit", "machine", "processor"}
        assert written["provenance"]["torch"] == torch.__version__


def test_half_written_line_costs_no_other_result(path):
    """A kill in mid-write, wherever it comes, must cost that one result; the file then is as if nothing had been."""
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for length in range(1, len(last) - 1):
        torn = whole[: len(whole) - len(last) + length]
        path.write_bytes(torn)
        with pytest.warns(UserWarning, match=r"runs.jsonl, line 3, was cut off"):
            assert list(read(path, name)) == ["a", "b"]
        assert path.read_bytes() == torn, "to read changes nothing: somebody else may be writing"
        with pytest.warns(UserWarning, match=r"runs.jsonl, line 3, was cut off"):
            journal = Journal(path, name)
        assert list(journal.rows) == ["a", "b"]
        if length % 50 == 1:
            journal.add(ROWS[-1])
            assert path.read_bytes() == whole


def test_last_line_without_its_end_is_a_result(path):
    """An editor that ends no last line, or a kill before its last byte, would cost a result or make two of one line."""
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert list(read(path, name)) == ["a", "b", "c"]
    Journal(path, name).add({"case": "d"})
    assert path.read_bytes().startswith(whole)
    assert list(read(path, name)) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("line", ['{"case": "a"', "", "5", '{"measurement": "a"}', '{"case": ["a"]}', "\0\0\0\0"])
@pytest.mark.parametrize("number", [1, 2, 4])
def test_line_that_is_no_result_is_named(line, number, path):
    """A line of another study, or cut by a full disk, should be found by its number, not by search."""
    lines = path.read_text().splitlines()
    lines.insert(number - 1, line)
    path.write_text("\n".join(lines) + "\n")
    before = path.read_bytes()
    for load in (read, Journal):
        with pytest.raises(ValueError, match=rf"runs.jsonl, line {number}, is not a result .*; delete the line"):
            load(path, name)
    assert path.read_bytes() == before


def test_row_of_another_study_is_not_written(path):
    """It would make the file unreadable, and with it all that is there."""
    before = path.read_bytes()
    with pytest.raises(KeyError):
        Journal(path, name).add({"run": "a"})
    assert path.read_bytes() == before


def test_result_that_was_made_again_replaces_the_first(path):
    """One measurement would count twice."""
    Journal(path, name).add({"case": "a", "value": 9})
    assert [row["value"] for row in read(path, name).values()] == [9, None, float("inf")]
    assert json.loads(path.read_text().splitlines()[0])["value"] == 1.5


@pytest.mark.parametrize("inside", ["", "folder"])
def test_file_in_place_of_the_folder_is_named(inside, path):
    """A traceback from the depths hides that --out is wrong."""
    with pytest.raises(NotADirectoryError, match=r"must be a folder, and a file is in the way: .*runs\.jsonl"):
        Journal(path / inside / "runs.jsonl", name)
