"""Gymnasium environments over inner training: `gymnasium.make("rlsched/Scheduling-v0")` after importing this."""

import gymnasium

from rlsched.envs.mixtures import MIXTURES
from rlsched.envs.scheduling import SchedulingEnv, SchedulingVectorEnv
from rlsched.envs.tasks import Digits, Episode, InnerTask, Prototypes, SetupDistribution, TeacherStudent

ID = "rlsched/Scheduling-v0"

__all__ = [
    "ID",
    "MIXTURES",
    "Digits",
    "Episode",
    "InnerTask",
    "Prototypes",
    "SchedulingEnv",
    "SchedulingVectorEnv",
    "SetupDistribution",
    "TeacherStudent",
]

if ID not in gymnasium.registry:
    gymnasium.register(
        ID,
        entry_point="rlsched.envs.scheduling:SchedulingEnv",
        vector_entry_point="rlsched.envs.scheduling:SchedulingVectorEnv",
    )
