"""
What an update did, and all log keys under ``train/``: SB3's keys where they mean the same, so that curves overlay.

(``train/learning_rate`` is logged by SB3 itself, unless a rule moves it.)
"""

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import explained_variance

from sb3_adaptive_kl.distributed.ranks import gather
from sb3_adaptive_kl.objective import MinibatchMetrics, Settings


class UpdateMetrics:
    """Collects the minibatches of one update, epoch by epoch."""

    def __init__(self) -> None:
        self._epochs: list[list[th.Tensor]] = []  # of stacked MinibatchMetrics
        self._grad_norms: list[th.Tensor] = []

    @property
    def n_steps(self) -> int:
        """Number of optimizer steps taken so far."""
        return len(self._grad_norms)

    def start_epoch(self) -> None:
        """Start the next pass over the rollout."""
        self._epochs.append([])

    def add(self, minibatch: th.Tensor, grad_norm: th.Tensor | None) -> None:
        """
        Add a minibatch to the current epoch.

        :param minibatch: its stacked ``MinibatchMetrics``, before its step
        :param grad_norm: norm of its gradient before clipping, or ``None`` if no step was taken
        """
        self._epochs[-1].append(minibatch)
        if grad_norm is not None:
            self._grad_norms.append(grad_norm)

    def finite(self) -> bool:
        """
        Check that every step was taken along a finite gradient. A gradient of infinite norm is clipped to a step of length 0:
        the parameters would stay finite, and the same, forever.
        """
        return not self._grad_norms or bool(th.stack(self._grad_norms).isfinite().all())

    def kls(self, steps: slice) -> list[float]:
        """
        Read the KL of the first minibatch and of some others, each before its step. This synchronizes with the device once.

        :param steps: slice into the minibatches of all epochs
        :return: the KL of the first minibatch, and those of the slice, in nats
        """
        minibatches = [minibatch for epoch in self._epochs for minibatch in epoch]
        return th.stack([minibatches[0], *minibatches[steps]])[:, MinibatchMetrics._fields.index("kl")].tolist()

    def log(self, logger: Logger, settings: Settings) -> None:
        """
        Log the means over all minibatches; as in SB3's PPO ``approx_kl`` is of the last epoch, ``loss`` of the last minibatch.

        :param logger: the model's logger
        :param settings: the update's settings
        """
        epochs = [th.stack(epoch) for epoch in self._epochs if epoch]
        if not epochs:  # the first minibatch could not be evaluated, and the update was undone
            return
        means = MinibatchMetrics(*th.cat(epochs).mean(dim=0))
        last_epoch = MinibatchMetrics(*epochs[-1].mean(dim=0))
        last = MinibatchMetrics(*epochs[-1][-1])
        for name in ("entropy_loss", "policy_gradient_loss", "value_loss", "kl_loss"):
            logger.record(f"train/{name}", getattr(means, name).item())
        logger.record("train/approx_kl", last_epoch.approx_kl.item())
        logger.record("train/loss", last.loss.item())
        # Empty if the first minibatch already exceeded kl_stop_factor
        if self._grad_norms:
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
    Log how far the policy would have moved without its ceiling.

    :param logger: the model's logger
    :param raw_kl: d after the last minibatch step, before any step back, in nats
    :param scale: the share of the actor's step that was kept, 1 for all of it
    """
    logger.record("train/kl_raw", raw_kl)
    logger.record("train/step_scale", scale)


def log_learning_rate(logger: Logger, learning_rate: float, scale: float) -> None:
    """
    Log the learning rate where a rule moves it; SB3 has logged the schedule's value.

    :param logger: the model's logger
    :param learning_rate: the update's learning rate
    :param scale: its factor
    """
    logger.record("train/learning_rate", learning_rate)
    logger.record("train/learning_rate_scale", scale)


def log_progress(
    logger: Logger,
    buffer: RolloutBuffer,
    policy: ActorCriticPolicy,
    n_updates: int,
    undone_updates: int,
    seconds_compiling: float,
) -> None:
    """
    Log the state of training after an update. *Collective* where several processes train.

    :param logger: the model's logger
    :param buffer: the rollout, with its values and returns
    :param policy: the policy, with or without a ``log_std``
    :param n_updates: epochs so far, as SB3 counts them
    :param undone_updates: updates undone so far
    :param seconds_compiling: since the last update
    """
    logger.record("train/undone_updates", undone_updates)
    values, returns = (gather(th.from_numpy(part.flatten())).flatten().numpy() for part in (buffer.values, buffer.returns))
    logger.record("train/explained_variance", explained_variance(values, returns))
    if hasattr(policy, "log_std"):
        logger.record("train/std", th.exp(policy.log_std).mean().item())
    if seconds_compiling > 0:
        logger.record("time/compilation", seconds_compiling)
    logger.record("train/n_updates", n_updates, exclude="tensorboard")
