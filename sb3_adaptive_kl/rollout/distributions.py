"""
The parameters of an action distribution as plain, indexable tensors.

A policy of SB3 or sb3-contrib owns *one* mutable distribution object: a reference to the old policy's distribution silently
becomes the new one when the network runs again. So π_old is remembered by its parameters. Two families cover all action
spaces: Gaussians (Box, with or without gSDE), and categoricals side by side (Discrete, MultiDiscrete, MultiBinary, masked or
not: a Bernoulli is a categorical with two outcomes).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, TypeVar

import torch as th
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch.distributions import Bernoulli, Categorical, Normal
from torch.nn import functional as F

from sb3_adaptive_kl.divergences import categorical_kl, gaussian_kl

SelfActionDistribution = TypeVar("SelfActionDistribution", bound="ActionDistribution")


@dataclass(frozen=True, eq=False)
class ActionDistribution(ABC):
    """Action distributions of a batch of B states; every field is a tensor whose first dimension is B."""

    @abstractmethod
    def kl(self: SelfActionDistribution, other: SelfActionDistribution) -> th.Tensor:
        """KL(self ‖ other) of every state, summed over the action dimensions, shape (B,), in nats."""

    def __getitem__(self: SelfActionDistribution, index: th.Tensor) -> SelfActionDistribution:
        """Select the distributions of the states that ``index`` (integers or a boolean mask) names."""
        return type(self)(*[tensor[index] for tensor in vars(self).values()])

    def __setitem__(self: SelfActionDistribution, index: th.Tensor, batch: SelfActionDistribution) -> None:
        for mine, theirs in zip(vars(self).values(), vars(batch).values(), strict=True):
            mine[index] = theirs

    def allocate(self: SelfActionDistribution, n_states: int) -> SelfActionDistribution:
        """Allocate a batch of the same family, to be filled."""
        return type(self)(*[tensor.new_empty((n_states, *tensor.shape[1:])) for tensor in vars(self).values()])


@dataclass(frozen=True, eq=False)
class DiagGaussian(ActionDistribution):
    """
    Independent Gaussians. A squashed Gaussian is compared before its tanh: a bijection leaves the KL unchanged.

    :param loc: means, shape (B, D)
    :param scale: standard deviations, shape (B, D), > 0
    """

    loc: th.Tensor
    scale: th.Tensor

    def kl(self, other: "DiagGaussian") -> th.Tensor:
        return gaussian_kl(self.loc, self.scale, other.loc, other.scale)


@dataclass(frozen=True, eq=False)
class Categoricals(ActionDistribution):
    """
    One or several independent categorical distributions, their outcomes side by side.

    :param log_probs: log-probabilities, normalized within each distribution, shape (B, K), finite
    """

    log_probs: th.Tensor

    def kl(self, other: "Categoricals") -> th.Tensor:
        return categorical_kl(self.log_probs, other.log_probs)


def policy_distribution(policy: ActorCriticPolicy) -> ActionDistribution:
    """
    Extract the parameters of the distribution that a policy has just evaluated, still attached to the graph.

    :param policy: after ``policy.evaluate_actions(...)``
    :return: its parameters
    :raises ValueError: if the policy hides its distribution, or if there is no closed-form KL for it here
    """
    action_dist = getattr(policy, "action_dist", None)
    if torch_distribution(action_dist) is None:
        raise hidden_distribution_error(policy)
    return action_distribution(action_dist)


def hidden_distribution_error(policy: ActorCriticPolicy) -> ValueError:
    """Describe the mistake in a policy whose ``evaluate_actions`` does not use ``policy.action_dist``."""
    return ValueError(
        f"policy={type(policy).__name__}: its evaluate_actions does not leave the distribution it evaluated in "
        "policy.action_dist, so its KL divergence cannot be computed: build it with "
        "self._get_action_dist_from_latent(latent_pi) as SB3's policies do, or pass kl_divergence='k3'"
    )


def action_distribution(distribution: Distribution | None) -> ActionDistribution:
    """
    Extract the parameters of a distribution of SB3 or sb3-contrib, still attached to the graph.

    :param distribution: for instance ``policy.action_dist`` after ``policy.evaluate_actions(...)``
    :return: its parameters
    :raises ValueError: if it is of a family without an exact KL here
    """
    held = torch_distribution(distribution)
    if isinstance(held, Normal):
        return DiagGaussian(held.loc, held.scale)
    if isinstance(held, Bernoulli):
        # log-sigmoid, not log(probs): float32 rounds the probability of a logit above 17 to 1
        return Categoricals(th.cat([F.logsigmoid(-held.logits), F.logsigmoid(held.logits)], dim=1))
    categoricals = held if isinstance(held, list) else [held]
    if all(isinstance(categorical, Categorical) for categorical in categoricals):
        logits = [categorical.logits for categorical in categoricals]
        return Categoricals(_finite(logits[0] if len(logits) == 1 else th.cat(logits, dim=1)))
    raise ValueError(
        f"kl_divergence: no closed-form KL is implemented for the action distribution {type(distribution).__name__} "
        f"(it holds {type(held).__name__}): pass kl_divergence='k3', which needs only log-probabilities"
    )


def torch_distribution(distribution: Distribution | None) -> Any:
    """Unwrap torch's distribution, or the list of them, from SB3's; ``None`` before the first evaluation."""
    # sb3-contrib's masked MultiDiscrete and MultiBinary hold their categoricals in `distributions`
    return getattr(distribution, "distributions", None) or getattr(distribution, "distribution", None)


def forget_distribution(policy: ActorCriticPolicy) -> None:
    """
    Drop the distribution that a policy has evaluated: it holds the whole graph.

    :param policy: its ``action_dist`` is changed
    """
    action_dist: Any = getattr(policy, "action_dist", None)
    if action_dist is not None:
        action_dist.distribution = None
    if hasattr(action_dist, "distributions"):  # sb3-contrib's masked MultiDiscrete and MultiBinary
        action_dist.distributions = None


def _finite(log_probs: th.Tensor) -> th.Tensor:
    """Replace −inf (impossible outcomes) by the most negative float, so that p log p and its gradient are 0 and not NaN."""
    return log_probs.clamp(min=th.finfo(log_probs.dtype).min)
