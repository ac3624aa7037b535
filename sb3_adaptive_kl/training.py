"""
The train step: PPO with an adaptive KL penalty, for every host (PPO, MaskablePPO, RecurrentPPO).

Schulman et al. 2017 (https://arxiv.org/abs/1707.06347), section 4. One update: remember the old policy's action distributions;
take minibatch steps on

    −E[r Â] + β · KL(π_old ‖ π) + c_1 · (V − R)² − c_2 · entropy;

measure d = KL(π_old ‖ π) on the whole rollout, after the last step; step back if it exceeds the ceiling; undo the update if it
diverged; move β, and the learning rate, for the next.
"""

import math
import warnings
from functools import partial
from numbers import Real

import torch as th

from sb3_adaptive_kl.algorithm import KLPenaltyAlgorithm
from sb3_adaptive_kl.arguments import kl_coef_limits, learning_rate_rule, penalty_rule, settings_at
from sb3_adaptive_kl.control import SegmentedControl, next_kl_coef, rollouts_at_bound, warn_at_bound
from sb3_adaptive_kl.metrics import UpdateMetrics, log_learning_rate, log_penalty, log_progress, log_step_back
from sb3_adaptive_kl.objective import MinibatchMetrics, Settings
from sb3_adaptive_kl.penalty import PenaltyRule
from sb3_adaptive_kl.rollout.old_policy import OldPolicy
from sb3_adaptive_kl.snapshot import Snapshot
from sb3_adaptive_kl.step import Update
from sb3_adaptive_kl.step_back import shorten_step

# After this many undone updates in a row the run is hopeless and ends
MAX_UNDONE_IN_A_ROW = 5


class KLPenaltyTraining(KLPenaltyAlgorithm):
    """
    Mixin that gives an on-policy algorithm of SB3 or sb3-contrib the KL-penalized update.

    Put it before its host: ``class AdaptiveKLPPO(KLPenaltyTraining, PPO)``.
    """

    def train(self) -> None:
        """
        Update the policy with the rollout just collected, then β and the learning rate with the KL divergence this caused.

        :raises ValueError: after ``MAX_UNDONE_IN_A_ROW`` updates in a row that diverged; if the rollout, the policy or the
            buffer cannot be used; if a user's schedule or rule returns an invalid target or coefficient
        """
        self._host.check_rollout(self.rollout_buffer)
        self._update_learning_rate(self.policy.optimizer)
        settings = settings_at(self, self._current_progress_remaining)
        metrics = UpdateMetrics()

        with self._execution.evaluating(self.policy):
            snapshot = Snapshot(self.policy)
            old_policy = OldPolicy(self.policy, self.rollout_buffer, self._host, self.kl_divergence)
            kl = self._optimize_and_measure(old_policy, settings, metrics)
            raw_kl = kl.mean().item()
            sound = math.isfinite(raw_kl) and metrics.finite() and snapshot.still_finite()
            within_ceiling = True
            self.step_scale = 1.0
            limit = math.inf if self.kl_ceiling is None else self.kl_ceiling * settings.target_kl
            if sound and raw_kl > limit:
                measure = partial(self._measure, old_policy)
                self.step_scale, kl = shorten_step(old_policy, snapshot, measure, raw_kl, limit)
                within_ceiling = kl.mean().item() <= limit  # not so if the actor depends on something that is not scaled
                kl = kl if within_ceiling else th.zeros_like(kl)
                sound = within_ceiling and snapshot.still_finite()
        if not sound:
            snapshot.restore()
            self.step_scale = 0.0
            self.kl_coef = settings.kl_coef  # what a rule made of such an update while it ran says nothing
            self._undone_updates += 1

        self._log_update(settings, metrics, raw_kl, kl)
        # The rules see the KL of the whole step: after a step back, an overshoot would look to them like a hit
        self._adapt_penalty(raw_kl if sound else math.inf, settings.target_kl)
        self._adapt_learning_rate(raw_kl if sound else math.inf, settings.target_kl)
        what_is_wrong = (
            "non-finite KL divergence or parameter" if within_ceiling else "KL divergence above kl_ceiling at any length"
        )
        self._warn_or_give_up(sound, what_is_wrong)

    def _optimize_and_measure(self, old_policy: OldPolicy, settings: Settings, metrics: UpdateMetrics) -> th.Tensor:
        """
        Move the policy, then measure how far it went.

        :return: the divergence from the old policy at each state of the rollout, in nats, shape (N,); NaN if the new policy
            does not give valid distributions any more
        """
        try:
            self._optimize(old_policy, settings, metrics)
        except ValueError:
            # torch's distributions refuse the NaN of a diverged network. If the policy can still be evaluated, it has not
            # diverged, and the error was something else
            if math.isfinite(self._measure(old_policy).mean().item()):
                raise
        return self._measure(old_policy)

    def _optimize(self, old_policy: OldPolicy, settings: Settings, metrics: UpdateMetrics) -> None:
        """
        Take minibatch steps for ``n_epochs`` passes over the rollout, or fewer if ``kl_stop_factor`` says so. Meanwhile a
        predictive rule moves β.
        """
        self.policy.set_training_mode(True)
        update = Update(self.policy, self._host, old_policy, self._execution.optimizer_step(self.policy))
        control = SegmentedControl(self._rule, self._steps_per_update, self._kl_coef_limits)
        with self._execution.stepping(self.policy):
            for epoch in range(self.n_epochs):
                metrics.epochs.append([])
                self._n_updates += 1
                for rollout_data, index in self._execution.minibatches(self.rollout_buffer, self.batch_size):
                    minibatch, grad_norm = self._execution.take_step(update, rollout_data, index, settings)
                    metrics.epochs[-1].append(minibatch)
                    if grad_norm is None:
                        self._print_early_stop(epoch, MinibatchMetrics(*minibatch).kl)
                        return
                    metrics.grad_norms.append(grad_norm)
                    segment = control.end_segment(len(metrics.grad_norms))
                    if segment is not None:
                        kls = metrics.kls(segment)
                        self.kl_coef = control.next_kl_coef(self.kl_coef, kls, settings.target_kl)
                        settings = settings._replace(kl_coef=self.kl_coef)

    @property
    def _rule(self) -> PenaltyRule:
        return penalty_rule(self.kl_rule, self.kl_tolerance, self.kl_factor)

    @property
    def _kl_coef_limits(self) -> tuple[float, float]:
        return kl_coef_limits(self.kl_coef_bounds, self.normalize_advantage)

    @property
    def _steps_per_update(self) -> int:
        n_transitions = self.rollout_buffer.buffer_size * self.rollout_buffer.n_envs
        return self.n_epochs * math.ceil(n_transitions / (self.batch_size or n_transitions))

    def _measure(self, old_policy: OldPolicy) -> th.Tensor:
        try:
            return old_policy.divergence_on_rollout()
        except ValueError:
            # The old policy passed this very sweep before the update, so it is the update that broke the policy
            return th.full((1,), math.nan)

    def _print_early_stop(self, epoch: int, kl: th.Tensor) -> None:
        if self.verbose >= 1:
            print(f"Early stopping at step {epoch} due to reaching max kl: {kl.item():.2f}")

    # ---------------------------------------------------------------- after the update

    def _log_update(self, settings: Settings, metrics: UpdateMetrics, raw_kl: float, kl: th.Tensor) -> None:
        metrics.log(self.logger, settings)
        log_penalty(self.logger, self.kl_coef, settings.target_kl, kl.mean().item(), kl.max().item())
        if self.kl_ceiling is not None:
            log_step_back(self.logger, raw_kl, self.step_scale)
        if self.learning_rate_rule is not None:
            log_learning_rate(self.logger, self.policy.optimizer.param_groups[0]["lr"], self.learning_rate_scale)
        seconds = self._execution.seconds_compiling()
        log_progress(self.logger, self.rollout_buffer, self.policy, self._n_updates, self._undone_updates, seconds)

    def _adapt_penalty(self, kl: float, target_kl: float) -> None:
        """
        Move β for the next update.

        :param kl: d in nats, ``inf`` after an update that diverged
        :param target_kl: d_targ in nats
        :raises ValueError: if a user's rule returns NaN
        """
        self.kl_coef, side = next_kl_coef(self._rule, self.kl_coef, kl, target_kl, self._kl_coef_limits)
        self._rollouts_at_bound = rollouts_at_bound(self._rollouts_at_bound, side)
        warn_at_bound(self._rollouts_at_bound, self.kl_coef, kl, target_kl)

    def _adapt_learning_rate(self, kl: float, target_kl: float) -> None:
        """
        Move the factor of the learning rate for the next update, if there is a rule for it.

        :param kl: d in nats, ``inf`` after an update that was undone
        :param target_kl: d_targ in nats
        :raises ValueError: if a user's rule does not return a positive number
        """
        rule = learning_rate_rule(self.learning_rate_rule)
        if rule is not None:
            scale = rule(self.learning_rate_scale, kl, target_kl)
            if not isinstance(scale, Real) or not 0 < scale < math.inf:
                raise ValueError(
                    f"learning_rate_rule={rule!r} returned {scale!r} for kl={kl}: it must return a positive number"
                )
            self.learning_rate_scale = float(scale)

    def _warn_or_give_up(self, sound: bool, what_is_wrong: str) -> None:
        """
        Tell the user about an update that was undone.

        :param sound: whether it was not
        :param what_is_wrong: with it, in words
        :raises ValueError: if too many updates in a row were undone
        """
        self._undone_in_a_row = 0 if sound else self._undone_in_a_row + 1
        if self._undone_in_a_row == MAX_UNDONE_IN_A_ROW:
            self._undone_in_a_row = 0  # a caller who catches this and lowers the learning rate starts afresh
            learning_rate = self.policy.optimizer.param_groups[0]["lr"]
            raise ValueError(
                f"{MAX_UNDONE_IN_A_ROW} updates in a row diverged and were undone; the policy is the last sound one. "
                f"learning_rate={learning_rate:g} is too high, or rewards or observations are extreme or NaN: lower "
                "learning_rate by a factor of 10, wrap the environment in VecNormalize, or find the NaN with VecCheckNan"
            )
        if not sound:
            warnings.warn(
                f"The update at {self.num_timesteps} timesteps left a {what_is_wrong} and was undone. "
                f"The next one uses kl_coef={self.kl_coef:g}. If this goes on, lower learning_rate, or look for extreme "
                "or NaN observations and rewards.",
                stacklevel=2,
            )
