"""
The string forms of `target_kl` in a yml file, or after `-params`: `lin_0.02` decays linearly from 0.02 to 0.

The zoo itself turns such strings into schedules for `learning_rate`, `clip_range`, `clip_range_vf` and `delta_std` only. Other
strings are left to the algorithm, which rejects them.
"""

import re
from typing import Any

from stable_baselines3.common.utils import LinearSchedule


def parse_linear_target(text: str) -> LinearSchedule:
    """
    Parse a linear schedule.

    :param text: ``lin_x`` with the initial target x > 0 in nats
    :return: a schedule from x at the beginning of training to 0 at its end
    :raises ValueError: if x is not a number above 0
    """
    match = re.fullmatch(r"lin_(\d*\.?\d+(?:[eE][-+]?\d+)?)", text)
    if match is None or float(match[1]) == 0:
        raise ValueError(f"target_kl={text!r}: write a linear schedule as lin_0.02, with a number above 0")
    return LinearSchedule(float(match[1]), 0.0, 1.0)


def accept_target_kl_strings(manager: Any) -> None:
    """
    Let the zoo parse the string forms of ``target_kl``.

    :param manager: the zoo's ``ExperimentManager``, modified in place
    """
    preprocess = manager._preprocess_schedules

    def preprocess_schedules(hyperparams: dict[str, Any]) -> dict[str, Any]:
        target_kl = hyperparams.get("target_kl")
        if isinstance(target_kl, str) and target_kl.startswith("lin_"):
            hyperparams = {**hyperparams, "target_kl": parse_linear_target(target_kl)}
        return preprocess(hyperparams)  # type: ignore[no-any-return]

    manager._preprocess_schedules = staticmethod(preprocess_schedules)
