"""
Validate and interpret the KL-penalty arguments. A ``ValueError`` names the argument, its value and the remedy.

SB3's ``load()`` writes attributes past the constructor, so arguments are checked in ``_setup_model()``, which runs after both.
They stay on the algorithm as the user gave them; these functions interpret them.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

from stable_baselines3.common.type_aliases import Schedule

from sb3_adaptive_kl.clip_range import outlier_clip_range
from sb3_adaptive_kl.divergences import DIVERGENCES
from sb3_adaptive_kl.learning_rate import (
    LEARNING_RATE_RULES,
    AdaptiveLearningRate,
    BalancedLearningRate,
    FunctionLearningRate,
    LearningRateRule,
)
from sb3_adaptive_kl.messages import suggestion, warn_user
from sb3_adaptive_kl.objective import Settings
from sb3_adaptive_kl.penalty import RULES, FixedPenalty, FunctionPenalty, PenaltyRule

# A schedule may end at 0 (a linear decay does). "Do not move at all" is then meant, but a rule may divide by its target:
# this stands for 0, far below any divergence that float32 can tell from it
MIN_SCHEDULED_TARGET_KL = 1e-12
# At 10 nats the actions that the policy takes were some e¹⁰ times less likely before
MAX_SENSIBLE_TARGET_KL = 10.0
# The clip range that follows the target
OUTLIERS = "outliers"


def check_arguments(model: Any) -> None:
    """
    Check every argument of the KL penalty and of the minibatches.

    :param model: the algorithm, before its policy and buffer are set up
    :raises ValueError: if one is out of range
    """
    bounds = kl_coef_limits(model.kl_coef_bounds, model.normalize_advantage)
    check_kl_coef("init_kl_coef", model.init_kl_coef, bounds, "move it or the bounds")
    check_settings(model)
    rule, actuator = penalty_rule(model.kl_rule), learning_rate_rule(model.learning_rate_rule)
    if isinstance(actuator, BalancedLearningRate) and not model.normalize_advantage:
        raise ValueError(
            f"learning_rate_rule={model.learning_rate_rule!r} compares the gain in the surrogate with the penalty: it needs "
            "normalize_advantage=True, which makes the surrogate 0 at the old policy, or pass learning_rate_rule=None"
        )
    if isinstance(actuator, AdaptiveLearningRate) and not isinstance(rule, FixedPenalty):
        warn_user(
            "learning_rate_rule='adaptive' and kl_rule answer the same error, both at once: pass kl_rule='fixed', or "
            "learning_rate_rule='balanced', which does not follow the KL"
        )
    if is_number(model.target_kl) and model.target_kl > MAX_SENSIBLE_TARGET_KL:
        warn_user(
            f"target_kl={model.target_kl:g} nats restrains nothing: 0.02 corresponds to PPO's clip range, and beyond "
            f"{MAX_SENSIBLE_TARGET_KL:g} a policy has little to do with the one that collected"
        )


def check_settings(model: Any) -> None:
    """
    Check the arguments that may change from one update to the next.

    :param model: the algorithm
    :raises ValueError: if one is out of range
    """
    bounds = kl_coef_limits(model.kl_coef_bounds, model.normalize_advantage)
    # The running β is not there before the first _setup_model()
    kl_coef = getattr(model, "kl_coef", model.init_kl_coef)
    check_kl_coef("kl_coef", kl_coef, bounds, "set one within them, in load() by kl_coef=...")
    remedy = "try 0.02; SB3's LinearSchedule(0.02, 0.0, 1.0) decays, clip_equivalent_target(0.2) corresponds to a clip range"
    if model.target_kl is None:
        remedy = "a model of PPO has none, pass load() a target_kl, such as 0.02; for no early stopping, leave it out"
    check_schedule("target_kl", model.target_kl, "> 0", remedy)
    if isinstance(model.clip_range, str):
        alternative = ", a positive number, a schedule, or None for no clipping" + _hint(model.clip_range)
        check_choice("clip_range", model.clip_range, (OUTLIERS,), alternative)
    elif model.clip_range is not None:
        check_schedule("clip_range", model.clip_range, "> 0", "None deactivates clipping")
    if model.clip_range_vf is not None:
        check_schedule("clip_range_vf", model.clip_range_vf, "> 0", "None deactivates clipping")
    for name in ("ent_coef", "vf_coef"):
        value = getattr(model, name)
        if not is_schedule(value) and not is_number(value):
            raise ValueError(
                f"{name}={value!r} must be a finite number or a schedule (a function of the remaining progress){_hint(value)}"
            )
    check_number("kl_cutoff_coef", model.kl_cutoff_coef, ">= 0", "0 leaves the hinge out, TF-Agents uses 1000")
    check_number("learning_rate_scale", model.learning_rate_scale, "> 0", "1 is the learning rate itself")
    if model.kl_stop_factor is not None:
        check_number("kl_stop_factor", model.kl_stop_factor, "> 0", "DPPO uses 4; None never stops early")
    if model.kl_ceiling is not None:
        check_number("kl_ceiling", model.kl_ceiling, ">= 1", "1.5 is the edge of the paper's band; None never shortens a step")
    check_choice("kl_divergence", model.kl_divergence, tuple(DIVERGENCES))
    # "False" from a file or a command line would mean True; PPO takes normalize_advantage=0, too
    if not isinstance(model.compile, bool):
        raise ValueError(f"compile={model.compile!r} must be True or False")
    if isinstance(model.normalize_advantage, str):
        raise ValueError(f"normalize_advantage={model.normalize_advantage!r} must be True or False")
    check_minibatches(model.batch_size, model.n_epochs, model.normalize_advantage)
    is_balanced = isinstance(learning_rate_rule(model.learning_rate_rule), BalancedLearningRate)
    n_transitions = model.n_steps * model.n_envs if model.env is not None else 0  # a loaded model may only be there to act
    if is_balanced and n_transitions > 0 and n_transitions % (model.batch_size or n_transitions) == 1:
        raise ValueError(
            f"learning_rate_rule={model.learning_rate_rule!r}: batch_size={model.batch_size} leaves 1 of n_steps * n_envs = "
            f"{n_transitions} transitions for the last minibatch, and a single advantage cannot be normalized, so that the "
            "gain would depend on the rewards' scale: change batch_size or n_steps"
        )


def check_minibatches(batch_size: int | None, n_epochs: int, normalize_advantage: bool) -> None:
    """
    Check the sizes that every minibatch depends on.

    :param batch_size: transitions per minibatch, None for the whole rollout
    :param n_epochs: passes over the rollout
    :param normalize_advantage: whether a minibatch's advantages are normalized
    :raises ValueError: if there is nothing to train on, or a single advantage to normalize
    """
    sizes = [n_epochs] if batch_size is None else [n_epochs, batch_size]
    if not all(is_count(size) for size in sizes):
        raise ValueError(
            f"batch_size={batch_size!r} and n_epochs={n_epochs!r} must be whole numbers of at least 1: "
            "the loss of an empty minibatch is NaN"
        )
    if normalize_advantage and batch_size == 1:
        raise ValueError(
            "batch_size=1 leaves a single advantage to normalize, which has no standard deviation: "
            "use a batch_size of at least 2, or normalize_advantage=False"
        )


def settings_at(model: Any, progress_remaining: float) -> Settings:
    """
    Read the settings of one update off the algorithm.

    :param model: the algorithm; callbacks may have replaced a schedule by a number
    :param progress_remaining: from 1 (beginning) to 0 (end)
    :return: the settings
    :raises ValueError: if a schedule returns an invalid target or clip range
    """
    target_kl = max(value_at("target_kl", model.target_kl, progress_remaining), MIN_SCHEDULED_TARGET_KL)
    clip_range = outlier_clip_range(target_kl) if model.clip_range == OUTLIERS else model.clip_range
    return Settings(
        target_kl=target_kl,
        kl_coef=float(model.kl_coef),
        clip_range=None if clip_range is None else value_at("clip_range", clip_range, progress_remaining),
        clip_range_vf=None
        if model.clip_range_vf is None
        else value_at("clip_range_vf", model.clip_range_vf, progress_remaining),
        vf_coef=value_at("vf_coef", model.vf_coef, progress_remaining, -math.inf),
        # None for a constant 0, so that a zero gradient is not computed. A schedule that reaches 0 is not compiled again
        ent_coef=value_at("ent_coef", model.ent_coef, progress_remaining, -math.inf) if model.ent_coef else None,
        max_grad_norm=model.max_grad_norm,
        normalize_advantage=bool(model.normalize_advantage),
        kl_cutoff_coef=model.kl_cutoff_coef or None,
        reference_kl_coef=model.reference_kl_coef,
    )


def penalty_rule(rule: str | Mapping[str, Any] | PenaltyRule | Callable[[float, float, float], float]) -> PenaltyRule:
    """
    Interpret ``kl_rule``.

    :param rule: a name in ``RULES``; a mapping of that name and its numbers, as a file can hold it,
        ``{"name": "adaptive", "high": 2.0}``; a ``PenaltyRule``; or a function of β, the KL and its target
    :return: the rule
    :raises ValueError: if there is no such rule
    """
    known = _rule("kl_rule", rule, RULES, LearningRateRule, "(kl_coef, kl, target_kl)")
    if not isinstance(known, PenaltyRule):
        return FunctionPenalty(known)
    if not is_count(known.segments):
        raise ValueError(
            f"kl_rule={rule!r} has segments={known.segments!r}: the parts of an update, a whole number of at least 1"
        )
    return known


def learning_rate_rule(rule: str | Mapping[str, Any] | LearningRateRule | None) -> LearningRateRule | None:
    """
    Interpret ``learning_rate_rule``.

    :param rule: a name in ``LEARNING_RATE_RULES``, or a mapping, as for ``penalty_rule``; any ``LearningRateRule``; or None
    :return: the rule
    :raises ValueError: if there is no such rule
    """
    if rule is None:
        return None
    known = _rule("learning_rate_rule", rule, LEARNING_RATE_RULES, PenaltyRule, "(scale, kl, target_kl, balance)")
    return known if isinstance(known, LearningRateRule) else FunctionLearningRate(known)


def kl_coef_limits(kl_coef_bounds: tuple[float, float] | None, normalize_advantage: bool) -> tuple[float, float]:
    """
    Interpret the bounds of β.

    :param kl_coef_bounds: the argument, or None for bounds that do not bind where the target can be held
    :param normalize_advantage: whether advantages are normalized
    :return: low and high, 0 < low ≤ high < inf
    :raises ValueError: if they are not two positive, finite numbers in order
    """
    if kl_coef_bounds is None:
        # Normalized: the penalized optimum has KL ≲ 1/(2β²), so β = 32 already means a KL below 5e-4. The floor matters as
        # much: when the learning rate decays to 0, d falls below the target whatever β is, and an unbounded rule would halve β
        # until nothing restrains the surrogate. Not normalized: β carries the unit of the rewards
        return (1 / 32, 32.0) if normalize_advantage else (1e-6, 1e6)
    pair = tuple(kl_coef_bounds) if isinstance(kl_coef_bounds, Iterable) else ()
    if len(pair) != 2 or not all(map(is_number, pair)) or not 0 < pair[0] <= pair[1]:
        raise ValueError(
            f"kl_coef_bounds={kl_coef_bounds!r} must be two finite numbers (low, high) with 0 < low <= high: "
            "a β of 0 could never grow again, an infinite one gives a NaN loss"
        )
    return float(pair[0]), float(pair[1])


def check_choice(name: str, value: Any, choices: tuple[str, ...], alternative: str = "") -> None:
    """
    Raise ValueError, with the closest choice, unless ``value`` is one of the ``choices``.

    :param name: name of the argument
    :param value: value of the argument
    :param choices: the valid names
    :param alternative: other valid values, in words
    """
    if not isinstance(value, str) or value not in choices:
        hint = suggestion(str(value).lower(), choices, cutoff=0.5) or "."  # the names are short
        raise ValueError(f"{name}={value!r} is unknown{hint} Valid are {', '.join(map(repr, choices))}{alternative}")


def is_number(value: Any) -> bool:
    """
    Tell a finite real number, of Python or NumPy, from anything else.

    :param value: anything; booleans do not count
    """
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) < math.inf  # type: ignore[operator]


def is_count(value: Any) -> bool:
    """
    Tell a whole number of at least 1, of Python or NumPy, from anything else.

    :param value: anything; booleans do not count
    """
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def is_schedule(value: Any) -> bool:
    """
    Tell a schedule from anything else.

    :param value: anything; ``LinearSchedule`` without its arguments is a class
    """
    return callable(value) and not isinstance(value, type)


def value_at(name: str, schedule: float | Schedule, progress_remaining: float, least: float = 0.0) -> float:
    """
    Evaluate a schedule, or return the number that stands for one.

    :param name: name of the argument
    :param schedule: the argument
    :param progress_remaining: from 1 (beginning) to 0 (end)
    :param least: smallest valid value
    :return: the value
    :raises ValueError: if it is not a finite number, or too small
    """
    value = schedule(progress_remaining) if callable(schedule) else schedule
    # Checked at every update: what a schedule returns cannot be known before
    if not is_number(value) or value < least:
        at_least = "" if least == -math.inf else f" >= {least:g}"
        raise ValueError(
            f"{name}: {value!r} at progress_remaining={progress_remaining} is not a finite number{at_least}: check the "
            f"schedule over [0, 1]{_hint(value)}"
        )
    return float(value)


def _rule(argument: str, rule: Any, rules: Mapping[str, Callable[..., Any]], other: type, signature: str) -> Any:
    """Make a rule from its name or a mapping. One of the class ``other`` would move the other quantity."""
    alternative = f" or a function {signature}"
    if isinstance(rule, str):
        check_choice(argument, rule, tuple(rules), alternative)
        rule = {"name": rule}
    if isinstance(rule, Mapping):
        numbers = dict(rule)
        name = numbers.pop("name", None)
        check_choice(f"{argument}: name", name, tuple(rules), alternative)
        known: Any = rules[name]
        its_numbers = [field.name for field in fields(known)]
        for key, value in numbers.items():
            if key not in its_numbers or not is_number(value):
                its = ", ".join(its_numbers) or "none"
                raise ValueError(f"{argument}={dict(rule)!r}: {key}={value!r} is not a number of {name!r}, which has {its}")
        return known(**numbers)
    if isinstance(rule, type):  # it is callable, too, but would make a rule of β instead of the next β
        raise ValueError(f"{argument}={rule.__name__} is a class: pass an instance, {rule.__name__}()")
    if not callable(rule) or isinstance(rule, other):
        raise ValueError(f"{argument}={rule!r} is not a {argument}: pass one of {tuple(rules)}, or a function {signature}")
    return rule


def check_kl_coef(name: str, value: Any, bounds: tuple[float, float], remedy: str) -> None:
    """Raise ValueError unless ``value`` is a number within the bounds of β."""
    low, high = bounds
    # Not only positive: a β that cannot stay where it is would surprise
    if not is_number(value) or not low <= value <= high:
        limits = f"within kl_coef_bounds=({low:g}, {high:g})"
        raise ValueError(f"{name}={value!r} must be a finite number {limits}: {remedy}{_hint(value)}")


def check_number(name: str, value: Any, requirement: str, remedy: str) -> None:
    """
    Raise ValueError unless ``value`` is finite and meets the requirement, such as ``>= 1``: it is parsed, so that the message
    and the check cannot differ.
    """
    relation, bound = requirement.replace(",", "").split()[:2]
    if not is_number(value) or value < float(bound) or (relation == ">" and value == float(bound)):
        raise ValueError(f"{name}={value!r} must be a finite number {requirement}: {remedy}{_hint(value)}")


def _hint(value: Any) -> str:
    """Explain how to pass what means a number, or one of the zoo's forms."""
    if hasattr(value, "__float__") and not isinstance(value, Real):  # tensors, arrays, Decimal
        return f" (pass float() of this {type(value).__name__})"
    match = re.fullmatch(r"((?:clip_)?(?:lin_)?)\d*\.?\d+(?:e-?\d+)?", value) if isinstance(value, str) else None
    if match is None:
        return ""
    return " (only the zoo's yml files and -params read this form)" if match[1] else " (pass a number without quotes)"


def check_schedule(name: str, value: Any, requirement: str, remedy: str) -> None:
    """Raise ValueError unless ``value`` is a schedule, or a number that meets the requirement."""
    # A schedule's values are not checked: rl-zoo3 replaces schedules by constant zeros to replay an agent
    if not is_schedule(value):
        check_number(name, value, f"{requirement}, or a schedule (a function of the remaining progress)", remedy)
