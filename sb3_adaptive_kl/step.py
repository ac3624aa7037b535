"""
One minibatch: evaluate → objective → backward → clip. The optimizer then steps along the gradients (``training.py``).

The objective is that of Schulman et al. 2017 (https://arxiv.org/abs/1707.06347), equations 8 and 9, to be minimized::

    −E[r Â] + β · E[KL] + c_1 · E[(V − R)²] − c_2 · E[entropy]

``fast/compiled.py`` has a compiled function with the signature of ``compute_gradients``, and ``distributed/`` one for the
minibatches of all ranks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_adaptive_kl import losses
from sb3_adaptive_kl.divergences import k3
from sb3_adaptive_kl.rollout.adapters import Evaluation, PolicyAdapter
from sb3_adaptive_kl.rollout.old_policy import OldPolicy

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


# ``compute_gradients`` for one policy and one rollout: of samples, their indices and the settings
ComputeGradients = Callable[[Any, th.Tensor, Settings], tuple[th.Tensor, th.Tensor]]


def compute_gradients(
    policy: ActorCriticPolicy,
    adapter: PolicyAdapter,
    old_policy: OldPolicy,
    rollout_data: Any,
    index: th.Tensor,
    settings: Settings,
) -> tuple[th.Tensor, th.Tensor]:
    """
    Leave the clipped gradients of a minibatch's loss in ``.grad``, as PPO does. Parameters: as for ``minibatch_loss``.

    :return: the minibatch's metrics before the step, stacked, and the norm of its gradients before clipping
    """
    loss, metrics = minibatch_loss(policy, adapter, old_policy, rollout_data, index, settings)
    parameters = optimized_parameters(policy.optimizer)
    for parameter in parameters:  # zero_grad() takes as long as clipping
        parameter.grad = None
    loss.backward()  # type: ignore[no-untyped-call]
    return metrics, th.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)


def minibatch_loss(
    policy: ActorCriticPolicy,
    adapter: PolicyAdapter,
    old_policy: OldPolicy,
    rollout_data: Any,
    index: th.Tensor,
    settings: Settings,
) -> tuple[th.Tensor, th.Tensor]:
    """
    Evaluate the policy on one minibatch.

    :param policy: the policy in training
    :param adapter: evaluates the policy
    :param old_policy: remembers the policy before the update
    :param rollout_data: a minibatch of the rollout buffer
    :param index: indices of its B valid transitions in the flattened rollout
    :param settings: the numbers of this step
    :return: the scalar loss with its graph, and the minibatch's metrics, stacked
    """
    new = adapter.evaluate(policy, rollout_data, old_policy.needs_distribution)
    loss, metrics = objective(new, old_policy.divergence(index, new), settings)
    return loss, metrics.stack()


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
