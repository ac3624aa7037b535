"""
Backends that execute runs: on this machine, each in a process of its own (loky), or on a cluster, as Ray tasks.

Both are generators of pairs: a run, and its current time step or its outcome. The files of a run are sent to the driver, so a
shared disk is not needed. A run that fails does not stop the others. Closing the generator ends the runs that are still going.
"""

import logging
import os
import signal
import tempfile
import traceback
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

from sb3_adaptive_kl.compare.arms import reported
from sb3_adaptive_kl.compare.plan import Run

POLL_SECONDS = 0.3
# One thread per run; the limits must be set before numpy and torch are imported
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
# Content of a finished run's folder, by relative path; or why the run failed: the error in one line, and its traceback below
Outcome = dict[str, bytes] | str
Events = Generator[tuple[Run, int | Outcome], None, None]
Backend = Callable[[Sequence[Run]], Events]


def attempt(run: Run, report: Callable[[int], None]) -> Outcome:
    """Execute a run in the current process, which every backend starts for this run alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver handles Ctrl-C and ends this process
    try:
        report(0)  # the driver counts from here how long a run takes no time step
        from sb3_adaptive_kl.compare.execute import execute

        return execute(run, report)
    except BaseException as error:  # an environment may even call sys.exit()
        return _described(error)


def _described(error: BaseException) -> str:
    line = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
    return "\n".join([line, "", *traceback.format_exception(error)])


def _poll(active: dict["Future[Outcome]", Run], timesteps: dict[str, int]) -> Events:
    """
    Wait for a moment, and yield what happened.

    :param active: the runs that are going; those that end are removed
    :param timesteps: folder of a run → its current time step
    """
    done, going = wait(active, POLL_SECONDS, FIRST_COMPLETED)
    yield from ((active[future], timesteps[active[future].folder]) for future in going if active[future].folder in timesteps)
    for future in done:
        error = future.exception()  # not the run's: its process died, out of memory for example
        yield active.pop(future), future.result() if error is None else _described(error)


# ---------------------------------------------------------------- loky


def loky(jobs: int) -> Backend:
    """
    Execute runs on this machine.

    :param jobs: number of runs at a time
    """
    from loky import ProcessPoolExecutor

    def execute_all(runs: Sequence[Run]) -> Events:
        waiting = list(runs)
        active: dict[Future[Outcome], Run] = {}
        executors: dict[str, ProcessPoolExecutor] = {}
        with tempfile.TemporaryDirectory() as folder:
            reported = {run.folder: Path(folder, str(i)) for i, run in enumerate(runs)}
            try:
                while waiting or active:
                    # Not all at once: a process that waits would hold hundreds of megabytes of imported modules
                    while waiting and len(active) < jobs:
                        run = waiting.pop(0)
                        # An executor for each run, so that a killed process does not break other runs
                        executors[run.folder] = ProcessPoolExecutor(max_workers=1, env=ONE_THREAD)
                        future = executors[run.folder].submit(_report_to_file, run, reported[run.folder], os.getpid())
                        active[future] = run
                    timesteps = {key: int(path.read_text()) for key, path in reported.items() if path.exists()}
                    for run, event in _poll(active, timesteps):
                        if not isinstance(event, int):
                            executors.pop(run.folder).shutdown(kill_workers=True)
                        yield run, event
            finally:
                # After Ctrl-C: a worker would first finish its run
                for executor in executors.values():
                    executor.shutdown(kill_workers=True)

    return execute_all


def _report_to_file(run: Run, path: Path, driver: int) -> Outcome:
    def report(timesteps: int) -> None:
        if os.getppid() != driver:  # the driver was killed: there is nothing to return the result to
            os._exit(1)
        # Replace the file in one step, so that a reader sees the old number or the new one
        unfinished = path.with_suffix(".new")
        unfinished.write_text(str(timesteps))
        os.replace(unfinished, path)

    return attempt(run, report)


# ---------------------------------------------------------------- Ray


def ray(jobs: int, address: str | None = None) -> Backend:
    """
    Execute runs as tasks of a Ray cluster.

    :param jobs: number of CPUs of the cluster to start on this machine
    :param address: address of an existing cluster to use instead; its CPUs limit the number of runs at a time
    :raises PlanError: if Ray is not installed or the cluster cannot be reached
    """
    with reported("the ray backend needs pip install '.[ray]' in the clone, or pip install ray"):
        import ray as library
        from ray.util.queue import Queue
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    # The dashboard is a web server, which nobody who compares has asked for
    cluster = {"address": address} if address else {"address": "local", "num_cpus": jobs, "include_dashboard": False}
    with reported(f"no Ray cluster at {address}" if address else "cannot start a Ray cluster"):
        library.init(**cluster, log_to_driver=False, logging_level=logging.ERROR)

    def execute_all(runs: Sequence[Run]) -> Events:
        # Progress is kept on the driver's node, which lasts as long as the driver
        driver_node = NodeAffinitySchedulingStrategy(library.get_runtime_context().get_node_id(), soft=False)
        progress = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": driver_node})
        one_process: dict[str, Any] = {"num_cpus": 1, "max_calls": 1, "runtime_env": {"env_vars": ONE_THREAD}}
        # Retried if its process or node is lost. An exception in the run is its outcome, and is not retried
        task = library.remote(max_retries=5, **one_process)(_report_to_queue)
        active = {task.remote(run, progress).future(): run for run in runs}
        timesteps: dict[str, int] = {}
        try:
            while active:
                timesteps.update(progress.get_nowait_batch(progress.qsize()))
                yield from _poll(active, timesteps)
        finally:
            library.shutdown()

    return execute_all


def _report_to_queue(run: Run, progress: Any) -> Outcome:
    return attempt(run, lambda timesteps: progress.put((run.folder, timesteps)))
