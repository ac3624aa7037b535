"""
The third stage: compute `statistics.json`, `timings.json` and `runs.csv` from the runs on disk.

    python -m sb3_adaptive_kl.compare.statistics FOLDER

Timings have their own file, so the statistics of a plan are the same on every machine and at every repetition.
"""

import csv
import io
import json
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
from rliable import metrics

from sb3_adaptive_kl.compare.intervals import CONFIDENCE, intervals, probability_of_improvement, transposed
from sb3_adaptive_kl.compare.plan import Plan
from sb3_adaptive_kl.compare.results import Result, Results, read, updates_of
from sb3_adaptive_kl.compare.store import Store, on_folder

STATISTICS_FILE, TIMINGS_FILE, RUNS_FILE = "statistics.json", "timings.json", "runs.csv"

# Threshold for environments where gymnasium does not specify one: this share of the way from random to the best arm
THRESHOLD_SHARE = 0.9
# Two sweeps over the same rollout may differ by this much, relative to the KL
ROUNDING = 1e-4
# Entries of `_kl` that go into runs.csv
KL_COLUMNS = ("median", "largest", "in_band", "above_band", "worst_overshoot", "spread", "shortened", "shortened_to")
RUNS_COLUMNS = (
    "env", "arm", "algo", "seed",
    "timesteps", "final_return", "final_return_std", "area", "steps_to_threshold",
    *(f"kl_{name}" for name in KL_COLUMNS),
    "seconds", "steps_per_second", "machine",
)  # fmt: skip
PROFILE_AT = np.linspace(0.0, 1.2, 61)


def write(plan: Plan, store: Store) -> None:
    """Compute and write the three files."""
    results = read(plan, store)
    statistics = compute(plan, results)
    store.write(STATISTICS_FILE, json.dumps(statistics, indent=1, allow_nan=False))
    store.write(TIMINGS_FILE, json.dumps(timings(results), indent=1, allow_nan=False))
    store.write(RUNS_FILE, table(results, statistics))


def compute(plan: Plan, results: Results) -> dict[str, Any]:
    """Compute all statistics except timings. A statistic that cannot be computed, for example for lack of runs, is None."""
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
    all_runs = [run for runs in arms.values() for run in runs.values()]
    random = fmean(value for run in all_runs for value in run.summary["random_returns"])
    best = max(fmean(run.final for run in runs.values()) for runs in arms.values())
    reward_threshold = all_runs[0].summary["reward_threshold"]
    if reward_threshold is not None:
        threshold, source = reward_threshold, "gymnasium's reward threshold"
    elif best > random:
        threshold, source = random + THRESHOLD_SHARE * (best - random), "90 % of the way from random to the best arm"
    else:
        threshold, source = None, "none, because no arm is better than random"
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
    complete = len(curves) == len(runs)  # a run without a finished training episode does not have a curve
    steps = [run.steps_to(threshold) for run in runs]
    median_steps = np.median([np.inf if step is None else step for step in steps])
    return {
        "seeds": len(runs),
        "final": {"mean": mean, "median": median, "iqm": iqm},
        # Computed per run, not from the curves: the bootstrap resamples every point of a curve independently
        "area": intervals(lambda areas: np.array([areas.mean()]), np.array([[run.area] for run in runs]))[0]
        if complete
        else None,
        "reached": sum(step is not None for step in steps),
        "steps_to_threshold": _finite(median_steps),
        "kl": _kl(runs),
        "curve": {
            "timesteps": runs[0].points.tolist(),
            "mean": transposed(intervals(lambda curves: curves.mean(axis=0), np.array(curves))),
        }
        if complete
        else None,
    }


def _mean_median_iqm(scores: np.ndarray) -> np.ndarray:
    return np.array([scores.mean(), np.median(scores), metrics.aggregate_iqm(scores)])


def _kl(runs: list[Result]) -> dict[str, Any] | None:
    """Summarize the KL of all updates of several runs, relative to the target if there is one."""
    updates = updates_of(runs)
    if updates is None:
        return None
    kl, target = updates["kl"].to_numpy(), updates["target_kl"].to_numpy(dtype=float)
    has_target = not np.isnan(target).any()
    tolerance = runs[0].summary["kl_tolerance"]
    relative = kl / target if has_target else kl
    changed = relative[relative > 0]
    with np.errstate(invalid="ignore"):  # an update can leave an infinite KL
        return {
            "updates": len(kl),
            "median": _finite(np.median(kl)),
            "95 %": _finite(np.quantile(kl, 0.95)),
            "largest": _finite(kl.max()),
            # Standard deviation of log₂(KL / target); of log₂ KL without a target, which is the same for a constant target
            "spread": _finite(np.log2(changed).std()) if len(changed) else None,
            "in_band": float(np.mean((relative >= 1 / tolerance) & (relative <= tolerance))) if has_target else None,
            "above_band": float(np.mean(relative > tolerance * (1 + ROUNDING))) if has_target else None,
            "worst_overshoot": _finite(relative.max()) if has_target else None,
            **_step_back(updates),
        }


def _step_back(updates: pd.DataFrame) -> dict[str, float | None]:
    """Say how often a ceiling shortened the step, and the median share that was left of it. A study of 0.1.0 does not know."""
    if "step_scale" not in updates or updates["step_scale"].isna().any():
        return {"shortened": None, "shortened_to": None}
    scale = updates["step_scale"].to_numpy()
    shortened = scale[scale < 1]
    return {
        "shortened": len(shortened) / len(scale),
        "shortened_to": float(np.median(shortened)) if len(shortened) else None,
    }


def _finite(value: float | np.floating[Any]) -> float | None:
    """Replace infinity and NaN, which JSON does not have, by None."""
    return float(value) if np.isfinite(value) else None


def _pair(a: str, runs_a: dict[int, Result], b: str, runs_b: dict[int, Result]) -> dict[str, Any]:
    """Compare arm a with arm b on the seeds that both finished."""
    pairs = [(runs_a[seed], runs_b[seed]) for seed in runs_a if seed in runs_b]
    areas = [(x.area, y.area) for x, y in pairs if x.area is not None and y.area is not None]
    return {
        "arms": [a, b],
        "final": _difference(a, b, [x.final - y.final for x, y in pairs]),
        "area": _difference(a, b, [x - y for x, y in areas]),
    }


def _difference(a: str, b: str, differences: list[float]) -> dict[str, Any] | None:
    """
    Mean difference a − b with two intervals: bootstrap and Student's t.

    An arm is the winner only if 0 lies outside both intervals, because the bootstrap's is too narrow with few seeds. Two seeds
    never show a winner.
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
    """Limits of Student's t interval for the mean; its width is zero if all differences are equal."""
    if len(differences) < 2:
        return [None, None]
    if np.ptp(differences) == 0:
        return [differences[0], differences[0]]
    limits = scipy.stats.ttest_1samp(differences, 0.0).confidence_interval(CONFIDENCE)
    return [float(limits.low), float(limits.high)]


# ---------------------------------------------------------------- across environments


def _across(plan: Plan, results: Results, environments: dict[str, Any]) -> dict[str, Any] | None:
    """
    Aggregate scores normalized to 0 for a random policy and 1 for the environment's best arm (its mean over seeds).

    Only environments where some arm is better than random count, and for each arm only the seeds it finished on all of them.
    """
    counted = [env for env in results if env in environments and environments[env]["best"] > environments[env]["random"]]
    scores = {}
    for arm in plan.names:
        seeds = [seed for seed in plan.seed_numbers if all(seed in results[env][arm] for env in counted)]
        if counted and seeds:
            scores[arm] = np.array(
                [[_normalized(results[env][arm][seed], environments[env]) for env in counted] for seed in seeds]
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
        "probability_of_improvement": _improvements(scores),
        "probability_of_improvement_while_learning": _improvements(_areas(plan, results, counted)),
        "profile": {
            "at": PROFILE_AT.tolist(),
            "arms": {arm: transposed(intervals(_profile, matrix)) for arm, matrix in scores.items()},
        },
    }


def _areas(plan: Plan, results: Results, environments: list[str]) -> dict[str, np.ndarray]:
    """Arm → mean returns while learning, shape (seeds, environments), over the seeds that have one on all environments."""
    areas = {}
    for arm in plan.names:
        rows = [
            [results[env][arm][seed].area for env in environments if seed in results[env][arm]] for seed in plan.seed_numbers
        ]
        complete = [row for row in rows if len(row) == len(environments) and None not in row]
        if complete:
            areas[arm] = np.array(complete, dtype=float)
    return areas


def _improvements(scores: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Probability that a run of one arm beats a run of another, averaged over the environments, for every pair of arms."""
    return [
        {"arms": [a, b], "probability": intervals(probability_of_improvement, scores[a], scores[b])[0]}
        for a, b in combinations(scores, 2)
    ]


def _normalized(run: Result, environment: dict[str, Any]) -> float:
    return float((run.final - environment["random"]) / (environment["best"] - environment["random"]))


def _aggregates(scores: np.ndarray) -> np.ndarray:
    """Compute IQM, median, mean and optimality gap."""
    return np.array(
        [
            metrics.aggregate_iqm(scores),
            metrics.aggregate_median(scores),
            metrics.aggregate_mean(scores),
            metrics.aggregate_optimality_gap(scores),
        ]
    )


def _profile(scores: np.ndarray) -> np.ndarray:
    """Share of runs above each score of ``PROFILE_AT``."""
    return np.asarray((scores[..., None] > PROFILE_AT).mean(axis=(0, 1)))


# ---------------------------------------------------------------- tables


def timings(results: Results) -> dict[str, Any]:
    """Environment → arm → mean seconds per run and time steps per second, both without the time of the ruler."""
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
    """Content of runs.csv: one row per run."""
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow(RUNS_COLUMNS)
    for env, arms in results.items():
        for arm, runs in arms.items():
            for seed, run in runs.items():
                writer.writerow([env, arm, run.summary["algo"], seed, *_row(run, statistics["environments"][env])])
    return output.getvalue()


def _row(run: Result, environment: dict[str, Any]) -> list[Any]:
    """Values of a run in runs.csv, from its time steps on."""
    kl = _kl([run]) or {}
    return [
        run.summary["timesteps"],
        run.final,
        float(np.std(run.summary["final_returns"])),
        run.area,
        run.steps_to(environment["threshold"]),
        *(kl.get(name) for name in KL_COLUMNS),
        run.summary["seconds"],
        run.summary["timesteps"] / run.summary["seconds"],
        run.summary["machine"],
    ]


if __name__ == "__main__":
    on_folder(write)
