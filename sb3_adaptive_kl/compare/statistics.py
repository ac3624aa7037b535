"""
The third stage: from the runs on disk to numbers, `statistics.json`, `timings.json` and `runs.csv`.

    python -m sb3_adaptive_kl.compare.statistics FOLDER

Intervals are rliable's: percentiles of a bootstrap that resamples seeds within each environment (Agarwal et al. 2021,
https://arxiv.org/abs/2108.13264), 95 %. What depends on the clock stands apart, so that the statistics of a plan are the same
wherever and however often it is carried out.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
from rliable import library as rly
from rliable import metrics

from sb3_adaptive_kl.compare.plan import Plan
from sb3_adaptive_kl.compare.results import Result, Results, read
from sb3_adaptive_kl.compare.store import Store, on_folder

STATISTICS_FILE, TIMINGS_FILE, RUNS_FILE = "statistics.json", "timings.json", "runs.csv"

BOOTSTRAP_SEED = 0
BOOTSTRAP_SAMPLES = 5000
CONFIDENCE = 0.95
# "Learned": gymnasium's threshold, or this far from a random policy to the best arm
THRESHOLD_SHARE = 0.9
# Of runs.csv
KL_COLUMNS = ("median", "largest", "in_band", "worst_overshoot", "spread")
PROFILE_AT = np.linspace(0.0, 1.2, 61)

Interval = list[float | None]  # estimate, lower and upper limit; no limits from a single run


def write(plan: Plan, store: Store) -> None:
    """Write the three files."""
    results = read(plan, store)
    statistics = compute(plan, results)
    store.write(STATISTICS_FILE, json.dumps(statistics, indent=1, allow_nan=False))
    store.write(TIMINGS_FILE, json.dumps(timings(results), indent=1, allow_nan=False))
    store.write(RUNS_FILE, table(results, statistics))


def compute(plan: Plan, results: Results) -> dict[str, Any]:
    """All statistics that do not depend on the clock; what cannot be computed, for want of runs for instance, is None."""
    environments = {env: _environment(arms) for env, arms in results.items() if any(arms.values())}
    return {
        "seeds": plan.seeds,
        "confidence": CONFIDENCE,
        "environments": environments,
        "across": _across(plan, results, environments),
    }


# ---------------------------------------------------------------- one environment


def _environment(arms: dict[str, dict[int, Result]]) -> dict[str, Any]:
    arms = {arm: runs for arm, runs in arms.items() if runs}
    everything = [run for runs in arms.values() for run in runs.values()]
    random = fmean(value for run in everything for value in run.summary["random_returns"])
    best = max(fmean(run.final for run in runs.values()) for runs in arms.values())
    solved = everything[0].summary["reward_threshold"]
    if solved is not None:
        threshold, source = solved, "gymnasium's reward threshold"
    elif best > random:
        threshold, source = random + THRESHOLD_SHARE * (best - random), "90 % from random to the best arm"
    else:
        threshold, source = None, "none, since no arm is better than random"
    return {
        "random": random,
        "best": best,
        "threshold": threshold,
        "threshold_source": source,
        "arms": {arm: _arm(list(runs.values()), threshold) for arm, runs in arms.items()},
        "pairs": [_pair(a, arms[a], b, arms[b]) for a, b in combinations(arms, 2)],
    }


def _arm(runs: list[Result], threshold: float | None) -> dict[str, Any]:
    mean, median, iqm = intervals(_mean_median_iqm, np.array([[run.final] for run in runs]))
    curves = [run.curve for run in runs if run.curve is not None]
    complete = len(curves) == len(runs)  # a run that ended no episode has no curve
    steps = [run.steps_to(threshold) for run in runs]
    middle = float(np.median([np.inf if step is None else step for step in steps]))
    return {
        "seeds": len(runs),
        "final": {"mean": mean, "median": median, "iqm": iqm},
        # Not from the curves: the bootstrap resamples each column by itself, as if the points of a curve were independent
        "area": intervals(lambda areas: np.array([areas.mean()]), np.array([[run.area] for run in runs]))[0]
        if complete
        else None,
        "reached": sum(step is not None for step in steps),
        "steps_to_threshold": middle if np.isfinite(middle) else None,
        "kl": _kl(runs),
        "curve": {
            "timesteps": runs[0].points.tolist(),
            "mean": _transposed(intervals(lambda curves: curves.mean(axis=0), np.array(curves))),
        }
        if complete
        else None,
    }


def _mean_median_iqm(scores: np.ndarray) -> np.ndarray:
    return np.array([scores.mean(), np.median(scores), metrics.aggregate_iqm(scores)])


def _kl(runs: list[Result]) -> dict[str, Any] | None:
    """How far updates went, over all of all seeds; against the target where there is one."""
    frames = [run.updates for run in runs if run.updates is not None and len(run.updates)]
    if not frames:
        return None
    updates = pd.concat(frames)
    kl, target = updates["kl"].to_numpy(), updates["target_kl"].to_numpy(dtype=float)
    aimed = not np.isnan(target).any()
    tolerance = runs[0].summary["kl_tolerance"]
    over_target = kl / target if aimed else kl
    moved = over_target[over_target > 0]
    return {
        "updates": len(kl),
        "median": float(np.median(kl)),
        "95 %": float(np.quantile(kl, 0.95)),
        "largest": float(kl.max()),
        # Of log₂(KL / target); without a target of log₂ KL, which is the same for a constant target
        "spread": float(np.log2(moved).std()) if len(moved) else None,
        "in_band": float(np.mean((over_target >= 1 / tolerance) & (over_target <= tolerance))) if aimed else None,
        "worst_overshoot": float(over_target.max()) if aimed else None,
    }


def _pair(a: str, runs_a: dict[int, Result], b: str, runs_b: dict[int, Result]) -> dict[str, Any]:
    """How a differs from b, of the seeds that both finished."""
    pairs = [(runs_a[seed], runs_b[seed]) for seed in runs_a if seed in runs_b]
    areas = [(x.area, y.area) for x, y in pairs if x.area is not None and y.area is not None]
    return {
        "arms": [a, b],
        "final": _difference(a, b, [x.final - y.final for x, y in pairs]),
        "area": _difference(a, b, [x - y for x, y in areas]),
    }


def _difference(a: str, b: str, differences: list[float]) -> dict[str, Any] | None:
    """
    The mean difference a − b with two intervals, the bootstrap's and Student's t.

    An arm is called the winner if 0 lies outside of both: the bootstrap's is too narrow with few seeds. With two seeds it
    cannot be told at all.
    """
    if not differences:
        return None
    (mean,) = intervals(lambda values: np.array([values.mean()]), np.array(differences)[:, None])
    student = _student(differences)
    limits = (mean[1:], student)
    outside = [low is not None and high is not None and (low > 0 or high < 0) for low, high in limits]
    shown = len(differences) > 2 and all(outside)
    return {
        "seeds": len(differences),
        "differences": differences,
        "mean": mean,
        "student": student,
        "winner": (a if fmean(differences) > 0 else b) if shown else None,
    }


def _student(differences: list[float]) -> list[float | None]:
    """Limits of Student's interval for the mean; where all differences are the same it has no width."""
    if len(differences) < 2:
        return [None, None]
    if np.ptp(differences) == 0:
        return [differences[0], differences[0]]
    found = scipy.stats.ttest_1samp(differences, 0.0).confidence_interval(CONFIDENCE)
    return [float(found.low), float(found.high)]


# ---------------------------------------------------------------- across environments


def _across(plan: Plan, results: Results, environments: dict[str, Any]) -> dict[str, Any] | None:
    """
    Of scores normalised to 0 for a random policy and 1 for the environment's best arm (its mean over seeds). Only environments
    where an arm is better than random, and seeds that an arm finished on all of them, count.
    """
    counted = [env for env in results if env in environments and environments[env]["best"] > environments[env]["random"]]
    scores = {}
    for arm in plan.arms:
        seeds = [seed for seed in range(plan.seeds) if all(seed in results[env][arm] for env in counted)]
        if counted and seeds:
            scores[arm] = np.array(
                [[_normalised(results[env][arm][seed], environments[env]) for env in counted] for seed in seeds]
            )
    if not scores:
        return None
    names = ("iqm", "median", "mean", "optimality_gap")
    return {
        "environments": counted,
        "arms": {
            arm: {"seeds": len(matrix), **dict(zip(names, intervals(_aggregates, matrix), strict=True))}
            for arm, matrix in scores.items()
        },
        "probability_of_improvement": [
            {"arms": [a, b], "probability": intervals(_probability_of_improvement, scores[a], scores[b])[0]}
            for a, b in combinations(scores, 2)
        ],
        "profile": {
            "at": PROFILE_AT.tolist(),
            "arms": {
                arm: [list(value) for value in zip(*intervals(_profile, matrix), strict=True)]
                for arm, matrix in scores.items()
            },
        },
    }


def _normalised(run: Result, environment: dict[str, Any]) -> float:
    return float((run.final - environment["random"]) / (environment["best"] - environment["random"]))


def _aggregates(scores: np.ndarray) -> np.ndarray:
    return np.array(
        [
            metrics.aggregate_iqm(scores),
            metrics.aggregate_median(scores),
            metrics.aggregate_mean(scores),
            metrics.aggregate_optimality_gap(scores),
        ]
    )


def _probability_of_improvement(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.array([metrics.probability_of_improvement(a, b)])


def _profile(scores: np.ndarray) -> np.ndarray:
    """Share of runs above each score."""
    return np.asarray((scores[..., None] > PROFILE_AT).mean(axis=(0, 1)))


# ---------------------------------------------------------------- intervals


def intervals(statistic: Callable[..., np.ndarray], *scores: np.ndarray) -> list[Interval]:
    """
    :param statistic: function of as many matrices as there are scores, that gives K numbers
    :param scores: matrices of shape (runs, environments), or (runs, points) for a curve
    :return: K estimates with their limits, the same at every call
    """
    if any(len(matrix) < 2 for matrix in scores):
        return [[float(estimate), None, None] for estimate in statistic(*scores)]
    with _seeded(BOOTSTRAP_SEED):
        estimates, limits = rly.get_interval_estimates(
            {"": scores[0] if len(scores) == 1 else list(scores)},
            statistic,
            reps=BOOTSTRAP_SAMPLES,
            confidence_interval_size=CONFIDENCE,
        )
    low, high = limits[""]
    return [[float(value) for value in triple] for triple in zip(estimates[""], low, high, strict=True)]


def _transposed(found: list[Interval]) -> list[list[float | None]]:
    """All estimates, all lower limits, all upper limits."""
    return [list(values) for values in zip(*found, strict=True)]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """rliable 1.2 takes a ``random_state`` and draws from NumPy's global generator all the same."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)


# ---------------------------------------------------------------- tables


def timings(results: Results) -> dict[str, Any]:
    """Environment → arm → mean seconds of a run and time steps per second, without the ruler's share."""
    return {
        env: {
            arm: {
                "seconds": fmean(run.summary["seconds"] for run in runs.values()),
                "steps_per_second": fmean(run.summary["timesteps"] / run.summary["seconds"] for run in runs.values()),
            }
            for arm, runs in arms.items()
            if runs
        }
        for env, arms in results.items()
    }


def table(results: Results, statistics: dict[str, Any]) -> str:
    """One row for each run."""
    rows = []
    for env, arms in results.items():
        for arm, runs in arms.items():
            for seed, run in runs.items():
                kl = _kl([run]) or {}
                rows.append(
                    {
                        "env": env,
                        "arm": arm,
                        "algo": run.summary["algo"],
                        "seed": seed,
                        "timesteps": run.summary["timesteps"],
                        "final_return": run.final,
                        "final_return_std": float(np.std(run.summary["final_returns"])),
                        "area": run.area,
                        "steps_to_threshold": run.steps_to(statistics["environments"][env]["threshold"]),
                        **{
                            f"kl_{name}": kl.get(name)
                            for name in ("median", "largest", "in_band", "worst_overshoot", "spread")
                        },
                        "seconds": run.summary["seconds"],
                        "steps_per_second": run.summary["timesteps"] / run.summary["seconds"],
                        "machine": run.summary["machine"],
                    }
                )
    output = io.StringIO()
    writer = csv.DictWriter(output, rows[0].keys() if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return output.getvalue()


if __name__ == "__main__":
    on_folder(write)
