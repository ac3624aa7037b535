"""
The gradients of a minibatch of all ranks: those that one process would compute on all of their transitions at once.

Each rank differentiates the loss of its own minibatch, with advantages that are normalized over all of them. One sum over the
ranks, of one vector, gives the gradients and the metrics of all.
"""

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch as th

from sb3_adaptive_kl.distributed.ranks import sum_over_ranks, world_size
from sb3_adaptive_kl.objective import CUTOFF, MinibatchMetrics, Settings
from sb3_adaptive_kl.rollout.adapters import PolicyAdapter
from sb3_adaptive_kl.rollout.old_policy import OldPolicy
from sb3_adaptive_kl.step import ComputeGradients, optimized_parameters
from sb3_adaptive_kl.training import measured_kl

# Minibatches drawn ahead, whose moments are reduced in one collective
N_AHEAD = 8


def gradients_of_all_ranks(compute_gradients: ComputeGradients, old_policy: OldPolicy) -> ComputeGradients:
    """
    Turn the gradients of one rank into those of all. The returned function is *collective*.

    :param compute_gradients: leaves the gradients of this rank's minibatch in ``.grad``, plain or compiled
    :param old_policy: knows the policy in training
    :return: a function with the same signature, and the same result on all ranks
    """
    policy, adapter = old_policy.policy, old_policy.adapter
    parameters = optimized_parameters(policy.optimizer)

    def compute(rollout_data: Any, index: th.Tensor, settings: Settings) -> tuple[th.Tensor, th.Tensor]:
        # Clip the mean of all ranks, not each rank's part
        alone = settings._replace(normalize_advantage=False, max_grad_norm=math.inf)
        hinge = 0.0
        if settings.kl_cutoff_coef is not None:
            # The hinge's slope depends on the KL of all ranks: one more forward pass. Then it is a larger β
            with th.no_grad():
                new = adapter.evaluate(policy, rollout_data, old_policy.needs_distribution)
                kls = old_policy.divergence(index, new)
            total, n = sum_over_ranks(th.stack([kls.sum(), kls.new_tensor(len(kls))])).tolist()
            excess = max(total / n - CUTOFF * settings.target_kl, 0.0)
            hinge = settings.kl_cutoff_coef * excess
            alone = alone._replace(kl_cutoff_coef=None, kl_coef=settings.kl_coef + 2 * hinge)
        try:
            metrics, _ = compute_gradients(rollout_data, index, alone)
        except ValueError:
            # torch's distributions refuse the NaN of a diverged network. All ranks have to see it, and to go on until the
            # update is undone
            if math.isfinite(measured_kl(old_policy).mean):
                raise
            n_metrics = len(MinibatchMetrics._fields) - (settings.clip_range is None)
            metrics = parameters[0].new_full((n_metrics,), math.nan)
        metrics = _average(metrics, len(index), parameters)
        if settings.kl_cutoff_coef is not None:  # c · e², where β' · KL was computed
            loss, kl_loss, kl = (MinibatchMetrics._fields.index(name) for name in ("loss", "kl_loss", "kl"))
            metrics[[loss, kl_loss]] += hinge * (excess - 2 * metrics[kl])
        return metrics, th.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)

    return compute


def _average(metrics: th.Tensor, n_transitions: int, parameters: list[th.Tensor]) -> th.Tensor:
    """Replace ``.grad`` by its mean over the transitions of all ranks, and return the mean of the metrics."""
    present = [parameter.grad is not None for parameter in parameters]
    gradients = [th.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    weighted = n_transitions * th.cat([*(gradient.flatten() for gradient in gradients), metrics])
    total = sum_over_ranks(th.cat([weighted, weighted.new_tensor([*present, n_transitions])]))
    sizes = [gradient.numel() for gradient in gradients]
    means = th.split(total[: len(weighted)] / total[-1], [*sizes, len(metrics)])
    # A branch that no rank takes has no gradient: Adam leaves its parameters alone
    anywhere = present if all(present) else total[len(weighted) : -1].bool().tolist()
    for parameter, mean, has_gradient in zip(parameters, means, anywhere, strict=False):
        parameter.grad = mean.view_as(parameter).to(parameter.dtype) if has_gradient else None
    return means[-1]


def normalized_over_ranks(
    minibatches: Iterator[tuple[Any, th.Tensor]], adapter: PolicyAdapter, normalize_advantage: bool
) -> Iterator[tuple[Any, th.Tensor]]:
    """
    Iterate over an epoch in step with the other ranks. *Collective*, once per ``N_AHEAD`` minibatches.

    :param minibatches: this rank's
    :param adapter: knows what is padding
    :param normalize_advantage: whether to normalize the advantages by the mean and the standard deviation that they have on
        all ranks together
    :return: the same minibatches
    :raises ValueError: on all ranks, if one of them draws more minibatches than another
    """
    while True:
        ahead = list(islice(minibatches, N_AHEAD))
        moments = th.zeros(N_AHEAD, 4, dtype=th.float64)
        for row, (rollout_data, _) in zip(moments, ahead, strict=False):
            valid = adapter.valid(rollout_data)
            advantages = (rollout_data.advantages if valid is None else rollout_data.advantages[valid]).double()
            row[:] = th.stack(
                [advantages.new_ones(()), advantages.new_tensor(len(advantages)), advantages.sum(), advantages.square().sum()]
            )
        n_ranks, n, total, total_of_squares = sum_over_ranks(moments).unbind(dim=1)
        if not n_ranks.any():
            return
        if not n_ranks[: len(ahead)].eq(world_size()).all() or n_ranks[len(ahead) :].any():
            raise ValueError(
                "the ranks draw different numbers of minibatches from their rollouts: all must have the same n_steps, n_envs, "
                "batch_size and rollout_buffer_class"
            )
        mean = total / n
        std = ((total_of_squares - n * mean.square()) / (n - 1)).clamp(min=0).sqrt()
        for i, (rollout_data, index) in enumerate(ahead):
            if normalize_advantage:
                advantages = rollout_data.advantages
                normalized = (advantages - mean[i].to(advantages)) / (std[i].to(advantages) + 1e-8)
                rollout_data = rollout_data._replace(advantages=normalized)
            yield rollout_data, index
