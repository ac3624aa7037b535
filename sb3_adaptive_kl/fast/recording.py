"""
The action distributions of a rollout, kept when the policy acts, so that they need not be evaluated again before the update.

A forward pass over images takes a third of the time of a minibatch step on them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_adaptive_kl.fast.eager import is_enabled
from sb3_adaptive_kl.rollout.distributions import ActionDistribution, action_distribution, is_stock, torch_distribution
from sb3_adaptive_kl.rollout.evaluation import ACTING, has_learned_features


class Recording:
    """The distributions of each time step of a rollout, in their order."""

    def __init__(self) -> None:
        self._steps: list[ActionDistribution] = []
        self._is_on = False

    @contextmanager
    def of(self, policy: ActorCriticPolicy) -> Iterator[None]:
        """
        Record one rollout, in place of the last one.

        :param policy: the policy that collects; nothing is recorded of one with code of the user's, or without shared features
            that are learned
        """
        self._steps = []
        if not (is_enabled() and acts_as_stock(policy) and has_learned_features(policy)):
            yield
            return
        hook = policy.register_forward_hook(self._note)
        self._is_on = True
        try:
            yield
        finally:
            self._is_on = False
            hook.remove()

    def _note(self, policy: ActorCriticPolicy, args: Any, result: Any) -> None:
        # Compiled code leaves no distribution behind. A callback that wants gradients would have its graphs kept
        if self._is_on and not th.is_grad_enabled() and torch_distribution(policy.action_dist) is not None:
            self._steps.append(action_distribution(policy.action_dist))

    def take(self, n_steps: int, n_envs: int) -> ActionDistribution | None:
        """
        Hand the distributions over, in the order in which SB3 flattens a rollout: one environment after the other.

        :param n_steps: time steps of the rollout
        :param n_envs: environments
        :return: those of N = n_steps · n_envs transitions; None if the policy was not called once for each time step
        """
        steps, self._steps = self._steps, []
        if len(steps) != n_steps:
            return None
        rollout = steps[0].allocate(n_steps * n_envs)
        for step, distribution in enumerate(steps):
            rollout[slice(step, None, n_steps)] = distribution
        return rollout

    def __reduce__(self) -> tuple[Any, ...]:
        # The hook is copied with a policy that a callback copies: the copy's records nothing
        return Recording, ()


def acts_as_stock(policy: ActorCriticPolicy) -> bool:
    """Whether everything that acts in a policy is the code of SB3 or sb3-contrib."""
    action_dist = getattr(policy, "action_dist", None)
    return all(is_stock(action_dist, name) for name in ("proba_distribution", "log_prob")) and all(
        is_stock(policy, name) for name in ("forward", *ACTING)
    )
