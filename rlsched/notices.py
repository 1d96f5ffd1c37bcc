"""Warnings that point at the user's own line."""

from __future__ import annotations

import sys
import warnings

LIBRARIES = (
    "rlsched",
    "torch",
    "lightning",
    "pytorch_lightning",
    "transformers",
    "accelerate",
    "gymnasium",
    "contextlib",
)


def warn(message: str) -> None:
    """Warn the user, at the innermost line that is of none of the libraries through which a call may come."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in LIBRARIES:
        frame, level = frame.f_back, level + 1
    warnings.warn(f"rlsched: {message}", stacklevel=level)
