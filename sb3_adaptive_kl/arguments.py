"""
Validate and interpret the arguments of the KL penalty. A ``ValueError`` names the argument, its value and the remedy.

SB3's ``load()`` writes attributes past the constructor, so arguments are checked in ``_setup_model()``, which runs after both.
They stay on the algorithm as the user gave them; these functions interpret them.
"""

import math
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

from stable_baselines3.common.type_aliases import Schedule

from sb3_adaptive_kl.clip_range import outlier_clip_range
from sb3_adaptive_kl.divergences import DIVERGENCES
from sb3_adaptive_kl.learning_rate import LEARNING_RATE_RULES, AdaptiveLearningRate, LearningRateRule
from sb3_adaptive_kl.objective import Settings
from sb3_adaptive_kl.penalty import (
    RULES,
    AdaptivePenalty,
    FixedPenalty,
    PenaltyRule,
    PredictivePenalty,
    ProportionalPenalty,
    default_bounds,
)

# A schedule may end at 0 (a linear decay does). "Do not move at all" is then meant, but a rule may divide by its target:
# this stands for 0, far below any divergence that float32 can tell from it
MIN_SCHEDULED_TARGET_KL = 1e-12
# Rules for β, which would move a learning rate the wrong way
PENALTIES = (AdaptivePenalty, FixedPenalty, PredictivePenalty, ProportionalPenalty)
# The clip range that follows the target
OUTLIERS = "outliers"


def settings_at(model: Any, progress_remaining: float) -> Settings:
    """
    Read the settings of one update off the algorithm.

    :param model: the algorithm; callbacks may have replaced a schedule by a number
    :param progress_remaining: from 1 (beginning) to 0 (end)
    :return: the settings
    :raises ValueError: if a schedule returns an invalid target or clip range
    """

    def at_progress(name: str) -> float | None:
        schedule = getattr(model, name)
        return None if schedule is None else _value_at(name, schedule, progress_remaining)

    target_kl = target_kl_at(model.target_kl, progress_remaining)
    return Settings(
        target_kl=target_kl,
        kl_coef=model.kl_coef,
        clip_range=outlier_clip_range(target_kl) if model.clip_range == OUTLIERS else at_progress("clip_range"),
        clip_range_vf=at_progress("clip_range_vf"),
        vf_coef=model.vf_coef,
        ent_coef=model.ent_coef or None,
        max_grad_norm=model.max_grad_norm,
        normalize_advantage=bool(model.normalize_advantage),
        kl_cutoff_coef=model.kl_cutoff_coef or None,
        kl_cutoff_factor=model.kl_cutoff_factor,
        kl_stop_factor=model.kl_stop_factor,
    )


def target_kl_at(target_kl: float | Schedule, progress_remaining: float) -> float:
    """
    Evaluate the target, d_targ, for one update.

    :param target_kl: a number, or a function of the remaining progress
    :param progress_remaining: from 1 (beginning) to 0 (end)
    :return: in nats, > 0
    :raises ValueError: if it is anything but a finite number ≥ 0
    """
    return max(_value_at("target_kl", target_kl, progress_remaining), MIN_SCHEDULED_TARGET_KL)


def _value_at(name: str, schedule: float | Schedule, progress_remaining: float) -> float:
    value = schedule(progress_remaining) if callable(schedule) else schedule
    if not _is_number(value) or value < 0:
        raise ValueError(
            f"{name}: {value!r} at progress_remaining={progress_remaining} is not a finite number >= 0: check the schedule "
            "over [0, 1]"
        )
    return float(value)


def penalty_rule(kl_rule: str | PenaltyRule, kl_tolerance: float, kl_factor: float) -> PenaltyRule:
    """
    Look up the rule for β.

    :param kl_rule: one of ``RULES``, or any ``PenaltyRule``
    :param kl_tolerance: for ``"adaptive"``: the dead band is [target / tolerance, tolerance · target], ≥ 1
    :param kl_factor: for ``"adaptive"``: the factor that multiplies or divides β, > 1
    :return: the rule
    :raises ValueError: if there is no such rule
    """
    if isinstance(kl_rule, str):
        check_choice("kl_rule", kl_rule, tuple(RULES), " or a PenaltyRule: f(kl_coef, kl, target_kl) -> kl_coef")
        return RULES[kl_rule](kl_tolerance, kl_factor)
    if isinstance(kl_rule, type):
        raise ValueError(f"kl_rule={kl_rule.__name__} is a class: pass an instance, {kl_rule.__name__}()")
    if not callable(kl_rule) or isinstance(kl_rule, AdaptiveLearningRate):
        raise ValueError(
            f"kl_rule={kl_rule!r} is not a rule for β: pass one of {tuple(RULES)}, or a function (kl_coef, kl, target_kl)"
        )
    if hasattr(kl_rule, "within_update") or hasattr(kl_rule, "segments"):
        segments = getattr(kl_rule, "segments", None)
        whole = isinstance(segments, Integral) and not isinstance(segments, bool) and int(segments) >= 1
        if not (whole and callable(getattr(kl_rule, "within_update", None))):
            raise ValueError(
                f"kl_rule={kl_rule!r} must have both a method within_update and segments, a whole number of at least 1 "
                f"(here {segments!r}), to act within an update, or neither"
            )
    return kl_rule


def learning_rate_rule(rule: str | LearningRateRule | None) -> LearningRateRule | None:
    """
    Look up the rule for the learning rate.

    :param rule: one of ``LEARNING_RATE_RULES``, any ``LearningRateRule``, or None for none
    :return: the rule
    :raises ValueError: if there is no such rule
    """
    if isinstance(rule, str):
        alternative = " or a LearningRateRule: f(scale, kl, target_kl) -> scale"
        check_choice("learning_rate_rule", rule, tuple(LEARNING_RATE_RULES), alternative)
        return LEARNING_RATE_RULES[rule]()
    if isinstance(rule, type):
        raise ValueError(f"learning_rate_rule={rule.__name__} is a class: pass an instance, {rule.__name__}()")
    if not (rule is None or callable(rule)) or isinstance(rule, PENALTIES):
        raise ValueError(
            f"learning_rate_rule={rule!r} is not a rule for the learning rate: pass None, one of "
            f"{tuple(LEARNING_RATE_RULES)}, or a function (scale, kl, target_kl)"
        )
    return rule


def kl_coef_limits(kl_coef_bounds: tuple[float, float] | None, normalize_advantage: bool) -> tuple[float, float]:
    """
    Interpret the bounds of β.

    :param kl_coef_bounds: the argument, or None for ``default_bounds``
    :param normalize_advantage: whether advantages are normalized
    :return: low and high, 0 < low ≤ high < inf
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


def check_arguments(model: Any) -> None:
    """
    Check every argument of the KL penalty and of the minibatches.

    :param model: the algorithm, before its policy and buffer are set up
    :raises ValueError: if one is out of range
    """
    check_settings(model)
    low, high = kl_coef_limits(model.kl_coef_bounds, model.normalize_advantage)
    within = f"within kl_coef_bounds=({low:g}, {high:g})"
    check_number("init_kl_coef", model.init_kl_coef, within, lambda x: low <= x <= high, "move it or the bounds")
    if hasattr(model, "kl_coef"):  # the running β, after load()
        check_number(
            "kl_coef", model.kl_coef, within, lambda x: low <= x <= high, "pass load() a kl_coef that fits the bounds"
        )


def check_settings(model: Any) -> None:
    """
    Check the arguments that may change from one update to the next.

    :param model: the algorithm
    :raises ValueError: if one is out of range
    """
    remedy = "try 0.01; SB3's LinearSchedule(0.02, 0.0, 1.0) decays, clip_equivalent_target(0.2) corresponds to a clip range"
    if model.target_kl is None:
        remedy = "a model of PPO has none, pass load() a target_kl, such as 0.01"
    check_schedule("target_kl", model.target_kl, remedy)
    if isinstance(model.clip_range, str):
        check_choice("clip_range", model.clip_range, (OUTLIERS,), ", a positive number, a schedule, or None for no clipping")
    elif model.clip_range is not None:
        check_schedule("clip_range", model.clip_range, "None deactivates clipping")
    if model.clip_range_vf is not None:
        check_schedule("clip_range_vf", model.clip_range_vf, "None deactivates clipping")
    check_number("kl_tolerance", model.kl_tolerance, ">= 1", lambda x: x >= 1, "the paper has 1.5")
    check_number("kl_factor", model.kl_factor, "> 1", lambda x: x > 1, "the paper has 2; kl_rule='fixed' keeps β constant")
    check_number(
        "kl_cutoff_coef", model.kl_cutoff_coef, ">= 0", lambda x: x >= 0, "0 leaves the hinge out, TF-Agents uses 1000"
    )
    check_number("kl_cutoff_factor", model.kl_cutoff_factor, "> 0", lambda x: x > 0, "TF-Agents uses 2")
    if model.kl_stop_factor is not None:
        check_number("kl_stop_factor", model.kl_stop_factor, "> 0", lambda x: x > 0, "DPPO uses 4; None never stops early")
    if model.kl_ceiling is not None:
        check_number(
            "kl_ceiling",
            model.kl_ceiling,
            ">= 1",
            lambda x: x >= 1,
            "1.5 is the edge of the paper's band; None never shortens a step",
        )
    learning_rate_rule(model.learning_rate_rule)  # raises if there is no such rule
    check_number("learning_rate_scale", model.learning_rate_scale, "> 0", lambda x: x > 0, "1 is the learning rate itself")
    check_choice("kl_divergence", model.kl_divergence, tuple(DIVERGENCES))
    if not isinstance(model.compile, bool):  # "False" from a file or a command line would compile
        raise ValueError(f"compile={model.compile!r} must be True or False")
    penalty_rule(model.kl_rule, model.kl_tolerance, model.kl_factor)  # raises if there is no such rule
    kl_coef_limits(model.kl_coef_bounds, model.normalize_advantage)  # raises if they are not bounds
    check_minibatches(model.batch_size, model.n_epochs, model.normalize_advantage)


def check_minibatches(batch_size: int | None, n_epochs: int, normalize_advantage: bool) -> None:
    """
    Check the sizes that every minibatch depends on.

    :param batch_size: transitions per minibatch, None for the whole rollout
    :param n_epochs: passes over the rollout
    :param normalize_advantage: whether a minibatch's advantages are normalized
    :raises ValueError: if there is nothing to train on, or a single advantage to normalize
    """
    sizes = [n_epochs] if batch_size is None else [n_epochs, batch_size]
    if not all(isinstance(size, Integral) and size >= 1 for size in sizes):
        raise ValueError(
            f"batch_size={batch_size!r} and n_epochs={n_epochs!r} must be whole numbers of at least 1: "
            "the loss of an empty minibatch is NaN"
        )
    if normalize_advantage and batch_size == 1:
        raise ValueError(
            "batch_size=1 leaves a single advantage to normalize, which has no standard deviation: "
            "use a batch_size of at least 2, or normalize_advantage=False"
        )


def check_number(name: str, value: Any, requirement: str, holds: Callable[[float], bool], remedy: str) -> None:
    """
    Check a number of the user's.

    :param name: name of the argument
    :param value: value of the argument
    :param requirement: the requirement in words
    :param holds: the requirement
    :param remedy: what to do instead, in words
    :raises ValueError: if ``value`` is not a finite number for which ``holds``
    """
    if not _is_number(value) or not holds(value):
        raise ValueError(f"{name}={value!r} must be a finite number {requirement}: {remedy}")


def check_schedule(name: str, value: Any, remedy: str) -> None:
    """
    Check a number or a schedule of the user's. A schedule's values are not checked: rl-zoo3 replaces schedules by constant
    zeros to replay an agent.

    :param name: name of the argument
    :param value: value of the argument
    :param remedy: what to do instead, in words
    :raises ValueError: if ``value`` is neither a positive number nor a function of the remaining progress
    """
    if not callable(value):
        check_number(name, value, "> 0, or a schedule (a function of the remaining progress)", lambda x: x > 0, remedy)


def check_choice(name: str, value: Any, choices: tuple[str, ...], alternative: str = "") -> None:
    """
    Check a name of the user's.

    :param name: name of the argument
    :param value: value of the argument
    :param choices: the valid names
    :param alternative: other valid values, in words
    :raises ValueError: if ``value`` is not one of the ``choices``, with the closest one
    """
    if not isinstance(value, str) or value not in choices:
        nearest = get_close_matches(str(value).lower(), choices, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"{name}={value!r} is unknown, did you mean {nearest!r}? Valid are {', '.join(map(repr, choices))}{alternative}"
        )


def _is_number(value: Any) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond the floats
        return False
