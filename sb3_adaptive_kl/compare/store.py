"""
The results on disk: a folder that is consistent at all times.

    plan.yml           environments, arms, seeds and all hyperparameters
    command.json       the command, versions, machine
    runs/…             a zoo log folder for each arm: runs/<arm>/<algo>/<env>_<seed + 1>
    failures/…         tracebacks of failed runs, which are retried the next time
    statistics.json, timings.json, runs.csv, plots/…, report.md, report.html

A run is written under a temporary name and renamed when it is complete, so a run's folder always holds a finished run.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sb3_adaptive_kl.compare.arms import PlanError
from sb3_adaptive_kl.compare.backends import Failure
from sb3_adaptive_kl.compare.plan import PLAN_FILE, Files, Plan, Run

UNFINISHED = ".unfinished-"
COMMAND_FILE = "command.json"


class Store:
    """
    Reads and writes a results folder.

    :param folder: the results folder
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def open(cls, folder: Path) -> tuple["Store", Plan]:
        """
        Open existing results.

        :param folder: the results folder
        :return: the results and their plan
        :raises PlanError: if the folder does not hold results
        """
        if not (folder / PLAN_FILE).is_file():
            raise PlanError(f"{folder} is not a results folder: it does not contain {PLAN_FILE}")
        return cls(folder), Plan.load(folder / PLAN_FILE)

    @staticmethod
    def check(folder: Path, plan: Plan) -> None:
        """
        Check that the results of a plan can be written to a folder.

        :param folder: the results folder, which need not exist
        :param plan: the plan
        :raises PlanError: if the folder cannot be written to, holds other files, or has another plan
        """
        existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
        if not existing.is_dir():
            raise PlanError(f"{existing} is a file, not a folder")
        if not os.access(existing, os.W_OK):
            raise PlanError(f"{existing} is not writable")
        if (folder / PLAN_FILE).is_file():
            difference = Plan.load(folder / PLAN_FILE).difference(plan)
            if difference:
                raise PlanError(f"{folder} belongs to another plan, choose another folder: {'; '.join(difference)}")
        elif folder.exists() and any(not path.name.startswith(UNFINISHED) for path in folder.iterdir()):
            raise PlanError(f"{folder} is neither empty nor a results folder, choose another folder")

    @classmethod
    def create(cls, folder: Path, plan: Plan, command: dict[str, Any]) -> "Store":
        """
        Create the folder, or reuse one with the same plan.

        :param folder: the results folder
        :param plan: the plan
        :param command: content of command.json
        :raises PlanError: as ``check``
        """
        cls.check(folder, plan)
        store = cls(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PlanError(f"cannot create {folder}: {error.strerror}") from None
        for path in folder.glob(f"{UNFINISHED}*"):  # left behind by a killed driver
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        store.write(PLAN_FILE, plan.dump())
        store.write(COMMAND_FILE, json.dumps(command, indent=1))
        return store

    def finished(self, run: Run) -> bool:
        return (self.folder / run.folder / "run.json").is_file()

    def keep(self, run: Run, outcome: Files | Failure) -> None:
        """Write the files of a finished run or the traceback of a failed one."""
        failure = self._failure_file(run)
        if isinstance(outcome, Failure):
            failure.parent.mkdir(parents=True, exist_ok=True)
            failure.write_text(f"{outcome.line}\n\n{outcome.traceback}")
            return
        unfinished = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=self.folder))
        for name, content in outcome.items():
            path = unfinished / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        unfinished.chmod(0o755)
        destination = self.folder / run.folder
        destination.parent.mkdir(parents=True, exist_ok=True)
        if destination.exists():  # without run.json: damaged, or not written by us
            shutil.rmtree(destination)
        os.replace(unfinished, destination)
        failure.unlink(missing_ok=True)

    def failures(self, plan: Plan) -> dict[str, str]:
        """Failed run → last line of its traceback."""
        runs = (run for run in plan.runs() if not self.finished(run) and self._failure_file(run).is_file())
        return {str(run): self._failure_file(run).read_text().splitlines()[0] for run in runs}

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file in one step."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        unfinished = self.folder / f"{UNFINISHED}{path.name}"
        unfinished.write_bytes(content if isinstance(content, bytes) else content.encode())
        os.replace(unfinished, path)

    def read_json(self, name: str) -> Any:
        """
        Read a file that an earlier stage has written.

        :param name: name of the file
        :raises PlanError: if it does not exist
        """
        path = self.folder / name
        if not path.is_file():
            raise PlanError(f"{path} does not exist: run the previous stage first")
        return json.loads(path.read_text())

    def results(self, plan: Plan) -> Iterator[tuple[Run, Path]]:
        """Yield the finished runs and their folders."""
        for run in plan.runs():
            if self.finished(run):
                yield run, self.folder / run.folder

    def _failure_file(self, run: Run) -> Path:
        return self.folder / "failures" / f"{run.folder.removeprefix('runs/').replace('/', '_')}.txt"


def on_folder(stage: Callable[[Plan, Store], object]) -> None:
    """Run a single stage on the results folder given on the command line."""
    try:
        if len(sys.argv) != 2:
            raise PlanError("expected exactly one argument, the results folder")
        store, plan = Store.open(Path(sys.argv[1]))
        stage(plan, store)
    except PlanError as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(2)
