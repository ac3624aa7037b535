"""
The results on disk: a folder that is consistent at all times.

    plan.yml           environments, arms, seeds and all hyperparameters
    command.json       the last command, versions, machine; those of earlier commands where they differ
    runs/…             a zoo log folder for each arm: runs/<arm>/<algo>/<env>_<seed + 1>
    failures/…         tracebacks of failed runs, which are retried the next time
    statistics.json, runs.csv, plots/…, report.md, report.html

Files and run folders are written under a temporary name and renamed when complete, so a run's folder always holds a finished
run.
"""

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd

from sb3_adaptive_kl.compare.arms import PlanError, reported
from sb3_adaptive_kl.compare.backends import Outcome
from sb3_adaptive_kl.compare.plan import Plan, Run, changes_between

PLAN_FILE, COMMAND_FILE = "plan.yml", "command.json"
SETUP = ("versions", "python", "machine")
UNFINISHED = ".unfinished-"
# Points of a learning curve; each is the mean of the episodes that ended since the fifth point before it
N_POINTS, WINDOW = 100, 5


@dataclass(frozen=True)
class Result:
    """One finished run, read from its folder."""

    run: Run
    summary: dict[str, Any]
    episodes: pd.DataFrame  # rows of `Recorder`, of training episodes that ended within the budget
    updates: pd.DataFrame  # rows of `Ruler`; none for an algorithm it cannot measure

    @classmethod
    def read(cls, run: Run, folder: Path) -> "Result":
        """
        Read a finished run.

        :param run: as the plan has it
        :param folder: of the run
        :raises PlanError: if it was run otherwise: the plan has been edited in its folder
        """
        summary, episodes = json.loads((folder / "run.json").read_text()), pd.read_csv(folder / "episodes.csv")
        ran = {**summary["hyperparameters"], "n_eval_episodes": len(summary["final_returns"])}
        # JSON has text for keys
        planned = json.loads(json.dumps({**run.hyperparameters, "n_eval_episodes": run.n_eval_episodes}))
        if changes := changes_between(ran, planned):
            raise PlanError(f"{PLAN_FILE} was edited after {folder} had been run, choose another folder: {'; '.join(changes)}")
        in_budget = episodes["timesteps"] <= run.budget
        updates = folder / "updates.csv"  # older versions wrote none for an algorithm that cannot be measured
        return cls(run, summary, episodes[in_budget], pd.read_csv(updates) if updates.is_file() else pd.DataFrame())

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
        bins = np.ceil(self.episodes["timesteps"].astype(float) * N_POINTS / self.run.budget)
        ended = self.episodes["return"].astype(float).groupby(bins).agg(["sum", "count"])
        windows = ended.reindex(range(1, N_POINTS + 1), fill_value=0).rolling(WINDOW, min_periods=1).sum()
        # Where no episode ended, repeat the last mean; before the first episode, the first mean
        return (windows["sum"] / windows["count"]).where(windows["count"] > 0).ffill().bfill().to_numpy()

    def steps_to(self, threshold: float) -> float:
        """Time steps until the learning curve reaches the threshold; NaN if it never does, or the threshold is NaN."""
        started = self.points >= self.episodes["timesteps"].min()
        return float(min(self.points[(self.curve >= threshold) & started], default=np.nan))


def updates_of(results: Iterable[Result]) -> pd.DataFrame | None:
    """Concatenate the measured updates of several runs; None if there are none."""
    frames = [result.updates for result in results if len(result.updates)]
    return pd.concat(frames) if frames else None


@dataclass(frozen=True)
class Store:
    """Reads and writes a results folder."""

    folder: Path
    plan: Plan

    @classmethod
    def open(cls, folder: Path) -> "Store":
        """
        Open existing results.

        :param folder: the results folder
        :raises PlanError: if the folder does not hold results
        """
        if not (folder / PLAN_FILE).is_file():
            raise PlanError(f"{folder} is not a results folder: it does not contain {PLAN_FILE}")
        return cls(folder, Plan.load(folder / PLAN_FILE))

    @classmethod
    def create(cls, folder: Path, plan: Plan, command: dict[str, Any]) -> "Store":
        """
        Create the folder, or reuse one with the same plan.

        :param folder: the results folder
        :param plan: the plan
        :param command: content of command.json
        :raises PlanError: if the folder cannot be written to, holds other files, or has another plan
        """
        store = cls(folder, plan)
        # Runs of two plans side by side would be averaged without a word
        if (folder / PLAN_FILE).is_file():
            if difference := cls.open(folder).plan.difference(plan):
                raise PlanError(f"{folder} belongs to another plan, choose another folder: {'; '.join(difference)}")
            store.results()  # they tell whether the file has been edited
        elif folder.is_dir() and any(not path.name.startswith(UNFINISHED) for path in folder.iterdir()):
            raise PlanError(f"{folder} is neither empty nor a results folder, choose another folder")
        with reported(f"cannot write to {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob(f"{UNFINISHED}*"):  # left behind by a killed driver
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            store.write(PLAN_FILE, plan.dump())
            store.write(COMMAND_FILE, json.dumps({**command, "earlier": store.earlier_setups(command)}, indent=1))
        return store

    def earlier_setups(self, command: dict[str, Any]) -> list[dict[str, Any]]:
        """Versions and machines of earlier commands, which runs may be from, other than those of this command."""
        file = self.folder / COMMAND_FILE
        earlier = json.loads(file.read_text()) if file.is_file() else command
        setups = [{key: earlier.get(key) for key in SETUP}, *earlier.get("earlier", [])]
        return [setup for setup in setups if setup != {key: command.get(key) for key in SETUP}]

    def finished(self, run: Run) -> bool:
        return (self.folder / run.folder / "run.json").is_file()

    def results(self) -> list[Result]:
        """Read the finished runs, sorted by environment, arm and seed."""
        order = list(product(self.plan.environments, self.plan.names))
        runs = sorted(filter(self.finished, self.plan.runs()), key=lambda run: order.index((run.env, run.arm)))
        return [Result.read(run, self.folder / run.folder) for run in runs]

    def keep(self, run: Run, outcome: Outcome) -> None:
        """Write the files of a finished run or the traceback of a failed one."""
        failure = self._failure_file(run)
        if isinstance(outcome, str):
            self.write(str(failure), outcome)
            return
        unfinished, destination = self.folder / f"{UNFINISHED}{failure.stem}", self.folder / run.folder
        # Elsewhere first: a run.json in the run's own folder says that the run is finished
        for name, content in outcome.items():
            (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
            (unfinished / name).write_bytes(content)
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(destination, ignore_errors=True)  # without run.json: damaged, or not written by us
        os.replace(unfinished, destination)
        (self.folder / failure).unlink(missing_ok=True)  # of an earlier attempt

    def failures(self) -> dict[str, str]:
        """Failed run → its error in one line."""
        runs = [(run, self.folder / self._failure_file(run)) for run in self.plan.runs() if not self.finished(run)]
        return {str(run): file.read_text().splitlines()[0] for run, file in runs if file.is_file()}

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file in one step."""
        path, unfinished = self.folder / name, self.folder / f"{UNFINISHED}{name.replace('/', '_')}"
        path.parent.mkdir(exist_ok=True)
        unfinished.write_bytes(content if isinstance(content, bytes) else content.encode())
        os.replace(unfinished, path)

    def _failure_file(self, run: Run) -> Path:
        return Path("failures", f"{run.folder.removeprefix('runs/').replace('/', '_')}.txt")
