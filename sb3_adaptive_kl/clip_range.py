"""
Clip ranges and KL targets that mean the same step.

Where the policy has moved by a KL divergence of t, the log-ratio of its actions has a standard deviation of √(2t), to second
order (``docs/theory.md``). A clip range of ε is therefore one standard deviation at t = ε²/2.
"""

import math
from dataclasses import dataclass
from numbers import Real

from stable_baselines3.common.type_aliases import Schedule


def clip_equivalent_target(clip_range: float | Schedule) -> "float | ClipEquivalentTarget":
    """
    Return the KL target that corresponds to PPO's clip range: ε²/2, so that ε is one standard deviation of the log-ratio.

    :param clip_range: ε > 0, or a function of the remaining progress (from 1 to 0), such as PPO's ``clip_range``
    :return: the target in nats, 0.02 for 0.2, or a schedule of it
    :raises ValueError: if ``clip_range`` is neither a positive, finite number nor a function
    """
    if callable(clip_range) and not isinstance(clip_range, type):
        return ClipEquivalentTarget(clip_range)
    # Beyond these bounds the square is 0 or infinite
    if not isinstance(clip_range, Real) or isinstance(clip_range, bool) or not 1e-150 < float(clip_range) < 1e150:
        raise ValueError(f"clip_range={clip_range!r} must be a positive, finite number or a schedule: try 0.2")
    return float(clip_range) ** 2 / 2


@dataclass(frozen=True)
class ClipEquivalentTarget:
    """
    The KL target that follows a schedule of the clip range.

    :param clip_range: function of the remaining progress (from 1 to 0) that returns ε ≥ 0
    """

    clip_range: Schedule

    def __call__(self, progress_remaining: float) -> float:
        """
        Return the target.

        :param progress_remaining: from 1 to 0
        :return: ε²/2 in nats
        :raises ValueError: if the schedule returns a negative number
        """
        clip_range = float(self.clip_range(progress_remaining))
        if clip_range < 0:  # its square would hide it
            raise ValueError(
                f"clip_range: the schedule returned {clip_range} at progress_remaining={progress_remaining}, it must not be "
                "negative between 1 and 0"
            )
        return clip_range**2 / 2


def outlier_clip_range(target_kl: float) -> float:
    """
    Return the clip range at two standard deviations of the log-ratio at the target.

    :param target_kl: t in nats, > 0; from 1/8 on, the clip range is 1 or more, and a ratio cannot fall below 1 − ε
    :return: ε = 2·√(2t), 0.4 for 0.02
    """
    return 2 * math.sqrt(2 * target_kl)
