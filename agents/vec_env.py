"""Stable-Baselines3's view of a Gymnasium vector environment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvObs, VecEnvStepReturn

from rlsched.agents.critic import Privileged


class VectorEnvAdapter(VecEnv):
    """Stable-Baselines3's view of a vector environment of inner training runs, for any of its algorithms:

        env = VectorEnvAdapter(gymnasium.make_vec("rlsched.envs:rlsched/Scheduling-v0", num_envs=64))
        model = PPO("MlpPolicy", env).learn(1_000_000)

    Infos are empty but where an episode ended. There they hold the episode's last info, `terminal_observation`, and
    `episode` with its return `r`, which is not scaled as rewards are, and length `l`, from which Stable-Baselines3 logs
    `rollout/ep_rew_mean`: not of an episode that was cut short since its worker was lost, whose return says nothing.

    Args:
        env: the vector environment, which begins the next episode in the step that ends one.
        privileged: what is to follow the observations, for the critic's eyes.

    Raises:
        ValueError: the environment goes on after an episode in another way.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], privileged: Privileged | None = None) -> None:
        mode = env.metadata.get("autoreset_mode")
        if mode != AutoresetMode.SAME_STEP:
            raise ValueError(f"env must reset with AutoresetMode.SAME_STEP, got {mode}")
        self.env, self.privileged = env, privileged
        space = env.single_observation_space
        if privileged is not None:
            assert isinstance(space, Box)
            more = np.full(privileged.size, np.inf, np.float32)
            space = Box(np.concatenate([space.low, -more]), np.concatenate([space.high, more]))
        super().__init__(env.num_envs, space, env.single_action_space)
        self._lengths = np.zeros(env.num_envs, int)

    def reset(self) -> VecEnvObs:
        seeds: Sequence[int | None] | None = self._seeds if any(s is not None for s in self._seeds) else None
        observations, infos = self.env.reset(seed=seeds)  # type: ignore[arg-type] # as Gymnasium's own, one seed per run
        self._reset_seeds()
        self.reset_infos = [{} for _ in range(self.num_envs)]
        self._lengths[:] = 0
        return self._seen(observations, infos)

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        observations, rewards, terminated, truncated, infos = self.env.step(self._actions)
        done = terminated | truncated
        self._lengths += 1
        listed: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if done.any():
            final = infos["final_info"]
            last = np.array([observations[i] if row is None else row for i, row in enumerate(infos["final_obs"])])
            finals = self._seen(last, final)
        for i in np.flatnonzero(done):
            listed[i] = {key: value[i] for key, value in final.items() if not key.startswith("_")}
            listed[i]["terminal_observation"] = finals[i]
            listed[i]["TimeLimit.truncated"] = bool(truncated[i] and not terminated[i])
            if terminated[i]:
                listed[i]["episode"] = {"r": float(final["return"][i]), "l": int(self._lengths[i])}
        self._lengths[done] = 0
        return self._seen(observations, infos), rewards, done, listed

    def _seen(self, observations: np.ndarray, infos: dict[str, Any]) -> np.ndarray:
        """The observations, and what the critic is told beside them."""
        return observations if self.privileged is None else np.concatenate([observations, self.privileged.of(infos)], 1)

    def get_images(self) -> Sequence[np.ndarray | None]:
        frames = self.env.render() or [None] * self.num_envs
        return [frame if isinstance(frame, np.ndarray) else None for frame in frames]

    def close(self) -> None:
        self.env.close()

    def get_attr(self, attr_name: str, indices: int | Iterable[int] | None = None) -> list[Any]:
        return [getattr(self.env, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: int | Iterable[int] | None = None) -> None:
        raise AttributeError(f"{attr_name}: the runs of a vector environment have no attributes of their own to set")

    def env_method(
        self, method_name: str, *method_args: Any, indices: int | Iterable[int] | None = None, **method_kwargs: Any
    ) -> list[Any]:
        raise AttributeError(f"{method_name}: the runs of a vector environment have no methods of their own")

    def env_is_wrapped(self, wrapper_class: type, indices: int | Iterable[int] | None = None) -> list[bool]:
        return [False] * len(list(self._get_indices(indices)))
