"""
The step back: a backtracking line search that shortens an update whose KL divergence exceeds a ceiling.

With θ(α) = θ_old + α · (θ_new − θ_old), the divergence d(α) is close to α² · d(1) for small steps (``docs/theory.md``). TRPO
(Schulman et al. 2015, https://arxiv.org/abs/1502.05477, appendix C) shortens its step by a fixed factor until it is allowed;
with the exponent known, fewer tries are needed.
"""

import math
import sys
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet

import torch as th

from sb3_adaptive_kl.rollout.evaluation import evaluate
from sb3_adaptive_kl.rollout.minibatches import in_order, preserve_random_state
from sb3_adaptive_kl.rollout.old_policy import OldPolicy, RolloutKL
from sb3_adaptive_kl.snapshot import Snapshot
from sb3_adaptive_kl.step import optimized_parameters

TARGET_FRACTION = 0.9  # aim at this fraction of the limit
MIN_FRACTION = 0.8  # accept a KL between this fraction and the limit
# Each try sweeps the rollout. After these, take the longest step known to be allowed
MAX_TRIES = 12
MIN_EXPONENT, MAX_EXPONENT = 1.0, 8.0  # bounds on the estimated exponent of d(α)
CRITIC_PROBE_SIZE = 64  # transitions that tell the critic's parameters from the actor's


def shorten_step(
    snapshot: Snapshot, critic: AbstractSet[int], measure_kl: Callable[[], RolloutKL], kl: float, limit: float
) -> tuple[float, RolloutKL]:
    """
    Shorten the actor's part of an update until the divergence stays below a limit.

    All parameters are scaled except those used only by the critic, so a shared feature extractor or LSTM is scaled too. So are
    all floating-point buffers, such as the statistics of a batch normalization. The critic's own parameters keep their step,
    and so do counters and the optimizer's state. Only where this does not help, because the actor depends on the critic in a
    way that autograd does not see (``detach()``), is the critic scaled too.

    :param snapshot: copy of the policy before the update
    :param critic: as ``critic_parameters`` returns it
    :param measure_kl: measures the policy as it is on the whole rollout
    :param kl: d after the whole step in nats, > limit
    :param limit: largest d allowed, in nats, > 0
    :return: the largest α that was found to be allowed, and what was measured there. If there is none, the policy is left at
        α = 0, and the measured divergence is larger than the limit only if it depends on more than parameters and buffers.
    """
    moved = [
        (tensor, old, tensor.detach().clone())
        for tensor, old in zip(snapshot.tensors, snapshot.saved, strict=True)
        if (tensor.is_floating_point() or tensor.is_complex()) and not th.equal(tensor, old)
    ]
    actor = [step for step in moved if id(step[0]) not in critic]
    scale, shortened = _shorten(actor, measure_kl, kl, limit)
    if shortened.mean <= limit or len(actor) == len(moved):
        return scale, shortened
    return _shorten(moved, measure_kl, kl, limit)


def _shorten(
    moved: Sequence[tuple[th.Tensor, th.Tensor, th.Tensor]], measure_kl: Callable[[], RolloutKL], kl: float, limit: float
) -> tuple[float, RolloutKL]:
    """
    Shorten the step of some tensors.

    :param moved: each tensor with its values before and after the whole step
    :param measure_kl: measures the policy as it is on the whole rollout
    :param kl: d where all of them have taken their whole step, in nats
    :param limit: largest d allowed, in nats
    :return: as for ``shorten_step``
    """
    measured: dict[float, RolloutKL] = {}

    def set_length(scale: float) -> None:
        with th.no_grad():
            for tensor, old, new in moved:
                step = new - old
                # A constant −inf, as in an attention mask, or a running minimum that began as one, has no finite step
                tensor.copy_(th.where(step.isfinite(), old + scale * step, new))

    def divergence_at(scale: float) -> float:
        set_length(scale)
        measured[scale] = measure_kl()
        return measured[scale].mean

    scale = longest_allowed(divergence_at, kl, limit)
    set_length(scale)
    return scale, measured[scale] if scale in measured else measure_kl()


def longest_allowed(divergence_at: Callable[[float], float], kl: float, limit: float) -> float:
    """
    Search for the largest α with d(α) ≤ limit, as if d were a power of α: its exponent is 2 at first, then that of the last
    two tries. Where this leads out of the interval in which the limit must lie, the interval is halved.

    :param divergence_at: d as a function of α in (0, 1), in nats; NaN and ``inf`` count as too far
    :param kl: d(1), > limit
    :param limit: > 0
    :return: an α in (0, 1) at which d was found to stay below the limit, or 0
    """
    low, high = 0.0, 1.0
    scale, exponent = 1.0, 2.0
    for _ in range(MAX_TRIES):
        last_scale, last_kl = scale, max(kl, sys.float_info.min)  # a KL of 0 would be divided by
        scale = last_scale * (TARGET_FRACTION * limit / last_kl) ** (1 / exponent)
        if not low < scale < high:
            scale = (low + high) / 2
        kl = divergence_at(scale)
        if MIN_FRACTION * limit <= kl <= limit:
            return scale
        low, high = (scale, high) if kl <= limit else (low, scale)  # NaN counts as too far: it compares as False
        if 0 < kl < math.inf and last_kl < math.inf:
            exponent = min(max(math.log(kl / last_kl) / math.log(scale / last_scale), MIN_EXPONENT), MAX_EXPONENT)
    return low


def critic_parameters(old_policy: OldPolicy) -> set[int]:
    """
    Find the parameters that the value of a state depends on and the log-probability of its action does not, whatever the
    policy's classes and names. A branch that no probed state takes belongs to neither, and counts as the actor's.

    :param old_policy: knows the policy and the rollout, from which the probed states are taken
    :return: their ``id``
    """
    policy = old_policy.policy
    parameters = [parameter for parameter in optimized_parameters(policy.optimizer) if parameter.requires_grad]
    was_training = policy.training
    policy.set_training_mode(False)
    for module in policy.modules():
        if isinstance(module, th.nn.RNNBase):
            module.train()  # cuDNN's have no gradient in evaluation mode
    try:
        with preserve_random_state():
            rollout_data, _ = next(in_order(old_policy.buffer, CRITIC_PROBE_SIZE))
            new = evaluate(policy, rollout_data, needs_distribution=False)
            by_value, by_action = (_reached(output.sum(), parameters) for output in (new.values, new.log_prob))
    finally:
        policy.set_training_mode(was_training)
    return by_value - by_action


def _reached(output: th.Tensor, parameters: Sequence[th.Tensor]) -> set[int]:
    if not output.requires_grad:  # all that it depends on is frozen
        return set()
    gradients = th.autograd.grad(output, parameters, retain_graph=True, allow_unused=True)
    return {id(parameter) for parameter, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
