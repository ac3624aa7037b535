"""π_old, remembered for one rollout: what the policy is compared with while it moves and after it has moved."""

import math
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_adaptive_kl.divergences import DIVERGENCES
from sb3_adaptive_kl.objective import Evaluation
from sb3_adaptive_kl.rollout.distributions import (
    ActionDistribution,
    has_closed_form,
    hidden_distribution_error,
    no_closed_form_error,
    torch_distribution,
)
from sb3_adaptive_kl.rollout.evaluation import (
    evaluate,
    evaluate_actor,
    has_separate_actor,
    of_distribution,
    taken_actions,
    valid_transitions,
)
from sb3_adaptive_kl.rollout.minibatches import has_sequences, in_order, preserve_random_state, transitions_per_block
from sb3_adaptive_kl.rollout.reference import Reference

# Transitions per forward pass of a sweep: enough to amortize overhead, and few enough that a minibatch of 64, with its graph,
# takes about as much memory. Sequences take fewer, since they are padded; images only as many as fit into a block
SWEEP_CHUNK_SIZE = 512
SEQUENCES_CHUNK_SIZE = 256
PROBE_SIZE = 64  # transitions that tell whether the critic can be left out


class RolloutKL(NamedTuple):
    """
    The divergence over the states of a rollout, in nats: its mean, which is d, and its largest value; and the mean KL to the
    reference policy, now and before the update, NaN if there is none.
    """

    mean: float
    max: float
    reference: float = math.nan
    reference_before: float = math.nan


class OldPolicy:
    """
    Remembers the policy's action distributions on a rollout, and measures how far the policy has moved since.

    One forward pass over the rollout stores the *parameters* of the distributions, in the order of the flattened rollout.
    Estimators from sampled actions need none: the rollout holds the old log-probabilities.

    :param policy: the policy, before the update; it may move afterwards
    :param buffer: the full rollout buffer; it is read, and flattened as an epoch of SB3 flattens it
    :param kl_divergence: a name in ``DIVERGENCES``
    :param reference: another policy to measure the distance from, on the same states, if there is one
    :raises ValueError: if the policy hides its distribution, or the buffer does not tell which transitions it draws, or the
        reference cannot be compared, or is infinitely far away
    """

    def __init__(
        self,
        policy: ActorCriticPolicy,
        buffer: RolloutBuffer,
        kl_divergence: str = "forward",
        reference: Reference | None = None,
    ) -> None:
        self.policy = policy
        self.buffer = buffer
        self._divergence = DIVERGENCES[kl_divergence]
        # Whether distributions are compared, and not only log-probabilities of the actions taken
        self.needs_distribution = self._divergence.needs_distribution or reference is not None
        self._n_transitions = buffer.buffer_size * buffer.n_envs
        self.distribution: ActionDistribution | None = None
        self.error: ValueError | None = None  # of the last measurement that failed
        fitting = min(SWEEP_CHUNK_SIZE, transitions_per_block(buffer))
        self._chunk_size = SEQUENCES_CHUNK_SIZE if has_sequences(buffer) else fitting
        # An evaluation makes a new one: if this is still there afterwards, evaluate_actions did not use policy.action_dist
        before = torch_distribution(getattr(policy, "action_dist", None))
        self._actor_alone = self._divergence.needs_distribution and can_leave_the_critic_out(policy, buffer)
        # Swept even where no distribution is needed: a policy or buffer that cannot be used is found before the update
        with closing(self._sweep()) as evaluations:
            for rollout_data, index, new in evaluations:
                if not self.needs_distribution:
                    continue
                if self.distribution is None:
                    self._check_distribution(rollout_data, new, before)
                    # Filled in place: small tensors between the large ones of a network would leave holes in memory
                    self.distribution = new.distribution.allocate(self._n_transitions)
                self.distribution[index] = new.distribution
        self.reference: ActionDistribution | None = None
        self._reference_before = math.nan
        if reference is not None:
            self.reference = reference.on_rollout(buffer, self._chunk_size)
            self._reference_divergence = DIVERGENCES[reference.spec.direction]
            assert self.distribution is not None
            reference.check_comparable(self.reference, self.distribution, policy.action_dist)
            before_update = self._reference_divergence.between(self.reference, of_distribution(self.distribution))
            self._reference_before = before_update.mean().item()
            if reference.spec.kl_coef != 0 and not math.isfinite(self._reference_before):
                raise reference.invalid_error()

    def divergence(self, index: th.Tensor, new: Evaluation) -> th.Tensor:
        """
        Compare the policy's evaluation of some transitions with the old policy's.

        :param index: indices of the B transitions in the flattened rollout
        :param new: the policy's evaluation of these transitions, in this order
        :return: the divergence at each state, in nats, shape ``(B,)``
        """
        return self._divergence.between(None if self.distribution is None else self.distribution[index], new)

    def reference_divergence(self, index: th.Tensor, new: Evaluation) -> th.Tensor:
        """
        Compare the policy's evaluation of some transitions with the reference policy's. Parameters: as for ``divergence``.

        :return: the KL divergence at each state, in nats, shape ``(B,)``
        """
        assert self.reference is not None
        return self._reference_divergence.between(self.reference[index], new)

    def divergence_on_rollout(self) -> th.Tensor:
        """
        Measure the policy, as it is now, at each state of the rollout.

        :return: the divergence from the old policy at each state, in nats, shape ``(N,)``
        """
        return self._on_rollout(self.divergence)[0]

    def kl(self) -> RolloutKL:
        """Measure the policy, as it is now, on the whole rollout: NaN where its distributions are not valid any more."""
        measures = [self.divergence] if self.reference is None else [self.divergence, self.reference_divergence]
        try:
            divergence, *others = self._on_rollout(*measures)
        except ValueError as error:  # before the update they were, in this very sweep
            self.error = error
            return RolloutKL(math.nan, math.nan, math.nan, self._reference_before)
        # One synchronization with the device
        means = th.stack([divergence.mean(), divergence.max(), *(other.mean() for other in others)]).tolist()
        return RolloutKL(*means)._replace(reference_before=self._reference_before)

    def _on_rollout(self, *measures: Callable[[th.Tensor, Evaluation], th.Tensor]) -> list[th.Tensor]:
        """Evaluate some functions of the policy at each state of the rollout, in one sweep: shapes ``(N,)``."""
        results: list[th.Tensor] = []
        with closing(self._sweep()) as evaluations:
            for _, index, new in evaluations:
                parts = [measure(index, new) for measure in measures]
                results = results or [part.new_empty(self._n_transitions) for part in parts]
                for result, part in zip(results, parts, strict=True):
                    result[index] = part
        return results

    def _sweep(self) -> Generator[tuple[Any, th.Tensor, Evaluation], None, None]:
        return sweep(self.policy, self.buffer, self.needs_distribution, self._chunk_size, self._actor_alone)

    def _check_distribution(self, rollout_data: Any, new: Evaluation, before: Any) -> None:
        """
        Check that the divergence is that of the distribution which the policy's ``evaluate_actions`` has just used.

        :raises ValueError: if the policy left another one in ``policy.action_dist``, or none, or one with a part elsewhere
        """
        action_dist, actions = self.policy.action_dist, taken_actions(self.policy, rollout_data)
        if torch_distribution(action_dist) is before:
            raise hidden_distribution_error(self.policy)
        valid = valid_transitions(rollout_data)
        if not self._actor_alone:  # otherwise both ways have just led to the same distribution
            log_prob = action_dist.log_prob(actions) if valid is None else action_dist.log_prob(actions)[valid]
            # Another way to the same number may round otherwise
            if not th.isclose(log_prob, new.log_prob, 1e-4, 1e-4, equal_nan=True).all():
                raise hidden_distribution_error(self.policy)
        if not has_closed_form(action_dist, actions, valid):
            raise no_closed_form_error(action_dist)


def sweep(
    policy: ActorCriticPolicy,
    buffer: RolloutBuffer,
    needs_distribution: bool,
    chunk_size: int,
    actor_alone: bool = False,
) -> Generator[tuple[Any, th.Tensor, Evaluation], None, None]:
    """
    Evaluate the policy as it acts (eval mode) on every transition of the rollout, in order, without drawing random numbers.

    Exhaust or close the generator: until then gradients are off for the caller, too.

    :param policy: the policy
    :param buffer: a full rollout buffer
    :param needs_distribution: whether to extract the parameters of the action distributions
    :param chunk_size: transitions per forward pass
    :param actor_alone: whether to evaluate nothing but the distributions
    :return: minibatches, their indices into the flattened rollout, and the evaluation of these transitions
    """
    was_training = policy.training
    policy.set_training_mode(False)
    try:
        with th.no_grad(), preserve_random_state():
            for rollout_data, index in in_order(buffer, chunk_size):
                if actor_alone:
                    yield rollout_data, index, evaluate_actor(policy, rollout_data)
                else:
                    yield rollout_data, index, evaluate(policy, rollout_data, needs_distribution)
    finally:
        policy.set_training_mode(was_training)


def can_leave_the_critic_out(policy: ActorCriticPolicy, buffer: RolloutBuffer) -> bool:
    """Find whether the actor alone has the distribution that the whole policy has."""
    if has_sequences(buffer) or not has_separate_actor(policy):
        return False
    # Tried: a hook, a module that was replaced, or the parameters of a user's distribution may lie on one of the two ways only
    with closing(sweep(policy, buffer, True, PROBE_SIZE)) as evaluations:
        rollout_data, _, whole = next(evaluations)
        alone = evaluate_actor(policy, rollout_data)
        return type(alone.distribution) is type(whole.distribution) and not alone.distribution.kl(whole.distribution).any()
