"""
One step on the minibatches of all ranks: the step that one process would take on all of their transitions at once.

Each rank differentiates the loss of its own minibatch. One sum over the ranks, of one vector, gives the gradients and metrics
of all.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_adaptive_kl.distributed.ranks import sum_over_ranks
from sb3_adaptive_kl.objective import MinibatchMetrics, Settings, objective
from sb3_adaptive_kl.rollout.distributions import forget_distribution
from sb3_adaptive_kl.rollout.evaluation import evaluate
from sb3_adaptive_kl.rollout.hosts import Host
from sb3_adaptive_kl.rollout.old_policy import OldPolicy
from sb3_adaptive_kl.step import Gradients, StepResult, Update, finish_step


class WeightedGradients(NamedTuple):
    """
    What a rank contributes to a step, times the number B of its transitions.

    :param vector: gradients of the loss, with a hinge those of the mean KL, too, and the metrics, all times B; for each
        parameter 1 if the loss depends on it, else 0; B
    :param complete: whether the loss depends on all parameters
    """

    vector: th.Tensor
    complete: bool


def weighted_gradients(
    policy: ActorCriticPolicy,
    host: Host,
    old_policy: OldPolicy,
    parameters: Sequence[th.Tensor],
    rollout_data: Any,
    index: th.Tensor,
    settings: Settings,
) -> WeightedGradients:
    """
    Differentiate the objective on this rank's minibatch, with the advantages as they are, and without the hinge: it depends
    on the KL of all ranks.

    :param parameters: the parameters to differentiate with respect to; the others as for ``eager_step``
    :return: this rank's contribution
    """
    new = evaluate(policy, host, rollout_data, old_policy.needs_distribution)
    kl = old_policy.divergence(index, new)
    loss, metrics = objective(new, kl, settings._replace(normalize_advantage=False, kl_cutoff_coef=None))
    has_hinge = settings.kl_cutoff_coef is not None
    gradients = th.autograd.grad(loss, parameters, retain_graph=has_hinge, allow_unused=True)
    weighted = _flattened(gradients, parameters)
    if has_hinge:
        moves = kl.requires_grad  # not if the actor is frozen
        of_kl = th.autograd.grad(kl.mean(), parameters, allow_unused=True) if moves else [None] * len(parameters)
        weighted += _flattened(of_kl, parameters)
    forget_distribution(policy)  # as in clipped_gradients
    present = [gradient is not None for gradient in gradients]
    unweighted = kl.new_tensor([*present, len(kl)])
    return WeightedGradients(th.cat([len(kl) * th.cat([*weighted, metrics.stack()]), unweighted]), all(present))


def step_of_all_ranks(
    update: Update,
    rollout_data: Any,
    index: th.Tensor,
    settings: Settings,
    weighted_gradients: Callable[..., WeightedGradients] = weighted_gradients,
) -> StepResult:
    """
    Take one step on the minibatches of all ranks, or none if their KL is too large already. *Collective.*

    :param update: the policy, the old policy and the optimizer
    :param rollout_data: a minibatch of this rank's rollout buffer, with advantages that need no normalization any more
    :param index: indices of its B valid transitions in the flattened rollout
    :param settings: the numbers of this step
    :param weighted_gradients: ``weighted_gradients``, or a compiled version of it
    :return: metrics and gradient norm, the same on all ranks
    """
    policy, host, old_policy, optimizer = update
    try:
        mine = weighted_gradients(policy, host, old_policy, optimizer.parameters, rollout_data, index, settings)
    except ValueError:
        # torch's distributions refuse the NaN of a diverged network. All ranks have to see it, and to go on until the update
        # is undone
        if _can_be_evaluated(old_policy):
            raise
        mine = _not_a_number(optimizer.parameters, settings)
    total = sum_over_ranks(mine.vector)
    gradients, metrics, grad_norm = _clipped_mean(total, mine.complete, optimizer.parameters, settings)
    return finish_step(optimizer, gradients, metrics, grad_norm, settings)


def _clipped_mean(
    total: th.Tensor, complete: bool, parameters: Sequence[th.Tensor], settings: Settings
) -> tuple[Gradients, th.Tensor, th.Tensor]:
    """
    Divide by the number of transitions of all ranks, add the hinge, and clip.

    :param total: the sum of all ranks' vectors
    :param complete: whether this rank's loss depends on all parameters: then so does that of all ranks
    :return: the gradients, clipped; the metrics, stacked; the norm before clipping
    """
    sizes = [parameter.numel() for parameter in parameters]
    n_gradients, n_parameters = sum(sizes), len(parameters)
    mean = total[: -n_parameters - 1] / total[-1]
    gradient = mean[:n_gradients]
    if settings.kl_cutoff_coef is None:
        metrics = mean[n_gradients:]
    else:
        metrics = mean[2 * n_gradients :]
        cutoff = settings.kl_cutoff_factor * settings.target_kl
        loss, kl_loss, kl = (MinibatchMetrics._fields.index(name) for name in ("loss", "kl_loss", "kl"))
        excess = (metrics[kl] - cutoff).clamp(min=0)
        gradient = gradient + 2 * settings.kl_cutoff_coef * excess * mean[n_gradients : 2 * n_gradients]
        metrics[[loss, kl_loss]] += settings.kl_cutoff_coef * excess.square()
    norm = th.linalg.vector_norm(gradient)
    clipped = (gradient * (settings.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)).split(sizes)
    gradients: Gradients = [part.view_as(to).to(to.dtype) for part, to in zip(clipped, parameters, strict=True)]
    if not complete:
        present = total[-n_parameters - 1 : -1].tolist()
        gradients = [part if n_ranks != 0 else None for part, n_ranks in zip(gradients, present, strict=True)]
    return gradients, metrics, norm


def _flattened(gradients: Gradients, parameters: Sequence[th.Tensor]) -> list[th.Tensor]:
    return [
        th.zeros_like(parameter).flatten() if gradient is None else gradient.flatten()
        for gradient, parameter in zip(gradients, parameters, strict=True)
    ]


def _can_be_evaluated(old_policy: OldPolicy) -> bool:
    """Whether the policy still gives valid distributions on this rank's rollout."""
    try:
        return math.isfinite(old_policy.kl().mean)
    except ValueError:
        return False


def _not_a_number(parameters: Sequence[th.Tensor], settings: Settings) -> WeightedGradients:
    """A contribution of NaN, of the length that ``weighted_gradients`` gives it."""
    n_times = 1 if settings.kl_cutoff_coef is None else 2
    n_metrics = len(MinibatchMetrics._fields) - (settings.clip_range is None)
    numbers = th.cat([*n_times * _flattened([None] * len(parameters), parameters)])
    rest = numbers.new_zeros(n_metrics + len(parameters) + 1)
    return WeightedGradients(th.cat([numbers, rest]).fill_(math.nan), True)
