"""
The objective of one minibatch: from the policy's view of it to a loss and its parts, and the terms of the loss.

Schulman et al. 2017 (https://arxiv.org/abs/1707.06347), equations 8 and 9, to be minimized::

    −E[r Â] + β · E[KL] + c_1 · E[(V − R)²] − c_2 · E[entropy]   (+ c · E[KL to a reference policy])

Everything is a named input; nothing is read from a model.
"""

from typing import Any, NamedTuple

import torch as th
from torch.nn import functional as F

from sb3_adaptive_kl.divergences import k3

# Where the hinge begins, relative to the target: as in modular_rl, batch-ppo and TF-Agents
CUTOFF = 2.0


class Settings(NamedTuple):
    """The numbers of an update: everything a schedule, a rule or a callback may change before the next one."""

    target_kl: float
    kl_coef: float
    clip_range: float | None
    clip_range_vf: float | None
    vf_coef: float
    ent_coef: float | None  # None for 0, so that a zero gradient is not computed
    max_grad_norm: float
    normalize_advantage: bool
    kl_cutoff_coef: float | None  # None for 0
    reference_kl_coef: float | None = None  # None for a constant 0, and without a reference policy


class Evaluation(NamedTuple):
    """The policy's view of B transitions (padding removed), next to what the rollout remembers of them; shapes ``(B,)``."""

    values: th.Tensor
    log_prob: th.Tensor
    entropy: th.Tensor | None  # None where the distribution has no closed form
    old_values: th.Tensor
    old_log_prob: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor
    distribution: Any = None  # an ActionDistribution, unless the divergence only needs log-probabilities


class MinibatchMetrics(NamedTuple):
    """The parts of one minibatch's loss before its step: scalars, left on their device so that nothing waits for them."""

    loss: th.Tensor
    policy_gradient_loss: th.Tensor
    value_loss: th.Tensor
    entropy_loss: th.Tensor
    kl_loss: th.Tensor
    kl: th.Tensor
    approx_kl: th.Tensor
    clip_fraction: th.Tensor


def objective(
    new: Evaluation, kl: th.Tensor, settings: Settings, reference_kl: th.Tensor | None = None
) -> tuple[th.Tensor, MinibatchMetrics]:
    """
    Compute the penalized loss of a minibatch.

    :param new: the policy's evaluation of B transitions
    :param kl: divergence of the policy from the old one at these states, in nats, shape ``(B,)``
    :param settings: coefficients, clip ranges and target of this update
    :param reference_kl: divergence from the reference policy at these states, in nats, shape ``(B,)``, if it is penalized
    :return: the scalar loss with its graph, and its parts for the log
    """
    advantages = normalize(new.advantages) if settings.normalize_advantage else new.advantages
    log_ratio = new.log_prob - new.old_log_prob
    ratio = log_ratio.exp()
    mean_kl = kl.mean()

    policy_loss = surrogate_loss(advantages, ratio, settings.clip_range)
    kl_loss = penalty_loss(mean_kl, settings.kl_coef, settings.kl_cutoff_coef, cutoff=CUTOFF * settings.target_kl)
    critic_loss = value_loss(new.values, new.old_values, new.returns, settings.clip_range_vf)
    negative_entropy = entropy_loss(new.entropy, new.log_prob)
    loss = policy_loss + kl_loss + settings.vf_coef * critic_loss
    # Terms without a coefficient are left out, so that neither they nor their gradients are computed
    if settings.ent_coef is not None:
        loss = loss + settings.ent_coef * negative_entropy
    if reference_kl is not None and settings.reference_kl_coef is not None:
        loss = loss + penalty_loss(reference_kl.mean(), settings.reference_kl_coef)

    with th.no_grad():
        approx_kl = k3(log_ratio).mean()
        clipped = clip_fraction(ratio, settings.clip_range)
    return loss, MinibatchMetrics(loss, policy_loss, critic_loss, negative_entropy, kl_loss, mean_kl, approx_kl, clipped)


# ---------------------------------------------------------------- the terms: inputs of shape (B,), scalars to be minimized


def normalize(advantages: th.Tensor) -> th.Tensor:
    """
    Scale advantages to zero mean and unit standard deviation. A single one is left as it is (SB3's GH issue #325).

    :param advantages: shape (B,)
    :return: shape (B,)
    """
    if len(advantages) == 1:
        return advantages
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8)


def surrogate_loss(advantages: th.Tensor, ratio: th.Tensor, clip_range: float | None = None) -> th.Tensor:
    """
    Negative surrogate objective: −E[r Â] (equation 6), or −E[min(r Â, clip(r, 1 − ε, 1 + ε) Â)] (equation 7).

    :param advantages: Â, shape (B,)
    :param ratio: r = π_new(a|s) / π_old(a|s), shape (B,)
    :param clip_range: ε > 0, or None for no clipping
    :return: scalar
    """
    surrogate = advantages * ratio
    if clip_range is not None:
        surrogate = th.min(surrogate, advantages * ratio.clamp(1 - clip_range, 1 + clip_range))
    return -surrogate.mean()


def clip_fraction(ratio: th.Tensor, clip_range: float | None) -> th.Tensor:
    """
    Compute the share of transitions whose ratio lies outside [1 − ε, 1 + ε], for the log.

    :param ratio: r, shape (B,)
    :param clip_range: ε > 0, or None for no clipping
    :return: scalar in [0, 1]
    """
    return ratio.new_zeros(()) if clip_range is None else ((ratio - 1).abs() > clip_range).float().mean()


def penalty_loss(kl: th.Tensor, kl_coef: float, cutoff_coef: float | None = None, cutoff: float = 0.0) -> th.Tensor:
    """
    β · KL (equation 8), and a hinge beyond a cutoff: β · KL + c · max(0, KL − cutoff)².

    The hinge is that of modular_rl (https://github.com/joschu/modular_rl), batch-ppo and TF-Agents.

    :param kl: mean KL of the minibatch in nats, scalar
    :param kl_coef: β > 0
    :param cutoff_coef: c > 0, or None for no hinge
    :param cutoff: where the hinge begins, in nats
    :return: scalar
    """
    loss = kl_coef * kl
    if cutoff_coef is not None:
        loss = loss + cutoff_coef * F.relu(kl - cutoff).square()
    return loss


def value_loss(values: th.Tensor, old_values: th.Tensor, returns: th.Tensor, clip_range_vf: float | None = None) -> th.Tensor:
    """
    Squared error E[(V − R)²] of equation 9, the change of V optionally clipped as in the OpenAI implementation.

    :param values: V of the network in training, shape (B,)
    :param old_values: V when the rollout was collected, shape (B,)
    :param returns: R, the TD(λ) targets, shape (B,)
    :param clip_range_vf: largest change of V, in units of the return, or None for no clipping
    :return: scalar
    """
    if clip_range_vf is not None:
        values = old_values + (values - old_values).clamp(-clip_range_vf, clip_range_vf)
    return F.mse_loss(values, returns)


def entropy_loss(entropy: th.Tensor | None, log_prob: th.Tensor) -> th.Tensor:
    """
    Negative mean entropy, estimated from the actions taken where the distribution has no closed form.

    :param entropy: shape (B,), or None (squashed Gaussians)
    :param log_prob: log π_new(a|s), shape (B,)
    :return: scalar
    """
    return log_prob.mean() if entropy is None else -entropy.mean()
