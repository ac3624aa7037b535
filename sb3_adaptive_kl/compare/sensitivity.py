"""
Sensitivity to a swept hyperparameter: Adkins, Bowling and White 2024 (https://arxiv.org/abs/2412.07165).

An arm with all of its values is a family. Φ is what a family loses by a single value for all environments: the mean of the
best score of each environment, less the best mean score of a value.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from sb3_adaptive_kl.compare.intervals import interval, matrices, mean

NEAR_BEST = 0.9  # a value with this share of the best one's score is as good in practice

Families = Mapping[str, Mapping[float, str]]  # arm as the user gave it → value → the arm that has it


def sensitivity(families: Families, runs: pd.DataFrame) -> dict[str, Any]:
    """
    Score every value of every family.

    :param families: the arms by family and value
    :param runs: a row for each run on the environments that count, with its normalized ``score``
    """
    matrix = matrices(runs, "score")
    found = {}
    for family, arms in families.items():
        scores = {value: matrix[arm] for value, arm in sorted(arms.items()) if arm in matrix}
        if scores:
            found[family] = _family(scores, complete=len(scores) == len(arms))
    return {"environments": runs["env"].unique().tolist(), "families": found}


def _family(scores: dict[float, np.ndarray], complete: bool) -> dict[str, Any]:
    means = {value: interval(mean, matrix) for value, matrix in scores.items()}
    best = max(means, key=lambda value: means[value][0])
    score = means[best][0]
    return {
        "values": list(means),
        "scores": list(means.values()),
        "best": best,
        "best_score": means[best],
        # A value whose runs have failed may be the best one elsewhere
        "phi": interval(phi, *scores.values()) if complete else None,
        # The absolute value: the best score can be below 0
        "near_best": [value for value in means if means[value][0] >= score - (1 - NEAR_BEST) * abs(score)],
    }


def phi(*scores: np.ndarray) -> Any:
    """Compute Φ from one array of scores for each value, of shape (..., runs, environments)."""
    means = np.stack([of_value.mean(axis=-2) for of_value in scores])
    return means.max(axis=0).mean(axis=-1) - means.mean(axis=-1).max(axis=0)
