"""
What an update did, and all log keys under ``train/``: SB3's keys where they mean the same, so that curves overlay.

(``train/learning_rate`` is logged by SB3 itself, unless a rule moves it.)
"""

import math
from statistics import fmean
from typing import Any

import torch as th
from stable_baselines3.common.logger import Logger

from sb3_adaptive_kl.arguments import MIN_SCHEDULED_TARGET_KL
from sb3_adaptive_kl.objective import CUTOFF, MinibatchMetrics, Settings
from sb3_adaptive_kl.rollout.old_policy import RolloutKL

# Places in a stacked MinibatchMetrics
POLICY_GRADIENT_LOSS, KL_LOSS, KL = map(MinibatchMetrics._fields.index, ("policy_gradient_loss", "kl_loss", "kl"))


class UpdateMetrics:
    """Collects the minibatches of one update, epoch by epoch."""

    def __init__(self) -> None:
        self._minibatches: list[th.Tensor] = []  # stacked MinibatchMetrics
        self._grad_norms: list[th.Tensor] = []
        self._on_cpu: th.Tensor | None = None  # those of the minibatches that have been read
        self.start_of_epoch = 0  # of the last pass over the rollout, in minibatches

    @property
    def n_minibatches(self) -> int:
        """Number of minibatches so far."""
        return len(self._minibatches)

    def add(self, minibatch: th.Tensor, grad_norm: th.Tensor) -> None:
        """
        Add a minibatch to the last pass: its stacked ``MinibatchMetrics``, and the norm of its gradient before
        clipping.
        """
        self._minibatches.append(minibatch)
        self._grad_norms.append(grad_norm)

    def finite(self) -> bool:
        """Check that every gradient was finite."""
        # One of infinite norm is clipped to a step of length 0: the parameters would stay finite, and the same, forever
        return not self._grad_norms or bool(th.stack(self._grad_norms).isfinite().all())

    def clip_fraction(self) -> float:
        """Read the mean share of ratios that were clipped, 0 without a clip range."""
        return self._read()[:, -1].mean().item() if self._minibatches else 0.0

    def kl(self, minibatches: slice) -> float:
        """Read the mean KL of some minibatches, each before its step and beyond the KL at rest, in nats, for a rule."""
        at_rest = self.kl_at_rest()
        # Dropout or rounding can make it negative, and a diverged policy NaN: a rule raises β for inf
        kl = fmean(kl - at_rest for kl in self._read()[minibatches, KL].tolist())
        return math.inf if math.isnan(kl) else max(kl, 0.0)

    def kl_at_rest(self) -> float:
        """
        Read the KL of the first minibatch, before any step: the policy in training mode differs from the remembered one by
        dropout and batch normalization alone. 0 without a minibatch.
        """
        return self._read()[0, KL].item() if self._minibatches else 0.0

    def balance(self, settings: Settings, minibatches: slice | None = None) -> float:
        """
        Read the gain of the surrogate over twice the penalty, mean over minibatches, each before its step.

        :param settings: the update's settings
        :param minibatches: by default those of the first half: later, the gain is that on transitions which the policy has
            been fitted to
        :return: NaN without a minibatch after the first step, and where a reference policy is penalized: coming closer to it
            is worth a part of the KL, too
        """
        # The first one is measured before any step. The surrogate is 0 there, since advantages are normalized
        chosen = minibatches or slice(1, self.n_minibatches // 2 + 1)
        if not self._minibatches[chosen] or settings.reference_kl_coef is not None:
            return math.nan
        metrics = self._read()[chosen]
        sums = metrics.sum(dim=0).tolist()
        gain, penalty = -sums[POLICY_GRADIENT_LOSS], sums[KL_LOSS]
        if settings.kl_cutoff_coef is not None:
            # At the optimum, half the gain is KL times the penalty's slope: more than the penalty where that is not linear.
            # With e = KL − cutoff, KL · 2 c e instead of c e²
            beyond = metrics[:, KL].square() - (CUTOFF * settings.target_kl) ** 2
            penalty += settings.kl_cutoff_coef * beyond.clamp(min=0).sum().item()
        if sums[KL] > 0:  # no gain is owed for the KL at rest
            penalty *= 1 - self.kl_at_rest() * len(metrics) / sums[KL]
        return math.inf if penalty <= 0 else gain / (2 * penalty)

    def log(self, logger: Logger, settings: Settings) -> None:
        """
        Log the means over all minibatches; as in SB3's PPO ``approx_kl`` is of the last epoch, ``loss`` of the last minibatch.

        :param logger: the model's logger
        :param settings: the update's settings
        """
        if not self._minibatches:  # the first one could not be evaluated, and the update was undone
            return
        minibatches = self._read()
        means = MinibatchMetrics(*minibatches.mean(dim=0))
        last_epoch = MinibatchMetrics(*minibatches[self.start_of_epoch :].mean(dim=0))
        last = MinibatchMetrics(*minibatches[-1])
        # On the CPU since _read(): .item() of each would wait for a GPU
        for name in ("entropy_loss", "policy_gradient_loss", "value_loss", "kl_loss"):
            logger.record(f"train/{name}", getattr(means, name).item())
        logger.record("train/approx_kl", last_epoch.approx_kl.item())
        logger.record("train/loss", last.loss.item())
        logger.record("train/grad_norm", th.stack(self._grad_norms).mean().item())
        if settings.clip_range is not None:
            logger.record("train/clip_fraction", means.clip_fraction.item())
            logger.record("train/clip_range", settings.clip_range)
        if settings.clip_range_vf is not None:
            logger.record("train/clip_range_vf", settings.clip_range_vf)

    def _read(self) -> th.Tensor:
        """Read the metrics of all minibatches: one synchronization with the device for those that have not been read yet."""
        n_read = 0 if self._on_cpu is None else len(self._on_cpu)
        if n_read < len(self._minibatches):
            new = th.stack(self._minibatches[n_read:]).cpu()
            self._on_cpu = new if self._on_cpu is None else th.cat([self._on_cpu, new])
        assert self._on_cpu is not None
        return self._on_cpu


def log_update(model: Any, metrics: UpdateMetrics, settings: Settings, raw_kl: float, kl: RolloutKL) -> None:
    """
    Log an update, under the β that it used.

    :param model: the algorithm
    :param metrics: of the update's minibatches
    :param settings: the update's settings
    :param raw_kl: d in nats before any step back
    :param kl: what was measured in the end
    """
    record = model.logger.record
    metrics.log(model.logger, settings)
    record("train/kl", kl.mean)
    record("train/kl_max", kl.max)
    if settings.target_kl > MIN_SCHEDULED_TARGET_KL:  # which stands in for 0
        record("train/kl_over_target", kl.mean / settings.target_kl)
    record("train/kl_coef", model.kl_coef)
    if model.reference_policy is not None:
        record("train/reference_kl", kl.reference)
        record("train/reference_kl_coef", settings.reference_kl_coef or 0.0)
    if model.kl_ceiling is not None:
        record("train/kl_raw", raw_kl)
        record("train/step_scale", model.step_scale)
    if model.learning_rate_rule is not None:  # SB3 has logged the schedule's value
        record("train/learning_rate", model.policy.optimizer.param_groups[0]["lr"])
        record("train/learning_rate_scale", model.learning_rate_scale)
        record("train/balance", metrics.balance(settings))
    for name in ("ent_coef", "vf_coef"):
        if callable(getattr(model, name)):  # a constant is no news
            record(f"train/{name}", getattr(settings, name))
    record("train/undone_updates", model._undone_updates)
    record("train/explained_variance", model._explained_variance())
    if hasattr(model.policy, "log_std"):
        record("train/std", th.exp(model.policy.log_std).mean().item())
    record("train/n_updates", model._n_updates, exclude="tensorboard")
    if model._compiler is not None:
        model._compiler.log(model.logger)
