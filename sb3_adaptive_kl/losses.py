"""
The terms of the loss, as functions of one minibatch.

Schulman et al. 2017 (https://arxiv.org/abs/1707.06347), equations 6 to 9. Inputs have shape ``(B,)`` and hold valid
transitions only (no padding); outputs are scalars to be *minimized*.
"""

import torch as th
from torch.nn import functional as F


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


def clip_fraction(ratio: th.Tensor, clip_range: float | None) -> th.Tensor | None:
    """
    Compute the share of transitions whose ratio lies outside [1 − ε, 1 + ε], for the log.

    :param ratio: r, shape (B,)
    :param clip_range: ε > 0, or None for no clipping
    :return: scalar in [0, 1], or None without clipping
    """
    return None if clip_range is None else ((ratio - 1).abs() > clip_range).float().mean()


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
