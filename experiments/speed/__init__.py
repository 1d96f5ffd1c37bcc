"""What inner training costs, on one core, beside what it could cost: `python -m rlsched.experiments.speed`."""
