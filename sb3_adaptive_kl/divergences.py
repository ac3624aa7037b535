"""
How far a policy has moved, state by state.

Every function takes the parameters of two batches of action distributions (or the log ratio of sampled actions) and returns
one value per state, shape ``(B,)``, in nats, summed over the action dimensions. They are differentiable, exact up to float
rounding, exactly 0 with a zero gradient where both policies agree, and finite wherever the true value is.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch as th


def gaussian_kl(p_loc: th.Tensor, p_scale: th.Tensor, q_loc: th.Tensor, q_scale: th.Tensor) -> th.Tensor:
    """
    KL(p ‖ q) of diagonal Gaussians, summed over the action dimensions, in nats::

        Σ_d ½ [ (μ_p − μ_q)² / σ_q²  +  e^{2u} − 1 − 2u ],    u = log σ_p − log σ_q

    The usual closed form with σ_p²/σ_q² = e^{2u}: ``expm1`` keeps the digits that ``x − 1 − log x`` loses at x ≈ 1.

    :param p_loc: means of p, shape (B, D)
    :param p_scale: standard deviations of p, shape (B, D), > 0
    :param q_loc: means of q, shape (B, D)
    :param q_scale: standard deviations of q, shape (B, D), > 0
    :return: shape (B,), ≥ 0
    """
    log_var_ratio = 2 * (p_scale.log() - q_scale.log())
    mahalanobis = ((p_loc - q_loc) / q_scale).square()
    return 0.5 * (mahalanobis + th.expm1(log_var_ratio) - log_var_ratio).sum(dim=1)


def beta_kl(p_alpha: th.Tensor, p_beta: th.Tensor, q_alpha: th.Tensor, q_beta: th.Tensor) -> th.Tensor:
    """
    KL(p ‖ q) of independent Beta distributions, summed over the action dimensions, in nats::

        Σ_d D(α_p, α_q) + D(β_p, β_q) − D(α_p + β_p, α_q + β_q),    D(x, y) = log Γ(y) − log Γ(x) − ψ(x) (y − x)

    The Bregman divergence of the log-normalizer log B(α, β), as for every exponential family
    (https://arxiv.org/abs/0911.4863). In double precision: at concentrations of 1e5 the terms are 1e6 times their sum.

    :param p_alpha: first concentrations of p, shape (B, D), > 0
    :param p_beta: second concentrations of p, shape (B, D), > 0
    :param q_alpha: first concentrations of q, shape (B, D), > 0
    :param q_beta: second concentrations of q, shape (B, D), > 0
    :return: shape (B,), ≥ 0
    """
    precise = th.float32 if p_alpha.device.type == "mps" else th.float64  # Apple's GPUs do not have double precision
    p_a, p_b, q_a, q_b = (concentration.to(precise) for concentration in (p_alpha, p_beta, q_alpha, q_beta))

    def bregman(x: th.Tensor, y: th.Tensor) -> th.Tensor:
        return y.lgamma() - x.lgamma() - x.digamma() * (y - x)

    kl = bregman(p_a, q_a) + bregman(p_b, q_b) - bregman(p_a + p_b, q_a + q_b)
    return kl.clamp(min=0).sum(dim=1).to(p_alpha.dtype)


def categorical_kl(p_log_probs: th.Tensor, q_log_probs: th.Tensor) -> th.Tensor:
    """
    KL(p ‖ q) of one or several independent categorical distributions side by side, summed over them, in nats::

        Σ_k p_k (log p_k − log q_k)  =  Σ_k [ q_k − p_k − p_k δ_k ],    δ_k = log q_k − log p_k

    The added ``q_k − p_k`` sum to 0 within each distribution and make every term ≥ 0, so that rounding of the
    normalization (1e-6 at a logit of 16) enters squared instead of linearly. They are computed as
    ``(p + q) tanh(δ / 2)``: the same number, but without cancellation at small δ and without overflow at large δ.

    :param p_log_probs: normalized log-probabilities of p, shape (B, K) with K the number of outcomes of all distributions
        together; finite (an impossible outcome has the most negative float, see ``distributions.py``)
    :param q_log_probs: the same of q
    :return: shape (B,), ≥ 0 up to rounding
    """
    p, q = p_log_probs.exp(), q_log_probs.exp()
    delta = q_log_probs - p_log_probs
    return ((p + q) * th.tanh(0.5 * delta) - p * delta).sum(dim=1)


def k3(log_ratio: th.Tensor) -> th.Tensor:
    """
    Estimate of KL(old ‖ new) from actions sampled from the old policy, in nats: ``(r − 1) − log r``, r = π_new / π_old.

    Unbiased, never negative, and without gradient noise at r = 1 (http://joschu.net/blog/kl-approx.html).

    :param log_ratio: log π_new(a|s) − log π_old(a|s) for a ~ π_old, shape (B,)
    :return: shape (B,), ≥ 0
    """
    return th.expm1(log_ratio) - log_ratio


def pearson(log_ratio: th.Tensor) -> th.Tensor:
    """
    Half the Pearson χ² divergence from actions sampled from the old policy, in nats: ``½ (r − 1)²``, r = π_new / π_old.

    The second-order expansion of KL(old ‖ new) around r = 1; an upper bound of ``k3`` for r > 1, a lower one for r < 1.

    :param log_ratio: log π_new(a|s) − log π_old(a|s) for a ~ π_old, shape (B,)
    :return: shape (B,), ≥ 0
    """
    return 0.5 * th.expm1(log_ratio).square()


class Divergence(NamedTuple):
    """
    A measure of how far the policy has moved, as ``kl_divergence`` names it.

    :param needs_distribution: whether it compares the parameters of action distributions, or only log-probabilities
    :param between: function of the old policy's ``ActionDistribution`` (``None`` unless needed) and the new policy's
        ``Evaluation`` of the same B transitions; returns the divergence at each state, shape (B,), in nats
    """

    needs_distribution: bool
    between: Callable[[Any, Any], th.Tensor]


DIVERGENCES = {
    # The closed forms are chosen by the family of the distribution, in rollout/distributions.py
    "forward": Divergence(True, lambda old, new: old.kl(new.distribution)),
    "reverse": Divergence(True, lambda old, new: new.distribution.kl(old)),
    # Estimates from the actions taken
    "k3": Divergence(False, lambda _, new: k3(new.log_prob - new.old_log_prob)),
    "pearson": Divergence(False, lambda _, new: pearson(new.log_prob - new.old_log_prob)),
}
