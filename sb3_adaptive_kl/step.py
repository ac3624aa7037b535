"""
One step on one minibatch: evaluate → loss → gradients → clip → stop? → take.

``execution.py`` decides how steps are run.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_adaptive_kl.objective import MinibatchMetrics, Settings, objective
from sb3_adaptive_kl.rollout.distributions import forget_distribution
from sb3_adaptive_kl.rollout.evaluation import evaluate
from sb3_adaptive_kl.rollout.hosts import Host
from sb3_adaptive_kl.rollout.old_policy import OldPolicy

Gradients = Sequence[th.Tensor | None]  # None for a parameter that the loss does not depend on


class OptimizerStep:
    """
    ``optimizer.step()`` along given gradients.

    :param optimizer: any optimizer that steps without a closure
    :param parameters: the parameters that gradients will be given for, in this order
    """

    def __init__(self, optimizer: th.optim.Optimizer, parameters: Sequence[th.Tensor]) -> None:
        self.optimizer = optimizer
        self.parameters = parameters

    def take(self, gradients: Gradients) -> None:
        """
        Move the parameters, and leave no gradient behind.

        :param gradients: one for each of ``parameters``
        """
        self._clear_gradients()
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self._clear_gradients()

    def _clear_gradients(self) -> None:
        """Clear every ``.grad``: an old one would keep moving a parameter that was frozen since. ``zero_grad()`` is slower."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


class Update(NamedTuple):
    """What all minibatch steps of one update share."""

    policy: ActorCriticPolicy
    host: Host
    old_policy: OldPolicy
    optimizer: OptimizerStep


class StepResult(NamedTuple):
    """The metrics of a minibatch before its step, stacked, and the gradient norm before clipping: ``None`` without a step."""

    metrics: th.Tensor
    grad_norm: th.Tensor | None


def eager_step(update: Update, rollout_data: Any, index: th.Tensor, settings: Settings) -> StepResult:
    """
    Take one step on one minibatch, or none if its KL is too large already.

    :param update: the policy, the old policy and the optimizer
    :param rollout_data: a minibatch of the host's rollout buffer
    :param index: indices of its B valid transitions in the flattened rollout
    :param settings: the numbers of this step
    :return: metrics and gradient norm
    """
    policy, host, old_policy, optimizer = update
    gradients, metrics, grad_norm = clipped_gradients(
        policy, host, old_policy, optimizer.parameters, rollout_data, index, settings
    )
    return finish_step(optimizer, gradients, metrics, grad_norm, settings)


def finish_step(
    optimizer: OptimizerStep, gradients: Gradients, metrics: th.Tensor, grad_norm: th.Tensor, settings: Settings
) -> StepResult:
    """
    Step along the gradients of a minibatch, unless its KL ends the update.

    :param optimizer: takes the step
    :param gradients: clipped, one for each of the optimizer's parameters
    :param metrics: the minibatch's metrics, stacked
    :param grad_norm: norm of the gradients before clipping
    :param settings: the numbers of this step
    :return: metrics and gradient norm
    """
    if exceeds_stop(metrics, settings):
        return StepResult(metrics, None)
    optimizer.take(gradients)
    return StepResult(metrics, grad_norm)


def clipped_gradients(
    policy: ActorCriticPolicy,
    host: Host,
    old_policy: OldPolicy,
    parameters: Sequence[th.Tensor],
    rollout_data: Any,
    index: th.Tensor,
    settings: Settings,
) -> tuple[Gradients, th.Tensor, th.Tensor]:
    """
    Compute the gradients of the objective on one minibatch.

    :param parameters: the parameters to differentiate with respect to; the others as for ``eager_step``
    :return: the gradients, clipped; the metrics, stacked; the norm before clipping
    """
    new = evaluate(policy, host, rollout_data, old_policy.needs_distribution)
    kl = old_policy.divergence(index, new)
    loss, metrics = objective(new, kl, settings)
    gradients = th.autograd.grad(loss, parameters, allow_unused=True)
    clipped, grad_norm = clip_gradients(gradients, settings.max_grad_norm)
    forget_distribution(policy)  # it would keep the graph alive, and a policy with a graph cannot be copied
    return clipped, metrics.stack(), grad_norm


def clip_gradients(gradients: Gradients, max_norm: float) -> tuple[Gradients, th.Tensor]:
    """
    Scale gradients such that their norm, taken as one vector, is at most ``max_norm``.

    It computes what ``th.nn.utils.clip_grad_norm_`` computes, but as a function, and in few operations instead of two per
    gradient.

    :param gradients: tensors of any shapes, or ``None``
    :param max_norm: > 0
    :return: the scaled gradients, and the norm before
    """
    present = [gradient for gradient in gradients if gradient is not None]
    norm = th.linalg.vector_norm(th.cat([gradient.flatten() for gradient in present]))
    scaled = iter(th._foreach_mul(present, (max_norm / (norm + 1e-6)).clamp(max=1.0)))
    return [None if gradient is None else next(scaled) for gradient in gradients], norm


def exceeds_stop(metrics: th.Tensor, settings: Settings) -> bool:
    """
    Decide whether the KL of a minibatch ends the update.

    :param metrics: the minibatch's metrics, stacked
    :param settings: the numbers of this step
    :return: whether KL > kl_stop_factor · target_kl
    """
    if settings.kl_stop_factor is None:
        return False
    return bool(MinibatchMetrics(*metrics).kl > settings.kl_stop_factor * settings.target_kl)


def trainable_parameters(policy: ActorCriticPolicy) -> list[th.Tensor]:
    """
    List the parameters that an update moves.

    :param policy: some of its parameters may be frozen
    :return: those that are not
    """
    return [parameter for parameter in policy.parameters() if parameter.requires_grad]
