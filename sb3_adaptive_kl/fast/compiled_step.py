"""The two compiled ways to take a minibatch step: the whole step, or all of it but the optimizer."""

from typing import Any

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_adaptive_kl.fast.compilation import Compilation, Compiled
from sb3_adaptive_kl.fast.optimizer import FastOptimizerStep, FusedAdam
from sb3_adaptive_kl.objective import Settings
from sb3_adaptive_kl.rollout.hosts import Host
from sb3_adaptive_kl.rollout.old_policy import OldPolicy
from sb3_adaptive_kl.step import StepResult, Update, clipped_gradients, exceeds_stop


class CompiledSteps:
    """
    Functions with the signature of ``eager_step`` that compute the same up to rounding.

    :param compilation: of the model
    """

    def __init__(self, compilation: Compilation) -> None:
        self._compiled_gradients = Compiled(clipped_gradients, compilation)
        self._compiled_step = Compiled(_step, compilation)
        self._settings: tuple[Settings, Settings] | None = None

    def whole_step(self, update: Update, rollout_data: Any, index: th.Tensor, settings: Settings) -> StepResult:
        """Take a step as one compiled function, Adam included. It cannot stop early: that would depend on a value."""
        policy, host, old_policy, optimizer = update
        assert isinstance(optimizer, FastOptimizerStep)
        assert optimizer.fused_adam is not None
        tensors = self._tensors(policy, settings)
        return self._compiled_step(policy, host, old_policy, optimizer.fused_adam, rollout_data, index, tensors)

    def step_with_compiled_gradients(
        self, update: Update, rollout_data: Any, index: th.Tensor, settings: Settings
    ) -> StepResult:
        """Compile the loss, its gradients and their clipping. The early stop and the optimizer stay outside."""
        policy, host, old_policy, optimizer = update
        gradients, metrics, grad_norm = self._compiled_gradients(
            policy, host, old_policy, optimizer.parameters, rollout_data, index, self._tensors(policy, settings)
        )
        if exceeds_stop(metrics, settings):
            return StepResult(metrics, None)
        optimizer.take(gradients)
        return StepResult(metrics, grad_norm)

    def _tensors(self, policy: ActorCriticPolicy, settings: Settings) -> Settings:
        """
        Convert the settings when they change, and not at every step. Constants would be compiled again at each value. On a GPU
        every new tensor is waited for: where β alone has moved, it alone is converted.
        """
        if self._settings is not None and settings is not self._settings[0]:
            known, tensors = self._settings
            if known._replace(kl_coef=settings.kl_coef) == settings:
                kl_coef: Any = th.tensor(settings.kl_coef, device=policy.device)
                self._settings = settings, tensors._replace(kl_coef=kl_coef)
        if self._settings is None or self._settings[0] is not settings:
            self._settings = settings, settings.as_tensors(policy.device)
        return self._settings[1]


def _step(
    policy: ActorCriticPolicy,
    host: Host,
    old_policy: OldPolicy,
    adam: FusedAdam,
    rollout_data: Any,
    index: th.Tensor,
    settings: Settings,
) -> StepResult:
    gradients, metrics, grad_norm = clipped_gradients(policy, host, old_policy, adam.parameters, rollout_data, index, settings)
    adam.take(gradients)
    return StepResult(metrics, grad_norm)
