"""
A learning rate that follows the KL divergence: the "adaptive KL" of robotics.

Schulman et al. 2017 (https://arxiv.org/abs/1707.06347), Table 4, adapts Adam's step size to the KL of the updates. rsl_rl,
rl_games, skrl and brax do it by a factor of 1.5, and most of them after every minibatch. But the KL is 0 at the beginning of
every update, which would raise the learning rate there each time. Here the KL of the whole update counts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Protocol


class LearningRateRule(Protocol):
    """Protocol of ``learning_rate_rule``: a pure callable with this signature."""

    def __call__(self, scale: float, kl: float, target_kl: float) -> float:
        """
        Return the factor of the learning rate for the next update.

        :param scale: factor used by the update that was just measured, > 0
        :param kl: d in nats as measured after that update on the whole rollout, before any step back, ≥ 0; ``inf`` when the
            update was undone. Never NaN.
        :param target_kl: d_targ in nats, > 0
        :return: factor of ``learning_rate``, > 0
        """
        ...


@dataclass(frozen=True)
class AdaptiveLearningRate:
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
        if not 0 < self.lowest <= 1 <= self.highest < math.inf:
            raise ValueError(
                f"lowest={self.lowest} and highest={self.highest} must satisfy 0 < lowest <= 1 <= highest < inf: "
                "they bracket the user's learning rate"
            )

    def __call__(self, scale: float, kl: float, target_kl: float) -> float:
        if kl > self.high * target_kl:
            scale = scale / self.factor
        elif kl < self.low * target_kl:
            scale = scale * self.factor
        return min(max(scale, self.lowest), self.highest)


# The rules that ``learning_rate_rule`` can name
LEARNING_RATE_RULES: dict[str, Callable[..., LearningRateRule]] = {"adaptive": AdaptiveLearningRate}


def next_scale(rule: LearningRateRule, scale: float, kl: float, target_kl: float) -> float:
    """
    Apply a rule, and check its result.

    :param rule: the rule
    :param scale: factor used by the update that was just measured, > 0
    :param kl: d of that update in nats, ``inf`` if it was undone
    :param target_kl: d_targ in nats, > 0
    :return: factor for the next update, > 0
    :raises ValueError: if the rule did not return a positive, finite number
    """
    wanted = rule(scale, kl, target_kl)
    if not isinstance(wanted, Real) or not 0 < wanted < math.inf:
        raise ValueError(
            f"learning_rate_rule={rule!r} returned {wanted!r} for kl={kl}: it must return a positive number, also for inf, "
            "which stands for an undone update"
        )
    return float(wanted)
