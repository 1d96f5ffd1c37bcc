"""What every test runs under: two threads at most, no display, fixed seeds."""

import os
import random

import numpy as np
import pytest
import torch

os.environ["MPLBACKEND"] = "Agg"
torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Seed the global generators, so that no test depends on the ones before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
