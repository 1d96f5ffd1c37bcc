"""Ordinary training scripts, by hand and with rlsched in them: `python -m rlsched.experiments.recipes`."""
