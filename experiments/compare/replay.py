"""The open-loop replay of a policy's schedule: what a policy gains over it is what adapting to a run is worth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlsched import Controller, SchedulePolicy, control

ControlPath = Sequence[Sequence[float]]  # (inner step, control state) of each decision, as `Controller.control_path`


def mean(paths: Sequence[ControlPath]) -> ControlPath:
    """The mean of the control paths of runs with the same decisions."""
    return torch.tensor(paths, dtype=torch.float64).mean(0).tolist()


class Replay(SchedulePolicy):
    """Leads a controller along a path, whatever it sees.

    All controls are replayed. The probe before the first decision stays as it is, and so does what keeps a run alive;
    where they leave the path, it is taken up again as fast as actions allow.

    Args:
        controller: the controller to lead, which has the policy that is replayed.
        path: the path, with the controller's decisions.
    """

    def __init__(self, controller: Controller, path: ControlPath) -> None:
        super().__init__(controller.policy.weights, safe_start=controller.policy.safe_start)
        self.controller = controller
        self.path = {int(step): torch.tensor(state) for step, *state in path}

    def act(self, observation: Tensor) -> Tensor:
        """The action that leads from where the controller is to where the path is."""
        step, state = self.controller.step_count, self.controller.control_state
        progress = torch.tensor(step / self.controller.total_steps)
        return ((self.path[step] - state) / control.step_sizes(progress)).clamp(-1, 1)
