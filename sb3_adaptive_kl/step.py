"""
The gradients of one minibatch: evaluate → loss → backward → clip. The optimizer then steps along them (``training.py``).

``fast/compiled.py`` has a compiled function with the same signature, and ``distributed/`` one for the minibatches of all
ranks.
"""

from collections.abc import Callable
from typing import Any

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_adaptive_kl.objective import Settings, objective
from sb3_adaptive_kl.rollout.evaluation import evaluate
from sb3_adaptive_kl.rollout.old_policy import OldPolicy

# ``compute_gradients`` for one policy and one rollout: of samples, their indices and the settings
ComputeGradients = Callable[[Any, th.Tensor, Settings], tuple[th.Tensor, th.Tensor]]


def minibatch_loss(
    policy: ActorCriticPolicy,
    old_policy: OldPolicy,
    rollout_data: Any,
    index: th.Tensor,
    settings: Settings,
) -> tuple[th.Tensor, th.Tensor]:
    """
    Evaluate the policy on one minibatch.

    :param policy: the policy in training
    :param old_policy: remembers the policy before the update
    :param rollout_data: a minibatch of the rollout buffer
    :param index: indices of its B valid transitions in the flattened rollout
    :param settings: the numbers of this step
    :return: the scalar loss with its graph, and the minibatch's metrics, stacked
    """
    new = evaluate(policy, rollout_data, old_policy.needs_distribution)
    # One forward pass for both divergences
    reference_kl = None if settings.reference_kl_coef is None else old_policy.reference_divergence(index, new)
    loss, metrics = objective(new, old_policy.divergence(index, new), settings, reference_kl)
    # Detached from the graph, which would otherwise live until they are logged
    return loss, th.stack(metrics).detach()


def compute_gradients(
    policy: ActorCriticPolicy,
    old_policy: OldPolicy,
    rollout_data: Any,
    index: th.Tensor,
    settings: Settings,
) -> tuple[th.Tensor, th.Tensor]:
    """
    Leave the clipped gradients of a minibatch's loss in ``.grad``, as PPO does. Parameters: as for ``minibatch_loss``.

    :return: the minibatch's metrics before the step, stacked, and the norm of its gradients before clipping
    """
    loss, metrics = minibatch_loss(policy, old_policy, rollout_data, index, settings)
    parameters = optimized_parameters(policy.optimizer)
    for parameter in parameters:  # zero_grad() takes as long as clipping
        parameter.grad = None
    loss.backward()  # type: ignore[no-untyped-call]
    return metrics, th.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)


def in_layout_of(parameter: th.Tensor, gradient: th.Tensor | None) -> th.Tensor | None:
    """Give a gradient the memory layout of its parameter, as ``backward()`` does."""
    # torch's fused Adam reads both as flat memory, and would scramble those of another layout
    if gradient is None or gradient.stride() == parameter.stride():
        return gradient
    return th.empty_like(parameter).copy_(gradient)


def drop_other_gradients(policy: ActorCriticPolicy) -> None:
    """Remove the gradients of parameters that no step moves."""
    # backward() adds to them in each step, and nobody clears them
    moved = set(map(id, optimized_parameters(policy.optimizer)))
    for parameter in policy.parameters():
        if id(parameter) not in moved:
            parameter.grad = None


def optimized_parameters(optimizer: th.optim.Optimizer) -> list[th.Tensor]:
    """List the parameters that a step can move. They need not be registered in the policy."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
