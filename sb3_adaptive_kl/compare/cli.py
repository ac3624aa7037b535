"""
Command line: `python -m sb3_adaptive_kl.compare`, or `sb3-adaptive-kl compare`.

Exit codes: 0 if all runs finished, 1 if some failed, 2 for invalid input (nothing is written), 130 after Ctrl-C.
"""

import argparse
import json
import platform
import sys
from contextlib import closing
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from sb3_adaptive_kl.compare import backends, report
from sb3_adaptive_kl.compare.arms import PlanError
from sb3_adaptive_kl.compare.plan import FEW_SEEDS, Plan
from sb3_adaptive_kl.compare.store import Store

PACKAGES = ("sb3-adaptive-kl", "stable-baselines3", "sb3-contrib", "rl_zoo3", "gymnasium", "torch", "numpy", "scipy")
# Options whose names are not those of the fields of the plan
FLAGS = {"environments": ["--env"], "arms": ["--algo"], "n_timesteps": ["-n", "--n-timesteps"]}
# Type of a field → how its option is parsed; the others are integers
KINDS: dict[Any, dict[str, Any]] = {list[str]: {"nargs": "+"}, bool: {"action": "store_true"}}


def _flags(name: str) -> list[str]:
    return FLAGS.get(name, [f"--{name.replace('_', '-')}"])


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sb3-adaptive-kl compare",
        description="Compare algorithms on environments: train on the CPU, measure, and write a report.",
        epilog="To resume an interrupted comparison, run the same command again.",
    )
    # A field of the plan that is not given is absent from the namespace
    group = parser.add_argument_group("the plan", argument_default=argparse.SUPPRESS)
    for name, field in Plan.model_fields.items():
        if name != "hyperparameters":
            group.add_argument(*_flags(name), dest=name, help=field.description, **KINDS.get(field.annotation, {"type": int}))
    parser.add_argument("--plan", type=Path, metavar="YML", help="file with the plan, instead of its options below")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="folder for the results")
    parser.add_argument("-j", "--jobs", type=int, default=1, metavar="N", help="number of runs at a time (default: 1)")
    parser.add_argument("--backend", choices=["loky", "ray"], default="loky", help="run on this machine or on a Ray cluster")
    parser.add_argument("--ray-address", metavar="ADDRESS", help="existing cluster, whose CPUs replace --jobs")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """
    Run the command.

    :param arguments: command-line arguments, ``sys.argv`` if None
    :return: the exit code
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(arguments)
    try:
        plan = _plan(args)
        plan.check()
        backend = _backend(args)
        store = Store.create(args.output, plan, _command(arguments))
        carry_out(store, backend)
        return report.summarize(store)
    except PlanError as error:
        print(f"sb3-adaptive-kl compare: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished runs are kept, run the same command again to resume", file=sys.stderr)
        return 130


def _plan(args: argparse.Namespace) -> Plan:
    given = {name: value for name, value in vars(args).items() if name in Plan.model_fields}
    if args.plan is None:
        return Plan.create({"environments": [], "arms": ["ppo_kl", "ppo"], "seeds": FEW_SEEDS, **given})
    if given:
        raise PlanError(f"--plan cannot be combined with {', '.join(_flags(name)[-1] for name in given)}: remove one of them")
    return Plan.load(args.plan)


def _backend(args: argparse.Namespace) -> backends.Backend:
    if args.jobs < 1:
        raise PlanError(f"jobs must be at least 1, not {args.jobs}")
    if args.ray_address is not None and args.backend != "ray":
        raise PlanError("--ray-address requires --backend ray")
    return backends.ray(args.jobs, args.ray_address) if args.backend == "ray" else backends.loky(args.jobs)


def _command(arguments: list[str]) -> dict[str, Any]:
    return {
        "command": ["sb3-adaptive-kl", "compare", *arguments],
        "versions": {package: metadata.version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {platform.system()} {platform.release()}",
    }


def carry_out(store: Store, backend: backends.Backend) -> None:
    """
    Execute the unfinished runs, with progress bars on a terminal and a line for each run that ends.

    A failure is recorded and does not stop the other runs.
    """
    runs = list(store.plan.runs())
    todo = [run for run in runs if not store.finished(run)]
    n_finished = len(runs) - len(todo)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars, closing(backend(todo)) as events:
        overall = bars.add_task("all runs", total=sum(run.budget for run in todo))
        tasks = {run.folder: bars.add_task(str(run), False, run.budget, visible=False) for run in todo}
        if n_finished:
            console.print(f"{n_finished} of {len(runs)} runs have already finished")
        for run, event in events:
            task = tasks[run.folder]
            if isinstance(event, int):
                bars.start_task(task)
                bars.update(task, completed=event, visible=event > 0)
            else:
                store.keep(run, event)
                n_finished += 1
                console.print(f"[{n_finished}/{len(runs)}] {run}: {_in_short(event)}")
                bars.update(task, completed=run.budget, visible=False)
            completed = sum(task.completed for task in bars.tasks if task.id != overall)
            bars.update(overall, completed=completed, description=f"{n_finished}/{len(runs)} runs")


def _in_short(outcome: backends.Outcome) -> str:
    if isinstance(outcome, str):
        return f"failed: {outcome.splitlines()[0]}"
    result = json.loads(outcome["run.json"])
    speed = result["timesteps"] / result["seconds"]
    return f"return {fmean(result['final_returns']):.1f}, {result['seconds']:.0f} s, {speed:,.0f} steps/s"
