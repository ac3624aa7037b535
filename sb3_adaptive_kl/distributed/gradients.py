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
import torch.distributed as dist

from sb3_adaptive_kl.objective import MinibatchMetrics, Settings
from sb3_adaptive_kl.rollout.evaluation import valid_transitions
from sb3_adaptive_kl.rollout.minibatches import to_device
from sb3_adaptive_kl.rollout.old_policy import OldPolicy
from sb3_adaptive_kl.step import ComputeGradients, in_layout_of, optimized_parameters

# Minibatches drawn ahead, whose moments are summed at once: a sum of three numbers takes as long as one of thousands
N_AHEAD = 8


def gradients_of_all_ranks(compute_gradients: ComputeGradients, old_policy: OldPolicy) -> ComputeGradients:
    """
    Turn the gradients of one rank into those of all. The returned function is *collective*.

    :param compute_gradients: leaves the gradients of this rank's minibatch in ``.grad``, plain or compiled
    :param old_policy: knows the policy in training
    :return: a function with the same signature, and the same result on all ranks
    """
    parameters = optimized_parameters(old_policy.policy.optimizer)

    def compute(rollout_data: Any, index: th.Tensor, settings: Settings) -> tuple[th.Tensor, th.Tensor]:
        # Clip the mean of all ranks, not each rank's part
        alone = settings._replace(normalize_advantage=False, max_grad_norm=math.inf)
        n_transitions: float = len(index)
        try:
            metrics, _ = compute_gradients(rollout_data, index, alone)
        except ValueError:  # torch's distributions refuse the NaN of a diverged network. All ranks see it, and undo the update
            if math.isfinite(old_policy.kl().mean):
                raise
            metrics, n_transitions = parameters[0].new_zeros(len(MinibatchMetrics._fields)), math.nan
        metrics = _average(metrics, n_transitions, parameters)
        return metrics, th.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)

    return compute


def _average(metrics: th.Tensor, n_transitions: float, parameters: list[th.Tensor]) -> th.Tensor:
    """Replace ``.grad`` by its mean over the transitions of all ranks, and return the mean of the metrics."""
    present = [parameter.grad is not None for parameter in parameters]
    gradients = [th.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    weighted = n_transitions * th.cat([*(gradient.flatten() for gradient in gradients), metrics])
    numbers = th.tensor([*present, n_transitions], dtype=weighted.dtype)
    total = th.cat([weighted, to_device(numbers, weighted.device)])
    dist.all_reduce(total)
    means = th.split(total[: len(weighted)] / total[-1].real, [*map(th.numel, gradients), len(metrics)])
    # A branch that no rank takes has no gradient: Adam leaves its parameters alone
    anywhere = present if all(present) else total[len(weighted) : -1].bool().tolist()
    for parameter, mean, has_gradient in zip(parameters, means, anywhere, strict=False):
        # One complex parameter makes all numbers complex
        gradient = (mean if parameter.is_complex() else mean.real).view_as(parameter).to(parameter.dtype)
        parameter.grad = in_layout_of(parameter, gradient if has_gradient else None)
    return means[-1].real


def normalized_over_ranks(minibatches: Iterator[tuple[Any, th.Tensor]]) -> Iterator[tuple[Any, th.Tensor]]:
    """
    Normalize the advantages by the mean and the standard deviation that they have on all ranks together. *Collective*, once
    per ``N_AHEAD`` minibatches.

    :param minibatches: this rank's, as many as on every other rank
    :return: the same minibatches, with other advantages
    """
    while ahead := list(islice(minibatches, N_AHEAD)):
        rows = []
        for rollout_data, _ in ahead:
            valid = valid_transitions(rollout_data)
            advantages = (rollout_data.advantages if valid is None else rollout_data.advantages[valid]).double()
            rows.append(th.stack([advantages.new_full((), len(advantages)), advantages.sum(), advantages.square().sum()]))
        moments = th.stack(rows)  # they stay on their device, which nothing waits for
        dist.all_reduce(moments)
        n, total, squares = moments.unbind(dim=1)
        means = total / n
        stds = ((squares - n * means.square()) / (n - 1)).clamp(min=0).sqrt()
        for (rollout_data, index), count, mean, std in zip(ahead, n, means, stds, strict=True):
            advantages = rollout_data.advantages
            normalized = (advantages - mean.to(advantages)) / (std.to(advantages) + 1e-8)
            # A single one is left as it is, as by objective.normalize
            yield rollout_data._replace(advantages=th.where(count > 1, normalized, advantages)), index
