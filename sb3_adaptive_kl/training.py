"""
The train step: PPO with an adaptive KL penalty, for every host (PPO, MaskablePPO, RecurrentPPO).

Schulman et al. 2017 (https://arxiv.org/abs/1707.06347), section 4. One update: remember the old policy's action distributions;
take minibatch steps on

    −E[r Â] + β · KL(π_old ‖ π) + c_1 · (V − R)² − c_2 · entropy   (+ c · KL to a reference policy);

measure d = KL(π_old ‖ π) on the whole rollout, after the last step; step back if it exceeds the ceiling; undo the update if it
diverged; adapt β, and the learning rate, for the next one.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.utils import explained_variance

from sb3_adaptive_kl import step
from sb3_adaptive_kl.algorithm import KLPenaltyAlgorithm
from sb3_adaptive_kl.arguments import (
    MIN_SCHEDULED_TARGET_KL,
    check_settings,
    kl_coef_limits,
    learning_rate_rule,
    penalty_rule,
    settings_at,
)
from sb3_adaptive_kl.control import SegmentedControl, apply_rule, count_at_bound, warn_at_bound, warn_at_limit
from sb3_adaptive_kl.fast.eager import fast_update, one_kernel
from sb3_adaptive_kl.learning_rate import limited
from sb3_adaptive_kl.messages import warn_user
from sb3_adaptive_kl.metrics import UpdateMetrics, log_update
from sb3_adaptive_kl.objective import Settings
from sb3_adaptive_kl.penalty import FixedPenalty, PenaltyRule
from sb3_adaptive_kl.reference import adapted_kl_coef
from sb3_adaptive_kl.rollout.minibatches import minibatches, preserve_random_state
from sb3_adaptive_kl.rollout.old_policy import OldPolicy, RolloutKL
from sb3_adaptive_kl.snapshot import Snapshot
from sb3_adaptive_kl.step_back import critic_parameters, shorten_step

# Why an update is undone: what it produced, and what to do
NOT_FINITE = (
    "a non-finite KL divergence, gradient or parameter",
    "learning_rate={learning_rate:g} is too high, or rewards or observations are extreme or NaN: lower learning_rate by a "
    "factor of 10, wrap the environment in VecNormalize, or find the NaN with VecCheckNan",
)
ABOVE_CEILING = (
    "a KL divergence above kl_ceiling at any step length",
    "the actor depends on something that is neither a parameter nor a buffer, or that is random in eval mode, as F.dropout(x) "
    "is: pass training=self.training, or kl_ceiling=None",
)
# Stop training after this many undone updates in a row
MAX_UNDONE_IN_A_ROW = 5
# A KL above this share of the target is enough to mislead a rule, whose band is the target times 1.5
SMALL_KL = 0.1
# A clip range acts if it clips at least this share of the ratios. At the target, the outlier clip clips some 4 %
MIN_CLIP_FRACTION = 0.01


class KLPenaltyTraining(KLPenaltyAlgorithm):
    """
    Mixin that gives an on-policy algorithm of SB3 or sb3-contrib the KL-penalized update.

    Put it before its host: ``class AdaptiveKLPPO(KLPenaltyTraining, PPO)``.
    """

    def train(self) -> None:
        """
        Update policy using the currently gathered rollout buffer, then adapt β and the learning rate to the measured KL
        divergence.

        :raises ValueError: after ``MAX_UNDONE_IN_A_ROW`` updates in a row that were undone; if the rollout, the policy or the
            buffer cannot be used; if a callback has set an argument to an invalid value; if a user's schedule or rule
            returns an invalid target or coefficient
        """
        # The last rollout may overshoot total_timesteps; a linear schedule would then give a negative learning rate
        self._current_progress_remaining = max(self._current_progress_remaining, 0.0)
        check_settings(self)  # a callback may have changed them
        self._prepare_reference()
        self._update_learning_rate(self.policy.optimizer)
        settings = settings_at(self, self._current_progress_remaining)
        # Compared with a target of 0, any step would raise β
        rule = FixedPenalty() if settings.target_kl <= MIN_SCHEDULED_TARGET_KL else penalty_rule(self.kl_rule)
        bounds = kl_coef_limits(self.kl_coef_bounds, self.normalize_advantage)
        metrics = UpdateMetrics()

        problem = None
        self.step_scale = 1.0
        # torch's distributions skip their argument checks: NaN is caught once, in the measured KL
        with fast_update(self.policy, self.rollout_buffer):
            snapshot = Snapshot(self.policy)
            old_policy = OldPolicy(self.policy, self.rollout_buffer, self.kl_divergence, self._reference)
            try:
                self._optimize(old_policy, SegmentedControl(rule, self._steps_per_update, bounds), settings, metrics)
            except ValueError:
                # torch's distributions refuse the NaN of a diverged network. If the policy can still be evaluated, it has not
                # diverged, and the error was something else
                if math.isfinite(old_policy.kl().mean):  # measured without the other ranks, which may not have failed
                    raise
            step.drop_other_gradients(self.policy)
            kl = self._measure_kl(old_policy)
            raw_kl = kl.mean
            limit = math.inf if self.kl_ceiling is None else self.kl_ceiling * settings.target_kl
            if not (math.isfinite(raw_kl) and metrics.finite() and snapshot.still_finite()):
                problem = NOT_FINITE if old_policy.error is None else (f"{NOT_FINITE[0]} ({old_policy.error})", NOT_FINITE[1])
            elif raw_kl > limit:
                critic = self._critic_parameters(old_policy)
                self.step_scale, kl = shorten_step(snapshot, critic, partial(self._measure_kl, old_policy), raw_kl, limit)
                # Unless the target is 0: then the policy is the old one, and rounding is measured
                if not kl.mean <= limit and settings.target_kl > MIN_SCHEDULED_TARGET_KL:
                    problem = ABOVE_CEILING
            # Before its first step, only dropout and batch normalization can have moved it, which do nothing in eval mode
            if problem is None and not self._randomness_checked and metrics.kl_at_rest() > SMALL_KL * settings.target_kl:
                self._randomness_checked = True
                warn_if_random(old_policy, settings.target_kl)

        if problem is not None:
            snapshot.restore()
            self._update_learning_rate(self.policy.optimizer)  # as low as a rule has made it within the update
            self.policy.optimizer.zero_grad()  # a NaN is of no use to callbacks
            kl = RolloutKL(0.0, 0.0, kl.reference_before, kl.reference_before)  # of the restored policy
            self.step_scale = 0.0
            self.kl_coef = settings.kl_coef  # discard what a rule did within the undone update
            self._undone_updates += 1
        log_update(self, metrics, settings, raw_kl, kl)  # with the β that was used
        # The rules see the KL before any step back: otherwise an overshoot would look to them like a hit
        self._adapt(kl._replace(mean=raw_kl if problem is None else math.inf), settings, rule, bounds, metrics)
        self._warn_or_give_up(problem)

    def _optimize(self, old_policy: OldPolicy, control: SegmentedControl, settings: Settings, metrics: UpdateMetrics) -> None:
        """
        Take minibatch steps for ``n_epochs`` passes over the rollout, or fewer if ``kl_stop_factor`` says so. A rule with
        several segments adapts β in between.
        """
        self.policy.set_training_mode(True)
        lr_rule = learning_rate_rule(self.learning_rate_rule)
        with self._minibatch_gradients(old_policy) as compute_gradients, one_kernel(self.policy.optimizer) as take_step:
            for epoch in range(self.n_epochs):
                metrics.start_of_epoch = metrics.n_minibatches
                self._n_updates += 1
                for rollout_data, index in self._minibatches(settings):
                    metrics.add(*compute_gradients(rollout_data, index, settings))
                    # After the gradients, where PPO stops before them: they come from one call, which may be compiled
                    if self._stops_early(epoch, settings.target_kl, metrics):
                        return
                    take_step()
                    segment = control.end_segment(metrics.n_minibatches)
                    if segment is not None:
                        kl = metrics.kl(segment)
                        self.kl_coef = control.adapt(self.kl_coef, kl, settings.target_kl)
                        settings = settings._replace(kl_coef=self.kl_coef)
                        if lr_rule is not None:
                            balance = metrics.balance(settings, segment)
                            wanted = lr_rule.within_update(self.learning_rate_scale, kl, settings.target_kl, balance)
                            self._scale_learning_rate(limited(lr_rule, wanted, kl)[0])

    def _minibatch_gradients(self, old_policy: OldPolicy) -> AbstractContextManager[step.ComputeGradients]:
        """Choose how the gradients of a minibatch are computed during an update: plainly, or compiled."""
        if self._compiler is None:
            return nullcontext(partial(step.compute_gradients, self.policy, old_policy))
        return self._compiler.compiled_gradients(self.policy, old_policy)

    def _minibatches(self, settings: Settings) -> Iterator[tuple[Any, th.Tensor]]:
        """Draw one epoch of minibatches, with the indices of their transitions."""
        return minibatches(self.rollout_buffer, self.batch_size)

    def _measure_kl(self, old_policy: OldPolicy) -> RolloutKL:
        """Measure how far the policy has moved, on the whole rollout."""
        return old_policy.kl()

    def _critic_parameters(self, old_policy: OldPolicy) -> set[int]:
        """Find the parameters that a step back leaves alone, by their ``id``."""
        return critic_parameters(old_policy)

    def _explained_variance(self) -> float:
        """Compute how much of the variance of the returns the values explain."""
        return float(explained_variance(self.rollout_buffer.values.flatten(), self.rollout_buffer.returns.flatten()))

    def _stops_early(self, epoch: int, target_kl: float, metrics: UpdateMetrics) -> bool:
        if self.kl_stop_factor is None:
            return False
        kl = metrics.kl(slice(-1, None))
        stops = kl > self.kl_stop_factor * target_kl
        if stops and self.verbose >= 1:
            print(f"Early stopping at step {epoch} due to reaching max kl: {kl:.2f}")
        return stops

    @property
    def _steps_per_update(self) -> int:
        n_transitions = self.rollout_buffer.buffer_size * self.rollout_buffer.n_envs
        return self.n_epochs * math.ceil(n_transitions / (self.batch_size or n_transitions))

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        super()._update_learning_rate(optimizers)
        if self.learning_rate_rule is not None:
            for group in self.policy.optimizer.param_groups:
                group["lr"] *= self.learning_rate_scale

    def _scale_learning_rate(self, scale: float) -> None:
        """Change ``learning_rate_scale``, and the learning rate with it, within an update."""
        for group in self.policy.optimizer.param_groups:
            group["lr"] *= scale / self.learning_rate_scale
        self.learning_rate_scale = scale

    def _adapt(
        self, kl: RolloutKL, settings: Settings, rule: PenaltyRule, bounds: tuple[float, float], metrics: UpdateMetrics
    ) -> None:
        """
        Move β, the reference's coefficient and the learning rate for the next update, and warn where a bound has stopped β or
        the learning rate for long.
        """
        target_kl = settings.target_kl
        clips = metrics.clip_fraction() > MIN_CLIP_FRACTION  # it ends updates below the target, as it should
        self.kl_coef, side = apply_rule(rule, self.kl_coef, kl.mean, target_kl, bounds)
        self._rollouts_at_bound = count_at_bound(self._rollouts_at_bound, 0 if clips and side < 0 else side)
        warn_at_bound(self._rollouts_at_bound, self.kl_coef, kl.mean, target_kl)
        if self._reference is not None:
            kls = kl.reference_before, kl.reference
            self.reference_kl_coef = adapted_kl_coef(self._reference.spec, self.reference_kl_coef, *kls, bounds)

        lr_rule = learning_rate_rule(self.learning_rate_rule)
        if lr_rule is not None and target_kl > MIN_SCHEDULED_TARGET_KL:
            used = self.learning_rate_scale
            wanted = lr_rule(used, kl.mean, target_kl, metrics.balance(settings))
            self.learning_rate_scale, side = limited(lr_rule, wanted, kl.mean)
            self._rollouts_at_limit = count_at_bound(self._rollouts_at_limit, 0 if clips and side > 0 else side)
            learning_rate = self.policy.optimizer.param_groups[0]["lr"] * self.learning_rate_scale / used
            warn_at_limit(self._rollouts_at_limit, self.learning_rate_scale, learning_rate)

    def _warn_or_give_up(self, problem: tuple[str, str] | None) -> None:
        """
        Warn about an undone update, or stop after too many in a row.

        :param problem: what the update produced and the remedy, or ``None`` if it was kept
        :raises ValueError: after ``MAX_UNDONE_IN_A_ROW`` undone updates
        """
        self._undone_in_a_row = 0 if problem is None else self._undone_in_a_row + 1
        if problem is None:
            return
        produced, remedy = problem[0], problem[1].format(learning_rate=self.policy.optimizer.param_groups[0]["lr"])
        if self._undone_in_a_row == 1:
            warn_user(
                f"The update at {self.num_timesteps} timesteps produced {produced} and was undone. The next one uses "
                f"kl_coef={self.kl_coef:g}. If this persists, {remedy}."
            )
        if self._undone_in_a_row == MAX_UNDONE_IN_A_ROW:
            self._undone_in_a_row = 0  # a caller who catches this and lowers the learning rate starts afresh
            raise ValueError(
                f"{MAX_UNDONE_IN_A_ROW} updates in a row were undone, the last because it produced {produced}; the policy was "
                f"restored to its last valid state: {remedy}"
            )


def warn_if_random(old_policy: OldPolicy, target_kl: float) -> None:
    """Warn if the divergence is another one whenever it is measured."""
    first = old_policy.divergence_on_rollout()
    with preserve_random_state():
        th.rand(())
        np.random.random()
        second = old_policy.divergence_on_rollout()
    difference = (second - first).abs().mean().item()
    if difference > SMALL_KL * target_kl:
        warn_user(
            f"The policy's KL divergence differs by {difference:.2g} between two measurements without a step in between, and "
            "so cannot be controlled: the policy is random in eval mode, too, as F.dropout(x) makes it (pass "
            "training=self.training), or the samples of the rollout buffer are."
        )
