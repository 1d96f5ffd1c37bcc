"""What every test of an integration runs under: a working directory of its own, and double precision on demand."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
    """Frameworks make folders that nobody has asked for, such as the Trainer its output_dir: not in the repository."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def double():
    """Networks and data are made in double precision.

    Where two trainings add up the same numbers in different orders, AdamW makes of what is rounding, in gradients that
    are almost zero, updates as large as any other. How large, depends on the processor.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
