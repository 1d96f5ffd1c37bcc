"""Gymnasium environments over inner training.

After importing this, `gymnasium.make("rlsched/Scheduling-v0")`; or without, by the name that has Gymnasium import it,
`gymnasium.make("rlsched.envs:rlsched/Scheduling-v0")`. (Since its 1.0, it reads no entry points of other packages.)
"""

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
