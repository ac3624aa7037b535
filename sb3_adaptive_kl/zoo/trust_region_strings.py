"""
Parse the forms of `target_kl` and `clip_range`, in a yml file or after `-params`, that the zoo does not know.

    target_kl: lin_0.02         decays linearly from 0.02 to 0
    target_kl: clip_0.2         the target that corresponds to a clip range of 0.2
    target_kl: clip_lin_0.2     the same for a clip range that decays linearly from 0.2 to 0
    clip_range: outliers        the clip range that follows the target
    clip_range: null            no clipping (`clip_range:None` after `-params`)

The zoo itself turns strings into schedules for `learning_rate`, `clip_range`, `clip_range_vf` and `delta_std` only, knows only
`lin_x`, and rejects None.
"""

import re
from typing import Any

from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import LinearSchedule

from sb3_adaptive_kl.arguments import OUTLIERS, check_choice
from sb3_adaptive_kl.clip_range import clip_equivalent_target


def parse_target(text: str) -> float | Schedule:
    """
    Parse a target.

    :param text: ``lin_x`` with the initial target x > 0 in nats, ``clip_x`` or ``clip_lin_x`` with a clip range x > 0
    :return: the target, or a schedule of it
    :raises ValueError: if x is not a number above 0
    """
    match = re.fullmatch(r"(clip_)?(lin_)?(\d*\.?\d+(?:[eE][-+]?\d+)?)", text)
    if match is None or float(match[3]) == 0:
        raise ValueError(f"target_kl={text!r}: write lin_0.02, clip_0.2 or clip_lin_0.2, with a number above 0")
    number = float(match[3])
    schedule = LinearSchedule(number, 0.0, 1.0) if match[2] else number
    return clip_equivalent_target(schedule) if match[1] else schedule


def accept_trust_region_strings(manager: Any) -> None:
    """
    Let the zoo parse the string forms of ``target_kl``, and pass ``"outliers"`` and None as a ``clip_range`` unchanged.

    :param manager: the zoo's ``ExperimentManager``, modified in place
    """
    preprocess = manager._preprocess_schedules

    def preprocess_schedules(hyperparams: dict[str, Any]) -> dict[str, Any]:
        target_kl = hyperparams.get("target_kl")
        if isinstance(target_kl, str):
            hyperparams = {**hyperparams, "target_kl": parse_target(target_kl)}
        clip_range = hyperparams.get("clip_range")
        if isinstance(clip_range, str) and "_" not in clip_range:  # the zoo's error would not name it
            check_choice("clip_range", clip_range, (OUTLIERS,), ", a positive number, lin_0.2, or null (None) for no clipping")
        clip_range_vf = hyperparams.get("clip_range_vf")
        if isinstance(clip_range_vf, str) and "_" not in clip_range_vf:
            raise ValueError(f"clip_range_vf={clip_range_vf!r} must be a positive number or lin_0.2")
        if "clip_range" not in hyperparams or clip_range not in (OUTLIERS, None):
            return preprocess(hyperparams)  # type: ignore[no-any-return]
        others = {name: value for name, value in hyperparams.items() if name != "clip_range"}
        return {**preprocess(others), "clip_range": clip_range}

    manager._preprocess_schedules = staticmethod(preprocess_schedules)
