"""A mixture so small that PPO trains on it in seconds."""

from rlsched.envs import SetupDistribution
from rlsched.envs.mixtures import classifier
from rlsched.envs.sources import TeacherStudent

SOURCE = TeacherStudent(inputs=6, classes=3, points=(32, 64), validation_points=16)
SETUP = SetupDistribution(decisions=(6, 9), sgd_lr=(1e-4, 1e-1), adaptive_lr=(1e-4, 1e-2))
TINY = tuple(classifier(SOURCE, hidden, batch_size=8, interval=4, setup=SETUP) for hidden in ((8,), (5,)))
# Three updates.
OPTIONS = {
    "tasks": "tiny",
    "timesteps": 3 * 32,
    "num_envs": 4,
    "processes": 1,
    "n_steps": 8,
    "batch_size": 16,
    "n_epochs": 1,
    "hidden": (8,),
    "eval_every": 2,
    "eval_episodes": 3,
}
