"""
Command line: `python -m sb3_adaptive_kl.compare`, or `sb3-adaptive-kl compare`.

Exit codes: 0 if all runs finished, 1 if some failed, 2 for invalid input (nothing is written), 130 after Ctrl-C.
"""

import argparse
import json
import math
import platform
import sys
import time
from contextlib import closing
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from sb3_adaptive_kl.compare import backends, report
from sb3_adaptive_kl.compare.arms import PlanError
from sb3_adaptive_kl.compare.execute import check
from sb3_adaptive_kl.compare.plan import FEW_SEEDS, Plan
from sb3_adaptive_kl.compare.store import Store

# Those that can change a result
PACKAGES = ("sb3-adaptive-kl", "stable-baselines3", "sb3-contrib", "rl_zoo3", "gymnasium", "torch", "numpy", "scipy")
# Options whose names are not those of the fields of the plan
FLAGS = {"environments": ["--env"], "arms": ["--algo"], "n_timesteps": ["-n", "--n-timesteps"]}
# Type of a field → how its option is parsed; the other, the budget, may be written as 1e6
KINDS: dict[Any, dict[str, Any]] = {
    list[str]: {"nargs": "+"},
    bool: {"action": "store_true"},
    int: {"type": int},
    Plan.model_fields["protocol"].annotation: {"choices": ["ppo-paper"]},
    Plan.model_fields["sweep"].annotation: {"metavar": "NAME=VALUE,…"},
}
PATIENCE = 300  # seconds without a time step: longer than the update of a large network
HINT = "If its environment never ends an episode, neither does the evaluation: register it with max_episode_steps."


def _flags(name: str) -> list[str]:
    return FLAGS.get(name, [f"--{name.replace('_', '-')}"])


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sb3-adaptive-kl compare",
        description="Compare algorithms on environments: train on the CPU, measure, and write a report.",
        epilog="To resume an interrupted comparison, run the same command again.",
        allow_abbrev=False,  # --seed 7 would mean --seeds 7
    )
    # A field of the plan that is not given is absent from the namespace
    group = parser.add_argument_group("the plan", argument_default=argparse.SUPPRESS)
    for name, field in Plan.model_fields.items():
        if name != "hyperparameters":
            kind = KINDS.get(field.annotation, {"type": float})
            group.add_argument(*_flags(name), dest=name, help=field.description, **kind)
    parser.add_argument("--plan", type=Path, metavar="YML", help="file with the plan, instead of its options below")
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="folder for the results")
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
    # argparse would ask for one, and then for the other
    missing = ["--env"] * (args.plan is None and "environments" not in args) + ["-o"] * (args.output is None)
    if missing:
        parser().error(f"the following arguments are required: {', '.join(missing)}")
    try:
        plan = _plan(args)
        check(plan)
        backend = _backend(args)
        command = {
            "command": ["sb3-adaptive-kl", "compare", *arguments],
            "versions": {package: metadata.version(package) for package in PACKAGES},
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {platform.system()} {platform.release()}",
        }
        store = Store.create(args.output, plan, command)
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
        return Plan.create({"arms": ["ppo_kl", "ppo"], "seeds": FEW_SEEDS, **given})
    if given:
        raise PlanError(f"--plan cannot be combined with {', '.join(_flags(name)[-1] for name in given)}: remove one of them")
    return Plan.load(args.plan)


def _backend(args: argparse.Namespace) -> backends.Backend:
    if args.jobs < 1:
        raise PlanError(f"jobs must be at least 1, not {args.jobs}")
    if args.ray_address is not None and args.backend != "ray":
        raise PlanError("--ray-address requires --backend ray")
    return backends.ray(args.jobs, args.ray_address) if args.backend == "ray" else backends.loky(args.jobs)


def carry_out(store: Store, backend: backends.Backend) -> None:
    """
    Execute the unfinished runs, with progress bars on a terminal and a line for each run that ends.

    A failure is recorded and does not stop the other runs.
    """
    plan, runs = store.plan, list(store.plan.runs())
    todo = [run for run in runs if not store.finished(run)]
    n_finished = len(runs) - len(todo)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    # On stderr, so that stdout has the result alone; and names of arms may look like rich's markup: [0.1, 3]
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    values = [(len(values), "value") for values in plan.sweep.values()]
    sizes = ((len(plan.arms), "arm"), *values, (len(plan.environments), "environment"), (plan.seeds, "seed"))
    budgets = " or ".join(f"{budget:,}" for budget in sorted({run.budget for run in runs}))
    console.print(f"{' × '.join(report.count(*size) for size in sizes)} × {budgets} time steps = {len(runs)} runs")
    if n_finished:
        console.print(f"{n_finished} of {len(runs)} runs have already finished")
    start, total = time.monotonic(), sum(run.budget for run in todo)
    progress: dict[str, tuple[int, float]] = {}  # folder of a run → its time step, and when it took that
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars, closing(backend(todo)) as events:
        overall = bars.add_task(f"{n_finished}/{len(runs)} runs", total=total)
        tasks = {run.folder: bars.add_task("", total=run.budget, visible=False) for run in todo}
        for run, event in events:
            if event == 0:  # it waits for a CPU, or is still importing
                continue
            # A rollout ends beyond the budget
            timesteps = min(event, run.budget) if isinstance(event, int) else run.budget
            before, since = progress.get(run.folder, (0, 0.0))
            if timesteps != before:
                progress[run.folder] = timesteps, time.monotonic()
            elif time.monotonic() - since > PATIENCE:
                console.print(f"{run} has not taken a time step for {PATIENCE // 60} minutes. {HINT}")
                progress[run.folder] = timesteps, math.inf  # say it once
            completed = sum(timesteps for timesteps, _ in progress.values())
            doing = f"{run}, evaluating" if timesteps == run.budget else str(run)
            bars.update(tasks[run.folder], completed=timesteps, visible=isinstance(event, int), description=doing)
            if not isinstance(event, int):
                store.keep(run, event)
                n_finished += 1
                # Not rich's estimate, which follows the last seconds, in which some runs may only evaluate
                left = timedelta(seconds=round((time.monotonic() - start) * (total / completed - 1)))
                ending = f", {left} left" if n_finished < len(runs) else ""
                console.print(f"[{n_finished}/{len(runs)}] {run}: {_in_short(event)}{ending}")
            bars.update(overall, completed=completed, description=f"{n_finished}/{len(runs)} runs")


def _in_short(outcome: backends.Outcome) -> str:
    if isinstance(outcome, str):
        return f"failed: {outcome.splitlines()[0]}"
    result = json.loads(outcome["run.json"])
    speed = result["timesteps"] / result["seconds"]
    return f"return {fmean(result['final_returns']):.1f}, {result['seconds']:.0f} s, {speed:,.0f} steps/s"
