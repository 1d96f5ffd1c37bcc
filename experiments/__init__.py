"""Studies: a folder each, with what is run, the runs, and an analysis that reads nothing but their results."""
