"""A scheduling policy against other schedules and the replay of its own mean, on equal work: `rlsched compare`."""
