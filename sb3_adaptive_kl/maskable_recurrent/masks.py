"""Where masks come from: the environments, asked before every step of a rollout or of an evaluation."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from sb3_contrib.common.maskable.utils import EXPECTED_METHOD_NAME, get_action_masks, is_masking_supported
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv


class MasksOfRollout:
    """
    Forward pre-hook under which a policy acts during a rollout: sb3-contrib's RecurrentPPO calls
    ``policy(observations, lstm_states, episode_starts)`` once per step, and adds the transition afterwards.

    :param env: the environments, or ``None`` for a hook that changes nothing
    :param buffer: a ``MasksOfSequences``, which is told the masks of each transition
    """

    def __init__(self, env: Any, buffer: Any) -> None:
        self.env, self.buffer = env, buffer

    def __call__(self, policy: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # A callback's own call may give masks, as the fifth argument or by name, or ask about other states
        of_environments = self.env is not None and 3 <= len(args) <= 4 and len(args[2]) == self.env.num_envs
        if not of_environments or "action_masks" in kwargs:
            return None
        kwargs["action_masks"] = masks = masks_of(self.env)
        # It may run the policy again after the environments have moved on: the first call is that of the transition
        if self.buffer.next_masks is None:
            self.buffer.next_masks = masks
        return args, kwargs

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (None, None)  # a callback may keep copies of the policy, which act elsewhere


def check_masking(env: GymEnv) -> None:
    """
    Check that environments have masks.

    :raises ValueError: if not
    """
    if not is_masking_supported(env):
        raise ValueError(
            "the environments have no method action_masks(): add it, or wrap each of them in "
            "sb3_contrib.common.wrappers.ActionMasker. use_masking=False allows every action"
        )


def check_shape(shape: Sequence[int], action_space: spaces.Space[Any], n_states: int, n_choices: int) -> None:
    """
    Check that masks have as many booleans as there are choices in all states.

    :raises ValueError: if not
    """
    if np.prod(shape) != n_states * n_choices:
        raise ValueError(
            f"action_masks of shape {tuple(shape)}: {action_space} needs {n_choices} booleans for each of {n_states} "
            "observations: one for each choice of each action dimension, one after the other"
        )


def masks_of(env: GymEnv) -> np.ndarray:
    """
    Ask an environment, or all of several, for their masks.

    :return: shape (choices,) or (n_envs, choices)
    :raises ValueError: if an environment gives a part of its choices, or arrays of several lengths, or none
    """
    if not isinstance(env, VecEnv):
        return get_action_masks(env)
    masks = env.env_method(EXPECTED_METHOD_NAME)
    try:
        return np.stack(masks).astype(bool)
    except ValueError as error:
        raise ValueError(
            "action_masks() must return one array, as long in every environment: for MultiDiscrete, the choices of all "
            f"dimensions one after the other (np.concatenate). Got {masks}"
        ) from error
