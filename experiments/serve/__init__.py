"""How many jobs a served policy decides for, and how fast: `python -m rlsched.experiments.serve`."""
