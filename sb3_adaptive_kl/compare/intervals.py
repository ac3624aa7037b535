"""
Bootstrap intervals: 95 % percentile intervals of rliable's bootstrap, which resamples seeds within each environment (Agarwal
et al. 2021, https://arxiv.org/abs/2108.13264).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from rliable import library as rly

SEED = 0
SAMPLES = 5000
CONFIDENCE = 0.95

Interval = list[float | None]  # estimate, lower and upper limit; the limits of a single run are None


def intervals(statistic: Callable[..., np.ndarray], *scores: np.ndarray) -> list[Interval]:
    """
    Bootstrap intervals, the same at every call.

    :param statistic: function of as many matrices as there are ``scores``, returns an array of shape (K,)
    :param scores: matrices of shape (runs, environments), or (runs, points) for a curve
    :return: K estimates with their limits
    """
    if any(len(matrix) < 2 for matrix in scores):
        return [[float(estimate), None, None] for estimate in statistic(*scores)]
    with _seeded(SEED):
        estimates, limits = rly.get_interval_estimates(
            {"": scores[0] if len(scores) == 1 else list(scores)},
            statistic,
            reps=SAMPLES,
            confidence_interval_size=CONFIDENCE,
        )
    low, high = limits[""]
    return [[float(value) for value in triple] for triple in zip(estimates[""], low, high, strict=True)]


def transposed(triples: list[Interval]) -> list[list[float | None]]:
    """Split intervals into all estimates, all lower limits and all upper limits."""
    return [list(values) for values in zip(*triples, strict=True)]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed NumPy's global generator, which rliable 1.2 draws from even if it is given a ``random_state``."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)


def probability_of_improvement(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """
    Compute rliable's probability of improvement, P(a > b) + ½ P(a = b) averaged over environments. rliable's own function runs
    a test of scipy for each bootstrap sample, which takes hundreds of times as long.

    :param a: scores of one arm, shape (runs, environments)
    :param b: scores of another, with as many environments
    :return: shape (1,)
    """
    wins = (a[:, None] > b) + 0.5 * (a[:, None] == b)
    return np.array([wins.mean()])
