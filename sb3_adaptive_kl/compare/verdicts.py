"""
Which differences between arms a report may call shown.

Differences are paired by seed. An arm is called better only if 0 lies outside the bootstrap's interval, which is too narrow
with few seeds, and outside Student's t interval, and if Student's p value survives Holm's correction (Holm 1979) for all
comparisons in the report. Then some 5 % of the reports on equal arms call any of them better. With fewer than five seeds it
would be more: of three, those that happen to fail or succeed together give a tiny p value.
"""

import sys
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
import scipy.optimize
import scipy.stats

from sb3_adaptive_kl.compare.intervals import CONFIDENCE, interval, mean
from sb3_adaptive_kl.compare.plan import FEW_SEEDS

POWER = 0.8  # the usual choice: Cohen, Statistical Power Analysis for the Behavioral Sciences, 1988


def difference(by_seed: pd.Series) -> dict[str, Any] | None:
    """
    Mean difference with two intervals, bootstrap and Student's t, and Student's p value; no winner yet.

    :param by_seed: the differences; NaN for a seed that one of the arms did not finish
    """
    differences = by_seed.dropna().tolist()
    if not differences:
        return None
    return {
        "seeds": len(differences),
        "differences": differences,
        "mean": interval(mean, np.array(differences)[:, None]),
        "student": student(differences),
        "p": _p(differences),
        "p_holm": None,
        "winner": None,
    }


def student(differences: list[float]) -> list[Any]:
    """Limits of Student's t interval for the mean."""
    if len(differences) < 2:
        return [None, None]
    half = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1) * scipy.stats.sem(differences))
    return [fmean(differences) - half, fmean(differences) + half]


def _p(differences: list[float]) -> float | None:
    """Student's p value of both sides; None for fewer seeds than can show a winner."""
    if len(differences) < FEW_SEEDS:
        return None
    # Equal differences do not have an error: p is 0 unless they are 0
    t = abs(fmean(differences)) / max(float(scipy.stats.sem(differences)), sys.float_info.min)
    return 2 * float(scipy.stats.t.sf(t, len(differences) - 1))


def call_winners(pairs: Sequence[tuple[list[str], dict[str, Any] | None]]) -> int:
    """
    Correct the p values of all comparisons of a report, and enter the winners.

    :param pairs: the two arms and their ``difference``
    :return: the number of comparisons
    """
    compared = [(arms, entry) for arms, entry in pairs if entry is not None and entry["p"] is not None]
    for (arms, entry), p in zip(compared, holm(np.array([entry["p"] for _, entry in compared])), strict=True):
        estimate, low, high = entry["mean"]
        # With such a p, Student's interval excludes 0 as well
        shown = p <= 1 - CONFIDENCE and (low > 0 or high < 0)
        entry["p_holm"], entry["winner"] = float(p), arms[int(estimate < 0)] if shown else None
    return len(compared)


def holm(p: np.ndarray) -> np.ndarray:
    """Adjust p values: the smallest of n is multiplied by n, the next by n − 1, …, and none may be below one before it."""
    # Each hypothesis is tested against those that have not been rejected yet
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def detectable(seeds: int, comparisons: int = 1) -> float | None:
    """
    Smallest true difference that Student's t shows with 80 % probability.

    :param seeds: number of paired differences
    :param comparisons: by how many the level is divided, as Holm's method does for the smallest p value
    :return: in standard deviations of the paired differences; None for fewer seeds than can show one
    """
    if seeds < FEW_SEEDS:
        return None
    limit = scipy.stats.t.isf((1 - CONFIDENCE) / 2 / comparisons, seeds - 1)
    # The noncentral distribution is that of the t value if there is a difference
    return float(scipy.optimize.brentq(lambda d: scipy.stats.nct.sf(limit, seeds - 1, d * seeds**0.5) - POWER, 0, 10 * limit))
