"""The open-loop replay of a policy's schedule: what a policy gains over it is what adapting to a run is worth."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlsched.control import CONTROLS, step_size
from rlsched.frozen import Window
from rlsched.policy import Policy

ControlPath = Sequence[tuple[int, Mapping[str, float]]]  # of each window: first inner step, states of the controls


def control_path(windows: Sequence[Window], digits: int = 5) -> list[tuple[int, dict[str, float]]]:
    """The control path of a run, from what `Controller.windows` has of it after the probe."""
    return [(w.start, {k: float(f"{v:.{digits}g}") for k, v in w.control.items()}) for w in windows if not w.probing]


class Replay:
    """The policy that leads a run along the mean of control paths, whatever happens in it.

    The controls that the replayed policy moves are replayed. The probe before the first decision stays as it is, and
    so does what keeps a run alive; where they leave the path, it is taken up again as fast as actions allow.

    Args:
        policy: whose runs the paths are of.
        paths: of runs with `total_steps` inner steps.
        total_steps: inner steps in the run.

    Raises:
        ValueError: there are no paths.
    """

    def __init__(self, policy: Policy, paths: Sequence[ControlPath], total_steps: int) -> None:
        if not paths:
            raise ValueError("paths must hold at least one control path to replay, got none")
        self.controls = policy.controls
        self.observations = ("progress", *policy.controls)
        self.safe_start = policy.safe_start
        self.base_schedule = policy.base_schedule
        self.total_steps = total_steps
        self._paths = [(np.array([step for step, _ in path]), [state for _, state in path]) for path in paths]
        text = json.dumps([policy.digest, total_steps, [list(path) for path in paths]])
        self._digest = hashlib.sha256(f"replay of {text}".encode()).hexdigest()

    @property
    def digest(self) -> str:
        """The same for the same paths, and never that of the policy that is replayed."""
        return self._digest

    def begin(self, batch: tuple[int, ...] = ()) -> None:
        """It remembers nothing."""

    def act(self, observation: Tensor, memory: Any = None) -> tuple[Tensor, None]:
        """The action that leads from where the controls are to where the path is, (controls,)."""
        progress, *seen = observation.tolist()
        step = round(progress * self.total_steps)
        actions = []
        for name, value in zip(self.controls, seen, strict=True):
            control = CONTROLS[name]
            # A run that was probed twice decides a step later than the others.
            places = [np.interp(step, steps, [state[name] for state in states]) for steps, states in self._paths]
            state = value * control.seen.scale + control.seen.shift
            actions.append((np.mean(places) - state) / step_size(control, progress))
        return torch.tensor(actions, dtype=torch.float32, device="cpu").clamp(-1, 1), None
