"""Why a policy decided so, in tables and pictures: `rlsched explain`. The numbers are of `rlsched.agents.explain`."""
