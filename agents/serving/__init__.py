"""A policy as a server, which decides for the runs of many processes and machines: `rlsched serve`."""
