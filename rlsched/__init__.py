"""Learned schedules for PyTorch optimizers.

``ScheduledOptimizer`` and ``attach`` put a frozen ``SchedulePolicy`` around any supported optimizer. This
package needs torch, numpy and safetensors; ``rlsched.envs``, ``rlsched.agents`` and ``rlsched.experiments``
need the ``train`` extra and are imported by name.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlsched.frozen import FrozenSchedule
    from rlsched.length import steps_of
    from rlsched.onnx_policy import OnnxPolicy
    from rlsched.optimizer import Controller, ScheduledOptimizer, attach
    from rlsched.policy import SchedulePolicy
    from rlsched.population import Population, attach_all
    from rlsched.remote import RemotePolicy
    from rlsched.safety import DivergenceError
    from rlsched.verdict import Intervention

__version__ = "0.1.0"
__all__ = [
    "Controller",
    "DivergenceError",
    "FrozenSchedule",
    "Intervention",
    "OnnxPolicy",
    "Population",
    "RemotePolicy",
    "SchedulePolicy",
    "ScheduledOptimizer",
    "__version__",
    "attach",
    "attach_all",
    "steps_of",
]

_HOMES = {
    "Controller": "optimizer",
    "DivergenceError": "safety",
    "FrozenSchedule": "frozen",
    "Intervention": "verdict",
    "OnnxPolicy": "onnx_policy",
    "Population": "population",
    "RemotePolicy": "remote",
    "SchedulePolicy": "policy",
    "ScheduledOptimizer": "optimizer",
    "attach": "optimizer",
    "attach_all": "population",
    "steps_of": "length",
}

# In a clone without symbolic links (Windows), envs/, agents/ and experiments/ are found beside this package.
_here = Path(__file__).resolve().parent
if not (_here / "envs").is_dir() and (_here.parent / "pyproject.toml").is_file():
    __path__.append(str(_here.parent))


def __getattr__(name: str) -> Any:
    # Lazy: `rlsched --version` must not wait for torch, nor Ctrl-C for its import.
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
