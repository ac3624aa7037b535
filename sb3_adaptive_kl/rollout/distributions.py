"""
The parameters of an action distribution as plain, indexable tensors.

A policy of SB3 or sb3-contrib owns *one* mutable distribution object: a reference to the old policy's distribution silently
becomes the new one when the network runs again. So π_old is remembered by its parameters. Two families cover all action
spaces: Gaussians (Box, with or without gSDE), and categoricals side by side (Discrete, MultiDiscrete, MultiBinary, masked or
not: a Bernoulli is a categorical with two outcomes).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, TypeVar

import torch as th
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch.distributions import Bernoulli, Categorical, Normal
from torch.nn import functional as F

from sb3_adaptive_kl.divergences import categorical_kl, gaussian_kl

# Prefixes of the modules that count as SB3's
STOCK_PACKAGES = ("stable_baselines3.", "sb3_contrib.", "sb3_adaptive_kl.maskable_recurrent.")

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
        "self._get_action_dist_from_latent(latent_pi) as SB3's policies do, or pass kl_divergence='k3' (and no "
        "reference_policy)"
    )


def action_distribution(distribution: Distribution | None) -> ActionDistribution:
    """
    Extract the parameters of a distribution of SB3 or sb3-contrib, still attached to the graph.

    :param distribution: for instance ``policy.action_dist`` after ``policy.evaluate_actions(...)``
    :return: its parameters
    :raises ValueError: if it is of a family without an exact KL here
    """
    held = torch_distribution(distribution)
    # Several independent actions per state, such as those of several agents, are put side by side
    if isinstance(held, Normal):
        return DiagGaussian(held.loc.flatten(1), held.scale.flatten(1))
    if isinstance(held, Bernoulli):
        # log-sigmoid, not log(probs): float32 rounds the probability of a logit above 17 to 1
        logits = held.logits.flatten(1)
        return Categoricals(th.cat([F.logsigmoid(-logits), F.logsigmoid(logits)], dim=1))
    categoricals = held if isinstance(held, list) else [held]
    if all(isinstance(categorical, Categorical) for categorical in categoricals):
        all_logits = [categorical.logits.flatten(1) for categorical in categoricals]
        return Categoricals(_finite(all_logits[0] if len(all_logits) == 1 else th.cat(all_logits, dim=1)))
    raise no_closed_form_error(distribution)


def no_closed_form_error(distribution: Distribution | None) -> ValueError:
    """Describe a distribution whose KL divergence is not known here."""
    held = torch_distribution(distribution)
    return ValueError(
        f"kl_divergence: no closed-form KL is implemented for the action distribution {type(distribution).__name__} (it holds "
        f"{type(held).__name__}, and its log_prob may have other parts): pass kl_divergence='k3', which needs only "
        "log-probabilities (and no reference_policy)"
    )


def closed_form_log_prob(distribution: Distribution, actions: th.Tensor) -> th.Tensor | None:
    """
    Compute the log-probability of actions under the distributions that ``action_distribution`` compares.

    :param distribution: of SB3, of sb3-contrib, or of the user's, evaluated for B states
    :param actions: shape (B, ...)
    :return: shape (B,); ``None`` if the user has changed a family of torch's
    """
    held = torch_distribution(distribution)
    families = held if isinstance(held, list) else [held]
    if not all(is_stock(family, "log_prob", (*STOCK_PACKAGES, "torch.")) for family in families):
        return None
    # What SB3 computes: a subclass of the user's may add a part to it, such as a second action
    bases: Any = type(distribution).__mro__
    stock = next(base for base in bases if base.__module__.startswith(STOCK_PACKAGES) or base is object)
    if stock not in (Distribution, object):
        return stock.log_prob(distribution, actions)  # type: ignore[no-any-return]
    chosen = actions.unbind(dim=1) if isinstance(held, list) else [actions]
    log_probs = [family.log_prob(part) for family, part in zip(families, chosen, strict=True)]
    return sum(log_prob.reshape(len(actions), -1).sum(dim=1) for log_prob in log_probs)  # type: ignore[no-any-return]


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


def is_stock(owner: Any, name: str, packages: tuple[str, ...] = STOCK_PACKAGES) -> bool:
    """
    Tell SB3's code from the user's, which may rely on more than its result.

    :param owner: a policy, an action distribution, or a buffer
    :param name: name of a method
    :param packages: prefixes of the modules that count as SB3's
    :return: whether the method is written in one of them, and not overridden, wrapped or replaced on the instance
    """
    function = getattr(type(owner), name, None)
    # Not by its __module__, which functools.wraps copies to a wrapper
    if not isinstance(function, FunctionType) or not function.__globals__.get("__name__", "").startswith(packages):
        return False
    return getattr(owner, name) in (MethodType(function, owner), function)  # a static method is not bound
