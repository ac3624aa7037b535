"""
The same ruler for every on-policy arm: exact KL(π_old ‖ π_new) over the whole rollout, after each update, PPO's as well.

It draws no random number and changes neither the model nor its buffer, so that an arm learns the same with it and without.
"""

import copy
import time
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

from sb3_adaptive_kl.arguments import settings_at
from sb3_adaptive_kl.rollout.old_policy import OldPolicy


class Ruler(BaseCallback):
    """Measures every update. ``updates`` holds a row for each, and ``seconds`` the time spent measuring."""

    COLUMNS = ("timesteps", "kl", "kl_max", "kl_coef", "target_kl", "step_scale", "learning_rate")

    def __init__(self) -> None:
        super().__init__()
        self.updates: list[tuple[float | None, ...]] = []
        self.seconds = 0.0
        self._before: tuple[OldPolicy, float | None] | None = None

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        start = time.perf_counter()
        model: Any = self.model
        # A shallow copy: reading a buffer replaces its arrays by flattened ones, and the next rollout by empty ones
        buffer = copy.copy(model.rollout_buffer)
        if isinstance(buffer.observations, dict):
            buffer.observations = dict(buffer.observations)
        self._before = OldPolicy(model.policy, buffer), getattr(model, "kl_coef", None)
        self.seconds += time.perf_counter() - start

    def _measure(self) -> None:
        if self._before is None:  # before the first update; and the zoo ends the training of its first callback twice
            return
        start = time.perf_counter()
        (old_policy, kl_coef), self._before = self._before, None
        kl = old_policy.kl()
        model: Any = self.model
        # In PPO and TRPO, target_kl is a limit, and not a target
        has_penalty = hasattr(model, "kl_coef")
        target_kl = settings_at(model, model._current_progress_remaining).target_kl if has_penalty else None
        # Only an arm with a ceiling can shorten its steps
        step_scale = model.step_scale if getattr(model, "kl_ceiling", None) is not None else None
        learning_rate = model.policy.optimizer.param_groups[0]["lr"]  # as low as a rule has made it within the update
        self.updates.append((self.num_timesteps, kl.mean, kl.max, kl_coef, target_kl, step_scale, learning_rate))
        self.seconds += time.perf_counter() - start

    _on_rollout_start = _on_training_end = _measure
