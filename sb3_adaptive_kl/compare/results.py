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

from sb3_adaptive_kl.compare.plan import Run
from sb3_adaptive_kl.compare.store import Store

# Points of a learning curve; each is the mean of the episodes that ended in the 5 % of the budget before it
N_POINTS, WINDOW = 100, 0.05


@dataclass(frozen=True)
class Result:
    """One finished run, read from its folder."""

    run: Run
    summary: dict[str, Any]
    episodes: pd.DataFrame  # rows of `Recorder`, of training episodes that ended within the budget
    updates: pd.DataFrame | None  # rows of `Ruler`; None for an algorithm it cannot measure

    @classmethod
    def read(cls, run: Run, folder: Path) -> "Result":
        summary = json.loads((folder / "run.json").read_text())
        episodes = pd.read_csv(folder / "episodes.csv").query("timesteps <= @run.budget")
        updates = folder / "updates.csv"
        return cls(run, summary, episodes, pd.read_csv(updates) if updates.is_file() else None)

    @property
    def final(self) -> float:
        """Mean return of the final policy."""
        return fmean(self.summary["final_returns"])

    @property
    def points(self) -> np.ndarray:
        """Time steps of the learning curve; the last is the end of the budget."""
        return np.arange(1, N_POINTS + 1) * self.run.budget / N_POINTS

    @cached_property
    def curve(self) -> np.ndarray:
        """Mean return of training episodes at ``points``; NaN if no episode ended within the budget."""
        ended = self.episodes["timesteps"].to_numpy()
        last = np.searchsorted(ended, self.points, side="right")
        first = np.searchsorted(ended, self.points - WINDOW * self.run.budget, side="right")
        sums = np.concatenate([[0.0], np.cumsum(self.episodes["return"])])
        with np.errstate(invalid="ignore"):
            means = (sums[last] - sums[first]) / (last - first)
        # Where no episode ended, repeat the last mean; before the first episode, the first mean
        return np.asarray(pd.Series(means).ffill().bfill())

    @property
    def area(self) -> float:
        """Area under the learning curve divided by the budget: the mean return while learning. NaN without a curve."""
        return float(self.curve.mean())

    def steps_to(self, threshold: float | None) -> float:
        """Time steps until the learning curve reaches the threshold; NaN if it never does."""
        if threshold is None:
            return np.nan
        started = self.points >= self.episodes["timesteps"].min()
        return float(min(self.points[(self.curve >= threshold) & started], default=np.nan))


def updates_of(results: Iterable[Result]) -> pd.DataFrame | None:
    """Concatenate the measured updates of several runs; None if there are none."""
    frames = [result.updates for result in results if result.updates is not None and len(result.updates)]
    return pd.concat(frames) if frames else None


def read(store: Store) -> list[Result]:
    """Read all finished runs, sorted by environment, arm and seed."""
    environments, arms = store.plan.environments, store.plan.names
    runs: Iterable[Run] = filter(store.finished, store.plan.runs())
    runs = sorted(runs, key=lambda run: (environments.index(run.env), arms.index(run.arm)))
    return [Result.read(run, store.folder / run.folder) for run in runs]
