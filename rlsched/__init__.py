"""Learned schedules for PyTorch optimizers.

``ScheduledOptimizer`` and ``attach`` put a frozen ``SchedulePolicy`` around any supported optimizer. This
package needs torch, numpy and safetensors; ``rlsched.envs``, ``rlsched.agents`` and ``rlsched.experiments``
need the ``train`` extra and are imported by name.
"""

from pathlib import Path

from rlsched.frozen import FrozenSchedule
from rlsched.length import steps_of
from rlsched.optimizer import Controller, ScheduledOptimizer, attach
from rlsched.policy import SchedulePolicy
from rlsched.safety import DivergenceError, Intervention

__version__ = "0.1.0"
__all__ = [
    "Controller",
    "DivergenceError",
    "FrozenSchedule",
    "Intervention",
    "SchedulePolicy",
    "ScheduledOptimizer",
    "__version__",
    "attach",
    "steps_of",
]

# In a clone without symbolic links (Windows), envs/, agents/ and experiments/ are found beside this package.
_here = Path(__file__).resolve().parent
if not (_here / "envs").is_dir() and (_here.parent / "pyproject.toml").is_file():
    __path__.append(str(_here.parent))
