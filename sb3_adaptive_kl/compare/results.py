"""Read the finished runs from disk: learning curves, updates, and the other contents of a run's folder."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd

from sb3_adaptive_kl.compare.plan import Plan
from sb3_adaptive_kl.compare.store import Store

# Points of a learning curve; each is the mean of the episodes that ended in the 5 % of the budget before it
N_POINTS, WINDOW = 100, 0.05


@dataclass(frozen=True)
class Result:
    """One finished run, read from its folder."""

    folder: Path
    summary: dict[str, Any]

    @cached_property
    def updates(self) -> pd.DataFrame | None:
        """Rows of `Ruler`; None for an algorithm it cannot measure."""
        path = self.folder / "updates.csv"
        return pd.read_csv(path) if path.is_file() else None

    @cached_property
    def episodes(self) -> pd.DataFrame:
        """Rows of `Recorder`, restricted to training episodes that ended within the budget."""
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
        """Time steps of the learning curve; the last is the end of the budget."""
        return np.arange(1, N_POINTS + 1) * self.budget / N_POINTS

    @cached_property
    def curve(self) -> np.ndarray | None:
        """Mean return of training episodes at ``points``; None if no episode ended within the budget."""
        ended, returns = self.episodes["timesteps"].to_numpy(), self.episodes["return"].to_numpy()
        if not len(ended):
            return None
        last = np.searchsorted(ended, self.points, side="right")
        first = np.searchsorted(ended, self.points - WINDOW * self.budget, side="right")
        sums = np.concatenate([[0.0], np.cumsum(returns)])
        with np.errstate(invalid="ignore"):
            means = (sums[last] - sums[first]) / (last - first)
        # Where no episode ended, repeat the last mean; before the first episode, the first mean
        return np.asarray(pd.Series(means).ffill().bfill())

    @property
    def area(self) -> float | None:
        """Area under the learning curve divided by the budget: the mean return while learning."""
        return None if self.curve is None else float(self.curve.mean())

    def steps_to(self, threshold: float | None) -> float | None:
        """Time steps until the learning curve reaches the threshold; None if it never does."""
        if self.curve is None or threshold is None:
            return None
        started = self.points >= self.episodes["timesteps"].iloc[0]
        reached = self.points[(self.curve >= threshold) & started]
        return float(reached[0]) if len(reached) else None


def updates_of(runs: Iterable[Result]) -> pd.DataFrame | None:
    """Concatenate the measured updates of several runs; None if there are none."""
    frames = [run.updates for run in runs if run.updates is not None and len(run.updates)]
    return pd.concat(frames) if frames else None


Results = dict[str, dict[str, dict[int, Result]]]  # environment → arm → seed


def read(plan: Plan, store: Store) -> Results:
    """Read all finished runs of a plan."""
    results: Results = {env: {arm: {} for arm in plan.names} for env in plan.environments}
    for run, folder in store.results(plan):
        results[run.env][run.arm][run.seed] = Result(folder, json.loads((folder / "run.json").read_text()))
    return results
