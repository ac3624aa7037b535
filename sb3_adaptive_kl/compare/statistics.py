"""
Compute `statistics.json` and `runs.csv` from the finished runs.

Timings are in `runs.csv` alone, so the statistics of a plan are the same on every machine and at every repetition.
"""

from collections.abc import Sequence
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from sb3_adaptive_kl.compare import intervals
from sb3_adaptive_kl.compare.intervals import AGGREGATES, CONFIDENCE, FINALS, interval, matrices
from sb3_adaptive_kl.compare.plan import Plan
from sb3_adaptive_kl.compare.protocol import LAST_EPISODES, ppo_paper
from sb3_adaptive_kl.compare.sensitivity import sensitivity
from sb3_adaptive_kl.compare.store import Result, updates_of
from sb3_adaptive_kl.compare.verdicts import call_winners, detectable, difference, student

Pairs = Sequence[tuple[str, str]]  # of arms

# The KL is within the band from target / BAND to BAND · target, for every arm with a target: where the paper's rule leaves β
# as it is (Schulman et al. 2017, section 4)
BAND = 1.5
# Threshold for environments where gymnasium does not specify one: this share of the way from random to the best arm
THRESHOLD_SHARE = 0.9
# Two sweeps over the same rollout may differ by this much, relative to the KL
ROUNDING = 1e-4
PROFILE_AT = np.linspace(0.0, 1.2, 61)


def compute(plan: Plan, results: Sequence[Result]) -> tuple[dict[str, Any], pd.DataFrame]:
    """
    Compute all statistics except timings, and the table of runs.

    :param plan: the plan. Of a sweep, only arms with the same value are compared.
    :param results: its finished runs, sorted by environment and arm
    :return: the content of statistics.json, where a statistic that cannot be computed, for example for lack of runs, is None;
        and that of runs.csv
    """
    settings: dict[str, Any] = {"seeds": plan.seeds, "confidence": CONFIDENCE, "samples": intervals.SAMPLES, "band": BAND}
    if not results:
        return {**settings, "environments": {}, "across": None, "protocol": None, "sensitivity": None}, pd.DataFrame()
    runs = pd.DataFrame([_row(result) for result in results]).astype({"reward_threshold": float})
    references = runs.groupby("env")[["random_return", "reward_threshold"]].mean()
    references["best"] = runs.groupby(["env", "arm"])["final_return"].mean().groupby("env").max()
    random, given, best = references["random_return"], references["reward_threshold"], references["best"]
    # Where no arm is shown to have learned, a share of the way to the best one would be noise
    beaten = pd.Series({env: _beats_random(rows) for env, rows in runs.groupby("env")})
    beaten &= best > random  # where arms have finished different seeds, random is not that of the best arm alone
    scale = (best - random).where(beaten)
    threshold = given.fillna(random + THRESHOLD_SHARE * scale)
    runs["steps_to_threshold"] = [result.steps_to(threshold[result.run.env]) for result in results]
    # As if every time step took the same time: a run stores only its total
    runs["seconds_to_threshold"] = runs["steps_to_threshold"] / runs["steps_per_second"]
    runs["score"] = (runs["final_return"] - runs["env"].map(random)) / runs["env"].map(scale)
    counted = runs[runs["score"].notna()]
    value = {arm: value for arms in plan.families.values() for value, arm in arms.items()}
    compared = [(a, b) for a, b in combinations(runs["arm"].unique(), 2) if value.get(a) == value.get(b)]
    environments = {
        env: {
            "random": random[env],
            "best": best[env],
            "beats_random": bool(beaten[env]),
            "threshold": _finite(threshold[env]),
            "threshold_source": "gymnasium" if given[env] == threshold[env] else "best arm",
            "arms": {arm: _arm(of_arm, [results[i] for i in of_arm.index]) for arm, of_arm in rows.groupby("arm", sort=False)},
            "pairs": _pairs(rows, compared),
        }
        for env, rows in runs.groupby("env", sort=False)
    }
    found = {
        "across": _across(counted, compared),
        "protocol": ppo_paper(runs) if plan.protocol == "ppo-paper" else None,
        "sensitivity": sensitivity(plan.families, counted) if plan.families else None,
    }
    pairs = [pair for environment in environments.values() for pair in environment["pairs"]]
    comparisons = call_winners([(pair["arms"], pair[kind]) for pair in pairs for kind in ("final", "area")])
    settings |= {
        "comparisons": comparisons,
        "detectable": detectable(plan.seeds),
        "detectable_corrected": detectable(plan.seeds, max(1, comparisons)),
    }
    return {**settings, "environments": environments, **found}, runs


def _row(result: Result) -> dict[str, Any]:
    run, summary = result.run, result.summary
    kl = _kl([result]) or {}
    return {
        **{key: getattr(run, key) for key in ("env", "arm", "algo", "seed")},
        **{key: summary[key] for key in ("timesteps", "reward_threshold", "seconds", "machine")},
        "final_return": result.final,
        "final_return_std": np.std(summary["final_returns"]),
        "random_return": np.mean(summary["random_returns"]),
        "last_return": result.episodes["return"].tail(LAST_EPISODES).mean(),
        "area": result.curve.mean(),  # the area under the learning curve, divided by the budget
        **{f"kl_{name}": value for name, value in kl.items()},
        "steps_per_second": summary["timesteps"] / summary["seconds"],
    }


# ---------------------------------------------------------------- one environment


def _beats_random(runs: pd.DataFrame) -> bool:
    """Whether some arm's Student's t interval of the difference from a random policy lies above 0: never with one seed."""
    gains = (runs["final_return"] - runs["random_return"]).groupby(runs["arm"])
    return any((student(gain.tolist())[0] or 0) > 0 for _, gain in gains)


def _arm(runs: pd.DataFrame, results: list[Result]) -> dict[str, Any]:
    final, area = runs[["final_return"]].to_numpy(), runs[["area"]].to_numpy()
    complete = not np.isnan(area).any()  # a run without a finished training episode does not have a curve
    curve = interval(lambda curves: curves.mean(axis=-2), np.array([result.curve for result in results]))
    return {
        "seeds": len(runs),
        "final": {name: interval(statistic, final) for name, statistic in FINALS.items()},
        # Computed per run, not from the curves: the bootstrap resamples every point of a curve independently
        "area": interval(intervals.mean, area) if complete else None,
        "reached": int(runs["steps_to_threshold"].count()),
        # A run that never reaches it is slower than every other
        "steps_to_threshold": _finite(np.median(runs["steps_to_threshold"].fillna(np.inf))),
        "kl": _kl(results),
        "curve": {"timesteps": results[0].points.tolist(), "mean": curve} if complete else None,
    }


def _kl(results: list[Result]) -> dict[str, Any] | None:
    """Summarize the KL of all updates of several runs, relative to the target if there is one."""
    updates = updates_of(results)
    if updates is None:
        return None
    kl, scale, has_target = updates["kl"], updates["step_scale"], bool(updates["target_kl"].notna().all())
    relative = kl / updates["target_kl"] if has_target else kl
    with np.errstate(invalid="ignore"):  # an update can leave an infinite KL
        return {
            "updates": len(kl),
            "median": _finite(kl.median()),
            "95 %": _finite(kl.quantile(0.95)),
            "largest": _finite(kl.max()),
            # Standard deviation of log₂(KL / target); of log₂ KL without a target, which is the same for a constant target
            "spread": _finite(np.log2(relative[relative > 0]).std(ddof=0)),
            "in_band": float(relative.between(1 / BAND, BAND).mean()) if has_target else None,
            "above_band": float((relative > BAND * (1 + ROUNDING)).mean()) if has_target else None,
            "worst_overshoot": _finite(relative.max()) if has_target else None,
            # How often a ceiling shortened the step, and the median share that was left of it
            "shortened": float((scale < 1).mean()) if scale.notna().all() else None,
            "shortened_to": _finite(scale[scale < 1].median()),
        }


def _finite(value: Any) -> float | None:
    """Replace infinity and NaN, which JSON does not have, by None."""
    return float(value) if np.isfinite(value) else None


def _pairs(runs: pd.DataFrame, compared: Pairs) -> list[dict[str, Any]]:
    """Compare two arms on the seeds that both finished."""
    final, area = (runs.pivot(index="seed", columns="arm", values=column) for column in ("final_return", "area"))
    return [
        {"arms": [a, b], "final": difference(final[a] - final[b]), "area": difference(area[a] - area[b])}
        for a, b in compared
        if a in final and b in final
    ]


# ---------------------------------------------------------------- across environments


def _across(counted: pd.DataFrame, compared: Pairs) -> dict[str, Any] | None:
    """
    Aggregate scores normalized to 0 for a random policy and 1 for the environment's best arm (its mean over seeds).

    Only environments where some arm is shown to beat random count, and for each arm only the seeds it finished on all of
    them. One environment alone says it all in its own units.
    """
    scores = matrices(counted, "score")
    if not scores or counted["env"].nunique() == 1:
        return None
    profile = partial(intervals.profile, at=PROFILE_AT)
    return {
        "environments": counted["env"].unique().tolist(),
        "arms": {
            arm: {"seeds": len(matrix), **{name: interval(statistic, matrix) for name, statistic in AGGREGATES.items()}}
            for arm, matrix in scores.items()
        },
        "probability_of_improvement": _improvements(scores, compared),
        "probability_of_improvement_while_learning": _improvements(matrices(counted, "area"), compared),
        "profile": {"at": PROFILE_AT.tolist(), "arms": {arm: interval(profile, matrix) for arm, matrix in scores.items()}},
    }


def _improvements(scores: dict[str, np.ndarray], compared: Pairs) -> list[dict[str, Any]]:
    """Probability that a run of one arm beats a run of another, averaged over the environments."""
    return [
        {"arms": [a, b], "probability": interval(intervals.probability_of_improvement, scores[a], scores[b])}
        for a, b in compared
        if a in scores and b in scores
    ]
