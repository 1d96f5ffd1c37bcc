"""The tables that are made of results."""

from rlsched.experiments.table import markdown


def test_table_is_markdown():
    """A row that is shorter than its head, or a column that is not aligned, would break the page."""
    lines = ["|  | size | time |", "| --- | --: | --: |", "| a | 1 | 2 |", "| b |  |  |"]
    assert markdown(["", "size", "time"], [["a", "1", "2"], ["b"]]) == "\n".join(lines)
    assert markdown(["x", "y", "n"], [], labels=2) == "| x | y | n |\n| --- | --- | --: |"
