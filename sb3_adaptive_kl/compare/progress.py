"""Progress of the runs: a live display on a terminal, otherwise one line per finished run."""

import json
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import fmean

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from sb3_adaptive_kl.compare import backends
from sb3_adaptive_kl.compare.plan import Files, Run


def display(runs: Sequence[Run], n_finished: int) -> "Lines":
    """
    Choose the display that fits stderr.

    :param runs: runs to execute
    :param n_finished: number of runs that had finished before
    """
    return Bars(runs, n_finished) if sys.stderr.isatty() else Lines(runs, n_finished)


class Lines:
    """Print a line for every run that ends."""

    def __init__(self, runs: Sequence[Run], n_finished: int) -> None:
        self.n_finished = n_finished
        self.n_runs = n_finished + len(runs)
        if n_finished:
            self.print_line(f"{n_finished} of {self.n_runs} runs have already finished")

    def live(self) -> AbstractContextManager[object]:
        """Context in which ``update`` is called."""
        return nullcontext()

    def print_line(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def update(self, event: backends.Progress | backends.Finished) -> None:
        if isinstance(event, backends.Finished):
            self.n_finished += 1
            self.print_line(f"[{self.n_finished}/{self.n_runs}] {event.run}: {_outcome(event.outcome)}")


class Bars(Lines):
    """Show a progress bar for all runs together and one for each active run, below the lines of the finished runs."""

    def __init__(self, runs: Sequence[Run], n_finished: int) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=Console(stderr=True))
        total = sum(int(run.hyperparameters["n_timesteps"]) for run in runs)
        self._all = self._progress.add_task("all runs", total=total, speed="")
        self._done = 0  # time steps of the runs that ended since the start
        self._running: dict[str, TaskID] = {}  # by folder, which is unique
        self._started: dict[str, float] = {}
        super().__init__(runs, n_finished)

    def live(self) -> AbstractContextManager[object]:
        return self._progress

    def print_line(self, line: str) -> None:
        self._progress.console.print(line, markup=False, highlight=False)

    def update(self, event: backends.Progress | backends.Finished) -> None:
        super().update(event)
        key, n_timesteps = event.run.folder, int(event.run.hyperparameters["n_timesteps"])
        if isinstance(event, backends.Progress):
            if key not in self._running:
                self._running[key] = self._progress.add_task(str(event.run), total=n_timesteps, speed="")
                self._started[key] = time.monotonic()
            seconds = time.monotonic() - self._started[key]
            speed = f"{event.timesteps / seconds:,.0f} steps/s" if seconds > 1 else ""
            self._progress.update(self._running[key], completed=event.timesteps, speed=speed)
        else:
            self._done += n_timesteps
            if key in self._running:
                self._progress.remove_task(self._running.pop(key))
        running = sum(task.completed for task in self._progress.tasks if task.id != self._all)
        self._progress.update(self._all, completed=self._done + running, description=f"{self.n_finished}/{self.n_runs} runs")


def _outcome(outcome: Files | backends.Failure) -> str:
    if isinstance(outcome, backends.Failure):
        return f"failed: {outcome.line}"
    result = json.loads(outcome["run.json"])
    speed = result["timesteps"] / result["seconds"]
    return f"return {fmean(result['final_returns']):.1f}, {result['seconds']:.0f} s, {speed:,.0f} steps/s"
