"""
How a minibatch is evaluated, for each kind of policy: feed-forward, with masks, with a memory, with both.

An adapter has no state. It fits every algorithm with that kind of policy and rollout buffer, so that an ``OldPolicy`` can
measure A2C and TRPO, too.
"""

from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_adaptive_kl.objective import Evaluation
from sb3_adaptive_kl.rollout.distributions import policy_distribution


class PolicyAdapter:
    """Feed-forward policies: those of SB3's PPO, and of every other on-policy algorithm without masks or a memory."""

    # Whether a sweep over the rollout may only cut it where an episode ends
    keep_sequences_whole = False

    def evaluate(self, policy: ActorCriticPolicy, rollout_data: Any, needs_distribution: bool) -> Evaluation:
        """
        Run the network once on a minibatch. Padding is dropped before anything is computed from it.

        :param policy: the policy, in training or in eval mode
        :param rollout_data: a minibatch of the rollout buffer
        :param needs_distribution: whether to extract the parameters of the action distributions
        :return: the evaluation of the B valid transitions
        """
        actions = taken_actions(policy, rollout_data)
        # Afterwards policy.action_dist is the distribution it used, with its graph
        values, log_prob, entropy = policy.evaluate_actions(rollout_data.observations, actions, **self.arguments(rollout_data))
        evaluation = Evaluation(
            values=values.flatten(),
            log_prob=log_prob,
            entropy=entropy,
            old_values=rollout_data.old_values,
            old_log_prob=rollout_data.old_log_prob,
            advantages=rollout_data.advantages,
            returns=rollout_data.returns,
            distribution=policy_distribution(policy) if needs_distribution else None,
        )
        valid = self.valid(rollout_data)
        if valid is None:
            return evaluation
        return Evaluation(*[None if entries is None else entries[valid] for entries in evaluation])  # type: ignore[arg-type]

    def arguments(self, rollout_data: Any) -> dict[str, Any]:
        """List what ``policy.evaluate_actions`` needs besides observations and actions."""
        return {}

    def valid(self, rollout_data: Any) -> th.Tensor | None:
        """Tell transitions from padding, by a boolean mask, or ``None`` if there is no padding."""
        return None


class MaskablePolicyAdapter(PolicyAdapter):
    """sb3-contrib's MaskablePPO: actions are evaluated under the masks they were drawn with."""

    def arguments(self, rollout_data: Any) -> dict[str, Any]:
        return {"action_masks": rollout_data.action_masks}


class RecurrentPolicyAdapter(PolicyAdapter):
    """sb3-contrib's RecurrentPPO: sequences are padded, and begin with the hidden states of collection."""

    # A sequence cut in two would restart from the old policy's hidden state, which hides a part of the divergence
    keep_sequences_whole = True

    def arguments(self, rollout_data: Any) -> dict[str, Any]:
        return {"lstm_states": rollout_data.lstm_states, "episode_starts": rollout_data.episode_starts}

    def valid(self, rollout_data: Any) -> th.Tensor | None:
        # Floats: 1 for a transition, 0 for padding
        return None if rollout_data.mask is None else rollout_data.mask > 0.5


class MaskableRecurrentPolicyAdapter(RecurrentPolicyAdapter):
    """MaskableRecurrentPPO of this package: padded sequences, under the masks of collection."""

    def arguments(self, rollout_data: Any) -> dict[str, Any]:
        return {**super().arguments(rollout_data), "action_masks": rollout_data.action_masks}


def taken_actions(policy: ActorCriticPolicy, rollout_data: Any) -> th.Tensor:
    """
    Give the actions of a minibatch the type and shape that the policy's distribution expects.

    :param policy: the policy that took them
    :param rollout_data: a minibatch of the rollout buffer
    :return: shape ``(B,)`` integers for Discrete, else floats (contrib's recurrent buffers give integers)
    """
    actions: th.Tensor = rollout_data.actions
    return actions.long().flatten() if isinstance(policy.action_space, spaces.Discrete) else actions.float()
