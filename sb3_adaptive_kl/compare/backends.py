"""
Where runs are carried out: on this machine through joblib's loky, or on a cluster as Ray tasks.

Both are generators of events. Files come back to the driver, so that no disk needs to be shared; a run that fails gives a
`Failure`, and stops no other. Closing the generator ends what is still running.
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
from sb3_adaptive_kl.compare.plan import Run

Files = dict[str, bytes]

POLL_SECONDS = 0.3
# A run is one thread; the limits must be in place before numpy and torch are imported
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
# Ray gives a task another node this often when it loses one; a failure of the run itself is not retried
MAX_LOST_NODES = 5


@dataclass(frozen=True)
class Failure:
    """Why a run gave no files: the last line of the traceback, and all of it."""

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


def carry_out(run: Run, report: Callable[[int], None]) -> Files | Failure:
    """What every backend calls, in a process of the run's own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's, which ends this process
    try:
        from sb3_adaptive_kl.compare.execute import execute

        return execute(run, report)
    except BaseException as error:  # whatever an environment does, sys.exit() too
        return Failure.of(error)


# ---------------------------------------------------------------- loky


def loky(jobs: int) -> Backend:
    """
    :param jobs: runs at a time
    """
    from loky import ProcessPoolExecutor

    def carry_out_all(runs: Sequence[Run]) -> Iterator[Progress | Finished]:
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

    return carry_out_all


def _in_own_process(
    make_executor: Callable[..., Any], run: Run, events: "queue.Queue[Progress | Finished]", stop: threading.Event
) -> None:
    """An executor per run: a process that is killed, by the system for its memory for instance, takes no other along."""
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
    except BaseException as error:  # of the process, not of the run: killed, out of memory. Somebody waits for an event
        events.put(Finished(run, Failure.of(error)))
    finally:
        if executor is not None:
            executor.shutdown(wait=True, kill_workers=True)


def _report_to_file(run: Run, path: str, driver: int) -> Files | Failure:
    def report(timesteps: int) -> None:
        if os.getppid() != driver:  # killed: nobody is left to take the result
            os._exit(1)
        # Whoever reads it sees the old number or the new one
        Path(path + ".new").write_text(str(timesteps))
        os.replace(path + ".new", path)

    return carry_out(run, report)


# ---------------------------------------------------------------- Ray


def ray(jobs: int, address: str | None = None) -> Backend:
    """
    :param jobs: CPUs of a cluster that is started on this machine
    :param address: that of an existing cluster, whose CPUs decide how many runs there are at a time
    :raises PlanError: if Ray is not installed, or there is no such cluster
    """
    try:
        import ray as library
    except ModuleNotFoundError:
        raise PlanError("the ray backend needs Ray: pip install 'sb3-adaptive-kl[ray]'") from None
    cluster: dict[str, Any] = {"address": "local", "num_cpus": jobs, "include_dashboard": False}
    try:
        library.init(**({"address": address} if address else cluster), log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise PlanError(f"no Ray cluster at {address}: {str(error).splitlines()[0]}") from None

    def carry_out_all(runs: Sequence[Run]) -> Iterator[Progress | Finished]:
        try:
            yield from _as_tasks(library, runs)
        finally:
            library.shutdown()

    return carry_out_all


def _as_tasks(library: Any, runs: Sequence[Run]) -> Iterator[Progress | Finished]:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # What the runs tell lives on the driver's node, which is there as long as somebody listens
    here = NodeAffinitySchedulingStrategy(library.get_runtime_context().get_node_id(), soft=False)
    board = library.remote(_Board).options(num_cpus=0, scheduling_strategy=here).remote()
    task = library.remote(
        num_cpus=1,
        max_calls=1,  # a process for itself
        max_retries=MAX_LOST_NODES,
        runtime_env={"env_vars": ONE_THREAD},
    )(_report_to_board)
    pending = {task.remote(run, board): run for run in runs}
    told: dict[str, int] = {}
    while pending:
        done, _ = library.wait(list(pending), num_returns=1, timeout=POLL_SECONDS)
        for reference in done:
            run = pending.pop(reference)
            try:
                outcome = library.get(reference)
            except library.exceptions.RayError as error:
                outcome = Failure.of(error)
            yield Finished(run, outcome)
        latest = library.get(board.read.remote())
        for run in pending.values():
            if latest.get(run.folder) != told.get(run.folder):
                yield Progress(run, latest[run.folder])
        told = latest


class _Board:
    """An actor on which runs write how far they are."""

    def __init__(self) -> None:
        self._timesteps: dict[str, int] = {}

    def write(self, folder: str, timesteps: int) -> None:
        self._timesteps[folder] = timesteps

    def read(self) -> dict[str, int]:
        return self._timesteps


def _report_to_board(run: Run, board: Any) -> Files | Failure:
    return carry_out(run, lambda timesteps: board.write.remote(run.folder, timesteps))
