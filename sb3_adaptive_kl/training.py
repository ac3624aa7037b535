"""
THE train step: PPO with an adaptive KL penalty, for every host (PPO, MaskablePPO, RecurrentPPO).

Schulman et al. 2017 (https://arxiv.org/abs/1707.06347), section 4. One update is: remember the old policy's action
distributions; take minibatch steps on

    −E[r Â] + β · KL(π_old ‖ π) + c_1 · (V − R)² − c_2 · entropy;

measure d = KL(π_old ‖ π) once, on the whole rollout, after the last step; undo the update if it diverged; move β for the next.
"""

import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import FloatSchedule, explained_variance

from sb3_adaptive_kl import arguments, losses
from sb3_adaptive_kl.distributions import ActionDistribution, action_distribution
from sb3_adaptive_kl.divergences import k3, pearson
from sb3_adaptive_kl.guard import Checkpoint, is_finite
from sb3_adaptive_kl.minibatches import minibatches, random_state_kept
from sb3_adaptive_kl.penalty import PenaltyRule

# After this many undone updates in a row the run is hopeless and ends
MAX_UNDONE_IN_A_ROW = 5
# After this many rollouts in a row with the rule pushing β against a bound, say so
PATIENCE_AT_BOUND = 10
# Transitions evaluated at a time when nothing is trained: large enough to be quick, small enough not to be felt in memory
SWEEP_BATCH_SIZE = 256


class Settings(NamedTuple):
    """What the schedules and the penalty rule give for one update."""

    target_kl: float
    kl_coef: float
    clip_range: float | None
    clip_range_vf: float | None


class Evaluation(NamedTuple):
    """The policy's view of a minibatch's B valid transitions; every tensor has shape (B,)."""

    values: th.Tensor
    log_prob: th.Tensor
    entropy: th.Tensor | None
    distribution: ActionDistribution | None  # None if the divergence is estimated from log_prob alone


class Metrics(NamedTuple):
    """What is logged of a minibatch: detached scalars, left on their device so that nothing waits for them."""

    loss: th.Tensor
    policy_gradient_loss: th.Tensor
    value_loss: th.Tensor
    entropy_loss: th.Tensor
    kl_loss: th.Tensor
    kl: th.Tensor
    approx_kl: th.Tensor
    clip_fraction: th.Tensor | None


class KLPenaltyTraining(OnPolicyAlgorithm):
    """
    Mixin that gives an on-policy algorithm of SB3 or sb3-contrib the KL-penalised update.

    To be put before its host: ``class AdaptiveKLPPO(KLPenaltyTraining, PPO)``. It has no constructor; the class assigns the
    arguments under their own names and calls ``_setup_model()``, as ``load()`` does. What only the host knows stands in
    two methods: how a minibatch is evaluated, and which of its entries are not padding.
    """

    # The arguments, as the user gave them
    batch_size: int | None
    n_epochs: int
    normalize_advantage: bool
    clip_range: float | Schedule | None
    clip_range_vf: float | Schedule | None
    target_kl: float | Schedule
    init_kl_coef: float
    kl_rule: str | PenaltyRule
    kl_tolerance: float
    kl_factor: float
    kl_coef_bounds: tuple[float, float] | None
    kl_divergence: str
    kl_cutoff_coef: float
    kl_cutoff_factor: float
    kl_stop_factor: float | None
    compile: bool

    # The state: plain numbers, which `save` writes and `load` restores
    kl_coef: float
    _undone_updates: int = 0
    _undone_in_a_row: int = 0
    _rollouts_at_bound: int = 0

    # ---------------------------------------------------------------- what the host decides

    def _evaluate_actions(self, rollout_data: Any, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """
        Values, log-probabilities and entropy (or None) of a minibatch. Afterwards ``policy.action_dist`` must be the
        distribution that gave them, with its graph: so it is for the policies of SB3 and sb3-contrib.
        """
        return self.policy.evaluate_actions(rollout_data.observations, actions)

    def _valid(self, rollout_data: Any) -> th.Tensor | None:
        """Boolean mask of the entries that are transitions and not padding, or None if all are."""
        return None

    # ---------------------------------------------------------------- set-up

    def _setup_model(self) -> None:
        self._check_arguments()
        # The hosts make clip_range a schedule here and know no None
        clip_range, self.clip_range = self.clip_range, 0.2 if self.clip_range is None else self.clip_range
        super()._setup_model()
        if clip_range is None:
            self.clip_range = None
        # Not after load(): the running β is part of the checkpoint
        if not hasattr(self, "kl_coef"):
            self.kl_coef = float(self.init_kl_coef)

    def _check_arguments(self) -> None:
        """
        :raises ValueError: if an argument makes no sense; the message names it, its value and the remedy
        """
        arguments.check_schedule(
            "target_kl", self.target_kl, "0.01 is a good start; for a linear decay use LinearSchedule(0.02, 0.0, 1.0) of SB3"
        )
        number = arguments.check_number
        number("kl_tolerance", self.kl_tolerance, lambda x: x >= 1, "a number of at least 1", "the paper has 1.5")
        number("kl_factor", self.kl_factor, lambda x: x > 1, "a number above 1", "the paper has 2; for a constant β use kl_rule='fixed'")
        number("kl_cutoff_coef", self.kl_cutoff_coef, lambda x: x >= 0, "a number of at least 0", "0 leaves the hinge out, others use 1000")
        number("kl_cutoff_factor", self.kl_cutoff_factor, lambda x: x > 0, "a positive number", "others use 2")
        if self.kl_stop_factor is not None:
            number("kl_stop_factor", self.kl_stop_factor, lambda x: x > 0, "a positive number", "others use 4; None never stops early")
        for name in ("clip_range", "clip_range_vf"):
            if getattr(self, name) is not None:
                arguments.check_schedule(name, getattr(self, name), "None deactivates clipping")
        arguments.check_choice("kl_divergence", self.kl_divergence, arguments.KL_DIVERGENCES)
        arguments.penalty_rule(self.kl_rule, self.kl_tolerance, self.kl_factor)

        low, high = arguments.kl_coef_limits(self.kl_coef_bounds, self.normalize_advantage)
        name = "kl_coef" if hasattr(self, "kl_coef") else "init_kl_coef"
        number(name, getattr(self, name), lambda x: low <= x <= high, f"within kl_coef_bounds=({low}, {high})", "move one of them")
        n_transitions = None if self.env is None else self.n_steps * self.n_envs
        arguments.check_minibatches(self.batch_size, self.n_epochs, n_transitions, self.normalize_advantage)

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        # The last rollout may overshoot total_timesteps; a linear schedule would then give a negative learning rate
        self._current_progress_remaining = max(self._current_progress_remaining, 0.0)

    # ---------------------------------------------------------------- the update

    def train(self) -> None:
        """
        Update the policy with the rollout just collected, then β with the KL divergence this caused.

        :raises ValueError: after ``MAX_UNDONE_IN_A_ROW`` updates in a row that diverged
        """
        settings = self._settings()
        checkpoint = Checkpoint(self.policy)
        self._update_learning_rate(self.policy.optimizer)

        old = self._old_distributions()
        history: list[list[Metrics]] = []
        grad_norms: list[th.Tensor] = []
        error = self._optimize(old, settings, history, grad_norms)
        kl = self._measure(old, error)

        mean_kl = kl.mean().item()
        sound = math.isfinite(mean_kl) and is_finite(self.policy)
        if not sound:
            checkpoint.restore()
        self._count_undone(sound)
        self._log(settings, history, grad_norms, mean_kl, kl.max().item())
        self._adapt_penalty(mean_kl if sound else math.inf, settings.target_kl)
        self._refuse_to_go_on_diverging()

    def _settings(self) -> Settings:
        progress = self._current_progress_remaining
        return Settings(
            target_kl=arguments.target_kl_at(self.target_kl, progress),
            kl_coef=self.kl_coef,
            clip_range=None if self.clip_range is None else FloatSchedule(self.clip_range)(progress),
            clip_range_vf=None if self.clip_range_vf is None else FloatSchedule(self.clip_range_vf)(progress),
        )

    def _optimize(
        self,
        old: ActionDistribution | None,
        settings: Settings,
        history: list[list[Metrics]],
        grad_norms: list[th.Tensor],
    ) -> ValueError | None:
        """
        ``n_epochs`` passes of minibatch steps. Appends to ``history`` (per epoch) and ``grad_norms``.

        :return: the error that ended it, if one did: torch's distributions refuse the NaN of a diverged network
        """
        self.policy.set_training_mode(True)
        optimizer = self.policy.optimizer
        parameters = list(self.policy.parameters())
        try:
            for epoch in range(self.n_epochs):
                history.append([])
                self._n_updates += 1
                for rollout_data, index in minibatches(self.rollout_buffer, self.batch_size):
                    loss, metrics = self._loss(rollout_data, None if old is None else old[index], settings)
                    history[-1].append(metrics)
                    if self._should_stop(metrics.kl, settings.target_kl, epoch):
                        return None
                    optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    grad_norms.append(th.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm))
                    optimizer.step()
        except ValueError as error:
            return error
        return None

    def _loss(self, rollout_data: Any, old: ActionDistribution | None, settings: Settings) -> tuple[th.Tensor, Metrics]:
        """
        The loss of one minibatch with its graph, and its parts for the log.

        :param old: the old policy's distributions of the valid transitions, None if they are not needed
        """
        new = self._evaluate(rollout_data)
        old_log_prob, old_values, advantages, returns = self._valid_entries(
            rollout_data, "old_log_prob", "old_values", "advantages", "returns"
        )
        if self.normalize_advantage:
            advantages = losses.normalize(advantages)
        log_ratio = new.log_prob - old_log_prob
        ratio = log_ratio.exp()

        kl = self._divergence(old, new.distribution, log_ratio).mean()
        policy_loss = losses.surrogate_loss(advantages, ratio, settings.clip_range)
        kl_loss = losses.penalty_loss(
            kl, settings.kl_coef, self.kl_cutoff_coef, cutoff=self.kl_cutoff_factor * settings.target_kl
        )
        value_loss = losses.value_loss(new.values, old_values, returns, settings.clip_range_vf)
        entropy_loss = losses.entropy_loss(new.entropy, new.log_prob)
        loss = policy_loss + kl_loss + self.ent_coef * entropy_loss + self.vf_coef * value_loss

        with th.no_grad():
            approx_kl = k3(log_ratio).mean()
            clip_fraction = None
            if settings.clip_range is not None:
                clip_fraction = ((ratio - 1).abs() > settings.clip_range).float().mean()
        parts = (loss, policy_loss, value_loss, entropy_loss, kl_loss, kl, approx_kl)
        return loss, Metrics(*(part.detach() for part in parts), clip_fraction)

    def _divergence(
        self, old: ActionDistribution | None, new: ActionDistribution | None, log_ratio: th.Tensor
    ) -> th.Tensor:
        """The KL divergence that both the loss and the rule see, per state, shape (B,), in nats."""
        if self.kl_divergence == "k3":
            return k3(log_ratio)
        if self.kl_divergence == "pearson":
            return pearson(log_ratio)
        assert old is not None and new is not None
        return old.kl(new) if self.kl_divergence == "forward" else new.kl(old)

    def _should_stop(self, kl: th.Tensor, target_kl: float, epoch: int) -> bool:
        if self.kl_stop_factor is None or not kl.item() > self.kl_stop_factor * target_kl:
            return False
        if self.verbose >= 1:
            print(f"Early stopping at step {epoch} due to reaching max kl: {kl.item():.2f}")
        return True

    # ---------------------------------------------------------------- the policy on the rollout

    def _evaluate(self, rollout_data: Any) -> Evaluation:
        """Run the network once on a minibatch; padding is dropped before anything is computed from it."""
        values, log_prob, entropy = self._evaluate_actions(rollout_data, self._actions(rollout_data))
        values = values.flatten()
        distribution = action_distribution(self.policy.action_dist) if self._needs_distribution else None
        valid = self._valid(rollout_data)
        if valid is None:
            return Evaluation(values, log_prob, entropy, distribution)
        return Evaluation(
            values[valid],
            log_prob[valid],
            None if entropy is None else entropy[valid],
            None if distribution is None else distribution[valid],
        )

    def _actions(self, rollout_data: Any) -> th.Tensor:
        actions: th.Tensor = rollout_data.actions
        # The buffer holds floats; a categorical wants its outcome's number
        return actions.long().flatten() if isinstance(self.action_space, spaces.Discrete) else actions

    def _valid_entries(self, rollout_data: Any, *names: str) -> list[th.Tensor]:
        entries = [getattr(rollout_data, name) for name in names]
        valid = self._valid(rollout_data)
        return entries if valid is None else [entry[valid] for entry in entries]

    @property
    def _needs_distribution(self) -> bool:
        return self.kl_divergence in ("forward", "reverse")

    def _sweep(self) -> Iterator[tuple[Any, th.Tensor, Evaluation]]:
        """The policy as it acts (eval mode) on every transition of the rollout, without a graph or a random number."""
        self.policy.set_training_mode(False)
        batch_size = None if self.batch_size is None else max(self.batch_size, SWEEP_BATCH_SIZE)
        with th.no_grad(), random_state_kept():
            for rollout_data, index in minibatches(self.rollout_buffer, batch_size):
                yield rollout_data, index, self._evaluate(rollout_data)

    def _old_distributions(self) -> ActionDistribution | None:
        """π_old's parameters in the order of the flattened rollout, or None if only log-probabilities are compared."""
        if not self._needs_distribution:
            return None
        batches, indices = [], []
        for rollout_data, index, evaluation in self._sweep():
            if not batches:
                self._check_action_dist(rollout_data, evaluation)
            assert evaluation.distribution is not None
            batches.append(evaluation.distribution)
            indices.append(index)
        return ActionDistribution.concatenate(batches)[th.cat(indices).argsort()]

    def _measure(self, old: ActionDistribution | None, error: ValueError | None) -> th.Tensor:
        """
        The divergence of the updated policy from the old one at every state of the rollout, in nats.

        :param error: what ended the update, if something did
        :return: shape (N,); NaN if the network gives no valid distribution any more
        :raises ValueError: ``error``, if the network is fine and something else was wrong
        """
        try:
            kl = [
                self._divergence(
                    None if old is None else old[index],
                    evaluation.distribution,
                    evaluation.log_prob - self._valid_entries(rollout_data, "old_log_prob")[0],
                )
                for rollout_data, index, evaluation in self._sweep()
            ]
        except ValueError:
            # torch's distributions refuse NaN. The old policy passed this very sweep: it is the update that broke it
            return th.full((1,), math.nan)
        if error is not None:
            raise error
        return th.cat(kl)

    def _check_action_dist(self, rollout_data: Any, evaluation: Evaluation) -> None:
        """
        :raises ValueError: if ``policy.action_dist`` is not the distribution that ``evaluate_actions`` has just used
        """
        log_prob = self.policy.action_dist.log_prob(self._actions(rollout_data))
        valid = self._valid(rollout_data)
        log_prob = log_prob if valid is None else log_prob[valid]
        if log_prob.shape != evaluation.log_prob.shape or not th.allclose(log_prob, evaluation.log_prob, rtol=1e-3, atol=1e-3):
            raise ValueError(
                f"policy={type(self.policy).__name__}: its evaluate_actions does not leave the distribution it evaluated in "
                "policy.action_dist, so its KL divergence cannot be computed: build it with "
                "self._get_action_dist_from_latent(latent_pi) as SB3's policies do, or pass kl_divergence='k3'"
            )

    # ---------------------------------------------------------------- after the update

    def _count_undone(self, sound: bool) -> None:
        if sound:
            self._undone_in_a_row = 0
            return
        self._undone_updates += 1
        self._undone_in_a_row += 1
        warnings.warn(
            f"The update at {self.num_timesteps} timesteps left a non-finite KL divergence or parameter and was undone; "
            f"kl_coef={self.kl_coef:g} is raised. If this happens again, lower learning_rate (Adam's step does not shrink with "
            "the loss), or check the observations and rewards for extreme values.",
            stacklevel=2,
        )

    def _refuse_to_go_on_diverging(self) -> None:
        """
        :raises ValueError: if too many updates in a row were undone
        """
        if self._undone_in_a_row >= MAX_UNDONE_IN_A_ROW:
            raise ValueError(
                f"{self._undone_in_a_row} updates in a row diverged and were undone; the policy is still the last sound one. "
                f"learning_rate={self.policy.optimizer.param_groups[0]['lr']:g} is too high for this task, or its rewards or "
                "observations are extreme: lower learning_rate by 10, or wrap the environment in VecNormalize"
            )

    def _adapt_penalty(self, kl: float, target_kl: float) -> None:
        """
        Move β for the next update; warn when it has been pushed against a bound for long.

        :param kl: d in nats, ``inf`` after an update that diverged
        :raises ValueError: if a user's rule returns no number
        """
        rule = arguments.penalty_rule(self.kl_rule, self.kl_tolerance, self.kl_factor)
        low, high = arguments.kl_coef_limits(self.kl_coef_bounds, self.normalize_advantage)
        wanted = float(rule(self.kl_coef, kl, target_kl))
        if math.isnan(wanted):
            raise ValueError(f"kl_rule={rule!r} returned NaN for kl_coef={self.kl_coef}, kl={kl}, target_kl={target_kl}")
        self.kl_coef = min(max(wanted, low), high)

        self._rollouts_at_bound = self._rollouts_at_bound + 1 if wanted != self.kl_coef else 0
        if self._rollouts_at_bound == PATIENCE_AT_BOUND:
            above = wanted > high
            bound, miss = ("upper", "above") if above else ("lower", "below")
            move, aim = ("Lower", "raise") if above else ("Raise", "lower")
            warnings.warn(
                f"kl_coef has been at its {bound} bound {self.kl_coef:g} for {PATIENCE_AT_BOUND} rollouts in a row, with the KL "
                f"divergence still {miss} target_kl={target_kl:g}. {move} learning_rate or n_epochs, or {aim} target_kl: "
                "Adam's step does not depend on the scale of the loss, so β alone cannot correct it.",
                stacklevel=3,
            )

    def _log(
        self, settings: Settings, history: list[list[Metrics]], grad_norms: list[th.Tensor], mean_kl: float, max_kl: float
    ) -> None:
        """SB3's keys where they mean the same, so that curves overlay; the KL's own beside them."""
        steps = [metrics for epoch in history for metrics in epoch]
        for name in ("entropy_loss", "policy_gradient_loss", "value_loss", "kl_loss"):
            self.logger.record(f"train/{name}", _mean(steps, name))
        # As in SB3: of the last epoch only, and before each step
        self.logger.record("train/approx_kl", _mean(history[-1], "approx_kl"))
        if settings.clip_range is not None:
            self.logger.record("train/clip_fraction", _mean(steps, "clip_fraction"))
            self.logger.record("train/clip_range", settings.clip_range)
        if settings.clip_range_vf is not None:
            self.logger.record("train/clip_range_vf", settings.clip_range_vf)
        self.logger.record("train/loss", steps[-1].loss.item())
        if grad_norms:
            self.logger.record("train/grad_norm", th.stack(grad_norms).mean().item())
        self.logger.record("train/kl", mean_kl)
        self.logger.record("train/kl_max", max_kl)
        self.logger.record("train/kl_over_target", mean_kl / settings.target_kl)
        self.logger.record("train/kl_coef", settings.kl_coef)
        self.logger.record("train/undone_updates", self._undone_updates)
        buffer = self.rollout_buffer
        self.logger.record("train/explained_variance", explained_variance(buffer.values.flatten(), buffer.returns.flatten()))
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", np.exp(self.policy.log_std.detach().cpu().numpy()).mean().item())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")


def _mean(steps: list[Metrics], name: str) -> float:
    return th.stack([getattr(metrics, name) for metrics in steps]).mean().item()
