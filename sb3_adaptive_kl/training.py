"""
THE train step: PPO with an adaptive KL penalty, for every host (PPO, MaskablePPO, RecurrentPPO).

Schulman et al. 2017 (https://arxiv.org/abs/1707.06347), section 4. One update is: remember the old policy's action
distributions; take minibatch steps on

    −E[r Â] + β · KL(π_old ‖ π) + c_1 · (V − R)² − c_2 · entropy;

measure d = KL(π_old ‖ π) once, on the whole rollout, after the last step; undo the update if it diverged; move β for the next.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from numbers import Real
from typing import Any

import torch as th
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import FloatSchedule, explained_variance

from sb3_adaptive_kl import losses
from sb3_adaptive_kl.acceleration import Compilation, Compiled, NotCompiled
from sb3_adaptive_kl.arguments import check_arguments, check_minibatches, kl_coef_limits, penalty_rule, target_kl_at
from sb3_adaptive_kl.collection import Act, act, checked_once
from sb3_adaptive_kl.distributions import ActionDistribution
from sb3_adaptive_kl.divergences import k3
from sb3_adaptive_kl.evaluation import PolicyEvaluation
from sb3_adaptive_kl.guard import Checkpoint
from sb3_adaptive_kl.lean import checks_apart, forget, prepare, preprocessing_apart
from sb3_adaptive_kl.metrics import MinibatchMetrics, Settings, UpdateMetrics
from sb3_adaptive_kl.minibatches import minibatches
from sb3_adaptive_kl.optimization import AdamStep, Gradients, OptimizerStep, clip_gradients
from sb3_adaptive_kl.penalty import PenaltyRule

# After this many undone updates in a row the run is hopeless and ends
MAX_UNDONE_IN_A_ROW = 5
# After this many rollouts in a row with the rule pushing β against a bound, say so
PATIENCE_AT_BOUND = 10


class KLPenaltyTraining(PolicyEvaluation):
    """
    Mixin that gives an on-policy algorithm of SB3 or sb3-contrib the KL-penalised update.

    To be put before its host: ``class AdaptiveKLPPO(KLPenaltyTraining, PPO)``. The arguments of the penalty are kept as the
    user gave them, under their own names: ``load()`` writes them past the constructor and then calls ``_setup_model()``,
    which interprets them. They are documented in :class:`~sb3_adaptive_kl.AdaptiveKLPPO`; all others go to the host.
    """

    # The host's arguments that the train step needs
    n_epochs: int
    normalize_advantage: bool
    clip_range_vf: float | Schedule | None

    # The state: plain numbers, which save() writes and load() restores
    kl_coef: float
    _undone_updates: int = 0
    _undone_in_a_row: int = 0
    _rollouts_at_bound: int = 0  # in a row; negative at the lower bound

    # With compile=True: `act`, `_gradients`, and for Adam the whole of `_step`
    _compilation: Compilation | None
    _act_function: Act | None
    _gradients_function: Callable[..., tuple[Gradients, th.Tensor, th.Tensor]]
    _step_function: Callable[..., tuple[th.Tensor, th.Tensor | None]]

    def __init__(
        self,
        *args: Any,
        clip_range: float | Schedule | None,
        target_kl: float | Schedule,
        init_kl_coef: float,
        kl_rule: str | PenaltyRule,
        kl_tolerance: float,
        kl_factor: float,
        kl_coef_bounds: tuple[float, float] | None,
        kl_divergence: str,
        kl_cutoff_coef: float,
        kl_cutoff_factor: float,
        kl_stop_factor: float | None,
        compile: bool,
        _init_setup_model: bool,
        **kwargs: Any,
    ) -> None:
        # PPO's constructor would divide by a batch_size of 0, and assert where we can say what to do
        check_minibatches(kwargs["batch_size"], kwargs["n_epochs"], kwargs["normalize_advantage"])
        super().__init__(*args, **kwargs, _init_setup_model=False)  # type: ignore[misc]  # mypy lets *args fill every parameter
        self.clip_range = clip_range
        self.target_kl = target_kl
        self.init_kl_coef = init_kl_coef
        self.kl_rule = kl_rule
        self.kl_tolerance = kl_tolerance
        self.kl_factor = kl_factor
        self.kl_coef_bounds = kl_coef_bounds
        self.kl_divergence = kl_divergence
        self.kl_cutoff_coef = kl_cutoff_coef
        self.kl_cutoff_factor = kl_cutoff_factor
        self.kl_stop_factor = kl_stop_factor
        self.compile = compile
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        check_arguments(self)
        # The hosts turn clip_range into a schedule here, and know no None
        clipping = self.clip_range is not None
        self.clip_range = self.clip_range if clipping else math.inf
        super()._setup_model()
        self.clip_range = self.clip_range if clipping else None
        # Not after load(): the running β is part of the checkpoint
        self.kl_coef = float(getattr(self, "kl_coef", self.init_kl_coef))
        self._compilation, self._act_function = Compilation() if self.compile else None, None
        if self._compilation is not None:
            self._act_function = Compiled(act, self._compilation)
            self._gradients_function = Compiled(self._gradients, self._compilation)
            self._step_function = Compiled(self._step, self._compilation)
            prepare(getattr(self.policy, "action_dist", None))

    def _excluded_save_params(self) -> list[str]:
        # Compiled code cannot be saved, and _setup_model makes it anew; the policy may be another when it is loaded
        return [
            *super()._excluded_save_params(),
            *("_compilation", "_act_function", "_gradients_function", "_step_function", "_action_dist_checked"),
        ]

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        # The last rollout may overshoot total_timesteps; a linear schedule would then give a negative learning rate
        self._current_progress_remaining = max(self._current_progress_remaining, 0.0)

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> bool:
        with checked_once(self.policy, self._act_function):
            return super().collect_rollouts(*args, **kwargs)

    # ---------------------------------------------------------------- the update

    def train(self) -> None:
        """
        Update the policy with the rollout just collected, then β with the KL divergence this caused.

        :raises ValueError: after ``MAX_UNDONE_IN_A_ROW`` updates in a row that diverged; if the rollout, the policy or the
            buffer cannot be used; if a schedule or a rule of the user's returns what is no target or no coefficient
        """
        self._check_rollout()
        self._update_learning_rate(self.policy.optimizer)
        # What torch's distributions check at every call is checked below, once: what is not finite shows in d
        with checks_apart(self.policy):
            self._update()

    def _update(self) -> None:
        settings = self._settings()
        checkpoint = Checkpoint(self.policy)
        old = self._old_distributions()
        metrics = UpdateMetrics()

        kl = self._optimize_and_measure(old, settings, metrics)
        d = kl.mean().item()
        sound = math.isfinite(d) and metrics.finite() and checkpoint.still_finite()
        if not sound:
            checkpoint.restore()
            self._undone_updates += 1

        metrics.record(self.logger, settings)
        self._record(settings, d, kl.max().item())
        self._adapt_penalty(d if sound else math.inf, settings.target_kl)
        self._warn_or_give_up(sound)

    def _settings(self) -> Settings:
        # FloatSchedule: whoever assigns a number in the middle of a run is understood, too
        progress = self._current_progress_remaining
        return Settings(
            target_kl=target_kl_at(self.target_kl, progress),
            kl_coef=self.kl_coef,
            clip_range=None if self.clip_range is None else FloatSchedule(self.clip_range)(progress),
            clip_range_vf=None if self.clip_range_vf is None else FloatSchedule(self.clip_range_vf)(progress),
            vf_coef=self.vf_coef,
            ent_coef=self.ent_coef or None,
            max_grad_norm=self.max_grad_norm,
        )

    def _optimize_and_measure(self, old: ActionDistribution | None, settings: Settings, metrics: UpdateMetrics) -> th.Tensor:
        """
        :return: the divergence of the new policy from the old one at every state of the rollout, in nats, shape (N,);
            NaN if the new policy gives no valid distribution any more
        """
        try:
            self._optimize(old, settings, metrics)
        except ValueError:
            # torch's distributions refuse the NaN of a diverged network. If the policy can still be evaluated it has not
            # diverged, and the error was something else
            if math.isfinite(self._measure(old).mean().item()):
                raise
        return self._measure(old)

    def _measure(self, old: ActionDistribution | None) -> th.Tensor:
        try:
            return self._divergence_on_rollout(old)
        except ValueError:
            # The old policy passed this very sweep before the update, so it is the update that broke the policy
            return th.full((1,), math.nan)

    def _optimize(self, old: ActionDistribution | None, settings: Settings, metrics: UpdateMetrics) -> None:
        """``n_epochs`` passes of minibatch steps, or fewer if ``kl_stop_factor`` says so."""
        self.policy.set_training_mode(True)
        with self._stepping(settings) as step:
            for epoch in range(self.n_epochs):
                metrics.epochs.append([])
                self._n_updates += 1
                for rollout_data, index in minibatches(self.rollout_buffer, self.batch_size):
                    minibatch, grad_norm = step(rollout_data, None if old is None else old[index])
                    metrics.epochs[-1].append(minibatch)
                    if grad_norm is None:
                        self._say_stopped(minibatch, epoch)
                        return
                    metrics.grad_norms.append(grad_norm)

    @contextmanager
    def _stepping(self, settings: Settings) -> Iterator[Callable[..., tuple[th.Tensor, th.Tensor | None]]]:
        """Gives ``_step`` for one update: a function of a minibatch and the old policy's distributions of it."""
        parameters = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        optimizer = OptimizerStep(self.policy.optimizer, parameters)
        as_it_is = partial(self._step, settings=settings, optimizer=optimizer)
        compilation = self._compilation
        if compilation is None or compilation.failed:
            yield as_it_is
            return

        # What the compiler is to take for values that change, and not for constants, must be tensors
        tensors = settings.as_tensors(self.device)

        def compiled(rollout_data: Any, old: ActionDistribution | None) -> tuple[th.Tensor, th.Tensor | None]:
            rollout_data = rollout_data._replace(observations=preprocess(rollout_data.observations))
            if compilation.failed or optimizer.awaits_state:
                return as_it_is(rollout_data, old)
            try:
                if optimizer.whole is not None and self.kl_stop_factor is None:
                    return self._step_function(rollout_data, old, tensors, optimizer.whole)
                return self._step(rollout_data, old, tensors, optimizer, self._gradients_function)
            except NotCompiled:
                return as_it_is(rollout_data, old)

        with preprocessing_apart(self.policy) as preprocess, compilation.of_gradients():
            yield compiled

    def _step(
        self,
        rollout_data: Any,
        old: ActionDistribution | None,
        settings: Settings,
        optimizer: OptimizerStep | AdamStep,
        compiled_gradients: Callable[..., tuple[Gradients, th.Tensor, th.Tensor]] | None = None,
    ) -> tuple[th.Tensor, th.Tensor | None]:
        """
        One step on one minibatch, or none if its KL is too large already.

        :param compiled_gradients: ``_gradients``, where it is compiled and the rest is not
        :return: the metrics, stacked, and the norm of the gradient before it was clipped, None if no step was taken
        """
        gradients_of = compiled_gradients or self._gradients
        gradients, minibatch, grad_norm = gradients_of(rollout_data, old, settings, optimizer.parameters)
        if self._should_stop(minibatch, settings.target_kl):
            return minibatch, None
        optimizer.take(gradients)
        return minibatch, grad_norm

    def _gradients(
        self, rollout_data: Any, old: ActionDistribution | None, settings: Settings, parameters: Sequence[th.Tensor]
    ) -> tuple[Gradients, th.Tensor, th.Tensor]:
        """
        The gradients of the loss of one minibatch, clipped; its metrics, stacked; the norm before clipping.
        """
        loss, metrics = self._loss(rollout_data, old, settings)
        gradients, grad_norm = clip_gradients(th.autograd.grad(loss, parameters, allow_unused=True), settings.max_grad_norm)
        forget(getattr(self.policy, "action_dist", None))
        return gradients, metrics.stack(), grad_norm

    def _loss(
        self, rollout_data: Any, old: ActionDistribution | None, settings: Settings
    ) -> tuple[th.Tensor, MinibatchMetrics]:
        """
        The loss of one minibatch with its graph, and its parts for the log.

        :param old: the old policy's distributions of the valid transitions, None if they are not needed
        """
        new = self._evaluate(rollout_data)
        advantages = losses.normalize(new.advantages) if self.normalize_advantage else new.advantages
        log_ratio = new.log_prob - new.old_log_prob
        ratio = log_ratio.exp()
        kl = self._divergence.between(old, new).mean()

        policy_loss = losses.surrogate_loss(advantages, ratio, settings.clip_range)
        kl_loss = losses.penalty_loss(
            kl, settings.kl_coef, self.kl_cutoff_coef, cutoff=self.kl_cutoff_factor * settings.target_kl
        )
        value_loss = losses.value_loss(new.values, new.old_values, new.returns, settings.clip_range_vf)
        entropy_loss = losses.entropy_loss(new.entropy, new.log_prob)
        loss = policy_loss + kl_loss + settings.vf_coef * value_loss
        if settings.ent_coef is not None:
            loss = loss + settings.ent_coef * entropy_loss

        with th.no_grad():
            approx_kl = k3(log_ratio).mean()
            clip_fraction = losses.clip_fraction(ratio, settings.clip_range)
        return loss, MinibatchMetrics(loss, policy_loss, value_loss, entropy_loss, kl_loss, kl, approx_kl, clip_fraction)

    def _should_stop(self, minibatch: th.Tensor, target_kl: float) -> bool:
        return self.kl_stop_factor is not None and bool(MinibatchMetrics(*minibatch).kl > self.kl_stop_factor * target_kl)

    def _say_stopped(self, minibatch: th.Tensor, epoch: int) -> None:
        if self.verbose >= 1:
            print(f"Early stopping at step {epoch} due to reaching max kl: {MinibatchMetrics(*minibatch).kl.item():.2f}")

    # ---------------------------------------------------------------- after the update

    def _record(self, settings: Settings, mean_kl: float, max_kl: float) -> None:
        buffer = self.rollout_buffer
        self.logger.record("train/kl", mean_kl)
        self.logger.record("train/kl_max", max_kl)
        self.logger.record("train/kl_over_target", mean_kl / settings.target_kl)
        self.logger.record("train/kl_coef", settings.kl_coef)
        self.logger.record("train/undone_updates", self._undone_updates)
        self.logger.record("train/explained_variance", explained_variance(buffer.values.flatten(), buffer.returns.flatten()))
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", th.exp(self.policy.log_std).mean().item())
        if self._compilation is not None and (seconds := self._compilation.seconds_since_last_asked()) > 0:
            self.logger.record("time/compilation", seconds)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _adapt_penalty(self, kl: float, target_kl: float) -> None:
        """
        Move β for the next update; warn when it has been pushed against a bound for long.

        :param kl: d in nats, ``inf`` after an update that diverged
        :raises ValueError: if a user's rule returns NaN
        """
        rule = penalty_rule(self.kl_rule, self.kl_tolerance, self.kl_factor)
        low, high = kl_coef_limits(self.kl_coef_bounds, self.normalize_advantage)
        wanted = rule(self.kl_coef, kl, target_kl)
        if not isinstance(wanted, Real) or math.isnan(wanted):
            raise ValueError(
                f"kl_rule={rule!r} returned {wanted!r} for kl_coef={self.kl_coef}, kl={kl}, target_kl={target_kl}: "
                "it must return a number"
            )
        self.kl_coef = float(min(max(wanted, low), high))

        side = (wanted > high) - (wanted < low)
        same_side = side * self._rollouts_at_bound > 0
        self._rollouts_at_bound = self._rollouts_at_bound + side if same_side else side
        if abs(self._rollouts_at_bound) == PATIENCE_AT_BOUND:
            self._warn_at_bound(side > 0, kl, target_kl)

    def _warn_at_bound(self, above: bool, kl: float, target_kl: float) -> None:
        bound, remedy = "upper", "For a lower divergence lower learning_rate or n_epochs, or raise target_kl."
        if not above:
            bound, remedy = "lower", "For a higher divergence raise learning_rate or n_epochs, or lower target_kl."
            remedy += (
                " (Expected while a schedule takes learning_rate to 0. If the policy became deterministic, lower it instead.)"
            )
        warnings.warn(
            f"kl_coef has been at its {bound} bound {self.kl_coef:g} for {PATIENCE_AT_BOUND} rollouts in a row, and its rule "
            f"would move it further: the KL divergence is {kl:.2g}, target_kl {target_kl:.2g}. The coefficient alone cannot "
            f"correct this: the length of Adam's step does not depend on the scale of the loss. {remedy}",
            stacklevel=2,
        )

    def _warn_or_give_up(self, sound: bool) -> None:
        """
        :raises ValueError: if too many updates in a row were undone
        """
        self._undone_in_a_row = 0 if sound else self._undone_in_a_row + 1
        if self._undone_in_a_row == MAX_UNDONE_IN_A_ROW:
            self._undone_in_a_row = 0  # whoever catches this and lowers the learning rate begins anew
            learning_rate = self.policy.optimizer.param_groups[0]["lr"]
            raise ValueError(
                f"{MAX_UNDONE_IN_A_ROW} updates in a row diverged and were undone; the policy is the last sound one. "
                f"learning_rate={learning_rate:g} is too high, or rewards or observations are extreme or NaN: lower "
                "learning_rate by a factor of 10, wrap the environment in VecNormalize, or find the NaN with VecCheckNan"
            )
        if not sound:
            warnings.warn(
                f"The update at {self.num_timesteps} timesteps left a non-finite KL divergence or parameter and was undone. "
                f"The next one uses kl_coef={self.kl_coef:g}. If this goes on, lower learning_rate, or look for extreme "
                "or NaN observations and rewards.",
                stacklevel=2,
            )
