"""
The same ruler for every on-policy arm: exact KL(π_old ‖ π_new) over the whole rollout, after each update, PPO's as well.

It draws no random number and touches neither the model nor its buffer, so that an arm learns the same with it and without.
"""

import copy
import time
from typing import Any

from sb3_contrib import MaskablePPO, RecurrentPPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from sb3_adaptive_kl import AdaptiveKLPPO, MaskableAdaptiveKLPPO, RecurrentAdaptiveKLPPO
from sb3_adaptive_kl.arguments import target_kl_at
from sb3_adaptive_kl.distributions import ActionDistribution
from sb3_adaptive_kl.evaluation import PolicyEvaluation

# The class that knows how to evaluate the host's minibatches; the first host that fits
EVALUATED_AS: tuple[tuple[type, type[PolicyEvaluation]], ...] = (
    (RecurrentPPO, RecurrentAdaptiveKLPPO),
    (MaskablePPO, MaskableAdaptiveKLPPO),
    (OnPolicyAlgorithm, AdaptiveKLPPO),
)


def measurable(model: Any) -> bool:
    return isinstance(model, OnPolicyAlgorithm)


def evaluator(model: OnPolicyAlgorithm) -> PolicyEvaluation:
    """
    A second view of the model, able to evaluate its policy on the rollout that it has now: policy and arrays are the
    model's own; the buffer is a copy that holds them, since reading it puts flattened arrays in their place, and the model
    will soon put empty ones there.
    """
    view: Any = copy.copy(model)
    view.__class__ = next(ours for host, ours in EVALUATED_AS if isinstance(model, host))
    buffer: Any = copy.copy(model.rollout_buffer)
    if isinstance(buffer.observations, dict):
        buffer.observations = dict(buffer.observations)
    view.rollout_buffer = buffer
    view.batch_size = view.rollout_buffer.buffer_size  # only one minibatch is ever drawn, to see how the buffer draws
    view.kl_divergence = "forward"
    return view  # type: ignore[no-any-return]


class Ruler(BaseCallback):
    """
    Measures every update. ``updates`` then holds a row for each, and ``seconds`` the time that the measuring took.
    """

    COLUMNS = ("timesteps", "kl", "kl_max", "kl_coef", "target_kl")

    def __init__(self) -> None:
        super().__init__()
        self.updates: list[tuple[int, float, float, float | None, float | None]] = []
        self.seconds = 0.0
        self._before: tuple[PolicyEvaluation, ActionDistribution | None, float | None] | None = None

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        start = time.perf_counter()
        view = evaluator(self.model)  # type: ignore[arg-type]
        self._before = view, view._old_distributions(), getattr(self.model, "kl_coef", None)
        self.seconds += time.perf_counter() - start

    def _on_rollout_start(self) -> None:
        self._measure()

    def _on_training_end(self) -> None:
        self._measure()

    def _measure(self) -> None:
        if self._before is None:  # before the first update; and the zoo ends the training of its first callback twice
            return
        start = time.perf_counter()
        view, old, kl_coef = self._before
        self._before = None
        kl = view._divergence_on_rollout(old)
        self.updates.append((view.num_timesteps, kl.mean().item(), kl.max().item(), kl_coef, self._target_kl()))
        self.seconds += time.perf_counter() - start

    def _target_kl(self) -> float | None:
        """That of the penalty. In PPO and TRPO this name is a limit, and no target."""
        model: Any = self.model
        return target_kl_at(model.target_kl, model._current_progress_remaining) if hasattr(model, "kl_coef") else None
