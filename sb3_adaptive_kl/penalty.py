"""
How the KL coefficient β moves from one rollout to the next, or within an update.

Schulman et al. 2017 (https://arxiv.org/abs/1707.06347), section 4, with d the KL divergence measured after the update::

    d < d_targ / 1.5  →  β ← β / 2
    d > d_targ · 1.5  →  β ← β · 2

A rule is a frozen value: plain numbers in, a plain number out. Its state, β itself, lives on the algorithm as ``kl_coef``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass


class PenaltyRule:
    """
    The base of all rules for β. A rule must be pure: with several processes, every rank calls it and must get the same number.

    A rule with ``segments`` above 1 also moves β during the update, after each of so many equal parts of it but the last.
    """

    segments: int = 1

    def __call__(self, kl_coef: float, kl: float, target_kl: float) -> float:
        """
        Return β for the next update; the algorithm clips it to ``kl_coef_bounds``.

        :param kl_coef: the last β used by the update that was just measured, > 0
        :param kl: d, the KL divergence in nats measured after that update on the whole rollout, before any step back, ≥ 0;
            ``inf`` when the update diverged and was undone. Never NaN.
        :param target_kl: d_targ in nats, > 0: where a schedule has ended at 0, the rule is not called
        :return: β for the next update
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__(kl_coef, kl, target_kl)")

    def within_update(self, kl_coef: float, kl: float, previous_kl: float, segments_left: int, target_kl: float) -> float:
        """
        Return β for the rest of the update, or until the next call; the algorithm clips it to ``kl_coef_bounds``.

        :param kl_coef: β in the segment that has just ended, > 0
        :param kl: mean KL in nats of the minibatches in the later half of that segment, beyond that of the update's first
            minibatch, ≥ 0, or ``inf``. Never NaN.
        :param previous_kl: the same of the segment before, 0 if none was measured before
        :param segments_left: how many of the segments are still to come, ≥ 1
        :param target_kl: d_targ in nats, > 0
        :return: β from here on
        """
        return kl_coef


@dataclass(frozen=True)
class AdaptivePenalty(PenaltyRule):
    """
    The rule of Schulman et al. 2017, section 4, with its four numbers free: ``low`` and ``high`` bound the dead band
    ``[low · target_kl, high · target_kl]``; below it β is multiplied by ``decrease``, above it by ``increase``.
    The defaults are the paper's.

    :param low: lower edge of the dead band, relative to the target, in (0, 1]
    :param high: upper edge of the dead band, relative to the target, ≥ 1
    :param decrease: factor of β below the band, in (0, 1)
    :param increase: factor of β above the band, > 1
    :raises ValueError: if a number is out of its range
    """

    # Section 4: "chosen heuristically, but the algorithm is not very sensitive to them"
    low: float = 1 / 1.5
    high: float = 1.5
    decrease: float = 1 / 2
    increase: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.low <= 1 <= self.high < math.inf:
            raise ValueError(
                f"low={self.low} and high={self.high} must satisfy 0 < low <= 1 <= high < inf: they bracket the target"
            )
        if not 0 < self.decrease < 1 < self.increase < math.inf:
            raise ValueError(
                f"decrease={self.decrease} and increase={self.increase} must satisfy 0 < decrease < 1 < increase < inf, "
                "otherwise β moves away from its equilibrium"
            )

    def __call__(self, kl_coef: float, kl: float, target_kl: float) -> float:
        if kl < self.low * target_kl:
            return kl_coef * self.decrease
        if kl > self.high * target_kl:
            return kl_coef * self.increase
        return kl_coef


@dataclass(frozen=True)
class ProportionalPenalty(PenaltyRule):
    """
    A proportional controller on the relative error, without a dead band::

        β ← β · (1 + gain · clip(d / d_targ − 1, −max_error, max_error))

    From Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593), section 2.2. Small steps instead of ×2 and /2: β does not
    oscillate, but needs some ln(2) / ln(1 + gain · max_error) ≈ 35 rollouts (at the defaults) to double.

    :param gain: K_β, > 0
    :param max_error: where the relative error is clipped, in (0, 1/gain) so that β stays positive
    :raises ValueError: if a number is out of its range
    """

    gain: float = 0.1
    max_error: float = 0.2

    def __post_init__(self) -> None:
        if not (self.gain > 0 and self.max_error > 0 and self.gain * self.max_error < 1):
            raise ValueError(
                f"gain={self.gain} and max_error={self.max_error} must be positive with gain * max_error < 1, "
                "otherwise β could become negative"
            )

    def __call__(self, kl_coef: float, kl: float, target_kl: float) -> float:
        error = min(max(kl / target_kl - 1, -self.max_error), self.max_error)
        return kl_coef * (1 + self.gain * error)


@dataclass(frozen=True)
class PredictivePenalty(PenaltyRule):
    """
    Moves β several times within an update, towards the KL predicted for its end.

    The update's minibatch steps are cut into ``segments`` equal parts. With k the mean minibatch KL in the later half of a
    segment, the KL in the later half of the last segment is extrapolated, and β moves by a bounded factor::

        d̂ = max(k + (k − k_before) · segments left,  floor · k)
        β ← β · clip(d̂ / d_targ, 1 / max_ratio, max_ratio) ^ gain

    After the last segment d̂ = d, the KL measured on the whole rollout. The minibatch KLs are those that the loss contains, so
    this costs no forward pass, and one synchronization with the device per segment. ``docs/theory.md`` explains why a rule
    that acts between updates alone cannot hold the target. The studies in ``docs/results.md`` used the defaults.

    :param segments: parts of an update, ≥ 1; fewer where an update has fewer steps. 1 acts between updates only.
    :param gain: share of the error, in log KL, that one move corrects in log β, in (0, 10]
    :param max_ratio: largest d̂ / d_targ, or inverse of it, that counts, in (1, 1000]
    :param floor: smallest d̂ / k, in (0, 1]: a KL that falls is not expected to go on falling
    :raises ValueError: if a number is out of its range; where a model is built, for ``segments``
    """

    segments: int = 10
    gain: float = 0.5
    max_ratio: float = math.e
    floor: float = 0.3

    def __post_init__(self) -> None:
        # The upper limits keep max_ratio ** gain finite
        if not (0 < self.gain <= 10 and 1 < self.max_ratio <= 1000):
            raise ValueError(
                f"gain={self.gain} must be in (0, 10] and max_ratio={self.max_ratio} in (1, 1000]: 0 and 1 would not move β"
            )
        if not 0 < self.floor <= 1:
            raise ValueError(
                f"floor={self.floor} must be in (0, 1]: it is the smallest predicted KL, relative to the current one"
            )

    def within_update(self, kl_coef: float, kl: float, previous_kl: float, segments_left: int, target_kl: float) -> float:
        predicted = math.inf  # inf − inf is NaN
        if math.isfinite(kl):
            predicted = max(kl + (kl - previous_kl) * segments_left, self.floor * kl)
        return self(kl_coef, predicted, target_kl)

    def __call__(self, kl_coef: float, kl: float, target_kl: float) -> float:
        ratio = min(max(kl / target_kl, 1 / self.max_ratio), self.max_ratio)
        return kl_coef * ratio**self.gain  # type: ignore[no-any-return]


@dataclass(frozen=True)
class FixedPenalty(PenaltyRule):
    """β does not move: the "fixed KL" baseline of Schulman et al. 2017, Table 1."""

    def __call__(self, kl_coef: float, kl: float, target_kl: float) -> float:
        return kl_coef


@dataclass(frozen=True)
class FunctionPenalty(PenaltyRule):
    """A user's function (kl_coef, kl, target_kl) → β for the next update, as a rule."""

    function: Callable[[float, float, float], float]

    def __call__(self, kl_coef: float, kl: float, target_kl: float) -> float:
        return self.function(kl_coef, kl, target_kl)


# The rules that ``kl_rule`` can name, and that the zoo's search tries
RULES: dict[str, Callable[..., PenaltyRule]] = {
    "adaptive": AdaptivePenalty,
    "fixed": FixedPenalty,
    "predictive": PredictivePenalty,
    "proportional": ProportionalPenalty,
}
