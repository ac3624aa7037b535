"""
The objective of one minibatch: from the policy's view of it to a loss and its parts.

Schulman et al. 2017 (https://arxiv.org/abs/1707.06347), equations 8 and 9, to be minimized::

    −E[r Â] + β · E[KL] + c_1 · E[(V − R)²] − c_2 · E[entropy]

Everything is a named input; nothing is read from a model.
"""

from typing import Any, NamedTuple

import torch as th

from sb3_adaptive_kl import losses
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
    """
    The parts of one minibatch's loss before its step: scalars, left on their device so that nothing waits for them.

    Only the last field may be ``None``: ``stack`` drops it, and the others are identified by their position.
    """

    loss: th.Tensor
    policy_gradient_loss: th.Tensor
    value_loss: th.Tensor
    entropy_loss: th.Tensor
    kl_loss: th.Tensor
    kl: th.Tensor
    approx_kl: th.Tensor
    clip_fraction: th.Tensor | None = None

    def stack(self) -> th.Tensor:
        """Stack the metrics that are not ``None`` into one vector."""
        # Detached from the graph, which would otherwise live until they are logged
        with th.no_grad():
            return th.stack([part for part in self if part is not None])


def objective(new: Evaluation, kl: th.Tensor, settings: Settings) -> tuple[th.Tensor, MinibatchMetrics]:
    """
    Compute the penalized loss of a minibatch.

    :param new: the policy's evaluation of B transitions
    :param kl: divergence of the policy from the old one at these states, in nats, shape ``(B,)``
    :param settings: coefficients, clip ranges and target of this update
    :return: the scalar loss with its graph, and its parts for the log
    """
    advantages = losses.normalize(new.advantages) if settings.normalize_advantage else new.advantages
    log_ratio = new.log_prob - new.old_log_prob
    ratio = log_ratio.exp()
    mean_kl = kl.mean()

    policy_loss = losses.surrogate_loss(advantages, ratio, settings.clip_range)
    kl_loss = losses.penalty_loss(mean_kl, settings.kl_coef, settings.kl_cutoff_coef, cutoff=CUTOFF * settings.target_kl)
    value_loss = losses.value_loss(new.values, new.old_values, new.returns, settings.clip_range_vf)
    entropy_loss = losses.entropy_loss(new.entropy, new.log_prob)
    loss = policy_loss + kl_loss + settings.vf_coef * value_loss
    if settings.ent_coef is not None:
        loss = loss + settings.ent_coef * entropy_loss

    with th.no_grad():
        approx_kl = k3(log_ratio).mean()
        clip_fraction = losses.clip_fraction(ratio, settings.clip_range)
    return loss, MinibatchMetrics(loss, policy_loss, value_loss, entropy_loss, kl_loss, mean_kl, approx_kl, clip_fraction)
