"""
What the arguments of the KL penalty mean, and a ``ValueError`` that names the remedy where they mean nothing.

``load()`` of SB3 writes attributes past the constructor, so all of this is called from ``_setup_model()``, which runs after
both. Arguments stay on the algorithm as the user gave them; these functions interpret them.
"""

import math
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

from stable_baselines3.common.type_aliases import Schedule

from sb3_adaptive_kl.penalty import AdaptivePenalty, FixedPenalty, PenaltyRule, ProportionalPenalty, default_bounds

KL_RULES = ("adaptive", "fixed", "proportional")
KL_DIVERGENCES = ("forward", "reverse", "k3", "pearson")

# A schedule may end at 0 (a linear decay does): "do not move at all" is the limit, but a rule divides by its target
MIN_SCHEDULED_TARGET_KL = 1e-12


def target_kl_at(target_kl: float | Schedule, progress_remaining: float) -> float:
    """
    d_targ for this update.

    :param target_kl: a number, or a function of the remaining progress
    :param progress_remaining: from 1 (beginning) to 0 (end)
    :return: in nats, > 0
    :raises ValueError: if a schedule returns a negative or non-finite number
    """
    if not callable(target_kl):
        return float(target_kl)
    value = float(target_kl(progress_remaining))
    if not 0 <= value < math.inf:
        raise ValueError(
            f"target_kl: the schedule returned {value} at progress_remaining={progress_remaining}, "
            "but a KL divergence to aim for is finite and not negative: check the schedule over [0, 1]"
        )
    return max(value, MIN_SCHEDULED_TARGET_KL)


def penalty_rule(kl_rule: str | PenaltyRule, kl_tolerance: float, kl_factor: float) -> PenaltyRule:
    """
    The rule that ``kl_rule`` names, or is.

    :param kl_rule: one of ``KL_RULES``, or any ``PenaltyRule``
    :param kl_tolerance: for ``"adaptive"``: the dead band is [target / tolerance, tolerance · target], ≥ 1
    :param kl_factor: for ``"adaptive"``: what β is multiplied or divided by, > 1
    :raises ValueError: if there is no such rule
    """
    if isinstance(kl_rule, str):
        check_choice("kl_rule", kl_rule, KL_RULES, " or a PenaltyRule: f(kl_coef, kl, target_kl) -> kl_coef")
        if kl_rule == "adaptive":
            return AdaptivePenalty.symmetric(kl_tolerance, kl_factor)
        return FixedPenalty() if kl_rule == "fixed" else ProportionalPenalty()
    if not callable(kl_rule):
        raise ValueError(f"kl_rule={kl_rule!r} cannot be called: pass one of {KL_RULES}, or a function (kl_coef, kl, target_kl)")
    return kl_rule


def kl_coef_limits(kl_coef_bounds: tuple[float, float] | None, normalize_advantage: bool) -> tuple[float, float]:
    """
    Lowest and highest β.

    :param kl_coef_bounds: the user's, or None for ``default_bounds``
    :param normalize_advantage: whether advantages are normalised
    :raises ValueError: if they are not two positive, finite numbers in order
    """
    if kl_coef_bounds is None:
        return default_bounds(normalize_advantage)
    pair = tuple(kl_coef_bounds) if isinstance(kl_coef_bounds, Iterable) else ()
    if len(pair) != 2 or not all(_is_number(bound) for bound in pair) or not 0 < pair[0] <= pair[1] < math.inf:
        raise ValueError(
            f"kl_coef_bounds={kl_coef_bounds!r} must be two finite numbers (low, high) with 0 < low <= high: "
            "a β of 0 could never grow again, an infinite one gives a NaN loss"
        )
    return float(pair[0]), float(pair[1])


def check_number(name: str, value: Any, condition: Callable[[float], bool], requirement: str, remedy: str) -> None:
    """
    :raises ValueError: if ``value`` is not a finite number that satisfies ``condition``
    """
    if not _is_number(value) or not condition(value):
        raise ValueError(f"{name}={value!r} must be {requirement}: {remedy}")


def check_schedule(name: str, value: Any, remedy: str) -> None:
    """
    :raises ValueError: if ``value`` is neither a positive number nor a function of the remaining progress. What a function
        returns is not looked at here: rl-zoo3 replaces schedules by constant zeros to replay an agent.
    """
    if not callable(value):
        check_number(name, value, lambda number: number > 0, "a positive number or a schedule (a function of progress)", remedy)


def check_choice(name: str, value: Any, choices: tuple[str, ...], alternative: str = "") -> None:
    """
    :raises ValueError: if ``value`` is none of the ``choices``, with the one that was probably meant
    """
    if value not in choices:
        nearest = get_close_matches(str(value).lower(), choices, n=1, cutoff=0.0)[0]
        raise ValueError(f"{name}={value!r} is unknown, did you mean {nearest!r}? Valid: {', '.join(map(repr, choices))}{alternative}")


def check_minibatches(batch_size: int | None, n_epochs: int, n_transitions: int | None, normalize_advantage: bool) -> None:
    """
    :param batch_size: transitions per minibatch, None for the whole rollout
    :param n_transitions: n_steps · n_envs, None before the environment is known
    :raises ValueError: if there is nothing to train on, or a single advantage to normalise
    """
    sizes = [n_epochs] if batch_size is None else [n_epochs, batch_size]
    if not all(isinstance(size, Integral) and size >= 1 for size in sizes):
        raise ValueError(
            f"batch_size={batch_size!r} and n_epochs={n_epochs!r} must be whole numbers of at least 1: "
            "the loss of an empty minibatch is NaN"
        )
    if normalize_advantage and (batch_size == 1 or n_transitions == 1):
        raise ValueError(
            f"batch_size={batch_size} with {n_transitions or 'n_steps * n_envs'} transitions per rollout leaves a single "
            "advantage, which has no standard deviation: use at least 2 of each, or normalize_advantage=False"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
