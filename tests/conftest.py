"""What every test runs under: one thread, no display, fixed seeds."""

import os
import random

import numpy as np
import pytest
import torch

os.environ["MPLBACKEND"] = "Agg"
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # of processes that tests start


@pytest.fixture(autouse=True)
def _start() -> None:
    """Seed the global generators and go back to one thread, so that no test depends on the ones before it.

    The networks here are so small that a second thread costs more than it gives.
    """
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
