"""
Apply the rule for β within its bounds, after an update or during it, and warn if β, or the learning rate, stays at a bound.

The rules themselves are in ``penalty.py``, those for the learning rate in ``learning_rate.py``.
"""

import math
from numbers import Real

from sb3_adaptive_kl.messages import warn_user
from sb3_adaptive_kl.penalty import PenaltyRule

# Warn after this many rollouts in a row at which the rule pushed β against the same bound
PATIENCE_AT_BOUND = 10


def apply_rule(
    rule: PenaltyRule, kl_coef: float, kl: float, target_kl: float, bounds: tuple[float, float]
) -> tuple[float, int]:
    """
    Apply a rule after an update, and keep its result within the bounds.

    :param rule: the rule
    :param kl_coef: β used by the update that was just measured, > 0
    :param kl: d of that update in nats, ``inf`` if it was undone
    :param target_kl: d_targ in nats, > 0
    :param bounds: lowest and highest β
    :return: β for the next update, and the bound that stopped the rule: 1 the upper, −1 the lower, 0 neither
    :raises ValueError: if the rule returned NaN, or something that is not a number
    """
    low, high = bounds
    wanted = _checked(rule(kl_coef, kl, target_kl), repr(rule), kl_coef, kl, target_kl)
    return min(max(wanted, low), high), (wanted > high) - (wanted < low)


class SegmentedControl:
    """
    Applies a rule while an update runs, after each of its segments but the last.

    :param rule: with one segment or several
    :param n_steps: minibatch steps that the update will take, ≥ 1
    :param bounds: lowest and highest β
    """

    def __init__(self, rule: PenaltyRule, n_steps: int, bounds: tuple[float, float]) -> None:
        self._rule = rule
        self._bounds = bounds
        self._previous_kl = 0.0
        n_segments = min(rule.segments, n_steps)
        # How many steps have been taken when each segment ends
        self._ends = [round(n_steps * segment / n_segments) for segment in range(1, n_segments + 1)]
        self._segment = 0

    def end_segment(self, n_taken: int) -> slice | None:
        """
        End the current segment once its steps are taken, and return the steps of the update whose KL measures it.

        :param n_taken: steps taken so far in this update
        :return: the later half of the segment, or ``None`` if it has not ended, was the last, or was the first step alone
        """
        if self._segment == len(self._ends) - 1 or n_taken < self._ends[self._segment]:
            return None
        start = self._ends[self._segment - 1] if self._segment else 0
        self._segment += 1
        # The first minibatch is measured before any step: its KL of 0, or of a rounding error, says nothing about β
        first = max((start + n_taken) // 2, 1)
        return slice(first, n_taken) if first < n_taken else None

    def adapt(self, kl_coef: float, kl: float, target_kl: float) -> float:
        """
        Apply the rule at the end of a segment.

        :param kl_coef: β in that segment
        :param kl: mean KL of the minibatches that ``end_segment`` named, each before its step and beyond the KL at rest, in
            nats, ≥ 0
        :param target_kl: d_targ in nats, > 0
        :return: β from here on
        :raises ValueError: if the rule returned NaN, or something that is not a number
        """
        low, high = self._bounds
        segments_left = len(self._ends) - self._segment
        wanted = self._rule.within_update(kl_coef, kl, self._previous_kl, segments_left, target_kl)
        self._previous_kl = kl
        return min(max(_checked(wanted, f"{self._rule!r}.within_update", kl_coef, kl, target_kl), low), high)


def count_at_bound(count: int, side: int) -> int:
    """Count the rollouts in a row at which the same bound stopped the rule; negative at the lower bound."""
    return count + side if side * count > 0 else side


def warn_at_bound(count: int, kl_coef: float, kl: float, target_kl: float) -> None:
    """
    Warn once when a bound has stopped the rule ``PATIENCE_AT_BOUND`` times in a row.

    :param count: as ``count_at_bound`` returns it
    :param kl_coef: β, at the bound
    :param kl: d of the last update in nats
    :param target_kl: d_targ in nats
    """
    if abs(count) != PATIENCE_AT_BOUND:
        return
    bound, remedy = "upper", "For a lower divergence lower learning_rate or n_epochs, or raise target_kl."
    if count < 0:
        bound, remedy = "lower", "For a higher divergence raise learning_rate or n_epochs, or lower target_kl."
        remedy += (
            " (Expected while a schedule takes learning_rate to 0. If the policy became deterministic, lower learning_rate "
            "instead.)"
        )
    warn_user(
        f"kl_coef has been at its {bound} bound {kl_coef:g} for {PATIENCE_AT_BOUND} rollouts in a row, and its rule "
        f"would move it further: the KL divergence is {kl:.2g}, target_kl {target_kl:.2g}. The coefficient alone cannot "
        f"correct this: the length of Adam's step does not depend on the scale of the loss. {remedy}"
    )


def warn_at_limit(count: int, scale: float, learning_rate: float) -> None:
    """
    Warn once when a limit of the factor has stopped the rule ``PATIENCE_AT_BOUND`` times in a row.

    :param count: as ``count_at_bound`` returns it
    :param scale: the factor, at its limit
    :param learning_rate: the user's, times the factor
    """
    if abs(count) == PATIENCE_AT_BOUND:
        limit, note = ("highest", " (Expected while a schedule takes learning_rate to 0.)") if count > 0 else ("lowest", "")
        warn_user(
            f"learning_rate_scale has been at its {limit} value {scale:g} for {PATIENCE_AT_BOUND} rollouts in a row, and its "
            f"rule would move it further. Start from where it is, learning_rate={learning_rate:.2g}.{note}"
        )


def _checked(wanted: float, source: str, kl_coef: float, kl: float, target_kl: float) -> float:
    if not isinstance(wanted, Real) or math.isnan(wanted):
        raise ValueError(
            f"kl_rule={source} returned {wanted!r} for kl_coef={kl_coef}, kl={kl}, target_kl={target_kl}: "
            "it must return a number"
        )
    return float(wanted)  # a rule may return a NumPy scalar
