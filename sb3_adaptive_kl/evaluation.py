"""
The policy on the rollout: evaluated on a minibatch with its graph, or swept over every transition without one.

What only the host knows stands here in three methods: how a minibatch is evaluated, which of its entries are not padding, and
whether the rollout is sound.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, NamedTuple

import torch as th
from gymnasium import spaces
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from sb3_adaptive_kl.distributions import ActionDistribution, action_distribution, held_by
from sb3_adaptive_kl.divergences import k3, pearson
from sb3_adaptive_kl.minibatches import in_order, minibatches, random_state_kept, transitions_per_block

# Transitions evaluated at a time when nothing is trained: enough to be quick, few enough not to be felt in memory (of images
# only as many as make a block; of sequences fewer, since they are padded)
SWEEP_CHUNK_SIZE = 2048
SEQUENCES_CHUNK_SIZE = 256


class Evaluation(NamedTuple):
    """The policy's view of a minibatch's B valid transitions, beside what the buffer remembers of them; shapes (B,)."""

    values: th.Tensor
    log_prob: th.Tensor
    entropy: th.Tensor | None  # None where the distribution has no closed form
    distribution: ActionDistribution | None  # None if the divergence is estimated from log_prob alone
    old_values: th.Tensor
    old_log_prob: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor


class Divergence(NamedTuple):
    """
    A way to compare a policy with the old one.

    :param needs_distribution: whether it looks at the parameters of the action distributions, or at log-probabilities only
    :param between: function of the old policy's distributions and the new policy's evaluation of the same B transitions;
        gives the divergence per state, shape (B,), in nats
    """

    needs_distribution: bool
    between: Callable[[Any, Any], th.Tensor]


DIVERGENCES = {
    "forward": Divergence(True, lambda old, new: old.kl(new.distribution)),
    "reverse": Divergence(True, lambda old, new: new.distribution.kl(old)),
    "k3": Divergence(False, lambda old, new: k3(new.log_prob - new.old_log_prob)),
    "pearson": Divergence(False, lambda old, new: pearson(new.log_prob - new.old_log_prob)),
}


class PolicyEvaluation(OnPolicyAlgorithm):
    """Base of the mixin: evaluates the host's policy and compares it with what it was."""

    batch_size: int | None
    kl_divergence: str

    # Whether a sweep may cut the rollout only where an episode ends
    _keep_sequences_whole: bool = False
    _action_dist_checked: bool = False

    # ---------------------------------------------------------------- what the host decides

    def _evaluate_actions(self, rollout_data: Any, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """
        Values, log-probabilities and entropy (or None) of a minibatch. Afterwards ``policy.action_dist`` must be the
        distribution that gave them, with its graph: so it is for the policies of SB3 and sb3-contrib.
        """
        return self.policy.evaluate_actions(rollout_data.observations, actions)

    def _valid(self, rollout_data: Any) -> th.Tensor | None:
        """Boolean mask of the entries that are transitions and not padding, or None if all are."""
        return None

    def _check_rollout(self) -> None:
        """
        :raises ValueError: if the rollout just collected cannot be trained on
        """

    # ---------------------------------------------------------------- evaluation

    def _evaluate(self, rollout_data: Any) -> Evaluation:
        """Run the network once on a minibatch; padding is dropped before anything is computed from it."""
        values, log_prob, entropy = self._evaluate_actions(rollout_data, self._actions(rollout_data))
        evaluation = Evaluation(
            values.flatten(),
            log_prob,
            entropy,
            action_distribution(self.policy.action_dist) if self._divergence.needs_distribution else None,
            rollout_data.old_values,
            rollout_data.old_log_prob,
            rollout_data.advantages,
            rollout_data.returns,
        )
        valid = self._valid(rollout_data)
        if valid is None:
            return evaluation
        return Evaluation(*[None if entries is None else entries[valid] for entries in evaluation])  # type: ignore[arg-type]

    def _actions(self, rollout_data: Any) -> th.Tensor:
        actions: th.Tensor = rollout_data.actions
        # A categorical wants the number of its outcome, the others floats, which contrib's recurrent buffers do not give
        return actions.long().flatten() if isinstance(self.action_space, spaces.Discrete) else actions.float()

    @property
    def _divergence(self) -> Divergence:
        """The measure that the loss and the rule share."""
        return DIVERGENCES[self.kl_divergence]

    def _sweep(self) -> Iterator[tuple[th.Tensor, Evaluation]]:
        """
        The policy as it acts (eval mode) on every transition of the rollout, in order, without a graph or a random number.
        To be exhausted: until then, gradients are off for the caller as well.

        :return: pairs of indices into the flattened rollout and the evaluation of these transitions
        """
        self.policy.set_training_mode(False)
        with th.no_grad(), random_state_kept():
            chunk_size = min(SWEEP_CHUNK_SIZE, transitions_per_block(self.rollout_buffer))
            if self._keep_sequences_whole:
                chunk_size = SEQUENCES_CHUNK_SIZE
            for rollout_data, index in in_order(self.rollout_buffer, chunk_size, self._keep_sequences_whole):
                yield index, self._evaluate(rollout_data)

    # ---------------------------------------------------------------- comparison

    def _old_distributions(self) -> ActionDistribution | None:
        """
        π_old's parameters in the order of the flattened rollout, or None if only log-probabilities are compared.

        :raises ValueError: if the policy or the buffer cannot be used
        """
        if self._divergence.needs_distribution and not self._action_dist_checked:
            self._check_action_dist()
            self._action_dist_checked = True
        old = None
        for index, evaluation in self._sweep():
            if (batch := evaluation.distribution) is not None:
                # Written into one place: small tensors kept between the large ones of a network would leave holes in memory
                old = old or batch.room_for(self._n_transitions)
                old[index] = batch
        return old

    def _divergence_on_rollout(self, old: ActionDistribution | None) -> th.Tensor:
        """
        The divergence of the policy, as it is now, from the old one at every state of the rollout.

        :param old: what ``_old_distributions`` gave before the update
        :return: shape (N,), in nats
        """
        divergence = th.empty(self._n_transitions, device=self.device)
        for index, new in self._sweep():
            divergence[index] = self._divergence.between(None if old is None else old[index], new)
        return divergence

    @property
    def _n_transitions(self) -> int:
        return self.rollout_buffer.buffer_size * self.rollout_buffer.n_envs

    def _check_action_dist(self) -> None:
        """
        :raises ValueError: if ``policy.action_dist`` is not the distribution that ``evaluate_actions`` has just used
        """
        self.policy.set_training_mode(False)
        with th.no_grad(), random_state_kept(), closing(minibatches(self.rollout_buffer, self.batch_size)) as epoch:
            rollout_data, _ = next(epoch)
            actions = self._actions(rollout_data)
            before = held_by(getattr(self.policy, "action_dist", None))
            _, log_prob, _ = self._evaluate_actions(rollout_data, actions)
            after = held_by(getattr(self.policy, "action_dist", None))
            left_behind = after is not None and after is not before
            if left_behind:
                log_prob_after = self.policy.action_dist.log_prob(actions)
                left_behind = bool(th.isclose(log_prob_after, log_prob, equal_nan=True).all())
        if not left_behind:
            raise ValueError(
                f"policy={type(self.policy).__name__}: its evaluate_actions does not leave the distribution it evaluated in "
                "policy.action_dist, so its KL divergence cannot be computed: build it with "
                "self._get_action_dist_from_latent(latent_pi) as SB3's policies do, or pass kl_divergence='k3'"
            )
