"""
Applies the rule for β after an update: within bounds, with a warning where a bound has stopped it for long.

The rules themselves are in ``penalty.py``.
"""

import math
import warnings
from numbers import Real

from sb3_adaptive_kl.penalty import PenaltyRule

# Warn after this many rollouts in a row at which the rule pushed β against the same bound
PATIENCE_AT_BOUND = 10


def next_kl_coef(
    rule: PenaltyRule, kl_coef: float, kl: float, target_kl: float, bounds: tuple[float, float]
) -> tuple[float, int]:
    """
    Apply a rule, and keep its result within the bounds.

    :param rule: the rule
    :param kl_coef: β used by the update that was just measured, > 0
    :param kl: d of that update in nats, ``inf`` if it was undone
    :param target_kl: d_targ in nats, > 0
    :param bounds: lowest and highest β
    :return: β for the next update, and the bound that stopped the rule: 1 the upper, −1 the lower, 0 neither
    :raises ValueError: if the rule returned NaN, or something that is not a number
    """
    low, high = bounds
    wanted = rule(kl_coef, kl, target_kl)
    if not isinstance(wanted, Real) or math.isnan(wanted):
        raise ValueError(
            f"kl_rule={rule!r} returned {wanted!r} for kl_coef={kl_coef}, kl={kl}, target_kl={target_kl}: "
            "it must return a number"
        )
    return float(min(max(wanted, low), high)), (wanted > high) - (wanted < low)


def rollouts_at_bound(count: int, side: int) -> int:
    """
    Count the rollouts in a row at which the same bound stopped the rule.

    :param count: so far; negative at the lower bound
    :param side: the bound that stopped it now, as ``next_kl_coef`` returns it
    :return: the new count
    """
    return count + side if side * count > 0 else side


def warn_at_bound(count: int, kl_coef: float, kl: float, target_kl: float) -> None:
    """
    Warn once when a bound has stopped the rule ``PATIENCE_AT_BOUND`` times in a row.

    :param count: as ``rollouts_at_bound`` returns it
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
            " (Expected while a schedule takes learning_rate to 0. If the policy became deterministic, lower it instead.)"
        )
    warnings.warn(
        f"kl_coef has been at its {bound} bound {kl_coef:g} for {PATIENCE_AT_BOUND} rollouts in a row, and its rule "
        f"would move it further: the KL divergence is {kl:.2g}, target_kl {target_kl:.2g}. The coefficient alone cannot "
        f"correct this: the length of Adam's step does not depend on the scale of the loss. {remedy}",
        stacklevel=2,
    )
