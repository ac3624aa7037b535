"""How a policy is evaluated on a minibatch: with masks, with a memory, with both or neither, as the samples tell."""

from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import MlpExtractor

from sb3_adaptive_kl.objective import Evaluation
from sb3_adaptive_kl.rollout.distributions import action_distribution, is_stock, policy_distribution

# What MaskablePPO's and RecurrentPPO's buffers hand out besides SB3's samples: evaluate_actions has arguments of these names
MORE_ARGUMENTS = ("action_masks", "lstm_states", "episode_starts")
# Methods that must be SB3's or sb3-contrib's for get_distribution to be known to have the distribution of evaluate_actions
ACTING = ("evaluate_actions", "get_distribution", "extract_features", "_get_action_dist_from_latent")


def evaluate(policy: ActorCriticPolicy, rollout_data: Any, needs_distribution: bool) -> Evaluation:
    """
    Run the network once on a minibatch. Padding is dropped before anything is computed from it.

    :param policy: the policy, in training or in eval mode
    :param rollout_data: a minibatch of the rollout buffer
    :param needs_distribution: whether to extract the parameters of the action distributions
    :return: the evaluation of the B valid transitions
    """
    more, actions = more_arguments(rollout_data), taken_actions(policy, rollout_data)
    # Afterwards policy.action_dist is the distribution it used, with its graph
    values, log_prob, entropy = policy.evaluate_actions(rollout_data.observations, actions, **more)
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
    valid = valid_transitions(rollout_data)
    if valid is None:
        return evaluation
    return Evaluation(*[None if entries is None else entries[valid] for entries in evaluation])  # type: ignore[arg-type]


def has_separate_actor(policy: ActorCriticPolicy) -> bool:
    """
    Whether the policy's code is SB3's or sb3-contrib's, which can run the actor without the critic, and leaving the critic out
    saves something: shared features of images would be most of the work.
    """
    stock = type(getattr(policy, "mlp_extractor", None)) is MlpExtractor and all(is_stock(policy, name) for name in ACTING)
    return stock and not (policy.share_features_extractor and any(map(th.is_tensor, policy.features_extractor.parameters())))


def evaluate_actor(policy: ActorCriticPolicy, rollout_data: Any) -> Evaluation:
    """
    Evaluate the actor alone. Parameters: as for ``evaluate``.

    :param policy: one that ``has_separate_actor``
    :return: the evaluation, with nothing but the distribution
    """
    distribution = policy.get_distribution(rollout_data.observations, **more_arguments(rollout_data))
    return of_distribution(action_distribution(distribution))


def of_distribution(distribution: Any) -> Evaluation:
    """Wrap an ``ActionDistribution``: as much of an evaluation as a divergence in closed form needs."""
    return Evaluation(*[None] * len(Evaluation._fields))._replace(distribution=distribution)  # type: ignore[arg-type]


def more_arguments(rollout_data: Any) -> dict[str, Any]:
    """Find what a policy with masks or a memory is evaluated with, besides observations and actions."""
    return {name: getattr(rollout_data, name) for name in MORE_ARGUMENTS if hasattr(rollout_data, name)}


def valid_transitions(rollout_data: Any) -> th.Tensor | None:
    """
    Tell transitions from padding.

    :param rollout_data: a minibatch of the rollout buffer
    :return: a boolean mask, or ``None`` if there is no padding
    """
    # sb3-contrib pads sequences; its mask holds floats: 1 for a transition, 0 for padding. Another buffer's may mean anything
    mask = rollout_data.mask if hasattr(rollout_data, "lstm_states") else None
    return None if mask is None else mask > 0.5


def taken_actions(policy: ActorCriticPolicy, rollout_data: Any) -> th.Tensor:
    """
    Give the actions of a minibatch the type and shape that the policy's distribution expects.

    :param policy: the policy that took them
    :param rollout_data: a minibatch of the rollout buffer
    :return: shape ``(B,)`` integers for Discrete, else floats (contrib's recurrent buffers give integers)
    """
    actions: th.Tensor = rollout_data.actions
    return actions.long().flatten() if isinstance(policy.action_space, spaces.Discrete) else actions.float()
