"""The runs on disk, read: learning curves, updates, and what else a run's folder holds."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd

from sb3_adaptive_kl.compare.plan import Plan
from sb3_adaptive_kl.compare.store import Store

# A learning curve: this many points, each the mean of the episodes that ended in the 5 % of the budget before it
N_POINTS, WINDOW = 100, 0.05


@dataclass(frozen=True)
class Result:
    """One finished run, read from its folder."""

    folder: Path
    summary: dict[str, Any]

    @cached_property
    def updates(self) -> pd.DataFrame | None:
        """Rows of `Ruler`, None for an algorithm that it cannot measure."""
        path = self.folder / "updates.csv"
        return pd.read_csv(path) if path.is_file() else None

    @cached_property
    def episodes(self) -> pd.DataFrame:
        """Rows of `Recorder`, of the training episodes that ended within the budget."""
        episodes = pd.read_csv(self.folder / "episodes.csv")
        return episodes[episodes["timesteps"] <= self.budget]

    @property
    def final(self) -> float:
        """Mean return of the final policy."""
        return fmean(self.summary["final_returns"])

    @property
    def budget(self) -> int:
        return int(self.summary["hyperparameters"]["n_timesteps"])

    @property
    def points(self) -> np.ndarray:
        """The time steps of the learning curve, the last at the end of the budget."""
        return np.arange(1, N_POINTS + 1) * self.budget / N_POINTS

    @cached_property
    def curve(self) -> np.ndarray | None:
        """Mean return of training episodes at ``points``, None if none ended within the budget."""
        ended, returns = self.episodes["timesteps"].to_numpy(), self.episodes["return"].to_numpy()
        if not len(ended):
            return None
        last = np.searchsorted(ended, self.points, side="right")
        first = np.searchsorted(ended, self.points - WINDOW * self.budget, side="right")
        sums = np.concatenate([[0.0], np.cumsum(returns)])
        with np.errstate(invalid="ignore"):
            means = (sums[last] - sums[first]) / (last - first)
        # Between the ends of long episodes the last mean holds; before the first, the first
        return np.asarray(pd.Series(means).ffill().bfill())

    @property
    def area(self) -> float | None:
        """Area under the learning curve over the budget: the mean return while learning."""
        return None if self.curve is None else float(self.curve.mean())

    def steps_to(self, threshold: float | None) -> float | None:
        """Time steps until the learning curve reaches the threshold, None if it never does."""
        if self.curve is None or threshold is None:
            return None
        begun = self.points >= self.episodes["timesteps"].iloc[0]
        reached = self.points[(self.curve >= threshold) & begun]
        return float(reached[0]) if len(reached) else None


Results = dict[str, dict[str, dict[int, Result]]]  # environment → arm → seed


def read(plan: Plan, store: Store) -> Results:
    """Those that are finished."""
    results: Results = {env: {arm: {} for arm in plan.arms} for env in plan.environments}
    for run, folder in store.results(plan):
        results[run.env][run.arm][run.seed] = Result(folder, json.loads((folder / "run.json").read_text()))
    return results
