"""A scheduling policy against constant, linear and cosine learning rates, on equal work: `rlsched compare`."""
