"""
The parameters of an action distribution as plain, indexable tensors.

A policy of SB3 or sb3-contrib owns *one* mutable distribution object: a reference to the old policy's distribution silently
becomes the new one when the network runs again. So π_old is remembered by its parameters. Two families cover all of their
action spaces: Gaussians (Box, with or without gSDE), and categoricals side by side (Discrete, MultiDiscrete, MultiBinary,
masked or not: a Bernoulli is a categorical with two outcomes). A user's policy may also hold Beta distributions, bijections of
these, and several heads, one after the other in the columns of the action.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from types import FunctionType, MethodType
from typing import Any, TypeVar

import torch as th
from stable_baselines3.common.distributions import Distribution, SquashedDiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch.distributions import Bernoulli, Beta, Categorical, Independent, Normal, TransformedDistribution
from torch.distributions.transforms import AffineTransform, SigmoidTransform, TanhTransform, Transform
from torch.nn import functional as F

from sb3_adaptive_kl.divergences import beta_kl, categorical_kl, gaussian_kl

# Prefixes of the modules that count as SB3's
STOCK_PACKAGES = ("stable_baselines3.", "sb3_contrib.", "sb3_adaptive_kl.maskable_recurrent.")

SelfActionDistribution = TypeVar("SelfActionDistribution", bound="ActionDistribution")


@dataclass(frozen=True, eq=False)
class ActionDistribution(ABC):
    """Action distributions of a batch of B states; every field is a tensor whose first dimension is B, or has such fields."""

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

        def empty(part: Any) -> Any:
            return part.new_empty((n_states, *part.shape[1:])) if isinstance(part, th.Tensor) else part.allocate(n_states)

        return type(self)(*map(empty, vars(self).values()))


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


@dataclass(frozen=True, eq=False)
class Betas(ActionDistribution):
    """
    Independent Beta distributions.

    :param alpha: first concentrations, shape (B, D), > 0
    :param beta: second concentrations, shape (B, D), > 0
    """

    alpha: th.Tensor
    beta: th.Tensor

    def kl(self, other: "Betas") -> th.Tensor:
        return beta_kl(self.alpha, self.beta, other.alpha, other.beta)


@dataclass(frozen=True, eq=False)
class Joint(ActionDistribution):
    """Two independent parts of an action, such as a choice and its amount; either may be a joint of further parts."""

    first: ActionDistribution
    second: ActionDistribution

    def kl(self, other: "Joint") -> th.Tensor:
        return self.first.kl(other.first) + self.second.kl(other.second)


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
        "policy.action_dist.distribution (of several heads, the list), so its KL divergence cannot be computed: build it with "
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
    heads = _heads(distribution)
    # MultiDiscrete: one closed form over all outcomes, instead of one for each dimension
    if len(heads) > 1 and all(isinstance(head, Categorical) for head in heads):
        return Categoricals(_finite(th.cat([_flat(head.logits) for head in heads], dim=1)))
    parts = [_parameters(head) for head in heads]
    if any(part is None for part in parts):
        raise no_closed_form_error(distribution)
    return reduce(Joint, parts)  # type: ignore[arg-type,return-value]


def _parameters(head: Any) -> ActionDistribution | None:
    """Extract the parameters of one of torch's distributions, or ``None`` if its family is not known here."""
    if isinstance(head, (Independent, TransformedDistribution)):
        n_dims = len(head.batch_shape + head.event_shape)
        constant = all(_is_constant_bijection(transform, n_dims) for transform in getattr(head, "transforms", ()))
        return _parameters(head.base_dist) if constant else None  # bijections leave the KL unchanged
    # Subclasses, too: has_closed_form() tells whether their densities are still these
    if isinstance(head, Normal):
        return DiagGaussian(_flat(head.loc), _flat(head.scale))
    if isinstance(head, Beta):
        return Betas(_flat(head.concentration1), _flat(head.concentration0))
    if isinstance(head, Bernoulli):
        # log-sigmoid, not log(probs): float32 rounds the probability of a logit above 17 to 1
        logits = _flat(head.logits)
        # Both outcomes of a switch side by side, as sb3-contrib's masked policies have them
        return Categoricals(th.stack([F.logsigmoid(-logits), F.logsigmoid(logits)], dim=2).flatten(1))
    return Categoricals(_finite(_flat(head.logits))) if isinstance(head, Categorical) else None


def _is_constant_bijection(transform: Transform, n_dims: int) -> bool:
    """Whether a transform cannot depend on the state, nor move with a parameter."""
    # A mean or scale per state would be another bijection for each policy, and change the KL between them
    if type(transform) is AffineTransform:
        numbers = [number for number in (transform.loc, transform.scale) if isinstance(number, th.Tensor)]
        return not any(number.requires_grad or number.dim() >= n_dims for number in numbers)
    return type(transform) in (TanhTransform, SigmoidTransform)


def no_closed_form_error(distribution: Distribution | None) -> ValueError:
    """Describe a distribution whose KL divergence is not known here."""
    held = ", ".join(type(head).__name__ for head in _heads(distribution))
    return ValueError(
        f"kl_divergence: no closed-form KL is implemented for the action distribution {type(distribution).__name__} (it holds "
        f"{held}, and its log_prob may have other parts). Its `distribution` must be a Normal, Beta, Categorical or Bernoulli "
        "of torch, Independent or TransformedDistribution of one with a constant tanh, sigmoid or affine transform, or a list "
        "of these in the order of the action's columns, and its log_prob the sum of theirs; or pass kl_divergence='k3', which "
        "needs only log-probabilities (and no reference_policy)"
    )


def has_closed_form(distribution: Distribution, actions: th.Tensor, valid: th.Tensor | None = None) -> bool:
    """
    Check that ``action_distribution`` compares all there is: a user's distribution may have another part.

    :param distribution: of SB3, of sb3-contrib, or of the user's, evaluated for B states
    :param actions: shape (B, ...)
    :param valid: a mask of the states that are no padding, shape (B,), if there is padding
    :return: whether its log-probabilities are those of the torch distributions that it holds, as torch or SB3 write them
    """
    held, heads = torch_distribution(distribution), _heads(distribution)
    if not all(is_stock(family, "log_prob", (*STOCK_PACKAGES, "torch.")) for head in heads for family in _nested(head)):
        return False
    # What SB3 computes: a subclass of the user's may add a part to it, such as a second action
    bases: Any = type(distribution).__mro__
    stock = next(base for base in bases if base.__module__.startswith(STOCK_PACKAGES) or base is object)
    is_sb3s = isinstance(held, (Normal, Bernoulli)) or all(isinstance(head, Categorical) for head in heads)
    if is_sb3s and stock not in (Distribution, object):
        closed_form = stock.log_prob(distribution, actions)
    else:
        shapes = [head.batch_shape + head.event_shape for head in heads]
        columns = actions.reshape(len(actions), -1)
        widths = [shape[1:].numel() for shape in shapes]
        if any(shape[:1] != actions.shape[:1] for shape in shapes) or sum(widths) != columns.shape[1]:
            return False
        split = zip(heads, th.split(columns, widths, dim=1), shapes, strict=True)
        parts = [_inside(head, part.reshape(shape)) for head, part, shape in split]
        actions = th.cat([_flat(part) for part in parts], dim=1).reshape(actions.shape).to(actions.dtype)
        if not all(head.support.check(part).all() for head, part in zip(heads, parts, strict=True)):
            return False  # the columns of another head
        log_probs = [head.log_prob(part) for head, part in zip(heads, parts, strict=True)]
        closed_form = sum(_flat(log_prob).sum(dim=1) for log_prob in log_probs)
    log_prob = distribution.log_prob(actions)
    # Another way to the same number may round otherwise; a part elsewhere changes it by far more
    close = th.isclose(closed_form, log_prob, 1e-4, 1e-4, equal_nan=True)
    return bool((close if valid is None else close[valid]).all())


def _inside(head: Any, actions: th.Tensor) -> th.Tensor:
    """Replace bounded actions by the middle of their range: a user's ``log_prob`` may clamp actions near the bounds."""
    bijections = _bijections(head)
    if not (bijections or isinstance(_nested(head)[-1], Beta)):
        return actions
    return reduce(lambda inside, bijection: bijection(inside), bijections, th.full_like(actions, 0.5))


def bijections(distribution: Distribution) -> list[tuple[int, list[Transform]]]:
    """List the heads that are transformed, and how: two distributions have a KL divergence only if they do it alike."""
    if isinstance(distribution, SquashedDiagGaussianDistribution):  # it squashes by itself, and holds a Normal
        return [(0, [TanhTransform()])]
    return [(index, _bijections(head)) for index, head in enumerate(_heads(distribution)) if _bijections(head)]


def _bijections(head: Any) -> list[Transform]:
    return [transform for family in _nested(head)[::-1] for transform in getattr(family, "transforms", ())]


def _nested(head: Any) -> list[Any]:
    """List one of torch's distributions and those inside it."""
    return [head, *_nested(head.base_dist)] if hasattr(head, "base_dist") else [head]


def _heads(distribution: Distribution | None) -> list[Any]:
    held = torch_distribution(distribution)
    return list(held) if isinstance(held, list | tuple) else [held]


def _flat(tensor: th.Tensor) -> th.Tensor:
    """Put several independent actions per state, such as those of several agents, side by side: shape (B, D)."""
    return tensor.reshape(len(tensor), -1)


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


@contextmanager
def replaced(owner: Any, **methods: Any) -> Iterator[None]:
    """
    Set methods on an object, in place of its class's, for a time.

    :param owner: a policy or a buffer; what was set on it before comes back
    :param methods: name → function
    """
    before = {name: vars(owner)[name] for name in methods if name in vars(owner)}
    vars(owner).update(methods)
    try:
        yield
    finally:
        for name in methods:
            del vars(owner)[name]
        vars(owner).update(before)


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
