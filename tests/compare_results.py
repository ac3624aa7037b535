"""Statistics of finished runs, which the fixture `make` writes to disk."""

from sb3_adaptive_kl.compare import statistics


def computed(results):
    return statistics.compute(5, results)[0]


def compute(make, arms, environments=("E",), **kwargs):
    """Compute the statistics of arms given as lists of final returns, one per seed, the same on each environment."""
    results = [
        make(final=(final,), arm=arm, seed=seed, env=env, **kwargs)
        for env in environments
        for arm, finals in arms.items()
        for seed, final in enumerate(finals)
    ]
    return computed(results)
