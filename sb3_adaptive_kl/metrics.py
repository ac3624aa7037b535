"""What an update did, and the log keys under which it is found: SB3's where they mean the same, so that curves overlay."""

from typing import NamedTuple

import torch as th
from stable_baselines3.common.logger import Logger


class Settings(NamedTuple):
    """What may change from one update to the next: by a schedule, the penalty rule, or a callback that anneals it."""

    target_kl: float
    kl_coef: float
    clip_range: float | None
    clip_range_vf: float | None
    vf_coef: float
    ent_coef: float | None  # None where it is 0: a gradient of 0 need not be computed
    max_grad_norm: float

    def as_tensors(self, device: th.device) -> "Settings":
        """The same numbers as scalar tensors, with which one can calculate alike."""
        return Settings(*[None if number is None else th.tensor(number, device=device) for number in self])  # type: ignore[arg-type]


class MinibatchMetrics(NamedTuple):
    """Of one minibatch, before its step: scalars, left on their device so that nothing waits for them."""

    loss: th.Tensor
    policy_gradient_loss: th.Tensor
    value_loss: th.Tensor
    entropy_loss: th.Tensor
    kl_loss: th.Tensor
    kl: th.Tensor
    approx_kl: th.Tensor
    clip_fraction: th.Tensor | None = None

    def stack(self) -> th.Tensor:
        """The same numbers as one vector, without the graph, which would otherwise live until they are logged."""
        with th.no_grad():
            return th.stack([part for part in self if part is not None])


class UpdateMetrics:
    """Collects the minibatches of one update, epoch by epoch."""

    def __init__(self) -> None:
        self.epochs: list[list[th.Tensor]] = []  # of stacked MinibatchMetrics
        self.grad_norms: list[th.Tensor] = []

    def finite(self) -> bool:
        """
        Whether every step was taken along a finite gradient. An infinite norm is clipped to a step of 0: the parameters would
        stay finite, and the same, for ever.
        """
        return not self.grad_norms or bool(th.stack(self.grad_norms).isfinite().all())

    def record(self, logger: Logger, settings: Settings) -> None:
        """Write the means over all minibatches; ``approx_kl`` over those of the last epoch only, and ``loss`` of the last
        one, as SB3's PPO does."""
        epochs = [th.stack(epoch) for epoch in self.epochs if epoch]
        means = MinibatchMetrics(*th.cat(epochs).mean(dim=0))
        last_epoch = MinibatchMetrics(*epochs[-1].mean(dim=0))
        last = MinibatchMetrics(*epochs[-1][-1])
        for name in ("entropy_loss", "policy_gradient_loss", "value_loss", "kl_loss"):
            logger.record(f"train/{name}", getattr(means, name).item())
        logger.record("train/approx_kl", last_epoch.approx_kl.item())
        logger.record("train/loss", last.loss.item())
        # Empty if the first minibatch already exceeded kl_stop_factor
        if self.grad_norms:
            logger.record("train/grad_norm", th.stack(self.grad_norms).mean().item())
        if means.clip_fraction is not None:
            logger.record("train/clip_fraction", means.clip_fraction.item())
            logger.record("train/clip_range", settings.clip_range)
        if settings.clip_range_vf is not None:
            logger.record("train/clip_range_vf", settings.clip_range_vf)
