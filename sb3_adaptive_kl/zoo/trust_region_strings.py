"""
Parse the forms of targets, clip ranges and coefficients, in a yml file or after `-params`, that the zoo does not know.

    target_kl: lin_0.02         decays linearly from 0.02 to 0
    target_kl: clip_0.2         the target that corresponds to a clip range of 0.2
    target_kl: clip_lin_0.2     the same for a clip range that decays linearly from 0.2 to 0
    clip_range: lin_0.2         as in the zoo
    clip_range: outliers        the clip range that follows the target
    clip_range: null            no clipping (`clip_range:None` after `-params`)
    ent_coef: lin_0.01          decays linearly from 0.01 to 0, as vf_coef may
    reference_policy: {policy: clone.zip, kl_coef: lin_1.0}     a penalty that fades
"""

import re
from collections.abc import Mapping
from typing import Any

from stable_baselines3.common.utils import LinearSchedule

from sb3_adaptive_kl.clip_range import clip_equivalent_target

# The arguments, and the end of the error for each
TRUST_REGION = {
    "target_kl": ": write lin_0.02, clip_0.2 or clip_lin_0.2, with a number above 0",
    "clip_range": " must be a positive number, lin_0.2, outliers, or null (None) for no clipping",
    "clip_range_vf": " must be a positive number or lin_0.2, or null (None) for no clipping",
    "ent_coef": " must be a number or lin_0.01",
    "vf_coef": " must be a number or lin_0.5",
}


def parse_trust_region(hyperparams: dict[str, Any]) -> dict[str, Any]:
    """
    Parse the strings among ``target_kl``, ``clip_range``, ``clip_range_vf``, ``ent_coef`` and ``vf_coef``, and the coefficient
    of a ``reference_policy``.

    :param hyperparams: of one of our algorithms
    :return: a copy with numbers and schedules of SB3, so that a saved agent does not need the zoo
    :raises ValueError: if a string has none of the forms above, or its number is 0
    """
    parsed = dict(hyperparams)
    for name, remedy in TRUST_REGION.items():
        text = parsed.get(name)
        if not isinstance(text, str):
            continue
        if name == "clip_range" and not any(map(str.isdigit, text)):
            continue  # the algorithm knows "outliers", and suggests it for "outlier"
        of_clip_range = name == "target_kl" and text.startswith("clip_")
        value = _number_or_schedule(text.removeprefix("clip_") if of_clip_range else text)
        if value is None:
            raise ValueError(f"{name}={text!r}{remedy}")
        parsed[name] = clip_equivalent_target(value) if of_clip_range else value
    reference = parsed.get("reference_policy")
    if isinstance(reference, Mapping) and isinstance(text := reference.get("kl_coef"), str):
        value = _number_or_schedule(text)
        if value is None:
            raise ValueError(f"reference_policy: kl_coef={text!r} must be a number or lin_1.0")
        parsed["reference_policy"] = {**reference, "kl_coef": value}
    return parsed


def _number_or_schedule(text: str) -> float | LinearSchedule | None:
    """Parse 0.02 or lin_0.02; None for anything else, and for 0."""
    match = re.fullmatch(r"(lin_)?(\d*\.?\d+(?:[eE][-+]?\d+)?)", text)
    if match is None or float(match[2]) == 0:
        return None
    return LinearSchedule(float(match[2]), 0.0, 1.0) if match[1] else float(match[2])
