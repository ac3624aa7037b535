"""
Backends that execute runs: on this machine with joblib's loky, or on a cluster as Ray tasks.

Both are generators of events. The files of a run are sent to the driver, so a shared disk is not needed. A run that fails
yields a `Failure` and does not stop the others. Closing the generator ends the runs that are still going.
"""

import logging
import os
import queue
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sb3_adaptive_kl.compare.arms import PlanError
from sb3_adaptive_kl.compare.plan import Files, Run

POLL_SECONDS = 0.3
# One thread per run; the limits must be set before numpy and torch are imported
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
# How often Ray restarts a task on another node after losing one; a run that fails by itself is not retried
MAX_LOST_NODES = 5


@dataclass(frozen=True)
class Failure:
    """Why a run failed: the last line of its traceback, and the whole traceback."""

    line: str
    traceback: str

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        line = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
        return cls(line, "".join(traceback.format_exception(error)))


@dataclass(frozen=True)
class Progress:
    run: Run
    timesteps: int


@dataclass(frozen=True)
class Finished:
    run: Run
    outcome: Files | Failure


Backend = Callable[[Sequence[Run]], Iterator[Progress | Finished]]


def attempt(run: Run, report: Callable[[int], None]) -> Files | Failure:
    """Execute a run in the current process, which every backend starts for this run alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver handles Ctrl-C and ends this process
    try:
        from sb3_adaptive_kl.compare.execute import execute

        return execute(run, report)
    except BaseException as error:  # an environment may even call sys.exit()
        return Failure.of(error)


# ---------------------------------------------------------------- loky


def loky(jobs: int) -> Backend:
    """
    Execute runs on this machine.

    :param jobs: number of runs at a time
    """
    from loky import ProcessPoolExecutor

    def execute_all(runs: Sequence[Run]) -> Iterator[Progress | Finished]:
        events: queue.Queue[Progress | Finished] = queue.Queue()
        stop = threading.Event()
        with ThreadPoolExecutor(jobs) as threads:
            try:
                for run in runs:
                    threads.submit(_in_own_process, ProcessPoolExecutor, run, events, stop)
                for _ in range(len(runs)):
                    event = events.get()
                    while isinstance(event, Progress):
                        yield event
                        event = events.get()
                    yield event
            finally:
                stop.set()

    return execute_all


def _in_own_process(
    make_executor: Callable[..., Any], run: Run, events: "queue.Queue[Progress | Finished]", stop: threading.Event
) -> None:
    """Give each run its own executor, so that a killed process (out of memory, for example) does not break other runs."""
    if stop.is_set():
        return
    executor = None
    try:
        with tempfile.TemporaryDirectory() as folder:
            timesteps = Path(folder, "timesteps")
            executor = make_executor(max_workers=1, env=ONE_THREAD)
            future = executor.submit(_report_to_file, run, str(timesteps), os.getpid())
            while not future.done() and not stop.wait(POLL_SECONDS):
                if timesteps.exists():
                    events.put(Progress(run, int(timesteps.read_text())))
            if not stop.is_set():
                events.put(Finished(run, future.result()))
    except BaseException as error:  # the process died, e.g. out of memory; the driver still waits for an event
        events.put(Finished(run, Failure.of(error)))
    finally:
        if executor is not None:
            executor.shutdown(wait=True, kill_workers=True)


def _report_to_file(run: Run, path: str, driver: int) -> Files | Failure:
    def report(timesteps: int) -> None:
        if os.getppid() != driver:  # the driver was killed: there is nothing to return the result to
            os._exit(1)
        # Replace the file in one step, so that a reader sees the old number or the new one
        Path(path + ".new").write_text(str(timesteps))
        os.replace(path + ".new", path)

    return attempt(run, report)


# ---------------------------------------------------------------- Ray


def ray(jobs: int, address: str | None = None) -> Backend:
    """
    Execute runs as tasks of a Ray cluster.

    :param jobs: number of CPUs of the cluster to start on this machine
    :param address: address of an existing cluster to use instead; its CPUs limit the number of runs at a time
    :raises PlanError: if Ray is not installed or the cluster cannot be reached
    """
    try:
        import ray as library
    except ModuleNotFoundError:
        raise PlanError("the ray backend needs Ray: pip install 'sb3-adaptive-kl[ray]'") from None
    cluster: dict[str, Any] = {"address": "local", "num_cpus": jobs, "include_dashboard": False}
    try:
        library.init(**({"address": address} if address else cluster), log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        problem = f"cannot reach the Ray cluster at {address}" if address else "cannot start a Ray cluster"
        raise PlanError(f"{problem}: {str(error).splitlines()[0]}") from None

    def execute_all(runs: Sequence[Run]) -> Iterator[Progress | Finished]:
        try:
            yield from _as_tasks(library, runs)
        finally:
            library.shutdown()

    return execute_all


def _as_tasks(library: Any, runs: Sequence[Run]) -> Iterator[Progress | Finished]:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # The progress actor lives on the driver's node, which lasts as long as the driver
    driver_node = NodeAffinitySchedulingStrategy(library.get_runtime_context().get_node_id(), soft=False)
    progress = library.remote(_ProgressActor).options(num_cpus=0, scheduling_strategy=driver_node).remote()
    task = library.remote(
        num_cpus=1,
        max_calls=1,  # one process per run
        max_retries=MAX_LOST_NODES,
        runtime_env={"env_vars": ONE_THREAD},
    )(_report_to_actor)
    pending = {task.remote(run, progress): run for run in runs}
    reported: dict[str, int] = {}
    while pending:
        done, _ = library.wait(list(pending), num_returns=1, timeout=POLL_SECONDS)
        for reference in done:
            run = pending.pop(reference)
            try:
                outcome = library.get(reference)
            except library.exceptions.RayError as error:
                outcome = Failure.of(error)
            yield Finished(run, outcome)
        latest = library.get(progress.read.remote())
        for run in pending.values():
            if latest.get(run.folder) != reported.get(run.folder):
                yield Progress(run, latest[run.folder])
        reported = latest


class _ProgressActor:
    """Ray actor that holds the current time step of every run."""

    def __init__(self) -> None:
        self._timesteps: dict[str, int] = {}

    def write(self, folder: str, timesteps: int) -> None:
        self._timesteps[folder] = timesteps

    def read(self) -> dict[str, int]:
        return self._timesteps


def _report_to_actor(run: Run, progress: Any) -> Files | Failure:
    return attempt(run, lambda timesteps: progress.write.remote(run.folder, timesteps))
