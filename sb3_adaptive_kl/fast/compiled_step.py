"""The compiled ways to take a step: all of it, all but the optimizer, or what precedes the sum over the ranks."""

from typing import Any

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_adaptive_kl.distributed.step import step_of_all_ranks, weighted_gradients
from sb3_adaptive_kl.fast.compilation import Compilation, Compiled
from sb3_adaptive_kl.fast.optimizer import FastOptimizerStep, FusedAdam
from sb3_adaptive_kl.objective import Settings
from sb3_adaptive_kl.rollout.hosts import Host
from sb3_adaptive_kl.rollout.old_policy import OldPolicy
from sb3_adaptive_kl.step import StepResult, Update, clipped_gradients, finish_step


class CompiledSteps:
    """
    Functions with the signature of ``eager_step`` that compute the same up to rounding.

    :param compilation: the model's compilation state
    """

    def __init__(self, compilation: Compilation) -> None:
        self._compiled_gradients = Compiled(clipped_gradients, compilation)
        self._compiled_step = Compiled(_step, compilation)
        self._compiled_weighted_gradients = Compiled(weighted_gradients, compilation)
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
        return finish_step(optimizer, gradients, metrics, grad_norm, settings)

    def step_of_all_ranks(self, update: Update, rollout_data: Any, index: th.Tensor, settings: Settings) -> StepResult:
        """
        Compile the loss and its gradients. What follows the sum over the ranks stays outside: if one of them could not
        compile it, their parameters would differ by rounding.
        """
        tensors = self._tensors(update.policy, settings)
        return step_of_all_ranks(update, rollout_data, index, tensors, self._compiled_weighted_gradients)

    def _tensors(self, policy: ActorCriticPolicy, settings: Settings) -> Settings:
        """
        Convert the settings when they change, and not at every step: on a GPU, creating a tensor synchronizes. Where β alone
        has changed, as within an update, it alone is converted.
        """
        if self._settings is None:
            self._settings = settings, as_tensors(settings, policy.device)
        known, tensors = self._settings
        if known is not settings:
            if known._replace(kl_coef=settings.kl_coef) == settings:
                kl_coef: Any = th.tensor(settings.kl_coef, device=policy.device, dtype=th.float32)
                tensors = tensors._replace(kl_coef=kl_coef)
            else:
                tensors = as_tensors(settings, policy.device)
            self._settings = settings, tensors
        return tensors


def as_tensors(settings: Settings, device: th.device) -> Settings:
    """
    Convert numbers to scalar tensors, which ``torch.compile`` treats as inputs instead of constants.

    :param settings: the numbers of an update
    :param device: where the loss is computed
    :return: the same settings; ``None`` and booleans stay, since they decide which terms there are
    """

    def convert(value: Any) -> Any:
        # One type for all: an int, or a number of NumPy's, would be compiled again
        return value if value is None or isinstance(value, bool) else th.tensor(value, device=device, dtype=th.float32)

    return Settings(*map(convert, settings))


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
