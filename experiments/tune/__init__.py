"""The settings of a training, tuned: a study of trials, each a training of its own."""
