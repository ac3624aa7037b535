"""
Masks in the zoo's scripts, which evaluate, play and film by ``model.predict(observation, …)`` without any.

The environments that the zoo makes are wrapped: they remember the observation that they returned last. ``predict`` recognizes
it, and asks them for their masks.
"""

from inspect import signature
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import numpy as np
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

MASKS = "action_masks"  # the method of an environment, and the argument of predict()


class MaskSource(VecEnvWrapper):
    """Environments that can be found by the observation they returned last, the very object."""

    # By the identity of an observation, which lives as long as its entry: trials of a search may run in several threads
    latest: ClassVar["WeakValueDictionary[int, MaskSource]"] = WeakValueDictionary()
    observation: Any = None

    def reset(self) -> Any:
        return self._remember(self.venv.reset())

    def step_wait(self) -> Any:
        observation, *rest = self.venv.step_wait()
        return self._remember(observation), *rest

    def _remember(self, observation: Any) -> Any:
        self.latest.pop(id(self.observation), None)
        self.observation = observation
        self.latest[id(observation)] = self
        return observation


class AsksForMasks:
    """Mixin before a maskable algorithm."""

    def predict(self, observation: Any, *args: Any, **kwargs: Any) -> Any:
        source = MaskSource.latest.get(id(observation))
        if source is not None:
            kwargs.setdefault(MASKS, np.stack(source.env_method(MASKS)))
        return super().predict(observation, *args, **kwargs)  # type: ignore[misc]


def asking_for_masks(algorithm: type) -> type:
    """Return an algorithm of the same name that the zoo's scripts can use: itself if it has no masks."""
    takes_masks = MASKS in signature(algorithm.predict).parameters  # type: ignore[attr-defined]
    return type(algorithm.__name__, (AsksForMasks, algorithm), {}) if takes_masks else algorithm


def require_masks(env: VecEnv, algo: str) -> MaskSource:
    """
    Wrap the environments of a maskable algorithm.

    :param env: as the zoo made them
    :param algo: the algorithm's name in the zoo
    :raises ValueError: if they have no masks
    """
    if not env.has_attr(MASKS):
        raise ValueError(
            f"--algo {algo} needs an environment with a method action_masks(): add it there, or in a wrapper that is named as "
            "env_wrapper in the environment's entry (a yml file for --conf-file). Where every action is valid, take "
            f"--algo {algo.replace('_mask', '')}"
        )
    return MaskSource(env)


def offer_masks(env: VecEnv) -> VecEnv:
    """Wrap environments to play in, if they have masks."""
    return MaskSource(env) if env.has_attr(MASKS) else env
