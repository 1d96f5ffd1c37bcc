"""One page from the runs of a user, of a training, of a comparison or of a benchmark: `rlsched report`."""
