"""
Adapters for the host, the algorithm that the mixin is put before: how its policy evaluates a minibatch, which samples are
padding, when a rollout is unusable.

They have no state. Each fits every algorithm with that kind of policy and rollout buffer, so that an ``OldPolicy`` can measure
A2C and TRPO, too.
"""

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy

ActionsEvaluation = tuple[th.Tensor, th.Tensor, th.Tensor | None]  # values, log-probabilities, entropy


class Host:
    """SB3's PPO, and every on-policy algorithm with a feed-forward policy."""

    # Whether a sweep over the rollout may only cut it where an episode ends
    keep_sequences_whole = False

    def evaluate_actions(self, policy: ActorCriticPolicy, rollout_data: Any, actions: th.Tensor) -> ActionsEvaluation:
        """
        Run the policy's network once. Afterwards ``policy.action_dist`` is the distribution it used, with its graph.

        :param policy: the host's policy
        :param rollout_data: a minibatch of the host's rollout buffer
        :param actions: its actions, as the policy's distribution expects them
        :return: values, log-probabilities, and entropy or ``None``
        """
        return policy.evaluate_actions(rollout_data.observations, actions)

    def valid(self, rollout_data: Any) -> th.Tensor | None:
        """
        Tell transitions from padding.

        :param rollout_data: a minibatch of the host's rollout buffer
        :return: boolean mask of the transitions, or ``None`` if there is no padding
        """
        return None

    def check_rollout(self, buffer: RolloutBuffer) -> None:
        """
        Refuse a rollout that cannot be trained on.

        :param buffer: the full rollout buffer
        :raises ValueError: with the reason and the remedy
        """


class MaskableHost(Host):
    """sb3-contrib's MaskablePPO: actions are evaluated under the masks they were drawn with."""

    def evaluate_actions(self, policy: Any, rollout_data: Any, actions: th.Tensor) -> ActionsEvaluation:
        evaluation: ActionsEvaluation = policy.evaluate_actions(
            rollout_data.observations, actions, action_masks=rollout_data.action_masks
        )
        return evaluation

    def check_rollout(self, buffer: Any) -> None:
        """
        Refuse a rollout in which a mask left no choice.

        :param buffer: the full rollout buffer
        :raises ValueError: if an action dimension had no valid choice in some state
        """
        forbidden = states_without_action(buffer.action_masks, buffer.action_space)
        if forbidden > 0:
            raise ValueError(
                f"action_masks: in {forbidden} states of the rollout an action dimension has no valid choice left, so that an "
                "invalid one was taken: let action_masks() allow at least one choice per dimension in every state"
            )


class RecurrentHost(Host):
    """sb3-contrib's RecurrentPPO: sequences are padded, and begin with the hidden states of collection."""

    # A sequence cut in two would restart from the old policy's hidden state, which hides a part of the divergence
    keep_sequences_whole = True

    def evaluate_actions(self, policy: Any, rollout_data: Any, actions: th.Tensor) -> ActionsEvaluation:
        evaluation: ActionsEvaluation = policy.evaluate_actions(
            rollout_data.observations, actions, rollout_data.lstm_states, rollout_data.episode_starts
        )
        return evaluation

    def valid(self, rollout_data: Any) -> th.Tensor:
        valid: th.Tensor = rollout_data.mask > 0.5  # floats: 1 for a transition, 0 for padding
        return valid


def states_without_action(action_masks: np.ndarray, action_space: spaces.Space[Any]) -> int:
    """
    Count the states in which an action dimension has nothing left to choose.

    :param action_masks: shape (..., number of choices of all action dimensions together), 0 where a choice is invalid
    :param action_space: Discrete, MultiDiscrete or MultiBinary (two choices per dimension)
    :return: the number of such states
    """
    if isinstance(action_space, spaces.MultiDiscrete):
        n_choices = action_space.nvec
    elif isinstance(action_space, spaces.MultiBinary):
        n_choices = np.full(action_masks.shape[-1] // 2, 2)
    else:
        n_choices = np.array([action_masks.shape[-1]])
    first_choices = np.cumsum(n_choices) - n_choices
    n_valid = np.add.reduceat(action_masks, first_choices, axis=-1)
    return int((n_valid == 0).any(axis=-1).sum())
