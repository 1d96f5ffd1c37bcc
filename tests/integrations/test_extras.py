"""The integrations without their frameworks."""

import importlib
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "absent"),
    [("lightning", ["lightning", "lightning.pytorch", "pytorch_lightning"]), ("transformers", ["transformers"])],
)
def test_absent_framework_is_named(module, absent, monkeypatch):
    """A user would have to guess from a traceback what to install."""
    for name in absent:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"rlsched.integrations.{module}", raising=False)
    with pytest.raises(ImportError, match=rf"pip install 'rlsched\[{module}\]'"):
        importlib.import_module(f"rlsched.integrations.{module}")
