"""
The step back: an update that went too far is shortened, so that its KL divergence keeps within a ceiling.

With θ(α) = θ_old + α · (θ_new − θ_old), the divergence d(α) is close to α² · d(1) for small steps (``docs/theory.md``). TRPO
(Schulman et al. 2015, https://arxiv.org/abs/1502.05477, appendix C) shortens its step by a fixed factor until it is allowed;
knowing the power takes fewer tries.
"""

import math
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch as th

from sb3_adaptive_kl.rollout.evaluation import evaluate
from sb3_adaptive_kl.rollout.minibatches import in_order, random_state_kept
from sb3_adaptive_kl.rollout.old_policy import OldPolicy
from sb3_adaptive_kl.snapshot import Snapshot

# The search aims at this share of the ceiling, and ends where d is between the next one and the ceiling
AIM, CLOSE_ENOUGH = 0.9, 0.8
# Each takes a sweep over the rollout. One or two are usual; after these many the longest step known to be allowed is taken
MAX_TRIES = 12
# Exponents of d(α) that the search believes
EXPONENTS = 1.0, 8.0


class ShortenedStep(NamedTuple):
    """What is left of an update's step: α, and the divergence at each state of the rollout, in nats, shape ``(N,)``."""

    scale: float
    kl: th.Tensor


def shorten_step(
    old_policy: OldPolicy, snapshot: Snapshot, measure: Callable[[], th.Tensor], kl: float, limit: float
) -> ShortenedStep:
    """
    Shorten the actor's part of an update until the divergence keeps within a limit.

    Scaled are all parameters but those of the critic alone, so that a feature extractor or an LSTM that it shares is scaled,
    and all floating-point buffers, such as the statistics of a batch normalization. The critic's own parameters keep their
    step; so do counters and the optimizer's state.

    :param old_policy: remembers the policy before the update
    :param snapshot: of the policy before the update
    :param measure: sweeps over the rollout with the policy as it is
    :param kl: d after the whole step in nats, > limit
    :param limit: largest d allowed, in nats, > 0
    :return: the largest α that was found to be allowed, and what was measured there. If there is none, the policy is left at
        α = 0, and the measured divergence is larger than the limit only if the actor depends on more than is scaled.
    """
    critic = _critic_parameters(old_policy)
    moved = [
        (tensor, old, tensor.detach().clone())
        for tensor, old in zip(snapshot.tensors, snapshot.saved, strict=True)
        if id(tensor) not in critic and tensor.is_floating_point() and not th.equal(tensor, old)
    ]

    measured: dict[float, th.Tensor] = {}

    def set_length(scale: float) -> None:
        with th.no_grad():
            for tensor, old, new in moved:
                step = new - old
                # A constant −inf, as in an attention mask, or a running minimum that began as one, has no finite step
                tensor.copy_(th.where(step.isfinite(), old + scale * step, new))

    def divergence_at(scale: float) -> float:
        set_length(scale)
        measured[scale] = measure()
        return measured[scale].mean().item()

    scale = longest_allowed(divergence_at, kl, limit)
    set_length(scale)
    return ShortenedStep(scale, measured[scale] if scale in measured else measure())


def longest_allowed(divergence_at: Callable[[float], float], kl: float, limit: float) -> float:
    """
    Search for the largest α with d(α) ≤ limit, as if d were a power of α: its exponent is 2 at first, then that of the last
    two tries. Where this leads out of the interval in which the limit must lie, the interval is halved.

    :param divergence_at: d as a function of α in (0, 1), in nats; NaN and ``inf`` count as too far
    :param kl: d(1), > limit
    :param limit: > 0
    :return: an α in (0, 1) at which d was found to keep within the limit, or 0
    """
    low, high = 0.0, 1.0
    scale, exponent = 1.0, 2.0
    for _ in range(MAX_TRIES):
        last_scale, last_kl = scale, max(kl, sys.float_info.min)
        scale = last_scale * (AIM * limit / last_kl) ** (1 / exponent)
        if not low < scale < high:
            scale = (low + high) / 2
        kl = divergence_at(scale)
        if CLOSE_ENOUGH * limit <= kl <= limit:
            return scale
        low, high = (scale, high) if kl <= limit else (low, scale)
        if 0 < kl < math.inf and last_kl < math.inf:
            exponent = min(max(math.log(kl / last_kl) / math.log(scale / last_scale), EXPONENTS[0]), EXPONENTS[1])
    return low


def _critic_parameters(old_policy: OldPolicy) -> set[int]:
    """
    Find the parameters that the value of a state depends on and the log-probability of its action does not, whatever the
    policy's classes and names. A branch that this state does not take is no part of either, and counts as the actor's.

    :return: their ``id``
    """
    policy, host = old_policy.policy, old_policy.host
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    was_training, cudnn = policy.training, th.backends.cudnn.enabled
    policy.set_training_mode(False)
    th.backends.cudnn.enabled = False  # its recurrent layers have no gradient in evaluation mode
    try:
        with random_state_kept():
            rollout_data, _ = next(in_order(old_policy.buffer, 1, host.keep_sequences_whole))
            new = evaluate(policy, host, rollout_data, needs_distribution=False)
            reached = [_reached(output.sum(), parameters) for output in (new.values, new.log_prob)]
    finally:
        policy.set_training_mode(was_training)
        th.backends.cudnn.enabled = cudnn
    return reached[0] - reached[1]


def _reached(output: th.Tensor, parameters: Sequence[th.Tensor]) -> set[int]:
    if not output.requires_grad:  # all that it depends on is frozen
        return set()
    gradients = th.autograd.grad(output, parameters, retain_graph=True, allow_unused=True)
    return {id(parameter) for parameter, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
