"""
A learning rate that follows the KL divergence, or what the KL divergence buys.

Schulman et al. 2017 (https://arxiv.org/abs/1707.06347), Table 4, adapts Adam's step size to the KL of the updates. rsl_rl,
rl_games, skrl and brax do it by a factor of 1.5, and most of them after every minibatch. But the KL is 0 at the beginning of
every update, which would raise the learning rate there each time. Here the KL of the whole update counts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real


class LearningRateRule:
    """
    The base of all rules for the learning rate. A rule must be pure: with several processes, every rank calls it and must get
    the same number. The factor is kept between ``lowest`` and ``highest``.
    """

    lowest: float = 0.0
    highest: float = math.inf

    def __call__(self, scale: float, kl: float, target_kl: float, balance: float) -> float:
        """
        Return the factor of the learning rate for the next update.

        :param scale: the last factor used by the update that was just measured, > 0
        :param kl: d in nats as measured after that update on the whole rollout, before any step back, ≥ 0; ``inf`` when the
            update was undone. Never NaN.
        :param target_kl: d_targ in nats, > 0: where a schedule has ended at 0, the rule is not called
        :param balance: the gain of the surrogate over twice the penalty, in the first half of the update: 1 at the optimum of
            the penalized objective, above it before the optimum is reached, below it where a part of the KL is noise, negative
            where the surrogate was lost; ``inf`` without a penalty, NaN where an update has one minibatch or penalizes the KL
            to a reference policy
        :return: factor of ``learning_rate``, > 0
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__(scale, kl, target_kl, balance)")

    def within_update(self, scale: float, kl: float, target_kl: float, balance: float) -> float:
        """
        Return the factor for the rest of the update. It is asked where a rule for β adapts it within the update.

        :param scale: the factor so far, > 0
        :param kl: mean KL in nats of the minibatches that β was adapted to, each before its step and
            beyond that of the update's first minibatch, ≥ 0, or ``inf``. Never NaN.
        :param target_kl: d_targ in nats, > 0
        :param balance: of the same minibatches
        :return: factor of ``learning_rate``, > 0
        """
        return scale


@dataclass(frozen=True)
class AdaptiveLearningRate(LearningRateRule):
    """
    Divide the learning rate by ``factor`` above ``high · target_kl``, multiply it below ``low · target_kl``.

    The defaults are those of rsl_rl and Isaac Lab: 1.5 outside [target / 2, 2 · target]; their learning rate of 1e-3 stays
    within 1e-5 and 1e-2.

    :param factor: by how much the learning rate is divided or multiplied, > 1
    :param low: lower edge of the dead band, relative to the target, in (0, 1]
    :param high: upper edge of the dead band, relative to the target, ≥ 1
    :param lowest: smallest scale, in (0, 1]
    :param highest: largest scale, ≥ 1
    :raises ValueError: if a number is out of its range
    """

    factor: float = 1.5
    low: float = 0.5
    high: float = 2.0
    lowest: float = 0.01
    highest: float = 10.0

    def __post_init__(self) -> None:
        if not 1 < self.factor < math.inf:
            raise ValueError(f"factor={self.factor} must be above 1, otherwise the learning rate does not move")
        if not 0 < self.low <= 1 <= self.high < math.inf:
            raise ValueError(
                f"low={self.low} and high={self.high} must satisfy 0 < low <= 1 <= high < inf: they bracket the target"
            )
        check_scales(self.lowest, self.highest)

    def __call__(self, scale: float, kl: float, target_kl: float, balance: float) -> float:
        # By the KL alone: an undone update, whose KL is inf, lowers the learning rate as well
        if kl > self.high * target_kl:
            return scale / self.factor
        return scale * self.factor if kl < self.low * target_kl else scale


@dataclass(frozen=True)
class BalancedLearningRate(LearningRateRule):
    """
    A second actuator, next to a rule for β: keep the surrogate's gain in balance with the penalty.

    Near the old policy, the penalized objective is g·Δ − β/2 Δ·FΔ. At its optimum, the gain g·Δ is twice the penalty. Where
    the gain is smaller, the KL was spent on noise: the learning rate is too high, and β only pulls the policy to and fro.
    Where it is much larger, the steps were too short to get there. Both are ratios, so the range depends neither on the
    target nor on the task. pat-coady's trpo (https://github.com/pat-coady/trpo) moves both actuators, too, by β alone.

    :param low: below this balance, the learning rate is divided by ``decrease`` if the KL has reached the lower edge of the
        paper's band, target / 1.5; so it is after an update that was undone. > 0
    :param high: above this balance, it is multiplied by ``increase``; so it is below ``-high`` if the KL is below that edge:
        the balance of a small KL can have either sign. > low
    :param decrease: > 1
    :param increase: > 1
    :param decrease_within: by how much it is divided during an update, at each segment whose balance is below half of ``low``
        and whose KL has reached that edge: the first updates are not lost to a learning rate that is far too high, ≥ 1
    :param lowest: smallest scale, in (0, 1]
    :param highest: largest scale, ≥ 1
    :raises ValueError: if a number is out of its range
    """

    low: float = 1.0
    high: float = 3.0
    decrease: float = 1.5
    increase: float = 1.3
    decrease_within: float = 1.15
    lowest: float = 1e-3
    highest: float = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < math.inf:
            raise ValueError(
                f"low={self.low} and high={self.high} must satisfy 0 < low < high < inf: they bracket the balance"
            )
        if not (1 < self.increase < math.inf and 1 < self.decrease < math.inf and 1 <= self.decrease_within < math.inf):
            raise ValueError(
                f"increase={self.increase} and decrease={self.decrease} must be above 1, and decrease_within="
                f"{self.decrease_within} at least 1, otherwise the learning rate moves away from its equilibrium"
            )
        check_scales(self.lowest, self.highest)

    def __call__(self, scale: float, kl: float, target_kl: float, balance: float) -> float:
        # Below the band, no step is too long, whatever it was spent on
        if kl > target_kl / 1.5 and (balance < self.low or kl == math.inf):
            return scale / self.decrease
        return scale * self.increase if abs(balance) > self.high else scale

    def within_update(self, scale: float, kl: float, target_kl: float, balance: float) -> float:
        # It never rises here: early in an update the KL is small because few steps were taken, not because they are short
        return scale / self.decrease_within if kl > target_kl / 1.5 and balance < self.low / 2 else scale


@dataclass(frozen=True)
class FunctionLearningRate(LearningRateRule):
    """A user's function (scale, kl, target_kl, balance) → factor for the next update, as a rule."""

    function: Callable[[float, float, float, float], float]

    def __call__(self, scale: float, kl: float, target_kl: float, balance: float) -> float:
        return self.function(scale, kl, target_kl, balance)


def check_scales(lowest: float, highest: float) -> None:
    """Raise ValueError unless the limits of the scale bracket the user's learning rate."""
    if not 0 < lowest <= 1 <= highest < math.inf:
        raise ValueError(
            f"lowest={lowest} and highest={highest} must satisfy 0 < lowest <= 1 <= highest < inf: they bracket the user's "
            "learning rate"
        )


# The rules that ``learning_rate_rule`` can name
LEARNING_RATE_RULES: dict[str, Callable[..., LearningRateRule]] = {
    "adaptive": AdaptiveLearningRate,
    "balanced": BalancedLearningRate,
}


def limited(rule: LearningRateRule, wanted: float, kl: float) -> tuple[float, int]:
    """
    Keep what a rule returned within its limits.

    :param rule: the rule
    :param wanted: the factor that it, or its ``within_update``, returned
    :param kl: the KL that it was called with, for the error
    :return: the factor, > 0, and the limit that stopped the rule: 1 the highest, −1 the lowest, 0 neither
    :raises ValueError: if it is not a positive, finite number
    """
    # A factor of 0 could never grow again
    if not isinstance(wanted, Real) or not 0 < wanted < math.inf:
        raise ValueError(
            f"learning_rate_rule={rule!r} returned {wanted!r} for kl={kl}: it must return a positive number, also for inf, "
            "which stands for an undone update"
        )
    return float(min(max(wanted, rule.lowest), rule.highest)), (wanted > rule.highest) - (wanted < rule.lowest)
