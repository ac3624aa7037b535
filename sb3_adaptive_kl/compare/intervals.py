"""
Aggregate scores and their 95 % bootstrap intervals, as in rliable (Agarwal et al. 2021, https://arxiv.org/abs/2108.13264),
whose repository was archived in 2025.

Scores have the shape (..., runs, environments). Statistics reduce the last two axes, so one call evaluates all bootstrap
samples.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats

Statistic = Callable[..., Any]

SEED = 0
SAMPLES = 5000
CONFIDENCE = 0.95


def interval(statistic: Statistic, *scores: np.ndarray) -> list[Any]:
    """
    Estimate a statistic with its percentile interval. Runs are resampled within each environment, the same at every call.

    :param statistic: function of as many arrays as there are ``scores``
    :param scores: matrices of shape (runs, environments), or (runs, points) for curves
    :return: estimate, lower and upper limit: numbers, or lists for a statistic of several values. The limits of a single run
        are None.
    """
    estimate = statistic(*scores).tolist()
    if any(len(matrix) < 2 for matrix in scores):
        return [estimate, None, None]
    # Its own generator, so that a report repeats to the last digit
    generator = np.random.default_rng(SEED)
    drawn = [generator.integers(len(matrix), size=(SAMPLES, *matrix.shape)) for matrix in scores]
    samples = statistic(*(matrix[rows, np.arange(matrix.shape[1])] for matrix, rows in zip(scores, drawn, strict=True)))
    return [estimate, *np.quantile(samples, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0).tolist()]


def matrices(runs: pd.DataFrame, column: str) -> dict[str, np.ndarray]:
    """Arm → a column of its runs, shape (seeds, environments), of the seeds that have a value on all environments."""
    wide = runs.pivot(index=["arm", "seed"], columns="env", values=column).dropna()
    return {arm: wide.loc[arm].to_numpy() for arm in runs["arm"].unique() if arm in wide.index}


mean: Statistic = partial(np.mean, axis=(-2, -1))


def iqm(scores: np.ndarray) -> Any:
    """Compute the interquartile mean: the mean of the middle half of all scores."""
    return scipy.stats.trim_mean(scores.reshape(*scores.shape[:-2], -1), 0.25, axis=-1)


def optimality_gap(scores: np.ndarray) -> Any:
    """Compute by how much scores fall short of 1 on average, where more than 1 counts as 1."""
    return 1 - np.minimum(scores, 1).mean(axis=(-2, -1))


def profile(scores: np.ndarray, at: np.ndarray) -> Any:
    """Compute the share of runs above each value of ``at``."""
    return (scores[..., None] > at).mean(axis=(-3, -2))


def probability_of_improvement(a: np.ndarray, b: np.ndarray) -> Any:
    """
    Compute P(a > b) + ½ P(a = b), averaged over environments.

    :param a: scores of one arm, shape (..., runs, environments)
    :param b: scores of another; its number of runs may differ
    """
    a, b = a[..., :, None, :], b[..., None, :, :]
    return ((a > b).mean(axis=(-3, -2, -1)) + (a >= b).mean(axis=(-3, -2, -1))) / 2


def median_of_environments(scores: np.ndarray) -> Any:
    """Take the median of the environments' means."""
    return np.median(scores.mean(axis=-2), axis=-1)


# Of an environment, and across environments
FINALS: dict[str, Statistic] = {"mean": mean, "median": partial(np.median, axis=(-2, -1)), "iqm": iqm}
AGGREGATES = {"iqm": iqm, "median": median_of_environments, "mean": mean, "optimality_gap": optimality_gap}
