"""What is shown while runs are carried out: one live display on a terminal, a line per finished run elsewhere."""

import json
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import fmean

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from sb3_adaptive_kl.compare import backends
from sb3_adaptive_kl.compare.plan import Run


def display(runs: Sequence[Run], n_finished: int) -> "Lines":
    """
    :param runs: to be carried out
    :param n_finished: runs that were finished before
    """
    return Bars(runs, n_finished) if sys.stderr.isatty() else Lines(runs, n_finished)


class Lines:
    """A line for each run that finishes."""

    def __init__(self, runs: Sequence[Run], n_finished: int) -> None:
        self.n_finished = n_finished
        self.n_runs = n_finished + len(runs)
        if n_finished:
            self.say(f"{n_finished} of {self.n_runs} runs are done already")

    def shown(self) -> AbstractContextManager[object]:
        """The time in which events come."""
        return nullcontext()

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def update(self, event: backends.Progress | backends.Finished) -> None:
        if isinstance(event, backends.Finished):
            self.n_finished += 1
            self.say(f"[{self.n_finished}/{self.n_runs}] {event.run}: {_outcome(event.outcome)}")


class Bars(Lines):
    """A bar for all runs together and one for each that is running; finished runs leave their line above."""

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
        self._done = 0  # time steps of runs that finished here
        self._running: dict[str, TaskID] = {}  # by folder, which tells a run from every other
        self._started: dict[str, float] = {}
        super().__init__(runs, n_finished)

    def shown(self) -> AbstractContextManager[object]:
        return self._progress

    def say(self, line: str) -> None:
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


def _outcome(outcome: backends.Files | backends.Failure) -> str:
    if isinstance(outcome, backends.Failure):
        return f"failed: {outcome.line}"
    result = json.loads(outcome["run.json"])
    speed = result["timesteps"] / result["seconds"]
    return f"return {fmean(result['final_returns']):.1f}, {result['seconds']:.0f} s, {speed:,.0f} steps/s"
