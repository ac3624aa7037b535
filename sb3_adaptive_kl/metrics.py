"""
What an update did, and all log keys under ``train/``: SB3's keys where they mean the same, so that curves overlay.

(``train/learning_rate`` is logged by SB3 itself, unless a rule moves it.)
"""

import torch as th
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_adaptive_kl.objective import MinibatchMetrics, Settings


class UpdateMetrics:
    """Collects the minibatches of one update, epoch by epoch."""

    def __init__(self) -> None:
        self._minibatches: list[th.Tensor] = []  # stacked MinibatchMetrics
        self._grad_norms: list[th.Tensor] = []
        self._start_of_epoch = 0

    @property
    def n_minibatches(self) -> int:
        """Number of minibatches so far."""
        return len(self._minibatches)

    def start_epoch(self) -> None:
        """Start the next pass over the rollout."""
        self._start_of_epoch = len(self._minibatches)

    def add(self, minibatch: th.Tensor, grad_norm: th.Tensor) -> None:
        """
        Add a minibatch to the current epoch: its stacked ``MinibatchMetrics``, and the norm of its gradient before
        clipping.
        """
        self._minibatches.append(minibatch)
        self._grad_norms.append(grad_norm)

    def finite(self) -> bool:
        """Check that every gradient was finite."""
        # One of infinite norm is clipped to a step of length 0: the parameters would stay finite, and the same, forever
        return not self._grad_norms or bool(th.stack(self._grad_norms).isfinite().all())

    def kls(self, minibatches: slice) -> list[float]:
        """Read the KL of some minibatches of the update, each before its step and beyond the KL at rest, in nats."""
        # One synchronization with the device
        # At rest, before the first step, the policy in training mode differs from the remembered one by dropout and batch
        # normalization alone
        kl = MinibatchMetrics._fields.index("kl")
        at_rest, *others = th.stack([self._minibatches[0], *self._minibatches[minibatches]])[:, kl].tolist()
        return [other - at_rest for other in others]

    def log(self, logger: Logger, settings: Settings) -> None:
        """
        Log the means over all minibatches; as in SB3's PPO ``approx_kl`` is of the last epoch, ``loss`` of the last minibatch.

        :param logger: the model's logger
        :param settings: the update's settings
        """
        if not self._minibatches:  # the first one could not be evaluated, and the update was undone
            return
        minibatches = th.stack(self._minibatches)
        means = MinibatchMetrics(*minibatches.mean(dim=0))
        last_epoch = MinibatchMetrics(*minibatches[self._start_of_epoch :].mean(dim=0))
        last = MinibatchMetrics(*minibatches[-1])
        for name in ("entropy_loss", "policy_gradient_loss", "value_loss", "kl_loss"):
            logger.record(f"train/{name}", getattr(means, name).item())
        logger.record("train/approx_kl", last_epoch.approx_kl.item())
        logger.record("train/loss", last.loss.item())
        logger.record("train/grad_norm", th.stack(self._grad_norms).mean().item())
        if means.clip_fraction is not None:
            logger.record("train/clip_fraction", means.clip_fraction.item())
            logger.record("train/clip_range", settings.clip_range)
        if settings.clip_range_vf is not None:
            logger.record("train/clip_range_vf", settings.clip_range_vf)


def log_penalty(logger: Logger, kl_coef: float, target_kl: float, mean_kl: float, max_kl: float) -> None:
    """
    Log how far the policy moved, against its target and under which β.

    :param logger: the model's logger
    :param kl_coef: the last β that the update used
    :param target_kl: d_targ in nats
    :param mean_kl: d, mean over the rollout, in nats
    :param max_kl: the largest divergence at a single state, in nats
    """
    logger.record("train/kl", mean_kl)
    logger.record("train/kl_max", max_kl)
    logger.record("train/kl_over_target", mean_kl / target_kl)
    logger.record("train/kl_coef", kl_coef)


def log_step_back(logger: Logger, raw_kl: float, scale: float) -> None:
    """
    Log how far the policy would have moved without its ceiling, in nats, and the share of the actor's step that was kept.
    """
    logger.record("train/kl_raw", raw_kl)
    logger.record("train/step_scale", scale)


def log_learning_rate(logger: Logger, learning_rate: float, scale: float) -> None:
    """Log the learning rate where a rule moves it; SB3 has logged the schedule's value."""
    logger.record("train/learning_rate", learning_rate)
    logger.record("train/learning_rate_scale", scale)


def log_progress(
    logger: Logger, policy: ActorCriticPolicy, explained_variance: float, n_updates: int, undone_updates: int
) -> None:
    """
    Log the state of training after an update.

    :param logger: the model's logger
    :param policy: the policy, with or without a ``log_std``
    :param explained_variance: of the returns by the values that the critic gave when it collected
    :param n_updates: epochs so far, as SB3 counts them
    :param undone_updates: updates undone so far
    """
    logger.record("train/undone_updates", undone_updates)
    logger.record("train/explained_variance", explained_variance)
    if hasattr(policy, "log_std"):
        logger.record("train/std", th.exp(policy.log_std).mean().item())
    logger.record("train/n_updates", n_updates, exclude="tensorboard")
