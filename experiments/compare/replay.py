"""The open-loop replay of a policy's schedule: what a policy gains over it is what adapting to a run is worth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rlsched import Controller, SchedulePolicy, control
from rlsched.control import LR

# (inner step, log of the lr factor, states of momentum and clip) of each window, as `Controller.control_path`
ControlPath = Sequence[Sequence[float]]


class Replay(SchedulePolicy):
    """Leads a controller along the mean of control paths, whatever it sees.

    All controls are replayed. The probe before the first decision stays as it is, and so does what keeps a run alive;
    where they leave the path, it is taken up again as fast as actions allow.

    Args:
        controller: the controller to lead, which has the policy that is replayed.
        paths: of runs with as many steps.
    """

    def __init__(self, controller: Controller, paths: Sequence[ControlPath]) -> None:
        super().__init__(controller.policy.weights, safe_start=controller.policy.safe_start)
        self.controller = controller
        self.paths = [np.array(path).T for path in paths]

    def act(self, observation: Tensor) -> Tensor:
        """The action that leads from where the controller is to where the path is."""
        step, state = self.controller.step_count, self.controller.control_state
        # A run that was probed twice decides a step later than the others.
        places = [[np.interp(step, steps, values) for values in controls] for steps, *controls in self.paths]
        target = torch.tensor(places, dtype=torch.float32).mean(0)
        target[LR] -= self.controller.lr_offset
        progress = torch.tensor(step / self.controller.total_steps)
        return ((target - state) / control.step_sizes(progress)).clamp(-1, 1)
