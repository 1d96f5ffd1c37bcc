"""The verbs of the command that are of training: a module each."""
