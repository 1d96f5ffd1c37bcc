"""Policies against tuned and untuned schedules, on development tasks and on test tasks: `rlsched benchmark`."""
