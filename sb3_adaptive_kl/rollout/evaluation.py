"""The policy on the rollout: evaluated on one minibatch with its graph, or swept over all of it without one."""

from collections.abc import Generator
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_adaptive_kl.objective import Evaluation
from sb3_adaptive_kl.rollout.distributions import ActionDistribution, action_distribution, torch_distribution
from sb3_adaptive_kl.rollout.hosts import Host
from sb3_adaptive_kl.rollout.minibatches import in_order, preserve_random_state, transitions_per_block

# Transitions per forward pass of a sweep: large enough to amortize overhead, small enough to keep memory flat. Sequences take
# fewer, since they are padded; images only as many as fit into a block
SWEEP_CHUNK_SIZE = 2048
SEQUENCES_CHUNK_SIZE = 256


def evaluate(policy: ActorCriticPolicy, host: Host, rollout_data: Any, needs_distribution: bool) -> Evaluation:
    """
    Run the network once on a minibatch. Padding is dropped before anything is computed from it.

    :param policy: the policy, in training or in eval mode
    :param host: knows how the policy is called, and what is padding
    :param rollout_data: a minibatch of the host's rollout buffer
    :param needs_distribution: whether to extract the parameters of the action distributions
    :return: the evaluation of the B valid transitions
    """
    values, log_prob, entropy = host.evaluate_actions(policy, rollout_data, taken_actions(policy, rollout_data))
    evaluation = Evaluation(
        values=values.flatten(),
        log_prob=log_prob,
        entropy=entropy,
        old_values=rollout_data.old_values,
        old_log_prob=rollout_data.old_log_prob,
        advantages=rollout_data.advantages,
        returns=rollout_data.returns,
        distribution=_distribution(policy) if needs_distribution else None,
    )
    valid = host.valid(rollout_data)
    if valid is None:
        return evaluation
    return Evaluation(*[None if entries is None else entries[valid] for entries in evaluation])  # type: ignore[arg-type]


def taken_actions(policy: ActorCriticPolicy, rollout_data: Any) -> th.Tensor:
    """
    Give the actions of a minibatch the type and shape that the policy's distribution expects.

    :param policy: the policy that took them
    :param rollout_data: a minibatch of the host's rollout buffer
    :return: shape ``(B,)`` integers for Discrete, else floats (contrib's recurrent buffers give integers)
    """
    actions: th.Tensor = rollout_data.actions
    return actions.long().flatten() if isinstance(policy.action_space, spaces.Discrete) else actions.float()


def hidden_distribution_error(policy: ActorCriticPolicy) -> ValueError:
    """
    Describe the mistake in a policy whose ``evaluate_actions`` does not use ``policy.action_dist``.

    :param policy: the policy
    :return: the error to raise
    """
    return ValueError(
        f"policy={type(policy).__name__}: its evaluate_actions does not leave the distribution it evaluated in "
        "policy.action_dist, so its KL divergence cannot be computed: build it with "
        "self._get_action_dist_from_latent(latent_pi) as SB3's policies do, or pass kl_divergence='k3'"
    )


def sweep(
    policy: ActorCriticPolicy, buffer: RolloutBuffer, host: Host, needs_distribution: bool
) -> Generator[tuple[Any, th.Tensor, Evaluation], None, None]:
    """
    Evaluate the policy as it acts (eval mode) on every transition of the rollout, in order, without drawing random numbers.

    Exhaust or close the generator: until then gradients are off for the caller, too.

    :param policy: the policy
    :param buffer: a full rollout buffer
    :param host: as for ``evaluate``
    :param needs_distribution: as for ``evaluate``
    :return: minibatches, their indices into the flattened rollout, and the evaluation of these transitions
    """
    chunk_size = SEQUENCES_CHUNK_SIZE if host.keep_sequences_whole else min(SWEEP_CHUNK_SIZE, transitions_per_block(buffer))
    was_training = policy.training
    policy.set_training_mode(False)
    try:
        with th.no_grad(), preserve_random_state():
            for rollout_data, index in in_order(buffer, chunk_size, host.keep_sequences_whole):
                yield rollout_data, index, evaluate(policy, host, rollout_data, needs_distribution)
    finally:
        policy.set_training_mode(was_training)


def _distribution(policy: ActorCriticPolicy) -> ActionDistribution:
    action_dist = getattr(policy, "action_dist", None)
    if action_dist is None or torch_distribution(action_dist) is None:
        raise hidden_distribution_error(policy)
    return action_distribution(action_dist)
