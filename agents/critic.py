"""A critic that sees what the actor cannot: what is known of a run while policies train, and not when they are used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import MlpExtractor
from torch import Tensor

Array = NDArray[Any]


class Privileged:
    """What the critic is told of each run beside what the actor observes.

    How far the log loss has fallen (the return so far) and how far the validation loss is above its lowest, told to the
    actor or not; the learning rate itself; and which of the tasks it is.

    Args:
        families: names of the tasks, as the infos have them.
    """

    def __init__(self, families: Sequence[str]) -> None:
        self._families = np.array(families, object)
        self.size = 3 + len(families)

    def of(self, infos: Mapping[str, Array]) -> Array:
        """Of the infos of a vector environment, (num_envs, size), float32."""
        with np.errstate(divide="ignore", invalid="ignore"):
            above = np.log(infos["validation_loss"] / infos["best_validation_loss"])
            known = np.stack([infos["return"] / 2, above, np.log(infos["lr"]) / 5], 1)
        bounded = np.nan_to_num(known, nan=0.0).clip(-5, 5)
        return np.concatenate([bounded, infos["family"][:, None] == self._families], 1).astype(np.float32)


class PrivilegedCriticPolicy(ActorCriticPolicy):
    """Stable-Baselines3's "MlpPolicy" whose actor sees the first `seen` observations alone, its critic all of them.

    From Pinto et al. (2018), "Asymmetric Actor Critic for Image-Based Robot Learning".
    """

    def __init__(self, *args: Any, seen: int, **options: Any) -> None:
        self.seen = seen
        super().__init__(*args, **options)

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = _Apart(self.seen, self.features_dim, self.net_arch, self.activation_fn, self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "seen": self.seen}


class _Apart(MlpExtractor):
    def __init__(self, seen: int, features: int, *options: Any) -> None:
        super().__init__(features, *options)
        self.seen = seen
        self.policy_net = MlpExtractor(seen, *options).policy_net

    def forward_actor(self, features: Tensor) -> Tensor:
        return super().forward_actor(features[..., : self.seen])
