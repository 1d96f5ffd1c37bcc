"""The runs of a study are all done, and written down, in whatever number of processes."""

import logging
import warnings
from types import SimpleNamespace

import pytest

from rlsched.experiments import work


def loud(number):
    """A job that says what was done to keep its run alive, and what else there is to say."""
    logging.getLogger("rlsched").warning("rlsched: step %d: rolled back", number)
    warnings.warn("rlsched: no loss was reported", stacklevel=1)
    logging.getLogger("elsewhere").warning("heard %d", number)
    return {"number": number}


@pytest.mark.parametrize("processes", [1, 2])
def test_wrapped_runs_say_nothing_of_what_is_in_the_results(capfd, processes):
    """Hundreds of lines of rollbacks would bury the progress bar, and with it what is wrong."""
    rows = []
    work.do(loud, [0, 1, 2], SimpleNamespace(add=rows.append), processes)
    assert rows == [{"number": 0}, {"number": 1}, {"number": 2}]
    said = capfd.readouterr().err
    assert "rlsched: " not in said
    assert processes == 1 or "heard 2" in said, "but others may speak"
