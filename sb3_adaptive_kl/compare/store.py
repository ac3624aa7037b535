"""
The results on disk: a folder that is consistent at every moment.

    plan.yml           what is compared, settled
    command.json       the command, versions, machine
    runs/…             a zoo log folder for each arm: runs/<arm>/<algo>/<env>_<seed + 1>
    failures/…         the tracebacks of runs that failed; they are repeated the next time
    statistics.json, timings.json, runs.csv, plots/…, report.md, report.html

A run's folder appears under its name in one step, when it is complete: whatever is there is finished.
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
from sb3_adaptive_kl.compare.backends import Failure, Files
from sb3_adaptive_kl.compare.plan import PLAN_FILE, Plan, Run

UNFINISHED = ".unfinished-"
COMMAND_FILE = "command.json"


class Store:
    """
    :param folder: of the results
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def open(cls, folder: Path) -> tuple["Store", Plan]:
        """
        :return: the results in a folder, and their plan
        :raises PlanError: if there are none
        """
        if not (folder / PLAN_FILE).is_file():
            raise PlanError(f"{folder} holds no results: there is no {PLAN_FILE}")
        return cls(folder), Plan.load(folder / PLAN_FILE)

    @staticmethod
    def check(folder: Path, plan: Plan) -> None:
        """
        :raises PlanError: if the folder is something else, or has another plan
        """
        existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
        if not existing.is_dir():
            raise PlanError(f"{existing} is a file")
        if not os.access(existing, os.W_OK):
            raise PlanError(f"{existing} cannot be written to")
        if (folder / PLAN_FILE).is_file():
            difference = Plan.load(folder / PLAN_FILE).difference(plan)
            if difference:
                raise PlanError(f"{folder} has another plan, choose another folder: {'; '.join(difference)}")
        elif folder.exists() and any(not path.name.startswith(UNFINISHED) for path in folder.iterdir()):
            raise PlanError(f"{folder} is not empty and holds no results: choose another folder")

    @classmethod
    def create(cls, folder: Path, plan: Plan, command: dict[str, Any]) -> "Store":
        """
        Make the folder, or continue in one with the same plan.

        :raises PlanError: as ``check``
        """
        cls.check(folder, plan)
        store = cls(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PlanError(f"{folder} cannot be made: {error.strerror}") from None
        for path in folder.glob(f"{UNFINISHED}*"):  # left by a driver that was killed
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        store.write(PLAN_FILE, plan.dump())
        store.write(COMMAND_FILE, json.dumps(command, indent=1))
        return store

    def finished(self, run: Run) -> bool:
        return (self.folder / run.folder / "run.json").is_file()

    def keep(self, run: Run, outcome: Files | Failure) -> None:
        """Write a run's files, or why there are none."""
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
        if destination.exists():  # without a run.json: somebody else's, or damaged
            shutil.rmtree(destination)
        os.replace(unfinished, destination)
        failure.unlink(missing_ok=True)

    def failures(self, plan: Plan) -> dict[str, str]:
        """The runs that failed, each with the last line of its traceback."""
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
        :raises PlanError: if the stage that writes it has not run
        """
        path = self.folder / name
        if not path.is_file():
            raise PlanError(f"{path} is not there: run the stage before")
        return json.loads(path.read_text())

    def results(self, plan: Plan) -> Iterator[tuple[Run, Path]]:
        """The finished runs and their folders."""
        for run in plan.runs():
            if self.finished(run):
                yield run, self.folder / run.folder

    def _failure_file(self, run: Run) -> Path:
        return self.folder / "failures" / f"{run.folder.removeprefix('runs/').replace('/', '_')}.txt"


def on_folder(stage: Callable[[Plan, Store], object]) -> None:
    """Run one stage alone, on the folder that is the only argument of the command."""
    try:
        if len(sys.argv) != 2:
            raise PlanError("one argument, the folder of the results")
        store, plan = Store.open(Path(sys.argv[1]))
        stage(plan, store)
    except PlanError as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(2)
