"""Gymnasium environments over inner training: `gymnasium.make("rlsched/Scheduling-v0")` after importing this."""

import gymnasium

from rlsched.envs.mixtures import FAMILIES, MIXTURES
from rlsched.envs.scheduling import SchedulingEnv, SchedulingVectorEnv
from rlsched.envs.stored import Stored, bundled
from rlsched.envs.tasks import InnerTask, SetupDistribution

ID = "rlsched/Scheduling-v0"

__all__ = [
    "FAMILIES",
    "ID",
    "MIXTURES",
    "InnerTask",
    "SchedulingEnv",
    "SchedulingVectorEnv",
    "SetupDistribution",
    "Stored",
    "bundled",
]

if ID not in gymnasium.registry:
    gymnasium.register(
        ID,
        entry_point="rlsched.envs.scheduling:SchedulingEnv",
        vector_entry_point="rlsched.envs.scheduling:SchedulingVectorEnv",
    )
